"""Cached latents: files, order, mapping, and everything that can be wrong with them."""

import hashlib
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sitfast.data import build_source, latents
from sitfast.data.sampler import BlockOrder
from sitfast.errors import SitfastError
from sitfast.vae import Pixels
from tests.data.test_sources import ROWS, SIZE, cached, data


@pytest.fixture
def folder(tmp_path):
    cached(tmp_path)
    return tmp_path


def build(folder, **changes):
    return build_source(data("latents", folder, **changes))


def test_shards_are_ordinary_safetensors_files(folder):
    expected = torch.from_numpy(np.random.default_rng(0).normal(size=(ROWS, 2, 2, 4, 32, 32))).half()
    for k, count in enumerate([10, 10, 10, 7]):
        with safe_open(folder / f"shard-0000{k}.safetensors", framework="pt") as file:
            assert set(file.keys()) == {"moments", "label", "row", "text", "text_end"}
            rows = np.arange(10 * k, 10 * k + count)
            assert torch.equal(file.get_tensor("moments"), expected[rows])
            assert file.get_tensor("row").tolist() == rows.tolist()
            assert file.get_tensor("label").tolist() == (rows % 5).tolist()
    assert latents.read_shard(folder / "shard-00000.safetensors").offset % 4096 == 0


def test_rows_are_moments_and_flips_choose_the_mirror(folder):
    expected = torch.from_numpy(np.random.default_rng(0).normal(size=(ROWS, 2, 2, 4, 32, 32))).half()
    source = build(folder)
    assert (source.num_rows, source.num_classes, source.channels, source.image_size) == (ROWS, 5, 3, SIZE)
    image, label = source.load(23)
    assert torch.equal(image, expected[23, 0]) and label == 3
    rows = np.array([36, 0, 9, 10, 9])
    mirrored = torch.tensor([True, False, True, True, False])
    x, y = source.gather(rows, mirrored)
    assert x.dtype == torch.float16 and torch.equal(x, expected[rows, mirrored.long()])
    assert y.tolist() == [1, 0, 4, 0, 4]
    source.read_ahead(np.array([5, 6, 7, 8, 9, 10, 11, 36, 0]))  # over the end of a shard, and backwards
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 20_000 and torch.equal(copy.load(23)[0], image)


