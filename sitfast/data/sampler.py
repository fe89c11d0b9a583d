"""Which row a sample is: row = f(seed, samples consumed), without a stored permutation.

    epoch, position = divmod(index, num_rows)        row = permutation_{seed, epoch}(position)

`index` counts the samples of the whole run, so a checkpoint needs that one number, and a global batch may cross the end
of an epoch. The permutation is a Feistel network on Z_a × Z_b, a = ⌈√num_rows⌉ and b = ⌈num_rows / a⌉:

    left ← left + mix(right, key) mod a,   right ← right + mix(left, key') mod b,   four times over

Each addition can be undone, so the network is a bijection on a·b values; a value ≥ num_rows is sent through again until
it lands inside ("cycle walking"), which restricts the bijection to the rows. Since a·b < num_rows + a, that is rare.
The keys are Philox words of (seed, epoch).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sitfast.data.buckets import Buckets
from sitfast.errors import SitfastError
from sitfast.philox import Stream, philox4x32, split64

_ROUNDS = 4
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the odd multipliers of the SplitMix64 finaliser
_HIGH = np.uint64(32)
_HELD_OUT_SEED = 0x68656C64206F7574  # a constant: the rows held out belong to the data, not to the run


class Order:
    """The endless order of `num_rows` rows: each epoch visits every row once, each epoch differently. O(1) memory."""

    def __init__(self, num_rows: int, seed: int, *, stream: Stream = Stream.ORDER) -> None:
        assert num_rows > 0
        self.num_rows = num_rows
        self.seed = seed
        self.stream = stream
        self._left = math.isqrt(num_rows - 1) + 1
        self._right = -(-num_rows // self._left)

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each global sample index, `[n]` → `[n]`."""
        epochs, positions = np.divmod(np.asarray(index, dtype=np.int64), self.num_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._permute(positions[here], _round_keys(self.seed, int(epoch), self.stream))
        return rows

    def _permute(self, positions: NDArray[np.int64], keys: tuple[np.uint64, ...]) -> NDArray[np.uint64]:
        values = self._network(positions.astype(np.uint64), keys)
        while (outside := values >= np.uint64(self.num_rows)).any():
            values[outside] = self._network(values[outside], keys)
        return values

    def _network(self, values: NDArray[np.uint64], keys: tuple[np.uint64, ...]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = np.divmod(values, b)
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _mix(right, first)) % a
            right = (right + _mix(left, second)) % b
        return left * b + right


class BlockOrder:
    """The endless order of rows that lie in files: near in time, near on the disk. O(number of blocks) memory.

        position ─ permutation of its window ─▶ place ─ in the permuted sequence of blocks ─▶ row

    Blocks of `block` neighbouring rows come in random order, and the rows of each `window` of that sequence at random.
    Like `Order`, it visits each row once an epoch, each epoch differently; a window as large as the data is a full shuffle.
    """

    def __init__(self, num_rows: int, seed: int, *, block: int, window: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.block = min(block, num_rows)
        self.window = min(window, num_rows)
        self._num_windows = -(-num_rows // self.window)
        self._within = Order(self.window, seed, stream=Stream.WINDOW)
        rest = num_rows % self.window
        self._within_last = Order(rest, seed, stream=Stream.WINDOW) if rest else self._within

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each global sample index, `[n]` → `[n]`."""
        epochs, positions = np.divmod(np.asarray(index, dtype=np.int64), self.num_rows)
        windows, positions = np.divmod(positions, self.window)
        numbers = epochs * self._num_windows + windows  # of the window among all there will ever be
        last = windows == self._num_windows - 1
        places = windows * self.window
        for here, order in ((~last, self._within), (last, self._within_last)):
            places[here] += order.rows(numbers[here] * order.num_rows + positions[here])
        return self._on_disk(epochs, places)

    def ahead(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the window after that of `index`, block by block: what to read from the disk in the meantime."""
        return self._on_disk(*np.divmod(np.asarray(index, dtype=np.int64) + self.window, self.num_rows))

    def window_of(self, index: int) -> NDArray[np.int64]:
        """All rows of the window of a sample, block by block: what to read from the disk before the first sample."""
        epoch, position = divmod(index, self.num_rows)
        start = position - position % self.window
        places = np.arange(start, min(start + self.window, self.num_rows))
        return self._on_disk(np.full_like(places, epoch), places)

    def _on_disk(self, epochs: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts, firsts = _block_sequence(self.num_rows, self.block, self.seed, int(epoch))
            slots = np.searchsorted(starts, places[here], side="right") - 1
            rows[here] = firsts[slots] + places[here] - starts[slots]
        return rows


@lru_cache(maxsize=4)
def _block_sequence(num_rows: int, block: int, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(place at which each block of an epoch starts, its first row), in the order of the epoch. The last one is short."""
    num_blocks = -(-num_rows // block)
    blocks = Order(num_blocks, seed).rows(np.arange(num_blocks) + epoch * num_blocks)
    sizes = np.minimum(block, num_rows - blocks * block)
    return np.cumsum(sizes) - sizes, blocks * block


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """32 well-mixed bits of each value (products wrap modulo 2⁶⁴, as they should)."""
    mixed = (values ^ key) * _MIX[0]
    mixed ^= mixed >> _HIGH
    mixed *= _MIX[1]
    return mixed >> _HIGH


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int, stream: Stream) -> tuple[np.uint64, ...]:
    words: list[int] = []
    for block in range(_ROUNDS):
        words += philox4x32((block, int(stream), *split64(epoch)), split64(seed))
    return tuple(np.uint64(low | high << 32) for low, high in zip(words[::2], words[1::2], strict=True))


def micro_batches(
    consumed: int, *, batch_size: int, accumulate: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """Endless lists of the global sample indices that this rank reads, one list a micro-batch, after `consumed`.

    Global batch k covers [consumed + k·B, consumed + (k+1)·B); its micro-batch m is the m-th of `accumulate` contiguous
    parts, and each rank takes the rank-th contiguous slice of that.
    """
    size, rest = divmod(batch_size, accumulate * world_size)
    assert rest == 0, "config.check_world sees to that"
    starts = itertools.count(consumed + rank * size, size * world_size)
    return (list(range(start, start + size)) for start in starts)


def sized_batches(
    buckets: Buckets, step: int, consumed: int, *, accumulate: int, rank: int, world_size: int
) -> Iterator[Sized]:
    """The same where batches have sizes of their own: those of the updates from `step` on."""
    for update in itertools.count(step):
        bucket = buckets[update]
        batch = micro_batches(
            consumed, batch_size=bucket.images, accumulate=accumulate, rank=rank, world_size=world_size
        )
        for index in itertools.islice(batch, accumulate):
            yield Sized(index, (bucket.height, bucket.width))
        consumed += bucket.images


class Sized(NamedTuple):
    """The global sample indices of a micro-batch, and the size of its images in pixels (height, width)."""

    index: list[int]
    size: tuple[int, int]


def held_out(num_rows: int, val_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, validation rows), both sorted. The same rows are held out whatever the seed of the run."""
    if val_samples >= num_rows:
        raise SitfastError(
            f"data.val_samples={val_samples} leaves nothing to train on: the data set has {num_rows} rows; "
            f"hold out fewer, for example {num_rows // 10}"
        )
    held = np.zeros(num_rows, dtype=bool)
    held[Order(num_rows, _HELD_OUT_SEED).rows(np.arange(val_samples))] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
