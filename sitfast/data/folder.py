"""A folder of class folders: path/<class>/…/<image>, PNG, JPEG or WebP (see `image.py`).

Labels follow the sorted names of the class folders, rows the sorted paths within each. Folders inside a class are
walked (links to files are followed, links to folders inside a class are not, so that a loop cannot trap the walk);
hidden files and folders are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from sitfast.data.image import EncodedImages
from sitfast.errors import SitfastError

if TYPE_CHECKING:
    from sitfast.config import DataConfig

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
_LAYOUT = "data.path needs one folder per class with PNG, JPEG or WebP images inside"


class Folder(EncodedImages):
    """Paths live in one bytes object: a list of strings would be copied page by page into every forked worker."""

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

    def name(self, row: int) -> str:
        return os.fsdecode(self._paths[self._bounds[row] : self._bounds[row + 1]])

    def read(self, row: int) -> bytes:
        with open(self.name(row), "rb") as file:
            return file.read()

    def label(self, row: int) -> int:
        return int(self._labels[row])


def build(data: DataConfig) -> Folder:
    if not data.path:
        raise SitfastError(f"data.path is not set; with data.source=folder {_LAYOUT}")
    return Folder(os.path.expanduser(data.path), data.image_size)


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
                elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_symlink() or entry.is_file()):
                    yield entry.path  # a dangling link is listed too: it is to be reported, not to vanish
    except OSError as error:
        raise SitfastError(
            f"data.path: {folder!r} cannot be listed ({error.strerror}); check its permissions"
        ) from None
