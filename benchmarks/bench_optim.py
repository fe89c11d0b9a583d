"""Gradient norm, clip, AdamW, one average and the bf16 copy over the tensors of a whole model, in place.

Without a GPU two tensors stand for the model. Checked before it is timed: one update against the reference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from benchmarks.gpu_extension import Operands, shapes_of, torch_update
from benchmarks.harness import CLOCK, GPU, WIDTHS, Timer
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


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [256])
@pytest.mark.parametrize("direction", ["forward"])
def test_optim(benchmark, timer: Timer, ceilings: dict[str, float], width: int, tokens: int, direction: str) -> None:
    shapes = shapes_of(PRESETS[width]) if GPU else [torch.Size((width, 8)), torch.Size((5,))]

    def operands(some: list[torch.Size]) -> Operands:
        return Operands(some, averages=1, copies=True, grads=torch.float32, moments=torch.float32)

    if reason := failure(operands(shapes[:8])):
        pytest.fail(f"adamw_ema is not timed, its check fails: {reason}")
    state = operands(shapes)

    def median(run: Callable[[], object]) -> tuple[float, list[float]]:
        samples = timer.samples_s(lambda _: run, REPEATS)
        return statistics.median(samples), samples

    (ours, samples), (theirs, _) = median(state.update), median(torch_update(state))
    with use_reference():
        eager, _ = median(state.update)
    rate = state.bytes() / ours
    benchmark.extra_info.update(
        kernel="clip, AdamW, average, bf16 copy",
        direction=direction,
        D=width,
        N=tokens,
        B=1,
        median_us=1e6 * ours,
        note=None,
        rate=rate / 1e9,
        unit="GB/s",
        percent_of_ceiling=100 * rate / ceilings["bytes"],
        ceilings={"copy_GBs": ceilings["bytes"] / 1e9, "gemm_TFLOPs": ceilings["flops"] / 1e12},
        x_eager=eager / ours,
        rivals={"fused AdamW, clip_grad_norm_, lerp": theirs / ours},
    )
    CLOCK.pending_s = samples
    benchmark.pedantic(CLOCK.tick, rounds=len(samples), iterations=1)
