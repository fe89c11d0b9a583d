"""Objectives side by side: `python -m sitfast.compare --config configs/digits.yaml --runs velocity-linear,noise-vp`.

Each run is a training of its own, in output_dir/NAME, from the same first weights, on the same rows in the same order,
with the same draws of noise; NAME is prediction-path or prediction-path-weight, and name:section.field=value,… is any
other change. A run that is finished is not done again, one that was cut off goes on. Then all of them are measured, with
their averaged weights, and output_dir holds compare.png, compare.md and compare.json.

The losses themselves do not compare: each is an error of another quantity on another path. But a path only says when which
ratio of data to noise is seen. With the same row, the same noise and the same ratio r = α/σ the inputs x_t are equal up to
a factor, which the model knows, and from any prediction `Interpolant.data` makes an estimate D of the row. So all answer
the same questions, and are held to one measure, which is the loss of a rectified flow there:

    error(t) = mean (v − v̂)² = mean (data − D)² / (1 − t)²,    on the linear path, where r = t / (1 − t)

averaged over held-out rows in equal bins of that t, from 0.01 to 0.99.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sitfast import checkpoint, cli, config, data, images, parallel, philox
from sitfast.config import Config
from sitfast.data.genes import Genes
from sitfast.data.latents import Latents
from sitfast.data.loader import fixed_batches
from sitfast.data.sampler import held_out
from sitfast.errors import SitfastError
from sitfast.evaluate import FIRST_INDEX, condition, read_by_classifier, validation_loss
from sitfast.interpolant import Interpolant
from sitfast.parallel import World
from sitfast.philox import Stream
from sitfast.sample import Restored, labels_for, prompts_for
from sitfast.text import TextEncoder
from sitfast.trainer import Trainer

_FIRST, _LAST = 0.01, 0.99  # of t: vp's own beginning, α/σ = 0.0066, lies before the first
_NAME = re.compile(r"(velocity|noise|score)-(linear|gvp|vp)(?:-(velocity|likelihood))?")
_COLORS = ("#1f4e8c", "#d1495b", "#3a8f5c", "#e2a03f", "#7a5195", "#4fa3b8", "#8c6d46", "#666666")
_SHOWN, _SAMPLES = 20, "samples.npy"  # of a run, in the picture


# -- the runs ----------------------------------------------------------------------------------------------------------


def parse_runs(text: str) -> dict[str, list[str]]:
    """Name → overrides of `velocity-linear,noise-vp,late:path.time_sampling=shifted,path.time_shift=3`."""
    runs: dict[str, list[str]] = {}
    for part in re.split(r",(?![^\[]*\])", text):  # the commas of a list do not part
        part = part.strip()
        name, colon, change = part.partition(":")
        if "=" in name:
            if not runs:
                raise SitfastError(f"--runs {text}: {part!r} belongs to no run; write name:section.field=value")
            runs[next(reversed(runs))].append(part)
            continue
        if name in runs:
            raise SitfastError(f"--runs {text}: two runs are called {name!r}; give each a name of its own")
        if colon:
            if not re.fullmatch(r"\w[\w.-]*", name) or "=" not in change:
                raise SitfastError(f"--runs {text}: {part!r} cannot be read; write name:section.field=value")
            runs[name] = [change]
        elif match := _NAME.fullmatch(name):
            prediction, path, weight = match.groups()
            runs[name] = [f"path.prediction={prediction}", f"path.type={path}", f"path.loss_weight={weight or 'none'}"]
        else:
            raise SitfastError(
                f"--runs {text}: {name!r} is no run; write (velocity|noise|score)-(linear|gvp|vp), with -velocity or"
                " -likelihood for a loss weight, or name:section.field=value"
            )
    return runs


def settings_for(base: Config, file: str | None, overrides: list[str]) -> Config:
    """The config of one run: logged and saved often enough, and measured afterwards rather than while training."""
    steps = base.train.steps
    every = min(base.checkpoint.every, max(1, steps // 4))
    also = ["sample.every=0", "log.val_every=0", f"log.every={max(1, steps // 50)}", f"checkpoint.every={every}"]
    return config.load(file, [*overrides, f"train.steps={steps}", *also, "checkpoint.keep=2"])


def train(cfg: Config) -> bool:
    """Bring a run to its end, unless it is there; False if a signal ended it before."""
    folder = Path(cfg.output_dir)
    if folder.exists():
        last = checkpoint.latest(folder, warn=lambda text: print(f"warning: {text}", flush=True))
        done = last is not None and checkpoint.read_state(last)["step"] >= cfg.train.steps
        if last is not None and done and not config.differences(config.load(last / "config.yaml"), cfg):
            return True
    with parallel.start(cfg) as world:
        if world.size > 1:
            raise SitfastError(f"world_size={world.size}: runs are compared in one process; start it without torchrun")
        return Trainer(cfg, world).run() is None


# -- the measures ------------------------------------------------------------------------------------------------------


def time_at(interpolant: Interpolant, ratio: Tensor) -> Tensor:
    """The times [B] at which α/σ, which rises on every path, is `ratio` [B]; fp64, by bisection."""
    low, high = torch.zeros_like(ratio, dtype=torch.float64), torch.ones_like(ratio, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        c = interpolant.coefficients(middle)
        below = c.alpha < ratio * c.sigma
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@torch.no_grad()
def velocity_error(
    model: nn.Module,
    batches: Iterable[data.Batch],
    *,
    vae: Any,
    interpolant: Interpolant,
    text: TextEncoder | None = None,
    bins: int,
) -> Tensor:
    """The measure of the module docstring in `bins` equal bins of t, fp64 [bins] on the CPU."""
    total, count = torch.zeros(bins, dtype=torch.float64), 0
    for batch in batches:
        index = batch.index + FIRST_INDEX
        x, y = vae.encode(batch.x, index), condition(batch, text)
        offset = philox.uniform(interpolant.seed, index, Stream.TIME).double()
        for b in range(bins):
            t = _FIRST + (_LAST - _FIRST) * (b + offset) / bins
            xt, own_t, _ = interpolant.sample(x, index, t=time_at(interpolant, t / (1 - t)).float())
            out = model(xt, own_t, y)[:, : x.shape[1]]
            error = (interpolant.data(out, xt, own_t) - x).double().square().flatten(1).mean(dim=1)
            total[b] += (error / (1 - t) ** 2).sum().cpu()
        count += len(index)
    return total / count


def measure(cfg: Config, num: int) -> dict[str, Any]:
    """What is told of a finished run, kept in its folder; beside it samples, for the picture."""
    folder = Path(cfg.output_dir)
    settings = cfg.sample.model_dump(mode="json")
    overrides = [f"sample.{field}={json.dumps(value)}" for field, value in settings.items()]
    run = Restored(str(folder), ema=True, device=cfg.train.device, overrides=overrides)
    asked = {"step": run.state["step"], "num": num, "bins": cfg.log.val_bins, "sample": settings}
    kept = folder / "compare.json"
    if kept.exists():
        result = json.loads(kept.read_text(encoding="utf-8"))
        if result["asked"] == asked:
            return result
    source = data.build_source(cfg.data)
    if isinstance(source, Latents):
        source.check_vae(run.vae)
    rows = held_out(source.num_rows, cfg.data.val_samples)[1]
    held = list(fixed_batches(source, rows, batch_size=cfg.sample.batch_size, device=run.device))
    how: dict[str, Any] = {"vae": run.vae, "interpolant": run.interpolant, "text": run.text, "bins": cfg.log.val_bins}
    own = validation_loss(run.model, held, **how, world=World(0, 1, run.device))
    error = velocity_error(run.model, held, **how)
    result = {
        "asked": asked,
        "objective": f"{cfg.path.prediction}, {cfg.path.type}",
        "loss_weight": cfg.path.loss_weight,
        "own_loss": own.mean().item(),
        "velocity_error": error.mean().item(),
        "velocity_error_bins": error.tolist(),
    }
    if not isinstance(source, Genes):  # cells make no picture
        digits = cfg.data.source == "digits"
        labels = labels_for(num if digits else _SHOWN, None, cfg.model.num_classes)
        asked_for = prompts_for(_SHOWN, cfg.sample.prompts or held[0].captions) if run.text else labels
        x = run.generate(asked_for, seed=0)
        if digits:
            result |= read_by_classifier(x, labels, source, val_samples=cfg.data.val_samples)
        with images.replacing(folder / _SAMPLES) as temporary, open(temporary, "wb") as file:
            np.save(file, images.to_uint8(x[:_SHOWN]))
    with images.replacing(kept) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _middles(bins: int) -> np.ndarray:
    return _FIRST + (_LAST - _FIRST) * (np.arange(bins) + 0.5) / bins


def gradient_norms(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the norm of the gradient at them, before clipping, as logged."""
    return images.series(folder / "metrics.jsonl", "train", "grad_norm")


