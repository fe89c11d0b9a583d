"""A folder of class folders: path/<class>/…/<image>, PNG, JPEG or WebP, cropped as ADM crops.

    halve with a box filter while min(width, height) ≥ 2·size  ▶  bicubic to min(width, height) = size  ▶  centre crop

Labels follow the sorted names of the class folders, rows the sorted paths within each. Folders inside a class are
walked (links to files are followed, links to folders inside a class are not, so that a loop cannot trap the walk);
hidden files and folders are ignored.

Three things go beyond ADM, and change no pixel of an ordinary RGB image: the EXIF orientation is applied (ADM ignores
it), transparency is laid over white (ADM drops the alpha channel and shows whatever colour lies below), and 16-bit grey
is scaled to 8 bits (ADM clips it).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sitfast.data import Unreadable
from sitfast.errors import SitfastError

if TYPE_CHECKING:
    from sitfast.config import DataConfig

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")  # decided by content; no other parser ever sees a file
_MAX_PIXELS = (
    2**26
)  # of a scaled image: only an aspect ratio of 1024 at 256 px gets there, and it would fill the memory
_LAYOUT = "data.path needs one folder per class with PNG, JPEG or WebP images inside"


class Folder:
    """Paths live in one bytes object: a list of strings would be copied page by page into every forked worker."""

    channels = 3

    def __init__(self, path: str, image_size: int) -> None:
        self.image_size = image_size
        self.class_names = _class_folders(path)
        self.num_classes = len(self.class_names)
        paths: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = sorted(_images(os.path.join(path, name)))
            paths += map(os.fsencode, found)
            labels += [label] * len(found)
        if not paths:
            raise SitfastError(f"data.path={path!r} has {self.num_classes} folders but no image in them; {_LAYOUT}")
        self.num_rows = len(paths)
        self._labels = np.array(labels)
        self._paths = b"".join(paths)
        self._bounds = np.cumsum([0, *map(len, paths)])

    def path(self, row: int) -> str:
        return os.fsdecode(self._paths[self._bounds[row] : self._bounds[row + 1]])

    def load(self, row: int) -> tuple[Tensor, int]:
        path = self.path(row)
        try:
            image = adm_crop(_decode(path), self.image_size)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
            raise Unreadable(path, f"{type(error).__name__}: {error}") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self._labels[row])


def build(data: DataConfig) -> Folder:
    if not data.path:
        raise SitfastError(f"data.path is not set; with data.source=folder {_LAYOUT}")
    return Folder(os.path.expanduser(data.path), data.image_size)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of `image`, `size` × `size`; images smaller than that are enlarged."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels is too elongated to scale to {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _decode(path: str) -> Image.Image:
    """The image in RGB, upright."""
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata on every visit; what matters is raised
        image = Image.open(file, formats=_FORMATS)
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
    return image.convert("RGB")


def _class_folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            names = sorted(entry.name for entry in visible if entry.is_dir())
    except FileNotFoundError:
        raise SitfastError(f"data.path={path!r} does not exist; {_LAYOUT}") from None
    except NotADirectoryError:
        raise SitfastError(f"data.path={path!r} is not a folder; {_LAYOUT}") from None
    except OSError as error:
        raise SitfastError(f"data.path={path!r} cannot be listed ({error.strerror}); {_LAYOUT}") from None
    if not names:
        what = "is empty" if not visible else f"holds {len(visible)} files but no folder"
        raise SitfastError(f"data.path={path!r} {what}; {_LAYOUT}")
    return names


def _images(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _images(entry.path)
                elif entry.name.lower().endswith(_EXTENSIONS) and (entry.is_symlink() or entry.is_file()):
                    yield entry.path  # a dangling link is listed too: it is to be reported, not to vanish
    except OSError as error:
        raise SitfastError(
            f"data.path: {folder!r} cannot be listed ({error.strerror}); check its permissions"
        ) from None
