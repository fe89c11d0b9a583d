"""How good is it: the validation loss at fixed noise in bins of t; for digits and genes, what a classifier reads and more.

    python -m sitfast.evaluate --ckpt runs/digits

    loss_b = mean over held-out rows of loss(x_t), t = t0 + (t1 - t0)(b + u) / bins,   u and noise fixed per row

A training loss wanders with t and noise; this one moves only when the model does. Of a model that reads captions: the share of
held-out rows whose own caption has a lower loss (the mean over the bins) than that of another row, at the same noise; and for the
drawn shapes the share of samples that show the colour, and the place, that was asked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sitfast import cli, data, evaluate_genes, images, philox
from sitfast.data import shapes
from sitfast.data.genes import Genes
from sitfast.data.latents import Latents
from sitfast.data.loader import fixed_batches
from sitfast.data.sampler import held_out
from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant
from sitfast.loss import interpolant_loss
from sitfast.parallel import World
from sitfast.philox import Stream
from sitfast.sample import Restored, add_checkpoint_arguments, labels_for
from sitfast.text import Condition, TextEncoder

FIRST_INDEX = 1 << 62  # held-out rows draw from sample numbers that training never reaches


def _losses(
    model: nn.Module, x: Tensor, index: Tensor, y: Condition, *, interpolant: Interpolant, bins: int
) -> Iterator[Tensor]:
    """The loss of each sample `[B]`, one bin of t after another; t and noise depend on the index alone."""
    t0, t1 = interpolant.train_interval()
    offset = philox.uniform(interpolant.seed, index, Stream.TIME)
    for b in range(bins):
        xt, t, target = interpolant.sample(x, index, t=t0 + (t1 - t0) * (b + offset) / bins)
        yield interpolant_loss(model(xt, t, y), target, t, interpolant=interpolant)


def condition(batch: data.Batch, text: TextEncoder | None) -> Condition:
    """What the model is given: labels, or with `text` the batch's captions, read unless their states came with it."""
    if text is None:
        return batch.y
    return text.encode(batch.text) if batch.text else text(batch.captions)


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    batches: Iterable[data.Batch],
    *,
    vae: Any,
    interpolant: Interpolant,
    text: TextEncoder | None = None,
    bins: int,
    world: World,
) -> Tensor:
    """Mean loss in each of `bins` equal bins of t over all ranks' batches, fp64 `[bins]`, on the CPU.

    Rank r of R holds rows r, r + R, … of the held-out set, so that a row draws the same t and noise at any R.
    """
    total = torch.zeros(bins + 1, dtype=torch.float64, device=world.device)
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            index = batch.index * world.size + world.rank + FIRST_INDEX
            y = condition(batch, text)
            x = vae.encode(batch.x, index)
            for b, losses in enumerate(_losses(model, x, index, y, interpolant=interpolant, bins=bins)):
                total[b] += losses.double().sum()
            total[bins] += len(index)
    total = world.mean(total)
    return (total[:bins] / total[bins]).cpu()


@torch.no_grad()
def caption_share(run: Restored, batches: Iterable[data.Batch]) -> float:
    """Share of the rows whose own caption has a lower loss than the next row's that differs from it, within its batch."""
    settings = {"interpolant": run.interpolant, "bins": run.cfg.log.val_bins}
    assert run.text is not None
    won = total = 0
    for batch in batches:
        others = [_next_other(batch.captions, i) for i in range(len(batch.captions))]
        index = batch.index + FIRST_INDEX
        x = run.vae.encode(batch.x, index)
        right, wrong = (
            torch.stack([*_losses(run.model, x, index, run.text(captions), **settings)]).mean(0)
            for captions in (batch.captions, others)
        )
        told = torch.tensor([a != b for a, b in zip(batch.captions, others, strict=True)], device=right.device)
        won, total = won + int((told & (right < wrong)).sum()), total + int(told.sum())
    return won / total if total else float("nan")


def _next_other(captions: Sequence[str], i: int) -> str:
    """The first caption after the i-th, in a circle, that differs from it; itself where none does."""
    return next((other for other in (*captions[i:], *captions[:i]) if other != captions[i]), captions[i])


