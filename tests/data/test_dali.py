"""JPEGs through DALI's CPU pipeline (the GPU's where there is one): the pixels of Pillow, odd files, refused batches."""

import gc
import io
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from sitfast.data import build_source
from sitfast.data import dali as module
from sitfast.data.image import adm_crop
from sitfast.data.loader import Loader
from sitfast.errors import SitfastError
from tests.data.test_sources import data, joined, loader, take

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def dali():
    pytest.importorskip("nvidia.dali")


def photographs():
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def jpeg(image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", **{"quality": 90, **settings})
    return file.getvalue()


def write(path, files):
    (path / "class").mkdir(parents=True)
    for name, content in files.items():
        (path / "class" / name).write_bytes(content)
    return path


def batches(path, size, count, *, device="cpu", rows=None, **changes):
    settings = data("folder", path, image_size=size, **{"decoder": "dali", "batch_size": 4, **changes})
    source = build_source(settings)
    made = Loader(
        source, np.arange(source.num_rows) if rows is None else rows, data=settings, seed=3, consumed=0, accumulate=1,
        rank=0, world_size=1, device=device, quarantine=None,
    )  # fmt: skip
    return made, take(made, count)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [400, 256, 200, 128, 96, 64, 40])
def test_pixels_are_those_of_pillow(dali, tmp_path, size, device):
    """Enlarged, shrunk, and halved up to three times, odd sides among them; both orientations, grey, all samplings, mirrored."""
    china, flower = photographs()  # 640 x 427
    files = {
        "0.jpg": jpeg(china), "1.jpg": jpeg(flower, subsampling=0), "2.jpg": jpeg(china.convert("L")),
        "3.jpg": jpeg(flower.rotate(90, expand=True), subsampling=1), 
        "4.jpg": jpeg(china.crop((3, 5, 638, 424)), progressive=True), "5.jpg": jpeg(flower.crop((0, 0, 430, 427)), quality=75),
        "6.jpg": jpeg(china.resize((401, 399))), "7.jpg": jpeg(flower),
    }  # fmt: skip
    path = write(tmp_path / "images", files)
    made, by_dali = batches(path, size, 6, device=device)
    _, by_pillow = batches(path, size, 6, device=device, decoder="pil")
    assert made._batches.refused == 0
    for ours, expected in zip(by_dali, by_pillow, strict=True):
        assert torch.equal(ours.index, expected.index) and torch.equal(ours.y, expected.y)
        assert ours.x.is_contiguous() and expected.x.is_contiguous()  # DALI's own layout is channels last
        difference = (ours.x - expected.x).abs().mul(127.5).flatten(1)
        assert difference.mean(dim=1).max() <= 0.5
        assert difference.quantile(0.99, dim=1).max() <= 4  # further off only around the middle of an odd side
    assert all(module.plan(content, size) is not None for content in files.values())


def test_the_plan_of_a_jpeg():
    """1001 × 750 becomes 500 × 375, then 341 × 256, of which the crop begins at column 42."""
    found = module.plan(jpeg(Image.new("RGB", (1001, 750))), 256)
    expected = [1, 0, 42 * 500 / 341, 375, 298 * 500 / 341, 750, 1001, 1, 0, 0, 0, 0, 0, 0]
    assert found == pytest.approx(expected, rel=1e-12)
    assert module.plan(jpeg(Image.new("L", (60, 80))), 60) == [0, 10, 0, 70, 60, *[0] * 9]


