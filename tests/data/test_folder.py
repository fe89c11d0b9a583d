"""A folder of class folders: layout, ADM crop, odd and broken image files."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast.data import Unreadable, build_source
from sitfast.data.image import Crop, adm_crop, adm_plan
from sitfast.errors import SitfastError

RNG = np.random.default_rng(0)


def noise(width, height, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8))


def folder(path, size=16):
    return build_source(SimpleNamespace(source="folder", path=str(path), image_size=size))


def load(path, size=16):
    """The pixels `[H, W, 3]` of one file, through a data set of its own."""
    image, label = folder(path.parent.parent, size).load(0)
    assert (image.dtype, image.shape, label) == (torch.uint8, (3, size, size), 0)
    return image.permute(1, 2, 0).numpy()


@pytest.fixture
def single(tmp_path):
    (tmp_path / "class").mkdir()
    return tmp_path / "class"


# The filters of a resize, from their definition: a weighted mean of the source pixels around each new pixel's centre.


def box(x):
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def cubic(x, a=-0.5):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights(old, new, kernel, radius):
    """`[new, old]`; a filter is widened when it shrinks."""
    scale = old / new
    width = max(scale, 1.0)
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        first, last = int(max(centre - radius * width + 0.5, 0)), int(min(centre + radius * width + 0.5, old))
        for j in range(first, last):
            matrix[i, j] = kernel((j - centre + 0.5) / width)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize(pixels, width, height, kernel, radius, axes):
    """One axis, then the other, rounded to whole levels after each, as an 8-bit image demands."""
    for axis in axes:
        matrix = weights(pixels.shape[axis], (height, width)[axis], kernel, radius)
        pixels = np.moveaxis(np.tensordot(matrix, pixels, axes=(1, axis)), 0, axis)
        pixels = np.floor(pixels + 0.5).clip(0, 255)
    return pixels


def expected_crop(pixels, size, box_axes, cubic_axes):
    pixels = pixels.astype(np.float64)
    halvings = int(math.log2(min(pixels.shape[:2]) / size))
    for _ in range(halvings):
        if min(pixels.shape[:2]) < 2 * size:  # odd sides lose a pixel on the way
            break
        pixels = resize(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, box, 0.5, box_axes)
    height, width = pixels.shape[:2]
    factor = size / min(height, width)
    pixels = resize(pixels, round(width * factor), round(height * factor), cubic, 2.0, cubic_axes)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"), [(16, 16), (37, 81), (81, 37), (33, 32), (31, 47), (127, 129), (7, 5), (1, 9), (255, 64)]
)
def test_adm_crop_from_the_definition_of_its_filters(width, height):
    image = noise(width, height)
    ours = np.asarray(adm_crop(image, 16)).astype(int)
    assert ours.shape == (16, 16, 3)
    pixels = np.asarray(image)
    # Pillow chooses which axis it resizes first, by version and shape: some choice must give every pixel.
    orders = itertools.product(((1, 0), (0, 1)), repeat=2)
    assert any(np.array_equal(ours, expected_crop(pixels, 16, *order)) for order in orders)


def test_random_crops_cover_the_zooms_and_places_of_adm():
    """16 to 20 pixels for the shorter side, then any of the places; at either end of the draws and by their shares."""
    low, high = Crop(1e-7, 1e-7, 1e-7), Crop(1 - 1e-7, 1 - 1e-7, 1 - 1e-7)
    assert adm_plan(30, 20, 16, low) == ([], (24, 16), 0, 0)
    assert adm_plan(30, 20, 16, high) == ([], (30, 20), 14, 4)
    assert adm_plan(81, 40, 16, high) == ([(40, 20)], (40, 20), 24, 4)
    assert adm_plan(81, 40, 16, low) == ([(40, 20)], (32, 16), 0, 0)  # 40 < 2 · 20, and not below 2 · 16
    plans = [adm_plan(20, 20, 16, Crop(*draw)) for draw in RNG.random((20_000, 3))]
    sides = np.bincount([plan.scaled[0] for plan in plans], minlength=21)[16:]
    assert (np.abs(sides - 4000) < 6 * np.sqrt(4000 * 0.8)).all() and sides.sum() == 20_000
    places = np.zeros((5, 5))
    for plan in plans:
        if plan.scaled == (20, 20):
            places[plan.top, plan.left] += 1
    assert (np.abs(places - places.sum() / 25) < 6 * np.sqrt(places.sum() / 25)).all()


def test_a_random_crop_is_a_part_of_the_scaled_image():
    image = noise(30, 20)
    crop = Crop(0.99, 0.5, 0.3)
    assert np.array_equal(np.asarray(adm_crop(image, 16, crop)), np.asarray(image)[2:18, 4:20])


def test_a_square_image_of_the_right_size_is_untouched(single):
    image = noise(16, 16)
    image.save(single / "a.png")
    assert np.array_equal(load(single / "a.png"), np.asarray(image))


def test_labels_and_rows_are_sorted_and_hidden_files_ignored(tmp_path):
    for name in ["b/2.PNG", "b/10.png", "a/z.JPEG", "a/deep/er/x.webp", "a/.hidden.png", ".git/y.png", "c/notes.txt"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".txt":
            file.write_text("text")
        else:
            noise(20, 18).save(file)
    (tmp_path / "readme.txt").write_text("text")
    source = folder(tmp_path)
    assert source.class_names == ["a", "b", "c"]
    assert (source.num_rows, source.num_classes, source.channels, source.image_size) == (4, 3, 3, 16)
    names = [source.name(row).removeprefix(f"{tmp_path}/") for row in range(4)]
    assert names == ["a/deep/er/x.webp", "a/z.JPEG", "b/10.png", "b/2.PNG"]
    assert [source.load(row)[1] for row in range(4)] == [0, 0, 1, 1]


def test_a_name_that_is_no_utf8(single):
    name = b"\xff\xfe.png".decode("utf-8", "surrogateescape")
    noise(16, 16).save(single / "a.png")
    (single / "a.png").rename(single / name)
    assert load(single / name).shape == (16, 16, 3)


def test_a_loop_of_links_ends(single):
    noise(16, 16).save(single / "a.png")
    (single / "loop").symlink_to(single)
    assert folder(single.parent).num_rows == 1


def test_grey(single):
    image = noise(16, 16, 1)
    image.save(single / "a.png")
    assert np.array_equal(load(single / "a.png"), np.asarray(image)[..., None].repeat(3, 2))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_lies_over_white(single, suffix):
    image = np.zeros((16, 16, 4), np.uint8)
    image[:8, :, 0], image[:8, :, 3] = 255, 255  # the upper half opaque red, the lower transparent black
    Image.fromarray(image).save(single / f"a.{suffix}", lossless=True)
    pixels = load(single / f"a.{suffix}")
    assert (pixels[:8] == [255, 0, 0]).all()
    assert (pixels[8:] == 255).all()


def test_palette_with_a_transparent_colour(single):
    image = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8), 8)[:, None].repeat(16, 1), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(single / "a.png", transparency=1)
    pixels = load(single / "a.png")
    assert (pixels[:8] == [10, 20, 30]).all()
    assert (pixels[8:] == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(single):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(levels).save(single / "a.png")
    assert np.array_equal(load(single / "a.png")[..., 0], np.arange(256).reshape(16, 16))


def test_cmyk_jpeg(single):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(single / "a.jpg", quality=95)  # magenta + yellow = red
    pixels = load(single / "a.jpg").astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() < 10


def test_exif_orientation_is_applied(single):
    image = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is the right side of the stored image
    image.save(single / "a.png", exif=exif)
    assert np.array_equal(load(single / "a.png"), np.rot90(np.asarray(image), -1))


def test_broken_exif_leaves_the_image_readable(single):
    image = noise(16, 16)
    image.save(single / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    assert np.array_equal(load(single / "a.png"), np.asarray(image))


def test_a_png_named_jpg_is_read_by_its_content(single):
    image = noise(16, 16)
    image.save(single / "a.JPG", format="PNG")
    assert np.array_equal(load(single / "a.JPG"), np.asarray(image))


def break_empty(file):
    file.write_bytes(b"")


def break_text(file):
    file.write_text("not an image\n")


def break_jpeg(file):
    noise(200, 200).save(file, format="JPEG")
    file.write_bytes(file.read_bytes()[:5000])


def break_png(file):
    noise(200, 200).save(file, format="PNG")
    file.write_bytes(file.read_bytes()[:5000])


def break_webp(file):
    noise(200, 200).save(file, format="WEBP")
    file.write_bytes(file.read_bytes()[:5000])


def break_format(file):
    noise(16, 16).save(file, format="BMP")


def break_link(file):
    file.symlink_to(file.parent / "nowhere")


def break_shape(file):
    Image.new("L", (1, 40_000)).save(file, format="PNG")


@pytest.mark.parametrize(
    "break_file",
    [break_empty, break_text, break_jpeg, break_png, break_webp, break_format, break_link, break_shape],
)
def test_a_broken_file_is_unreadable(single, break_file):
    file = single / "a.jpg"
    break_file(file)
    source = folder(single.parent, size=256)
    with pytest.raises(Unreadable) as caught:
        source.load(0)
    assert caught.value.name == str(file)
    assert caught.value.reason


def test_a_decompression_bomb_is_unreadable(single, monkeypatch):
    noise(64, 64).save(single / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(Unreadable, match="DecompressionBomb"):
        load(single / "a.png")


def one_line(path):
    with pytest.raises(SitfastError) as caught:
        folder(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_path(tmp_path):
    assert "/nowhere' does not exist; data.path needs one folder per class" in one_line(tmp_path / "nowhere")


def test_path_not_set():
    with pytest.raises(SitfastError, match=r"data.path is not set; with data.source=folder"):
        build_source(SimpleNamespace(source="folder", path=None, image_size=16))


def test_path_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not a folder" in one_line(tmp_path / "file")


def test_empty_folder(tmp_path):
    assert "is empty" in one_line(tmp_path)


def test_images_without_class_folders(tmp_path):
    noise(16, 16).save(tmp_path / "a.png")
    (tmp_path / ".cache").mkdir()
    assert "holds 1 files but no folder" in one_line(tmp_path)


def test_class_folders_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("")
    assert "has 2 folders but no image in them" in one_line(tmp_path)
