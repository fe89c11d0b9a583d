"""Do the kernels train like the reference? 500 steps of SiT-B/2 with either, same seeds: python -m benchmarks.gpu_parity

    kernels      this package's kernels
    reference    plain PyTorch inside `use_reference()`; same weights, data and draws
    reordered    the reference with the channels of its residual stream in another order, twice: the same mathematics,
                 every sum over channels taken in another order

All in bf16 autocast with fp32 weights, blocks compiled. Training is chaotic, so any difference in rounding grows; what a
difference may be is measured between the references. The kernels pass if their curve is no further from those of the
references than `SLACK` times the largest distance between two references, in the mean over the steps and in the largest
step. Without slack the kernels, one of four curves that differ by chance, would be the outermost one time in four.

Takes about a minute on an H100; exits with 1 if the kernels fail. Without a GPU the model is tiny and all curves are equal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, GPU
from sitfast.config import EMAConfig, OptimConfig
from sitfast.interpolant import Interpolant
from sitfast.kernels import use_reference
from sitfast.loss import interpolant_loss
from sitfast.model import SiT, build_model, drop_labels
from sitfast.optim import Update

STEPS, BATCH, BINS = (500, 32, 10) if GPU else (6, 2, 2)
PRESET, SIZES = (
    ("SiT-B/2", {}) if GPU else ("SiT-S/2", {"hidden_size": 48, "depth": 2, "num_heads": 4, "input_size": 8})
)
IMAGES, CLASSES, SEED = 4096, 64, 0
SLACK = 1.5
Weights = dict[str, Tensor]
Curves = dict[str, Tensor]  # name → loss of every step, fp64


# ---- data, model, training -------------------------------------------------------------------------------------------


def make_images(size: int) -> tuple[Tensor, Tensor]:
    """Latents [IMAGES, 4, size, size] to learn: a smooth field a class, smooth variations of it and some noise."""
    generator = torch.Generator(DEVICE).manual_seed(SEED)

    def smooth(count: int, coarse: int) -> Tensor:
        field = torch.randn(count, 4, coarse, coarse, generator=generator, device=DEVICE)
        return F.interpolate(field, size=(size, size), mode="bicubic", align_corners=False)

    labels = torch.randint(CLASSES, (IMAGES,), generator=generator, device=DEVICE)
    noise = torch.randn(IMAGES, 4, size, size, generator=generator, device=DEVICE)
    images = smooth(CLASSES, size // 4)[labels] + 0.5 * smooth(IMAGES, size // 4) + 0.1 * noise
    return images / images.std(), labels


@torch.no_grad()
def reorder(model: SiT, order: Tensor) -> None:
    """Put the channels [D] of the residual stream into another order, in place: the function stays the same."""
    width = order.numel()

    def outputs(parameter: Tensor) -> Tensor:
        """Rows that are channels, once or in every chunk of the modulation."""
        return parameter.unflatten(0, (-1, width))[:, order].flatten(0, 1)

    for name, parameter in model.named_parameters():
        new = parameter
        if name == "pos_embed" or "embedding_table" in name:
            new = new[..., order]
        elif (
            name.startswith(("x_embedder", "t_embedder.mlp.2")) or "adaLN" in name or ".proj." in name or "fc2" in name
        ):
            new = outputs(new)
        if name.endswith("weight") and (
            "adaLN" in name or "qkv" in name or "fc1" in name or "final_layer.linear" in name
        ):
            new = new[:, order]
        parameter.copy_(new.clone())


def make_batches(model: SiT) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x_t, t, label and target of every step."""
    images, labels = make_images(model.input_size)
    interpolant, batches = Interpolant(seed=SEED), []
    for indices in torch.arange(STEPS * BATCH, device=DEVICE).split(50 * BATCH):
        rows = indices % IMAGES
        xt, t, target = interpolant.sample(images[rows], indices)
        y = drop_labels(labels[rows], indices, prob=0.1, null=CLASSES, seed=SEED)
        batches += zip(*(value.split(BATCH) for value in (xt, t, y, target)), strict=True)
    return batches


