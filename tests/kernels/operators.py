"""What the tests of the compiled operators share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sitfast.kernels import extension

needs_operators = pytest.mark.skipif("cpu" not in extension.load().kinds, reason="the operators are not built")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def ulps(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """The largest distance in units of the last place of `expected`, or of `scale` where terms of that size cancel."""
    size = expected.abs() if scale is None else torch.maximum(expected.abs(), scale.abs())
    spacing = torch.nextafter(size.float(), torch.tensor(torch.inf, device=size.device)) - size.float()
    return ((got.double() - expected.double()).abs() / spacing.double()).max().item() if got.numel() else 0.0


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.detach()
        .cpu()
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(b.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    )
