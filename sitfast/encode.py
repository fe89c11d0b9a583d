"""Encode once, train often: `python -m sitfast.encode --config configs/b2.yaml --out latents/`, or the same under torchrun.

    source rows of shard k ─▶ image and mirror ─▶ vae.moments ─▶ shard-k.safetensors       rank r takes every R-th open shard

Train from the result with `data.source=latents data.path=latents/`. A shard appears whole or not at all, and covers the same
rows whatever the number of ranks: the same command after a kill does the shards that are missing, and no other.
`data.flip=false` leaves out the mirrors and half of the bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitfast import cli, config, data, parallel
from sitfast.config import Config
from sitfast.data import latents
from sitfast.data.loader import in_order
from sitfast.data.quarantine import Quarantine
from sitfast.errors import SitfastError
from sitfast.parallel import World
from sitfast.text import Frozen, Text, TextEncoder, build_text
from sitfast.vae import AutoencoderVAE, build_vae

_SHARD_BYTES = 256 << 20


def encode(
    cfg: Config, world: World, out: Path, *, dtype: str = "fp16", shard_rows: int | None = None
) -> dict[str, Any]:
    """Write what is missing in `out`, then the manifest; returns it. Unreadable images are left out and listed there."""
    source = data.build_source(cfg.data)
    vae = build_vae(cfg.vae, device=world.device, seed=cfg.seed)
    if isinstance(source, latents.Latents) or not isinstance(vae, AutoencoderVAE):
        what = "data.source=latents" if isinstance(source, latents.Latents) else "vae.id=null"
        raise SitfastError(f"{what} leaves nothing to encode; give a source of images and a VAE")
    vae.check_image_size(cfg.data.image_size)
    shape = [2, vae.latent_channels(source.channels), *[cfg.data.image_size // vae.downsample] * 2]
    views = 2 if cfg.data.flip else 1
    shard_rows = shard_rows or max(1, _SHARD_BYTES // (2 * views * int(np.prod(shape))))
    job = {
        "vae": {"id": vae.id, "sha256": vae.fingerprint, "precision": cfg.vae.precision},
        "image_size": cfg.data.image_size,
        "dtype": dtype,
        "views": views,
        "shape": shape,
        "source": cfg.data.source,
        "num_rows": source.num_rows,
        "shard_rows": shard_rows,
        "texts": cfg.data.caption_column,
    }
    text = build_text(cfg.text, world.device) if cfg.text.cache else None
    if isinstance(text, Frozen):
        about = {"encoder": cfg.text.encoder, "sha256": text.fingerprint, "precision": cfg.text.precision}
        job["text"] = about | {"length": cfg.text.length}
    num_shards = -(-source.num_rows // shard_rows)
    missing = [k for k in range(num_shards) if not _is_done(out / latents.shard_name(k), job)]
    world.barrier()  # all have looked before anyone writes
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(".shard-*.tmp"):
            leftover.unlink()
        done = f"; {num_shards - len(missing)} are there already" if len(missing) < num_shards else ""
        print(f"{source.num_rows:,} images in {num_shards} shards of {shard_rows:,}{done}", flush=True)
    world.barrier()
    _encode_shards(cfg, world, out, missing[world.rank :: world.size], source=source, vae=vae, text=text, job=job)
    world.barrier()
    if world.is_main:
        shards = [latents.read_shard(out / latents.shard_name(k)) for k in range(num_shards)]
        about = {
            "path": cfg.data.path,
            "channels": source.channels,
            "class_names": source.class_names,
            "scale": vae.scale.flatten().tolist(),
            "shift": vae.shift.flatten().tolist(),
        }
        latents.write_manifest(out, shards, about=about)
    world.barrier()
    return latents.read_manifest(out)


def _is_done(path: Path, job: dict[str, Any]) -> bool:
    """Whether the shard is whole; SitfastError where it belongs to another job."""
    if not path.exists():
        return False
    try:
        found = latents.read_shard(path).job
    except SitfastError:
        return False
    if found != job:
        changed = [f"{key}: {found.get(key)} → {job[key]}" for key in job if found.get(key) != job[key]]
        raise SitfastError(f"{path.parent} holds other latents ({'; '.join(changed)}); choose another --out")
    return True


def _encode_shards(
    cfg: Config,
    world: World,
    out: Path,
    numbers: list[int],
    *,
    source: data.Source,
    vae: AutoencoderVAE,
    text: TextEncoder | None,
    job: dict[str, Any],
) -> None:
    """Encode the shards `numbers`. The device works on one batch while the host stores the one before."""
    rows_of = {k: np.arange(k * job["shard_rows"], min((k + 1) * job["shard_rows"], source.num_rows)) for k in numbers}
    size = cfg.vae.batch_size
    chunks = [(rows[i : i + size],) * 2 for rows in rows_of.values() for i in range(0, len(rows), size)]
    batches = in_order(
        source, chunks, device=world.device, num_workers=cfg.data.num_workers, prefetch=cfg.data.prefetch
    )
    quarantine = Quarantine(out / "unreadable.txt", num_rows=source.num_rows, limit=cfg.data.max_unreadable)
    moments = _ahead(batches, vae, text, views=job["views"], quarantine=quarantine)
    nothing = Text(*(value[:0].cpu() for value in text([""]))) if text else None  # a shard may have no readable image
    started, encoded, cut = time.perf_counter(), 0, 0
    for done, (number, rows) in enumerate(rows_of.items(), start=1):
        stored = torch.empty((len(rows), job["views"], *job["shape"]), dtype=latents.DTYPES[job["dtype"]])
        texts: list[str] = []
        states = [nothing] if nothing else []
        labels, kept, count = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64), 0
        sums = torch.zeros(2, job["shape"][1], dtype=torch.float64, device=world.device)
        for _ in range(0, len(rows), size):
            values, y, index, captions, read = next(moments)
            texts += captions
            if text is not None and read is not None:
                states.append(Text(*(value.cpu() for value in read)))
                cut += len(text.tokenizer(captions).cut)
            here = slice(count, count + len(index))
            stored[here], labels[here], kept[here] = values.to(stored.dtype), y.cpu(), index.cpu()
            count += len(index)
            mean, std = values.double().unbind(2)
            sums += torch.stack([mean.sum((0, 1, 3, 4)), (mean**2 + std**2).sum((0, 1, 3, 4))])
        packed = _packed(states, stored.dtype) if states else None
        _check_finite(stored[:count], kept[:count], job["dtype"], packed)
        latents.write_shard(
            out,
            number,
            job=job,
            moments=stored[:count],
            labels=labels[:count],
            rows=kept[:count],
            sums=sums.tolist(),
            texts=texts if job["texts"] else None,
            states=packed,
        )
        encoded += count
        rate = encoded / (time.perf_counter() - started)
        note = f"; {cut} captions cut after {job['text']['length']} tokens" if cut else ""
        if world.is_main:
            print(f"shard {done} of {len(rows_of)} of this rank, {rate:,.0f} images/s{note}", flush=True)


def _packed(states: list[Text], dtype: torch.dtype) -> latents.States:
    """The states of the tokens alone, one text after another."""
    values = torch.cat([text.tokens[text.mask] for text in states]).to(dtype)
    counts = torch.cat([text.mask.sum(1) for text in states])
    return latents.States(values, counts.cumsum(0).numpy(), torch.cat([text.pooled for text in states]).to(dtype))


def _ahead(
    batches: Iterator[Any], vae: AutoencoderVAE, text: TextEncoder | None, *, views: int, quarantine: Quarantine
) -> Iterator[Any]:
    """(moments `[B, V, 2, C, h, w]`, labels, rows, texts, what `text` makes of these) of each batch.

    They are handed out once the next one is queued on the device.
    """
    waiting = None
    for batch, unreadable in batches:
        quarantine.add(unreadable)
        parts = [torch.stack(vae.moments(x), 1) for x in (batch.x, batch.x.flip(-1))[:views]] if len(batch.x) else []
        moments = torch.stack(parts, 1) if parts else _nothing(vae, views, batch)
        queued = moments, batch.y, batch.index, batch.captions, text(batch.captions) if text and parts else None
        if waiting is not None:
            yield waiting
        waiting = queued
    if waiting is not None:
        yield waiting


def _nothing(vae: AutoencoderVAE, views: int, batch: data.Batch) -> Tensor:
    return torch.empty(0, views, 2, vae.model.config.latent_channels, 1, 1, device=batch.y.device)


def _check_finite(stored: Tensor, rows: np.ndarray, dtype: str, states: latents.States | None) -> None:
    bad = ~stored.isfinite().flatten(1).all(dim=1)
    if bad.any():
        row = int(rows[int(bad.nonzero()[0])])
        other = "--dtype bf16, or " if dtype == "fp16" else ""
        raise SitfastError(
            f"{int(bad.sum())} images have latents that are not finite in {dtype} (first: row {row});"
            f" try {other}vae.precision=fp32"
        )
    if states is not None and not (states.values.isfinite().all() and states.pooled.isfinite().all()):
        other = "; try --dtype bf16" if dtype == "fp16" else ""
        raise SitfastError(f"the encoder of the texts made states that are not finite in {dtype}{other}")


def verify(out: Path) -> dict[str, Any]:
    """Read every shard that the manifest lists and compare sizes, counts and hashes; returns the manifest."""
    manifest = latents.read_manifest(out)
    for shard in latents.open_shards(out, manifest):
        latents.verify_shard(shard)
    return manifest


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sitfast.encode",
        description="Encode a data set with the VAE and write its latents.",
        epilog="settings that count are those of data, vae and train.device",
    )
    cli.add_config_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and their manifest")
    parser.add_argument("--dtype", choices=sorted(latents.DTYPES), default="fp16", help="of the stored moments")
    parser.add_argument("--shard-rows", type=int, help="rows a shard (default: 256 MiB of them)")
    parser.add_argument("--verify", action="store_true", help="only read what is there and compare its hashes")
    args = parser.parse_args(argv)
    if args.shard_rows is not None and args.shard_rows < 1:
        raise SitfastError(f"--shard-rows {args.shard_rows} must be at least 1")
    if args.verify:
        manifest = verify(args.out)
        print(f"{manifest['count']:,} latents in {len(manifest['shards'])} shards: all hashes as in the manifest")
        return 0
    cfg = config.load(args.config, args.overrides)
    with parallel.start(cfg) as world:
        manifest = encode(cfg, world, args.out, dtype=args.dtype, shard_rows=args.shard_rows)
        if world.is_main:
            _report(args.out, manifest)
    return 0


def _report(out: Path, manifest: dict[str, Any]) -> None:
    mean, std = manifest["channel_mean"], manifest["channel_std"]
    unreadable = f", {manifest['unreadable']} unreadable images left out" if manifest["unreadable"] else ""
    print(f"{manifest['count']:,} latents in {len(manifest['shards'])} shards{unreadable}")
    print(f"train with  data.source=latents data.path={out} data.image_size={manifest['image_size']}")
    shift, scale = (", ".join(f"{v:.6g}" for v in values) for values in (mean, [1 / s if s else 1.0 for s in std]))
    print(f"unit variance in each channel  vae.shift='[{shift}]' vae.scale='[{scale}]'")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
