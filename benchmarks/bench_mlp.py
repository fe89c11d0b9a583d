"""mlp: two GEMMs forward and four backward, H = 4 D. It sees B · N rows, so that one N stands for all.

Liger has no feed-forward without a gate. Its column is the nearest that can be built of it: its GEGLU kernel between
PyTorch's two linear layers, with a gate of ones that is written each time, since its backward overwrites it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import GPU, TOKENS, Case, Direction, Rival, Work, batch, draw, shapes
from sitfast.kernels.dispatch import choose
from sitfast.kernels.mlp import LEAST_WIDTH, fused, reference


def rivals() -> dict[str, Rival]:
    if not GPU:
        return {}
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
    except ImportError:
        return {}

    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        u = F.linear(x, w1, b1)
        return F.linear(LigerGELUMulFunction.apply(u, torch.ones_like(u)), w2, b2)

    return {"Liger": Rival(run)}


def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The kernels, also where `mlp` runs the reference since they lose to the compiler."""
    return choose(x.device, reference, cuda=fused)(x, w1, b1, w2, b2)


def case(width: int, tokens: int) -> Case:
    samples, length = batch(tokens)
    hidden, rows, size = 4 * width, samples * length, draw(1).element_size()
    gemm = 2 * rows * width * hidden
    return Case(
        kernel="mlp",
        width=width,
        tokens=tokens,
        function=function,
        draw=lambda: (
            draw(samples, length, width),
            draw(hidden, width, scale=width**-0.5),
            draw(hidden),
            draw(width, hidden, scale=hidden**-0.5),
            draw(width),
        ),
        forward=Work(bytes=(2 * rows * width + rows * hidden + 2 * width * hidden) * size, flops=2 * gemm),
        backward=Work(bytes=(3 * rows * width + rows * hidden + 4 * width * hidden) * size, flops=4 * gemm),
        rivals=rivals(),
        note="`mlp` runs PyTorch here" if width < LEAST_WIDTH else None,
    )


@shapes(values=TOKENS[:1])
def test_mlp(bench, width: int, tokens: int, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens)
