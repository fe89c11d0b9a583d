"""The table that a run prints before its first step: what runs, on what, in which numbers, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sitfast import metrics, parallel
from sitfast.kernels import extension
from sitfast.kernels.attention import describe as describe_attention
from sitfast.kernels.cross_attention import describe as describe_cross_attention
from sitfast.kernels.mlp import describe as describe_mlp
from sitfast.model import count_parameters
from sitfast.precision import AUTOCAST

if TYPE_CHECKING:
    from sitfast.config import TextConfig
    from sitfast.trainer import Trainer


def table(run: Trainer, num_rows: int, *, start: str) -> list[tuple[str, str]]:
    """(what, how) of a run about to begin, trained on `num_rows`, and where it starts."""
    cfg, world = run.cfg, run.world
    name = (
        torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    shape = " × ".join(map(str, run.model.shape)) + (" genes" if run.panel else "")
    what = "cells" if run.panel else "images"
    weights = "fp32 weights" if run.mesh is None else "gathered in {}, fp32 shards and reductions"
    precision = {
        "bf16": "bf16 copy of fp32 weights" if run.copy else f"bf16 autocast, {weights.format('bf16')}",
        "fp16": f"fp16 autocast, loss scaling, {weights.format('fp16')}",
    }
    return [
        *_stage(run),
        ("device", f"{world.size} × {name}" if world.size > 1 else name),
        ("model", f"{cfg.model.preset or type(run.model).__name__} on {shape}"),
        ("parameters", f"{count_parameters(run.model):,} ({metrics.format_count(count_parameters(run.model))})"),
        ("compute", f"{2 * run.macs / 1e9:.2f} GFLOP an image forward, {6 * run.macs / 1e9:.2f} a training step"),
        ("objective", f"{cfg.path.prediction} on the {cfg.path.type} path, t {cfg.path.time_sampling}"),
        ("data", f"{cfg.data.source}: {num_rows:,} {what} to train on, {cfg.data.val_samples:,} held out"),
        ("batch", _batches(run)),
        ("vae", cfg.vae.id or ("none: expression" if run.panel else "none: pixels")),
        *([("text", _text(cfg.text))] if run.text else []),
        ("precision", precision.get(cfg.train.precision, cfg.train.precision)),
        ("parallel", _parallel(run)),
        ("memory", f"{run.predicted}" + (f" of {run.memory / 2**30:.1f}" if run.memory else "")),
        ("compiled", _compilation(run)),
        ("kernels", _kernels(run)),
        ("output", str(run.run_dir)),
        ("start", start),
    ]  # fmt: skip


def _text(settings: TextConfig) -> str:
    stored = ", whose states come with the latents" if settings.cache else ""
    return f"{settings.encoder}, {settings.length} tokens{stored}"


def _stage(run: Trainer) -> list[tuple[str, str]]:
    if not run.whole.stages:
        return []
    which = f"{run.number + 1} of {len(run.stages)}, steps {run.stage.first + 1} to {run.stage.last}"
    patch = run.model.patch_size
    return [("stage", f"{which}: {run.cfg.data.image_size} px, patches of {patch}, lr {run.cfg.optim.lr:g}")]


def _batches(run: Trainer) -> str:
    """Global batch = ranks × micro-batches × what a rank computes at once, of each size of image."""
    ranks, accumulate = run.world.size, run.cfg.train.accumulate
    return "; ".join(
        f"{bucket.images}{f' of {bucket.height} × {bucket.width}' if run.buckets.several else ''} ="
        f" {ranks} ranks × {accumulate} micro-batches × {bucket.images // (ranks * accumulate)}"
        for bucket in dict.fromkeys(run.buckets.kinds)
    )


def _compilation(run: Trainer) -> str:
    blocks = "each block, torch.compile" if run.compiled else "nothing"
    return f"{blocks}; forward and backward as a CUDA graph" if run.recorded else blocks


def _parallel(run: Trainer) -> str:
    """Who holds which part of the weights, and what is computed twice."""
    settings, world = run.cfg.parallel, run.world
    if run.mesh is None:
        text = "one copy of the weights a rank" if world.size > 1 else "none"
    else:
        shards = parallel.shard_size(settings, world.size)
        text = f"{settings.strategy}, weights in {shards} shards"
        text += f" × {world.size // shards} copies" if settings.strategy == "hsdp" else ""
        text += ", freed after forward" if settings.reshard_after_forward else ", kept until backward"
    again = {"none": "", "selective": "; all but matrix products recomputed", "block": "; blocks recomputed"}
    return text + again[settings.activation_checkpoint]


def _kernels(run: Trainer) -> str:
    """What the operations of a block run, and those around the network, and why."""
    if run.cfg.train.kernels == "reference":
        return "none: train.kernels=reference runs everything in PyTorch"
    around = f"draws, loss and update: {extension.describe(run.device)}"
    if run.device.type == "cpu":
        return f"{around}; blocks: PyTorch, there are none of our own for the CPU"
    cfg, width = run.cfg, run.model.config["hidden_size"]
    dtype = AUTOCAST[cfg.train.precision] or torch.float32
    rows = cfg.data.batch_size // run.world.size // cfg.train.accumulate * run.model.num_tokens
    feed_forward = describe_mlp(rows, width, int(width * run.model.config["mlp_ratio"]), dtype, run.device)
    head = width // run.model.config["num_heads"]
    attention = describe_attention(run.model.num_tokens, head, dtype, run.device)
    blocks = f"layer norm and residual: Triton; feed-forward: {feed_forward}; attention: {attention}"
    if run.text:
        cross = describe_cross_attention(run.model.num_tokens, cfg.text.length, head, dtype, run.device)
        blocks += f"; to captions: {cross}"
    return f"{around}; {blocks}"
