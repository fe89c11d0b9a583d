"""Images in tar files, as WebDataset lays them out: members that share their name up to its first dot are one sample.

    data.path=folder of *.tar, one .tar, or a pattern such as shards/train-*.tar
    n01440764_10026.jpg   the image: .jpg, .jpeg, .png or .webp
    n01440764_10026.cls   its label, a whole number or a name; or the entry `data.label_column` of its .json
    n01440764_10026.txt   its text, where `data.caption_column` is set; or that entry of its .json

The members are listed once; the list is kept in ~/.cache/sitfast for as long as the tars stay as they are. Samples are then
read where they lie, in any order: nothing is ever unpacked, and a tar with names that point outside of it is refused.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sitfast.data.folder import EXTENSIONS
from sitfast.data.image import EncodedImages, number_labels
from sitfast.errors import SitfastError
from sitfast.images import replacing

if TYPE_CHECKING:
    from sitfast.config import DataConfig

CACHE = Path("~/.cache/sitfast")
_FORMAT = 1
_LABELS, _TEXTS = ("cls", "json"), ("txt", "json")
_KINDS = {*_LABELS, *_TEXTS}


class Tars(EncodedImages):
    """Samples in the order of the tars' names, and within a tar as they lie there."""

    def __init__(
        self, files: list[Path], *, image_size: int, label_column: str | None, caption_column: str | None, cache: Path
    ) -> None:
        index = _index(files, label_column, caption_column, cache)
        self.image_size = image_size
        self.num_rows = len(index["tar"])
        self.class_names, self._labels = ["all"], np.zeros(self.num_rows, np.int64)
        if label_column is not None:
            self._labels, self.class_names = number_labels(index["label"], where=f"{files[0].parent}")
        self.num_classes = len(self.class_names)
        self._files = files
        self._tar, self._offset, self._size = index["tar"], index["offset"], index["size"]
        self.captioned = caption_column is not None
        self._caption_column = caption_column
        self._texts = index["texts"]  # [n, 3]: offset, size, whether it is a .json
        self._names, self._bounds = index["names"].tobytes(), index["bounds"]

    def name(self, row: int) -> str:
        member = os.fsdecode(self._names[self._bounds[row] : self._bounds[row + 1]])
        return f"{self._files[self._tar[row]]}:{member}"

    def read(self, row: int) -> bytes:
        return self._part(row, int(self._offset[row]), int(self._size[row]))

    def _part(self, row: int, offset: int, size: int) -> bytes:
        with open(self._files[self._tar[row]], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) < size:
            raise ValueError(f"the tar ends after {len(data)} of {size} bytes; it was changed during the run")
        return data

    def caption(self, row: int) -> str:
        offset, size, is_json = self._texts[row].tolist()
        text = self._part(row, offset, size).decode(errors="replace")
        return str(json.loads(text)[self._caption_column] or "") if is_json else text.strip()

    def label(self, row: int) -> int:
        return int(self._labels[row])


def build(data: DataConfig) -> Tars:
    if not data.path:
        raise SitfastError("data.path is not set; with data.source=webdataset it is a folder of .tar files")
    path = os.path.expanduser(data.path)
    if os.path.isdir(path):
        found = sorted(Path(path).glob("*.tar"))
    else:
        found = [Path(path)] if os.path.exists(path) else sorted(map(Path, glob.glob(path)))
    if not found:
        raise SitfastError(f"data.path={data.path!r} has no .tar files; give a folder of them, one, or a pattern")
    return Tars(
        found,
        image_size=data.image_size,
        label_column=data.label_column,
        caption_column=data.caption_column,
        cache=CACHE.expanduser(),
    )


