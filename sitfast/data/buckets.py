"""Batches of several sizes: which size a step has, and how many images of it.

    size(step)    = data.resolutions[⌊K · word / 2³²⌋],   word = Philox(seed, step, Stream.BUCKET),  K sizes
    images(size)  = the largest multiple of data.batch_multiple with  images · h · w ≤ data.batch_size · data.image_size²

A step computes as many tokens whatever its size, up to that rounding down. Without data.resolutions there is one size,
data.image_size², of data.batch_size images. Samples are numbered through: a step takes as many of the run's sequence as it
has images, so each row still comes once an epoch, and is cropped to the size of the batch that it falls into.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from sitfast import philox
from sitfast.errors import SitfastError

if TYPE_CHECKING:
    from sitfast.config import DataConfig

_CHUNK = 1024  # steps drawn together


class Bucket(NamedTuple):
    """One kind of batch; sizes in pixels."""

    height: int
    width: int
    images: int  # over all ranks and micro-batches


class Buckets:
    """The batches of a run: a function of (seed, step), so nothing of it is in a checkpoint."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.kinds = kinds(data)
        self.several = len(data.resolutions) > 0
        self.seed = seed
        self._counted = (0, 0, 0)  # samples from a step to another

    def __getitem__(self, step: int) -> Bucket:
        """The batch of update `step`, counted from 0."""
        if len(self.kinds) == 1:
            return self.kinds[0]
        chunk, within = divmod(step, _CHUNK)
        return self.kinds[_draws(self.seed, len(self.kinds), chunk)[within]]

    def samples(self, start: int, stop: int) -> int:
        """How many the steps from `start` up to, not including, `stop` take together."""
        if len(self.kinds) == 1:
            return (stop - start) * self.kinds[0].images
        first, last, total = (
            self._counted if self._counted[0] == start and self._counted[1] <= stop else (start, start, 0)
        )
        total += sum(self[step].images for step in range(last, stop))
        self._counted = first, stop, total
        return total


def kinds(data: DataConfig) -> tuple[Bucket, ...]:
    """The kinds of batches of a run. SitfastError where the batch has no room for `data.batch_multiple` images of a size."""
    if not data.resolutions:
        return (Bucket(data.image_size, data.image_size, data.batch_size),)
    room, multiple = data.batch_size * data.image_size**2, data.batch_multiple
    made = []
    for height, width in data.resolutions:
        images = room // (height * width * multiple) * multiple
        if not images:
            least = -(-height * width * multiple // data.image_size**2)
            raise SitfastError(
                f"data.batch_size={data.batch_size} of {data.image_size} × {data.image_size} pixels has no room for"
                f" data.batch_multiple={multiple} images of {height} × {width}; use data.batch_size={least} or more"
            )
        made.append(Bucket(height, width, images))
    return tuple(made)


@lru_cache(maxsize=8)
def _draws(seed: int, count: int, chunk: int) -> list[int]:
    """The numbers of the sizes of `_CHUNK` steps."""
    steps = torch.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)
    return ((philox.words(seed, steps, philox.Stream.BUCKET, 1)[:, 0] * count) >> 32).tolist()