def test_bfloat16(tmp_path):
    moments = torch.randn(3, 1, 2, 4, 2, 2).bfloat16()
    job = {"vae": {}, "image_size": SIZE, "views": 1, "num_rows": 3}
    ones = np.arange(3)
    latents.write_shard(tmp_path, 0, job=job, moments=moments, labels=ones, rows=ones, sums=[[0.0] * 4] * 2)
    shard = latents.read_shard(tmp_path / latents.shard_name(0))
    latents.write_manifest(tmp_path, [shard], about={"channels": 3, "class_names": ["a"]})
    assert torch.equal(build(tmp_path, flip=False).load(2)[0], moments[2, 0])
    with pytest.raises(SitfastError, match=r"data.flip=true needs mirrored latents, .* use data.flip=false"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("num_rows", "block", "window"), [(1, 4, 8), (37, 4, 12), (37, 5, 37), (96, 8, 32), (50, 1, 7)]
)
def test_a_block_order_visits_each_row_once_and_stays_near(num_rows, block, window):
    order = BlockOrder(num_rows, 7, block=block, window=window)
    for epoch in (0, 1, 5):
        index = np.arange(num_rows) + epoch * num_rows
        rows = order.rows(index)
        assert np.array_equal(np.sort(rows), np.arange(num_rows))
        assert np.array_equal(order.rows(index[::-1]), rows[::-1])
        for start in range(0, num_rows, window):
            touched = len(set(rows[start : start + window] // block))
            assert touched <= -(-min(window, num_rows) // block) + 2  # whole blocks, and one cut at either end
            ahead = order.ahead(index[start : start + window] - window) if epoch else []
            if epoch:
                assert set(ahead) == set(rows[start : start + window])  # what the window before was told to read
            assert set(order.window_of(int(index[start]))) == set(rows[start : start + window])


def test_block_orders_differ_and_are_uniform_within_a_window():
    epochs = [
        tuple(BlockOrder(37, seed, block=4, window=12).rows(np.arange(37) + 37 * e)) for seed in (0, 1) for e in (0, 1)
    ]
    assert len(set(epochs)) == 4
    order = BlockOrder(24, 1, block=4, window=24)
    counts = np.zeros((24, 24))
    for epoch in range(2000):
        counts[np.arange(24), order.rows(np.arange(24) + 24 * epoch)] += 1
    chi_square = ((counts - 2000 / 24) ** 2 / (2000 / 24)).sum()
    assert abs(chi_square - 23**2) < 6 * np.sqrt(2 * 23**2)
    steps = np.diff(order.rows(np.arange(24 * 2000)).reshape(2000, 24), axis=1)
    assert abs((steps == 1).mean() - 1 / 24) < 0.005  # neighbours on the disk are no more often neighbours in time


def test_a_shard_truncated_at_every_kilobyte(folder):
    file = folder / "shard-00001.safetensors"
    whole = file.read_bytes()
    for size in range(0, len(whole), 1024):
        file.write_bytes(whole[:size])
        with pytest.raises(SitfastError, match=r"shard-00001.safetensors is (truncated|no shard)") as caught:
            build(folder)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole.replace(b'"shape": [10, 2,', b'"shape": [10, 4,', 1))
    with pytest.raises(SitfastError, match="is no shard of latents, or damaged"):
        build(folder)
    file.write_bytes(whole + b"x")
    with pytest.raises(SitfastError, match="truncated or altered"):
        build(folder)
    file.unlink()
    with pytest.raises(SitfastError, match="is missing"):
        build(folder)


def test_one_changed_bit_is_found_on_request(folder):
    file = folder / "shard-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[200_000] ^= 4
    file.write_bytes(content)
    build(folder, verify=False)
    with pytest.raises(SitfastError, match=r"shard-00002.safetensors is damaged: its hash"):
        build(folder)


def test_a_shard_of_another_set(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    cached(other, rows_each=5)
    (folder / "shard-00001.safetensors").write_bytes((other / "shard-00001.safetensors").read_bytes())
    with pytest.raises(SitfastError, match=r"is not the shard that manifest.json lists"):
        build(folder)


def change(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


def test_manifests_that_do_not_fit(folder, tmp_path_factory):
    with pytest.raises(
        SitfastError, match=r"data.image_size=32, and the latents .* were made from 16 px; use data.image_size=16"
    ):
        build(folder, image_size=32)
    change(folder, format=2)
    with pytest.raises(SitfastError, match="has format 2, this sitfast reads 1"):
        build(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(SitfastError, match=r"manifest.json is damaged"):
        build(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(SitfastError, match=r"has no manifest.json; run the same sitfast.encode again to finish it"):
        build(folder)
    for path in (tmp_path_factory.mktemp("empty"), folder / "nowhere"):
        with pytest.raises(SitfastError, match=r"has no manifest.json; python -m sitfast.encode writes one"):
            build(path)
    with pytest.raises(SitfastError, match=r"data.path is not set"):
        build_source(SimpleNamespace(source="latents", path=None))


def test_another_vae(folder):
    with pytest.raises(SitfastError, match=r"made by the VAE 'a/b', and vae.id=null is another one; name the VAE"):
        build(folder).check_vae(Pixels())


def test_statistics_of_the_manifest(tmp_path):
    generator = np.random.default_rng(1)
    moments = generator.normal(size=(7, 2, 2, 3, 4, 4))
    mean, std = moments[:, :, 0], np.abs(moments[:, :, 1])
    ends = [0, 4, 7]
    for k in range(2):
        here = slice(ends[k], ends[k + 1])
        sums = [mean[here].sum((0, 1, 3, 4)).tolist(), (mean[here] ** 2 + std[here] ** 2).sum((0, 1, 3, 4)).tolist()]
        rows = np.arange(7)[here]
        part = torch.from_numpy(moments[here]).half()
        latents.write_shard(tmp_path, k, job={"num_rows": 9}, moments=part, labels=rows, rows=rows, sums=sums)
    shards = [latents.read_shard(tmp_path / latents.shard_name(k)) for k in range(2)]
    manifest = latents.write_manifest(tmp_path, shards, about={})
    draws = mean + std * generator.normal(size=(20_000, *mean.shape))  # the latents that training will see
    np.testing.assert_allclose(manifest["channel_mean"], mean.mean((0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(manifest["channel_std"], draws.std((0, 1, 2, 4, 5)), rtol=2e-3)
    assert (manifest["count"], manifest["unreadable"]) == (7, 2)
    raw = (tmp_path / "shard-00001.safetensors").read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert manifest["shards"][1] == {
        "file": "shard-00001.safetensors", "count": 3, "bytes": len(raw), "sha256": hashlib.sha256(data).hexdigest()
    }  # fmt: skip
