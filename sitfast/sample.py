"""Sample from a trained model: `python -m sitfast.sample --ckpt runs/digits --classes 0-9 --cfg 3`, or, where it reads
captions, `--prompt "a red circle" --prompt "a blue square"`.

    starting noise (seed, number of the sample) → ODE or SDE from t = 0 to t = 1, guided → vae.decode → PNG grid, PNGs, .npz;
                                                                                                       of genes, .h5ad

Sample k of a seed is the same image whatever the batch size, up to rounding.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitfast import checkpoint, cli, config, images, parallel
from sitfast.config import Config, SampleConfig
from sitfast.data.genes import Panel, save_h5ad
from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant
from sitfast.model import SiT, build_model, load_state
from sitfast.sampling import sample, start_noise
from sitfast.text import Text, TextEncoder, build_text
from sitfast.vae import build_vae


def labels_for(num: int, classes: tuple[int, ...] | None, num_classes: int) -> Tensor:
    """`[num]` labels: the given classes in turn, or all classes, evenly spread when there are more than `num`."""
    if num < 1:
        raise SitfastError(f"--num {num} must be at least 1")
    if classes is None:
        step = max(1, num_classes // num)
        classes = tuple(range(0, num_classes, step))[:num]
    return torch.tensor([classes[i % len(classes)] for i in range(num)])


def prompts_for(num: int, prompts: Sequence[str]) -> list[str]:
    """`num` captions: the given ones in turn."""
    if num < 1:
        raise SitfastError(f"--num {num} must be at least 1")
    if not prompts:
        raise SitfastError('this model reads captions; give some, as --prompt "a red circle" or sample.prompts')
    return [prompts[i % len(prompts)] for i in range(num)]


@torch.no_grad()
def generate(
    model: SiT,
    vae: Any,
    interpolant: Interpolant,
    labels: Tensor | Sequence[str],
    *,
    settings: SampleConfig,
    null: int | Text | None,
    seed: int,
    text: TextEncoder | None = None,
) -> Tensor:
    """Images `[N, C, H, W]` in [-1, 1], or expression `[N, G]`, on the CPU, `settings.batch_size` at a time.

    `labels` are N class numbers, or captions, which `text` encodes.

    The model runs uncompiled here.
    """
    shape = model.shape
    if settings.size is not None:
        shape = (model.config["in_channels"], *latent_size(settings.size, model, vae.downsample))
    device = next(model.parameters()).device
    done = []
    with torch.compiler.set_stance("force_eager"):  # batches of other sizes must not make the blocks compile again
        for index in torch.arange(len(labels), device=device).split(settings.batch_size):
            if isinstance(labels, Tensor):
                y = labels.to(device)[index]
            else:
                assert text is not None
                y = text([labels[i] for i in index.tolist()])
            noise = start_noise(seed, index, shape)
            x, _ = sample(model, interpolant, noise, y, null=null, settings=settings, seed=seed, index=index)
            x = vae.decode(x).float()
            done.append((x.clamp(-1, 1) if x.ndim == 4 else x).cpu())
    return torch.cat(done)


def latent_size(size: tuple[int, int], model: SiT, downsample: int) -> tuple[int, int]:
    """Height and width of what the model makes for images of `size`."""
    unit = downsample * model.config["patch_size"]
    if size[0] % unit or size[1] % unit:
        near = [max(round(side / unit), 1) * unit for side in size]
        raise SitfastError(f"sample.size={list(size)} is not divisible by {unit}, the pixels of a patch; try {near}")
    return size[0] // downsample, size[1] // downsample


class Restored:
    """A trained model ready to sample: config, weights (EMA by default), VAE and interpolant of a checkpoint."""

    def __init__(self, path: str, *, ema: bool, device: str, overrides: list[str]) -> None:
        folder = checkpoint.find_checkpoint(path)
        self.folder, self.state = folder, checkpoint.read_state(folder)
        self.cfg: Config = config.load(folder / "config.yaml", overrides)
        self.device = parallel.resolve_device(device)
        self.model: SiT = build_model(**self.state["model"]).to(self.device)
        load_state(self.model, checkpoint.find_weights(folder, ema=ema), source=str(folder))
        panel = self.state.get("genes")
        self.panel = Panel.from_state(panel) if panel else None
        self.vae = self.panel or build_vae(self.cfg.vae, device=self.device, seed=self.cfg.seed)
        self.class_names: list[str] = self.state.get("class_names", [])
        self.interpolant = Interpolant.from_config(self.cfg.path, self.cfg.seed)
        self.text = build_text(self.cfg.text, self.device)
        null = self.text([""]) if self.text else self.cfg.model.num_classes
        self.null = null if self.cfg.model.class_dropout_prob > 0 else None

    def generate(self, labels: Tensor | Sequence[str], *, seed: int) -> Tensor:
        """Images `[N, C, H, W]` in [-1, 1], or expression `[N, G]`, for N labels or captions, by the `sample` settings."""
        dtype = torch.bfloat16 if self.device.type == "cuda" and self.cfg.train.precision in ("bf16", "fp16") else None
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return generate(
                self.model,
                self.vae,
                self.interpolant,
                labels,
                settings=self.cfg.sample,
                null=self.null,
                seed=seed,
                text=self.text,
            )


def parse_classes(text: str, num_classes: int, names: Sequence[str] = ()) -> tuple[int, ...]:
    """`0-9`, `3`, `1,5,7-8`, `tench,3` → class numbers; SitfastError beyond `num_classes`. What can be a number is one."""
    classes: list[int] = []
    for part in map(str.strip, text.split(",")):
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            if part in names:
                classes.append(names.index(part))
                continue
            near = difflib.get_close_matches(part, names, n=3, cutoff=0.4)
            known = f", or by name, such as {', '.join(near or names[:3])}" if names else ""
            raise SitfastError(f"--classes {text} cannot be read at {part!r}; write classes as 0-9 or 1,5,7-8{known}")
        classes += range(int(low), int(high or low) + 1)
    wrong = [c for c in classes if c >= num_classes]
    if wrong or not classes:
        raise SitfastError(f"--classes {text}: the model knows classes 0 to {num_classes - 1}")
    return tuple(classes)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command about a trained model takes."""
    parser.add_argument(
        "--ckpt", required=True, metavar="PATH", help="a run folder (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise")
    parser.add_argument(
        "overrides", nargs="*", metavar="sample.field=value", help="settings other than the checkpoint's"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sitfast.sample", description="Sample from a checkpoint.")
    add_checkpoint_arguments(parser)
    parser.add_argument("--classes", help="such as 0-9 or 1,5,7-8, or names; taken in turn")
    parser.add_argument(
        "--prompt", action="append", metavar="CAPTION", help="of a model that reads captions; repeatable"
    )
    parser.add_argument("--num", type=int, help="samples in all (default: four of each class or prompt, or sample.num)")
    parser.add_argument("--cfg", type=float, help="guidance scale, short for sample.cfg=…; 1 is none")
    parser.add_argument("--method", help="short for sample.method=…")
    parser.add_argument("--steps", type=int, help="short for sample.steps=…")
    parser.add_argument(
        "--format", choices=("grid", "png", "npz", "h5ad"), help="one PNG, many, or ADM's .npz; of genes, .h5ad"
    )
    parser.add_argument("--out", type=Path, help="file, or folder of PNGs; default: beside the checkpoint")
    args = parser.parse_args(argv)
    short = [f"sample.{key}={value}" for key in ("cfg", "method", "steps") if (value := getattr(args, key)) is not None]
    run = Restored(args.ckpt, ema=args.weights == "ema", device=args.device, overrides=[*short, *args.overrides])

    kind = args.format or ("h5ad" if run.panel else "grid")
    if (kind == "h5ad") != (run.panel is not None):
        holds, use = ("genes", "h5ad") if run.panel else ("images", "grid, png or npz")
        raise SitfastError(f"--format {kind}: {run.folder} was trained on {holds}; use {use}")
    settings, num_classes = run.cfg.sample, run.cfg.model.num_classes
    classes, num, columns = settings.classes, settings.num, None
    if args.prompt and not run.text:
        raise SitfastError(f"--prompt: {run.folder} was trained on classes; use --classes")
    if args.classes and run.text:
        raise SitfastError(f"--classes: {run.folder} was trained on captions; use --prompt")
    if args.prompt:
        num, columns = 4 * len(args.prompt), len(args.prompt) if len(args.prompt) <= 20 else None
    if args.classes:
        classes = parse_classes(args.classes, num_classes, run.class_names)
        num = 4 * len(classes)
        columns = len(classes) if len(classes) <= 20 else None
    if args.num is not None:
        num = args.num
    if run.text:
        prompts = args.prompt or settings.prompts or ()
        for cut in run.text.tokenizer(prompts).cut:
            print(f"warning: a prompt is cut after {run.cfg.text.length} tokens: {cut!r}", file=sys.stderr)
        x = run.generate(prompts_for(num, prompts), seed=args.seed)
        labels = torch.arange(num) % len(prompts)  # which prompt, for .npz
    else:
        labels = labels_for(num, classes, num_classes)
        x = run.generate(labels, seed=args.seed)

    step = run.state["step"]
    if run.panel:
        about = {"checkpoint": str(run.folder), "step": step, "cfg": settings.cfg, "seed": args.seed}
        out = args.out or run.folder.parent / f"samples-{step}.h5ad"
        save_h5ad(x, labels, out, panel=run.panel, class_names=run.class_names, about=about)
    elif kind == "png":
        out = images.save_pngs(x, args.out or run.folder.parent / f"samples-{step}")
    elif kind == "npz":
        out = images.save_npz(x, labels, args.out or run.folder.parent / f"samples-{step}.npz")
    else:
        out = images.save_grid(x, args.out or run.folder.parent / f"samples-{step}.png", columns=columns)
    print(f"{num} samples of {run.folder} ({settings.method}, {settings.steps} steps, cfg {settings.cfg:g}) → {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
