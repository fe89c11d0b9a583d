"""Cells from .h5ad files: values against a derivation in fp64, odd files, the converted copy."""

import builtins
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sitfast import config
from sitfast.data import build_source, genes
from sitfast.data.genes import Panel, most_variable, save_h5ad
from sitfast.data.sampler import held_out
from sitfast.errors import SitfastError

anndata = pytest.importorskip("anndata")
pandas = pytest.importorskip("pandas")
sparse = pytest.importorskip("scipy.sparse")

CELLS, GENES = 24, 10


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(genes, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def counts():
    """One gene is never expressed and one is the same share of every cell."""
    made = np.random.default_rng(0).poisson(3.0, (CELLS, GENES)).astype(np.float32)
    made[:, 0], made[:, 4] = 0, 1
    made[:, 1] += 80 - made.sum(1)
    return made


def content(matrix=None, **obs):
    matrix = counts() if matrix is None else matrix
    cells, names = ([f"{kind}{k}" for k in range(size)] for kind, size in zip("cg", matrix.shape, strict=True))
    obs = obs or {"label": [f"type {k % 3}" for k in range(len(cells))]}
    return anndata.AnnData(matrix, obs=pandas.DataFrame(obs, index=cells), var=pandas.DataFrame(index=names))


@pytest.fixture
def file(tmp_path):
    """Writes a file; gives the settings of a source of it."""

    def write(made=None, **changes):
        if made is not None:
            made.write_h5ad(tmp_path / "cells.h5ad")
        return SimpleNamespace(**{
            "source": "genes", "path": str(tmp_path / "cells.h5ad"), "layer": None, "transform": "log1p",
            "num_genes": None, "label_column": "label", "val_samples": 4, "window_mib": 1, "verify": False, **changes,
        })  # fmt: skip

    return write


def expected(matrix):
    """log(1 + 10⁴ x / total), and its moments over the training rows, in fp64 and one cell at a time."""
    values = np.array([[np.log1p(1e4 * x / sum(map(float, cell))) for x in map(float, cell)] for cell in matrix])
    train = values[held_out(len(matrix), 4)[0]]
    return values, train.mean(0), train.std(0)


@pytest.mark.parametrize("kind", ["dense", "csr", "csc", "int"])
@pytest.mark.parametrize("piece", [1 << 20, 3 * GENES])
def test_values_are_those_of_the_formula(file, monkeypatch, kind, piece):
    monkeypatch.setattr(genes, "_PIECE", piece)
    matrix = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "int": np.int64}[kind](counts())
    source = build_source(file(content(matrix)))
    values, mean, std = expected(counts())
    assert (source.num_rows, source.image_size, source.channels, source.num_classes) == (CELLS, GENES, 1, 3)
    assert source.class_names == ["type 0", "type 1", "type 2"] and source.panel.names == [
        f"g{k}" for k in range(GENES)
    ]
    np.testing.assert_allclose(source.values(np.arange(CELLS)), values, rtol=1e-6)
    np.testing.assert_allclose(source.panel.mean, mean, rtol=1e-6)
    scale = np.sqrt(np.mean(std**2))
    assert source.panel.scale == pytest.approx(scale, rel=1e-9)
    x, y = source.load(5)
    assert x.dtype == torch.float32 and y == 5 % 3
    np.testing.assert_allclose(x, (values[5] - mean) / scale, rtol=1e-5, atol=1e-5)


def test_training_rows_have_mean_0_and_variance_1(file):
    source = build_source(file(content()))
    x, _ = source.gather(held_out(CELLS, 4)[0], None)
    assert x.mean(0).abs().max() < 1e-5
    assert x.var(0, correction=0).mean() == pytest.approx(1, rel=1e-5)


def test_decoding_undoes_the_scale_and_stays_where_values_can_be(file):
    source = build_source(file(content()))
    x, _ = source.gather(np.arange(CELLS), None)
    np.testing.assert_allclose(source.panel.decode(x), source.values(np.arange(CELLS)), rtol=1e-5, atol=1e-6)
    assert source.panel.decode(x - 100).min() == 0
    kept = Panel.from_state(json.loads(json.dumps(source.panel.state())))
    assert torch.equal(kept.decode(x), source.panel.decode(x)) and kept.state() == source.panel.state()
    scaled = build_source(file(content(counts() - 1), transform="none"))
    assert scaled.panel.low is None and scaled.panel.decode(x - 100).min() < -10


