"""Files that people look at: exact pixels, layouts and the loss curve."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast import images
from sitfast.errors import SitfastError


def test_pixels_by_closed_formula() -> None:
    """Every multiple of 1/1024 in [-1.5, 1.5], rounded half up in exact rational arithmetic."""
    numerators = range(-1536, 1537)
    expected = [min(max((((k + 1024) * 255) * 2 + 2048) // 4096, 0), 255) for k in numerators]
    x = torch.tensor([k / 1024 for k in numerators]).view(1, 1, 1, -1)
    assert images.to_uint8(x).ravel().tolist() == expected


def test_layout_and_dtype() -> None:
    x = torch.stack([torch.full((4, 5), v) for v in (-1.0, 0.0, 1.0)])[None]
    pixels = images.to_uint8(x)
    assert (pixels.shape, pixels.dtype) == ((1, 4, 5, 3), np.uint8)
    assert pixels[0, 2, 3].tolist() == [0, 128, 255]
    assert images.to_uint8(x.bfloat16())[0, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_images_are_counted(value: float) -> None:
    x = torch.zeros(4, 1, 8, 8)
    x[1, 0, 2, 2] = x[3, 0, 0, 0] = value
    with pytest.raises(SitfastError, match="2 of 4 images"):
        images.to_uint8(x)


def test_grid_places_every_image(tmp_path: Path) -> None:
    """8 x 8 cells are enlarged 6 times to 48 pixels; gaps and the empty last cell are paper."""
    x = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 8, 8).clone()
    x[0, 0, 0, 1] = 1.0
    path = images.save_grid(x, tmp_path / "deep" / "grid.png", columns=3)
    picture = Image.open(path)
    assert (picture.mode, picture.size) == ("L", (3 * 50 + 2, 2 * 50 + 2))
    sheet = np.asarray(picture)
    for i, value in enumerate([0, 64, 128, 191, 255]):
        top, left = 2 + i // 3 * 50, 2 + i % 3 * 50
        assert (sheet[top + 10 : top + 48, left : left + 48] == value).all()
    assert (sheet[2:8, 8:14] == 255).all() and sheet[2:8, 2:8].max() == 0 and (sheet[8:50, 2:50] == 0).all()
    assert (sheet[:, :2] == 255).all() and (sheet[50:52] == 255).all() and (sheet[52:, 102:] == 255).all()
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_grid_in_colour_without_columns(tmp_path: Path) -> None:
    picture = Image.open(images.save_grid(torch.zeros(5, 3, 64, 50), tmp_path / "g.png"))
    assert (picture.mode, picture.size) == ("RGB", (3 * 52 + 2, 2 * 66 + 2))


def test_labels_stand_below_their_cells(tmp_path: Path) -> None:
    x = torch.full((2, 1, 48, 48), -1.0)
    plain = np.asarray(Image.open(images.save_grid(x, tmp_path / "plain.png", columns=2)))
    sheet = np.asarray(Image.open(images.save_grid(x, tmp_path / "named.png", columns=2, labels=["7", ""])))
    extra = sheet.shape[0] - plain.shape[0]
    assert extra > 8 and sheet.shape[1] == plain.shape[1]
    caption = sheet[50 : 50 + extra]
    assert caption[:, 2:50].min() < 128 and caption[:, 52:].min() == 255
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        images.save_grid(x, tmp_path / "g.png", labels=["7"])


def test_latents_are_not_images(tmp_path: Path) -> None:
    with pytest.raises(SitfastError, match="4 channels"):
        images.save_grid(torch.zeros(1, 4, 8, 8), tmp_path / "g.png")
    assert not list(tmp_path.iterdir())


def test_single_pngs(tmp_path: Path) -> None:
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    folder = images.save_pngs(x, tmp_path / "out", start=9)
    assert sorted(p.name for p in folder.iterdir()) == ["000009.png", "000010.png"]
    assert np.asarray(Image.open(folder / "000010.png")).tolist() == np.full((8, 8, 3), 255).tolist()


def test_npz_in_adm_layout(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
    path = images.save_npz(x, torch.tensor([3, 5], dtype=torch.int32), tmp_path / "samples.bin")
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert (pixels.shape, pixels.dtype, labels.dtype, labels.tolist()) == ((2, 8, 8, 3), np.uint8, np.int64, [3, 5])
    assert (pixels[..., 0] == pixels[..., 2]).all() and pixels[0, 0, 0, 0] == 0 and pixels[1, 7, 7, 1] == 255
    again = images.save_npz(images.to_uint8(x), labels, tmp_path / "again.npz")
    assert again.read_bytes()[-200:] == path.read_bytes()[-200:]
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        images.save_npz(x, torch.tensor([3]), tmp_path / "bad.npz")


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    target.write_text("old")
    with pytest.raises(RuntimeError), images.replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("grid.png", "old")]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, images.replacing(tmp_path / "grid.png") as temporary:
        os.symlink("/dev/full", temporary)
        with open(temporary, "wb") as file:
            file.write(b"x")
    assert caught.value.filename == str(tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_loss_curve(tmp_path: Path) -> None:
    metrics = tmp_path / "digits" / "metrics.jsonl"
    metrics.parent.mkdir()
    train = [{"kind": "train", "step": s, "loss": 2 / s if s != 30 else None} for s in range(1, 60)]
    val = [{"kind": "val", "step": 40, "val_loss": 0.05}]
    metrics.write_text("".join(json.dumps(r) + "\n" for r in train + val) + '{"kind": "train", "st')
    picture = Image.open(images.plot_loss(metrics, tmp_path / "loss.png"))
    assert picture.size == (1200, 675)
    colours = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
    assert {(0x1F, 0x4E, 0x8C), (0xD1, 0x49, 0x5B)} <= colours  # both the curve and the validation points are drawn


def test_loss_curve_needs_a_loss(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SitfastError, match="no training loss"):
        images.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with pytest.raises(SitfastError, match="cannot be read"):
        images.plot_loss(tmp_path / "none.jsonl", tmp_path / "loss.png")
