"""Processes and devices: who am I, how is the model wrapped, what do the ranks agree on.

    torchrun --nproc-per-node G -m sitfast.train …        G processes, one a GPU (or G CPU processes with gloo)

The model passes through three layers, in this order: activation checkpointing of each block → torch.compile of each block
→ data parallelism. State-dict keys stay the official ones throughout.

    ddp     each rank holds all weights; gradients are averaged
    fsdp    each rank holds 1/n of weights, gradients, moments and averages; a block's weights are gathered when it runs
    hsdp    fsdp inside groups of shard_size ranks, ddp between the groups

Under fsdp and hsdp with bf16 the weights are gathered in bf16, activations are bf16 throughout, and the shards, their
gradients and the reduction are fp32; ddp has a bf16 copy of fp32 weights, see `precision`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sitfast import config
from sitfast.config import Config, ParallelConfig
from sitfast.errors import SitfastError
from sitfast.precision import WorkingCopy
from sitfast.watch import Watch

# What "selective" activation checkpointing keeps, by the start of the operator's name: matrix products and attention,
# which are most of a block's arithmetic. Norms, modulation and GELU are computed again.
_KEPT = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten._scaled_dot_product")
_KEPT += ("sitfast.linear", "sitfast.attention", "sitfast.cross_attention", "sitfast.mlp")

# DistributedDataParallel sends gradients off in buckets of this size, by default 25 MiB. A compiled block gives all of its
# gradients at once, 46 MiB of bf16 in SiT-XL/2; a smaller bucket overlaps no better and costs the host another reduction.
_BUCKET_MIB = 48
_LEAVE_S = 30  # after an error under NCCL, for the last words; then the system ends the process

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers. `host_group` reduces over CPUs, without touching the GPU's queue."""

    rank: int
    size: int
    device: torch.device
    host_group: Any = None  # a dist.ProcessGroup; None is the default one
    watch: Watch | None = None

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

    def most(self, vote: int) -> int:
        """The greatest number that any rank says. A message between CPUs: no GPU is waited for."""
        if self.size == 1:
            return vote
        votes = torch.tensor([vote])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(votes.item())

    def share(self, value: T) -> T:
        """What the main rank has as `value`; small things, between CPUs."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def at(self, step: int, doing: str) -> None:
        """Let the other ranks know where this one is, should it stay there."""
        if self.watch is not None:
            self.watch.at(step, doing)

    def failing(self) -> None:
        """Call where an error ends the run: torchrun's SIGTERM must not cut off the line that says why."""
        if self.watch is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def agree(self, what: str, mine: dict[str, Any]) -> None:
        """SitfastError on all ranks unless `mine` is the same on each; `what` it is stands in the message."""
        if self.size == 1:
            return
        text = json.dumps(mine, sort_keys=True, default=str)
        hashes: list[Any] = [None] * self.size
        dist.all_gather_object(hashes, hashlib.sha256(text.encode()).hexdigest(), group=self.host_group)
        other = next((rank for rank in range(self.size) if hashes[rank] != hashes[0]), None)
        if other is None:
            return
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, mine, group=self.host_group)
        first, second = everything[0], everything[other]
        different = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        named = "; ".join(f"{key}: {first.get(key)} on rank 0, {second.get(key)} on rank {other}" for key in different)
        raise SitfastError(f"the ranks have different {what} ({named}); give all of them the same")

    def barrier(self) -> None:
        """Wait for all ranks, on the CPUs."""
        self.most(0)


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
    if size == 1 and cfg.parallel.strategy == "ddp":
        yield World(rank, size, device)
        return
    backend = cfg.parallel.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type == "cpu":
        raise SitfastError("parallel.backend=nccl needs GPUs and train.device=cpu; try parallel.backend=gloo")
    timeout = timedelta(seconds=cfg.parallel.timeout_s)
    if size == 1:
        dist.init_process_group(backend, store=_own_store(), rank=0, world_size=1, timeout=timeout)
        watch = None
    else:
        watch = _join(backend, rank, size, cfg.parallel.timeout_s, device)
    world = World(rank, size, device, watch=watch)
    try:
        if backend != "gloo":
            world = replace(world, host_group=dist.new_group(backend="gloo", timeout=timeout))
        world.agree("settings or versions", config.flat(cfg) | {"torch": torch.__version__, "sitfast": _code()})
        yield world
    except Exception as error:
        world.failing()
        reason = error if watch is None else watch.judge(error)
        if backend == "gloo":  # with NCCL, leaving waits for collectives that will never end; the process ends instead
            _leave()
        else:
            _end_within(_LEAVE_S)
        if reason is error:
            raise
        raise reason from error
    else:
        if watch is not None:
            watch.leave()
        _leave()
    finally:
        if watch is not None:
            watch.close()


