"""A Hugging Face data set with encoded images: a hub id, a folder of `save_to_disk`, or Parquet or Arrow files.

    data.path=owner/name             split data.split, downloaded into the hub's cache
    data.path=folder                 what save_to_disk wrote, or *.parquet, or *.arrow inside (in the order of their names)
    data.path=file.parquet           one file

Images stay encoded until a worker decodes them (`Image(decode=False)`), as bytes in the column `data.image_column` or as
paths. Labels are whole numbers, a ClassLabel, or names, numbered in their sorted order; `data.label_column=null` is one class.
Texts are in `data.caption_column`, if that is set.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sitfast.data.image import EncodedImages, number_labels
from sitfast.errors import SitfastError

if TYPE_CHECKING:
    from sitfast.config import DataConfig


class HubData(EncodedImages):
    """Rows of an Arrow table that is mapped into memory."""

    def __init__(
        self,
        table: Any,
        where: str,
        *,
        image_size: int,
        image_column: str,
        label_column: str | None,
        caption_column: str | None,
    ) -> None:
        columns = {
            "data.image_column": image_column,
            "data.label_column": label_column,
            "data.caption_column": caption_column,
        }
        for field, column in columns.items():
            if column is not None and column not in table.column_names:
                raise SitfastError(
                    f"{field}={column!r} is no column of {where}; it has {', '.join(table.column_names)}"
                )
        from datasets import ClassLabel, Image

        self.image_size = image_size
        self.num_rows = len(table)
        self._where = where
        self._image_column = image_column
        self.class_names, self._labels = ["all"], np.zeros(len(table), np.int64)
        if label_column is not None:
            feature = table.features[label_column]
            values = table.select_columns([label_column]).with_format("arrow")[:][label_column]
            if values.null_count:
                row = values.is_null().to_pylist().index(True)
                raise SitfastError(f"{where}: row {row} has no {label_column}; give every row a label")
            self._labels, self.class_names = number_labels(values.to_numpy(), where=where)
            if isinstance(feature, ClassLabel):
                self.class_names = list(feature.names)
        self.num_classes = len(self.class_names)
        try:
            self._images = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        except Exception as error:  # of Arrow, which has a kind for every kind of column
            kind = table.features[image_column]
            raise SitfastError(f"data.image_column={image_column!r} of {where} holds no images but {kind}") from error

        self.captioned = caption_column is not None
        if caption_column is not None:
            kind = getattr(table.features[caption_column], "dtype", table.features[caption_column])
            if kind not in ("string", "large_string"):
                raise SitfastError(f"data.caption_column={caption_column!r} of {where} holds no text but {kind}")
            self._texts = table.select_columns([caption_column])
            self._caption_column = caption_column

    def name(self, row: int) -> str:
        return f"{self._where} row {row}"

    def read(self, row: int) -> bytes:
        image = self._images[row][self._image_column]
        if image is None:
            raise ValueError("there is no image in this row")
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()

    def caption(self, row: int) -> str:
        return self._texts[row][self._caption_column] or ""

    def label(self, row: int) -> int:
        return int(self._labels[row])


def build(data: DataConfig) -> HubData:
    if not data.path:
        raise SitfastError("data.path is not set; with data.source=hf it is a hub id or a folder with a data set")
    try:
        import datasets
    except ImportError:
        raise SitfastError('data.source=hf needs the library datasets: pip install "sitfast[hf]"') from None
    path = Path(os.path.expanduser(data.path))
    datasets.disable_progress_bars()
    try:
        table = _open(datasets, path, data)
    except SitfastError:
        raise
    except Exception as error:  # of datasets, pyarrow, huggingface_hub, httpx …: all mean that it did not load
        reason = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
        where = "the files" if path.exists() else "the name, data.split and the network, or give a local folder"
        raise SitfastError(f"data.path={data.path!r} cannot be loaded: {reason}; check {where}") from error
    return HubData(
        table,
        f"{data.path} ({data.split})",
        image_size=data.image_size,
        image_column=data.image_column,
        label_column=data.label_column,
        caption_column=data.caption_column,
    )


def _open(datasets: Any, path: Path, data: DataConfig) -> Any:
    """The split as a data set of rows."""
    if not path.exists():
        if path.is_absolute() or str(data.path).startswith((".", "~")) or str(data.path).count("/") != 1:
            raise SitfastError(f"data.path={data.path!r} does not exist, and a hub id reads owner/name")
        return datasets.load_dataset(data.path, split=data.split)
    if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved
        if data.split not in saved:
            raise SitfastError(f"data.split={data.split!r} is not in {path}; it has {', '.join(saved)}")
        return saved[data.split]
    for kind in ("parquet", "arrow"):
        files = [path] if path.suffix == f".{kind}" else sorted(path.rglob(f"*.{kind}")) if path.is_dir() else []
        if files:
            names = {data.split: [str(file) for file in _of_split(files, data.split)]}
            return datasets.load_dataset(kind, data_files=names, split=data.split)
    raise SitfastError(
        f"data.path={data.path!r} holds no data set; give a folder of save_to_disk, or one with *.parquet or *.arrow files"
    )


def _of_split(files: list[Path], split: str) -> list[Path]:
    """The files named after the split (`train-00000-of-00009.parquet`, `train/0.parquet`) where any is; else all."""
    named = [
        file for file in files if file.name.startswith(f"{split}-") or file.parent.name == split or file.stem == split
    ]
    return named or files