def test_what_pillow_is_to_see_to(tmp_path):
    image = photographs()[0].resize((120, 100))
    rotated, upright = Image.Exif(), Image.Exif()
    rotated[0x0112], upright[0x0112] = 6, 1
    whole = jpeg(image)
    assert module.plan(jpeg(image, exif=upright), 64) is not None
    rgb = jpeg(image, keep_rgb=True)
    adobe = whole[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + whole[2:]  # says: no colour transform
    png = io.BytesIO()
    image.save(png, format="PNG")
    for content in (
        jpeg(image, exif=rotated), jpeg(image.convert("CMYK")), whole[:-1], whole[:2000], b"", b"\xff\xd8\xff\xd9",
        whole + b"x", rgb, adobe, png.getvalue(), jpeg(image.resize((1700, 100))), jpeg(image.resize((1024, 1030))),
    ):  # fmt: skip
        assert module.plan(content, 64) is None


def test_a_decompression_bomb(monkeypatch):
    content = jpeg(Image.new("RGB", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    assert module.plan(content, 16) is None


def odd_files():
    china = photographs()[0].resize((120, 100))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    png, alpha = io.BytesIO(), io.BytesIO()
    china.save(png, format="PNG")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)).save(alpha, format="WEBP")
    return {
        "0.jpg": jpeg(china), "1.jpg": jpeg(china, exif=rotated), "2.jpg": jpeg(china.convert("CMYK")), "3.jpg": png.getvalue(),
        "4.jpg": b"", "5.jpg": jpeg(china)[:1500], "6.jpg": b"not an image", "7.jpg": jpeg(china.transpose(0)),
        "8.webp": alpha.getvalue(), "9.png": png.getvalue(),
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_random_crops_are_those_of_pillow(dali, tmp_path, device):
    china, flower = photographs()
    path = write(
        tmp_path / "images", {"0.jpg": jpeg(china), "1.jpg": jpeg(flower.crop((1, 2, 402, 403))), "2.jpg": jpeg(flower)}
    )
    _, by_dali = batches(path, 150, 6, device=device, crop="random")
    _, by_pillow = batches(path, 150, 6, device=device, crop="random", decoder="pil")
    _, central = batches(path, 150, 6, device=device, decoder="pil")
    for ours, expected, centre in zip(by_dali, by_pillow, central, strict=True):
        assert (ours.x - expected.x).abs().mul(127.5).flatten(1).mean(dim=1).max() <= 0.5
        assert (ours.x - centre.x).abs().mul(127.5).flatten(1).mean(dim=1).min() > 2


def test_corrupt_jpegs_do_not_end_the_run(dali, tmp_path):
    """Bytes changed, left out and cut off inside the file, with the end mark in place."""
    generator = np.random.default_rng(0)
    whole = jpeg(photographs()[0].resize((200, 150)))
    files = {}
    for number in range(24):
        content = bytearray(whole)
        if number % 3 == 0:
            content[generator.integers(20, 600)] ^= 1 << generator.integers(0, 8)
        elif number % 3 == 1:
            start = generator.integers(300, len(whole) - 300)
            del content[start : start + 200]
        else:
            content[generator.integers(300, len(whole)) :] = b"\xff\xd9"
        files[f"{number:02}.jpg"] = bytes(content)
    path = write(tmp_path / "images", files)
    _, by_dali = batches(path, 64, 12, max_unreadable=1.0)
    _, by_pillow = batches(path, 64, 12, max_unreadable=1.0, decoder="pil")
    for ours, expected in zip(by_dali, by_pillow, strict=True):
        assert torch.equal(ours.index, expected.index) and ours.x.shape == expected.x.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_odd_and_broken_files_fare_as_with_pillow(dali, tmp_path, num_workers, device):
    path = write(tmp_path / "images", odd_files())
    changes = {"max_unreadable": 0.5, "num_workers": num_workers, "device": device}
    made, by_dali = batches(path, 64, 8, **changes)
    _, by_pillow = batches(path, 64, 8, decoder="pil", **changes)
    assert made.unreadable == 3 and made._batches.refused == 0
    for ours, expected in zip(by_dali, by_pillow, strict=True):
        assert torch.equal(ours.index, expected.index) and torch.equal(ours.y, expected.y)
        assert ours.skipped == expected.skipped
        assert (ours.x - expected.x).abs().mul(127.5).flatten(1).mean(dim=1).max() <= 0.5


def test_batches_without_any_jpeg(dali, tmp_path):
    files = {name: content for name, content in odd_files().items() if name in ("3.jpg", "8.webp", "9.png")}
    path = write(tmp_path / "images", files)
    _, by_dali = batches(path, 64, 5)
    _, by_pillow = batches(path, 64, 5, decoder="pil")
    assert all(torch.equal(ours.x, expected.x) for ours, expected in zip(by_dali, by_pillow, strict=True))


def test_a_batch_that_dali_refuses_is_decoded_by_pillow(dali, tmp_path, monkeypatch):
    """A plan for what is no JPEG stands for a file that only DALI cannot read."""
    files = {name: content for name, content in odd_files().items() if name in ("0.jpg", "7.jpg", "9.png")}
    path = write(tmp_path / "images", files)
    _, by_pillow = batches(path, 64, 8, decoder="pil", flip=False, batch_size=1)
    monkeypatch.setattr(module, "plan", lambda content, size, crop: [0.0, 0.0, 0.0, 100.0, 100.0, *[0.0] * 9])
    original = module.Decoder._submit

    def corrupting(self, loaded):
        if loaded.x.data[:4].tolist() == [0x89, 0x50, 0x4E, 0x47]:
            loaded.x.data[:] = 0
        original(self, loaded)

    monkeypatch.setattr(module.Decoder, "_submit", corrupting)
    made, by_dali = batches(path, 64, 8, flip=False, batch_size=1)
    refused = [ours for ours, expected in zip(by_dali, by_pillow, strict=True) if torch.equal(ours.x, expected.x)]
    assert made._batches.refused == len(refused) >= 2
    assert [ours.index.item() for ours in by_dali] == list(range(8))


def test_a_forked_process_can_forget_its_pipelines(dali, tmp_path):
    """As the workers of a second loader do with the pipeline of the first."""
    made, _ = batches(write(tmp_path / "images", {"0.jpg": jpeg(photographs()[0])}), 64, 2)
    pid = os.fork()
    if pid == 0:
        made._batches._pipeline = None
        gc.collect()
        os._exit(7)
    end = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 7


@pytest.mark.parametrize(("world_size", "num_workers", "accumulate"), [(1, 2, 1), (2, 1, 3), (3, 0, 2), (8, 0, 1)])
def test_resumes_exactly_with_other_ranks_and_workers(dali, tmp_path, world_size, num_workers, accumulate):
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (40, 40 + n, 3), dtype=np.uint8)) for n in range(37)]
    path = write(tmp_path / "images", {f"{n:02}.jpg": jpeg(image) for n, image in enumerate(noise)})
    settings = data("folder", path, decoder="dali", max_unreadable=0.0)
    whole = joined(take(loader(settings), 4))
    changes = {"world_size": world_size, "num_workers": num_workers, "accumulate": accumulate, "consumed": 48}
    parts = [b for rank in range(world_size) for b in take(loader(settings, rank=rank, **changes), 2 * accumulate)]
    for before, after in zip(whole, joined(parts), strict=True):
        assert torch.equal(before[48:], after)


def test_without_dali_or_without_images(tmp_path, monkeypatch):
    path = write(tmp_path / "images", {"0.jpg": jpeg(Image.new("RGB", (8, 8)))})
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(SitfastError, match=r'data.decoder=dali needs DALI .*: pip install "sitfast\[dali\]"'):
        batches(path, 8, 1)
    settings = SimpleNamespace(source=object(), image_size=8)
    with pytest.raises(SitfastError, match=r"data.decoder=dali decodes image files, and this source has none"):
        module.Decoder(
            iter(()), settings, size=8, batch_size=1, device=torch.device("cpu"), num_threads=1, hw_decoder_load=0.0
        )
    assert adm_crop(Image.new("RGB", (8, 8)), 8).size == (8, 8)