def _join(backend: str, rank: int, size: int, timeout_s: int, device: torch.device) -> Watch:
    """Meet the other ranks where the environment says, and form the default group with them; NCCL connects at once."""
    place = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    # Collectives between CPUs end first, at timeout_s: their errors reach Python, where NCCL ends the process.
    group_s = timeout_s if backend == "gloo" else timeout_s + 60
    try:
        # Other ranks are waited for here, not in torch, which would not say which are missing.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun keeps it
        patience = timedelta(seconds=timeout_s)
        tcp_store: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        store = tcp_store(address, port, is_master=keeper, timeout=patience, wait_for_workers=False)
        store = c10d.PrefixStore(assemble(store, rank, size, timeout_s), store)
        watch = Watch(c10d.PrefixStore("watch", store), rank=rank, size=size, timeout_s=timeout_s)
        group_store, timeout = c10d.PrefixStore("group", store), timedelta(seconds=group_s)
        own: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=timeout, **own)
    except (KeyError, ValueError, RuntimeError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise SitfastError(
            f"cannot meet the other ranks at {place} within parallel.timeout_s={timeout_s} ({cause}); check that all nodes"
            " are started with the same --nnodes, --rdzv-id and --rdzv-endpoint, and that this address can be reached"
        ) from error
    return watch


def _own_store() -> Any:
    """Where a process that has no peers meets itself."""
    return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def assemble(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """A name that the ranks of this start share and no earlier start had.

    torchrun keeps one store over its restarts, so that what dead ranks wrote is still there, their addresses too. Here
    each rank says a number of its own, and joins under the name that comes back together with it; so only a rank 0 that
    is alive can have sent it.
    """
    mine, name, late = uuid.uuid4().hex, uuid.uuid4().hex, []
    others = range(1, size)
    store.set(f"hello/{rank}", mine)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if rank:
            answer = _get(store, f"welcome/{rank}").split()
            if answer[:1] == [mine]:
                store.set(f"here/{rank}", answer[1])
                return answer[1]
        else:
            late = [other for other in others if _get(store, f"here/{other}") != name]
            if not late:
                return name
            for other in late:
                store.set(f"welcome/{other}", f"{_get(store, f'hello/{other}')} {name}")
        time.sleep(0.02)
    missing = f"ranks {', '.join(map(str, late[:8]))} of {size}" if late else "rank 0"
    raise RuntimeError(f"{missing} did not come")


def _get(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else "-"


def _leave() -> None:
    gc.collect()  # DistributedDataParallel refers to itself; left for exit, it can abort the process there
    dist.destroy_process_group()


def _end_within(seconds: int) -> None:
    """Let the system end this process then: a driver that waits for a broken collective can hold up the way out."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def _code() -> str:
    """A hash of this package's source: nodes may have different checkouts."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def prepare_blocks(blocks: nn.ModuleList, *, activation_checkpoint: str, compiled: bool, sizes: int = 1) -> None:
    """Checkpoint and compile each block in place. Blocks share their code, so the compiler works once for all.

    Images of several `sizes` have code for each, none for sizes in general.
    """
    if compiled:
        import torch._dynamo

        # It would cut the graph of a block where a bucket of DistributedDataParallel is full: the blocks are its parts.
        torch._dynamo.config.optimize_ddp = False
        if sizes > 1:
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * sizes)
    for block in blocks:
        if activation_checkpoint != "none":
            block.forward = _recomputed(block.forward, selective=activation_checkpoint == "selective")
        if compiled:
            block.compile()


def _recomputed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    """`forward` with its activations computed again in the backward pass. A function, not a partial: Dynamo needs a frame."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = _selective_contexts

    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return run


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_or_recompute)


def _keep_or_recompute(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator).startswith(_KEPT) else CheckpointPolicy.PREFER_RECOMPUTE


def device_mesh(cfg: ParallelConfig, world: World) -> DeviceMesh | None:
    """The ranks as a line (fsdp) or as groups × shards (hsdp); None under ddp."""
    if cfg.strategy == "ddp":
        return None
    if cfg.strategy == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shards = shard_size(cfg, world.size)
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard_size(cfg: ParallelConfig, world_size: int) -> int:
    """Ranks that share one copy of the weights."""
    if cfg.strategy != "hsdp":
        return world_size if cfg.strategy == "fsdp" else 1
    shards = cfg.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size % shards:
        raise SitfastError(
            f"parallel.shard_size={shards} does not divide world_size={world_size}: every group needs as many ranks;"
            f" try {max(n for n in range(1, shards) if world_size % n == 0)}"
        )
    return shards


def shard(model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool, dtype: torch.dtype | None) -> None:
    """Shard each block, then what is left, over the mesh, in place; `dtype` is that of gathered weights, None fp32.

    A block's weights are asked for before the block in front of it computes, so that they come in time even where the host
    is not ahead of the GPU; in the backward pass FSDP2 does so itself. The inputs are not cast: times must stay fp32 until
    they are sinusoids.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    # A block hands views on (its gate is a part of one output); nobody writes into them.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for module, reshard in _reshard_policy(model, reshard_after_forward):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    blocks: Any = model.blocks
    for module, following in zip([model, *blocks], blocks, strict=False):
        module.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


def _reshard_policy(model: nn.Module, reshard_after_forward: bool) -> Iterator[tuple[Any, bool]]:
    """The sharded modules, innermost first, and whether each is freed after its forward pass.

    The last block and the ends of the model are not: the backward pass begins with them.
    """
    blocks: Any = model.blocks
    for block in blocks:
        yield block, reshard_after_forward and block is not blocks[-1]
    yield model, False


def materialize(model: Any, device: torch.device) -> None:
    """Give the weights of a model on the meta device memory and their first values, shard by shard."""
    model.to_empty(device=device)
    model.initialize_weights()
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the first gathering settles where the shards lie in memory
            module.unshard()
            module.reshard()


@contextmanager
def gathered(model: nn.Module, cfg: ParallelConfig) -> Iterator[None]:
    """Inside, every rank holds the whole weights, so that ranks may run the model as often as each likes.

    Entering is a matter for all ranks. Weights changed before (an average put in their place) are seen inside.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    modules = list(_reshard_policy(model, cfg.reshard_after_forward))
    try:
        for module, _ in modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for module, reshard in modules:
            module.set_reshard_after_forward(reshard, recurse=False)
            module.reshard()


def data_parallel(model: nn.Module, world: World, copy: WorkingCopy | None = None) -> nn.Module:
    """What to run: the model, or the copy that computes in its place, replicated over ranks.

    Gradients are averaged while the backward pass still runs. A sharded model does so itself.
    """
    network = copy.network if copy else model
    if world.size == 1 or isinstance(model, FSDPModule):
        return network
    ids = [world.device] if world.device.type == "cuda" else None
    replicated = DistributedDataParallel(
        network, device_ids=ids, gradient_as_bucket_view=True, bucket_cap_mb=_BUCKET_MIB, broadcast_buffers=False
    )
    replicated._set_ddp_runtime_logging_sample_rate(
        2**30
    )  # its statistics wait for the GPU, every 100 steps by default
    if copy:
        replicated.register_comm_hook(None, copy.reduction(world.size))
    return replicated


def no_reduction(network: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Around every micro-batch but the last: gradients add up locally and are reduced once."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not skip)
        network.set_is_last_backward(not skip)
    elif skip and isinstance(network, DistributedDataParallel):
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
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
