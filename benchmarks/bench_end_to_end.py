"""Training as one starts it, data and all: python -m benchmarks.bench_end_to_end [--runs latents jpeg] [--model XL/2]

    step      the step alone, from latents that cost nothing: the row `sitfast` of `bench_step`
    latents   python -m sitfast.train from shards of cached latents (random moments, written here)
    jpeg      the same from JPEG files, decoded by worker processes, through an SD-shaped VAE with random weights
    dali      the same, decoded by DALI

Images/s and data_wait, the share of the time spent waiting for data, are what the run itself writes into metrics.jsonl, one
line for `--every` steps; the median of `--windows` lines counts, after those that compile. Then the run is killed, before it
would save a checkpoint. Each result is printed, and written to `--output`, as soon as it is there.

Also `pytest benchmarks/bench_end_to_end.py --benchmark-only [-k latents] [--record FILE.json]`. Without a GPU the model is
tiny and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_step, gpu_data, record
from benchmarks.harness import CLOCK, GPU
from sitfast.config import VAEConfig
from sitfast.data import latents
from sitfast.vae import build_vae

TRAIN = [sys.executable, "-m", "sitfast.train"]
RUNS = ("step", "latents", "jpeg", "dali")
WINDOWS, SKIPPED, EVERY = (6, 2, 20) if GPU else (2, 1, 2)
SHARDS, ROWS, IMAGES = (4, 8192, 4096) if GPU else (2, 32, 32)
PIXELS = gpu_data.SIZE
WORKERS = min(14, os.cpu_count() or 1)


def make_vae(folder: Path) -> str:
    """The folder of a VAE; returns its fingerprint."""
    if not folder.exists():
        gpu_data.sd_vae().save_pretrained(folder)
    vae = build_vae(VAEConfig(id=str(folder)), device="cpu", seed=0)
    return vae.fingerprint  # pyright: ignore[reportAttributeAccessIssue]


def make_latents(folder: Path, vae: Path) -> None:
    """Shards as `sitfast.encode` writes them, of random posteriors."""
    size = PIXELS // 8
    moments = torch.randn(ROWS, 2, 2, bench_step.CHANNELS, size, size)
    moments[:, :, 1].abs_()
    moments = moments.half()
    job = {
        "vae": {"id": str(vae), "sha256": make_vae(vae)},
        "image_size": PIXELS,
        "views": 2,
        "num_rows": SHARDS * ROWS,
    }
    for number in range(SHARDS):
        rows = np.arange(number * ROWS, (number + 1) * ROWS)
        sums = [[0.0] * bench_step.CHANNELS, [1.0] * bench_step.CHANNELS]
        latents.write_shard(folder, number, job=job, moments=moments, labels=rows % 1000, rows=rows, sums=sums)
    shards = [latents.read_shard(path) for path in sorted(folder.glob("shard-*"))]
    about = {"channels": 3, "class_names": [str(i) for i in range(1000)]}
    latents.write_manifest(folder, shards, about=about)


def settings(kind: str, root: Path, model: str, batch: int, every: int) -> list[str]:
    """Overrides of the configuration; makes the data that they name, unless it is there."""
    vae, shards, images = root / "vae", root / "latents", root / "images"
    if kind == "latents":
        if not shards.exists():
            make_latents(shards, vae)
        data = ["data.source=latents", f"data.path={shards}", f"data.num_workers={min(4, WORKERS)}"]
    else:
        make_vae(vae)
        if not images.exists():
            sides = (500, 375) if GPU else (60, 50)
            gpu_data.photographs(images, kilobytes=110 if GPU else 5, width=sides[0], height=sides[1], num=IMAGES)
        workers = min(4, WORKERS) if kind == "dali" else WORKERS
        data = ["data.source=folder", f"data.path={images}", f"data.num_workers={workers}"]
        data += [f"data.decoder={'dali' if kind == 'dali' else 'pil'}"]
    common = [f"output_dir={root / kind}-run", f"vae.id={vae}", f"data.image_size={PIXELS}", f"data.batch_size={batch}"]
    common += [f"model.preset=SiT-{model}", "optim.clip_norm=1.0", "train.steps=1000000", f"log.every={every}"]
    common += ["log.tensorboard=false", "checkpoint.every=1000000", f"vae.precision={'bf16' if GPU else 'fp32'}"]
    tiny = [f"model.{name}={value}" for name, value in bench_step.TINY.items()]
    return [*common, *data, *(tiny if GPU else [*tiny, "train.precision=fp32"])]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl of steps of training."""
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [entry for entry in records if entry["kind"] == "train"]


