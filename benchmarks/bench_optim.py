"""Gradient norm, clip, AdamW, one average and the bf16 copy over the tensors of a whole model, in place.

Without a GPU two tensors stand for the model. Checked before it is timed: one update against the reference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch

from benchmarks.gpu_extension import Operands, shapes_of, torch_update
from benchmarks.harness import DIRECTIONS, GPU, TOKENS, WIDTHS, Direction, Outcome, Timer, Work
from sitfast.kernels import use_reference
from sitfast.kernels.adamw_ema import gradient_norm

PRESETS = dict(zip(WIDTHS, ("SiT-XL/2", "SiT-B/2", "SiT-L/2", "SiT-S/2"), strict=True))
REPEATS = 15 if GPU else 5


def failure(operands: Operands) -> str | None:
    """Why the update may not be timed: the norm against fp64, then an update with equal norms.

    An update may leave nearly nothing of a value, so its size before counts as well.
    """
    exact = torch.stack([g.double().square().sum() for g in operands.grads]).sum().sqrt()
    norm = gradient_norm(operands.grads)
    if not (norm - exact).abs() <= 1e-6 * exact:
        return f"the norm is off by {(norm - exact).abs().item():.3g} of {exact.item():.3g}"
    before, ours, theirs = deepcopy(operands), deepcopy(operands), operands
    ours.update(norm)
    with use_reference():
        theirs.update(norm)
    before, ours, theirs = (x.params + x.emas[0] + x.m for x in (before, ours, theirs))
    for old, a, b in zip(before, ours, theirs, strict=True):
        if not ((a - b).abs() <= 1e-5 * torch.maximum(old.abs(), b.abs()) + 1e-10).all():
            return f"off by {(a - b).abs().max().item():.3g}"
    return None


def compare(directions: Sequence[Direction], wanted: Sequence[str], width: int, tokens: int) -> dict | str:
    shapes = shapes_of(PRESETS[width]) if GPU else [torch.Size((width, 8)), torch.Size((5,))]

    def operands(some: list[torch.Size]) -> Operands:
        return Operands(some, averages=1, copies=True, grads=torch.float32, moments=torch.float32)

    torch.manual_seed(0)
    if reason := failure(operands(shapes[:8])):
        return reason
    timer, state = Timer(), operands(shapes)

    def times(run: Callable[[], object]) -> list[float]:
        return timer.samples_s(lambda _: run, REPEATS)

    samples = times(state.update)
    median = statistics.median(samples)
    info: dict[str, Any] = {
        "kernel": "clip, AdamW, average, bf16 copy",
        "direction": "forward",
        "D": width,
        "N": tokens,
        "B": 1,
        "median_us": 1e6 * median,
        "note": None,
        "rivals": {},
    }
    if "rivals" in wanted:
        theirs = statistics.median(times(torch_update(state)))
        info["rivals"]["fused AdamW, clip_grad_norm_, lerp"] = theirs / median
    if "eager" in wanted:
        with use_reference():
            info["x_eager"] = statistics.median(times(state.update)) / median
    return {"forward": Outcome(samples, Work(bytes=state.bytes(), flops=0), info)}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS[:1])
@pytest.mark.parametrize("direction", DIRECTIONS[:1])
def test_optim(bench, width: int, tokens: int, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens)
