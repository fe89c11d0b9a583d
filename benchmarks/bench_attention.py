"""attention on packed qkv: two products of N² d forward, five backward; head sizes of the SiT family."""

from __future__ import annotations

import pytest

from benchmarks.harness import TOKENS, WIDTHS, Case, Direction, Work, batch, draw
from sitfast.kernels import attention

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(bench, width: int, tokens: int, direction: Direction) -> None:
    samples, length = batch(tokens)
    product = 2 * samples * length * length * width
    bench(
        Case(
            kernel="attention",
            width=width,
            tokens=tokens,
            function=attention,
            draw=lambda: (draw(samples, length, 3, HEADS[width], width // HEADS[width]),),
            forward=Work(bytes=0, flops=2 * product),
            backward=Work(bytes=0, flops=5 * product),
            bound="flops",
        ),
        direction,
    )
