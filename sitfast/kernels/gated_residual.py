"""The residual that the previous branch left pending, then the layer norm and modulation of the next one.

    x_new = x + gate · (y + bias)
    h     = (x_new − mean(x_new)) · rsqrt(var(x_new) + eps) · (1 + scale) + shift

x, y [B, N, D] · gate, shift, scale [B, D], any row stride (chunks of one adaLN output) · bias [D], that of the linear
layer which made y, or None · x_new, h [B, N, D].

Backward is one pass: with g = dh · (1 + scale) and x̂ the normalized row,

    dx = dx_new + rstd · (g − mean(g) − x̂ · mean(g · x̂));   dy = gate · dx
    dshift, dscale, dgate = Σ over tokens of dh, dh · x̂, dx · (y + bias);   dbias = Σ over samples of gate · Σ dx

so that the linear layer before needs no pass over dy for its bias. Saved for backward: x_new, y, gate, scale, bias, and
the row statistics in fp32; with `save="input"` x in place of x_new, which backward then computes again from y, gate and
bias, that it reads anyway. Bytes moved: forward reads x and y and writes x_new and h; backward reads dh, dx_new, x_new (or
x) and y and writes dx and dy. The Triton kernels are in `_layernorm_triton`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sitfast.kernels.dispatch import check, check_cuda, check_rank, choose, compute_dtype, widen
from sitfast.kernels.layernorm_modulate import normalize_modulate

NAME = "gated_residual_layernorm_modulate"

Save = Literal["output", "input"]


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    save: Save = "output",
) -> tuple[Tensor, Tensor]:
    """`save` is autograd's own business here."""
    branch = widen(y) if bias is None else widen(y) + widen(bias)
    x_new = widen(x) + widen(gate).unsqueeze(1) * branch
    return x_new.to(x.dtype), normalize_modulate(x_new, shift, scale, eps).to(compute_dtype(x))


@torch.library.custom_op(f"sitfast::{NAME}", mutates_args=())
def forward_op(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    save_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new, h, mean [B, N], rstd [B, N]. `save_input` is for autograd, see `_setup_context`."""
    from sitfast.kernels import _layernorm_triton  # here, since CPU builds of torch come without Triton

    return _layernorm_triton.forward(x, shift, scale, eps, out_dtype, y=y, gate=gate, bias=bias)


@forward_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    save_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@torch.library.custom_op(f"sitfast::{NAME}_backward", mutates_args=())
def backward_op(
    dx_new: Tensor | None,
    dh: Tensor | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    from_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dshift, dscale, dbias; dshift and dscale are empty without dh, dbias without bias.

    x is x_new, or with `from_input` the x that forward read.
    """
    from sitfast.kernels import _layernorm_triton

    extra = {"y": y, "gate": gate, "bias": bias, "from_input": from_input}
    return _layernorm_triton.backward(dh, dx_new, x, scale, mean, rstd, **extra)


@backward_op.register_fake
def _(
    dx_new: Tensor | None,
    dh: Tensor | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    from_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dshift, dscale = (scale.new_empty(0 if dh is None else scale.shape) for _ in range(2))
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), y.new_empty(y.shape), gate.new_empty(gate.shape), dshift, dscale, dbias


def _setup_context(ctx, inputs, output) -> None:
    x, y, gate, shift, scale, bias, _, _, save_input = inputs
    x_new, _, mean, rstd = output
    ctx.set_materialize_grads(False)  # an output that nobody used costs no pass over zeros
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if save_input else x_new, y, gate, scale, mean, rstd, bias)
    ctx.shift_dtype, ctx.from_input = shift.dtype, save_input


def _backward(ctx, dx_new, dh, dmean, drstd):
    dx, dy, dgate, dshift, dscale, dbias = backward_op(dx_new, dh, *ctx.saved_tensors, ctx.from_input)
    dshift, dscale = (None, None) if dh is None else (dshift.to(ctx.shift_dtype), dscale)
    return dx, dy, dgate, dshift, dscale, dbias if ctx.needs_input_grad[5] else None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


def kernel(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    save: Save = "output",
) -> tuple[Tensor, Tensor]:
    check_cuda(NAME, x=x, y=y, gate=gate, shift=shift, scale=scale, bias=bias)
    return forward_op(x, y, gate, shift, scale, bias, eps, compute_dtype(x), save == "input")[:2]


def gated_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    save: Save = "output",
) -> tuple[Tensor, Tensor]:
    """(x_new, h), both [B, N, D], of x, y [B, N, D], gate, shift, scale [B, D] and bias [D]; fp32 inside.

    x_new has the dtype of x, the residual stream; h has autocast's where autocast is on, else that of x. The statistics
    are those of x_new before it is rounded to its dtype.

    `save` says which end of the residual stream the GPU kernel keeps for backward; the gradients are the same bits. "input"
    pays where x is kept by somebody else and x_new is not, as in the middle of a block: of two calls in a row, the second
    then keeps the tensor that the first one keeps, and the stream between blocks is kept by nobody.
    """
    if save not in ("output", "input"):
        raise ValueError(f"{NAME}: save={save!r}, expected 'output' or 'input'")
    check_rank(NAME, "x", x, 3, "[B, N, D]")
    check(NAME, "x", x, x.shape, x.device)
    check(NAME, "y", y, x.shape, x.device)
    rows = (x.shape[0], x.shape[2])
    check(NAME, "gate", gate, rows, x.device)
    check(NAME, "shift", shift, rows, x.device)
    check(NAME, "scale", scale, rows, x.device)
    if bias is not None:
        check(NAME, "bias", bias, rows[1:], x.device)
    return choose(x.device, reference, cuda=kernel)(x, y, gate, shift, scale, bias, eps, save)
