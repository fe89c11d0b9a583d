"""Encoded images: from the bytes of a PNG, JPEG or WebP file to pixels, cropped as ADM crops.

    halve with a box filter while min(width, height) ≥ 2·size  ▶  bicubic to min(width, height) = size  ▶  centre crop

ADM's random crop takes a larger size, up to size / 0.8, and a random place in the result. For a rectangle h × w the image is
halved while it is twice as high and twice as wide, then scaled to cover it: for a square, that is the above.

Three things go beyond ADM, and change no pixel of an ordinary RGB image: the EXIF orientation is applied (ADM ignores
it), transparency is laid over white (ADM drops the alpha channel and shows whatever colour lies below), and 16-bit grey
is scaled to 8 bits (ADM clips it).
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sitfast.data import Unreadable
from sitfast.errors import SitfastError

_FORMATS = ("PNG", "JPEG", "WEBP")  # decided by content; no other parser ever sees a file
_MIN_SHARE = 0.8  # of the shorter side, in a random crop
_MAX_PIXELS = 2**26  # of a scaled image: only an aspect ratio of 1024 at 256 px gets there, and would fill the memory


Size = tuple[int, int]  # height, width


class Crop(NamedTuple):
    """Of a random crop, each uniform in (0, 1)."""

    zoom: float
    top: float
    left: float


class EncodedImages:
    """Rows of encoded images; a subclass says where their bytes and labels are."""

    channels = 3
    num_rows: int
    num_classes: int
    image_size: int
    class_names: list[str]
    captioned = False

    def name(self, row: int) -> str:
        """What a person would look for to find the row."""
        raise NotImplementedError

    def read(self, row: int) -> bytes:
        """The file as it is stored; any exception means that it cannot be read."""
        raise NotImplementedError

    def label(self, row: int) -> int:
        raise NotImplementedError

    def caption(self, row: int) -> str:
        """The text beside the image, of a source that is `captioned`."""
        raise NotImplementedError

    def load(self, row: int, crop: Crop | None = None, size: Size | None = None) -> tuple[Tensor, int]:
        try:
            image = adm_crop(_decode(self.read(row)), size or self.image_size, crop)
        except (MemoryError, SitfastError):
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
            unknown = isinstance(error, UnidentifiedImageError)  # its own text names a buffer
            reason = "no PNG, JPEG or WebP image" if unknown else error
            raise Unreadable(self.name(row), f"{type(error).__name__}: {reason}") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.label(row)


class Plan(NamedTuple):
    """How `adm_crop` treats an image: (width, height) after each halving and in the end, and the corner of the crop there."""

    halved: list[tuple[int, int]]
    scaled: tuple[int, int]
    left: int
    top: int


def adm_plan(width: int, height: int, size: int | Size, crop: Crop | None = None) -> Plan:
    """The plan for an image of `width` × `height` and a crop of `size`, a square's side or (height, width)."""
    rows, columns = (size, size) if isinstance(size, int) else size
    side = min(rows, columns)
    target = side if crop is None else side + math.floor(crop.zoom * (math.ceil(side / _MIN_SHARE) - side + 1))
    across, down = round(columns * target / side), round(rows * target / side)
    halved = []
    while width >= 2 * across and height >= 2 * down:
        width, height = width // 2, height // 2
        halved.append((width, height))
    scale = max(across / width, down / height)
    scaled = round(width * scale), round(height * scale)
    if scaled[0] * scaled[1] > _MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels is too elongated to scale to {size}")
    spare = scaled[0] - columns, scaled[1] - rows
    if crop is None:
        return Plan(halved, scaled, spare[0] // 2, spare[1] // 2)
    return Plan(halved, scaled, math.floor(crop.left * (spare[0] + 1)), math.floor(crop.top * (spare[1] + 1)))


def adm_crop(image: Image.Image, size: int | Size, crop: Crop | None = None) -> Image.Image:
    """The centre of `image`, or a random part, `size` × `size` or (height, width); images smaller than that are enlarged."""
    rows, columns = (size, size) if isinstance(size, int) else size
    plan = adm_plan(image.width, image.height, size, crop)
    for smaller in plan.halved:
        image = image.resize(smaller, Image.Resampling.BOX)
    image = image.resize(plan.scaled, Image.Resampling.BICUBIC)
    return image.crop((plan.left, plan.top, plan.left + columns, plan.top + rows))


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
