"""Normalization and rotary position embedding of q and k, on the packed output of the qkv linear.

    x̂ = x / √(mean(x²) + eps)  ("rms"),  or (x − mean(x)) / √(var(x) + eps)  ("layer");   y = x̂ · weight + bias
    z_2i = y_2i cos_i − y_2i+1 sin_i;   z_2i+1 = y_2i+1 cos_i + y_2i sin_i

for each head of q and of k; v passes. qkv, out [B, N, 3, H, d] · weights and biases [d], those of q and of k, shared by
the heads (timm's `q_norm` and `k_norm`) · cos, sin [N, d/2] of each token's angles, `axial_angles` for an image.

Backward, with g = rotated back dz · weight:  dx = (g − mean(g)[layer] − x̂ mean(g x̂)) / divisor, dweight = Σ dy x̂,
dbias = Σ dy, and the gradient of a bias that the qkv linear added, as in `attention`. Saved: qkv; the statistics are
computed again. Bytes, in units of one [B, N, H, d]: forward reads 3 and writes 3; backward reads 5 and writes 3. A third
of that is v, since attention reads q, k and v from one tensor. The Triton kernels are in `_qk_norm_rope_triton`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sitfast.kernels.attention import bias_gradient
from sitfast.kernels.dispatch import check, check_cuda, check_rank, choose, compute_dtype, widen

NAME = "qk_norm_rope"
MAX_WIDTH = 256
THETA = 10_000.0

Norm = Literal["none", "rms", "layer"]
Vector = Tensor | None


def axial_angles(
    grid: int | tuple[int, int], width: int, device: torch.device | str | None = None, *, base: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [N, d/2] in fp32 for the tokens of a square image, or one of h × w tokens, row by row, and heads of width d.

    The first half of the pairs turns with the row, the second with the column, pair i of d/4 by theta^(−4i/d) a step.
    With `base` the image is taken for one of base × base tokens seen at another scale: token i of n stands at
    (i + ½) · base / n − ½. Evaluated in fp64 on the CPU and rounded once.
    """
    if width % 4:
        raise ValueError(
            f"{NAME}: d = {width} is not divisible by 4; rotary embedding needs pairs for rows and columns"
        )
    height, width_of_grid = (grid, grid) if isinstance(grid, int) else grid
    omega = THETA ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    rows, columns = (_places(count, base)[:, None] * omega for count in (height, width_of_grid))
    shape = height, width_of_grid, width // 4
    both = torch.cat((rows[:, None].expand(shape), columns.expand(shape)), dim=-1).reshape(-1, width // 2)
    return both.cos().float().to(device), both.sin().float().to(device)


def _places(count: int, base: int | None) -> Tensor:
    """Where `count` tokens in a row stand, in steps of a row of `base`; fp64, whole numbers where the two are equal."""
    steps = torch.arange(count, dtype=torch.float64, device="cpu")
    return steps if base is None else (steps + 0.5) * base / count - 0.5


def _normalize(x: Tensor, weight: Vector, bias: Vector, norm: Norm, eps: float) -> Tensor:
    if norm == "none" or weight is None:
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * widen(weight)
    return x if bias is None else x + widen(bias)


def _rotate(x: Tensor, cos: Vector, sin: Vector) -> Tensor:
    if cos is None or sin is None:
        return x
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def reference(
    qkv: Tensor, norm: Norm, vectors: tuple[Vector, ...], cos: Vector, sin: Vector, bias: Vector, eps: float
) -> Tensor:
    qkv = bias_gradient(qkv, bias)
    q, k, v = qkv.unbind(2)
    q_weight, k_weight, q_bias, k_bias = vectors
    q = _rotate(_normalize(widen(q), q_weight, q_bias, norm, eps), cos, sin)
    k = _rotate(_normalize(widen(k), k_weight, k_bias, norm, eps), cos, sin)
    return torch.stack((q.to(qkv.dtype), k.to(qkv.dtype), v), dim=2).to(compute_dtype(qkv))


# -- the operators -----------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"sitfast::{NAME}", mutates_args=())
def forward_op(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor:
    from sitfast.kernels import _qk_norm_rope_triton  # here, since CPU builds of torch come without Triton

    vectors = q_weight, k_weight, q_bias, k_bias
    return _qk_norm_rope_triton.forward(qkv.contiguous(), norm, vectors, cos, sin, eps)


@forward_op.register_fake
def _(qkv, q_weight, k_weight, q_bias, k_bias, cos, sin, bias, norm, eps) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"sitfast::{NAME}_backward", mutates_args=())
def backward_op(
    dout: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, the gradients of the four vectors [4, d] in fp32, dbias (empty unless its dtype is given)."""
    from sitfast.kernels import _qk_norm_rope_triton

    weights = q_weight, k_weight
    return _qk_norm_rope_triton.backward(dout.contiguous(), qkv.contiguous(), norm, weights, cos, sin, eps, bias_dtype)


@backward_op.register_fake
def _(dout, qkv, q_weight, k_weight, cos, sin, norm, eps, bias_dtype) -> tuple[Tensor, Tensor, Tensor]:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dvectors = qkv.new_empty(4, qkv.shape[-1], dtype=torch.float32)
    num_biases = 0 if bias_dtype is None else qkv[0, 0].numel()
    return dqkv, dvectors, qkv.new_empty(num_biases, dtype=bias_dtype or qkv.dtype)


def _setup(ctx, inputs, output) -> None:
    qkv, q_weight, k_weight, q_bias, k_bias, cos, sin, bias, ctx.norm, ctx.eps = inputs
    ctx.dtypes = [None if vector is None else vector.dtype for vector in (q_weight, k_weight, q_bias, k_bias, bias)]
    ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None):
    if dout is None:
        return (None,) * 10
    bias_dtype = ctx.dtypes[4] if ctx.needs_input_grad[7] else None
    dqkv, dvectors, dbias = backward_op(dout, *ctx.saved_tensors, ctx.norm, ctx.eps, bias_dtype)
    grads = [
        gradient.to(dtype) if dtype is not None and wanted else None
        for gradient, dtype, wanted in zip(dvectors, ctx.dtypes, ctx.needs_input_grad[1:5], strict=False)
    ]
    return dqkv, *grads, None, None, None if bias_dtype is None else dbias, None, None


forward_op.register_autograd(_backward, setup_context=_setup)


# -- the function ------------------------------------------------------------------------------------------------------


def _kernel(
    qkv: Tensor, norm: Norm, vectors: tuple[Vector, ...], cos: Vector, sin: Vector, bias: Vector, eps: float
) -> Tensor:
    check_cuda(NAME, qkv=qkv)
    return forward_op(qkv.to(compute_dtype(qkv)), *vectors, cos, sin, bias, norm, eps)


def qk_norm_rope(
    qkv: Tensor,
    *,
    norm: Norm = "none",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """qkv [B, N, 3, H, d] with q and k normalized ("rms", "layer" or "none") and rotated; fp32 inside.

    Weights, and biases of "layer", are [d]; `rope` is (cos, sin), each [N, d/2] in fp32. `bias` [3·H·d] is that of the
    linear layer which made qkv, called with `bias.detach()`: it is not added here, only given its gradient.
    """
    check_rank(NAME, "qkv", qkv, 5, "[B, N, 3, H, d]")
    batch, tokens, _, heads, width = qkv.shape
    check(NAME, "qkv", qkv, (batch, tokens, 3, heads, width), qkv.device)
    if norm not in ("none", "rms", "layer"):
        raise ValueError(f"{NAME}: norm {norm!r} is unknown; use none, rms or layer")
    if width % 2 or width > MAX_WIDTH:
        raise ValueError(f"{NAME}: d = {width} is not an even number up to {MAX_WIDTH}")
    vectors = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    expected = {"none": (), "rms": ("q_weight", "k_weight"), "layer": tuple(vectors)}[norm]
    for name, vector in vectors.items():
        if (vector is not None) != (name in expected):
            raise ValueError(f"{NAME}: norm {norm!r} takes {', '.join(expected) or 'no vectors'}; {name} is not so")
        if vector is not None:
            check(NAME, name, vector, (width,), qkv.device)
    cos, sin = rope or (None, None)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            check(NAME, name, table, (tokens, width // 2), qkv.device)
    if bias is not None:
        check(NAME, "bias", bias, (3 * heads * width,), qkv.device)
    arguments = qkv, norm, tuple(vectors.values()), cos, sin, bias, eps
    return choose(qkv.device, reference, cuda=_kernel)(*arguments)
