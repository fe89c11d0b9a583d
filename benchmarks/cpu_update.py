"""The update on a CPU: python -m benchmarks.cpu_update [--preset SiT-B/2]

Clip, AdamW and one average over the tensors of a model, on as many threads as PyTorch takes, against
torch.optim.AdamW(foreach=True) with clip_grad_norm_ and a loop for the average, and against fused=True with _foreach_lerp_.
They take turns, so that what else the machine does hits all alike; medians, least and most of `--repeats` turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.gpu_extension import HYPER, Operands, shapes_of
from sitfast.kernels import extension
from sitfast.presets import PRESETS


def torch_update(operands: Operands, *, fused: bool) -> Callable[[], None]:
    params = [nn.Parameter(p.clone()) for p in operands.params]
    for p, g in zip(params, operands.grads, strict=True):
        p.grad = g.clone()
    averages = [p.detach().clone() for p in params]
    adamw, decay = torch.optim.AdamW(params, fused=fused, foreach=not fused, **HYPER), operands.decays[0]

    @torch.no_grad()
    def run() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        adamw.step()
        if fused:
            weights = [p.detach() for p in params]
            torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        else:
            for average, p in zip(averages, params, strict=True):
                average.mul_(decay).add_(p, alpha=1 - decay)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="The update on a CPU.")
    parser.add_argument("--preset", choices=PRESETS, default="SiT-B/2")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if torch.cuda.is_available():
        raise SystemExit(
            "this one is for machines without a GPU; python -m benchmarks.gpu_extension is for those with one"
        )
    operands = Operands(shapes_of(args.preset), averages=1, copies=False, grads=torch.float32, moments=torch.float32)
    ways: dict[str, Callable[[], None]] = {
        "sitfast": operands.update,
        "AdamW(foreach), loop": torch_update(operands, fused=False),
        "AdamW(fused), _foreach_lerp_": torch_update(operands, fused=True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name] += [time.perf_counter() - start] * (turn > 0)
    print(f"{args.preset}, {operands.count:,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"operators: {extension.describe(torch.device('cpu'))}")
    ours = statistics.median(times["sitfast"])
    for name, took in times.items():
        median = statistics.median(took)
        print(
            f"{name:<30} {1e3 * median:7.1f} ms ({1e3 * min(took):.1f} to {1e3 * max(took):.1f}), {median / ours:5.2f} x"
        )


if __name__ == "__main__":
    main()
