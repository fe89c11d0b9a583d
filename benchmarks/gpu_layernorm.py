"""Launches of the layer norm kernels, by rows, warps and chunks a sample: python -m benchmarks.gpu_layernorm [WIDTH …]

Each variant is checked against the chosen launch, then timed as in `harness`. "alone" is `layernorm_modulate`, the rest
`gated_residual_layernorm_modulate` with the bias of its branch; fp32 is an fp32 stream with bf16 branches and h. Prints the
launch chosen by the tables of `_layernorm_triton` and the fastest few. About 30 s for all four widths.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, WIDTHS, Timer, draw
from sitfast.kernels import _layernorm_triton as kernels
from sitfast.kernels._layernorm_triton import Launch

BATCH, TOKENS, REPEATS, NUM_SETS = 128, 256, 20, 3
CHOOSE_FORWARD, CHOOSE_BACKWARD = kernels.forward_launch, kernels.backward_launch
FORWARD_ROWS = (1, 2, 3, 4, 8, 16, 32)
CHUNKS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)  # of a backward pass
WARPS = {1152: (1, 2, 4, 8), 1024: (1, 2, 4, 8), 768: (1, 2, 4, 8), 384: (1, 2, 4)}


@dataclass(frozen=True)
class Problem:
    """One kernel, direction and stream at one width, and the launches to try."""

    width: int
    backward: bool
    residual: bool
    stream: torch.dtype

    def __str__(self) -> str:
        what = "residual" if self.residual else "alone"
        stream = "fp32" if self.stream == torch.float32 else "bf16"
        return f"D={self.width:<4} {'backward' if self.backward else 'forward':<8} {what:<8} {stream}"

    @property
    def bytes(self) -> int:
        wide, half = self.stream.itemsize, 2
        units = (2 * wide + half) if self.backward else (wide + half)
        if self.residual:
            units = (3 * wide + 3 * half) if self.backward else (2 * wide + 2 * half)
        return units * BATCH * TOKENS * self.width

    def chosen(self) -> Launch:
        if self.backward:
            return CHOOSE_BACKWARD(BATCH, TOKENS, self.width, self.residual, self.stream, DEVICE)
        return CHOOSE_FORWARD(self.width, self.residual)

    def launches(self) -> list[Launch]:
        """The chosen one first."""
        rows = [-(-TOKENS // chunks) for chunks in CHUNKS] if self.backward else FORWARD_ROWS
        tried = [
            Launch(count, warps) for warps in WARPS[self.width] for count in rows if not self.backward or warps > 1
        ]
        return list(dict.fromkeys([self.chosen(), *tried]))

    def draw(self) -> Callable[[], tuple[Tensor, ...]]:
        """The call on fresh inputs."""
        shape, vectors = (BATCH, TOKENS, self.width), (BATCH, self.width)
        x, scale, shift = draw(*shape, dtype=self.stream), draw(*vectors), draw(*vectors)
        extra = {}
        if self.residual:
            extra = {"y": draw(*shape), "gate": draw(*vectors), "bias": draw(self.width, dtype=self.stream)}
        if not self.backward:
            return partial(kernels.forward, x, shift, scale, 1e-6, torch.bfloat16, **extra)
        _, _, mean, rstd = kernels.forward(x, shift, scale, 1e-6, torch.bfloat16)
        dx_new = draw(*shape, dtype=self.stream) if self.residual else None
        return partial(kernels.backward, draw(*shape), dx_new, x, scale, mean, rstd, **extra)


def problems(widths: list[int]) -> Iterator[Problem]:
    for width in widths:
        for backward in (False, True):
            for residual in (False, True):
                for stream in (torch.bfloat16, torch.float32):
                    yield Problem(width, backward, residual, stream)


def use(launch: Launch) -> None:
    kernels.forward_launch = kernels.backward_launch = lambda *_: launch


def compile_all(problem: Problem) -> None:
    """Fill Triton's cache on disk."""
    call, seen = problem.draw(), set()
    for launch in problem.launches():
        if launch.warps not in seen:
            seen.add(launch.warps)
            use(launch)
            call()


def differs(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """Row results may differ in the last bit of bf16, sums over other chunks by a few of fp32."""
    for position, (ours, theirs) in enumerate(zip(result, expected, strict=True)):
        if theirs.numel():
            error = (ours.double() - theirs.double()).abs().max().item()
            if not error <= 2**-7 * theirs.double().abs().max().item():
                return f"result {position} is off by {error:.2g}"
    return None


def sweep(problem: Problem, timer: Timer) -> dict[str, Any]:
    sets = [problem.draw() for _ in range(NUM_SETS)]
    launches = problem.launches()
    use(launches[0])
    expected, times, faults = sets[0](), {}, []
    for launch in launches:
        use(launch)
        if fault := differs(sets[0](), expected):
            faults.append(f"{launch}: {fault}")
            continue
        samples = timer.samples_s(lambda index: sets[index % NUM_SETS], REPEATS)
        times[launch] = 1e6 * statistics.median(samples)
    return {"problem": problem, "chosen": launches[0], "times": times, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches of the layer norm kernels.")
    parser.add_argument("widths", nargs="*", type=int, default=list(WIDTHS))
    parser.add_argument("--output", type=Path, help="where to write all times, as JSON")
    arguments = parser.parse_args()
    start = time.time()
    todo = list(problems(arguments.widths))
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_all, todo))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; compiled in {time.time() - start:.0f} s",
        flush=True,
    )
    timer, found = Timer(), []
    rate = timer.copy_rate()
    unit = draw(BATCH, TOKENS, 1152)
    target = torch.empty_like(unit)
    small = 2 * unit.nbytes / statistics.median(timer.samples_s(lambda _: lambda: target.copy_(unit)))
    print(f"copy {rate / 1e12:.2f} TB/s, of one unit {small / 1e12:.2f} TB/s; rows x warps, us", flush=True)
    for problem in todo:
        result = sweep(problem, timer)
        chosen, times = result["chosen"], result["times"]
        best = sorted(times, key=times.__getitem__)[:6]
        share = 100 * problem.bytes / rate * 1e6 / times[chosen]
        fastest = ", ".join(f"{launch.rows}x{launch.warps} {times[launch]:.1f}" for launch in best)
        gain = f"{100 * (times[chosen] / times[best[0]] - 1):4.1f} %"
        print(
            f"{problem}: {chosen.rows}x{chosen.warps} {times[chosen]:.1f} ({share:.0f} % of a copy), {gain}: {fastest}"
        )
        print("".join(f"  REFUSED {fault}\n" for fault in result["faults"]), end="", flush=True)
        found.append({"problem": str(problem), "times_us": {f"{k.rows}x{k.warps}": v for k, v in times.items()}})
    if arguments.output:
        arguments.output.write_text(json.dumps(found))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
