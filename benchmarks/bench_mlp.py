"""mlp: two GEMMs forward and four backward, H = 4 D. Liger has no feed-forward without a gate, so no column for it."""

from __future__ import annotations

import pytest

from benchmarks.harness import TOKENS, WIDTHS, Case, Direction, Work, batch, draw
from sitfast.kernels import mlp


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_mlp(bench, width: int, tokens: int, direction: Direction) -> None:
    samples, length = batch(tokens)
    hidden = 4 * width
    gemm = 2 * samples * length * width * hidden
    bench(
        Case(
            kernel="mlp",
            width=width,
            tokens=tokens,
            function=mlp,
            draw=lambda: (
                draw(samples, length, width),
                draw(hidden, width, scale=width**-0.5),
                draw(hidden),
                draw(width, hidden, scale=hidden**-0.5),
                draw(width),
            ),
            forward=Work(bytes=0, flops=2 * gemm),
            backward=Work(bytes=0, flops=4 * gemm),
            bound="flops",
        ),
        direction,
    )