def train(model: SiT, weights: Weights, batches: list, *, kernels: bool, order: Tensor | None) -> Tensor:
    """The loss of every step, from the given weights."""
    model.load_state_dict(weights)
    if order is not None:
        reorder(model, order)
    interpolant, start = Interpolant(seed=SEED), time.time()
    update = Update(model, optim=OptimConfig(), ema=EMAConfig(decays=()), total_steps=STEPS, precision="bf16")
    losses = []
    with nullcontext() if kernels else use_reference():
        for step, (xt, t, y, target) in enumerate(batches):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                out = model(xt, t, y)
            loss = interpolant_loss(out, target, t, interpolant=interpolant).mean()
            loss.backward()
            update.step(step, loss)
            update.zero_grad()
            losses.append(loss.detach())
            if step == 0:
                first = f"{loss.item():.5f}, first step {time.time() - start:.0f} s"
    update.check(STEPS)
    curve = torch.stack(losses).double().cpu()
    say(f"loss {first}, to {curve[-1]:.5f}, {time.time() - start:.0f} s")
    return curve


def say(text: str) -> None:
    print(text, flush=True)


# ---- the verdict -----------------------------------------------------------------------------------------------------


def distances(curves: Curves) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """|difference| of every step: of the kernels from each reference, and of the references from each other."""
    references = [name for name in curves if name != "kernels"]
    ours = {name: (curves["kernels"] - curves[name]).abs() for name in references}
    theirs = {f"{a} {b}": (curves[a] - curves[b]).abs() for a, b in itertools.combinations(references, 2)}
    return ours, theirs


def verdict(curves: Curves) -> tuple[bool, list[str]]:
    """Whether the kernels pass, and a line for each of the two figures."""
    ours, theirs = distances(curves)
    passed, lines = True, []
    for what, figure in (("mean", Tensor.mean), ("largest", Tensor.max)):
        distance = torch.stack([figure(d) for d in ours.values()]).median().item()
        allowed = SLACK * max(figure(d).item() for d in theirs.values())
        passed &= distance <= allowed  # false for a NaN too
        lines.append(f"{what} |difference| from the references: {distance:.2e}, allowed {allowed:.2e}")
    return passed, lines


def table(curves: Curves) -> list[str]:
    """Loss and distances in bins of steps, and over all."""
    ours, theirs = distances(curves)
    mean = (sum(curves[name] for name in ours) / len(ours)).double()
    lines = ["steps        loss     kernels, mean  largest   references, mean  largest   kernels − references, signed"]
    size = len(mean) // BINS
    for first in [*range(0, len(mean), size), None]:
        part = slice(None) if first is None else slice(first, first + size)

        def row(pairs: dict[str, Tensor], part: slice = part) -> str:
            values = torch.stack([d[part] for d in pairs.values()])
            return f"{values.mean().item():12.2e} {values.max().item():9.2e}"

        name = "all" if first is None else f"{first}-{min(first + size, len(mean))}"
        signed = (curves["kernels"] - mean)[part].mean().item()
        lines.append(f"{name:<9} {mean[part].mean().item():8.5f}   {row(ours)} {row(theirs):>28}   {signed:+12.2e}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves with the kernels and without.")
    parser.add_argument("--output", type=Path, help="where to write the curves, as JSON")
    output = parser.parse_args().output
    device = torch.cuda.get_device_name() if GPU else "CPU, tiny model: the kernels do not run"
    say(f"{device}, torch {torch.__version__}, {PRESET}, B = {BATCH}, {STEPS} steps, bf16 autocast")
    torch.manual_seed(SEED)
    model = build_model(PRESET, num_classes=CLASSES, **SIZES).to(DEVICE)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    batches = make_batches(model)
    if GPU:
        for module in (*model.blocks, model.final_layer):
            module.compile(fullgraph=True, dynamic=False)
    width = model.pos_embed.shape[-1]
    orders = [torch.randperm(width, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (1, 2)]
    curves: Curves = {}
    for name, kernels, order in (
        ("kernels", True, None),
        ("reference", False, None),
        ("reordered 1", False, orders[0]),
        ("reordered 2", False, orders[1]),
    ):
        print(name, end=": ")
        curves[name] = train(model, weights, batches, kernels=kernels, order=order)
        if output:
            output.write_text(json.dumps({name: curve.tolist() for name, curve in curves.items()}))
    passed, lines = verdict(curves)
    say("\n".join([*table(curves), *lines]))
    say("PASSED: the kernels train like the reference" if passed else "FAILED: the kernels differ from the reference")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