def _index(
    files: list[Path], label_column: str | None, caption_column: str | None, cache: Path
) -> dict[str, NDArray[Any]]:
    """Where each sample lies, from the cache or by listing every tar."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([_FORMAT, label_column, caption_column, stats]).encode()).hexdigest()
    kept = cache / f"tars-{key[:32]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as content:
            return dict(content)
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is wrong with it: it is only a copy
        print(f"warning: {kept} is damaged ({type(error).__name__}); listing the tars again", file=sys.stderr)
    columns = label_column, caption_column
    samples = [(number, *sample) for number, file in enumerate(files) for sample in _samples(file, *columns)]
    if not samples:
        raise SitfastError(
            f"{files[0].parent} has {len(files)} tars but no image in them; expected {', '.join(EXTENSIONS)}"
        )
    tar, names, offset, size, label, texts = zip(*samples, strict=True)
    encoded = [os.fsencode(name) for name in names]
    whole = all(isinstance(value, int) for value in label)
    index = {
        "tar": np.array(tar, np.int32),
        "offset": np.array(offset, np.int64),
        "size": np.array(size, np.int64),
        "texts": np.array(texts, np.int64),
        "names": np.frombuffer(b"".join(encoded), np.uint8),
        "bounds": np.cumsum([0, *map(len, encoded)]),
        "label": np.array(label, np.int64) if whole else np.array([str(value) for value in label]),
    }
    try:
        with replacing(kept) as temporary, open(temporary, "wb") as file:
            np.savez(file, **index)
    except OSError as error:
        print(f"warning: the list of the tars' members is not kept: {error}", file=sys.stderr)
    return index


def _samples(
    file: Path, label_column: str | None, caption_column: str | None
) -> list[tuple[str, int, int, Any, tuple[int, int, int]]]:
    """(member, offset, size, label, (offset, size, whether .json) of the text) of every image in a tar."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(file, "r:") as tar, open(file, "rb") as raw:
            for member in tar:
                _check_member(file, member)
                key, extension = _split(member.name)
                if member.isdir() or (extension not in _KINDS and f".{extension}" not in EXTENSIONS):
                    continue
                sample = found.setdefault(key, {})
                kind = extension if extension in _KINDS else "image"
                if kind in sample:
                    raise SitfastError(f"{file}: {key!r} has two members of the same kind ({member.name}); keep one")
                sample[kind] = member
            raw.seek(tar.offset)
            if raw.read(512).strip(b"\0") or raw.tell() < tar.offset + 512:
                raise SitfastError(f"{file} is truncated: it lacks the end mark of a tar; copy it again")
            return [
                (sample["image"].name, sample["image"].offset_data, sample["image"].size,
                 _label(file, raw, key, sample, label_column), _text(file, raw, key, sample, caption_column))
                for key, sample in found.items()
                if "image" in sample
            ]  # fmt: skip
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise SitfastError(f"{file} is truncated or no plain tar ({error}); copy it again, uncompressed") from error


def _text(
    file: Path, raw: Any, key: str, sample: dict[str, tarfile.TarInfo], caption_column: str | None
) -> tuple[int, int, int]:
    """Where the text of a sample is, once it is known to be there; zeros where texts are not asked for."""
    if caption_column is None:
        return 0, 0, 0
    kind = next((kind for kind in _TEXTS if kind in sample), None)
    if kind is None:
        raise SitfastError(f"{file}: {key!r} has neither .txt nor .json; add its text, or set data.caption_column=null")
    member = sample[kind]
    if kind == "json":
        raw.seek(member.offset_data)
        try:
            json.loads(raw.read(member.size))[caption_column]
        except (ValueError, KeyError, TypeError) as error:
            name = type(error).__name__
            raise SitfastError(f"{file}: {key}.json holds no text {caption_column!r} ({name})") from error
    return member.offset_data, member.size, int(kind == "json")


def _check_member(file: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        raise SitfastError(f"{file} holds {member.name!r}, a name that points outside of it; do not trust this tar")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise SitfastError(f"{file} holds {member.name!r}, which is no plain file (a link or device); pack it anew")


def _split(name: str) -> tuple[str, str]:
    """`a/b.c/0001.seg.png` → (`a/b.c/0001`, `seg.png`)."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _label(file: Path, raw: Any, key: str, sample: dict[str, tarfile.TarInfo], label_column: str | None) -> Any:
    """A whole number or a name; 0 where labels are not asked for."""
    if label_column is None:
        return 0
    kind = next((kind for kind in _LABELS if kind in sample), None)
    if kind is None:
        raise SitfastError(f"{file}: {key!r} has neither .cls nor .json; label it, or set data.label_column=null")
    raw.seek(sample[kind].offset_data)
    content = raw.read(sample[kind].size)
    try:
        text = content.decode()
        value = text.strip() if kind == "cls" else json.loads(text)[label_column]
    except (ValueError, KeyError, TypeError) as error:
        raise SitfastError(f"{file}: {key}.{kind} holds no label {label_column!r} ({type(error).__name__})") from error
    if isinstance(value, str):
        return int(value) if value.isascii() and value.lstrip("-").isdigit() else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise SitfastError(f"{file}: {key}.{kind} holds {value!r}; a label is a whole number or a name")
    return value
