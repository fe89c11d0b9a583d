"""layernorm_modulate: one read and one write forward; backward reads dh and x and writes dx."""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.harness import GPU, TOKENS, WIDTHS, Case, Direction, Function, Work, batch, draw
from sitfast.kernels import layernorm_modulate


def liger() -> Function | None:
    """Liger's layer norm, then the modulation in PyTorch: it has no adaLN kernel."""
    if not GPU:
        return None
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return None

    def run(x: Tensor, adaln: Tensor) -> Tensor:
        shift, scale = adaln.chunk(6, dim=1)[:2]
        ones = x.new_ones(x.shape[-1])
        normed = LigerLayerNormFunction.apply(x, ones, x.new_zeros(x.shape[-1]), 1e-6)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    return run


def function(x: Tensor, adaln: Tensor) -> Tensor:
    """On chunks of the adaLN output, as the model calls it."""
    shift, scale = adaln.chunk(6, dim=1)[:2]
    return layernorm_modulate(x, shift, scale)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_layernorm_modulate(bench, width: int, tokens: int, direction: Direction) -> None:
    samples, length = batch(tokens)
    unit = samples * length * width * draw(1).element_size()
    rows = unit // length
    bench(
        Case(
            kernel="layernorm_modulate",
            width=width,
            tokens=tokens,
            function=function,
            draw=lambda: (draw(samples, length, width), draw(samples, 6 * width)),
            forward=Work(bytes=2 * unit + 2 * rows, flops=0),
            backward=Work(bytes=3 * unit + 3 * rows, flops=0),
            bound="bytes",
            liger=liger(),
        ),
        direction,
    )
