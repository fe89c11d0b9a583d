"""Cached latents: what `python -m sitfast.encode` wrote, mapped into memory.

    folder/  manifest.json              VAE, image size, count, statistics; name, size and hash of every shard
             shard-00000.safetensors    moments [n, V, 2, C, h, w] fp16 or bf16 · label [n] int64 · row [n] int64
                                        and, where there are texts, text [bytes] uint8 · text_end [n] int64
                                        and, with text.cache, state [tokens, C] · state_end [n] int64 · pooled [n, P]

V views (the image, and its mirror) of 2 moments (mean and standard deviation of the posterior), so that each epoch draws
the posterior anew: `vae.encode` makes a latent of them. A shard covers a fixed range of the source's rows and says in its own
header of which job it is, so shards need no list until all are there; the manifest is written last. A shard's tensors begin
at a multiple of the page size. Of the states of a frozen text encoder only those of tokens are stored, none of padding.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitfast.data.sampler import BlockOrder
from sitfast.errors import SitfastError
from sitfast.images import replacing
from sitfast.text import Frozen, Text
from sitfast.vae import AutoencoderVAE, Pixels

if TYPE_CHECKING:
    from sitfast.config import DataConfig

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {"F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 1 << 20  # what is read from the disk in one piece
_PAGE = 4096
_AGAIN = "copy it again, or remove it and run sitfast.encode again"


class Shard(NamedTuple):
    """A shard as its header describes it; `offset` and `end` are the bytes of its moments in the file."""

    path: Path
    job: dict[str, Any]  # what all shards of a folder share
    number: int
    count: int
    sha256: str  # of everything behind the header
    sums: list[list[float]]  # over rows, views and pixels: [mean, mean² + std²] of each channel
    dtype: torch.dtype
    shape: tuple[int, ...]  # [count, V, 2, C, h, w]
    offset: int
    end: int
    begins: dict[str, int]  # where each tensor begins in the file
    widths: tuple[int, int]  # C of the states and P of the pooled vectors of the texts; zeros where there are none
    bytes: int


class States(NamedTuple):
    """What an encoder made of n texts: values `[T, C]` of all their tokens, ends `[n]` of each in these, pooled `[n, P]`."""

    values: Tensor
    ends: NDArray[np.int64]
    pooled: Tensor


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    *,
    job: dict[str, Any],
    moments: Tensor,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    sums: list[list[float]],
    texts: Sequence[str] | None = None,
    states: States | None = None,
) -> None:
    """Write a shard, atomically: `moments` `[n, V, 2, C, h, w]`, labels, source rows and texts `[n]`, and their states."""
    parts = {
        "moments": _part(moments),
        "label": ("I64", labels.shape, labels.view(np.uint8)),
        "row": ("I64", rows.shape, rows.view(np.uint8)),
    }
    if states is not None:
        parts |= {"state_end": ("I64", states.ends.shape, states.ends.view(np.uint8))}
        parts |= {"state": _part(states.values), "pooled": _part(states.pooled)}
    if texts is not None:  # last, since they may end at any byte
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        whole = np.frombuffer(b"".join(encoded), np.uint8)
        parts |= {"text_end": ("I64", ends.shape, ends.view(np.uint8)), "text": ("U8", whole.shape, whole)}
    header: dict[str, Any] = {}
    digest, offset = hashlib.sha256(), 0
    for name, (dtype, shape, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + data.size]}
        digest.update(data)
        offset += data.size
    own = {"job": job, "number": number, "count": len(rows), "sha256": digest.hexdigest(), "sums": sums}
    header["__metadata__"] = {"sitfast": json.dumps(own)}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    with replacing(folder / shard_name(number)) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in parts.values():
            file.write(data)


def _part(values: Tensor) -> tuple[str, Sequence[int], NDArray[np.uint8]]:
    """(dtype, shape, bytes) of a tensor of 16 bits."""
    names = {dtype: name for name, dtype in _NAMES.items()}
    return names[values.dtype], values.shape, values.contiguous().view(torch.uint8).numpy().reshape(-1)


def read_shard(path: Path) -> Shard:
    """The header of a shard; SitfastError where the file is missing, truncated or no shard."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length + 8 > size:
                raise SitfastError(f"{path} is truncated: {size} bytes end inside its header; {_AGAIN}")
            header = json.loads(file.read(length))
        own = json.loads(header["__metadata__"]["sitfast"])
        moments = header["moments"]
        start, end = (8 + length + offset for offset in moments["data_offsets"])
        parts = {key: part["data_offsets"] for key, part in header.items() if key != "__metadata__"}
        begins = {key: 8 + length + offset for key, (offset, _) in parts.items()}
        widths = tuple(header[key]["shape"][1] if key in header else 0 for key in ("state", "pooled"))
        expected = 8 + length + max(offset for _, offset in parts.values())
        shard = Shard(
            path,
            own["job"],
            own["number"],
            own["count"],
            own["sha256"],
            own["sums"],
            _NAMES[moments["dtype"]],
            tuple(moments["shape"]),
            start,
            end,
            begins,
            (widths[0], widths[1]),
            expected,
        )
        if end - start != 2 * math.prod(shard.shape) or shard.shape[0] != shard.count:
            raise ValueError("a shape that does not fit its bytes")
    except FileNotFoundError:
        raise SitfastError(f"{path} is missing; {_AGAIN}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        if isinstance(error, SitfastError):
            raise
        raise SitfastError(f"{path} is no shard of latents, or damaged ({type(error).__name__}); {_AGAIN}") from error
    if size != expected:
        raise SitfastError(f"{path} is truncated or altered: {size} bytes instead of {expected}; {_AGAIN}")
    return shard


def verify_shard(shard: Shard) -> None:
    """Read the whole shard and compare its hash; SitfastError where it differs."""
    digest = hashlib.sha256()
    with open(shard.path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while part := file.read(1 << 24):
            digest.update(part)
    if digest.hexdigest() != shard.sha256:
        raise SitfastError(f"{shard.path} is damaged: its hash is not the one in the manifest; {_AGAIN}")


def write_manifest(folder: Path, shards: list[Shard], *, about: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a complete set of shards; `about` is what the shards do not know themselves."""
    job, count = shards[0].job, sum(shard.count for shard in shards)
    first, second = np.sum([shard.sums for shard in shards], axis=0) / (
        max(count, 1) * np.prod([shards[0].shape[1], *shards[0].shape[4:]])
    )
    manifest = {
        "format": FORMAT,
        **job,
        **about,
        "count": count,
        "unreadable": job["num_rows"] - count,
        "channel_mean": first.tolist(),
        "channel_std": np.sqrt(np.maximum(second - first**2, 0)).tolist(),
        "shards": [
            {"file": s.path.name, "count": s.count, "bytes": s.bytes, "sha256": s.sha256} for s in shards
        ],
    }  # fmt: skip
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; SitfastError where there is none that this version can read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
    except (FileNotFoundError, NotADirectoryError):
        begun = any(folder.glob("shard-*.safetensors")) if folder.is_dir() else False
        remedy = "run the same sitfast.encode again to finish it" if begun else "python -m sitfast.encode writes one"
        raise SitfastError(f"data.path={str(folder)!r} has no {MANIFEST}; {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SitfastError(f"{folder / MANIFEST} is damaged ({type(error).__name__}); {_AGAIN}") from error
    if version != FORMAT:
        raise SitfastError(f"{folder / MANIFEST} has format {version}, this sitfast reads {FORMAT}; encode again")
    return manifest


def open_shards(folder: Path, manifest: dict[str, Any]) -> list[Shard]:
    """The headers of all shards, each as the manifest says."""
    shards = []
    for entry in manifest["shards"]:
        shard = read_shard(folder / entry["file"])
        if (shard.count, shard.bytes, shard.sha256) != (entry["count"], entry["bytes"], entry["sha256"]):
            raise SitfastError(f"{shard.path} is not the shard that {MANIFEST} lists; {_AGAIN}")
        shards.append(shard)
    return shards


class Latents:
    """Rows of moments `[2, C, h, w]`. Worker processes share the mapped pages."""

    def __init__(self, folder: Path, image_size: int, *, flip: bool, window_mib: int, verify: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest = read_manifest(folder)
        if manifest["image_size"] != image_size:
            raise SitfastError(
                f"data.image_size={image_size}, and the latents in {folder} were made from {manifest['image_size']} px;"
                f" use data.image_size={manifest['image_size']}, or encode again"
            )
        if flip and manifest["views"] < 2:
            raise SitfastError(
                f"data.flip=true needs mirrored latents, and {folder} was encoded with data.flip=false;"
                " use data.flip=false, or encode again"
            )
        self._shards = open_shards(folder, manifest)
        if verify:
            for shard in self._shards:
                verify_shard(shard)
        self.channels = manifest["channels"]
        self.image_size = image_size
        self.class_names: list[str] = manifest["class_names"]
        self.num_classes = len(self.class_names)
        self.num_rows = manifest["count"]
        self.captioned = "text" in self._shards[0].begins
        self.serves_states = False  # until `serve_states`
        self._window_mib = window_mib
        self._ends = np.cumsum([shard.count for shard in self._shards]).tolist()
        self._views, *self._shape = self._shards[0].shape[1:]
        self._dtype = self._shards[0].dtype
        self._row_bytes = int(np.prod(self._shards[0].shape[1:])) * 2
        self._labels = np.concatenate([_labels(shard) for shard in self._shards])
        self._maps: list[mmap.mmap] = []
        self._moments: list[NDArray[np.uint16]] = []
        self._map()

    def _map(self) -> None:
        for shard in self._shards:
            with open(shard.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            values = np.frombuffer(mapped, np.uint16, (shard.end - shard.offset) // 2, shard.offset)
            self._maps.append(mapped)
            self._moments.append(values.reshape(-1, *self._shape))  # a row has `views` entries

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": [], "_moments": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def load(self, row: int) -> tuple[Tensor, int]:
        x, y = self.gather(np.array([row]), None)
        return x[0], int(y[0])

    def caption(self, row: int) -> str:
        number, within = self._find(row)
        first, last = self._bounds("text_end", number, within)
        start = self._shards[number].begins["text"]
        return self._maps[number][start + first : start + last].decode()

    def states(self, rows: Sequence[int]) -> Text:
        """What the encoder made of the texts of `rows`: states `[B, L, C]`, zero in the padding, and pooled `[B, P]`."""
        width, pooled_width = self._shards[0].widths
        tokens = _empty((len(rows), self.manifest["text"]["length"], width), self._dtype).zero_()
        pooled = _empty((len(rows), pooled_width), self._dtype)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        for i, row in enumerate(rows):
            number, within = self._find(row)
            first, last = self._bounds("state_end", number, within)
            tokens[i, : last - first] = self._values(number, "state", first, last)
            pooled[i] = self._values(number, "pooled", within, within + 1)[0]
            mask[i, : last - first] = True
        return Text(tokens, mask, pooled)

    def _find(self, row: int) -> tuple[int, int]:
        """(the shard that holds a row, its place there)."""
        number = bisect.bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def _bounds(self, name: str, number: int, within: int) -> tuple[int, int]:
        """Where an entry of differing length begins and ends, among those of its shard."""
        ends = np.frombuffer(
            self._maps[number], np.int64, self._shards[number].count, self._shards[number].begins[name]
        )
        return int(ends[within - 1]) if within else 0, int(ends[within])

    def _values(self, number: int, name: str, first: int, last: int) -> Tensor:
        """Rows of `state` or `pooled`."""
        shard = self._shards[number]
        width = shard.widths[name == "pooled"]
        start = shard.begins[name] + first * width * 2
        values = np.frombuffer(self._maps[number], np.uint16, (last - first) * width, start)
        return torch.from_numpy(values.reshape(-1, width).copy()).view(self._dtype)

    def order(self, num_rows: int, seed: int) -> BlockOrder:
        block = max(1, _BLOCK_BYTES // self._row_bytes)
        window = max(block, (self._window_mib << 20) // self._row_bytes)
        return BlockOrder(num_rows, seed, block=block, window=window)

    def gather(self, rows: NDArray[np.int64], mirrored: Tensor | None) -> tuple[Tensor, Tensor]:
        """Moments `[B, 2, C, h, w]` and labels `[B]`."""
        x = _empty((len(rows), *self._shape), self._dtype)
        out, moments, views, ends = x.view(torch.uint16).numpy(), self._moments, self._views, self._ends
        view = [0] * len(rows) if mirrored is None else mirrored.tolist()
        for i, row in enumerate(rows.tolist()):
            shard = bisect.bisect_right(ends, row)  # as in `_find`; 100,000 rows a second pass here
            within = row - ends[shard - 1] if shard else row
            out[i] = moments[shard][within * views + view[i]]
        return x, torch.from_numpy(self._labels[rows])

    def read_ahead(self, rows: NDArray[np.int64]) -> None:
        """Neighbouring rows become one request."""
        shards = np.searchsorted(self._ends, rows, side="right")
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0)) + 1
        for first, shard, count in zip(
            rows[np.r_[0, breaks]].tolist(),
            shards[np.r_[0, breaks]].tolist(),
            np.diff(np.r_[0, breaks, len(rows)]).tolist(),
            strict=True,
        ):
            before = self._ends[shard - 1] if shard else 0
            start = self._shards[shard].offset + (first - before) * self._row_bytes
            into = start % mmap.PAGESIZE
            self._maps[shard].madvise(mmap.MADV_WILLNEED, start - into, count * self._row_bytes + into)

    def check_vae(self, vae: Pixels | AutoencoderVAE) -> None:
        """SitfastError unless `vae` is the one that made these latents."""
        made_by = self.manifest["vae"]
        if not isinstance(vae, AutoencoderVAE) or vae.fingerprint != made_by["sha256"]:
            given = f"vae.id={vae.id!r}" if isinstance(vae, AutoencoderVAE) else "vae.id=null"
            raise SitfastError(
                f"the latents in {self.folder} were made by the VAE {made_by['id']!r}, and {given} is another one;"
                " name the VAE that made them, or encode again"
            )

    def serve_states(self, encoder: Frozen) -> None:
        """Batches bring the stored states of `encoder`, which need not run; SitfastError unless it made them."""
        made_by = self.manifest.get("text")
        if not made_by:
            raise SitfastError(
                f"text.cache=true, and {self.folder} holds no states of a text encoder; encode again with text.cache=true,"
                " or use text.cache=false"
            )
        if encoder.fingerprint != made_by["sha256"]:
            raise SitfastError(
                f"the texts in {self.folder} were encoded by {made_by['encoder']!r}, and the one that text.encoder names has"
                " other weights; name that one, encode again, or use text.cache=false"
            )
        if encoder.tokenizer.length != made_by["length"]:
            raise SitfastError(
                f"text.length={encoder.tokenizer.length}, and the texts in {self.folder} were encoded with"
                f" {made_by['length']}; use text.length={made_by['length']}, encode again, or use text.cache=false"
            )
        self.serves_states = True


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor; in a worker process in shared memory, where it would have to be copied on its way out."""
    x = torch.empty(0, dtype=dtype)
    if torch.utils.data.get_worker_info() is None:
        return x.new_empty(shape)
    storage = x._typed_storage()._new_shared(int(np.prod(shape)))
    return x.new(storage).view(shape)


def _labels(shard: Shard) -> NDArray[np.int64]:
    return np.fromfile(shard.path, np.int64, shard.count, offset=shard.end)


def build(data: DataConfig) -> Latents:
    if not data.path:
        raise SitfastError("data.path is not set; data.source=latents needs the folder that sitfast.encode wrote")
    folder = Path(os.path.expanduser(data.path))
    return Latents(folder, data.image_size, flip=data.flip, window_mib=data.window_mib, verify=data.verify)
