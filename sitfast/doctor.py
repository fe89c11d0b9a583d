"""Is this machine, or this cluster, fit for the run? `python -m sitfast.doctor --config configs/xl2.yaml …`, or under torchrun.

    the same command line as sitfast.train, before the first step: versions and driver, GPUs and what else uses them,
    how fast ranks add numbers up together, disk speed and space against the size of a checkpoint, whether all ranks see
    one output folder, the data, which kernels run, and the predicted memory

Prints one line a check, `ok`, `note` or `FAIL` with a remedy; exit status 1 if anything failed on any rank.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sitfast import checkpoint_storage, cli, config, data, growing, memory, metrics, parallel
from sitfast.config import Config
from sitfast.errors import SitfastError
from sitfast.kernels.attention import describe as describe_attention
from sitfast.kernels.cross_attention import describe as describe_cross_attention
from sitfast.kernels.mlp import describe as describe_mlp
from sitfast.model import SiT, build_model, count_parameters
from sitfast.parallel import World
from sitfast.text import text_shape

GIB = 2**30
_STEADY_S = 0.5  # how long each bandwidth is measured


class Finding(NamedTuple):
    level: str  # ok, note or FAIL
    name: str
    text: str


def versions(world: World) -> Iterator[Finding]:
    text = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}"
    if world.device.type == "cuda":
        from torch.cuda import nccl

        text += f", CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, nccl.version()))}"
    yield Finding("ok", "versions", text)


def gpus(world: World) -> Iterator[Finding]:
    """The GPU of this rank: which, how much of it is free, and whether its tensor cores and kernels are known."""
    if world.device.type == "cpu":
        yield Finding("note", "gpu", f"none: training runs on the CPU with {torch.get_num_threads()} threads a rank")
        return
    properties = torch.cuda.get_device_properties(world.device)
    free, total = torch.cuda.mem_get_info(world.device)
    text = f"{properties.name}, {total / GIB:.1f} GiB, sm_{properties.major}{properties.minor}"
    if properties.major < 8:
        yield Finding(
            "FAIL", "gpu", f"{text}: bf16 and the kernels need Ampere (sm_80) or newer; use train.precision=fp32"
        )
    elif total - free > 2 * GIB:
        used = f"{(total - free) / GIB:.1f} GiB are in use by others"
        yield Finding("FAIL", "gpu", f"{text}, {used}; see nvidia-smi and end those processes")
    else:
        yield Finding("ok", "gpu", f"{text}, {free / GIB:.1f} GiB free")


def all_reduce(world: World) -> Iterator[Finding]:
    """Whether sums over the ranks are right, and bytes a second that each rank sends (bus bandwidth, as NCCL counts it)."""
    if world.size == 1:
        yield Finding(
            "note", "all-reduce", "one rank; start the doctor with the torchrun line of the run to test the network"
        )
        return
    count = (64 if world.device.type == "cuda" else 1) * 2**20
    values = torch.full((count,), float(world.rank + 1), device=world.device)
    dist.all_reduce(values)
    if not bool((values == world.size * (world.size + 1) / 2).all()):
        yield Finding(
            "FAIL", "all-reduce", "the sum over the ranks is wrong; try NCCL_P2P_DISABLE=1 to find the faulty link"
        )
        return
    synchronize(world)
    rounds, start = 0, time.perf_counter()
    while world.most(int(time.perf_counter() - start < _STEADY_S)):
        for _ in range(5):
            dist.all_reduce(values)
        synchronize(world)
        rounds += 5
    seconds = (time.perf_counter() - start) / rounds
    speed = 2 * (world.size - 1) / world.size * count * 4 / seconds
    text = f"{world.size} ranks, {count * 4 / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms: {speed / 1e9:.1f} GB/s a rank"
    slow = world.device.type == "cuda" and speed < 10e9
    remedy = "; slow: check that NVLink or InfiniBand is used (NCCL_DEBUG=INFO)" if slow else ""
    yield Finding("note" if slow else "ok", "all-reduce", text + remedy)


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def output_folder(cfg: Config, world: World, model: SiT | None) -> Iterator[Finding]:
    """Whether all ranks can write into one folder, how fast, and how many checkpoints it has room for."""
    folder, problem, speed = Path(cfg.output_dir), "", 0.0
    token = world.share(f".doctor-{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        speed = write_speed(folder / f"{token}-{world.rank}")
        if world.is_main:
            (folder / token).write_text("")
    except OSError as error:
        problem = f"{folder} cannot be written to ({error.strerror}); choose another output_dir"
    world.barrier()
    if not problem and not appears(folder / token):
        problem = (
            f"{folder} on {socket.gethostname()} is not the folder that rank 0 sees, or that failed; use a shared disk"
        )
    world.barrier()
    if world.is_main:
        with contextlib.suppress(OSError):
            (folder / token).unlink()
    if problem:
        yield Finding("FAIL", "output", problem)
        return
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {speed / 1e9:.2f} GB/s a rank, {free / GIB:.0f} GiB free"
    if model is None:
        yield Finding("ok", "output", text)
        return
    size = (1 + 2 + len(cfg.ema.decays)) * 4 * count_parameters(model)
    needed = (cfg.checkpoint.keep + 1) * size
    text += f"; a checkpoint has {size / GIB:.1f} GiB and takes {size / speed / world.size:.0f} s behind the training"
    if free < needed:
        rule = f"checkpoint.keep={cfg.checkpoint.keep} needs {needed / GIB:.0f} GiB"
        yield Finding("FAIL", "output", f"{text}; {rule}: free some space or lower checkpoint.keep")
    else:
        yield Finding("ok", "output", text)


def appears(file: Path) -> bool:
    """Whether a file that another rank has written can be seen; network file systems may take a few seconds."""
    deadline = time.monotonic() + 5
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return file.exists()


def write_speed(file: Path) -> float:
    """Bytes a second that reach the disk."""
    block, written = torch.zeros(16 * 2**20, dtype=torch.uint8), 0
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        start = time.perf_counter()
        while time.perf_counter() - start < _STEADY_S / 2:
            checkpoint_storage.write_at(descriptor, block, written)
            written += block.numel()
        os.fsync(descriptor)
        return written / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
        file.unlink()


def rows(cfg: Config) -> Iterator[Finding]:
    """Whether the data can be read, and how fast one process reads it."""
    try:
        source = data.build_source(cfg.data)
        start, count = time.perf_counter(), 0
        while count < min(64, source.num_rows) and time.perf_counter() - start < _STEADY_S:
            with contextlib.suppress(data.Unreadable):
                source.load(count * (source.num_rows // 64 or 1) % source.num_rows)
            count += 1
        speed = count / (time.perf_counter() - start)
    except SitfastError as error:
        yield Finding("FAIL", "data", str(error))
        return
    except Exception as error:  # whatever a source stumbles over, the other checks go on
        yield Finding("FAIL", "data", f"{type(error).__name__}: {error}")
        return
    total = speed * max(1, cfg.data.num_workers)
    text = f"{source.num_rows:,} rows of {source.num_classes} classes; a rank reads about {total:.0f} images/s"
    level = "ok" if source.num_classes <= cfg.model.num_classes else "FAIL"
    more = "" if level == "ok" else f"; use model.num_classes={source.num_classes}"
    yield Finding(level, "data", text + more)


def kernels(cfg: Config, world: World, model: SiT) -> Iterator[Finding]:
    if world.device.type == "cpu":
        yield Finding("note", "kernels", "PyTorch: there are none of our own for the CPU")
        return
    width, tokens = model.config["hidden_size"], model.num_tokens
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.train.precision, torch.float32)
    images = cfg.data.batch_size // world.size // cfg.train.accumulate
    mlp = describe_mlp(images * tokens, width, int(width * model.config["mlp_ratio"]), dtype, world.device)
    head = width // model.config["num_heads"]
    attention = describe_attention(tokens, head, dtype, world.device)
    if text := model.config["text"]:
        attention += f"; to captions: {describe_cross_attention(tokens, text['length'], head, dtype, world.device)}"
    yield Finding("ok", "kernels", f"layer norm: Triton; feed-forward: {mlp}; attention: {attention}")
    if metrics.peak_flops(torch.cuda.get_device_name(world.device)) is None:
        yield Finding("note", "kernels", "the peak of this GPU is not known: the log shows no mfu")


def predicted(cfg: Config, world: World, model: SiT) -> Iterator[Finding]:
    prediction, total = memory.predict(cfg, model, world.size), memory.capacity(world.device)
    if total is None:
        yield Finding("note", "memory", str(prediction))
    elif prediction.total + memory.RESERVE <= total:
        yield Finding("ok", "memory", f"{prediction} of {total / GIB:.1f}")
    elif cfg.train.auto_accumulate:
        count = memory.fitting_accumulate(cfg, model, world.size, total)
        yield Finding("note", "memory", f"{prediction} of {total / GIB:.1f}; train.accumulate will be {count}")
    else:
        how = memory.remedies(cfg, model, world.size, total)
        yield Finding("FAIL", "memory", f"{prediction} of {total / GIB:.1f}; {how}")


def describe_model(cfg: Config) -> SiT:
    """The model of the config without its weights; a VAE is taken to be one that shrinks 8 times to 4 channels."""
    genes = cfg.data.source == "genes"
    size = data.build_source(cfg.data).image_size if genes else cfg.data.image_size  # so many only the file knows
    shrink = 1 if cfg.vae.id is None else 8
    channels = (1 if cfg.data.source in ("digits", "genes") else 3) if cfg.vae.id is None else 4
    text = text_shape(cfg.text)
    with torch.device("meta"):
        return build_model(
            genes=genes,
            input_size=size // shrink,
            in_channels=channels,
            text=text,
            **cfg.model.model_dump(exclude={"init_from"}, exclude_none=True),
        )


def examine(cfg: Config, world: World) -> list[Finding]:
    """All checks of this rank. Every rank runs the same ones in the same order: some need all.

    Of a run in stages the last one is examined, and the memory of each is predicted.
    """
    found: list[Finding] = []
    whole, cfg = cfg, config.stage_configs(cfg)[-1]

    def check(name: str, of: Callable[..., Iterator[Finding]], *arguments: Any) -> None:
        try:
            found.extend(of(*arguments))
        except SitfastError as error:
            found.append(Finding("FAIL", name, str(error)))

    model: SiT | None = None
    check("versions", versions, world)
    check("gpu", gpus, world)
    check("all-reduce", all_reduce, world)
    try:
        growing.each(whole, lambda stage: config.check_world(stage, world.size))
        parallel.shard_size(cfg.parallel, world.size)
        model = describe_model(cfg)
        name = cfg.model.preset or "SiT"
        found.append(Finding("ok", "config", f"{name}, {metrics.format_count(count_parameters(model))} parameters"))
    except SitfastError as error:
        found.append(Finding("FAIL", "config", str(error)))
    check("output", output_folder, cfg, world, model)
    check("data", rows, cfg)
    if model is not None:
        check("kernels", kernels, cfg, world, model)
        check("memory", predicted, cfg, world, model)
        for stage in config.stage_configs(whole)[:-1]:
            check("memory", predicted, stage, world, describe_model(stage))
    return found


def report(everyone: list[list[Finding]]) -> int:
    """Print what rank 0 found and what others found otherwise; the number of failures."""
    failures = 0
    for rank, found in enumerate(everyone):
        for finding in found:
            if rank and finding.level != "FAIL":
                continue
            failures += finding.level == "FAIL"
            where = f"rank {rank}: " if len(everyone) > 1 and finding.level == "FAIL" else ""
            print(f"{finding.level:<4}  {finding.name:<10}  {where}{finding.text}")
    if len(everyone) > 1:
        print(f"{len(everyone)} ranks examined; what is ok is shown for rank 0")
    print(f"{failures} checks failed" if failures else "nothing stands in the way")
    return failures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sitfast.doctor", description="Check a machine or cluster for a run."
    )
    cli.add_config_arguments(parser)
    args = parser.parse_args(argv)
    cfg = config.load(args.config, args.overrides)
    with parallel.start(cfg) as world:
        found = examine(cfg, world)
        everyone: list[Any] = [found]
        if world.size > 1:
            everyone = [None] * world.size
            dist.all_gather_object(everyone, found, group=world.host_group)
        failures = report(everyone) if world.is_main else sum(f.level == "FAIL" for part in everyone for f in part)
    return 1 if failures else 0


if __name__ == "__main__":
    cli.run(main)
