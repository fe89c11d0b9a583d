"""Drawn pictures with captions, for a text-conditional run that needs no download: colour × shape × place.

    row ─ Philox ─▶ colour (6), shape (3), place (9), and by how much it strays ─▶ uint8 [3, S, S], "a red circle at the top left"

Radius, position, brightness and the grey behind stray, so no two rows are alike. Edges are smooth: a pixel is covered by as much
as it lies within the outline, by its signed distance in pixels. The label is the number of the caption, of 162.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitfast.philox import philox4x32, split64

if TYPE_CHECKING:
    from sitfast.config import DataConfig

COLOURS = {
    "red": (230, 40, 40),
    "yellow": (230, 230, 40),
    "green": (40, 230, 40),
    "cyan": (40, 230, 230),
    "blue": (40, 40, 230),
    "magenta": (230, 40, 230),
}
SHAPES = ("circle", "square", "triangle")
PLACES = (
    "at the top left", "at the top", "at the top right",
    "at the left", "in the centre", "at the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
CAPTIONS = [f"a {colour} {shape} {place}" for colour in COLOURS for shape in SHAPES for place in PLACES]
_ROWS = 50_000
_SEED = 0x5AA9E5  # of the pictures, whatever the seed of the run
_SATURATED = 0.35  # what `read` takes for colour: the difference of channels, of 1 …
_LEAST = 0.01  # … and the least share of such pixels


class Shapes:
    """Nothing is kept: a row is drawn when it is asked for."""

    channels = 3
    num_rows = _ROWS
    num_classes = len(CAPTIONS)
    class_names = CAPTIONS
    captioned = True

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def load(self, row: int) -> tuple[Tensor, int]:
        number, strays = _draws(row)
        colour, rest = divmod(number, len(SHAPES) * len(PLACES))
        shape, place = divmod(rest, len(PLACES))
        size = self.image_size
        x = (0.25 + 0.25 * (place % 3) + 0.03 * (2 * strays[0] - 1)) * size
        y = (0.25 + 0.25 * (place // 3) + 0.03 * (2 * strays[1] - 1)) * size
        radius = (0.13 + 0.06 * strays[2]) * size
        middles = np.arange(size) + 0.5
        cover = np.clip(0.5 - _distance(SHAPES[shape], middles[None] - x, middles[:, None] - y, radius), 0, 1)
        paper, ink = 20 + 60 * strays[3], np.array([*COLOURS.values()][colour]) * (0.8 + 0.2 * strays[4])
        pixels = paper + (ink[:, None, None] - paper) * cover
        return torch.from_numpy(np.rint(pixels).astype(np.uint8)), number

    def caption(self, row: int) -> str:
        return CAPTIONS[_draws(row)[0]]


def _draws(row: int) -> tuple[int, list[float]]:
    """(number of the caption, five uniforms) of a row."""
    words = [word for block in range(2) for word in philox4x32((block, 0, row, 0), split64(_SEED))]
    return words[0] % len(CAPTIONS), [(word + 0.5) * 2.0**-32 for word in words[1:6]]


def _distance(shape: str, dx: NDArray[Any], dy: NDArray[Any], radius: float) -> NDArray[Any]:
    """How far outside of the outline (negative: inside) a point is, dx to the right of its centre and dy below it."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.9 * radius
    slope = abs(dx) * np.sqrt(0.75) - dy * 0.5  # equilateral, its point upwards
    return np.maximum(slope - 0.6 * radius, dy - 0.6 * radius)


def read(x: Tensor) -> tuple[Tensor, Tensor]:
    """The colour and the place, as numbers `[N]`, of what pictures `[N, 3, S, S]` in [-1, 1] show; -1 where there is no colour.

    A pixel has one where its channels differ enough. The colour is that of the nearest hue to the mean of such pixels, the
    place is the nearest to their middle.
    """
    pixels = (x.double().clamp(-1, 1) + 1) / 2
    strength = pixels.amax(1) - pixels.amin(1)
    marked = (strength > _SATURATED).double()
    share = marked.mean((1, 2))
    total = marked.sum((1, 2)).clamp(min=1)
    mean = (pixels * marked[:, None]).sum((2, 3)) / total[:, None]
    known = torch.tensor([*COLOURS.values()], dtype=torch.float64)
    hues = (torch.nn.functional.normalize(value - value.mean(1, keepdim=True), dim=1) for value in (mean, known))
    colour = torch.mm(next(hues), next(hues).T).argmax(1)
    middles = (torch.arange(x.shape[-1], dtype=torch.float64) + 0.5) / x.shape[-1]
    across, down = ((marked.sum(axis) * middles).sum(1) / total for axis in (1, 2))
    place = ((torch.stack((down, across)) - 0.25) / 0.25).round().clamp(0, 2)
    place = (place[0] * 3 + place[1]).long()
    return tuple(torch.where(share < _LEAST, -1, value) for value in (colour, place))  # type: ignore[return-value]


def build(data: DataConfig) -> Shapes:
    return Shapes(data.image_size)
