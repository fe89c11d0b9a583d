"""layernorm_modulate: one read and one write forward; backward reads dh and x and writes dx.

The stream is bf16, or fp32 under bf16 autocast, which makes h bf16. Liger has no adaLN kernel: its column is its layer
norm alone, without modulation, dshift and dscale, the least that anything built on it would take.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, DTYPE, GPU, Case, Direction, Rival, Work, batch, draw, shapes
from sitfast.kernels import layernorm_modulate

STREAMS = {"": DTYPE, "fp32 stream": torch.float32}
SHAPES = [pytest.param(*shape, id=name) for name, shape in {
    "256": (256, ""), "1024": (1024, ""), "256-fp32": (256, "fp32 stream"),
}.items()]  # fmt: skip


def autocast(stream: str, operand: Tensor) -> torch.autocast:
    """On for an fp32 stream, unless the operand says that these are the widened inputs of the check."""
    enabled = GPU and stream != "" and operand.dtype == DTYPE
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled)


def modulation(samples: int, width: int) -> tuple[Tensor, ...]:
    """The six vectors [B, D], chunks of one adaLN output, as the model has them."""
    return draw(samples, 6 * width).chunk(6, dim=1)


def rivals() -> dict[str, Rival]:
    if not GPU:
        return {}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return {}
    affine: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        width = x.shape[-1]
        if width not in affine:
            affine[width] = x.detach().new_ones(width), x.detach().new_zeros(width)
        return LigerLayerNormFunction.apply(x, *affine[width], 1e-6)

    def reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    return {"Liger": Rival(run, reference)}


def case(width: int, tokens: int, stream: str) -> Case:
    samples, length = batch(tokens)
    unit, size = samples * length * width, draw(1).element_size()
    wide = STREAMS[stream].itemsize
    vectors = samples * width * size

    def function(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        with autocast(stream, scale):
            return layernorm_modulate(x, shift, scale)

    return Case(
        kernel=f"layernorm_modulate{stream and ', '}{stream}",
        width=width,
        tokens=tokens,
        function=function,
        draw=lambda: (draw(samples, length, width, dtype=STREAMS[stream]), *modulation(samples, width)[:2]),
        forward=Work(bytes=unit * (wide + size) + 2 * vectors, flops=0),
        backward=Work(bytes=unit * (2 * wide + size) + 3 * vectors, flops=0),
        rivals={} if stream else rivals(),
    )


@shapes("tokens, stream", SHAPES)
def test_layernorm_modulate(bench, width: int, tokens: int, stream: str, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens, stream=stream)
