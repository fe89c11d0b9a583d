"""How much GPU memory a step needs, before it runs; and what would fit when it does not.

    held          weights 4P/s + gradients 4P/s + moments 8P/s (bf16: 4P/s) + averages 4P/s each         P parameters in s shards
    gathered      a few blocks in the dtype of the compute (fsdp, hsdp), or all of them (reshard_after_forward=false);
                  under ddp the bf16 copy 2P, whose gradients are 2P where neither micro-batches nor ranks are added up
    activations   depth · saved · u + the block that is running,    u = images · tokens · width in the compute dtype

A block that runs our kernels keeps, in units of u: its two normed inputs, qkv (3), attention's output, both branches, the
residual stream in its middle and fc1's pre-activation (mlp_ratio), 9 + mlp_ratio in all; under autocast the stream is fp32, 1
more, and train.mlp_save=both keeps mlp_ratio more. A cross-attention keeps its normed input, q, output, branch and a residual
stream, and k and v of the caption's tokens.
Measured on an H100 (SiT-XL/2, 128 images) while blocks kept the stream at their end too, so 2.0 GiB more in bf16 and 3.9 under
autocast: 29.6 GiB where this then said 29.7, and 36.2 for 36.1.
Batches of several sizes have the tokens of data.batch_size images at most (see `buckets`), so that is what is counted.
It is an estimate for planning: the CUDA context and fragmentation take `RESERVE` on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sitfast.config import Config
from sitfast.data.buckets import kinds
from sitfast.model import SiT, count_parameters
from sitfast.parallel import shard_size
from sitfast.precision import wants_copy
from sitfast.text import frozen_bytes

GIB = 2**30
RESERVE = int(1.5 * GIB)
_VAE_PARAMETERS = 84_000_000  # of the Stable Diffusion autoencoders
_VAE_CHANNELS, _VAE_TENSORS = 128, 4  # the widest tensors of their first level that live at once


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU, by what they are for."""

    weights: int
    gradients: int
    moments: int
    averages: int
    gathered: int
    activations: int
    vae: int  # its weights; what encoding needs comes and goes before the activations do
    encoding: int
    text: int  # a frozen encoder's weights

    @property
    def total(self) -> int:
        held = self.weights + self.gradients + self.moments + self.averages + self.vae + self.text
        return held + max(self.gathered + self.activations, self.encoding)

    def __str__(self) -> str:
        names = ("weights", "gradients", "moments", "averages", "gathered", "activations", "text")
        parts = [f"{name} {getattr(self, name) / GIB:.1f}" for name in names if getattr(self, name) > 0.05 * GIB]
        return f"{self.total / GIB:.1f} GiB predicted" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")


