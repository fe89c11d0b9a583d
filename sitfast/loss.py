"""The training loss of an interpolant, one value a sample.

    velocity    mean (out - v)^2
    noise       w(t) mean (out - noise)^2
    score       w(t) mean (out sigma + noise)^2

The weight of the last two is 1 (none), (g / sigma)^2 (velocity: the same gradient as a velocity model's) or g / sigma^2
(likelihood), with g the drift variance of the path. A velocity loss has no weight, whatever `loss_weight` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sitfast.interpolant import Interpolant, at_least_fp32


def interpolant_loss(out: Tensor, target: Tensor, t: Tensor, *, interpolant: Interpolant) -> Tensor:
    """out `[B, C or 2C, ...]` (a second half is unused), target `[B, C, ...]`, t `[B]` -> loss `[B]`, fp32."""
    out, target = at_least_fp32(out[:, : target.shape[1]]), at_least_fp32(target)
    assert out.shape == target.shape, f"output {tuple(out.shape)} against target {tuple(target.shape)}"
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
