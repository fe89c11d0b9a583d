"""The Triton kernels of attention for short sequences; `attention_short` has their equations and launches them.

Tiles have power-of-two sides, so a head is split into `HEAD` columns and a `TAIL` (72 = 64 + 8, the tail padded to the
16 that a matrix instruction needs): 80 columns of arithmetic for 72 of use, where padding to 128 would cost half of it.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false
# (this is Triton's language, in Python's syntax)
import triton
import triton.language as tl


@triton.jit
def _piece(
    base, rows, stride: tl.constexpr, N: tl.constexpr, first: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Rows `rows` and columns first … first + COLS of a matrix [N, D]; zero outside it."""
    cols = first + tl.arange(0, COLS)
    pointers = base + rows[:, None] * stride + cols[None, :]
    if EVEN and first + COLS <= D:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=cols[None, :] < D, other=0.0)
    else:
        return tl.load(pointers, mask=(rows[:, None] < N) & (cols[None, :] < D), other=0.0)


@triton.jit
def _load(
    base, rows, stride: tl.constexpr, N: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Head and tail of rows of a matrix [N, D]; without a tail, the head twice."""
    head = _piece(base, rows, stride, N, 0, HEAD, D, EVEN)
    tail = _piece(base, rows, stride, N, HEAD, TAIL, D, EVEN) if TAIL > 0 else head
    return head, tail


@triton.jit
def _store_piece(
    base, value, rows, stride: tl.constexpr, N: tl.constexpr, first: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    cols = first + tl.arange(0, COLS)
    pointers = base + rows[:, None] * stride + cols[None, :]
    value = value.to(base.dtype.element_ty)
    if EVEN and first + COLS <= D:
        tl.store(pointers, value)
    elif EVEN:
        tl.store(pointers, value, mask=cols[None, :] < D)
    else:
        tl.store(pointers, value, mask=(rows[:, None] < N) & (cols[None, :] < D))


@triton.jit
def _store(
    base, head, tail, factor, rows, stride: tl.constexpr, N: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """factor · (head, tail) to rows of a matrix [N, D]."""
    _store_piece(base, head * factor, rows, stride, N, 0, HEAD, D, EVEN)
    if TAIL > 0:
        _store_piece(base, tail * factor, rows, stride, N, HEAD, TAIL, D, EVEN)


@triton.jit
def _scores(a_head, a_tail, b_head, b_tail, TAIL: tl.constexpr):
    """a bᵀ [rows of a, rows of b]."""
    result = tl.dot(a_head, tl.trans(b_head), input_precision="ieee")
    if TAIL > 0:
        result = tl.dot(a_tail, tl.trans(b_tail), result, input_precision="ieee")
    return result


@triton.jit
def _add_product(weights, b_head, b_tail, head, tail, TAIL: tl.constexpr):
    """(head, tail) + weights · b."""
    head = tl.dot(weights, b_head, head, input_precision="ieee")
    if TAIL > 0:
        tail = tl.dot(weights, b_tail, tail, input_precision="ieee")
    return head, tail


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    head = tl.zeros([ROWS, HEAD], tl.float32)
    tail = tl.zeros([ROWS, TAIL], tl.float32) if TAIL > 0 else head
    return head, tail


@triton.jit
def _row_dot(a_head, a_tail, b_head, b_tail, TAIL: tl.constexpr):
    """Σ over columns of a ∘ b in fp32, one value a row."""
    result = tl.sum(a_head.to(tl.float32) * b_head.to(tl.float32), 1)
    if TAIL > 0:
        result += tl.sum(a_tail.to(tl.float32) * b_tail.to(tl.float32), 1)
    return result


@triton.jit
def _store_sum(base, head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """Σ over rows in fp32, [D]."""
    tl.store(base + tl.arange(0, HEAD), tl.sum(head.to(tl.float32), 0))
    if TAIL > 0:
        cols = HEAD + tl.arange(0, TAIL)
        tl.store(base + cols, tl.sum(tail.to(tl.float32), 0), mask=cols < D)


@triton.jit
def _store_known_sums(sums, do_head, do_tail, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, H: tl.constexpr):
    """Over all keys Σ dk = 0, since softmax ignores a shift of its row, and Σ dv = Σ do, since its rows add up to 1."""
    zero_head, zero_tail = _zeros(16, HEAD, TAIL)
    _store_sum(sums + H * D, zero_head, zero_tail, HEAD, TAIL, D)
    _store_sum(sums + 2 * H * D, do_head, do_tail, HEAD, TAIL, D)


@triton.jit
def _load_lse(lse, pair, rows, N: tl.constexpr, EVEN: tl.constexpr):
    """lse in units of log 2; +inf past the end, so that the weights of absent queries vanish."""
    if EVEN:
        return tl.load(lse + pair * N + rows) * 1.4426950408889634
    else:
        return tl.load(lse + pair * N + rows, mask=rows < N, other=float("inf")) * 1.4426950408889634


@triton.jit
def forward_kernel(
    qkv, out, lse, scale,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCKS` blocks of BM queries of one head against all keys, BN at a time."""
    EVEN_M: tl.constexpr = N % (BM * BLOCKS) == 0
    EVEN_N: tl.constexpr = N % BN == 0
    GROUPS: tl.constexpr = (N + BM * BLOCKS - 1) // (BM * BLOCKS)
    ROW: tl.constexpr = 3 * H * D
    program = tl.program_id(0)
    group = program % GROUPS
    pair = (program // GROUPS).to(tl.int64)
    base = qkv + (pair // H) * (N * ROW) + (pair % H) * D
    out_base = out + (pair // H) * (N * H * D) + (pair % H) * D
    k_base, v_base = base + H * D, base + 2 * H * D
    log2_scale = scale * 1.4426950408889634
    keys = tl.arange(0, BN)
    if BN >= N:
        k_head, k_tail = _load(k_base, keys, ROW, N, HEAD, TAIL, D, EVEN_N)
        v_head, v_tail = _load(v_base, keys, ROW, N, HEAD, TAIL, D, EVEN_N)
    for block in tl.range(BLOCKS, num_stages=STAGES if BN >= N else 1):
        rows = (group * BLOCKS + block) * BM + tl.arange(0, BM)
        q_head, q_tail = _load(base, rows, ROW, N, HEAD, TAIL, D, EVEN_M)
        if BN >= N:
            scores = _scores(q_head, q_tail, k_head, k_tail, TAIL)
            if not EVEN_N:
                scores = tl.where(keys[None, :] < N, scores, float("-inf"))
            top = tl.max(scores, 1) * log2_scale
            weights = tl.exp2(scores * log2_scale - top[:, None])
            total = tl.sum(weights, 1)
            o_head, o_tail = _zeros(BM, HEAD, TAIL)
            o_head, o_tail = _add_product(weights.to(qkv.dtype.element_ty), v_head, v_tail, o_head, o_tail, TAIL)
        else:
            top = tl.full([BM], float("-inf"), tl.float32)
            total = tl.zeros([BM], tl.float32)
            o_head, o_tail = _zeros(BM, HEAD, TAIL)
            for start in tl.range(0, N, BN, num_stages=STAGES):
                columns = start + keys
                k_head, k_tail = _load(k_base, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
                v_head, v_tail = _load(v_base, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
                scores = _scores(q_head, q_tail, k_head, k_tail, TAIL)
                if not EVEN_N:
                    scores = tl.where(columns[None, :] < N, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
                weights = tl.exp2(scores * log2_scale - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(weights, 1)
                top = new_top
                o_head *= shrink[:, None]
                if TAIL > 0:
                    o_tail *= shrink[:, None]
                o_head, o_tail = _add_product(weights.to(qkv.dtype.element_ty), v_head, v_tail, o_head, o_tail, TAIL)
        _store(out_base, o_head, o_tail, (1.0 / total)[:, None], rows, H * D, N, HEAD, TAIL, D, EVEN_M)
        value = (top + tl.log2(total)) * 0.6931471805599453
        if EVEN_M:
            tl.store(lse + pair * N + rows, value)
        else:
            tl.store(lse + pair * N + rows, value, mask=rows < N)


@triton.jit
def single_kernel(
    qkv, out, dout, lse, dqkv, sums, scale,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one head. Its BM ≥ N queries stay, with their dq; keys pass by, BN at a time."""
    EVEN_M: tl.constexpr = N == BM
    EVEN_N: tl.constexpr = N % BN == 0
    ROW: tl.constexpr = 3 * H * D
    pair = tl.program_id(0).to(tl.int64)
    offset = (pair // H) * (N * ROW) + (pair % H) * D
    out_offset = (pair // H) * (N * H * D) + (pair % H) * D
    base, grad = qkv + offset, dqkv + offset
    log2_scale = scale * 1.4426950408889634

    rows = tl.arange(0, BM)
    q_head, q_tail = _load(base, rows, ROW, N, HEAD, TAIL, D, EVEN_M)
    do_head, do_tail = _load(dout + out_offset, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
    o_head, o_tail = _load(out + out_offset, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
    lse2 = _load_lse(lse, pair, rows, N, EVEN_M)
    delta = _row_dot(do_head, do_tail, o_head, o_tail, TAIL)
    sums += (pair // H) * ROW + (pair % H) * D
    _store_known_sums(sums, do_head, do_tail, HEAD, TAIL, D, H)
    dq_head, dq_tail = _zeros(BM, HEAD, TAIL)

    for start in tl.range(0, N, BN, num_stages=STAGES):
        columns = start + tl.arange(0, BN)
        k_head, k_tail = _load(base + H * D, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
        v_head, v_tail = _load(base + 2 * H * D, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
        scores = _scores(q_head, q_tail, k_head, k_tail, TAIL)
        weights = tl.exp2(scores * log2_scale - lse2[:, None])
        if not EVEN_N:
            weights = tl.where(columns[None, :] < N, weights, 0.0)
        transposed = tl.trans(weights.to(q_head.dtype))
        dv_head, dv_tail = _zeros(BN, HEAD, TAIL)
        dv_head, dv_tail = _add_product(transposed, do_head, do_tail, dv_head, dv_tail, TAIL)
        _store(grad + 2 * H * D, dv_head, dv_tail, 1.0, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
        d_weights = _scores(do_head, do_tail, v_head, v_tail, TAIL)
        d_scores = (weights * (d_weights - delta[:, None])).to(q_head.dtype)
        dq_head, dq_tail = _add_product(d_scores, k_head, k_tail, dq_head, dq_tail, TAIL)
        dk_head, dk_tail = _zeros(BN, HEAD, TAIL)
        dk_head, dk_tail = _add_product(tl.trans(d_scores), q_head, q_tail, dk_head, dk_tail, TAIL)
        _store(grad + H * D, dk_head, dk_tail, scale, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
    _store(grad, dq_head, dq_tail, scale, rows, ROW, N, HEAD, TAIL, D, EVEN_M)
    _store_sum(sums, dq_head * scale, dq_tail * scale, HEAD, TAIL, D)


@triton.jit
def queries_kernel(
    qkv, out, dout, lse, delta, dqkv, sums, scale,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: dq and Σ do ∘ out of one block of BM queries; keys pass by, BN at a time."""
    BLOCKS: tl.constexpr = (N + BM - 1) // BM
    EVEN_M: tl.constexpr = N % BM == 0
    EVEN_N: tl.constexpr = N % BN == 0
    ROW: tl.constexpr = 3 * H * D
    pair = (tl.program_id(0) // BLOCKS).to(tl.int64)
    rows = (tl.program_id(0) % BLOCKS) * BM + tl.arange(0, BM)
    offset = (pair // H) * (N * ROW) + (pair % H) * D
    out_offset = (pair // H) * (N * H * D) + (pair % H) * D
    base = qkv + offset
    log2_scale = scale * 1.4426950408889634
    q_head, q_tail = _load(base, rows, ROW, N, HEAD, TAIL, D, EVEN_M)
    do_head, do_tail = _load(dout + out_offset, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
    o_head, o_tail = _load(out + out_offset, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
    lse2 = _load_lse(lse, pair, rows, N, EVEN_M)
    row_delta = _row_dot(do_head, do_tail, o_head, o_tail, TAIL)
    tl.store(delta + pair * N + rows, row_delta, mask=rows < N)
    sums += ((pair // H) * BLOCKS + tl.program_id(0) % BLOCKS) * ROW + (pair % H) * D
    _store_known_sums(sums, do_head, do_tail, HEAD, TAIL, D, H)
    dq_head, dq_tail = _zeros(BM, HEAD, TAIL)
    for start in tl.range(0, N, BN, num_stages=STAGES):
        columns = start + tl.arange(0, BN)
        k_head, k_tail = _load(base + H * D, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
        v_head, v_tail = _load(base + 2 * H * D, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
        scores = _scores(q_head, q_tail, k_head, k_tail, TAIL)
        d_weights = _scores(do_head, do_tail, v_head, v_tail, TAIL)
        weights = tl.exp2(scores * log2_scale - lse2[:, None])
        if not EVEN_N:
            weights = tl.where(columns[None, :] < N, weights, 0.0)
        d_scores = (weights * (d_weights - row_delta[:, None])).to(q_head.dtype)
        dq_head, dq_tail = _add_product(d_scores, k_head, k_tail, dq_head, dq_tail, TAIL)
    _store(dqkv + offset, dq_head, dq_tail, scale, rows, ROW, N, HEAD, TAIL, D, EVEN_M)
    _store_sum(sums, dq_head * scale, dq_tail * scale, HEAD, TAIL, D)


@triton.jit
def keys_kernel(
    qkv, dout, lse, delta, dqkv, scale,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of one block of BN keys; queries pass by, BM at a time. Scores are [keys, queries]."""
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    EVEN_M: tl.constexpr = N % BM == 0
    EVEN_N: tl.constexpr = N % BN == 0
    ROW: tl.constexpr = 3 * H * D
    pair = (tl.program_id(0) // BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % BLOCKS) * BN + tl.arange(0, BN)
    offset = (pair // H) * (N * ROW) + (pair % H) * D
    out_offset = (pair // H) * (N * H * D) + (pair % H) * D
    base, grad = qkv + offset, dqkv + offset
    log2_scale = scale * 1.4426950408889634
    k_head, k_tail = _load(base + H * D, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
    v_head, v_tail = _load(base + 2 * H * D, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
    dk_head, dk_tail = _zeros(BN, HEAD, TAIL)
    dv_head, dv_tail = _zeros(BN, HEAD, TAIL)
    for start in tl.range(0, N, BM, num_stages=STAGES):
        rows = start + tl.arange(0, BM)
        q_head, q_tail = _load(base, rows, ROW, N, HEAD, TAIL, D, EVEN_M)
        do_head, do_tail = _load(dout + out_offset, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
        lse2 = _load_lse(lse, pair, rows, N, EVEN_M)
        row_delta = tl.load(delta + pair * N + rows, mask=rows < N, other=0.0)
        scores = _scores(k_head, k_tail, q_head, q_tail, TAIL)
        weights = tl.exp2(scores * log2_scale - lse2[None, :])
        if not EVEN_N:
            weights = tl.where(columns[:, None] < N, weights, 0.0)
        d_weights = _scores(v_head, v_tail, do_head, do_tail, TAIL)
        dv_head, dv_tail = _add_product(weights.to(q_head.dtype), do_head, do_tail, dv_head, dv_tail, TAIL)
        d_scores = (weights * (d_weights - row_delta[None, :])).to(q_head.dtype)
        dk_head, dk_tail = _add_product(d_scores, q_head, q_tail, dk_head, dk_tail, TAIL)
    _store(grad + H * D, dk_head, dk_tail, scale, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
    _store(grad + 2 * H * D, dv_head, dv_tail, 1.0, columns, ROW, N, HEAD, TAIL, D, EVEN_N)
