"""Processes and devices: who am I, how is the model wrapped, what do the ranks agree on.

    torchrun --nproc-per-node G -m sitfast.train …        G processes, one a GPU (or G CPU processes with gloo)

The model passes through three layers, in this order: activation checkpointing of each block → torch.compile of each block
→ data parallelism over the whole. State-dict keys stay the official ones throughout.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sitfast.config import Config
from sitfast.errors import SitfastError


@dataclass(frozen=True)
class World:
    """This process among its peers. `host_group` reduces over CPUs, without touching the GPU's queue."""

    rank: int
    size: int
    device: torch.device
    host_group: Any = None  # a dist.ProcessGroup; None is the default one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, the same on each."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. A message between CPUs: no GPU is waited for."""
        if self.size == 1:
            return flag
        vote = torch.tensor([int(flag)])
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(vote.item())

    def barrier(self) -> None:
        """Wait for all ranks, on the CPUs."""
        self.any(False)


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device for `train.device`: "auto" takes a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SitfastError("train.device=cuda, and PyTorch sees no GPU; try train.device=cpu or check nvidia-smi")
    if local_rank >= torch.cuda.device_count():
        raise SitfastError(
            f"local rank {local_rank} has no GPU of its own, of {torch.cuda.device_count()};"
            f" try torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def start(cfg: Config) -> Iterator[World]:
    """Join the processes that torchrun started (or stand alone) and leave them at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = resolve_device(cfg.train.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    backend = cfg.parallel.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type == "cpu":
        raise SitfastError("parallel.backend=nccl needs GPUs and train.device=cpu; try parallel.backend=gloo")
    timeout = timedelta(seconds=cfg.parallel.timeout_s)
    dist.init_process_group(backend, timeout=timeout)
    try:
        host_group = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        yield World(rank, size, device, host_group)
    finally:
        gc.collect()  # DistributedDataParallel refers to itself; left for exit, it can abort the process there
        dist.destroy_process_group()


def prepare_blocks(blocks: nn.ModuleList, *, activation_checkpoint: str, compiled: bool) -> None:
    """Checkpoint and compile each block in place. Blocks share their code, so the compiler works once for all."""
    for block in blocks:
        if activation_checkpoint == "block":
            block.forward = _recomputed(block.forward)
        if compiled:
            block.compile()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with its activations computed again in the backward pass. A function, not a partial: Dynamo needs a frame."""

    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def data_parallel(model: nn.Module, world: World) -> nn.Module:
    """Replicate over ranks: gradients are averaged while the backward pass still runs."""
    if world.size == 1:
        return model
    ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_reduction(network: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Around every micro-batch but the last: gradients add up locally and are reduced once."""
    if skip and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return nullcontext()


class StopRequest:
    """SIGTERM and SIGINT ask for a save and a clean exit; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
