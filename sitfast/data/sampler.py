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

import numpy as np
from numpy.typing import NDArray

from sitfast.errors import SitfastError
from sitfast.philox import Stream, philox4x32, split64

_ROUNDS = 4
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the odd multipliers of the SplitMix64 finaliser
_HIGH = np.uint64(32)
_HELD_OUT_SEED = 0x68656C64206F7574  # a constant: the rows held out belong to the data, not to the run


class Order:
    """The endless order of `num_rows` rows: each epoch visits every row once, each epoch differently. O(1) memory."""

    def __init__(self, num_rows: int, seed: int) -> None:
        assert num_rows > 0
        self.num_rows = num_rows
        self.seed = seed
        self._left = math.isqrt(num_rows - 1) + 1
        self._right = -(-num_rows // self._left)

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each global sample index, `[n]` → `[n]`."""
        epochs, positions = np.divmod(np.asarray(index, dtype=np.int64), self.num_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._permute(positions[here], _round_keys(self.seed, int(epoch)))
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


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """32 well-mixed bits of each value (products wrap modulo 2⁶⁴, as they should)."""
    mixed = (values ^ key) * _MIX[0]
    mixed ^= mixed >> _HIGH
    mixed *= _MIX[1]
    return mixed >> _HIGH


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    words: list[int] = []
    for block in range(_ROUNDS):
        words += philox4x32((block, int(Stream.ORDER), *split64(epoch)), split64(seed))
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