def test_the_matrix_may_be_a_layer_or_raw(file):
    made = content(counts() - 2.5)
    made.layers["counts"] = sparse.csr_matrix(counts())
    made.raw = content(np.hstack([counts(), counts() + 1]))
    settings = {"label_column": None}
    layer = build_source(file(made, layer="counts", **settings))
    raw = build_source(file(layer="raw", **settings))
    itself = build_source(file(transform="none", **settings))
    np.testing.assert_allclose(layer.values(np.arange(CELLS)), expected(counts())[0], rtol=1e-6)
    assert raw.image_size == 2 * GENES and layer.class_names == ["all"] and layer.load(3)[1] == 0
    assert np.array_equal(itself.values(np.arange(CELLS)), counts() - 2.5)


def test_the_most_variable_genes_are_those_of_the_definition():
    """Dispersions chosen by hand: genes 0-3 share an interval, 4 is alone in its own, 5 is never expressed."""
    mean = np.array([1.00, 1.01, 1.02, 1.03, 50.0, 0.0])
    variance = mean * np.exp([0.0, 1.0, 2.0, 5.0, 9.0, 0.0])
    # log dispersions 0, 1, 2, 5: mean 2, deviation √(14/3) = 2.160, so that normalised they are −.93, −.46, 0, 1.39
    assert most_variable(mean, variance, 6).tolist() == [3, 4, 2, 1, 0, 5]
    assert most_variable(mean, variance, 2).tolist() == [3, 4]


def test_num_genes_keeps_the_order_of_the_file_and_ranks_training_cells_alone(file):
    random = np.random.default_rng(1)
    made = random.poisson(random.uniform(3, 7, 600), (200, 600)).astype(np.float32)
    made[:, [7, 23, 41]] = np.random.default_rng(2).negative_binomial(1, 1 / 6, (200, 3))  # mean 5, variance 30, not 5
    held = held_out(200, 40)[1]
    made[held, 11] = (np.arange(40) % 10 == 0) * 50  # mean 5, and varies in the held-out cells alone
    source = build_source(file(content(made), num_genes=3, val_samples=40))
    assert source.panel.names == ["g7", "g23", "g41"] and source.image_size == 3
    assert "g11" in build_source(file(num_genes=3, val_samples=0)).panel.names
    totals = made.sum(1, keepdims=True, dtype=np.float64)  # of all genes
    np.testing.assert_allclose(
        source.values(np.arange(200)), np.log1p(1e4 * made / totals)[:, [7, 23, 41]], rtol=1e-6, atol=1e-7
    )


BAD = {
    "constant": (np.ones((CELLS, 4), np.float32), {}, r"no gene varies among the 20 training cells"),
    "negative": (
        counts() - 1,
        {},
        r"the value -1 \(cell 'c0', gene 'g0'\).*not negative; name counts by .*transform=none",
    ),
    "fraction": (counts() + 0.5, {}, r"the value 0.5 .*whole numbers"),
    "nan": (np.where(counts() == 7, np.nan, counts()), {}, r"the value nan .*must be finite"),
    "inf": (np.where(counts() == 7, np.inf, counts()), {"transform": "none"}, r"the value inf .*must be finite"),
    "no counts": (counts() * (np.arange(CELLS) != 3)[:, None], {}, r"1 cells have no counts at all \(first: 'c3'\)"),
    "no cells": (np.zeros((0, 4), np.float32), {}, r"empty: 0 cells × 4 genes"),
    "no genes": (np.zeros((4, 0), np.float32), {}, r"empty: 4 cells × 0 genes"),
    "too many": (counts(), {"num_genes": 11}, r"data.num_genes=11 is more than the 10 genes"),
    "scaled": (counts() - 1, {"num_genes": 3, "transform": "none"}, r"reaches from -1 to .* use data.num_genes=null"),
    "column": (
        counts(),
        {"label_column": "cell_type"},
        r"data.label_column=cell_type is no column .* one of label, or null",
    ),
    "layer": (counts(), {"layer": "spliced"}, r"data.layer=spliced is not in .*null for X"),
    "raw": (counts(), {"layer": "raw"}, r"has no .raw"),
    "held out": (counts(), {"val_samples": CELLS}, r"leaves nothing to train on"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(file, cache, case):
    matrix, changes, message = BAD[case]
    with pytest.raises(SitfastError, match=message) as error:
        build_source(file(content(matrix), **changes))
    assert "\n" not in str(error.value)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]  # nothing half done stays behind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None] * 12, r"12 cells of .* have no value \(first: 'c1'\)"),
        (np.linspace(0, 1, CELLS), "float64 numbers, and a condition is a category"),
    ],
)
def test_a_column_that_is_no_condition(file, values, message):
    with pytest.raises(SitfastError, match=message):
        build_source(file(content(label=values)))


