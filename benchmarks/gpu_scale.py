"""How training scales over the GPUs of a host: python -m benchmarks.gpu_scale [--batch 128] [--only fsdp,save]

Trains SiT-XL/2 (bf16, compiled blocks, clipping, two averages) on random latents, as `sitfast.train` would, first on one
GPU and then on all of them, by each strategy, and prints

    images/s, and its share of the number of GPUs times one GPU's
    communication a step, the share of it that runs behind computation, and what is left exposed, from a trace of rank 0
    a save with optimizer and two averages: how long training stood still, how long writing took; how long resuming took

Without a GPU the model is tiny, the ranks are two processes, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sitfast.data
from sitfast import config, parallel
from sitfast.trainer import Trainer

GPU = torch.cuda.is_available()
STRATEGIES = {
    "ddp": ["parallel.strategy=ddp"],
    "fsdp": ["parallel.strategy=fsdp"],
    "fsdp-kept": ["parallel.strategy=fsdp", "parallel.reshard_after_forward=false"],
}
WARM_UP, STEPS, TRACED = (8, 20, 3) if GPU else (1, 2, 1)
SIZE = 32 if GPU else 8
MODEL = ["model.preset=SiT-XL/2"]
if not GPU:
    MODEL += ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "train.precision=fp32"]


class Latents:
    """Random rows that cost nothing to read."""

    num_rows, num_classes, channels, image_size, class_names = 1 << 20, 1000, 4, SIZE, ()

    def __init__(self) -> None:
        self._rows = torch.randn(1024, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def load(self, row: int) -> tuple[Tensor, int]:
        return self._rows[row % 1024], row % 1000


def settings(batch: int, folder: Path, strategy: str, more: list[str]) -> list[str]:
    fixed = ["data.source=folder", "data.path=random", f"data.image_size={SIZE}", "data.flip=false", "vae.id=null"]
    fixed += ["data.num_workers=0", "ema.decays=[0.9999, 0.999]", "optim.clip_norm=1.0", "train.steps=100000"]
    fixed += ["log.tensorboard=false", "log.every=100000", f"data.batch_size={batch}", f"output_dir={folder}"]
    return [*fixed, *MODEL, *STRATEGIES[strategy], *more]


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def intervals(events: list[Any]) -> list[tuple[float, float]]:
    """The union of the events' times in µs, sorted and disjoint."""
    merged: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda e: e["ts"]):
        start, end = event["ts"], event["ts"] + event["dur"]
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """How long two lists of disjoint intervals run at once."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return total


def communication(trace: Path, steps: int) -> dict[str, float]:
    """Milliseconds a step of communication on the GPU, and of it what no computation covers."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "kernel"]
    travels = intervals([e for e in events if "nccl" in e["name"].lower()])
    computes = intervals([e for e in events if "nccl" not in e["name"].lower()])
    all_of_it = sum(end - start for start, end in travels)
    return {
        "communication_ms": all_of_it / steps / 1e3,
        "exposed_ms": (all_of_it - overlap(travels, computes)) / steps / 1e3,
        "computation_ms": sum(end - start for start, end in computes) / steps / 1e3,
    }


def measure_speed(trainer: Trainer, trace: Path) -> dict[str, float]:
    for _ in range(WARM_UP):
        trainer.train_step()
    synchronize()
    trainer.world.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        trainer.train_step()
        trainer.world.most(0)  # as the loop does
    synchronize()
    trainer.world.barrier()
    result = {"images_per_s": STEPS * trainer.cfg.data.batch_size / (time.perf_counter() - start)}
    if GPU:
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with torch.profiler.profile() as profiler:
        for _ in range(TRACED):
            trainer.train_step()
        synchronize()
    if trainer.world.is_main:
        profiler.export_chrome_trace(str(trace))
        result |= communication(trace, TRACED)
    return result


