"""Hugging Face data sets: every local form gives the same rows; labels and columns of every kind; what is wrong says so."""

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast.data import Unreadable, build_source
from sitfast.errors import SitfastError
from tests.data.test_sources import data, pictures, png

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(labels=None, **columns):
    images = [{"bytes": png(picture), "path": None} for picture in pictures()]
    content = {"image": images, "label": [n % 5 for n in range(37)] if labels is None else labels, **columns}
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


def build(path, **changes):
    return build_source(data("hf", path, **changes))


def assert_rows(source, labels):
    assert source.num_rows == 37
    for row, picture in enumerate(pictures()):
        image, label = source.load(row)
        assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture))
        assert label == labels[row]


def test_every_local_form(tmp_path):
    labels = [n % 5 for n in range(37)]
    table().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table(), "test": table([0] * 37)}).save_to_disk(tmp_path / "dict")
    (tmp_path / "parquet/data").mkdir(parents=True)
    for part in range(2):
        rows = range(part * 20, min(37, part * 20 + 20))
        table().select(rows).to_parquet(tmp_path / f"parquet/data/train-0000{part}-of-00002.parquet")
    table([0] * 37).to_parquet(tmp_path / "parquet/data/test-00000-of-00001.parquet")
    table().to_parquet(tmp_path / "one.parquet")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in ("saved", "dict", "parquet", "one.parquet", arrow):
        source = build(tmp_path / path)
        assert_rows(source, labels)
        assert source.class_names == list("01234") and (source.channels, source.image_size) == (3, 16)
    for path in ("dict", "parquet"):
        assert_rows(build(tmp_path / path, split="test"), [0] * 37)
    with pytest.raises(SitfastError, match=r"data.split='val' is not in .*; it has train, test"):
        build(tmp_path / "dict", split="val")


def test_paths_instead_of_bytes(tmp_path):
    files = [str(tmp_path / f"{n}.png") for n in range(37)]
    for file, picture in zip(files, pictures(), strict=True):
        picture.save(file)
    datasets.Dataset.from_dict({"file": files, "kind": [1] * 37}).save_to_disk(tmp_path / "saved")
    assert_rows(build(tmp_path / "saved", image_column="file", label_column="kind"), [1] * 37)


def test_labels_of_every_kind(tmp_path):
    names = [f"name{n % 3}" for n in range(37)]
    table(names).save_to_disk(tmp_path / "strings")
    source = build(tmp_path / "strings")
    assert source.class_names == ["name0", "name1", "name2"] and source.load(4)[1] == 1
    feature = datasets.ClassLabel(names=["dog", "cat", "eel", "fox"])
    table([n % 3 for n in range(37)]).cast_column("label", feature).save_to_disk(tmp_path / "classes")
    source = build(tmp_path / "classes")
    assert source.class_names == ["dog", "cat", "eel", "fox"] and source.num_classes == 4 and source.load(2)[1] == 2
    source = build(tmp_path / "classes", label_column=None)
    assert (source.class_names, source.load(2)[1]) == (["all"], 0)
    for name, labels, message in (
        ("minus", [-1] * 37, r"row 0 has label -1, which stands for no label"),
        ("none", [0] * 5 + [None] * 32, r"row 5 has no label"),
        ("floats", [0.5] * 37, r"row 0 has label 0.5; labels are whole numbers or names"),
    ):
        table(labels).save_to_disk(tmp_path / name)
        with pytest.raises(SitfastError, match=message):
            build(tmp_path / name)


def test_columns_that_are_not_there_or_hold_no_images(tmp_path):
    table(text=["words"] * 37, size=[3] * 37).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        SitfastError, match=r"data.image_column='jpg' is no column of .*; it has image, label, text, size"
    ):
        build(tmp_path / "saved", image_column="jpg")
    with pytest.raises(SitfastError, match=r"data.label_column='class' is no column"):
        build(tmp_path / "saved", label_column="class")
    with pytest.raises(SitfastError, match=r"data.caption_column='words' is no column"):
        build(tmp_path / "saved", caption_column="words")
    with pytest.raises(SitfastError, match=r"data.caption_column='size' of .* holds no text but int64"):
        build(tmp_path / "saved", caption_column="size")
    with pytest.raises(SitfastError, match=r"data.image_column='size' of .* holds no images but Value"):
        build(tmp_path / "saved", image_column="size")
    table().select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(SitfastError, match=r"cannot be loaded: .* corresponds to no data"):
        build(tmp_path / "empty.parquet")


def test_a_row_that_cannot_be_read(tmp_path):
    images = [{"bytes": b"no image", "path": None}, None]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features).save_to_disk(tmp_path / "saved")
    source = build(tmp_path / "saved")
    for row, reason in enumerate(["no PNG, JPEG or WebP image", "there is no image in this row"]):
        with pytest.raises(Unreadable, match=reason) as caught:
            source.load(row)
        assert caught.value.name == f"{tmp_path / 'saved'} (train) row {row}"
    datasets.Dataset.from_dict({"image": ["nowhere.png"], "label": [0]}).save_to_disk(tmp_path / "paths")
    with pytest.raises(Unreadable, match="FileNotFoundError"):
        build(tmp_path / "paths").load(0)


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    for path, message in (
        (tmp_path / "empty", r"holds no data set; give a folder of save_to_disk"),
        (tmp_path / "nowhere", r"does not exist, and a hub id reads owner/name"),
        (tmp_path / "bad.parquet", r"bad.parquet' cannot be loaded: .*; check the files"),
    ):
        with pytest.raises(SitfastError, match=message) as caught:
            build(path)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SitfastError, match=r"data.path='sitfast-tests/no-such-data' cannot be loaded: .*; check the name"
    ):
        build("sitfast-tests/no-such-data")
    with pytest.raises(SitfastError, match=r"data.path is not set"):
        build_source(type("Data", (), {"source": "hf", "path": None}))


def test_image_formats(tmp_path):
    """CMYK, 16-bit, grey, alpha and rotated images go the way of files in a folder."""
    kinds = {}
    for name, picture in {
        "cmyk.jpg": Image.new("CMYK", (20, 16), (0, 255, 255, 0)),
        "grey.png": Image.new("L", (20, 16), 90),
        "deep.png": Image.fromarray(np.full((16, 20), 30_000, np.uint16)),
        "alpha.png": Image.new("RGBA", (20, 16), (0, 0, 0, 0)),
    }.items():
        picture.save(tmp_path / name)
        kinds[name] = (tmp_path / name).read_bytes()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    pictures()[0].save(tmp_path / "rotated.png", exif=rotated)
    kinds["rotated.png"] = (tmp_path / "rotated.png").read_bytes()
    (tmp_path / "files/class").mkdir(parents=True)
    for name, content in kinds.items():
        (tmp_path / "files/class" / name).write_bytes(content)
    images = [{"bytes": kinds[name], "path": None} for name in sorted(kinds)]
    datasets.Dataset.from_dict({"image": images, "label": [0] * 5}).save_to_disk(tmp_path / "saved")
    source, folder = build(tmp_path / "saved"), build_source(data("folder", tmp_path / "files"))
    for row in range(5):
        assert torch.equal(source.load(row)[0], folder.load(row)[0])
