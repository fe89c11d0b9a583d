"""Data: a source gives rows, the sampler says which, the loader turns them into batches on the device.

    index ─ Order ─▶ row ─ Source.load ─▶ image, label ─ flip · stack ─▶ Batch ─ to(device) ─▶ x in [−1, 1]

A new source is one module with `build(data) -> Source`, and one line in `SOURCES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitfast.data.sampler import BlockOrder

if TYPE_CHECKING:
    from sitfast.config import DataConfig
    from sitfast.text import Text

SOURCES = {
    "digits": "sitfast.data.digits",
    "folder": "sitfast.data.folder",
    "genes": "sitfast.data.genes",
    "hf": "sitfast.data.hf",
    "latents": "sitfast.data.latents",
    "shapes": "sitfast.data.shapes",
    "webdataset": "sitfast.data.webdataset",
}


class Unreadable(Exception):
    """A row whose file cannot be turned into an image; the loader replaces it and reports it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


class Source(Protocol):
    """Rows of images with labels, or of genes. It must survive being copied into worker processes.

    `image_size` is pixels a side; of genes, with one channel, their number.
    """

    num_rows: int
    num_classes: int
    channels: int
    image_size: int
    class_names: list[str]

    def load(self, row: int) -> tuple[Tensor, int]:
        """Image `[C, H, W]`, uint8 in [0, 255] or float32 in [−1, 1], and its label; `Unreadable` where that fails."""
        ...


@runtime_checkable
class Captioned(Source, Protocol):
    """A source that may have a text beside each image."""

    captioned: bool

    def caption(self, row: int) -> str:
        """Empty where there is none."""
        ...


@runtime_checkable
class Encoded(Captioned, Protocol):
    """A source that may hold what a frozen text encoder made of its texts."""

    serves_states: bool

    def states(self, rows: Sequence[int]) -> Text:
        """States, mask and pooled vectors of the texts of `rows`."""
        ...


@runtime_checkable
class Mapped(Source, Protocol):
    """A source whose rows lie in mapped files: it fills whole batches, and reads best in its own order."""

    def order(self, num_rows: int, seed: int) -> BlockOrder:
        """The order of the samples over `num_rows` of its rows."""
        ...

    def gather(self, rows: NDArray[np.int64], mirrored: Tensor | None) -> tuple[Tensor, Tensor]:
        """x `[B, …]` and labels `[B]` of `rows` `[B]`, mirrored where `mirrored` `[B]` says so."""
        ...

    def read_ahead(self, rows: NDArray[np.int64]) -> None:
        """Ask the system to have these rows in memory soon."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch: x, labels y `[B]`, global sample indices `[B]`, names of replaced rows, and texts where there are any.

    x is images `[B, C, H, W]`, the moments of cached latents `[B, 2, C, h, w]`, which `vae.encode` takes as well, or genes
    `[B, G]`. `text` is the captions' tokens where the model reads them, or stored states; `cut` the captions that were too long.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    skipped: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    text: Text | None = None
    cut: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """On the device, without waiting for the copy; uint8 pixels travel as such and become fp32 in [−1, 1] there."""
        x, y, index = (tensor.to(device, non_blocking=True) for tensor in (self.x, self.y, self.index))
        if x.dtype == torch.uint8:
            x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
        text = None if self.text is None else self.text.to(device)
        return Batch(x, y, index, self.skipped, self.captions, text, self.cut)


def build_source(data: DataConfig) -> Source:
    """The source that `data.source` names."""
    return importlib.import_module(SOURCES[data.source]).build(data)
