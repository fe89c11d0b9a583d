"""The Hopper kernels of attention for up to 256 tokens, in Gluon, Triton's language of explicit layouts.

They differ from `_attention_triton` in what Triton leaves to no one: matrix products run while the next ones are issued
and while exponentials are taken; P and dS enter the next product from the registers in which the last one left them;
everything a program reads is asked for at its start.

A program's waits: `warpgroup_mma_wait(n)` lets the n products issued last go on; those before are done.
"""

from __future__ import annotations

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (this is Triton's language, in Python's syntax)
import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.7 renamed it


@gluon.jit
def _fetch(to_head, to_tail, base, first, stride: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
           WARPS: gl.constexpr):  # fmt: skip
    """Begin copying rows first … first + ROWS of a matrix [N, D]; the tail is padded with zeros."""
    HEAD_AT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, HEAD_AT))
    cols = gl.arange(0, 64, gl.SliceLayout(0, HEAD_AT))
    async_copy.async_copy_global_to_shared(to_head, base + rows[:, None] * stride + cols[None, :])
    if D > 64:
        TAIL_AT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
        rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, TAIL_AT))
        cols = 64 + gl.arange(0, 16, gl.SliceLayout(0, TAIL_AT))
        pointers, mask = base + rows[:, None] * stride + cols[None, :], (rows[:, None] >= 0) & (cols[None, :] < D)
        async_copy.async_copy_global_to_shared(to_tail, pointers, mask)