def read_shapes(x: Tensor, numbers: Tensor) -> dict[str, float]:
    """Shares of the samples that show the colour and the place that captions `[N]` of the drawn shapes ask for."""
    colours, places = shapes.read(x)
    each = len(shapes.CAPTIONS) // len(shapes.COLOURS)
    asked = {"colour_share": (colours, numbers // each), "place_share": (places, numbers % len(shapes.PLACES))}
    return {name: (found == wanted).double().mean().item() for name, (found, wanted) in asked.items()}


def read_by_classifier(x: Tensor, labels: Tensor, source: data.Source, *, val_samples: int) -> dict[str, float]:
    """Share of the samples that a classifier of the real digits reads as the label asked for, and its own accuracy.

    A support vector machine (RBF kernel) learns the rows that the model was trained on and is scored on the held-out ones;
    where none were held out, on a fifth that the classifier alone has not seen.
    """
    from sklearn.svm import SVC

    train_rows, test_rows = held_out(source.num_rows, val_samples or source.num_rows // 5)

    def rows(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = [source.load(int(row)) for row in which]
        return np.stack([p.flatten().numpy() for p, _ in pairs]), np.array([label for _, label in pairs])

    classifier = SVC(gamma="scale", C=10).fit(*rows(train_rows))
    accuracy = float(classifier.score(*rows(test_rows)))
    share = float(classifier.score(x.flatten(1).numpy(), labels.numpy()))
    return {"classifier_accuracy": accuracy, "label_share": share}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sitfast.evaluate", description="Measure a trained model.")
    add_checkpoint_arguments(parser)
    parser.add_argument("--num", type=int, default=1000, help="samples that the figures are of (digits, shapes, genes)")
    args = parser.parse_args(argv)
    run = Restored(args.ckpt, ema=args.weights == "ema", device=args.device, overrides=args.overrides)
    cfg, folder = run.cfg, run.folder.parent
    source = data.build_source(cfg.data)
    if isinstance(source, Latents):
        source.check_vae(run.vae)
    result: dict[str, Any] = {"checkpoint": str(run.folder), "step": run.state["step"], "weights": args.weights}

    if cfg.data.val_samples:
        rows = held_out(source.num_rows, cfg.data.val_samples)[1]
        batches = fixed_batches(source, rows, batch_size=cfg.sample.batch_size, device=run.device)
        bins = validation_loss(
            run.model,
            batches,
            vae=run.vae,
            interpolant=run.interpolant,
            text=run.text,
            bins=cfg.log.val_bins,
            world=World(0, 1, run.device),
        )
        result["val_loss"], result["val_loss_bins"] = bins.mean().item(), bins.tolist()
        print(f"validation loss {result['val_loss']:.4f} on {len(rows)} held-out {'cells' if run.panel else 'images'}")
        if run.text:
            batches = fixed_batches(source, rows, batch_size=cfg.sample.batch_size, device=run.device)
            result["caption_share"] = caption_share(run, batches)
            print(
                f"{result['caption_share']:.1%} of them have a lower loss under their own caption than under another's"
            )

    if isinstance(source, Genes):
        if run.state.get("genes") != source.panel.state():
            raise SitfastError(f"data.path={cfg.data.path} has other genes or values than {run.folder} was trained on")
        asked = source.labels(evaluate_genes.split(source, cfg.data.val_samples)[1])
        labels = labels_for(args.num, tuple(asked.tolist()), cfg.model.num_classes)
        x = run.generate(labels, seed=args.seed)
        result |= evaluate_genes.read_cells(x, labels, source, val_samples=cfg.data.val_samples)
        print(evaluate_genes.describe(result, args.num, cfg.sample.cfg))
    labels = labels_for(args.num, None, source.num_classes if run.text else cfg.model.num_classes)
    if cfg.data.source == "shapes" and run.text:
        x = run.generate([shapes.CAPTIONS[i] for i in labels.tolist()], seed=args.seed)
        result |= read_shapes(x, labels)
        print(
            f"of {args.num} samples (guidance {cfg.sample.cfg:g}), {result['colour_share']:.1%} show the colour asked for,"
            f" {result['place_share']:.1%} the place"
        )
        print(f"samples    {images.save_grid(x[:100], folder / 'samples.png', columns=10)}")
    if cfg.data.source == "digits":
        x = run.generate(labels, seed=args.seed)
        result |= read_by_classifier(x, labels, source, val_samples=cfg.data.val_samples)
        print(
            f"{result['label_share']:.1%} of {args.num} samples (guidance {cfg.sample.cfg:g}) are read as the digit asked for,\n"
            f"by a classifier that reads {result['classifier_accuracy']:.1%} of the held-out real digits right"
        )
        print(f"samples    {images.save_grid(x[:100], folder / 'samples.png', columns=10)}")
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if (folder / "metrics.jsonl").exists():
        print(f"loss curve {images.plot_loss(folder / 'metrics.jsonl', folder / 'loss.png')}")
    return 0


if __name__ == "__main__":
    cli.run(main)
