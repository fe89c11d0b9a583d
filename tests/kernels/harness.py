"""What tests of Triton kernels share. Without a GPU the kernels run in Triton's interpreter, on small shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a model on the CPU too: the layer norms and the feed-forward branch, interpreted there."""
    for name in ("layernorm_modulate", "gated_residual", "mlp"):
        module = import_module(f"sitfast.kernels.{name}")
        kernel = module.fused if name == "mlp" else module.kernel
        monkeypatch.setattr(module, "choose", lambda *_, kernel=kernel, **__: kernel)


def run_all(function: Callable, inputs: Sequence[Tensor], out_grads: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of all inputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    out_grads = [grad.to(output.dtype) for grad, output in zip(out_grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, out_grads)]


def assert_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def assert_calibrated(
    kernel: Callable, plain: Callable, formula: Callable, inputs: Sequence[Tensor], out_grads: Sequence[Tensor]
) -> None:
    """max|kernel − exact| ≤ 2 · max|plain − exact| for the outputs and all gradients.

    `plain` are modules without kernels in the dtypes of the inputs, exact is the formula in fp64.
    """
    got, rough = run_all(kernel, inputs, out_grads), run_all(plain, inputs, out_grads)
    exact = run_all(formula, [value.double() for value in inputs], [grad.double() for grad in out_grads])
    for a, b, expected in zip(got, rough, exact, strict=True):
        assert a.dtype == b.dtype
        slack = 1e-5 * expected.abs().max()  # where the plain modules work in fp32 they may make no error at all
        assert (a - expected).abs().max() <= 2 * (b - expected).abs().max() + slack


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and torch.empty_like return NaN, so that what a kernel does not write shows."""
    with mock.patch("torch.empty", _poisoned(torch.empty)), mock.patch("torch.empty_like", _poisoned(torch.empty_like)):
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))
