"""What every source owes: the same batches however they are fetched, each row once an epoch, exact resume."""

import io
import tarfile
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast.data import build_source, genes, latents, webdataset
from sitfast.data.loader import Loader

ROWS, SIZE = 37, 16
SEED = 3


def pictures():
    """37 images, no two alike and none its own mirror image."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(ROWS)]


def data(source, path, **changes):
    return SimpleNamespace(**{
        "source": source, "path": str(path), "image_size": SIZE, "batch_size": 24, "num_workers": 0, "prefetch": 2,
        "flip": True, "max_unreadable": 0.1, "window_mib": 1, "verify": True, "split": "train", "image_column": "image",
        "label_column": "label", "caption_column": None,
        "decoder": "pil", "crop": "center", "decoder_threads": 1, "hw_decoder_load": 0.0,
        "layer": None, "transform": "log1p", "num_genes": None, "val_samples": 0, **changes,
    })  # fmt: skip


def png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def folder(path):
    for number, picture in enumerate(pictures()):
        (path / f"class{number % 5}").mkdir(exist_ok=True)
        picture.save(path / f"class{number % 5}" / f"{number}.png")
    return data("folder", path)


def cached(path, rows_each=10):
    """Moments of 16 kB a view, so that the window of 1 MiB holds 32 rows; shards of ten rows, the last one short."""
    moments = torch.from_numpy(np.random.default_rng(0).normal(size=(ROWS, 2, 2, 4, 32, 32))).half()
    job = {"vae": {"id": "a/b", "sha256": "0"}, "image_size": SIZE, "views": 2, "dtype": "fp16", "num_rows": ROWS}
    shards = range(-(-ROWS // rows_each))
    for k in shards:
        rows = np.arange(k * rows_each, min((k + 1) * rows_each, ROWS))
        latents.write_shard(
            path, k, job=job, moments=moments[rows], labels=rows % 5, rows=rows, sums=[[0.0] * 4, [1.0] * 4],
            texts=[text(int(number)) for number in rows],
        )  # fmt: skip
    about = {"channels": 3, "class_names": list("abcde")}
    latents.write_manifest(path, [latents.read_shard(path / latents.shard_name(k)) for k in shards], about=about)
    return data("latents", path)


def text(number: int) -> str:
    """Of every length, empty among them, and not ASCII alone."""
    return "né " * (number % 4) + str(number) * (number % 4 > 0)


def table():
    """The pictures as a data set with embedded PNGs."""
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": png(picture), "path": None} for picture in pictures()]
    content = {"image": images, "label": [number % 5 for number in range(ROWS)]}
    content["text"] = [text(number) for number in range(ROWS)]
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


def arrow(path):
    table().save_to_disk(path / "saved")
    return data("hf", path / "saved", caption_column="text")


def parquet(path):
    table().to_parquet(path / "train.parquet")
    return data("hf", path)


def tars(path):
    for shard in range(2):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for number in range(shard * 20, min(ROWS, shard * 20 + 20)):
                members = {
                    "png": png(pictures()[number]),
                    "cls": str(number % 5).encode(),
                    "txt": text(number).encode(),
                }
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{number:04}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return data("webdataset", path, caption_column="text")


def cells(path):
    """Counts of 4,000 genes (16 kB a cell, so that the window of 1 MiB holds more than all)."""
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    counts = np.random.default_rng(0).poisson(2.0, (ROWS, 4000)).astype(np.float32)
    obs = pandas.DataFrame({"label": [f"type{number % 5}" for number in range(ROWS)]}, index=[*map(str, range(ROWS))])
    anndata.AnnData(counts, obs=obs).write_h5ad(path / "cells.h5ad")
    return data("genes", path / "cells.h5ad", flip=False)


BUILDERS = {"folder": folder, "latents": cached, "arrow": arrow, "parquet": parquet, "tars": tars, "genes": cells}


@pytest.fixture(scope="module", params=BUILDERS)
def settings(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(webdataset, "CACHE", cache)
        patch.setattr(genes, "CACHE", cache)
        if find_spec("datasets"):
            patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        yield BUILDERS[request.param](tmp_path_factory.mktemp(request.param))


def loader(settings, *, consumed=0, rank=0, world_size=1, accumulate=1, **changes):
    return Loader(
        build_source(settings),
        np.arange(2, ROWS),
        data=SimpleNamespace(**vars(settings) | changes),
        seed=SEED,
        consumed=consumed,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        device="cpu",
        quarantine=None,
    )


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def joined(batches):
    """(x, y, index) of several batches, in the order of the index."""
    x, y, index = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "y", "index"))
    order = index.argsort()
    return x[order], y[order], index[order]


def views_of(settings):
    """bytes of a row as the loader gives it, unmirrored or, where it may be, mirrored → row."""
    source = build_source(settings)
    rows = np.arange(ROWS)
    if not settings.flip:
        views = [source.gather(rows, None)[0]]
    elif hasattr(source, "gather"):
        views = [source.gather(rows, torch.full((ROWS,), mirrored))[0] for mirrored in (False, True)]
    else:
        x = torch.stack([source.load(row)[0] for row in range(ROWS)]).float().div(127.5).sub(1)
        views = [x, x.flip(-1)]
    known = {view[row].contiguous().numpy().tobytes(): row for view in views for row in range(ROWS)}
    assert len(known) == len(views) * ROWS
    return known


def files():
    """name → an image file of every kind that people have."""
    generator = np.random.default_rng(0)
    x = np.kron(generator.integers(0, 256, (6, 5, 3)), np.ones((16, 16, 1))).astype(np.uint8)  # 80 x 96
    image, alpha = Image.fromarray(x), Image.fromarray(np.dstack([x, x[:, :, 0]]))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    kinds = [
        ("jpg", image, "JPEG", {"quality": 90}), ("jpg", image.convert("L"), "JPEG", {}),
        ("jpg", image.convert("CMYK"), "JPEG", {}), ("jpg", image, "JPEG", {"exif": rotated}), ("jpg", image, "PNG", {}),
        ("jpg", image.crop((0, 0, 79, 65)), "JPEG", {"subsampling": 0}), ("png", alpha, "PNG", {}),
        ("png", Image.fromarray(x[:, :, 0].astype(np.uint16) * 257), "PNG", {}), ("png", image.quantize(16), "PNG", {}),
        ("webp", alpha, "WEBP", {"lossless": True}),
    ]  # fmt: skip
    made = {}
    for number, (suffix, picture, kind, settings) in enumerate(kinds):
        file = io.BytesIO()
        picture.save(file, format=kind, **settings)
        made[f"{number}.{suffix}"] = file.getvalue()
    return made


def in_folder(path):
    (path / "class").mkdir()
    for name, content in files().items():
        (path / "class" / name).write_bytes(content)
    return "folder"


def in_tar(path):
    with tarfile.open(path / "a.tar", "w") as tar:
        for name, content in files().items():
            for member, data in ((name, content), (name.partition(".")[0] + ".cls", b"0")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return "webdataset"


def in_table(path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": content, "path": None} for content in files().values()]
    table = datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)})
    table.cast_column("image", datasets.Image()).to_parquet(path / "train.parquet")
    return "hf"


@pytest.mark.parametrize("decoder", ["pil", "dali"])
@pytest.mark.parametrize("write", [in_folder, in_tar, in_table])
def test_every_source_and_decoder_gives_the_same_pixels(write, decoder, tmp_path, monkeypatch):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(webdataset, "CACHE", tmp_path / "cache")
    if find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    taken = []
    for number, (make, how) in enumerate(((in_folder, "pil"), (write, decoder))):
        (tmp_path / str(number)).mkdir()
        settings = data(
            make(tmp_path / str(number)), tmp_path / str(number), image_size=40, decoder=how, max_unreadable=0.0
        )
        rows = np.arange(build_source(settings).num_rows)
        batches = Loader(
            build_source(settings), rows, data=settings, seed=SEED, consumed=0, accumulate=1, rank=0, world_size=1,
            device="cpu", quarantine=None,
        )  # fmt: skip
        taken.append(joined(take(batches, 2)))
    (expected, labels, _), (x, y, _) = taken
    assert len(x) == 48 and torch.equal(y, labels)
    difference = (x - expected).abs().mul(127.5).flatten(1).mean(dim=1).max()
    assert difference == 0 if decoder == "pil" else difference <= 0.5
    assert (x[:10].flatten(1).unsqueeze(0) - x[:10].flatten(1).unsqueeze(1)).abs().mean(2).add(
        torch.eye(10)
    ).min() > 1e-3


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_epoch_has_each_row_once(settings, world_size):
    known, source = views_of(settings), build_source(settings)
    batches = [b for rank in range(world_size) for b in take(loader(settings, rank=rank, world_size=world_size), 9)]
    x, y, index = joined(batches)
    assert torch.equal(index, torch.arange(9 * 24))
    rows = [known[image.contiguous().numpy().tobytes()] for image in x]
    assert y.tolist() == [source.load(row)[1] for row in rows]
    captions = {int(i): caption for b in batches for i, caption in zip(b.index, b.captions, strict=False)}
    if settings.caption_column or settings.source == "latents":
        assert [captions[i].strip() for i in range(9 * 24)] == [text(row).strip() for row in rows]
    else:
        assert not captions
    epochs = [rows[start : start + 35] for start in range(0, 9 * 24 - 34, 35)]
    assert all(sorted(epoch) == list(range(2, ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 6


@pytest.mark.parametrize(("world_size", "num_workers", "accumulate"), [(1, 2, 1), (2, 1, 3), (3, 0, 2), (8, 0, 1)])
def test_resumes_exactly_with_other_ranks_and_workers(settings, world_size, num_workers, accumulate):
    if settings.source != "latents":
        settings = SimpleNamespace(**vars(settings) | {"crop": "random"})
    x, y, index = joined(take(loader(settings), 6))
    changes = {"world_size": world_size, "num_workers": num_workers, "accumulate": accumulate, "consumed": 72}
    resumed = [
        batch for rank in range(world_size) for batch in take(loader(settings, rank=rank, **changes), 3 * accumulate)
    ]
    for whole, part in zip((x, y, index), joined(resumed), strict=True):
        assert torch.equal(whole[72:], part)
