"""The training loss of an interpolant, one value a sample.

    velocity    mean (out - v)^2
    noise       w(t) mean (out - noise)^2
    score       w(t) mean (out sigma + noise)^2

The weight of the last two is 1 (none), (g / sigma)^2 (velocity: the same gradient as a velocity model's) or g / sigma^2
(likelihood), with g the drift variance of the path. A velocity loss has no weight, whatever `loss_weight` says.

out `[B, C or 2C, ...]`, target `[B, C, ...]` fp32, t `[B]` → loss `[B]` fp32. The kernel reads out and target once and
writes, for backward, the error `[B, C, ...]` in fp32 and a factor a sample. Backward multiplies them by what arrives for
the sample and rounds once to the dtype of out; an unused second half gets its zeros without having been read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sitfast.interpolant import Interpolant, at_least_fp32
from sitfast.kernels import extension
from sitfast.kernels.dispatch import check_cuda, choose
from sitfast.kernels.interpolate import PATHS, PREDICTIONS

LOSS_WEIGHTS = ("none", "velocity", "likelihood")  # the numbers of csrc/mathematics.h


def reference(out: Tensor, target: Tensor, t: Tensor, interpolant: Interpolant) -> Tensor:
    """Plain PyTorch, in fp32, or fp64 for fp64 operands."""
    out, target = at_least_fp32(out[:, : target.shape[1]]), at_least_fp32(target)
    if interpolant.prediction == "velocity":
        return _mean_square(out - target)
    c = interpolant.coefficients(t)
    if interpolant.prediction == "noise":
        loss = _mean_square(out - target)
    else:
        loss = _mean_square(out * c.sigma.view(-1, *(1,) * (out.ndim - 1)) + target)
    if interpolant.loss_weight == "velocity":
        return loss * (c.drift_variance / c.sigma) ** 2
    if interpolant.loss_weight == "likelihood":
        return loss * c.drift_variance / c.sigma**2
    return loss


def _mean_square(x: Tensor) -> Tensor:
    """The mean of x^2 over everything but the batch, `[B]` fp32."""
    return x.square().flatten(1).mean(dim=1).to(torch.float32)


def _kernel(out: Tensor, target: Tensor, t: Tensor, interpolant: Interpolant) -> Tensor:
    if out.numel() and not out[0].is_contiguous():
        out = out.contiguous()
    settings = (interpolant.path, PATHS), (interpolant.prediction, PREDICTIONS), (interpolant.loss_weight, LOSS_WEIGHTS)
    numbers = [names.index(name) for name, names in settings]
    return torch.ops.sitfast.interpolant_loss(out, target.float().contiguous(), t.float().contiguous(), *numbers)[0]


def _fake(out: Tensor, target: Tensor, t: Tensor, *_numbers: int) -> tuple[Tensor, Tensor, Tensor]:
    loss = target.new_empty(out.shape[:1])
    return loss, torch.empty_like(target), torch.empty_like(loss)


def _fake_backward(dloss: Tensor, error: Tensor, factor: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return error.new_empty((error.shape[0], channels, *error.shape[2:]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.channels, ctx.dtype = inputs[0].shape[1], inputs[0].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dloss: Tensor, _derror: Any, _dfactor: Any) -> tuple:
    error, factor = ctx.saved_tensors
    return torch.ops.sitfast.interpolant_loss_backward(dloss, error, factor, ctx.channels, ctx.dtype), *(None,) * 5


_KERNELS = extension.kernels(_kernel)
if _KERNELS:
    torch.library.register_fake("sitfast::interpolant_loss", _fake)
    torch.library.register_fake("sitfast::interpolant_loss_backward", _fake_backward)
    torch.library.register_autograd("sitfast::interpolant_loss", _backward, setup_context=_setup_context)


def interpolant_loss(out: Tensor, target: Tensor, t: Tensor, *, interpolant: Interpolant) -> Tensor:
    """out `[B, C or 2C, ...]` (a second half is unused), target `[B, C, ...]`, t `[B]` -> loss `[B]`, fp32.

    Only out has a gradient in the kernel; fp64 operands on a CPU are the reference's. A ValueError names what does not fit.
    """
    shape, channels = tuple(out.shape), target.shape[1] if target.ndim > 1 else 0
    if target.ndim != out.ndim or shape not in (
        tuple(target.shape),
        (*target.shape[:1], 2 * channels, *target.shape[2:]),
    ):
        raise ValueError(
            f"interpolant_loss: out has shape {shape}, target {tuple(target.shape)}, expected [B, C or 2 C, ...] and "
            f"[B, C, ...]"
        )
    if t.shape != out.shape[:1]:
        raise ValueError(f"interpolant_loss: t has shape {tuple(t.shape)}, expected {shape[:1]}")
    for name, tensor in (("target", target), ("t", t)):
        if tensor.device != out.device:
            raise ValueError(f"interpolant_loss: {name} is on {tensor.device}, out on {out.device}; move one of them")
    run = choose(out.device, reference, **_KERNELS)
    if out.device.type == "cpu" and torch.float64 in (out.dtype, target.dtype, t.dtype):
        run = reference
    if run is _kernel:
        if out.device.type == "cuda" and torch.float64 in (out.dtype, target.dtype):
            check_cuda("interpolant_loss", out=out.reshape(-1)[:1], target=target.reshape(-1)[:1])
        if target.requires_grad or t.requires_grad:
            raise ValueError(
                "interpolant_loss: target and t have no gradient; detach them, or call inside use_reference()"
            )
    return run(out, target, t, interpolant)
