"""A SiT that grows from 8 to 16 pixels, against one that learns at 16 from the start: python -m examples.growing

    scikit-learn's digits, enlarged to 16 px ─▶ folder of PNGs ─▶ two runs, the same number of images ─▶ runs/growing/growing.png

A few minutes on two cores. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sitfast import cli, config, parallel, train
from sitfast.images import replacing
from sitfast.model import build_model, forward_macs

SIZE = 16
SETTINGS = [
    "data.source=folder", "data.num_workers=0", "data.flip=false", "data.val_samples=256", "vae.id=null",
    "model.preset=null", "model.patch_size=2", "model.hidden_size=64", "model.depth=4", "model.num_heads=4",
    "model.num_classes=10", "model.learn_sigma=false", "optim.betas=[0.9, 0.99]", "optim.warmup_steps=10",
    "optim.clip_norm=1.0", "ema.decays=[0.99]", "ema.warmup=true", "train.precision=fp32", "train.device=cpu",
    "checkpoint.every=100000", "log.every=5", "log.val_every=25", "log.tensorboard=false",
]  # fmt: skip


def write_digits(folder: Path) -> None:
    """One PNG a digit, `SIZE` pixels, enlarged from 8 × 8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):  # pyright: ignore
        path = folder / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(np.round(image * 255 / 16).astype(np.uint8))
            with replacing(path) as temporary:
                small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(temporary, format="PNG")


def run(out: Path, name: str, stages: list[dict[str, float]]) -> list[dict[str, float]]:
    """Train, or continue, or find done; the records of metrics.jsonl."""
    overrides = [*SETTINGS, f"data.path={out / 'images'}", f"output_dir={out / name}", f"stages={json.dumps(stages)}"]
    cfg = config.load(None, overrides)
    with parallel.start(cfg) as world:
        if train.train(cfg, world) is not None:
            raise KeyboardInterrupt  # it said how to continue
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def compute(folder: Path) -> int:
    """FLOPs of all training steps of a run."""
    total, cfg = 0, config.load(folder / "config.yaml")
    for stage in config.stage_configs(cfg):
        sizes = stage.model.model_dump(exclude={"init_from"}, exclude_none=True)
        with torch.device("meta"):
            model = build_model(input_size=stage.data.image_size, in_channels=3, **sizes)
        total += 6 * forward_macs(model) * stage.data.batch_size * stage.train.steps
    return total


def draw(runs: dict[str, list[dict[str, float]]], boundary: int, png: Path) -> None:
    """Training loss (thin) and validation loss at fixed noise (dots) of each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, records) in zip(("#1f4e8c", "#d1495b"), runs.items(), strict=True):
        training = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
        held_out = [(r["step"], r["val_loss"]) for r in records if r["kind"] == "val"]
        axes.plot(*zip(*training, strict=True), color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(*zip(*held_out, strict=True), "o", color=colour, markersize=4, label=name)
    axes.axvline(boundary, color="#888888", linestyle=":")
    axes.annotate("8 px | 16 px", (boundary, axes.get_ylim()[1]), ha="center", va="bottom", color="#444444")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(png) as temporary:
        figure.savefig(temporary, format="png")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.growing", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/growing"))
    parser.add_argument("--steps", type=int, default=200, help="of each of the two stages (200)")
    args = parser.parse_args(argv)
    write_digits(args.out / "images")
    common = {"steps": args.steps, "batch_size": 64, "lr": 1e-3}
    small, large = common | {"image_size": 8}, common | {"image_size": 16}
    runs = {
        "8 px, then 16 px": run(args.out, "grown", [small, large | {"lr": 5e-4}]),
        "16 px from the start": run(args.out, "straight", [large, large | {"lr": 5e-4}]),
    }
    draw(runs, args.steps, args.out / "growing.png")
    for folder, (name, records) in zip(("grown", "straight"), runs.items(), strict=True):
        found = {r["step"]: r["val_loss"] for r in records if r["kind"] == "val"}
        told = ", ".join(f"{found[step]:.4f} at {step}" for step in sorted(found) if step >= args.steps - 25)
        print(f"{name}: {compute(args.out / folder) / 1e12:.2f} TFLOP; validation loss {told}")
    print(args.out / "growing.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
