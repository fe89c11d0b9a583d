"""qk_norm_rope, RMS: the packed qkv read and written forward; backward reads its gradient and q, k and writes dqkv.

Each token is on its own, so that one N stands for all.
"""

from __future__ import annotations

import math

from torch import Tensor

from benchmarks.bench_attention import HEADS
from benchmarks.harness import DEVICE, TOKENS, Case, Direction, Work, batch, draw, shapes
from sitfast.kernels import qk_norm_rope
from sitfast.kernels.qk_norm_rope import axial_angles


def case(width: int, tokens: int) -> Case:
    samples, length = batch(tokens)
    heads, head = HEADS[width], width // HEADS[width]
    unit = samples * length * width * draw(1).element_size()
    cos, sin = (table.repeat(length, 1)[:length] for table in axial_angles(math.isqrt(length), head, DEVICE))

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return qk_norm_rope(qkv, norm="rms", q_weight=q_weight, k_weight=k_weight, rope=(cos, sin))

    return Case(
        kernel="qk_norm_rope",
        width=width,
        tokens=tokens,
        function=function,
        draw=lambda: (draw(samples, length, 3, heads, head), draw(head), draw(head)),
        forward=Work(bytes=6 * unit, flops=0),
        backward=Work(bytes=8 * unit, flops=0),
    )


@shapes(values=TOKENS[:1])
def test_qk_norm_rope(bench, width: int, tokens: int, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens)
