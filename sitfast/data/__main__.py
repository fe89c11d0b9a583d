"""Look at the data: `python -m sitfast.data --config configs/b2.yaml [--bench]`, or the same under torchrun.

--bench measures each station of the road by itself, then the share of a step's time that training waits for data:

    decode     images/s of one process: read, decode and crop (for latents: gather)
    loader     images/s of all workers and ranks, batches on the device
    encode     images/s of the VAE on all ranks
    training   images/s of whole steps, and the share of their time spent waiting

Batches that the workers have ready when a measurement begins are taken out first: they would hide a slow loader.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from sitfast import cli, config, data, parallel
from sitfast.config import Config
from sitfast.data.loader import Loader
from sitfast.data.sampler import Order, held_out
from sitfast.parallel import World
from sitfast.trainer import Trainer
from sitfast.vae import build_vae

_WARM_UP = 5  # a step is recorded as a CUDA graph after three
# What a measurement leaves out of a run.
_QUIET = [
    "checkpoint.every=1000000000", "log.every=1000000000", "log.val_every=0", "sample.every=0", "log.tensorboard=false",
    "log.wandb=false", "log.trackio=false", "profile.start=null", "profile.stop=null", "profile.trace=false",
]  # fmt: skip


def per_second(run: Callable[[], int], *, seconds: float, device: torch.device) -> float:
    """How many a second: `run` says how many each call did."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - start)


def decode_rate(cfg: Config, source: data.Source, rows: np.ndarray, *, seconds: float) -> float:
    """Images/s of `load` in this process; for a mapped source, of `gather` a micro-batch at a time."""
    if isinstance(source, data.Mapped):
        order, size = source.order(len(rows), cfg.seed), cfg.data.batch_size
        starts = itertools.count(0, size)

        def run() -> int:
            source.gather(rows[order.rows(np.arange(size) + next(starts))], None)
            return size
    else:
        places = itertools.count()
        shuffled = Order(len(rows), cfg.seed)

        def run() -> int:
            try:
                source.load(int(rows[shuffled.rows(np.array([next(places)]))[0]]))
            except data.Unreadable:
                return 0
            return 1

    return per_second(run, seconds=seconds, device=torch.device("cpu"))


def loader_rate(cfg: Config, source: data.Source, rows: np.ndarray, world: World, *, seconds: float) -> float:
    """Images/s of the whole loader on all ranks."""
    loader = Loader(
        source,
        rows,
        data=cfg.data,
        seed=cfg.seed,
        consumed=0,
        accumulate=cfg.train.accumulate,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        quarantine=None,
    )
    try:
        _take_what_is_ready(lambda: next(loader), cfg)
        rate = per_second(lambda: len(next(loader).y), seconds=seconds, device=world.device)
    finally:
        loader.close()
    return _sum(rate, world)


def encode_rate(cfg: Config, source: data.Source, rows: np.ndarray, world: World, *, seconds: float) -> float:
    """Images/s of `vae.encode` on all ranks, one micro-batch again and again."""
    vae = build_vae(cfg.vae, device=world.device, seed=cfg.seed)
    size = cfg.data.batch_size // cfg.train.accumulate // world.size
    index = torch.arange(size)
    x = torch.stack([source.load(int(rows[i % min(len(rows), 16)]))[0] for i in range(size)])
    batch = data.Batch(x, index, index).to(world.device)
    for _ in range(_WARM_UP):
        vae.encode(batch.x, batch.index)

    def run() -> int:
        z = vae.encode(batch.x, batch.index)
        if z.is_cuda:
            torch.cuda.synchronize()
        return size

    return _sum(per_second(run, seconds=seconds, device=world.device), world)


def training_rate(cfg: Config, world: World, *, steps: int) -> tuple[float, float]:
    """(images/s, share of the time spent waiting for data) of `steps` steps."""
    trainer = Trainer(cfg, world)
    trainer._begin_window()
    try:
        _take_what_is_ready(trainer._next_batch, cfg, started=False)
        for _ in range(_WARM_UP):
            trainer.train_step()
        _synchronize(world)
        trainer._begin_window()
        start = time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        _synchronize(world)
        elapsed = time.perf_counter() - start
    finally:
        trainer.close()
    return steps * cfg.data.batch_size / elapsed, _sum(trainer.encoded.take_waited() / elapsed, world) / world.size


def _take_what_is_ready(take: Callable[[], object], cfg: Config, *, started: bool = True) -> None:
    for _ in range(cfg.data.num_workers * cfg.data.prefetch + _WARM_UP * started):
        take()


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()


def _sum(value: float, world: World) -> float:
    return float(world.mean(torch.tensor(value, dtype=torch.float64, device=world.device)).item()) * world.size


def bench(cfg: Config, world: World, *, seconds: float, steps: int) -> None:
    """Print the report, from rank 0."""
    source = data.build_source(cfg.data)
    rows, _ = held_out(source.num_rows, cfg.data.val_samples)

    def say(name: str, rate: float, about: str) -> None:
        if world.is_main:
            print(f"{name:<10}{rate:12,.0f} images/s   {about}", flush=True)

    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    workers = f"{cfg.data.num_workers} workers" if cfg.data.num_workers else "no workers"
    say("decode", decode_rate(cfg, source, rows, seconds=seconds), "one process")
    loader = loader_rate(cfg, source, rows, world, seconds=seconds)
    say("loader", loader, f"{ranks}, {workers} each, {cfg.data.decoder}")
    if cfg.vae.id is not None:
        say("encode", encode_rate(cfg, source, rows, world, seconds=seconds), f"{ranks}, {cfg.vae.precision}")
    if steps:
        rate, waiting = training_rate(cfg, world, steps=steps)
        say("training", rate, f"{steps} steps; {waiting:.1%} of the time spent waiting for data")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sitfast.data", description="Look at a data set, and measure it.")
    cli.add_config_arguments(parser)
    parser.add_argument("--bench", action="store_true", help="measure decode, loader, encode and the wait of training")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    parser.add_argument("--steps", type=int, default=50, help="training steps to measure; 0 leaves training out")
    args = parser.parse_args(argv)
    cfg = config.one_stage(config.load(args.config, args.overrides), "sitfast.data")
    with parallel.start(cfg) as world:
        config.check_world(cfg, world.size)
        if world.is_main:
            source = data.build_source(cfg.data)
            print(
                f"{cfg.data.source}: {source.num_rows:,} rows in {source.num_classes:,} classes, "
                f"{source.image_size} {'genes' if cfg.data.source == 'genes' else 'px'}, "
                f"{cfg.data.val_samples:,} held out"
            )
        if args.bench:
            with tempfile.TemporaryDirectory() as folder:
                overrides = [*args.overrides, *_QUIET, f"output_dir={folder}", f"train.steps={10**9}"]
                bench(
                    config.one_stage(config.load(args.config, overrides), "sitfast.data"),
                    world,
                    seconds=args.seconds,
                    steps=args.steps,
                )
    return 0


if __name__ == "__main__":
    cli.run(main)
