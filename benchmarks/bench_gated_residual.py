"""gated_residual_layernorm_modulate: x, y to x_new, h; backward reads dx_new, dh, x_new, y, writes dx, dy.

The stream is bf16, or fp32 under bf16 autocast, which leaves y, h and dy in bf16. With `save="input"` backward reads x in
place of x_new, the same bytes.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.bench_layernorm_modulate import SHAPES, STREAMS, autocast, modulation
from benchmarks.harness import Case, Direction, Work, batch, draw, shapes
from sitfast.kernels import gated_residual_layernorm_modulate
from sitfast.kernels.gated_residual import Save

SAVES = [pytest.param(*shape.values, "output", id=shape.id) for shape in SHAPES]
SAVES += [pytest.param(*shape.values, "input", id=f"{shape.id}-input") for shape in SHAPES if shape.values[0] == 256]


def case(width: int, tokens: int, stream: str, save: Save) -> Case:
    samples, length = batch(tokens)
    unit, size = samples * length * width, draw(1).element_size()
    wide = STREAMS[stream].itemsize
    vectors = samples * width * size

    def function(
        x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        with autocast(stream, scale):
            return gated_residual_layernorm_modulate(x, y, gate, shift, scale, bias=bias, save=save)

    return Case(
        kernel=", ".join(filter(None, ("gated_residual_layernorm_modulate", stream, save == "input" and "save=input"))),
        width=width,
        tokens=tokens,
        function=function,
        draw=lambda: (
            draw(samples, length, width, dtype=STREAMS[stream]),
            draw(samples, length, width),
            *modulation(samples, width)[2:5],
            draw(width, dtype=STREAMS[stream]),
        ),
        forward=Work(bytes=unit * (2 * wide + 2 * size) + 3 * vectors, flops=0),
        backward=Work(bytes=unit * (3 * wide + 3 * size) + 5 * vectors, flops=0),
    )


@shapes("tokens, stream, save", SAVES)
def test_gated_residual(bench, width: int, tokens: int, stream: str, save: Save, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens, stream=stream, save=save)
