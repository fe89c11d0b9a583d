"""What the kernel tests share: one comparison of a kernel with its formula in fp64."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

# fp32 rounds at 2^-24. A row statistic or GEMM here sums at most a few thousand terms, whose errors grow about as their
# square root; 256 roundings relative to the largest value leave a factor of four above sqrt(4096).
FP32_TOLERANCE = 256 * 2.0**-24

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


def _run(function: Function, inputs: list[Tensor], weights: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if weights is None:  # the gradients that arrive are expanded scalars, all strides zero
        loss = sum(output.sum() for output in outputs)
    else:
        loss = sum((output * weight.to(output)).sum() for output, weight in zip(outputs, weights, strict=True))
    return [output.detach() for output in outputs], list(torch.autograd.grad(loss, leaves))


@pytest.fixture
def assert_agrees() -> Callable[..., None]:
    """assert_agrees(function, formula, *inputs): outputs and all gradients in fp32 against the formula in fp64."""

    def check(function: Function, formula: Function, *inputs: Tensor) -> None:
        wide = [value.double() for value in inputs]
        shapes = [output.shape for output in _run(formula, wide, None)[0]]
        for weights in ([torch.randn(shape, dtype=torch.float64) for shape in shapes], None):
            outputs, grads = _run(function, list(inputs), weights)
            expected_outputs, expected_grads = _run(formula, wide, weights)
            for got, expected in zip(outputs + grads, expected_outputs + expected_grads, strict=True):
                assert got.dtype == torch.float32
                assert got.shape == expected.shape
                bound = FP32_TOLERANCE * max(expected.abs().max().item(), 1.0)
                assert (got - expected).abs().max().item() <= bound

    return check


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norm programs of 2 rows, so that small inputs have several, the last one not full."""
    kernels = import_module("sitfast.kernels._layernorm_triton")
    for name in ("forward_launch", "backward_launch"):
        monkeypatch.setattr(kernels, name, lambda *_: kernels.Launch(rows=2, warps=4))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
