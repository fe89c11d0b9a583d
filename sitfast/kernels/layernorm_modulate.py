"""Layer norm without affine, then the adaLN modulation of each sample.

    h = (x − mean(x)) · rsqrt(var(x) + eps) · (1 + scale) + shift

x [B, N, D] · shift, scale [B, D], any row stride (chunks of one adaLN output) · h [B, N, D].
Saved for backward: x, scale, and the row statistics in fp32 (8 bytes a row; computing them again would cost a pass over
registers and two more reductions). Bytes moved: forward reads x and writes h; backward reads dh and x and writes dx.
The Triton kernels are those of `gated_residual`, in `_layernorm_triton`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels.dispatch import check, check_cuda, check_rank, choose, compute_dtype, widen

NAME = "layernorm_modulate"


def normalize_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The formula on an already widened x; the result stays wide."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + widen(scale).unsqueeze(1)) + widen(shift).unsqueeze(1)


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return normalize_modulate(widen(x), shift, scale, eps).to(compute_dtype(x))


@torch.library.custom_op(f"sitfast::{NAME}", mutates_args=())
def forward_op(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """h, mean [B, N], rstd [B, N]."""
    from sitfast.kernels import _layernorm_triton  # here, since CPU builds of torch come without Triton

    return _layernorm_triton.forward(x, shift, scale, eps, out_dtype)[1:]


@forward_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@torch.library.custom_op(f"sitfast::{NAME}_backward", mutates_args=())
def backward_op(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dshift, dscale."""
    from sitfast.kernels import _layernorm_triton

    dx, _, _, dshift, dscale, _ = _layernorm_triton.backward(dh, None, x, scale, mean, rstd)
    return dx, dshift, dscale


@backward_op.register_fake
def _(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, shift, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _backward(ctx, dh, dmean, drstd):
    dx, dshift, dscale = backward_op(dh, *ctx.saved_tensors)
    return dx, dshift.to(ctx.shift_dtype), dscale, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


def kernel(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    check_cuda(NAME, x=x, shift=shift, scale=scale)
    return forward_op(x, shift, scale, eps, compute_dtype(x))[0]


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """h [B, N, D] of x [B, N, D], shift and scale [B, D]; fp32 inside.

    h has autocast's dtype where autocast is on, else that of x.
    """
    check_rank(NAME, "x", x, 3, "[B, N, D]")
    check(NAME, "x", x, x.shape, x.device)
    rows = (x.shape[0], x.shape[2])
    check(NAME, "shift", shift, rows, x.device)
    check(NAME, "scale", scale, rows, x.device)
    return choose(x.device, reference, cuda=kernel)(x, shift, scale, eps)
