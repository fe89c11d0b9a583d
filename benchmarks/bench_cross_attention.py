"""cross_attention of image tokens to captions: two products of N · L · d forward, five backward.

Captions are 77 tokens, CLIP's length, of which a random number count; operations are counted for all of them, since a
kernel may not know. The reference is what ran before, PyTorch's scaled_dot_product_attention under the mask; "auto" may
choose it.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.bench_attention import HEADS
from benchmarks.harness import DEVICE, GPU, Case, Direction, Work, batch, draw, shapes
from sitfast.kernels import cross_attention

LENGTH = 77 if GPU else 5


def case(width: int, tokens: int) -> Case:
    samples, length = batch(tokens)
    heads, head = HEADS[width], width // HEADS[width]
    lengths = torch.randint(1, LENGTH + 1, (samples, 1), device=DEVICE)
    unit, caption = (samples * rows * width * draw(1).element_size() for rows in (length, 2 * LENGTH))
    product = 2 * samples * length * LENGTH * width
    return Case(
        kernel="cross_attention",
        width=width,
        tokens=tokens,
        function=partial(cross_attention, mask=torch.arange(LENGTH, device=DEVICE) < lengths),
        draw=lambda: (draw(samples, length, heads, head), draw(samples, LENGTH, 2, heads, head)),
        forward=Work(bytes=2 * unit + caption, flops=2 * product),
        backward=Work(bytes=3 * unit + 2 * caption, flops=5 * product),
    )


@shapes()
def test_cross_attention(bench, width: int, tokens: int, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens)
