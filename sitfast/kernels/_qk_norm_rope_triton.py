"""The Triton kernels of `qk_norm_rope`, which has their equations.

A program takes `ROWS` tokens and passes over their heads one by one, so that the angles are read once and the sums for
the weights stay in registers. A head of d columns is a power of two and a tail, as in `_attention_triton`, and both are
held as the even and the odd columns of their pairs.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# (this is Triton's language, in Python's syntax)
import torch
import triton
import triton.language as tl
from torch import Tensor

from sitfast.kernels.attention_short import split_width
from sitfast.kernels.gelu import column_sums

ROWS = 32  # 1024 programs for 32768 tokens; each thread has two loads of 16 bytes of a head in flight
WARPS = 4


@triton.jit
def _load(base, rows, last, STRIDE: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    """Columns FIRST … FIRST + COLS of a head of every row, zero outside: the even and the odd ones, fp32."""
    cols = FIRST + tl.arange(0, COLS)
    inside = (rows < last)[:, None] & (cols < D)[None, :]
    x = tl.load(base + rows[:, None] * STRIDE + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, (x.shape[0], COLS // 2, 2)))


@triton.jit
def _store(
    base, even, odd, rows, last, STRIDE: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    cols = FIRST + tl.arange(0, COLS)
    inside = (rows < last)[:, None] & (cols < D)[None, :]
    x = tl.reshape(tl.join(even, odd), (even.shape[0], COLS))
    tl.store(base + rows[:, None] * STRIDE + cols[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _vector(base, default, HAS: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    """The even and the odd of columns FIRST … FIRST + COLS of a vector [D], or the default."""
    cols = FIRST + 2 * tl.arange(0, COLS // 2)
    if HAS:
        even = tl.load(base + cols, mask=cols < D, other=0.0).to(tl.float32)
        odd = tl.load(base + cols + 1, mask=cols < D, other=0.0).to(tl.float32)
    else:
        even = tl.full((COLS // 2,), default, tl.float32)
        odd = even
    return even, odd


@triton.jit
def _angles(cos, sin, rows, last, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    pairs = FIRST // 2 + tl.arange(0, COLS // 2)
    at = (rows % N)[:, None] * (D // 2) + pairs[None, :]
    inside = (rows < last)[:, None] & (pairs < D // 2)[None, :]
    return tl.load(cos + at, mask=inside, other=1.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _row_sum(he, ho, te, to, TAIL: tl.constexpr):
    total = tl.sum(he, 1) + tl.sum(ho, 1)
    if TAIL > 0:
        total += tl.sum(te, 1) + tl.sum(to, 1)
    return total[:, None]


@triton.jit
def _normalized(he, ho, te, to, eps, NORM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """x̂ and 1 / its divisor [rows, 1]; NORM is 0 for none, 1 for RMS, 2 for layer norm."""
    rstd = tl.full((he.shape[0], 1), 1.0, tl.float32)
    if NORM > 0:
        if NORM == 2:
            mean = _row_sum(he, ho, te, to, TAIL) / D
            he -= mean
            ho -= mean
            if TAIL > 0:
                there = (HEAD + 2 * tl.arange(0, TAIL // 2) < D)[None, :]
                te, to = tl.where(there, te - mean, 0.0), tl.where(there, to - mean, 0.0)
        rstd = tl.rsqrt(_row_sum(he * he, ho * ho, te * te, to * to, TAIL) / D + eps)
        he *= rstd
        ho *= rstd
        if TAIL > 0:
            te *= rstd
            to *= rstd
    return he, ho, te, to, rstd


@triton.jit
def qk_norm_rope_forward_kernel(
    qkv, out, q_weight, k_weight, q_bias, k_bias, cos, sin, eps, tokens,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr,
    ROPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = 3 * H * D
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if ROPE:
        ch, sh = _angles(cos, sin, rows, tokens, N, 0, HEAD, D)
        if TAIL > 0:
            ct, st = _angles(cos, sin, rows, tokens, N, HEAD, TAIL, D)
    for part in tl.static_range(2):
        weight, bias = (q_weight, q_bias) if part == 0 else (k_weight, k_bias)
        whe, who = _vector(weight, 1.0, NORM > 0, 0, HEAD, D)
        bhe, bho = _vector(bias, 0.0, NORM == 2, 0, HEAD, D)
        if TAIL > 0:
            wte, wto = _vector(weight, 1.0, NORM > 0, HEAD, TAIL, D)
            bte, bto = _vector(bias, 0.0, NORM == 2, HEAD, TAIL, D)
        for head in range(H):
            at = (part * H + head) * D
            he, ho = _load(qkv + at, rows, tokens, STRIDE, 0, HEAD, D)
            te, to = _load(qkv + at, rows, tokens, STRIDE, HEAD, TAIL, D) if TAIL > 0 else (he, ho)
            he, ho, te, to, _ = _normalized(he, ho, te, to, eps, NORM, HEAD, TAIL, D)
            he, ho = he * whe[None, :] + bhe[None, :], ho * who[None, :] + bho[None, :]
            if ROPE:
                he, ho = he * ch - ho * sh, ho * ch + he * sh
            _store(out + at, he, ho, rows, tokens, STRIDE, 0, HEAD, D)
            if TAIL > 0:
                te, to = te * wte[None, :] + bte[None, :], to * wto[None, :] + bto[None, :]
                if ROPE:
                    te, to = te * ct - to * st, to * ct + te * st
                _store(out + at, te, to, rows, tokens, STRIDE, HEAD, TAIL, D)
    for head in range(H):
        at = (2 * H + head) * D
        he, ho = _load(qkv + at, rows, tokens, STRIDE, 0, HEAD, D)
        _store(out + at, he, ho, rows, tokens, STRIDE, 0, HEAD, D)
        if TAIL > 0:
            te, to = _load(qkv + at, rows, tokens, STRIDE, HEAD, TAIL, D)
            _store(out + at, te, to, rows, tokens, STRIDE, HEAD, TAIL, D)


@triton.jit
def _store_sums(base, even, odd, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    cols = FIRST + 2 * tl.arange(0, COLS // 2)
    tl.store(base + cols, tl.sum(even, 0), mask=cols < D)
    tl.store(base + cols + 1, tl.sum(odd, 0), mask=cols < D)


@triton.jit
def qk_norm_rope_backward_kernel(
    dout, qkv, dqkv, q_weight, k_weight, cos, sin, norm_sums, bias_sums, eps, tokens,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr,
    ROPE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`norm_sums` [programs, 4, D]: of the weights of q and k, of their biases; `bias_sums` [programs, 3, H, D]."""
    STRIDE: tl.constexpr = 3 * H * D
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    norm_sums += program * 4 * D
    bias_sums += program * STRIDE
    if ROPE:
        ch, sh = _angles(cos, sin, rows, tokens, N, 0, HEAD, D)
        if TAIL > 0:
            ct, st = _angles(cos, sin, rows, tokens, N, HEAD, TAIL, D)
    for part in tl.static_range(2):
        weight = q_weight if part == 0 else k_weight
        whe, who = _vector(weight, 1.0, NORM > 0, 0, HEAD, D)
        dwhe = tl.zeros((ROWS, HEAD // 2), tl.float32)
        dwho, dbhe, dbho = dwhe, dwhe, dwhe
        if TAIL > 0:
            wte, wto = _vector(weight, 1.0, NORM > 0, HEAD, TAIL, D)
            dwte = tl.zeros((ROWS, TAIL // 2), tl.float32)
            dwto, dbte, dbto = dwte, dwte, dwte
        for head in range(H):
            at = (part * H + head) * D
            ghe, gho = _load(dout + at, rows, tokens, STRIDE, 0, HEAD, D)
            gte, gto = _load(dout + at, rows, tokens, STRIDE, HEAD, TAIL, D) if TAIL > 0 else (ghe, gho)
            if ROPE:
                ghe, gho = ghe * ch + gho * sh, gho * ch - ghe * sh
                if TAIL > 0:
                    gte, gto = gte * ct + gto * st, gto * ct - gte * st
            if NORM > 0:
                he, ho = _load(qkv + at, rows, tokens, STRIDE, 0, HEAD, D)
                te, to = _load(qkv + at, rows, tokens, STRIDE, HEAD, TAIL, D) if TAIL > 0 else (he, ho)
                he, ho, te, to, rstd = _normalized(he, ho, te, to, eps, NORM, HEAD, TAIL, D)
                dwhe += ghe * he
                dwho += gho * ho
                if NORM == 2:
                    dbhe += ghe
                    dbho += gho
                ghe, gho = ghe * whe[None, :], gho * who[None, :]
                if TAIL > 0:
                    dwte += gte * te
                    dwto += gto * to
                    if NORM == 2:
                        dbte += gte
                        dbto += gto
                    gte, gto = gte * wte[None, :], gto * wto[None, :]
                along = _row_sum(ghe * he, gho * ho, gte * te, gto * to, TAIL) / D
                shift = _row_sum(ghe, gho, gte, gto, TAIL) / D if NORM == 2 else 0.0
                ghe, gho = rstd * (ghe - shift - he * along), rstd * (gho - shift - ho * along)
                if TAIL > 0:
                    there = (HEAD + 2 * tl.arange(0, TAIL // 2) < D)[None, :]
                    gte = tl.where(there, rstd * (gte - shift - te * along), 0.0)
                    gto = tl.where(there, rstd * (gto - shift - to * along), 0.0)
            _store(dqkv + at, ghe, gho, rows, tokens, STRIDE, 0, HEAD, D)
            if TAIL > 0:
                _store(dqkv + at, gte, gto, rows, tokens, STRIDE, HEAD, TAIL, D)
            if BIAS:
                _store_sums(bias_sums + at, ghe, gho, 0, HEAD, D)
                if TAIL > 0:
                    _store_sums(bias_sums + at, gte, gto, HEAD, TAIL, D)
        if NORM > 0:
            _store_sums(norm_sums + part * D, dwhe, dwho, 0, HEAD, D)
            _store_sums(norm_sums + (2 + part) * D, dbhe, dbho, 0, HEAD, D)
            if TAIL > 0:
                _store_sums(norm_sums + part * D, dwte, dwto, HEAD, TAIL, D)
                _store_sums(norm_sums + (2 + part) * D, dbte, dbto, HEAD, TAIL, D)
    for head in range(H):
        at = (2 * H + head) * D
        ghe, gho = _load(dout + at, rows, tokens, STRIDE, 0, HEAD, D)
        _store(dqkv + at, ghe, gho, rows, tokens, STRIDE, 0, HEAD, D)
        if BIAS:
            _store_sums(bias_sums + at, ghe, gho, 0, HEAD, D)
        if TAIL > 0:
            gte, gto = _load(dout + at, rows, tokens, STRIDE, HEAD, TAIL, D)
            _store(dqkv + at, gte, gto, rows, tokens, STRIDE, HEAD, TAIL, D)
            if BIAS:
                _store_sums(bias_sums + at, gte, gto, HEAD, TAIL, D)


NORMS = {"none": 0, "rms": 1, "layer": 2}


def forward(
    qkv: Tensor, norm: str, vectors: tuple[Tensor | None, ...], cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """qkv with q and k normalized and rotated; `vectors` are the weights of q and k and their biases."""
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty_like(qkv)
    given = [qkv if vector is None else vector for vector in (*vectors, cos, sin)]
    qk_norm_rope_forward_kernel[(-(-batch * tokens // ROWS),)](
        qkv, out, *given, eps, batch * tokens,
        heads, tokens, width, *split_width(width), NORMS[norm], cos is not None, ROWS, num_warps=WARPS,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    qkv: Tensor,
    norm: str,
    weights: tuple[Tensor | None, Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, the gradients of the weights and biases of q and k [4, d] in fp32, that of qkv's bias (empty if not asked)."""
    batch, tokens, _, heads, width = qkv.shape
    programs = -(-batch * tokens // ROWS)
    dqkv = torch.empty_like(qkv)
    norm_sums = qkv.new_empty(programs, 4 * width, dtype=torch.float32)
    bias_sums = norm_sums if bias_dtype is None else qkv.new_empty(programs, 3 * heads * width, dtype=torch.float32)
    given = [qkv if tensor is None else tensor for tensor in (*weights, cos, sin)]
    qk_norm_rope_backward_kernel[(programs,)](
        dout, qkv, dqkv, *given, norm_sums, bias_sums, eps, batch * tokens,
        heads, tokens, width, *split_width(width), NORMS[norm], cos is not None, bias_dtype is not None, ROWS,
        num_warps=WARPS,
    )  # fmt: skip
    dvectors = norm_sums[0] if norm == "none" else column_sums(norm_sums, torch.float32)  # for none, of no use
    return dqkv, dvectors.view(4, width), qkv.new_empty(0) if bias_dtype is None else column_sums(bias_sums, bias_dtype)