def watch(overrides: list[str], metrics: Path, *, count: int, seconds: float) -> list[dict[str, Any]]:
    """Run sitfast.train until it has written `count` lines; RuntimeError with its last words where it does not."""
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen([*TRAIN, *overrides], stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            end = time.monotonic() + seconds
            while len(lines := lines_of(metrics)) < count and run.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # and its workers
            run.wait()
        if len(lines) >= count:
            return lines
        said.seek(0)
        last = " ".join(said.read()[-600:].split())
        how = "no end in sight" if run.returncode == -signal.SIGKILL else f"exit status {run.returncode}"
    raise RuntimeError(f"{len(lines)} of {count} lines after {seconds:.0f} s, {how}: {last}")


def end_to_end(
    kind: str, root: Path, *, model: str, batch: int, windows: int, every: int, seconds: float, overrides: list[str]
) -> dict[str, Any]:
    """The columns of the results page."""
    about = {"kind": "end to end", "run": kind, "model": f"SiT-{model}", "pixels": PIXELS, "B": batch}
    if kind == "step":
        case = bench_step.Case(model, PIXELS if GPU else 256, bench_step.OURS, batch, overrides=tuple(overrides))
        steps = bench_step.Steps([case], case_s=seconds, deadline_s=time.monotonic() + seconds)
        try:
            result = steps.result(case)
        finally:
            steps.close()
        seconds_a_step = [ms / 1e3 for ms in result["times_ms"]]
        about |= {"images_per_s": result["images_per_s"], "mfu": result["mfu"], "memory_gib": result["peak_gib"]}
        return about | {"data_wait": None, "seconds_a_step": seconds_a_step, "B": result["B"]}
    chosen = [*settings(kind, root, model, batch, every), *overrides]
    lines = watch(chosen, root / f"{kind}-run" / "metrics.jsonl", count=SKIPPED + windows, seconds=seconds)[SKIPPED:]
    rates = [line["images_per_s"] for line in lines]
    return about | {
        "images_per_s": statistics.median(rates),
        "data_wait": statistics.median(line["data_wait"] for line in lines),
        "mfu": statistics.median(line["mfu"] for line in lines) if lines[0]["mfu"] is not None else None,
        "memory_gib": lines[-1]["memory_gib"],
        "seconds_a_step": [batch / rate for rate in rates],
    }


def line(result: dict[str, Any], alone: dict[str, Any] | None) -> str:
    rates = sorted(result["B"] / seconds for seconds in result["seconds_a_step"])
    text = f"{result['model']} {result['pixels']} px  B {result['B']:4d}  {result['run']:<8}"
    text += f"{result['images_per_s']:8.1f} images/s ({rates[0]:.1f} to {rates[-1]:.1f})"
    if result["data_wait"] is not None:
        text += f"  waiting for data {result['data_wait']:.1%}"
    if alone and result is not alone:
        text += f"  {result['images_per_s'] / alone['images_per_s']:.1%} of the step alone"
    return text + (f"  {result['memory_gib']:.1f} GiB" if result["memory_gib"] is not None else "")


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS[:3]))
    parser.add_argument("--model", choices=bench_step.MODELS, default=bench_step.MODELS[0])
    parser.add_argument("--batch", type=int, help="default: that of bench_step")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--every", type=int, default=EVERY, help="steps of a window")
    parser.add_argument("--seconds", type=float, default=150, help="for one run")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="results as they come")
    parser.add_argument("--commit", default="", help="the commit that runs, where there is no repository to ask")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_args()
    command = " ".join(["python -m benchmarks.bench_end_to_end", *sys.argv[1:]])
    kept = record.Record(args.output, record.origin(command, dtype="bfloat16", commit=args.commit))
    print(f"{record.device_name()}, torch {torch.__version__}" + ("" if GPU else ": these figures mean nothing"))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.runs:
            try:
                results[kind] = result = end_to_end(
                    kind,
                    Path(folder),
                    model=args.model,
                    batch=args.batch or bench_step.batch_of(args.model, 256, {}),
                    windows=args.windows,
                    every=args.every,
                    seconds=args.seconds,
                    overrides=args.overrides,
                )
                kept.add({"extra_info": result})
                said = line(result, results.get("step"))
            except Exception as error:
                said = f"{kind}: {type(error).__name__}: {' '.join(str(error).split())[:700]}"
            print(f"[{time.monotonic() - start:4.0f} s] {said}", flush=True)
    print(*(line(result, results.get("step")) for result in results.values()), sep="\n")


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("kind", RUNS)
def test_end_to_end(benchmark, root: Path, recorded: record.Record, say: Callable[[str], None], kind: str) -> None:
    model = bench_step.MODELS[0]
    batch = bench_step.batch_of(model, 256, {})
    result = end_to_end(kind, root, model=model, batch=batch, windows=WINDOWS, every=EVERY, seconds=150, overrides=[])
    say(line(result, None))
    recorded.add({"extra_info": result})
    benchmark.extra_info.update(result)
    CLOCK.pending_s = list(result["seconds_a_step"])
    benchmark.pedantic(CLOCK.tick, rounds=len(result["seconds_a_step"]), iterations=1)


if __name__ == "__main__":
    main()
