"""The drawn shapes: what is drawn is what the caption says, by a reading of its own."""

import numpy as np
import pytest
import torch

from sitfast.data import shapes
from sitfast.data.shapes import CAPTIONS, COLOURS, PLACES, SHAPES, Shapes


def area(kind: str, radius: float) -> float:
    """Of a circle, a square of half-width 0.9 r, an equilateral triangle whose sides are 0.6 r from its centre."""
    return {"circle": np.pi * radius**2, "square": (1.8 * radius) ** 2, "triangle": 3**1.5 * (0.6 * radius) ** 2}[kind]


@pytest.mark.parametrize("size", [16, 64])
def test_pictures_show_what_their_captions_say(size):
    source = Shapes(size)
    for row in range(200):
        image, number = source.load(row)
        caption = source.caption(row)
        assert caption == source.class_names[number] and image.shape == (3, size, size) and image.dtype == torch.uint8
        _, colour, kind, place = caption.split(" ", 3)
        pixels = image.numpy().astype(float)
        paper = pixels[:, 0, 0]
        assert paper.min() == paper.max() and 20 <= paper[0] <= 80
        # How much of each pixel is covered, by the channel that the colour changes most.
        channel = int(np.argmax([abs(value - paper[0]) for value in COLOURS[colour]]))
        inside = pixels[channel].max()
        cover = (pixels[channel] - paper[0]) / (inside - paper[0])
        middle = [(cover.sum(axis) * (np.arange(size) + 0.5)).sum() / cover.sum() / size for axis in (0, 1)]
        column, line = PLACES.index(place) % 3, PLACES.index(place) // 3
        assert np.abs(np.array(middle) - [0.25 + 0.25 * column, 0.25 + 0.25 * line]).max() < 0.05
        least, most = (area(kind, share * size) for share in (0.13, 0.19))
        assert 0.9 * least - 1 < cover.sum() < 1.15 * most + 1


def test_the_three_shapes_have_their_outlines():
    """At 64 px: how the covered width goes from the top to the bottom."""
    source, seen = Shapes(64), set()
    for row in range(60):
        image, _ = source.load(row)
        kind = source.caption(row).split()[2]
        spread = image.float().amax(0) - image.float().amin(0)
        widths = (spread > spread.max() / 2).sum(1)
        widths = widths[widths > 0].float()
        top, middle, bottom = widths[1], widths[len(widths) // 2], widths[-2]
        wanted = {
            "circle": top < 0.8 * middle and bottom < 0.8 * middle,
            "square": top == middle == bottom,
            "triangle": top < 0.4 * bottom and top < middle < bottom,
        }
        assert wanted[kind], (row, kind, widths)
        seen.add(kind)
    assert seen == set(SHAPES)


def test_rows_are_a_function_of_their_number_and_all_differ():
    first, second = Shapes(16), Shapes(16)
    images = torch.stack([first.load(row)[0] for row in range(500)])
    assert torch.equal(images[321], second.load(321)[0])
    assert len(images.flatten(1).unique(dim=0)) == 500
    numbers = np.bincount([first.load(row)[1] for row in range(4000)], minlength=162)
    assert len(CAPTIONS) == len(set(CAPTIONS)) == 162 and numbers.min() > 5 and numbers.max() < 60


def test_reading_finds_colour_and_place_and_admits_where_there_is_none():
    source = Shapes(16)
    rows = [source.load(row) for row in range(400)]
    x, numbers = torch.stack([image for image, _ in rows]).float() / 127.5 - 1, torch.tensor([y for _, y in rows])
    colours, places = shapes.read(x)
    assert torch.equal(colours, numbers // 27) and torch.equal(places, numbers % 9)
    grey = torch.linspace(-1, 1, 256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert [value.tolist() for value in shapes.read(grey)] == [[-1], [-1]]
    assert torch.equal(shapes.read(x.flip(1))[0] == numbers // 27, torch.isin(numbers // 27, torch.tensor([2, 5])))
