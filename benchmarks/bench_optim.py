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

PRESETS = dict(zip(WIDTHS, ("SiT-XL/2", "SiT-B/2", "SiT-L/2", "SiT-S/2"), strict=True))
REPEATS = 15 if GPU else 5


def failure(operands: Operands) -> str | None:
    """Why the update may not be timed."""
    ours, theirs = deepcopy(operands), operands
    ours.update()
    with use_reference():
        theirs.update()
    for a, b in zip(ours.params + ours.emas[0] + ours.m, theirs.params + theirs.emas[0] + theirs.m, strict=True):
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-8):
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
