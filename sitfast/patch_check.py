"""Whether a forward of ours computes what a module's own does, measured on a small random input.

    same mathematics    ours on the reference path against theirs, both in fp64, training and evaluation, every gradient
    right kernels       |ours − fp64| ≤ 2 · |theirs − fp64| + 2 ulp, in the module's precision, and for fp32 under autocast

Parameters are drawn too: those of a fresh model are zero where it matters, and any error would hide behind a gate of
zero. They stand in for the module's by `functional_call`, so that its own, their gradients, its buffers and its hooks
are not touched; modes and RNG states are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sitfast.kernels import use_reference

BATCH, TOKENS = 2, 8
# Relative, against fp64: code that computes a part in fp32 whatever its input is within 1e-6; another formula is not,
# exact for tanh GELU included (5e-4), nor is another epsilon, since some tokens of the input are small.
SAME = 1e-5


class Unfit(Exception):
    """Why a module is left alone."""


class _Call(nn.Module):
    """`forward` of `module`, chosen freely, in the form that functional_call wants; its hooks do not run."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(self.module, *args, **kwargs)


def _device(module: nn.Module) -> torch.device:
    """Where the check runs; parameters that are not there yet are drawn on the CPU."""
    first = next(module.parameters())
    return torch.device("cpu") if first.is_meta else first.device


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Whatever state the caller is in, plain eager with gradients inside; the modes of the module come back after."""
    modes = [(part, part.training) for part in module.modules()]
    eager = torch.compiler.set_stance("force_eager")  # some classes compile their own forward
    full = torch.autocast(_device(module).type, enabled=False)
    try:
        with eager, full, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@dataclass(frozen=True)
class Problem:
    """The input that a module takes: x [B, N, width], and c [B, condition_width] or else a timestep and a label."""

    width: int
    condition_width: int | None = None
    num_labels: int = 0


@dataclass(frozen=True)
class Probe:
    """A problem with its random numbers; values are representable in the module's own dtype."""

    module: nn.Module
    weights: dict[str, Tensor]
    tensors: tuple[Tensor, ...]  # x, and c where the module takes one
    keywords: dict[str, Tensor]
    device: torch.device

    @classmethod
    def draw(cls, module: nn.Module, problem: Problem) -> Probe:
        first = next(module.parameters())
        device = _device(module)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = first.dtype, scale: float | Tensor = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        weights = {}
        for name, value in module.named_parameters():
            scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.5
            weights[name] = normal(*value.shape, dtype=value.dtype, scale=scale)
        # Off-centre, to tell layer norm from RMS norm; from small to large, to tell one epsilon from another.
        sizes = torch.logspace(-2, 0, TOKENS, device=device)[:, None]
        x = normal(BATCH, TOKENS, problem.width, scale=sizes) + normal(BATCH, TOKENS, 1, scale=sizes)
        if problem.condition_width is not None:
            return cls(module, weights, (x, normal(BATCH, problem.condition_width)), {}, device)
        labels = torch.arange(BATCH, device=device) % problem.num_labels
        keywords = {"timestep": torch.tensor([3, 500], device=device), "class_labels": labels}
        return cls(module, weights, (x,), keywords, device)

    def run(self, forward: Callable[..., Tensor], *, dtype: torch.dtype | None, training: bool) -> dict[str, Tensor]:
        """The output and every gradient, computed in `dtype`, or in that of each tensor; the caller's RNG state stays."""

        def leaf(value: Tensor) -> Tensor:
            return value.detach().to(dtype or value.dtype).requires_grad_()

        for part in self.module.modules():
            part.training = training
        tensors = [leaf(value) for value in self.tensors]
        weights = {f"module.{name}": leaf(value) for name, value in self.weights.items()}
        buffers = {f"module.{name}": value.clone() for name, value in self.module.named_buffers()}
        if dtype is not None:
            buffers = {name: b.to(dtype) if b.is_floating_point() else b for name, b in buffers.items()}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            out = functional_call(
                _Call(self.module, forward), {**weights, **buffers}, tuple(tensors), dict(self.keywords)
            )
        generator = torch.Generator(self.device).manual_seed(1)
        direction = torch.randn(out.shape, generator=generator, device=self.device).to(self.tensors[0].dtype)
        leaves = dict(zip(("x", "c"), tensors, strict=False)) | weights
        grads = torch.autograd.grad(out, list(leaves.values()), direction.to(out.dtype), allow_unused=True)
        results = {f"gradient of {name.removeprefix('module.')}": g for name, g in zip(leaves, grads, strict=True)}
        return {"output": out.detach()} | {name: torch.zeros(()) if g is None else g for name, g in results.items()}


def largest(value: Tensor) -> float:
    return value.abs().max().item()


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:120] if text else 'no message'}"


def _scales(exact: dict[str, Tensor]) -> dict[str, float]:
    """The size that errors are relative to; gradients that are zero in exact arithmetic are measured by the others."""
    sizes = {name: largest(value) for name, value in exact.items()}
    return {name: max(size, 0.01 * max(sizes.values())) for name, size in sizes.items()}


def verify(module: nn.Module, forward: Callable[..., Tensor], problem: Problem) -> str:
    """What was measured of `forward` against the class's own; Unfit if they are not the same."""
    try:
        with _undisturbed(module):
            return _measure(Probe.draw(module, problem), type(module).forward, forward)
    except Unfit:
        raise
    except Exception as error:  # the user's code and every kernel's refusal
        raise Unfit(f"the check failed: {one_line(error)}") from error


def _measure(probe: Probe, theirs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> str:
    exact: dict[str, Tensor] = {}
    for training in (True, False):
        exact = probe.run(theirs, dtype=torch.float64, training=training)
        with use_reference():
            same = probe.run(ours, dtype=torch.float64, training=training)
        for name, scale in _scales(exact).items():
            error = largest(same[name] - exact[name]) / scale
            if not error <= SAME:  # also if it is nan
                mode = "training" if training else "evaluation"
                raise Unfit(f"computes something else: {name} differs by {error:.1e} of its largest value ({mode})")
    found = [_measure_kernels(probe, theirs, ours, exact, None)]
    if probe.tensors[0].dtype == torch.float32:
        half = torch.float16 if probe.device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
        found.append(_measure_kernels(probe, theirs, ours, exact, half))
    return f"relative error {', '.join(found)}"


def _measure_kernels(
    probe: Probe,
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    exact: dict[str, Tensor],
    autocast: torch.dtype | None,
) -> str:
    """In the module's precision, or under autocast: |ours − exact| ≤ 2 · |theirs − exact| + 2 ulp of the largest."""
    context = torch.autocast(probe.device.type, autocast) if autocast else nullcontext()
    with context:
        before = probe.run(theirs, dtype=None, training=False)
        after = probe.run(ours, dtype=None, training=False)
    dtype = autocast or probe.tensors[0].dtype
    name = str(dtype).removeprefix("torch.")
    if before["output"].dtype != after["output"].dtype:
        raise Unfit(f"the output would be {after['output'].dtype}, not {before['output'].dtype} ({name})")
    errors = {}
    for key, scale in _scales(exact).items():
        own, error = (largest(run[key].double() - exact[key]) / scale for run in (before, after))
        errors[key] = error, own
        if not error <= 2 * own + 2 * torch.finfo(dtype).eps:
            raise Unfit(f"the kernels are off: {key} by {error:.1e}, its own forward by {own:.1e} ({name})")
    return "{:.1e} (own {:.1e}) in {}".format(*errors["output"], name)
