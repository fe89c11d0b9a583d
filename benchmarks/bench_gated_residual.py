"""gated_residual_layernorm_modulate: x, y to x_new, h; backward reads dx_new, dh, x_new, y, writes dx, dy."""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.harness import TOKENS, WIDTHS, Case, Direction, Work, batch, draw
from sitfast.kernels import gated_residual_layernorm_modulate


def function(x: Tensor, y: Tensor, adaln: Tensor) -> tuple[Tensor, Tensor]:
    """On chunks of the adaLN output, as the model calls it."""
    gate, shift, scale = adaln.chunk(6, dim=1)[2:5]
    return gated_residual_layernorm_modulate(x, y, gate, shift, scale)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gated_residual(bench, width: int, tokens: int, direction: Direction) -> None:
    samples, length = batch(tokens)
    unit = samples * length * width * draw(1).element_size()
    rows = unit // length
    bench(
        Case(
            kernel="gated_residual_layernorm_modulate",
            width=width,
            tokens=tokens,
            function=function,
            draw=lambda: (draw(samples, length, width), draw(samples, length, width), draw(samples, 6 * width)),
            forward=Work(bytes=4 * unit + 3 * rows, flops=0),
            backward=Work(bytes=6 * unit + 5 * rows, flops=0),
            bound="bytes",
        ),
        direction,
    )
