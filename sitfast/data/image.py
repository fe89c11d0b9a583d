"""Encoded images: from the bytes of a PNG, JPEG or WebP file to pixels, cropped as ADM crops.

    halve with a box filter while min(width, height) ≥ 2·size  ▶  bicubic to min(width, height) = size  ▶  centre crop

Three things go beyond ADM, and change no pixel of an ordinary RGB image: the EXIF orientation is applied (ADM ignores
it), transparency is laid over white (ADM drops the alpha channel and shows whatever colour lies below), and 16-bit grey
is scaled to 8 bits (ADM clips it).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sitfast.data import Unreadable
from sitfast.errors import SitfastError

_FORMATS = ("PNG", "JPEG", "WEBP")  # decided by content; no other parser ever sees a file
_MAX_PIXELS = (
    2**26
)  # of a scaled image: only an aspect ratio of 1024 at 256 px gets there, and it would fill the memory


class EncodedImages:
    """Rows of encoded images; a subclass says where their bytes and labels are."""

    channels = 3
    num_rows: int
    num_classes: int
    image_size: int
    class_names: list[str]

    def name(self, row: int) -> str:
        """What a person would look for to find the row."""
        raise NotImplementedError

    def read(self, row: int) -> bytes:
        """The file as it is stored; any exception means that it cannot be read."""
        raise NotImplementedError

    def label(self, row: int) -> int:
        raise NotImplementedError

    def load(self, row: int) -> tuple[Tensor, int]:
        try:
            image = adm_crop(_decode(self.read(row)), self.image_size)
        except (MemoryError, SitfastError):
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
            unknown = isinstance(error, UnidentifiedImageError)  # its own text names a buffer
            reason = "no PNG, JPEG or WebP image" if unknown else error
            raise Unreadable(self.name(row), f"{type(error).__name__}: {reason}") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.label(row)


def adm_size(width: int, height: int, size: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """((width, height) after each halving, (width, height) that the crop is taken from)."""
    halved = []
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        halved.append((width, height))
    scale = size / min(width, height)
    return halved, (round(width * scale), round(height * scale))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of `image`, `size` × `size`; images smaller than that are enlarged."""
    halved, (width, height) = adm_size(*image.size, size)
    if width * height > _MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels is too elongated to scale to {size}")
    for smaller in halved:
        image = image.resize(smaller, Image.Resampling.BOX)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def number_labels(values: Sequence[Any] | NDArray[Any], *, where: str) -> tuple[NDArray[np.int64], list[str]]:
    """(labels, class names): whole numbers stay as they are, names are numbered in their sorted order."""
    values = np.asarray(values)
    if values.dtype.kind in "iub":
        labels = values.astype(np.int64)
        if len(labels) and labels.min() < 0:
            row = int(labels.argmin())
            raise SitfastError(
                f"{where}: row {row} has label {labels[row]}, which stands for no label; choose a split with labels, or"
                " set data.label_column=null to train without classes"
            )
        return labels, [str(number) for number in range(int(labels.max()) + 1)]
    strings = [value if isinstance(value, str) else None for value in values.tolist()]
    if None in strings:
        row = strings.index(None)
        raise SitfastError(
            f"{where}: row {row} has label {values.tolist()[row]!r}; labels are whole numbers or names, one kind for all rows"
        )
    names, labels = np.unique(np.array(strings), return_inverse=True)
    return labels.astype(np.int64), names.tolist()


def _decode(data: bytes) -> Image.Image:
    """The image in RGB, upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata on every visit; what matters is raised
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        image.load()
        with contextlib.suppress(Exception):  # broken metadata says nothing about the pixels: they stay as stored
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(
        "I"
    ):  # 16-bit grey, which convert() would clip at 255; Pillow reads 16-bit RGB as its high bytes
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