def test_numbers_and_unused_categories(file):
    assert build_source(file(content(label=np.arange(CELLS) % 4 * 10))).class_names == ["0", "10", "20", "30"]
    some = pandas.Categorical(["b", "c"] * 12, categories=["c", "a", "b"])
    source = build_source(file(content(label=some)))
    assert source.class_names == ["c", "b"] and source.labels(np.arange(2)).tolist() == [1, 0]


def test_duplicate_genes(file):
    made = content()
    made.var_names = ["g"] * 2 + [f"g{k}" for k in range(8)]
    with pytest.raises(SitfastError, match=r"1 duplicate gene names \(first: 'g'\).*var_names_make_unique"):
        build_source(file(made))


def test_files_that_cannot_be_read(file, tmp_path, monkeypatch):
    with pytest.raises(SitfastError, match="is no file"):
        build_source(file())
    (tmp_path / "cells.h5ad").write_bytes(b"not HDF5")
    with pytest.raises(SitfastError, match="cannot be read as .h5ad"):
        build_source(file())
    found = builtins.__import__

    def without(name, *rest):
        if name == "anndata":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SitfastError, match=r'pip install "sitfast\[genes\]"'):
        build_source(file())


def test_the_copy_is_made_once_and_again_when_the_file_changes(file, monkeypatch, capsys):
    settings, made = file(content()), []
    convert = genes._convert
    monkeypatch.setattr(genes, "_convert", lambda *given: (made.append(1), convert(*given)))
    build_source(settings)
    build_source(settings)
    assert len(made) == 1
    os.utime(settings.path, ns=(1, 1))
    folder = build_source(settings)._file.parent
    assert len(made) == 2 and not capsys.readouterr().err
    with open(folder / "values.bin", "r+b") as values:
        values.write(b"\x01")
    build_source(settings)
    assert len(made) == 2  # as large as it was; data.verify looks closer
    settings.verify = True
    build_source(settings)
    assert len(made) == 3 and "the hash of its values is another one" in capsys.readouterr().err
    os.truncate(folder / "values.bin", 7)
    assert build_source(settings).load(CELLS - 1)[0].isfinite().all()
    assert len(made) == 4 and "is truncated: 7 bytes" in capsys.readouterr().err


def test_a_copy_of_the_source_maps_the_file_itself(file):
    source = build_source(file(content()))
    text = pickle.dumps(source)
    assert len(text) < 4000 and torch.equal(pickle.loads(text).load(3)[0], source.load(3)[0])


def test_written_cells_read_back(file, tmp_path):
    source = build_source(file(content()))
    rows = np.arange(6)
    values, labels = torch.from_numpy(source.values(rows)), torch.from_numpy(source.labels(rows))
    about = {"step": 3, "cfg": 1.5}
    path = save_h5ad(
        values, labels, tmp_path / "made.h5ad", panel=source.panel, class_names=source.class_names, about=about
    )
    read = anndata.read_h5ad(path)
    assert np.array_equal(read.X, values) and read.var_names.tolist() == source.panel.names
    assert read.obs["label"].tolist() == [f"type {k % 3}" for k in range(6)]
    assert read.uns["sitfast"] == {"transform": "log1p", **about}
    with pytest.raises(SitfastError, match="1 of 6 cells hold NaN"):
        save_h5ad(values.index_fill(0, torch.tensor([2]), torch.nan), labels, path, panel=source.panel,
                  class_names=source.class_names, about={})  # fmt: skip


@pytest.mark.parametrize(
    "override",
    ["data.flip=true", "vae.id=a/b", "model.rope=true", "model.preset=DiT-B/16", "sample.every=5", "data.path=null",
     "sample.cfg_channels=first3", "data.crop=random", "data.decoder=dali", "data.caption_column=text"],
)  # fmt: skip
def test_settings_that_go_with_images_alone(override):
    fine = ["data.source=genes", "data.path=x.h5ad", "data.flip=false", "vae.id=null", "model.preset=SiT-B/16"]
    config.load(None, fine)
    with pytest.raises(SitfastError, match=override.partition("=")[0]):
        config.load(None, [*fine, override])
