"""The Hopper kernels of attention for up to 256 tokens, in Gluon, Triton's language of explicit layouts.

They differ from `_attention_triton` in what Triton leaves to no one: matrix products run while the next ones are issued
and while exponentials are taken; P and dS go to shared memory once and are read there, transposed, by the products
that need them; everything a program reads is asked for at its start.

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


@gluon.jit
def backward_kernel(
    qkv, out, dout, lse, dqkv, scale,
    H: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """One program of 8 warps: one head of N = 256 tokens. dq of all queries stays; keys pass by, 64 at a time."""
    ROW: gl.constexpr = 3 * H * D
    OUT_ROW: gl.constexpr = H * D
    WARPS: gl.constexpr = 8
    BLOCKS: gl.constexpr = N // 64
    DTYPE: gl.constexpr = qkv.dtype.element_ty
    S_AT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])  # [queries, keys or head]
    ST_AT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 16, 16])
    K_AT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])  # [keys, head]
    KT_AT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 8, 16])
    HEAD_IN: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    TAIL_IN: gl.constexpr = gl.NVMMASharedLayout(32, 16)
    HEAD_AT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    TAIL_AT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])

    pair = gl.program_id(0).to(gl.int64)
    offset = (pair // H) * (N * ROW) + (pair % H) * D
    out_offset = (pair // H) * (N * OUT_ROW) + (pair % H) * D
    base, grad = qkv + offset, dqkv + offset
    q_head = gl.allocate_shared_memory(DTYPE, [N, 64], HEAD_IN)
    do_head = gl.allocate_shared_memory(DTYPE, [N, 64], HEAD_IN)
    k_head = gl.allocate_shared_memory(DTYPE, [BLOCKS, 64, 64], HEAD_IN)
    v_head = gl.allocate_shared_memory(DTYPE, [BLOCKS, 64, 64], HEAD_IN)
    p_tile = gl.allocate_shared_memory(DTYPE, [N, 64], HEAD_IN)
    ds_tile = gl.allocate_shared_memory(DTYPE, [N, 64], HEAD_IN)
    if D > 64:
        q_tail = gl.allocate_shared_memory(DTYPE, [N, 16], TAIL_IN)
        do_tail = gl.allocate_shared_memory(DTYPE, [N, 16], TAIL_IN)
        k_tail = gl.allocate_shared_memory(DTYPE, [BLOCKS, 64, 16], TAIL_IN)
        v_tail = gl.allocate_shared_memory(DTYPE, [BLOCKS, 64, 16], TAIL_IN)
    else:
        q_tail, do_tail, k_tail, v_tail = q_head, do_head, k_head, v_head
    _fetch(do_head, do_tail, dout + out_offset, 0, OUT_ROW, D, N, WARPS)
    async_copy.commit_group()
    _fetch(q_head, q_tail, base, 0, ROW, D, N, WARPS)
    for j in gl.static_range(BLOCKS):
        _fetch(k_head.index(j), k_tail.index(j), base + H * D, j * 64, ROW, D, 64, WARPS)
        _fetch(v_head.index(j), v_tail.index(j), base + 2 * H * D, j * 64, ROW, D, 64, WARPS)
        async_copy.commit_group()
    # Σ do ∘ out of every query, while the rest arrives
    rows = gl.arange(0, N, gl.SliceLayout(1, HEAD_AT))
    cols = gl.arange(0, 64, gl.SliceLayout(0, HEAD_AT))
    o_values = gl.load(out + out_offset + rows[:, None] * OUT_ROW + cols[None, :])
    lse2 = gl.load(lse + pair * N + gl.arange(0, N, gl.SliceLayout(1, S_AT))) * 1.4426950408889634
    if D > 64:
        tail_rows = gl.arange(0, N, gl.SliceLayout(1, TAIL_AT))
        tail_cols = 64 + gl.arange(0, 16, gl.SliceLayout(0, TAIL_AT))
        pointers = out + out_offset + tail_rows[:, None] * OUT_ROW + tail_cols[None, :]
        o_tail = gl.load(pointers, (tail_rows[:, None] >= 0) & (tail_cols[None, :] < D), 0.0)
    async_copy.wait_group(BLOCKS)
    delta = gl.sum(do_head.load(HEAD_AT).to(gl.float32) * o_values.to(gl.float32), 1)
    delta = gl.convert_layout(delta, gl.SliceLayout(1, S_AT))
    if D > 64:
        tail_delta = gl.sum(do_tail.load(TAIL_AT).to(gl.float32) * o_tail.to(gl.float32), 1)
        delta += gl.convert_layout(tail_delta, gl.SliceLayout(1, S_AT))

    log2_scale = scale * 1.4426950408889634
    dq_head = warpgroup_mma_init(gl.zeros([N, 64], gl.float32, S_AT))
    dq_tail = warpgroup_mma_init(gl.zeros([N, 16], gl.float32, ST_AT))
    PRODUCTS: gl.constexpr = 2 if D > 64 else 1  # an operand has a head and perhaps a tail
    async_copy.wait_group(0)
    for j in range(BLOCKS):
        kj_head, kj_tail = k_head.index(j), k_tail.index(j)
        scores = _scores(q_head, q_tail, kj_head, kj_tail, D, N, 64, S_AT)
        d_weights = _scores(do_head, do_tail, v_head.index(j), v_tail.index(j), D, N, 64, S_AT)
        scores = warpgroup_mma_wait(PRODUCTS, [scores])
        weights = gl.exp2(scores * log2_scale - lse2[:, None])
        p_tile.store(weights.to(DTYPE))
        fence_async_shared()
        d_weights = warpgroup_mma_wait(0, [d_weights])
        dv_head = gl.zeros([64, 64], gl.float32, K_AT)
        dv_head = warpgroup_mma(p_tile.permute((1, 0)), do_head, dv_head, use_acc=False, is_async=True)
        if D > 64:
            dv_tail = gl.zeros([64, 16], gl.float32, KT_AT)
            dv_tail = warpgroup_mma(p_tile.permute((1, 0)), do_tail, dv_tail, use_acc=False, is_async=True)
        ds_tile.store((weights * (d_weights - delta[:, None])).to(DTYPE))
        fence_async_shared()
        dk_head = gl.zeros([64, 64], gl.float32, K_AT)
        dk_head = warpgroup_mma(ds_tile.permute((1, 0)), q_head, dk_head, use_acc=False, is_async=True)
        if D > 64:
            dk_tail = gl.zeros([64, 16], gl.float32, KT_AT)
            dk_tail = warpgroup_mma(ds_tile.permute((1, 0)), q_tail, dk_tail, use_acc=False, is_async=True)
        dq_head = warpgroup_mma(ds_tile, kj_head, dq_head, is_async=True)
        if D > 64:
            dq_tail = warpgroup_mma(ds_tile, kj_tail, dq_tail, is_async=True)
        if D > 64:
            dv_head, dv_tail = warpgroup_mma_wait(2 * PRODUCTS, [dv_head, dv_tail])
            _write_tail(grad + 2 * H * D, dv_tail, j * 64, ROW, D, 64, KT_AT)
        else:
            dv_head = warpgroup_mma_wait(2 * PRODUCTS, [dv_head])
        barrier()  # the other warps' dv is done too
        p_tile.slice(0, 64).store(dv_head.to(DTYPE))
        _write(grad + 2 * H * D, p_tile.slice(0, 64), j * 64, ROW, 64, WARPS)
        if D > 64:
            dk_head, dk_tail = warpgroup_mma_wait(PRODUCTS, [dk_head, dk_tail])
            _write_tail(grad + H * D, dk_tail * scale, j * 64, ROW, D, 64, KT_AT)
        else:
            dk_head = warpgroup_mma_wait(PRODUCTS, [dk_head])
        p_tile.slice(64, 64).store((dk_head * scale).to(DTYPE))
        _write(grad + H * D, p_tile.slice(64, 64), j * 64, ROW, 64, WARPS)
    if D > 64:
        dq_head, dq_tail = warpgroup_mma_wait(0, [dq_head, dq_tail])
        _write_tail(grad, dq_tail * scale, 0, ROW, D, N, ST_AT)
    else:
        dq_head = warpgroup_mma_wait(0, [dq_head])
    barrier()
    ds_tile.store((dq_head * scale).to(DTYPE))
    _write(grad, ds_tile, 0, ROW, N, WARPS)
