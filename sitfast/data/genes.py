"""Gene expression of single cells from an .h5ad file, and samples back into one.

    counts ─ · 10⁴ / total of the cell ─ log(1 + x) ─▶ values v [n, G] ─ (v − mean of the gene) / scale ─▶ x [B, G]

`data.layer` says where the matrix is (null: X, "raw": .raw, or the name of a layer), `data.transform` whether it holds counts
("log1p": the line above) or values normalised already ("none": they are taken as they are). With `data.num_genes` the most
variable genes are kept, by the normalised dispersion of Satija et al. 2015 (see `most_variable`). The scale is one number for
all genes, the root of their mean variance: x has variance 1 on the whole, and a gene that is hardly ever expressed does not
weigh as much as one that tells cells apart. Which genes, means and scale come from the training rows alone; a checkpoint keeps
them, so that sampling needs no file.

The values of a file are written once, row after row in fp32, and mapped into memory from then on: the copy lies in
~/.cache/sitfast for as long as the file (its path, size and time) and the settings stay as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitfast.data.sampler import BlockOrder, held_out
from sitfast.errors import SitfastError
from sitfast.images import replacing
from sitfast.vae import Pixels

if TYPE_CHECKING:
    from sitfast.config import DataConfig

CACHE = Path("~/.cache/sitfast")
TARGET_SUM = 1e4  # counts of a cell after normalisation
NUM_BINS = 20  # of mean expression, in `most_variable`
_FORMAT = 1
_ABOUT, _VALUES, _LABELS = "genes.json", "values.bin", "labels.npy"
_PIECE = 1 << 23  # values of the matrix that are in memory at a time, 64 MiB in fp64
_BLOCK_BYTES = 1 << 20  # what is read from the disk in one piece
_LARGEST_LOG = 30.0  # e³⁰ counts are in no cell


@dataclass(frozen=True)
class Panel(Pixels):
    """The genes of a run and their scale; stands where the VAE of an image model does."""

    names: list[str]
    mean: NDArray[np.float32]  # [G]
    scale: float  # values are x times that
    low: float | None  # 0 where no value is negative: a sample is raised to it, as a pixel is clamped
    transform: str
    label_column: str | None

    def standardize(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values [n, G] → x [n, G]."""
        return ((values - self.mean) / np.float32(self.scale)).astype(np.float32, copy=False)

    def decode(self, z: Tensor) -> Tensor:
        """x [B, G] → fp32 values [B, G]."""
        values = z.float() * self.scale + torch.from_numpy(self.mean).to(z.device)
        return values if self.low is None else values.clamp_min(self.low)

    def state(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {**self.__dict__, "mean": self.mean.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Panel:
        return cls(**{**state, "mean": np.array(state["mean"], np.float32)})


class Genes:
    """Rows of standardised expression [G]. Worker processes share the mapped pages."""

    channels = 1

    def __init__(self, folder: Path, *, window_mib: int) -> None:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        self.panel = Panel.from_state(about["panel"])
        self.class_names: list[str] = about["class_names"]
        self.num_classes = len(self.class_names)
        self.num_rows: int = about["num_rows"]
        self.image_size = len(self.panel.names)
        self._file = folder / _VALUES
        self._window_mib = window_mib
        self._row_bytes = 4 * self.image_size
        self._labels: NDArray[np.int64] = np.load(folder / _LABELS)
        self._map()

    def _map(self) -> None:
        with open(self._file, "rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._values = np.frombuffer(self._mapped, np.float32).reshape(self.num_rows, self.image_size)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None, "_values": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def values(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Expression [n, G] as the file has it, transformed and not standardised."""
        return self._values[rows]

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._labels[rows]

    def load(self, row: int) -> tuple[Tensor, int]:
        x, y = self.gather(np.array([row]), None)
        return x[0], int(y[0])

    def gather(self, rows: NDArray[np.int64], mirrored: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, G] fp32 and labels [B]."""
        assert mirrored is None, "the config refuses data.flip"
        return torch.from_numpy(self.panel.standardize(self._values[rows])), torch.from_numpy(self._labels[rows])

    def order(self, num_rows: int, seed: int) -> BlockOrder:
        block = max(1, _BLOCK_BYTES // self._row_bytes)
        window = max(block, (self._window_mib << 20) // self._row_bytes)
        return BlockOrder(num_rows, seed, block=block, window=window)

    def read_ahead(self, rows: NDArray[np.int64]) -> None:
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):  # neighbouring rows become one request
            start = int(run[0]) * self._row_bytes
            into = start % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_WILLNEED, start - into, len(run) * self._row_bytes + into)


def build(data: DataConfig) -> Genes:
    if not data.path:
        raise SitfastError("data.path is not set; data.source=genes needs an .h5ad file")
    path = Path(os.path.expanduser(data.path))
    if not path.is_file():
        raise SitfastError(f"data.path={data.path!r} is no file; give an .h5ad file")
    stat = path.stat()
    settings = {
        "layer": data.layer,
        "transform": data.transform,
        "num_genes": data.num_genes,
        "label_column": data.label_column,
        "val_samples": data.val_samples,
    }
    made_of = [_FORMAT, str(path.resolve()), stat.st_size, stat.st_mtime_ns, settings]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    folder = CACHE.expanduser() / f"genes-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:  # of the ranks of a host one converts and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if problem := _damage(folder, verify=data.verify):
            if folder.exists():
                print(f"warning: {folder} {problem}; converting {path} again", file=sys.stderr)
                shutil.rmtree(folder)
            _convert(path, folder, settings)
    return Genes(folder, window_mib=data.window_mib)


def _damage(folder: Path, *, verify: bool) -> str | None:
    """What is wrong with a converted file; None if nothing is."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        expected, size = about["bytes"], (folder / _VALUES).stat().st_size
        if size != expected or not (folder / _LABELS).exists():
            return f"is truncated: {size} bytes of values instead of {expected}"
        if verify:
            digest = hashlib.sha256()
            with open(folder / _VALUES, "rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
            if digest.hexdigest() != about["sha256"]:
                return "is damaged: the hash of its values is another one"
    except (OSError, ValueError, KeyError) as error:
        return f"cannot be read ({type(error).__name__})"
    return None


def _convert(path: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Two passes over the matrix: one checks it and takes sums, one writes the values of the genes that are kept."""
    layer, transform = settings["layer"], settings["transform"]
    content = _open(path)
    matrix, names, where = _matrix(content, path, layer)
    cells = content.obs_names
    num_rows, total_genes = matrix.shape
    if not num_rows or not total_genes:
        raise SitfastError(f"{where} is empty: {num_rows} cells × {total_genes} genes; give a file with both")
    twice = names[names.duplicated()]
    if len(twice):
        raise SitfastError(
            f"{path} has {len(twice)} duplicate gene names (first: {twice[0]!r}), and a gene needs a name of its own;"
            " call adata.var_names_make_unique() and write the file again"
        )
    labels, class_names = _labels(content, path, settings["label_column"])
    count = settings["num_genes"]
    if count is not None and count > total_genes:
        raise SitfastError(
            f"data.num_genes={count} is more than the {total_genes} genes of {where}; use null to keep all of them"
        )

    training = np.zeros(num_rows, bool)
    training[held_out(num_rows, settings["val_samples"])[0]] = True
    least, sums, linear = np.inf, np.zeros((2, total_genes)), np.zeros((2, total_genes))
    hint = _others(content, layer)
    for rows, piece in _pieces(matrix):
        values = _transformed(piece, transform, cells=cells[rows], genes=names, where=where, hint=hint)
        least = min(least, float(values.min()))
        train = values[training[rows]]
        sums += [train.sum(0), (train**2).sum(0)]
        if count is not None:
            _check_logs(values, where)
            train = np.expm1(train)
            linear += [train.sum(0), (train**2).sum(0)]
    kept = np.arange(total_genes)
    if count is not None:
        mean, variance = _moments(linear, training.sum(), ddof=1)
        kept = np.sort(most_variable(mean, variance, count))
    mean, variance = _moments(sums[:, kept], training.sum(), ddof=0)
    if not variance.any():
        raise SitfastError(
            f"{where}: no gene varies among the {training.sum()} training cells; give a file with more cells"
        )
    panel = Panel(
        names=[str(name) for name in names[kept]],
        mean=mean.astype(np.float32),
        scale=float(np.sqrt(variance.mean())),
        low=0.0 if least >= 0 else None,
        transform=transform,
        label_column=settings["label_column"],
    )

    digest, size = hashlib.sha256(), 0
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with open(temporary / _VALUES, "wb") as file:
            for rows, piece in _pieces(matrix):
                values = _transformed(piece, transform, cells=cells[rows], genes=names, where=where, hint=hint)
                data = values[:, kept].astype(np.float32).tobytes()
                digest.update(data)
                size += file.write(data)
        np.save(temporary / _LABELS, labels)
        about = {
            "file": str(path.resolve()),
            "num_rows": num_rows,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "class_names": class_names,
            "panel": panel.state(),
        }
        (temporary / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def most_variable(mean: NDArray[np.float64], variance: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` genes of the largest normalised dispersion, of mean and variance [G] of normalised counts.

    As Satija, Farrell, Gennert, Schier and Regev (Spatial reconstruction of single-cell gene expression data, Nature
    Biotechnology 33, 2015) define it: log(variance / mean) less its mean over the genes of similar expression, divided by its
    standard deviation there; similar are those in the same of 20 equal intervals of log(1 + mean). A gene alone in its
    interval has 1; one that is never expressed comes last.
    """
    expressed = (mean > 0) & (variance > 0)
    score = np.full(len(mean), -np.inf)
    dispersion = np.log(variance[expressed] / mean[expressed])
    level = np.log1p(mean[expressed])
    if len(level):
        edges = np.linspace(level.min(), level.max(), NUM_BINS + 1)
        bins = np.digitize(level, edges[1:-1], right=True)  # an interval holds its upper end
        normalized = np.ones_like(dispersion)
        for number in np.unique(bins):
            here = bins == number
            if here.sum() > 1 and (spread := dispersion[here].std(ddof=1)) > 0:
                normalized[here] = (dispersion[here] - dispersion[here].mean()) / spread
        score[expressed] = normalized
    return np.argsort(-score, kind="stable")[:count]


def save_h5ad(
    values: Tensor, labels: Tensor, path: Path, *, panel: Panel, class_names: list[str], about: dict[str, Any]
) -> Path:
    """Cells [n, G] as an .h5ad file: values in X, the conditions in .obs, the genes in .var, `about` in .uns["sitfast"]."""
    anndata = _anndata()
    import pandas as pd

    broken = int((~values.isfinite()).any(dim=1).sum())
    if broken:
        raise SitfastError(f"{broken} of {len(values)} cells hold NaN or infinity; try more sampling steps or fp32")
    cells = pd.Index([f"sample-{number}" for number in range(len(values))])
    obs = pd.DataFrame(index=cells)
    if panel.label_column is not None:
        named = [class_names[label] for label in labels.tolist()]
        obs[panel.label_column] = pd.Categorical(named, categories=class_names)
    content = anndata.AnnData(values.numpy(), obs=obs, var=pd.DataFrame(index=pd.Index(panel.names)))
    content.uns["sitfast"] = {"transform": panel.transform, **about}
    with replacing(path) as temporary:
        content.write_h5ad(temporary)
    return path


def _anndata() -> Any:
    try:
        import anndata
    except ImportError:
        raise SitfastError('.h5ad files need anndata: pip install "sitfast[genes]"') from None
    return anndata


def _open(path: Path) -> Any:
    """The file with its tables in memory and X and .raw on the disk."""
    anndata = _anndata()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files of older versions are read all the same
            return anndata.read_h5ad(path, backed="r")
    except Exception as error:  # of h5py, pandas, anndata …: all mean that it cannot be read
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise SitfastError(f"data.path={str(path)!r} cannot be read as .h5ad: {reason}; write it again") from error


def _matrix(content: Any, path: Path, layer: str | None) -> tuple[Any, Any, str]:
    """(matrix, names of its genes, what to call it) of `data.layer`; the rows of the matrix can be sliced."""
    places = ", ".join(_places(content))
    if layer is None:
        matrix, names, where = content.X, content.var_names, f"X of {path}"
        if matrix is None:
            raise SitfastError(f"{path} has no X; set data.layer to one of {places or '(there are no layers)'}")
    elif layer == "raw":
        if content.raw is None:
            raise SitfastError(f"data.layer=raw: {path} has no .raw; choose one of {places}, or null for X")
        matrix, names, where = content.raw.X, content.raw.var_names, f".raw of {path}"
    elif layer in content.layers:
        matrix, names, where = content.layers[layer], content.var_names, f"layer {layer!r} of {path}"
    else:
        raise SitfastError(f"data.layer={layer} is not in {path}; choose one of {places}, or null for X")
    if getattr(matrix, "format", "csr") == "csc":  # rows of columns cannot be sliced piece by piece
        matrix = (matrix.to_memory() if hasattr(matrix, "to_memory") else matrix).tocsr()
    return matrix, names, where


def _places(content: Any) -> list[str]:
    return (["raw"] if content.raw is not None else []) + list(content.layers)


def _others(content: Any, layer: str | None) -> str:
    """Where counts may be instead, for an error message."""
    others = [place for place in _places(content) if place != layer]
    return f"data.layer ({', '.join(others)}, or null for X)" if others else "another file"


def _labels(content: Any, path: Path, column: str | None) -> tuple[NDArray[np.int64], list[str]]:
    """Labels [n] and the names of the classes, of a column of .obs; all of one class where the column is null."""
    if column is None:
        return np.zeros(content.n_obs, np.int64), ["all"]
    if column not in content.obs:
        raise SitfastError(
            f"data.label_column={column} is no column of .obs in {path}; choose one of"
            f" {', '.join(map(str, content.obs.columns)) or 'none (it has no columns)'}, or null to train without classes"
        )
    values = content.obs[column]
    if values.isna().any():
        cell = content.obs_names[int(np.flatnonzero(values.isna())[0])]
        raise SitfastError(
            f"data.label_column={column}: {int(values.isna().sum())} cells of {path} have no value (first: {cell!r});"
            " fill them, or leave these cells out"
        )
    if values.dtype.kind in "fc":
        raise SitfastError(
            f"data.label_column={column} of {path} holds {values.dtype} numbers, and a condition is a category;"
            " choose another column, or write it as categories"
        )
    classes = values.astype("category").cat.remove_unused_categories().cat
    return classes.codes.to_numpy().astype(np.int64), [str(name) for name in classes.categories]


def _pieces(matrix: Any) -> Iterator[tuple[slice, NDArray[Any]]]:
    """(rows, their values [n, G]) of the whole matrix, in order."""
    size = max(1, _PIECE // matrix.shape[1])
    for start in range(0, matrix.shape[0], size):
        rows = slice(start, min(start + size, matrix.shape[0]))
        piece = matrix[rows]
        yield rows, np.asarray(piece.toarray() if hasattr(piece, "toarray") else piece)


def _transformed(
    piece: NDArray[Any], transform: str, *, cells: Any, genes: Any, where: str, hint: str
) -> NDArray[np.float64]:
    """Values [n, G] of a piece of the matrix; SitfastError where they are not what `data.transform` takes."""

    def refuse(bad: NDArray[np.bool_], rule: str) -> None:
        if bad.any():
            cell, gene = np.argwhere(bad)[0]
            raise SitfastError(
                f"{where} has the value {piece[cell, gene]:g} (cell {cells[cell]!r}, gene {genes[gene]!r}), and {rule}"
            )

    values = piece.astype(np.float64)
    refuse(~np.isfinite(values), "expression must be finite; fill such values, or leave these cells out")
    if transform == "none":
        return values
    remedy = f"; name counts by {hint}, or use data.transform=none for values that are normalised already"
    refuse(values < 0, f"data.transform=log1p takes counts, which are not negative{remedy}")
    refuse(values != np.floor(values), f"data.transform=log1p takes counts, which are whole numbers{remedy}")
    totals = values.sum(1)
    if not totals.all():
        cell = cells[int(np.flatnonzero(totals == 0)[0])]
        raise SitfastError(
            f"{where}: {int((totals == 0).sum())} cells have no counts at all (first: {cell!r}) and cannot be normalised;"
            " leave them out (scanpy.pp.filter_cells(adata, min_counts=1))"
        )
    return np.log1p(values * (TARGET_SUM / totals)[:, None])


def _check_logs(values: NDArray[np.float64], where: str) -> None:
    """SitfastError where values cannot be logs of 1 + something, which the dispersion undoes."""
    if values.min() < 0 or values.max() > _LARGEST_LOG:
        raise SitfastError(
            f"{where} reaches from {values.min():g} to {values.max():g}, and data.num_genes ranks values of log(1 + x),"
            f" 0 to {_LARGEST_LOG:g}; use data.num_genes=null, or a matrix of such values or of counts"
        )


def _moments(sums: NDArray[np.float64], count: int, *, ddof: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each gene, of sums [2, G] of x and x²."""
    mean = sums[0] / count
    rest = sums[1] - count * mean**2
    rest[rest < 1e-9 * sums[1]] = 0  # rounding: the gene is constant
    return mean, rest / max(count - ddof, 1)
