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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sitfast import philox
from sitfast.data import Batch, Captioned, Encoded, Mapped, Source, Unreadable
from sitfast.data.buckets import Buckets
from sitfast.data.image import Crop, EncodedImages, Size
from sitfast.data.quarantine import Quarantine
from sitfast.data.sampler import BlockOrder, Order, Sized, micro_batches, sized_batches
from sitfast.errors import SitfastError
from sitfast.text import Text, Tokenizer

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
        step: int = 0,
        buckets: Buckets | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`step` is the update that begins there, and `buckets` the sizes of the batches; None is data.batch_size images
        of the source's own size."""
        self.device = torch.device(device)
        self._quarantine = Quarantine(quarantine, num_rows=source.num_rows, limit=data.max_unreadable)
        patience = min(len(rows), int(data.max_unreadable * source.num_rows) + 1)  # so many failures exceed the limit
        share = {"accumulate": accumulate, "rank": rank, "world_size": world_size}
        indices = micro_batches(consumed, batch_size=data.batch_size, **share)
        if buckets is not None and buckets.several:
            indices = sized_batches(buckets, step, consumed, **share)
        settings: dict[str, Any] = {"seed": seed, "flip": data.flip, "random_crop": data.crop == "random"}
        settings |= {"patience": patience, "tokenizer": tokenizer}
        reader = Reader(source, rows, **settings)
        if data.decoder == "dali":
            from sitfast.data import dali

            encoded = dali.EncodedReader(source, rows, **settings)
            read = _start(encoded, indices, num_workers=data.num_workers, prefetch=data.prefetch, pin=False)
            self._batches: Iterator[Loaded] = dali.Decoder(
                read,
                reader,
                size=source.image_size,
                batch_size=data.batch_size // accumulate // world_size,
                device=self.device,
                num_threads=data.decoder_threads,
                hw_decoder_load=data.hw_decoder_load,
            )
        else:
            pin = self.device.type == "cuda"
            read = self._batches = _start(
                reader, indices, num_workers=data.num_workers, prefetch=data.prefetch, pin=pin
            )
        self.close = weakref.finalize(self, _shut_down, read)  # runs once: here, or when Python exits

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        try:
            loaded = _next(self._batches)
            self._quarantine.add(loaded.unreadable)
            return loaded.batch().to(self.device)
        except SitfastError:
            self.close()
            raise

    @property
    def unreadable(self) -> int:
        """How many different images were unreadable so far, over restarts."""
        return len(self._quarantine)


def fixed_batches(
    source: Source, rows: NDArray[np.int64], *, batch_size: int, device: torch.device | str
) -> Iterator[Batch]:
    """Every row once, in order and unflipped, as validation needs it; `index` is the position in `rows`.

    Unreadable rows are left out (and named in `skipped`), so that every other row keeps its index.
    """
    chunks = [
        (np.arange(start, min(start + batch_size, len(rows))), rows[start : start + batch_size])
        for start in range(0, len(rows), batch_size)
    ]
    for batch, _ in in_order(source, chunks, device=device):
        if len(batch.x):
            yield batch


def in_order(
    source: Source,
    chunks: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    *,
    device: torch.device | str,
    num_workers: int = 0,
    prefetch: int = 2,
) -> Iterator[tuple[Batch, list[tuple[str, str]]]]:
    """One batch for each chunk (index, rows), unflipped, without its unreadable rows; those as (name, reason) beside it.

    A batch may be empty. The workers end with the iterator.
    """
    pin = torch.device(device).type == "cuda"
    batches = _start(_Chunks(source), chunks, num_workers=num_workers, prefetch=prefetch, pin=pin)
    try:
        for _ in chunks:
            loaded = _next(batches)
            yield loaded.batch().to(device), loaded.unreadable
    finally:
        _shut_down(batches)


class Loaded(NamedTuple):
    """What a worker hands back: a micro-batch, or why there is none."""

    x: Any  # pixels or moments, a Tensor; or what is yet to be decoded
    y: Tensor
    index: Tensor
    unreadable: list[tuple[str, str]]
    failure: str = ""
    detail: str = ""
    captions: tuple[str, ...] = ()
    text: Text | None = None
    cut: tuple[str, ...] = ()

    def batch(self) -> Batch:
        if self.failure:
            raise SitfastError(self.failure) from (RuntimeError(self.detail) if self.detail else None)
        return Batch(self.x, self.y, self.index, tuple(dict(self.unreadable)), self.captions, self.text, self.cut)


class _Answering(Dataset):
    """Reads one batch; whatever goes wrong travels to the main process as one line, its traceback with it."""

    def __getitem__(self, item: Any) -> Loaded:
        unreadable: list[tuple[str, str]] = []
        failure, detail = "", ""
        try:
            return self.read(item, unreadable)
        except SitfastError as error:
            failure = str(error)
        except Exception as error:
            failure = f"reading the data failed: {type(error).__name__}: {' '.join(str(error).split())}"
            detail = traceback.format_exc()
        none = torch.empty(0)
        return Loaded(none, none, none, unreadable, failure, detail)

    def read(self, item: Any, unreadable: list[tuple[str, str]]) -> Loaded:
        """(name, reason) of what could not be read is added to `unreadable`."""
        raise NotImplementedError


