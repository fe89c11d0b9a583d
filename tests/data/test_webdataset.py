"""Tar shards: layout, labels, the kept list, and tars that are broken or mean harm."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

from sitfast.data import Unreadable, build_source, webdataset
from sitfast.errors import SitfastError
from tests.data.test_sources import data, pictures, png


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(webdataset, "CACHE", tmp_path_factory.mktemp("cache"))


def pack(path, members, **kinds):
    """A tar of (name, content) pairs; `kinds` sets fields of the TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in kinds.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))


def samples(rows, label=lambda n: {"cls": str(n % 5).encode()}):
    for n in rows:
        yield f"train/{n:04}.png", png(pictures()[n])
        for kind, content in label(n).items():
            yield f"train/{n:04}.{kind}", content


def build(path, **changes):
    return build_source(data("webdataset", path, **changes))


def assert_rows(source, rows, label):
    assert source.num_rows == len(rows)
    for row, n in enumerate(rows):
        image, value = source.load(row)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(pictures()[n])) and value == label(n)


def test_a_folder_a_file_and_a_pattern(tmp_path):
    pack(tmp_path / "a-001.tar", samples(range(20, 37)))
    pack(tmp_path / "a-000.tar", samples(range(20)))
    (tmp_path / "notes.txt").write_text("")
    assert_rows(build(tmp_path), range(37), lambda n: n % 5)
    assert_rows(build(tmp_path / "a-*.tar"), range(37), lambda n: n % 5)
    source = build(tmp_path / "a-001.tar")
    assert_rows(source, range(20, 37), lambda n: n % 5)
    assert source.name(3) == f"{tmp_path / 'a-001.tar'}:train/0023.png" and source.class_names == list("01234")


def test_labels_of_every_kind(tmp_path):
    pack(tmp_path / "json.tar", samples(range(9), lambda n: {"json": json.dumps({"kind": n % 3, "x": "y"}).encode()}))
    assert_rows(build(tmp_path / "json.tar", label_column="kind"), range(9), lambda n: n % 3)
    pack(tmp_path / "names.tar", samples(range(9), lambda n: {"cls": f"name{n % 2}\n".encode()}))
    source = build(tmp_path / "names.tar")
    assert source.class_names == ["name0", "name1"]
    assert_rows(source, range(9), lambda n: n % 2)
    pack(tmp_path / "none.tar", samples(range(4), lambda n: {}))
    source = build(tmp_path / "none.tar", label_column=None)
    assert source.class_names == ["all"] and source.load(3)[1] == 0
    for content, message in (
        ({}, r"'train/0000' has neither .cls nor .json; label it, or set data.label_column=null"),
        ({"json": b"{}"}, r"train/0000.json holds no label 'label' \(KeyError\)"),
        ({"json": b"{"}, r"holds no label"),
        ({"json": b'{"label": 1.5}'}, r"holds 1.5; a label is a whole number or a name"),
        ({"cls": b"\xff\xfe"}, r"holds no label"),
        ({"cls": b"-1"}, r"has label -1, which stands for no label"),
    ):
        pack(tmp_path / "bad.tar", samples(range(1), lambda n, content=content: content))
        with pytest.raises(SitfastError, match=message):
            build(tmp_path / "bad.tar")


def test_texts(tmp_path):
    pack(
        tmp_path / "json.tar",
        samples(range(3), lambda n: {"json": json.dumps({"label": 0, "text": f"né {n}"}).encode()}),
    )
    assert [build(tmp_path / "json.tar", caption_column="text").caption(row) for row in range(3)] == [
        "né 0",
        "né 1",
        "né 2",
    ]
    assert not build(tmp_path / "json.tar").captioned
    with pytest.raises(SitfastError, match=r"train/0000.json holds no text 'words' \(KeyError\)"):
        build(tmp_path / "json.tar", caption_column="words")
    pack(tmp_path / "none.tar", samples(range(3)))
    with pytest.raises(SitfastError, match=r"'train/0000' has neither .txt nor .json; add its text"):
        build(tmp_path / "none.tar", caption_column="text")


