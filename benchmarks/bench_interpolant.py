"""interpolate and interpolant_loss: forward draws a batch and takes its loss, backward makes the gradient of the prediction.

Latents of 4 × 32 × 32 and 4 × 64 × 64 (256 and 1024 tokens), fp32, against a prediction with the learn_sigma half. Nothing
depends on the width of the model. Forward reads latents, half of the prediction and the target, and writes x_t, the target
and the error; backward reads the error and writes the gradient, both halves.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, DIRECTIONS, GPU, TOKENS, WIDTHS, Case, Direction, Work, batch, draw
from sitfast import Interpolant, interpolant_loss
from sitfast.kernels.interpolate import interpolate

CHANNELS = 4
LAW = Interpolant(seed=1)


def case(width: int, tokens: int) -> Case:
    samples = batch(tokens)[0]
    side = 2 * math.isqrt(tokens) if GPU else 8
    latents = torch.randn(samples, CHANNELS, side, side, device=DEVICE)
    index = torch.arange(samples, device=DEVICE)
    values, out_size = latents.numel(), draw(1).element_size()

    def function(out: Tensor) -> Tensor:
        drawn = interpolate(LAW, latents, index)
        return interpolant_loss(out, drawn.target, drawn.t, interpolant=LAW)

    forward = {"draw": 4 + 4 + 4, "loss": out_size + 4 + 4}  # bytes a value
    return Case(
        kernel="interpolate and loss",
        width=width,
        tokens=tokens,
        function=function,
        draw=lambda: (draw(samples, 2 * CHANNELS, side, side),),
        forward=Work(bytes=values * sum(forward.values()), flops=0),
        backward=Work(bytes=values * (4 + 2 * out_size), flops=0),
    )


@pytest.mark.parametrize("width", WIDTHS[:1])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_interpolant(bench, width: int, tokens: int, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens)
