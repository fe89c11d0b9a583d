"""Do the kernels train like the reference? 500 steps of SiT-B/2 with either, same seeds: python -m benchmarks.gpu_parity

    kernels      this package's kernels, twice: the second time with the channels of the residual stream in another order
    reference    plain PyTorch inside `use_reference()`, with four orders of the channels

Reordered channels are the same mathematics with every sum over channels taken in another order. Weights, data and draws
are the same everywhere; bf16 autocast, fp32 weights. Training is chaotic, so any difference in rounding grows; what a
difference may be is measured between the references. The kernels pass if the median distance of their curves from those
of the references is no more than `SLACK` times the largest between two references, in the mean over the steps and in the
largest step. Without slack, one set of curves among several that differ by chance would now and then be the outermost.

The runs share the GPU, each in a process of its own, their steps captured as CUDA graphs. Takes about 70 s on an H100;
exits with 1 if the kernels fail. Without a GPU the model is tiny and the kernels do not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, GPU
from sitfast.config import EMAConfig, OptimConfig
from sitfast.interpolant import Interpolant
from sitfast.kernels import use_reference
from sitfast.kernels.interpolate import drop_labels
from sitfast.loss import interpolant_loss
from sitfast.model import SiT, build_model
from sitfast.optim import Update

STEPS, BATCH, BINS = (500, 16, 10) if GPU else (6, 2, 2)
PRESET, SIZES = (
    ("SiT-B/2", {}) if GPU else ("SiT-S/2", {"hidden_size": 48, "depth": 2, "num_heads": 4, "input_size": 8})
)
IMAGES, CLASSES, SEED = 4096, 64, 0
SLACK = 1.5
RUNS = [("kernels", 0), ("kernels", 1), *(("reference", order) for order in range(4))]  # order 0 is the model's own
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x_t, t, label, target
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


def make_batches(model: SiT) -> list[Batch]:
    """The batch of every step."""
    images, labels = make_images(model.input_size)
    interpolant, batches = Interpolant(seed=SEED), []
    for indices in torch.arange(STEPS * BATCH, device=DEVICE).split(50 * BATCH):
        rows = indices % IMAGES
        xt, t, target = interpolant.sample(images[rows], indices)
        y = drop_labels(labels[rows], indices, prob=0.1, null=CLASSES, seed=SEED)
        batches += zip(*(value.split(BATCH) for value in (xt, t, y, target)), strict=True)
    return batches


def captured(step: Callable[[Batch], Tensor], model: SiT, batch: Batch) -> Callable[[Batch], Tensor]:
    """The step as a CUDA graph, which leaves its gradients in the same memory every time."""
    static = tuple(value.clone() for value in batch)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static)

    def replay(batch: Batch) -> Tensor:
        for ours, theirs in zip(static, batch, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return loss

    return replay


def train(kind: str, order: int) -> tuple[list[float], str]:
    """The loss of every step, and a line on how it went."""
    start = time.time()
    torch.manual_seed(SEED)
    model = build_model(PRESET, num_classes=CLASSES, **SIZES).to(DEVICE)
    if order > 0:
        generator = torch.Generator().manual_seed(order)
        reorder(model, torch.randperm(model.pos_embed.shape[-1], generator=generator).to(DEVICE))
    interpolant, batches = Interpolant(seed=SEED), make_batches(model)
    update = Update(model, optim=OptimConfig(), ema=EMAConfig(decays=()), total_steps=STEPS, precision="bf16")

    def step(batch: Batch) -> Tensor:
        xt, t, y, target = batch
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = model(xt, t, y)
        loss = interpolant_loss(out, target, t, interpolant=interpolant).mean()
        loss.backward()
        return loss.detach()

    losses = []
    with nullcontext() if kind == "kernels" else use_reference():
        run, note = step, "not captured"
        if GPU:
            try:
                run, note = captured(step, model, batches[0]), "captured"
            except Exception as error:  # a slower run tells as much
                torch.cuda.synchronize()
                note += f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ready = time.time()
        for index, batch in enumerate(batches):
            if run is step:  # a graph writes over the gradients
                update.zero_grad()
            loss = run(batch)
            update.step(index, loss)
            losses.append(loss.clone())
    update.check(STEPS)
    curve = torch.stack(losses).tolist()
    return (
        curve,
        f"loss {curve[0]:.5f} to {curve[-1]:.5f}, {note} after {ready - start:.0f} s, {time.time() - start:.0f} s",
    )


# ---- the verdict -----------------------------------------------------------------------------------------------------


def distances(curves: Curves) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """|difference| of every step: of each run with kernels from each reference, and of the references from each other."""
    kernels, references = ([name for name in curves if name.startswith(kind)] for kind in ("kernels", "reference"))
    ours = {f"{a}, {b}": (curves[a] - curves[b]).abs() for a, b in itertools.product(kernels, references)}
    theirs = {f"{a}, {b}": (curves[a] - curves[b]).abs() for a, b in itertools.combinations(references, 2)}
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
    means = {
        kind: torch.stack([curve for name, curve in curves.items() if name.startswith(kind)]).mean(0)
        for kind in ("kernels", "reference")
    }
    size = len(means["reference"]) // BINS

    def row(name: str, part: slice) -> str:
        figures = [figure for pairs in (ours, theirs) for figure in _mean_and_largest(pairs, part)]
        figures.append((means["kernels"] - means["reference"])[part].mean().item())
        return f"{name:<9} {means['reference'][part].mean():8.5f}" + "".join(f"{figure:13.2e}" for figure in figures)

    title = "steps         loss  kernels mean      largest    refs. mean      largest       signed"
    rows = [row(f"{first}-{first + size}", slice(first, first + size)) for first in range(0, BINS * size, size)]
    return [title, *rows, row("all", slice(None))]


def _mean_and_largest(pairs: dict[str, Tensor], part: slice) -> tuple[float, float]:
    values = torch.stack([distance[part] for distance in pairs.values()])
    return values.mean().item(), values.max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves with the kernels and without.")
    parser.add_argument("--output", type=Path, help="where to write the curves, as JSON")
    output, start = parser.parse_args().output, time.time()
    device = torch.cuda.get_device_name() if GPU else "CPU, tiny model: the kernels do not run"
    print(f"{device}, torch {torch.__version__}, {PRESET}, B = {BATCH}, {STEPS} steps, bf16 autocast", flush=True)
    curves: Curves = {}
    with ProcessPoolExecutor(len(RUNS) if GPU else 2, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, kind, order): f"{kind} {order}" for kind, order in RUNS}
        for future in as_completed(futures):
            name = futures[future]
            curve, line = future.result()
            curves[name] = torch.tensor(curve, dtype=torch.float64)
            print(f"{name}: {line}; {time.time() - start:.0f} s in all", flush=True)
            if output:
                output.write_text(json.dumps({name: curve.tolist() for name, curve in curves.items()}))
    passed, lines = verdict(curves)
    print("\n".join([*table(curves), *lines]))
    print("PASSED: the kernels train like the reference" if passed else "FAILED: the kernels differ from the reference")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
