"""Images on their way out: PNG grids, single PNGs, ADM's .npz, and the loss curve.

    pixel = round((clamp(x, -1, 1) + 1) · 127.5)        halves away from zero, which is up

Every file is written beside its name and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sitfast.errors import SitfastError

_MIN_CELL = 48  # pixels; an 8 x 8 digit shown as it is would be a speck
_GAP = 2
_CAPTION = 15  # height of the strip under a labelled cell
_PAPER, _INK = 255, 70


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not know its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def to_uint8(x: Tensor) -> np.ndarray:
    """`[N, C, H, W]` in [-1, 1] → uint8 `[N, H, W, C]`; values beyond the range are clamped."""
    x = x.detach().float()
    broken = int((~x.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise SitfastError(f"{broken} of {len(x)} images hold NaN or infinity; try more sampling steps or fp32")
    pixels = ((x.clamp(-1, 1) + 1) * 127.5 + 0.5).floor().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_grid(x: Tensor, path: Path, *, columns: int | None = None, labels: Sequence[object] | None = None) -> Path:
    """A PNG of all images `[N, C, H, W]`, row by row (None: as many columns as rows); `labels` stand under their cells.

    Grey stays grey. Small images are enlarged by a whole factor, pixel by pixel, so that nothing is smoothed away.
    """
    pixels = to_uint8(x)
    num, height, width, channels = pixels.shape
    if labels is not None and len(labels) != num:
        raise ValueError(f"{len(labels)} labels for {num} images; give one each")
    factor = max(1, -(-_MIN_CELL // min(height, width)))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = min(columns or math.ceil(math.sqrt(num)), num)
    rows = -(-num // columns)
    step_y, step_x = height + _GAP + (0 if labels is None else _CAPTION), width + _GAP
    sheet = np.full((rows * step_y + _GAP, columns * step_x + _GAP, channels), _PAPER, np.uint8)
    for i, image in enumerate(pixels):
        top, left = _GAP + i // columns * step_y, _GAP + i % columns * step_x
        sheet[top : top + height, left : left + width] = image
    picture = _picture(sheet)
    if labels is not None:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
        for i, label in enumerate(labels):
            middle = _GAP + i % columns * step_x + width / 2
            below = _GAP + i // columns * step_y + height + _CAPTION / 2
            draw.text((middle, below), str(label), fill=(_INK,) * channels, font=font, anchor="mm")
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


def save_pngs(x: Tensor, folder: Path, start: int = 0) -> Path:
    """One PNG an image of `[N, C, H, W]`, named by its number: `000000.png` for start = 0."""
    for number, image in enumerate(to_uint8(x), start):
        with replacing(folder / f"{number:06d}.png") as temporary:
            _picture(image).save(temporary, format="PNG")
    return folder


def save_npz(x: Tensor | np.ndarray, labels: Tensor | np.ndarray, path: Path) -> Path:
    """ADM's layout: `arr_0` uint8 `[N, H, W, 3]`, `arr_1` int64 `[N]`; grey is repeated to three channels.

    `x` is `[N, C, H, W]` in [-1, 1], or what `to_uint8` made of it (a quarter of the memory for 50,000 samples).
    """
    pixels = x if isinstance(x, np.ndarray) else to_uint8(x)
    if len(labels) != len(pixels):
        raise ValueError(f"{len(labels)} labels for {len(pixels)} images; give one each")
    if pixels.shape[-1] == 1:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    numbers = labels if isinstance(labels, np.ndarray) else labels.cpu().numpy()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, pixels, numbers.astype(np.int64))
    return path


def plot_loss(metrics_path: Path, png: Path) -> Path:
    """Draw the training `loss` of metrics.jsonl, as logged and smoothed, and `val_loss` as points."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        raise SitfastError('the loss curve needs matplotlib; pip install "sitfast[demo]"') from None

    steps, losses = series(metrics_path, "train", "loss")
    val_steps, val_losses = series(metrics_path, "val", "val_loss")
    if not len(losses):
        raise SitfastError(f"{metrics_path} holds no training loss; train longer or lower log.every")

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db9d9", linewidth=0.9, label="training, as logged")
    axes.plot(steps, _smooth(losses), color="#1f4e8c", linewidth=2, label="training, smoothed")
    if len(val_losses):
        style = {"color": "#d1495b", "marker": "o", "markersize": 5, "markeredgecolor": "white", "linewidth": 1}
        axes.plot(val_steps, val_losses, label="validation, fixed noise", **style)
    low, high = (f(np.concatenate([losses, val_losses])) for f in (np.min, np.max))
    if low > 0 and high / low > 3:  # a curve that falls this far hides its end on a linear axis
        axes.set_yscale("log")
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 30 else (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    axes.set_title(f"Loss of {metrics_path.resolve().parent.name}", loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(which="both", color="#888888", labelcolor="#444444")
    axes.legend(frameon=False, labelcolor="#444444")
    with replacing(png) as temporary:
        figure.savefig(temporary, format="png")
    return png


def _picture(pixels: np.ndarray) -> Image.Image:
    """uint8 `[H, W, C]` → a grey or colour picture."""
    if pixels.shape[-1] not in (1, 3):
        raise SitfastError(
            f"{pixels.shape[-1]} channels are not an image (1 or 3 are); decode latents by the VAE first"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def series(path: Path, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `name` in the records of one kind; null, which stands for NaN, is passed over."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    except OSError as error:
        raise SitfastError(f"metrics file {path} cannot be read: {error.strerror}") from None
    points = [(r["step"], r[name]) for r in records if r.get("kind") == kind and r.get(name) is not None]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the curve; narrower near the start, where the loss falls too fast for that."""
    position = np.arange(len(values))
    half = np.minimum(position // 4, max(len(values) // 40, 1))
    total = np.concatenate([[0.0], values.cumsum()])
    first, last = position - half, np.minimum(position + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)