# -- what is shown -----------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]], folder: Path) -> str:
    """The figures as markdown, a row a run."""
    share = any("label_share" in result for result in results.values())
    head = ["run", "own loss", "velocity error", "at t < 0.3", "0.3 to 0.7", "> 0.7", "gradient norm"]
    lines = [head + ["read as asked"] * share]
    for name, result in results.items():
        bins = np.array(result["velocity_error_bins"])
        middle = _middles(len(bins))
        parts = [bins[middle < 0.3], bins[(middle >= 0.3) & (middle <= 0.7)], bins[middle > 0.7]]
        cells = [f"{part.mean():.3f}" if len(part) else "" for part in parts]
        norm = np.median(gradient_norms(folder / name)[1])
        row = [name, f"{result['own_loss']:.4f}", f"{result['velocity_error']:.3f}", *cells, f"{norm:.3f}"]
        lines.append(row + [f"{result.get('label_share', float('nan')):.1%}"] * share)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def plot(results: dict[str, dict[str, Any]], folder: Path, png: Path, title: str) -> Path:
    """One picture: the error over t, the gradient norm over the steps, the digits' figure, and samples of each run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(results)}
    shares = {name: result["label_share"] for name, result in results.items() if "label_share" in result}
    strips = {name: np.load(folder / name / _SAMPLES) for name in results if (folder / name / _SAMPLES).exists()}
    strips = {name: pixels for name, pixels in strips.items() if pixels.shape[-1] in (1, 3)}
    heights = [4.4, 0.1 + 0.5 * len(strips)]
    figure = Figure(figsize=(11, sum(heights)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    top, bottom = parts
    axes = top.subplots(1, 3 if shares else 2, width_ratios=[1.3, 1.3, 0.8] if shares else None)

    for name, result in results.items():
        bins, style = result["velocity_error_bins"], {"color": colors[name], "label": name}
        axes[0].plot(_middles(len(bins)), bins, marker="o", markersize=4, linewidth=1.6, **style)
        axes[1].plot(*gradient_norms(folder / name), linewidth=1.1, **style)
    axes[0].set_title("error as linear velocity, held out", loc="left")
    axes[0].set(xlabel="t of the linear path (1 is data)")
    axes[0].legend(frameon=False, labelcolor="#444444")
    axes[1].set_title("gradient norm", loc="left")
    axes[1].set(xlabel="step")
    for ax in axes[:2]:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    if shares:
        axes[2].barh(list(shares), list(shares.values()), color=[colors[name] for name in shares], height=0.6)
        for i, share in enumerate(shares.values()):
            inside = {"ha": "right", "color": "white"} if share > 0.3 else {"ha": "left", "color": "#444444"}
            axes[2].text(share, i, f" {share:.1%} ", va="center", fontweight="bold", **inside)
        axes[2].invert_yaxis()
        axes[2].set(xlim=(0, 1), yticks=[])
        axes[2].set_title("samples read as asked", loc="left")
    for ax in axes:
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#888888")
        ax.tick_params(which="both", color="#888888", labelcolor="#444444")

    rows = bottom.subplots(max(len(strips), 1), 1, squeeze=False)[:, 0]
    for ax in rows:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, (name, pixels) in zip(rows, strips.items(), strict=False):
        strip = np.concatenate(list(np.pad(pixels, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=255)), axis=1)
        ax.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=255)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", color=colors[name], fontweight="bold")
    with images.replacing(png) as temporary:
        figure.savefig(temporary, format="png")
    return png


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sitfast.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_config_arguments(parser)
    parser.add_argument("--runs", default="velocity-linear,noise-vp", help="names, or name:section.field=value,…")
    parser.add_argument("--steps", type=int, help="short for train.steps=…")
    parser.add_argument("--num", type=int, default=1000, help="samples that the classifier reads (digits)")
    args = parser.parse_intermixed_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SitfastError('the picture needs matplotlib; pip install "sitfast[demo]"') from None
    runs = parse_runs(args.runs)
    overrides = args.overrides + ([] if args.steps is None else [f"train.steps={args.steps}"])
    base = config.load(args.config, overrides)
    if not base.data.val_samples:
        raise SitfastError("data.val_samples=0: the runs are compared on held-out rows; hold some out, such as 1024")
    if base.stages:
        raise SitfastError(f"stages: {len(base.stages)} of them, and runs of one stage are compared; use stages=[]")
    folder = Path(base.output_dir)
    cfgs = {
        name: settings_for(base, args.config, [*overrides, *changes, f"output_dir={folder / name}"])
        for name, changes in runs.items()
    }  # all of them, before the first step

    results = {}
    for i, (name, cfg) in enumerate(cfgs.items(), 1):
        print(f"\nrun {i} of {len(cfgs)}: {name}", flush=True)
        if not train(cfg):
            print("the same command goes on from here")
            return 0
        results[name] = measure(cfg, args.num)
    text = table(results, folder)
    what = f"{base.data.source}, {base.train.steps} steps of {base.data.batch_size}, seed {base.seed}"
    for name, content in (
        ("compare.md", f"{what}\n\n{text}\n"),
        ("compare.json", json.dumps({"settings": what, "runs": results}, indent=2) + "\n"),
    ):
        with images.replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(f"\n{what}\n\n{text}\n\npicture {plot(results, folder, folder / 'compare.png', what)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
