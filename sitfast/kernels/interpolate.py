"""One training draw of a batch in one pass: time, noise, x_t, target, and what else a sample draws.

    x_t = alpha(t) data + sigma(t) noise          target = alpha'(t) data + sigma'(t) noise, or the noise

data `[B, ...]`, index `[B]` → x_t `[B, ...]` in the compute dtype, t `[B]` fp32, target `[B, ...]` fp32, labels `[B]`.
Every draw is a function of (seed, index): see `philox`. In the same pass, where asked for:

    posterior   data holds moments `[B, 2 C, ...]` of a VAE: (mean + exp(logvar / 2) ε − shift) · scale is the data
    mirrored    the same of the mirrored image, taken for the half of the samples that the stream FLIP mirrors
    labels      become the null class for a share of the samples

Bytes: data is read once, x_t and the target are written once; noise and coefficients never reach memory. The noise is
evaluated in fp64 and everything else in the reference's order, without fused multiply-adds, so that the kernels differ
from it in the last places of library functions alone. Nothing is saved for backward but t: d x_t = alpha, d target =
alpha'.

fp64 data is the reference's, on every device but a GPU, which does not take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sitfast.kernels import extension
from sitfast.kernels.dispatch import check, check_cuda, choose, widen
from sitfast.philox import Stream, normal, uniform

if TYPE_CHECKING:
    from sitfast.interpolant import Interpolant

NAME = "interpolate"
PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "score")  # the numbers of csrc/mathematics.h
TIME_SAMPLINGS = ("uniform", "logit_normal", "shifted")


class Draw(NamedTuple):
    xt: Tensor
    t: Tensor
    target: Tensor
    labels: Tensor  # empty where none were given


class Posterior(NamedTuple):
    """How moments of a VAE become latents."""

    scale: float
    shift: float


def drop_labels(y: Tensor, index: Tensor, *, prob: float, null: int, seed: int) -> Tensor:
    """Labels y [B] with a share `prob` replaced by the null class; depends on (seed, sample index [B]) alone."""
    if prob == 0:
        return y
    return y.masked_fill(uniform(seed, index, Stream.LABEL_DROP) < prob, null)


def reference(
    interpolant: Interpolant,
    data: Tensor,
    index: Tensor,
    t: Tensor | None,
    mirrored: Tensor | None,
    posterior: Posterior | None,
    labels: Tensor | None,
    drop: float,
    null: int,
    dtype: torch.dtype,
) -> Draw:
    """Plain PyTorch, in fp32, or fp64 for fp64 data."""
    seed, rest = interpolant.seed, (1,) * (data.ndim - 1)
    if mirrored is not None:
        data = torch.where(uniform(seed, index, Stream.FLIP).view(-1, *rest) < 0.5, mirrored, data)
    data = widen(data)
    if posterior is not None:
        mean, logvar = data.chunk(2, dim=1)
        data = mean + (0.5 * logvar).exp() * normal(seed, index, Stream.VAE, *mean.shape[1:])
        data = (data - posterior.shift) * posterior.scale
    t = interpolant.sample_time(index) if t is None else t.to(torch.float32)
    noise = normal(seed, index, Stream.NOISE, *data.shape[1:])
    c = interpolant.coefficients(t.view(-1, *rest))
    xt = c.alpha * data + c.sigma * noise
    velocity = interpolant.prediction == "velocity"
    target = c.d_alpha * data + c.d_sigma * noise if velocity else noise.to(data.dtype)
    labels = index.new_empty(0) if labels is None else drop_labels(labels, index, prob=drop, null=null, seed=seed)
    return Draw(xt.to(dtype), t, target, labels)


def _kernel(
    interpolant: Interpolant,
    data: Tensor,
    index: Tensor,
    t: Tensor | None,
    mirrored: Tensor | None,
    posterior: Posterior | None,
    labels: Tensor | None,
    drop: float,
    null: int,
    dtype: torch.dtype,
) -> Draw:
    start, end = interpolant.train_interval()
    outputs = torch.ops.sitfast.interpolate(
        data.contiguous(),
        index.contiguous(),
        None if t is None else t.to(torch.float32).contiguous(),
        None if mirrored is None else mirrored.contiguous(),
        None if labels is None else labels.contiguous(),
        interpolant.seed,
        PATHS.index(interpolant.path),
        interpolant.prediction == "velocity",
        TIME_SAMPLINGS.index(interpolant.time_sampling),
        start,
        end - start,
        interpolant.logit_mean,
        interpolant.logit_std,
        interpolant.time_shift,
        posterior is not None,
        posterior.scale if posterior else 1.0,
        posterior.shift if posterior else 0.0,
        drop,
        null,
        dtype,
    )
    return Draw(*outputs)


def _fake(data: Tensor, index: Tensor, t: Any, mirrored: Any, labels: Tensor | None, *settings: Any) -> Draw:
    posterior, dtype = settings[9], settings[-1]
    shape = [data.shape[0], data.shape[1] // 2, *data.shape[2:]] if posterior else data.shape
    return Draw(
        data.new_empty(shape, dtype=dtype),
        data.new_empty(data.shape[:1], dtype=torch.float32),
        data.new_empty(shape, dtype=torch.float32),
        index.new_empty(0 if labels is None else labels.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.path, ctx.velocity, ctx.dtype = PATHS[inputs[6]], inputs[7], inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1], output[3])


def _backward(ctx: Any, dxt: Tensor | None, _dt: Any, dtarget: Tensor | None, _dlabels: Any) -> tuple:
    from sitfast.interpolant import Interpolant

    (t,) = ctx.saved_tensors
    grads = [grad for grad in (dxt, dtarget) if grad is not None]
    c = Interpolant(path=ctx.path).coefficients(t.view(-1, *(1,) * (grads[0].ndim - 1)))
    ddata = 0.0
    if dxt is not None:
        ddata = c.alpha * dxt.float()
    if dtarget is not None and ctx.velocity:
        ddata = ddata + c.d_alpha * dtarget
    return (ddata.to(ctx.dtype) if isinstance(ddata, Tensor) else None, *(None,) * 19)


_KERNELS = extension.kernels(_kernel)
if _KERNELS:
    torch.library.register_fake(f"sitfast::{NAME}", _fake)
    torch.library.register_autograd(f"sitfast::{NAME}", _backward, setup_context=_setup_context)


def interpolate(
    interpolant: Interpolant,
    data: Tensor,
    index: Tensor,
    *,
    t: Tensor | None = None,
    mirrored: Tensor | None = None,
    posterior: Posterior | None = None,
    labels: Tensor | None = None,
    drop: float = 0.0,
    null: int = 0,
    dtype: torch.dtype | None = None,
) -> Draw:
    """data `[B, ...]` (or moments `[B, 2 C, ...]` with `posterior`), index `[B]` int64 → `Draw`.

    `dtype` is that of x_t, by default fp32 (fp64 for fp64 data); the target is fp32 always, as the loss is. A given t
    `[B]` is used as it is. `drop` is the share of the labels that become `null`. A ValueError names an operand of a wrong
    shape, dtype or device; only data itself has a gradient, not moments and not a mirrored pair.
    """
    batch = (data.shape[0] if data.ndim else 0,)
    if data.ndim == 0:
        raise ValueError(f"{NAME}: data has shape (), expected [B, ...]")
    if not data.is_floating_point():
        data = data.float()
    for name, tensor in (("index", index), ("labels", labels)):
        if tensor is None:
            continue
        if tensor.shape != batch or tensor.dtype != torch.int64 or tensor.device != data.device:
            raise ValueError(
                f"{NAME}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, expected int64 of "
                f"shape {batch} on {data.device}"
            )
    if t is not None and (t.shape != batch or t.device != data.device or not t.is_floating_point()):
        raise ValueError(
            f"{NAME}: t is {t.dtype} of shape {tuple(t.shape)} on {t.device}, expected {batch} on {data.device}"
        )
    if mirrored is not None:
        check(NAME, "mirrored", mirrored.contiguous(), tuple(data.shape), data.device)
        if mirrored.dtype != data.dtype:
            raise ValueError(f"{NAME}: mirrored is {mirrored.dtype}, data is {data.dtype}; cast one of them")
    if posterior is not None and (data.ndim < 2 or data.shape[1] % 2):
        raise ValueError(f"{NAME}: moments have shape {tuple(data.shape)}, expected [B, 2 C, ...]")
    run = choose(data.device, reference, **_KERNELS)
    if data.device.type == "cpu" and data.dtype == torch.float64:
        run = reference
    if run is _kernel:
        if data.device.type == "cuda" and data.dtype == torch.float64:
            check_cuda(NAME, data=data.reshape(-1)[:1])
        if (mirrored is not None or posterior is not None) and any(
            x is not None and x.requires_grad for x in (data, mirrored)
        ):
            raise ValueError(
                f"{NAME}: moments and mirrored data have no gradient; detach them, or call inside use_reference()"
            )
    return run(interpolant, data, index, t, mirrored, posterior, labels, drop, null, dtype or widen(data[:0]).dtype)
