"""From global sample indices to batches on the device, decoded in worker processes.

    sample(index) = flip_{seed, index}(source.load(rows[order(index)]))

is a pure function of (seed, index): the main process says which indices make a micro-batch, so that the number of
workers changes how fast samples come, never which. An unreadable row is replaced by the first readable one after it,
which depends on nothing but the index either; the main process notes it in the quarantine.
"""

from __future__ import annotations

import signal
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sitfast import philox
from sitfast.data import Batch, Source, Unreadable
from sitfast.data.quarantine import Quarantine
from sitfast.data.sampler import Order, micro_batches
from sitfast.errors import SitfastError

if TYPE_CHECKING:
    from sitfast.config import DataConfig

# A signal to the whole process group is for the main process, which finishes its step and saves; workers ignore it.
_FOR_MAIN = (signal.SIGINT, signal.SIGTERM)


class Loader:
    """An endless iterator of this rank's micro-batches, on the device, from the sample after `consumed` on."""

    def __init__(
        self,
        source: Source,
        rows: NDArray[np.int64],
        *,
        data: DataConfig,
        seed: int,
        consumed: int,
        accumulate: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        quarantine: Path | None,
    ) -> None:
        self.device = torch.device(device)
        self._quarantine = Quarantine(quarantine, num_rows=source.num_rows, limit=data.max_unreadable)
        patience = min(len(rows), int(data.max_unreadable * source.num_rows) + 1)  # so many failures exceed the limit
        indices = micro_batches(
            consumed, batch_size=data.batch_size, accumulate=accumulate, rank=rank, world_size=world_size
        )
        loader: DataLoader[_Loaded] = DataLoader(
            _Reader(source, rows, seed=seed, flip=data.flip, patience=patience),
            batch_size=None,  # the sampler's items are whole micro-batches
            sampler=indices,  # pyright: ignore[reportArgumentType]  any iterable will do
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch if data.num_workers else None,
            worker_init_fn=_start_worker,
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]  with batch_size=None it gets one item, not a list
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the DataLoader draws a seed nobody uses; not from the global generator
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_MAIN)  # a worker inherits the mask from its first moment
        try:
            self._batches: Iterator[_Loaded] = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.close = weakref.finalize(self, _shut_down, self._batches)  # runs once: here, or when Python exits

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        try:
            loaded = next(self._batches)
            return self._take(loaded).to(self.device)
        except SitfastError:
            self.close()
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            raise SitfastError(
                "a data worker process ended without a word, most likely killed for want of memory or of shared memory "
                "(/dev/shm); lower data.num_workers or data.prefetch, or enlarge the memory"
            ) from error

    @property
    def unreadable(self) -> int:
        """How many different images were unreadable so far, over restarts."""
        return len(self._quarantine)

    def _take(self, loaded: _Loaded) -> Batch:
        self._quarantine.add(loaded.unreadable)
        if loaded.failure:
            raise SitfastError(loaded.failure) from (RuntimeError(loaded.detail) if loaded.detail else None)
        return Batch(loaded.x, loaded.y, loaded.index, tuple(dict(loaded.unreadable)))


def fixed_batches(
    source: Source, rows: NDArray[np.int64], *, batch_size: int, device: torch.device | str
) -> Iterator[Batch]:
    """Every row once, in order and unflipped, as validation needs it; `index` is the position in `rows`.

    Unreadable rows are left out (and named in `skipped`), so that every other row keeps its index.
    """
    for start in range(0, len(rows), batch_size):
        loaded: list[tuple[Tensor, int, int]] = []
        skipped: list[str] = []
        for position in range(start, min(start + batch_size, len(rows))):
            try:
                loaded.append((*source.load(int(rows[position])), position))
            except Unreadable as error:
                skipped.append(error.name)
        if loaded:
            images, labels, positions = zip(*loaded, strict=True)
            batch = Batch(torch.stack(images), torch.tensor(labels), torch.tensor(positions), tuple(skipped))
            yield batch.to(device)


class _Loaded(NamedTuple):
    """What a worker hands back: a micro-batch, or why there is none."""

    x: Tensor
    y: Tensor
    index: Tensor
    unreadable: list[tuple[str, str]]
    failure: str = ""
    detail: str = ""


class _Failed(Exception):
    """No row could stand in for an unreadable one."""


class _Reader(Dataset):
    """Reads one micro-batch, given its global sample indices. It keeps no state, so every worker answers alike."""

    def __init__(self, source: Source, rows: NDArray[np.int64], *, seed: int, flip: bool, patience: int) -> None:
        self.source = source
        self.rows = rows
        self.seed = seed
        self.flip = flip
        self.patience = patience
        self.order = Order(len(rows), seed)

    def __getitem__(self, indices: list[int]) -> _Loaded:
        index = torch.tensor(indices)
        unreadable: list[tuple[str, str]] = []
        failure, detail = "", ""
        try:
            x, y = self._read(index, unreadable)
            return _Loaded(x, y, index, unreadable)
        except _Failed:
            failure = f"none of the {len(self.rows)} images can be read (latest: {': '.join(unreadable[-1])})"
        except SitfastError as error:
            failure = str(error)
        except Exception as error:  # it must reach the main process as one line; the traceback rides along as its cause
            failure = f"reading the data failed: {type(error).__name__}: {' '.join(str(error).split())}"
            detail = traceback.format_exc()
        none = torch.empty(0)
        return _Loaded(none, none, index, unreadable, failure, detail)

    def _read(self, index: Tensor, unreadable: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(
            *(self._load(int(position), unreadable) for position in self.order.rows(index.numpy())), strict=True
        )
        x = torch.stack(images)
        if self.flip:
            mirrored = philox.uniform(self.seed, index, philox.Stream.FLIP) < 0.5
            x[mirrored] = x[mirrored].flip(-1)
        return x, torch.tensor(labels)

    def _load(self, position: int, unreadable: list[tuple[str, str]]) -> tuple[Tensor, int]:
        """The row at `position`, or the first readable one after it."""
        for offset in range(self.patience):
            try:
                return self.source.load(int(self.rows[(position + offset) % len(self.rows)]))
            except Unreadable as error:
                unreadable.append((error.name, error.reason))
        raise _Failed


def _start_worker(worker_id: int) -> None:
    for number in _FOR_MAIN:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _shut_down(batches: Any) -> None:
    """Ends the workers, by force where they do not end by themselves (they ignore SIGTERM)."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()


def _as_it_is(loaded: _Loaded) -> _Loaded:
    return loaded