def predict(cfg: Config, model: SiT, world_size: int) -> Prediction:
    """The peak of a training step on each GPU. The model gives its shape and may be a description on the meta device."""
    width, depth = model.config["hidden_size"], model.config["depth"]
    tokens, ratio = model.num_tokens, model.config["mlp_ratio"]
    low = cfg.train.precision in ("bf16", "fp16")
    parameters, block = count_parameters(model), count_parameters(model.blocks[0])  # type: ignore[arg-type]
    shards, accumulate = shard_size(cfg.parallel, world_size), cfg.train.accumulate
    sharded = cfg.parallel.strategy != "ddp"
    size = 2 if low else 4

    narrow = wants_copy(cfg)
    gradients = 4 * parameters // shards
    if not sharded:
        gathered = 2 * parameters if low else 0  # the working copy; or autocast's, kept for the backward pass
        if narrow:
            gradients = 2 * parameters if world_size * accumulate == 1 else 6 * parameters
        if len(set(cfg.data.resolutions)) > 1 and world_size == 1 and cfg.train.cuda_graph is not False:
            gradients *= 2  # of the size that runs, and those that the update reads
    else:
        rest = parameters - depth * block
        whole = block * (2 if cfg.parallel.reshard_after_forward else depth) + rest
        gathered = size * whole + (size + 8) * block  # and the gradients of a block on their way to the shards
        if accumulate > 1:
            gradients += 4 * parameters  # they add up whole until the last micro-batch

    unit = cfg.data.batch_size // world_size // accumulate * tokens * width * size
    stream = 2 if low and not sharded and not narrow else 1  # fp32 under autocast
    hidden = ratio * (2 if cfg.train.mlp_save == "both" else 1)
    text = model.config["text"]
    keys = 2 * text["length"] / tokens if text else 0  # of the captions, in units of u
    cross = 4 + stream + keys if text else 0
    full = 8 + hidden + stream + cross
    some = 6 + hidden + stream + (3 + keys if text else 0)
    kept = {"none": full, "selective": some, "block": 1 + stream}[cfg.parallel.activation_checkpoint]
    again = 0 if cfg.parallel.activation_checkpoint == "none" else full
    activations = int(unit * (depth * kept + again + 8 + ratio))

    vae = encoding = 0
    if cfg.vae.id is not None:
        vae_size = 2 if cfg.vae.precision == "bf16" else 4
        vae = _VAE_PARAMETERS * vae_size
        shares = ((min(cfg.vae.batch_size, b.images // world_size // accumulate), b) for b in kinds(cfg.data))
        pixels = max(images * b.height * b.width for images, b in shares)
        encoding = pixels * _VAE_CHANNELS * _VAE_TENSORS * vae_size
    return Prediction(
        weights=4 * parameters // shards,
        gradients=gradients,
        moments=(4 if cfg.optim.moments == "bf16" else 8) * parameters // shards,
        averages=4 * parameters * len(cfg.ema.decays) // shards,
        gathered=gathered,
        activations=activations,
        vae=vae,
        encoding=encoding,
        text=frozen_bytes(cfg.text),  # pyright: ignore[reportArgumentType]  a frozen section has a hash
    )


def capacity(device: torch.device) -> int | None:
    """Bytes of memory of a GPU; None on a CPU, where it is not for one process alone."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def with_changes(cfg: Config, **changes: dict[str, Any]) -> Config:
    """`cfg` with fields of sections replaced, as in train={"accumulate": 2}."""
    updated = {name: getattr(cfg, name).model_copy(update=fields) for name, fields in changes.items()}
    return cfg.model_copy(update=updated)


def fitting_accumulate(cfg: Config, model: SiT, world_size: int, memory: int | None) -> int:
    """The fewest micro-batches that keep the global batch and are predicted to fit; 1 image each if none is."""
    images = _images(cfg, world_size)
    counts = [n for n in range(1, images + 1) if images % n == 0]
    if memory is None:
        return 1
    for n in counts:
        if predict(with_changes(cfg, train={"accumulate": n}), model, world_size).total + RESERVE <= memory:
            return n
    return images


def _images(cfg: Config, world_size: int) -> int:
    """Into so many micro-batches the batch of a rank can be split, whatever its size."""
    return math.gcd(*(bucket.images for bucket in kinds(cfg.data))) // world_size


def remedies(cfg: Config, model: SiT, world_size: int, memory: int) -> str:
    """Which single changes are predicted to fit, after a step did not: most wanted first.

    Where the prediction was too low, the ones for the changes are taken to be as much too low.
    """
    now = predict(cfg, model, world_size).total + RESERVE
    error = max(1.0, memory / now)
    fits: dict[str, str] = {}
    for name, changed in _changes(cfg, world_size):
        needed = (predict(changed, model, world_size).total + RESERVE) * error
        if needed < 0.97 * memory:
            fits.setdefault(
                name.partition("=")[0], f"{name} ({needed / GIB:.1f} GiB)"
            )  # of each field the least change
    if fits:
        return f"what would fit: {', or '.join(fits.values())}"
    together = with_changes(
        cfg,
        train={"accumulate": _images(cfg, world_size)},
        parallel={"activation_checkpoint": "block", **({"strategy": "fsdp"} if world_size > 1 else {})},
    )
    least = predict(together, model, world_size).total + RESERVE
    return f"no single change would fit; one image at a time with blocks recomputed and sharded needs {least / GIB:.1f} GiB"


def _changes(cfg: Config, world_size: int) -> Iterator[tuple[str, Config]]:
    images = _images(cfg, world_size)
    more = [n for n in range(cfg.train.accumulate + 1, images + 1) if images % n == 0]
    for n in more:
        yield f"train.accumulate={n}", with_changes(cfg, train={"accumulate": n})
    if cfg.parallel.strategy == "ddp" and world_size > 1:
        yield "parallel.strategy=fsdp", with_changes(cfg, parallel={"strategy": "fsdp"})
    if cfg.parallel.strategy != "ddp" and not cfg.parallel.reshard_after_forward:
        changed = with_changes(cfg, parallel={"reshard_after_forward": True})
        yield "parallel.reshard_after_forward=true", changed
    policies = ("none", "selective", "block")
    for policy in policies[policies.index(cfg.parallel.activation_checkpoint) + 1 :]:
        changed = with_changes(cfg, parallel={"activation_checkpoint": policy})
        yield f"parallel.activation_checkpoint={policy}", changed
    smaller = cfg.data.batch_size // 2
    if smaller % (world_size * cfg.train.accumulate) == 0:
        yield f"data.batch_size={smaller} (another run)", with_changes(cfg, data={"batch_size": smaller})
