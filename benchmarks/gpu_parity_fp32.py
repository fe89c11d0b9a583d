"""Does a default run learn what fp32 learns? 2,000 steps of SiT-B/2 on crops of photographs: python -m benchmarks.gpu_parity_fp32

    fp32        plain PyTorch, fp32 throughout
    bf16        plain PyTorch in a bf16 copy of fp32 weights; twice, eager and compiled, which round in other places
    sitfast     what `sitfast.train` runs on a GPU: kernels, compiled blocks, CUDA graph, bf16 copy; and with eager blocks

All are runs of `sitfast.train` with one seed: the same first weights, rows, noise and t. Passes if the distance of sitfast's
loss curve from that of fp32, |difference| in the mean over the steps (of its two runs the mean), is no larger than the larger
one of bf16's. The means over parts of the run, with their signs, tell a drift from noise.

The photographs are the two that come with scikit-learn, cut into crops of 32 px from all over them, a class for each of
sixteen regions. The runs share the GPU. Without one, a few steps of a tiny model, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import GPU

STEPS, BATCH, PARTS, CROPS = (2000, 8, 8, 256) if GPU else (8, 4, 2, 4)  # crops of each class
SIDE, REGIONS = 32, 8  # regions of each photograph: two rows of four
TINY = (
    []
    if GPU
    else ["model.preset=null", "model.patch_size=8", "model.hidden_size=32", "model.depth=2", "model.num_heads=2"]
)
REFERENCE = ["train.kernels=reference"]
RUNS = {
    "fp32": ["train.precision=fp32", "train.compile=false", *REFERENCE],
    "bf16": ["train.precision=bf16", "train.compile=false", *REFERENCE],
    "bf16 compiled": ["train.precision=bf16", f"train.compile={str(GPU).lower()}", *REFERENCE],
    "sitfast": ["train.precision=bf16"],
    "sitfast eager": ["train.precision=bf16", "train.compile=false"],
}


def make_images(folder: Path) -> None:
    """Crops of scikit-learn's photographs, from 32 to 128 px wide, as PNG in class folders."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    for photo, pixels in enumerate(load_sample_images().images):
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 4
        for region in range(REGIONS):
            top, left = region // 4 * height, region % 4 * width
            place = folder / f"{photo}-{region}"
            place.mkdir(parents=True)
            for number in range(CROPS):
                size = int(generator.integers(SIDE, min(4 * SIDE, height, width)))
                y, x = (int(generator.integers(0, room - size + 1)) for room in (height, width))
                crop = Image.fromarray(pixels[top + y : top + y + size, left + x : left + x + size])
                crop.resize((SIDE, SIDE), Image.Resampling.BOX).save(place / f"{number}.png")


def command(folder: Path, name: str) -> list[str]:
    run = folder / name.replace(" ", "-")
    return [
        sys.executable, "-m", "sitfast.train", "model.preset=SiT-B/2", *TINY, "vae.id=null", "data.source=folder",
        f"data.path={folder / 'images'}", f"data.image_size={SIDE}", f"data.batch_size={BATCH}", "data.num_workers=2",
        "model.num_classes=16", f"train.steps={STEPS}", "log.every=1", "log.tensorboard=false", f"checkpoint.every={STEPS}",
        f"output_dir={run}", *RUNS[name],
    ]  # fmt: skip


def read_losses(run: Path) -> Tensor:
    """The loss of every step, fp64."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return torch.tensor([r["loss"] for r in records if r["kind"] == "train"], dtype=torch.float64)


def verdict(curves: dict[str, Tensor]) -> tuple[bool, list[str]]:
    """Whether sitfast passes; a line for each run: its distance from fp32, and its signed one in parts of the run."""
    gaps = {name: curve - curves["fp32"] for name, curve in curves.items() if name != "fp32"}
    far = {name: gap.abs().mean().item() for name, gap in gaps.items()}
    lines = [f"{'run':<14} mean |loss - fp32|   signed, by parts of the run"]
    for name, gap in gaps.items():
        parts = " ".join(f"{part.mean().item():+.1e}" for part in gap.chunk(PARTS))
        lines.append(f"{name:<14} {far[name]:18.2e}   {parts}")
    ours = [value for name, value in far.items() if name.startswith("sitfast")]
    allowed = max(value for name, value in far.items() if name.startswith("bf16"))
    return sum(ours) / len(ours) <= allowed, lines  # false for a NaN


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves of default runs against fp32.")
    parser.add_argument("--output", type=Path, help="where to write the curves, as JSON")
    parser.add_argument("--seconds", type=float, default=600, help="end the runs after so long")
    args, start = parser.parse_args(), time.monotonic()
    device = torch.cuda.get_device_name() if GPU else "CPU, tiny model: the figures mean nothing"
    print(f"{device}, torch {torch.__version__}, SiT-B/2 at {SIDE} px, B = {BATCH}, {STEPS} steps", flush=True)
    curves: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_images(folder / "images")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
        started = {name: subprocess.Popen(command(folder, name), **quiet) for name in RUNS}
        for name, process in started.items():
            try:
                said = process.communicate(timeout=max(1.0, args.seconds - (time.monotonic() - start)))[1]
            except subprocess.TimeoutExpired:
                process.kill()
                said = process.communicate()[1] + f"\nended after {args.seconds:.0f} s"
            if process.returncode:
                for other in started.values():
                    other.kill()
                sys.exit(f"{name} failed:\n{said[-2000:]}")
            curves[name] = read_losses(folder / name.replace(" ", "-"))
            first, last = curves[name][0].item(), curves[name][-len(curves[name]) // PARTS :].mean().item()
            print(
                f"{name}: loss {first:.4f}, at the end {last:.4f}; {time.monotonic() - start:.0f} s in all", flush=True
            )
            if args.output:
                args.output.write_text(json.dumps({key: curve.tolist() for key, curve in curves.items()}))
    passed, lines = verdict(curves)
    print("\n".join(lines))
    if not GPU:
        return
    print("PASSED: as near to fp32 as plain bf16 is" if passed else "FAILED: further from fp32 than plain bf16 is")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
