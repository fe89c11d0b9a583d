"""safetensors files that many ranks write and read together, as a storage of torch.distributed.checkpoint.

    file = 8 bytes n · n bytes of JSON: {name: {dtype, shape, data_offsets}} · the tensors, one after another

A shard is some rows of a tensor, and rows lie together in such a file; so each rank writes its rows straight to their place
and what comes out is one ordinary safetensors file, the same bytes at any number of ranks and however the weights were
sharded. Reading goes the other way: a rank maps the file and copies the rows it needs. Nothing is pickled, gathered or
written twice. The ranks must see one file system.

torch.distributed.checkpoint plans and reports: that all rows of all tensors have a writer, and a failure of one rank as an
error of all. Tensors are named file/name here, such as `model.safetensors/blocks.0.attn.qkv.weight`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


class Rows(NamedTuple):
    """What one rank writes of one tensor: rows [first, first + len(values)), contiguous on the CPU, of `shape`."""

    values: Tensor
    first: int
    shape: torch.Size


class Layout:
    """Where each tensor of one safetensors file lies."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.begin: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in sorted(
            tensors.items(), key=lambda item: -item[1].element_size()
        ):  # so that all are aligned
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            self.begin[name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end


class Planner(DefaultSavePlanner):
    """Plans to write `Rows` by name."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, rows) for name, rows in self.state_dict.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.state_dict[write_item.index.fqn].values


def _write_item(name: str, rows: Rows) -> WriteItem:
    offsets = torch.Size([rows.first, *[0] * (len(rows.shape) - 1)] if rows.shape else [])
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=rows.values.shape),
            properties=TensorProperties(dtype=rows.values.dtype),
            size=rows.shape,
        ),
    )


class Writer(StorageWriter):
    """Writes the files of `layouts` into `folder`; the main rank makes it before, and calls `finish` on it after.

    `needed` bytes must be free before anyone writes.
    """

    def __init__(self, folder: Path, layouts: Mapping[str, Layout], *, needed: int, finish: Callable[[], Any]) -> None:
        self.folder, self.layouts, self.needed, self._finish = folder, layouts, needed, finish

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if shutil.disk_usage(self.folder.parent).free < self.needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, layout in self.layouts.items():
            with open(self.folder / name, "wb") as file:
                file.write(layout.header)
                file.truncate(layout.size)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, files = [], {}
        try:
            for item in plan.items:
                name, _, key = item.index.fqn.partition("/")
                if name not in files:
                    files[name] = os.open(self.folder / name, os.O_WRONLY)
                values = planner.resolve_data(item)
                assert isinstance(values, Tensor) and item.tensor_data is not None
                shape = item.tensor_data.size
                row = values.element_size() * (shape.numel() // shape[0] if shape else 1)
                layout, first = self.layouts[name], item.index.offset[0] if item.index.offset else 0
                write_at(files[name], values, len(layout.header) + layout.begin[key] + first * row)
                results.append(WriteResult(item.index, values.nbytes, None))
            for descriptor in files.values():
                os.fsync(descriptor)
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


def write_at(descriptor: int, values: Tensor, offset: int) -> None:
    """Write the bytes of a contiguous tensor; a write may stop short of them."""
    if not values.numel():
        return
    data = values.reshape(-1).view(torch.uint8).numpy().data
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class Reader(StorageReader):
    """Reads tensors of the safetensors files `names` in `folder`, by file/name."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name in self.names:
            for key, (dtype, shape) in read_header(self.folder / name).items():
                chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)
                tensors[f"{name}/{key}"] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, [chunk])
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for name in self.names:
            with safe_open(self.folder / name, framework="pt") as file:
                for item in plan.items:
                    place, _, key = item.storage_index.fqn.partition("/")
                    if place != name:
                        continue
                    if item.lengths:
                        parts = zip(item.storage_offsets, item.lengths, strict=True)
                        values = file.get_slice(key)[tuple(slice(start, start + length) for start, length in parts)]
                    else:
                        values = file.get_tensor(key)
                    target = planner.resolve_tensor(item)
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def read_header(file: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """dtype and shape of each tensor in a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no dict
        return {key: (_BY_NAME[part.get_dtype()], torch.Size(part.get_shape())) for key, part in slices.items()}