def test_names_up_to_the_first_dot_are_one_sample(tmp_path):
    image = png(pictures()[0])
    members = [
        ("a.b/1.jpg", image),
        ("a.b/1.seg.png", image),
        ("a.b/1.cls", b"3"),
        ("a.b/notes.txt", b"x"),
        ("2.cls", b"1"),
    ]
    pack(tmp_path / "a.tar", members)
    source = build(tmp_path / "a.tar")
    assert source.num_rows == 1 and source.load(0)[1] == 3 and source.name(0).endswith("a.tar:a.b/1.jpg")
    pack(tmp_path / "a.tar", [*members, ("a.b/1.png", image)])
    with pytest.raises(SitfastError, match=r"'a.b/1' has two members of the same kind \(a.b/1.png\)"):
        build(tmp_path / "a.tar")
    long = "d/" * 120 + "x" * 150  # a name that needs an extension of the format
    pack(tmp_path / "long.tar", [(f"{long}.png", image), (f"{long}.cls", b"0")])
    assert_rows(build(tmp_path / "long.tar"), [0], lambda n: 0)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_names_that_point_outside(tmp_path, name):
    pack(tmp_path / "a.tar", [*samples(range(2)), (name, b"")])
    with pytest.raises(SitfastError, match=r"a name that points outside of it; do not trust this tar"):
        build(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path, kind):
    pack(tmp_path / "a.tar", [("x.png", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(SitfastError, match=r"'x.png', which is no plain file"):
        build(tmp_path)


def test_a_tar_truncated_at_every_kilobyte(tmp_path):
    file = tmp_path / "a.tar"
    pack(file, samples(range(6)))
    whole = file.read_bytes()
    end = max(i for i, byte in enumerate(whole) if byte) // 512 * 512 + 512
    for size in range(0, end + 1, 512):
        file.write_bytes(whole[:size])
        with pytest.raises(SitfastError, match=r"a.tar (is|:|has)") as caught:
            build(file)
        assert "truncated" in str(caught.value) and "\n" not in str(caught.value), size
    file.write_bytes(whole[: end + 512])
    assert build(file).num_rows == 6


def test_what_is_no_tar(tmp_path):
    with pytest.raises(SitfastError, match=r"has no .tar files; give a folder of them, one, or a pattern"):
        build(tmp_path)
    pack(tmp_path / "a.tar", [("readme.txt", b"")])
    with pytest.raises(SitfastError, match=r"1 tars but no image in them"):
        build(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "x.png")
    with pytest.raises(SitfastError, match=r"is truncated or no plain tar .*; copy it again, uncompressed"):
        build(tmp_path)
    with pytest.raises(SitfastError, match=r"data.path is not set"):
        build_source(type("Data", (), {"source": "webdataset", "path": None}))


def test_the_list_is_made_once_and_again_when_a_tar_changes(tmp_path, monkeypatch, capsys):
    pack(tmp_path / "a.tar", samples(range(4)))
    build(tmp_path)
    listed = []
    original = webdataset._samples
    monkeypatch.setattr(webdataset, "_samples", lambda *args: listed.append(args) or original(*args))
    assert_rows(build(tmp_path), range(4), lambda n: n % 5)
    assert not listed
    pack(tmp_path / "a.tar", samples(range(5)))
    assert build(tmp_path).num_rows == 5 and len(listed) == 1
    for kept in webdataset.CACHE.iterdir():
        kept.write_bytes(b"damaged")
    assert build(tmp_path).num_rows == 5 and len(listed) == 2
    assert "is damaged (ValueError); listing the tars again" in capsys.readouterr().err
    (webdataset.CACHE / "file").write_text("")
    monkeypatch.setattr(webdataset, "CACHE", webdataset.CACHE / "file")  # a folder that cannot be made
    assert build(tmp_path).num_rows == 5
    assert "the list of the tars' members is not kept" in capsys.readouterr().err


def test_broken_images_and_a_tar_that_shrinks(tmp_path):
    pack(
        tmp_path / "a.tar",
        [("0.jpg", b"no image"), ("0.cls", b"0"), *samples(range(1, 3)), ("9.jpg", b""), ("9.cls", b"0")],
    )
    source = build(tmp_path)
    for row in (0, 3):
        with pytest.raises(Unreadable) as caught:
            source.load(row)
        assert caught.value.name == f"{tmp_path / 'a.tar'}:{'0' if row == 0 else '9'}.jpg"
    os.truncate(tmp_path / "a.tar", 2000)
    with pytest.raises(Unreadable, match="it was changed during the run"):
        source.load(2)