@gluon.jit
def _write(base, tile, first, stride: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Store the head [ROWS, 64] held in shared memory."""
    HEAD_AT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, HEAD_AT))
    cols = gl.arange(0, 64, gl.SliceLayout(0, HEAD_AT))
    gl.store(base + rows[:, None] * stride + cols[None, :], tile.load(HEAD_AT))


@gluon.jit
def _write_tail(base, value, first, stride: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, AT: gl.constexpr):
    """Store a tail [ROWS, 16] from the registers of a product."""
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, AT))
    cols = 64 + gl.arange(0, 16, gl.SliceLayout(0, AT))
    gl.store(base + rows[:, None] * stride + cols[None, :], value.to(base.dtype.element_ty), cols[None, :] < D)


@gluon.jit
def _scores(a_head, a_tail, b_head, b_tail, D: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
            AT: gl.constexpr):  # fmt: skip
    """Begin a bᵀ [ROWS, COLS]."""
    result = gl.zeros([ROWS, COLS], gl.float32, AT)
    result = warpgroup_mma(a_head, b_head.permute((1, 0)), result, use_acc=False, is_async=True)
    if D > 64:
        result = warpgroup_mma(a_tail, b_tail.permute((1, 0)), result, is_async=True)
    return result


@gluon.jit
def forward_kernel(
    qkv, out, lse, scale,
    H: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """One program of 4 warps: one head of N = 256 tokens, 64 queries at a time; two share a multiprocessor."""
    ROW: gl.constexpr = 3 * H * D
    WARPS: gl.constexpr = 4
    TILES: gl.constexpr = N // 64
    DTYPE: gl.constexpr = qkv.dtype.element_ty
    S_AT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    O_AT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    T_AT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    HEAD_IN: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    TAIL_IN: gl.constexpr = gl.NVMMASharedLayout(32, 16)
    ROWS_AT: gl.constexpr = gl.SliceLayout(1, S_AT)

    pair = gl.program_id(0).to(gl.int64)
    base = qkv + (pair // H) * (N * ROW) + (pair % H) * D
    out_base = out + (pair // H) * (N * H * D) + (pair % H) * D
    k_head = gl.allocate_shared_memory(DTYPE, [N, 64], HEAD_IN)
    v_head = gl.allocate_shared_memory(DTYPE, [N, 64], HEAD_IN)
    q_head = gl.allocate_shared_memory(DTYPE, [3, 64, 64], HEAD_IN)
    if D > 64:
        k_tail = gl.allocate_shared_memory(DTYPE, [N, 16], TAIL_IN)
        v_tail = gl.allocate_shared_memory(DTYPE, [N, 16], TAIL_IN)
        q_tail = gl.allocate_shared_memory(DTYPE, [3, 64, 16], TAIL_IN)
    else:
        k_tail, v_tail, q_tail = k_head, v_head, q_head
    _fetch(q_head.index(0), q_tail.index(0), base, 0, ROW, D, 64, WARPS)
    _fetch(k_head, k_tail, base + H * D, 0, ROW, D, N, WARPS)
    async_copy.commit_group()
    _fetch(v_head, v_tail, base + 2 * H * D, 0, ROW, D, N, WARPS)
    _fetch(q_head.index(1), q_tail.index(1), base, 64, ROW, D, 64, WARPS)
    async_copy.commit_group()
    _fetch(q_head.index(2), q_tail.index(2), base, 128, ROW, D, 64, WARPS)
    async_copy.commit_group()
    log2_scale = scale * 1.4426950408889634
    for tile in gl.static_range(TILES):
        if tile == 0:
            async_copy.wait_group(2)
        elif tile == 1:
            async_copy.wait_group(1)
        else:
            async_copy.wait_group(0)
        mine = q_head.index(tile % 3)
        scores = _scores(mine, q_tail.index(tile % 3), k_head, k_tail, D, 64, N, S_AT)
        scores = warpgroup_mma_wait(0, [scores])
        top = gl.max(scores, 1) * log2_scale
        weights = gl.exp2(scores * log2_scale - top[:, None])
        total = gl.sum(weights, 1)
        rounded = weights.to(DTYPE)
        if tile == 0:
            async_copy.wait_group(1)  # v
        o_head = gl.zeros([64, 64], gl.float32, O_AT)
        a_head = gl.convert_layout(rounded, gl.DotOperandLayout(0, O_AT, 2))
        o_head = warpgroup_mma(a_head, v_head, o_head, use_acc=False, is_async=True)
        if D > 64:
            o_tail = gl.zeros([64, 16], gl.float32, T_AT)
            a_tail = gl.convert_layout(rounded, gl.DotOperandLayout(0, T_AT, 2))
            o_tail = warpgroup_mma(a_tail, v_tail, o_tail, use_acc=False, is_async=True)
        inverse = 1.0 / total
        rows = tile * 64 + gl.arange(0, 64, ROWS_AT)
        gl.store(lse + pair * N + rows, (top + gl.log2(total)) * 0.6931471805599453)
        if D > 64:
            o_head, o_tail = warpgroup_mma_wait(0, [o_head, o_tail])
            tail_inverse = gl.convert_layout(inverse, gl.SliceLayout(1, T_AT))
            _write_tail(out_base, o_tail * tail_inverse[:, None], tile * 64, H * D, D, 64, T_AT)
        else:
            o_head = warpgroup_mma_wait(0, [o_head])
        mine.store((o_head * gl.convert_layout(inverse, gl.SliceLayout(1, O_AT))[:, None]).to(DTYPE))
        _write(out_base, mine, tile * 64, H * D, 64, WARPS)
        if tile + 3 < TILES:
            _fetch(mine, q_tail.index(tile % 3), base, (tile + 3) * 64, ROW, D, 64, WARPS)
            async_copy.commit_group()


# -- backward ----------------------------------------------------------------------------------------------------------

S_AT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # a [64, 64] product of 4 warps
T_AT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
HEAD_AT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # pieces of 16 bytes, rows side by side
TAIL_AT = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))  # the same rows in the same threads
COLUMNS_AT = gl.constexpr(gl.BlockedLayout([32, 1], [1, 32], [2, 2], [0, 1]))  # for sums over the rows
# The rows of S_AT in pieces of 16 bytes: the four threads that share a row have exchanged theirs.
STORE_AT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
)


@gluon.jit
def _buffers(DTYPE: gl.constexpr, COUNT: gl.constexpr, D: gl.constexpr):
    """Shared memory for `COUNT` blocks of 64 rows; without a tail, the head twice."""
    head = gl.allocate_shared_memory(DTYPE, [COUNT, 64, 64], gl.NVMMASharedLayout(128, 16))
    tail = gl.allocate_shared_memory(DTYPE, [COUNT, 64, 16], gl.NVMMASharedLayout(32, 16)) if D > 64 else head
    return head, tail


@gluon.jit
def _load(base, first, stride: gl.constexpr, D: gl.constexpr):
    """64 rows of a matrix [N, D] to registers, the tail padded with zeros."""
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, HEAD_AT))
    cols = gl.arange(0, 64, gl.SliceLayout(0, HEAD_AT))
    head = gl.load(base + rows[:, None] * stride + cols[None, :])
    if D > 64:
        rows = first + gl.arange(0, 64, gl.SliceLayout(1, TAIL_AT))
        cols = 64 + gl.arange(0, 16, gl.SliceLayout(0, TAIL_AT))
        pointers, mask = base + rows[:, None] * stride + cols[None, :], (rows[:, None] >= 0) & (cols[None, :] < D)
        tail = gl.load(pointers, mask, 0.0)
    else:
        tail = head
    return head, tail


@gluon.jit
def _row_dot(a_head, a_tail, b_head, b_tail, D: gl.constexpr, AT: gl.constexpr):
    """Σ over columns of a ∘ b in fp32, a and b as loaded by `_load`; one value a row."""
    result = gl.sum(a_head.to(gl.float32) * b_head.to(gl.float32), 1)
    if D > 64:
        tail = gl.sum(a_tail.to(gl.float32) * b_tail.to(gl.float32), 1)
        result += gl.convert_layout(tail, gl.SliceLayout(1, HEAD_AT), assert_trivial=True)
    return gl.convert_layout(result, AT)


@gluon.jit
def _store_rows(base, head, tail, first, stride: gl.constexpr, D: gl.constexpr):
    """Store 64 rows from the registers of products."""
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, STORE_AT))
    cols = gl.arange(0, 64, gl.SliceLayout(0, STORE_AT))
    value = gl.convert_layout(head.to(base.dtype.element_ty), STORE_AT)
    gl.store(base + rows[:, None] * stride + cols[None, :], value)
    if D > 64:
        _write_tail(base, tail, first, stride, D, 64, T_AT)


@gluon.jit
def _store_first_row(base, tile, COLS: gl.constexpr, first: gl.constexpr, D: gl.constexpr, AT: gl.constexpr):
    """Store the first row of a tile [64, COLS] as columns first … first + COLS of a vector [D]."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, AT))
    cols = first + gl.arange(0, COLS, gl.SliceLayout(0, AT))
    gl.store(base + rows[:, None] + cols[None, :], tile, (rows[:, None] == 0) & (cols[None, :] < D))


@gluon.jit
def _begin_add(weights, b_head, b_tail, head, tail, D: gl.constexpr):
    """Begin (head, tail) + weights · b; the weights stay in the registers in which their product left them."""
    in_head = gl.convert_layout(weights, gl.DotOperandLayout(0, S_AT, 2))
    head = warpgroup_mma(in_head, b_head, head, is_async=True)
    if D > 64:
        in_tail = gl.convert_layout(weights, gl.DotOperandLayout(0, T_AT, 2))
        tail = warpgroup_mma(in_tail, b_tail, tail, is_async=True)
    return head, tail


@gluon.jit
def _zeros():
    head = warpgroup_mma_init(gl.zeros([64, 64], gl.float32, S_AT))
    return head, warpgroup_mma_init(gl.zeros([64, 16], gl.float32, T_AT))


@gluon.jit
def _wait(COUNT: gl.constexpr, head, tail, D: gl.constexpr):
    """(head, tail) once all but the last `COUNT` products are done."""
    if D > 64:
        head, tail = warpgroup_mma_wait(COUNT, [head, tail])
    else:
        head = warpgroup_mma_wait(COUNT, [head])
        tail = head
    return head, tail


@gluon.jit
def _keys_program(
    q, k, v, o, do, lse, dk, dv, k_sums, v_sums, scale,
    ROW: gl.constexpr, OUT_ROW: gl.constexpr, BLOCKS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """dk and dv of a head. All queries stay in shared memory; keys pass by, 64 at a time. Scores are [keys, queries]."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    PRODUCTS: gl.constexpr = 2 if D > 64 else 1  # an operand has a head and perhaps a tail
    ROWS: gl.constexpr = gl.SliceLayout(1, HEAD_AT)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_AT)
    q_head, q_tail = _buffers(DTYPE, BLOCKS, D)
    do_head, do_tail = _buffers(DTYPE, BLOCKS, D)
    kv_head, kv_tail = _buffers(DTYPE, 2, D)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lses = gl.allocate_shared_memory(gl.float32, [BLOCKS, 64], VECTOR)  # in units of log 2
    deltas = gl.allocate_shared_memory(gl.float32, [BLOCKS, 64], VECTOR)  # Σ do ∘ out of every query
    k_head, k_tail, v_head, v_tail = kv_head.index(0), kv_tail.index(0), kv_head.index(1), kv_tail.index(1)
    _fetch(k_head, k_tail, k, 0, ROW, D, 64, 4)
    _fetch(v_head, v_tail, v, 0, ROW, D, 64, 4)
    for i in gl.static_range(BLOCKS):
        _fetch(q_head.index(i), q_tail.index(i), q, i * 64, ROW, D, 64, 4)
        _fetch(do_head.index(i), do_tail.index(i), do, i * 64, OUT_ROW, D, 64, 4)
        async_copy.commit_group()
    # rows of P add up to one, so those of dv add up to those of do; a product with ones makes that sum
    sum_head, sum_tail = _zeros()
    ones = gl.full([64, 64], 1.0, DTYPE, S_AT)
    o_head, o_tail = _load(o, 0, OUT_ROW, D)
    for i in gl.static_range(BLOCKS):
        if i + 1 < BLOCKS:
            next_head, next_tail = _load(o, (i + 1) * 64, OUT_ROW, D)
        lses.index(i).store(gl.load(lse + i * 64 + gl.arange(0, 64, ROWS)) * 1.4426950408889634)
        async_copy.wait_group(BLOCKS - 1 - i)
        fence_async_shared()
        sum_head, sum_tail = _begin_add(ones, do_head.index(i), do_tail.index(i), sum_head, sum_tail, D)
        here_head = do_head.index(i).load(HEAD_AT)
        here_tail = do_tail.index(i).load(TAIL_AT) if D > 64 else here_head
        deltas.index(i).store(_row_dot(here_head, here_tail, o_head, o_tail, D, ROWS))
        if i + 1 < BLOCKS:
            o_head, o_tail = next_head, next_tail
    sum_head, sum_tail = _wait(0, sum_head, sum_tail, D)
    _store_first_row(v_sums, sum_head, 64, 0, D, S_AT)
    _store_first_row(k_sums, gl.zeros([64, 64], gl.float32, S_AT), 64, 0, D, S_AT)
    if D > 64:
        _store_first_row(v_sums, sum_tail, 16, 64, D, T_AT)
        _store_first_row(k_sums, gl.zeros([64, 16], gl.float32, T_AT), 16, 64, D, T_AT)
    barrier()

    log2_scale = scale * 1.4426950408889634
    for block in range(BLOCKS):
        async_copy.wait_group(0)
        fence_async_shared()
        dv_head, dv_tail = _zeros()
        dk_head, dk_tail = _zeros()
        for j in range(BLOCKS):
            qj_head, qj_tail, doj_head, doj_tail = q_head.index(j), q_tail.index(j), do_head.index(j), do_tail.index(j)
            lse2, delta = lses.index(j).load(COLUMNS), deltas.index(j).load(COLUMNS)
            scores = _scores(k_head, k_tail, qj_head, qj_tail, D, 64, 64, S_AT)
            d_weights = _scores(v_head, v_tail, doj_head, doj_tail, D, 64, 64, S_AT)
            scores = warpgroup_mma_wait(PRODUCTS, [scores])
            weights = gl.exp2(scores * log2_scale - lse2[None, :])
            dv_head, dv_tail = _begin_add(weights.to(DTYPE), doj_head, doj_tail, dv_head, dv_tail, D)
            d_weights = warpgroup_mma_wait(PRODUCTS, [d_weights])
            d_scores = (weights * (d_weights - delta[None, :])).to(DTYPE)
            dk_head, dk_tail = _begin_add(d_scores, qj_head, qj_tail, dk_head, dk_tail, D)
        barrier()  # all warps have used k and v
        if block + 1 < BLOCKS:
            _fetch(k_head, k_tail, k, (block + 1) * 64, ROW, D, 64, 4)
            _fetch(v_head, v_tail, v, (block + 1) * 64, ROW, D, 64, 4)
        async_copy.commit_group()
        dv_head, dv_tail = _wait(PRODUCTS, dv_head, dv_tail, D)
        _store_rows(dv, dv_head, dv_tail, block * 64, ROW, D)
        dk_head, dk_tail = _wait(0, dk_head, dk_tail, D)
        _store_rows(dk, dk_head * scale, dk_tail * scale, block * 64, ROW, D)


@gluon.jit
def _queries_program(
    q, k, v, o, do, lse, dq, q_sums, scale,
    ROW: gl.constexpr, OUT_ROW: gl.constexpr, BLOCKS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """dq of a head. All keys stay in shared memory; queries pass by, 64 at a time."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    PRODUCTS: gl.constexpr = 2 if D > 64 else 1
    ROWS: gl.constexpr = gl.SliceLayout(1, S_AT)
    k_head, k_tail = _buffers(DTYPE, BLOCKS, D)
    v_head, v_tail = _buffers(DTYPE, BLOCKS, D)
    both_head, both_tail = _buffers(DTYPE, 2, D)
    q_head, q_tail, do_head, do_tail = both_head.index(0), both_tail.index(0), both_head.index(1), both_tail.index(1)
    _fetch(q_head, q_tail, q, 0, ROW, D, 64, 4)
    _fetch(do_head, do_tail, do, 0, OUT_ROW, D, 64, 4)
    for i in gl.static_range(BLOCKS):
        _fetch(k_head.index(i), k_tail.index(i), k, i * 64, ROW, D, 64, 4)
        _fetch(v_head.index(i), v_tail.index(i), v, i * 64, ROW, D, 64, 4)
    async_copy.commit_group()
    total_head = gl.zeros([64, 64], gl.float32, S_AT)
    total_tail = gl.zeros([64, 16], gl.float32, T_AT)

    log2_scale = scale * 1.4426950408889634
    for block in range(BLOCKS):
        o_head, o_tail = _load(o, block * 64, OUT_ROW, D)
        lse2 = gl.load(lse + block * 64 + gl.arange(0, 64, ROWS)) * 1.4426950408889634
        async_copy.wait_group(0)
        fence_async_shared()
        here_head = do_head.load(HEAD_AT)
        here_tail = do_tail.load(TAIL_AT) if D > 64 else here_head
        delta = _row_dot(here_head, here_tail, o_head, o_tail, D, ROWS)
        dq_head, dq_tail = _zeros()
        for j in range(BLOCKS):
            kj_head, kj_tail = k_head.index(j), k_tail.index(j)
            scores = _scores(q_head, q_tail, kj_head, kj_tail, D, 64, 64, S_AT)
            d_weights = _scores(do_head, do_tail, v_head.index(j), v_tail.index(j), D, 64, 64, S_AT)
            scores = warpgroup_mma_wait(PRODUCTS, [scores])
            weights = gl.exp2(scores * log2_scale - lse2[:, None])
            d_weights = warpgroup_mma_wait(0, [d_weights])
            d_scores = (weights * (d_weights - delta[:, None])).to(DTYPE)
            dq_head, dq_tail = _begin_add(d_scores, kj_head, kj_tail, dq_head, dq_tail, D)
        barrier()  # all warps have used q and do
        if block + 1 < BLOCKS:
            _fetch(q_head, q_tail, q, (block + 1) * 64, ROW, D, 64, 4)
            _fetch(do_head, do_tail, do, (block + 1) * 64, OUT_ROW, D, 64, 4)
        async_copy.commit_group()
        dq_head, dq_tail = _wait(0, dq_head, dq_tail, D)
        total_head += dq_head
        if D > 64:
            total_tail += dq_tail
        _store_rows(dq, dq_head * scale, dq_tail * scale, block * 64, ROW, D)
    total = gl.sum(gl.convert_layout(total_head * scale, COLUMNS_AT), 0)
    gl.store(q_sums + gl.arange(0, 64, gl.SliceLayout(0, COLUMNS_AT)), total)
    if D > 64:
        cols = 64 + gl.arange(0, 16, gl.SliceLayout(0, T_AT))
        gl.store(q_sums + cols, gl.sum(total_tail * scale, 0), cols < D)


@gluon.jit
def backward_kernel(
    qkv, out, dout, lse, dqkv, sums, scale,
    H: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Two programs of 4 warps a head of N tokens, one for dk and dv and one for dq; two share a multiprocessor."""
    ROW: gl.constexpr = 3 * H * D
    OUT_ROW: gl.constexpr = H * D
    BLOCKS: gl.constexpr = N // 64
    program = gl.program_id(0)
    pair = (program // 2).to(gl.int64)
    offset = (pair // H) * (N * ROW) + (pair % H) * D
    out_offset = (pair // H) * (N * OUT_ROW) + (pair % H) * D
    q, dq, o, do = qkv + offset, dqkv + offset, out + out_offset, dout + out_offset
    k, v, dk, dv = q + H * D, q + 2 * H * D, dq + H * D, dq + 2 * H * D
    q_sums = sums + (pair // H) * ROW + (pair % H) * D
    if program % 2 == 0:
        k_sums, v_sums = q_sums + H * D, q_sums + 2 * H * D
        _keys_program(q, k, v, o, do, lse + pair * N, dk, dv, k_sums, v_sums, scale, ROW, OUT_ROW, BLOCKS, D)
    else:
        _queries_program(q, k, v, o, do, lse + pair * N, dq, q_sums, scale, ROW, OUT_ROW, BLOCKS, D)