class Reader(_Answering):
    """A micro-batch, given its global sample indices, and the size of its images where that varies. Every worker answers
    alike."""

    def __init__(
        self,
        source: Source,
        rows: NDArray[np.int64],
        *,
        seed: int,
        flip: bool,
        random_crop: bool,
        patience: int,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.source = source
        self.rows = rows
        self.seed = seed
        self.flip = flip
        self.random_crop = random_crop
        self.patience = patience
        self.tokenizer = tokenizer
        self.mapped = source if isinstance(source, Mapped) else None
        self.size: Size | None = None  # of the images of this micro-batch; None: the source's own
        self.begun = False  # whether this process has asked the disk for the first window
        self.order = self.mapped.order(len(rows), seed) if self.mapped else Order(len(rows), seed)

    def read(self, item: list[int] | Sized, unreadable: list[tuple[str, str]]) -> Loaded:
        item, self.size = item if isinstance(item, Sized) else (item, None)
        index = torch.tensor(item)
        positions = self.order.rows(index.numpy())
        mirrored = philox.uniform(self.seed, index, philox.Stream.FLIP) < 0.5 if self.flip else None
        if self.mapped and isinstance(self.order, BlockOrder):
            if not self.begun:
                self.mapped.read_ahead(self.rows[self.order.window_of(item[0])])
            self.begun = True
            self.mapped.read_ahead(self.rows[self.order.ahead(index.numpy())])
            rows = self.rows[positions]
            loaded = Loaded(*self.mapped.gather(rows, mirrored), index, unreadable)
            return _with_texts(loaded, self.source, rows, self.tokenizer)
        crops: list[Crop | None] = [None] * len(item)
        if self.random_crop:
            crops = [Crop(*draw) for draw in philox.uniform(self.seed, index, philox.Stream.CROP, 3).tolist()]
        each = [self._load(*one, unreadable) for one in zip(positions, crops, strict=True)]
        images, labels, rows = zip(*each, strict=True)
        loaded = Loaded(self.collate(images, mirrored), torch.tensor(labels), index, unreadable)
        return _with_texts(loaded, self.source, rows, self.tokenizer)

    def fetch(self, row: int, crop: Crop | None) -> tuple[Any, int]:
        """One row of the source; `Unreadable` where that fails."""
        source = self.source
        return source.load(row, crop, self.size) if isinstance(source, EncodedImages) else source.load(row)

    def collate(self, images: tuple[Any, ...], mirrored: Tensor | None) -> Any:
        """What `fetch` gave for each place of a micro-batch as one, mirrored where `mirrored` `[B]` says so."""
        x = torch.stack(images)
        if mirrored is not None:
            x[mirrored] = x[mirrored].flip(-1)
        return x

    def _load(self, position: np.int64, crop: Crop | None, unreadable: list[tuple[str, str]]) -> tuple[Any, int, int]:
        """(image, label, row) of the row at `position`, or of the first readable one after it."""
        for offset in range(self.patience):
            row = int(self.rows[(int(position) + offset) % len(self.rows)])
            try:
                return *self.fetch(row, crop), row
            except Unreadable as error:
                unreadable.append((error.name, error.reason))
        latest = ": ".join(unreadable[-1])
        raise SitfastError(f"none of the {len(self.rows)} images can be read (latest: {latest})")


class _Chunks(_Answering):
    """The readable rows of a chunk (index, rows)."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, item: tuple[NDArray[np.int64], NDArray[np.int64]], unreadable: list[tuple[str, str]]) -> Loaded:
        images: list[Tensor] = []
        labels: list[int] = []
        index: list[int] = []
        rows: list[int] = []
        for number, row in zip(*item, strict=True):
            try:
                image, label = self.source.load(int(row))
            except Unreadable as error:
                unreadable.append((error.name, error.reason))
            else:
                images.append(image)
                labels.append(label)
                index.append(int(number))
                rows.append(int(row))
        x = torch.stack(images) if images else torch.empty(0)
        y, numbers = (torch.tensor(values, dtype=torch.int64) for values in (labels, index))
        return _with_texts(Loaded(x, y, numbers, unreadable), self.source, rows, None)


def _with_texts(loaded: Loaded, source: Source, rows: Iterable[int], tokenizer: Tokenizer | None) -> Loaded:
    """With the captions of `rows` where the source has any, and the states that it holds of them, or else their tokens."""
    if not (isinstance(source, Captioned) and source.captioned):
        return loaded
    numbers = [int(row) for row in rows]
    captions = tuple(map(source.caption, numbers))
    text, cut = None, ()
    if isinstance(source, Encoded) and source.serves_states:
        text = source.states(numbers)
    elif tokenizer:
        text, cut = tokenizer(captions)
    return loaded._replace(captions=captions, text=text, cut=cut)


def _start(
    dataset: _Answering, items: Iterable[Any], *, num_workers: int, prefetch: int, pin: bool
) -> Iterator[Loaded]:
    """The answers to `items`, in their order, from worker processes that are running when this returns."""
    loader: DataLoader[Loaded] = DataLoader(
        dataset,
        batch_size=None,  # the sampler's items are whole micro-batches
        sampler=items,  # pyright: ignore[reportArgumentType]  any iterable will do
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        worker_init_fn=_start_worker,
        collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]  with batch_size=None it gets one item, not a list
        pin_memory=pin,
        generator=torch.Generator(),  # the DataLoader draws a seed nobody uses; not from the global generator
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_MAIN)  # a worker inherits the mask from its first moment
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next(batches: Iterator[Loaded]) -> Loaded:
    try:
        return next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SitfastError(
            "a data worker process ended without a word, most likely killed for want of memory or of shared memory "
            "(/dev/shm); lower data.num_workers or data.prefetch, or enlarge the memory"
        ) from error


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


def _as_it_is(loaded: Loaded) -> Loaded:
    return loaded