def measure_save(trainer: Trainer, build: Any) -> dict[str, float]:
    """Save twice (the second is what a run sees), training between, then resume."""
    result: dict[str, float] = {}
    for _ in range(2):
        synchronize()
        trainer.world.barrier()
        start = time.perf_counter()
        trainer._save()
        result["stalled_s"] = time.perf_counter() - start
        trainer.train_step()
        trainer.saver.wait()
        result["written_s"] = time.perf_counter() - start
    trainer.close()
    synchronize()
    start = time.perf_counter()
    again = build()
    synchronize()
    result["resumed_s"] = time.perf_counter() - start
    assert again.step == trainer.step - 1
    again.close()
    return result


def worker(args: argparse.Namespace) -> None:
    sitfast.data.build_source = lambda _: Latents()
    size = int(os.environ["WORLD_SIZE"])
    chosen = [strategy for strategy in STRATEGIES if strategy in args.only]
    folders = [args.folder / f"{size}-{strategy}" for strategy in chosen]
    runs = [settings(args.batch * size, *where, args.overrides) for where in zip(folders, chosen, strict=True)]
    results: dict[str, Any] = {}
    with parallel.start(config.load(None, [*runs[0], "parallel.strategy=fsdp"])) as world:
        for strategy, folder, overrides in zip(chosen, folders, runs, strict=True):
            results[strategy] = measure(strategy, folder, config.load(None, overrides), world, save="save" in args.only)
            if world.is_main:
                args.out.write_text(json.dumps(results))


def measure(strategy: str, folder: Path, cfg: config.Config, world: parallel.World, *, save: bool) -> dict[str, float]:
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(cfg, world)
    trainer._begin_window()
    result = measure_speed(trainer, folder.with_suffix(".trace.json"))
    if save and strategy in ("ddp", "fsdp"):
        return result | measure_save(trainer, lambda: Trainer(cfg, world))
    trainer.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128 if GPU else 4, help="images a GPU")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*STRATEGIES, "save"])
    parser.add_argument("--folder", type=Path, help="for checkpoints and traces; default: a temporary one, removed")
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], help="default: 1 and all GPUs")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_args()
    if args.out:
        return worker(args)
    folder = args.folder or Path(tempfile.mkdtemp())
    most = torch.cuda.device_count() if GPU else 2
    results: dict[int, dict[str, dict[str, float]]] = {}
    for ranks in args.ranks or sorted({1, most}):
        out = folder / f"ranks-{ranks}.json"
        options = [
            "--batch",
            str(args.batch),
            "--only",
            ",".join(args.only),
            "--folder",
            str(folder),
            "--out",
            str(out),
        ]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run([*launch, "-m", "benchmarks.gpu_scale", *options, *args.overrides], check=True)
        for run in folder.glob(f"{ranks}-*/checkpoint-*"):
            shutil.rmtree(run)
        results[ranks] = json.loads(out.read_text())
    print_table(results, args.batch)
    if args.folder is None:
        shutil.rmtree(folder)


def print_table(results: dict[int, dict[str, dict[str, float]]], batch: int) -> None:
    device = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"SiT-XL/2, {batch} images a GPU, {device}, torch {torch.__version__}")
    first = results[min(results)]
    base = first["ddp" if "ddp" in first else min(first)]["images_per_s"] / min(results)
    for ranks, strategies in results.items():
        for strategy, r in strategies.items():
            share = r["images_per_s"] / (ranks * base)
            line = f"{ranks} × {strategy:<11} {r['images_per_s']:8.1f} images/s  {share:6.1%} of linear"
            line += f"  {r['memory_gib']:5.1f} GiB" if "memory_gib" in r else ""
            line += f"  communication {r['communication_ms']:6.1f} ms a step, exposed {r['exposed_ms']:5.1f}"
            if "stalled_s" in r:
                line += f"  save: stalled {r['stalled_s']:.2f} s, written in {r['written_s']:.1f} s"
                line += f"  resumed in {r['resumed_s']:.1f} s"
            print(line)


if __name__ == "__main__":
    main()
