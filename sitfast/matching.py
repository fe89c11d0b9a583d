"""What data, VAE, text encoder and model of a run must agree on before its first step."""

from __future__ import annotations

import hashlib
from typing import Any

from sitfast import data
from sitfast.config import Config
from sitfast.data.latents import Latents
from sitfast.errors import SitfastError
from sitfast.presets import preset_kwargs
from sitfast.text import Frozen


def check_source(cfg: Config, source: data.Source) -> None:
    """SitfastError unless the source has what the model is conditioned on."""
    if cfg.text.encoder is not None:
        if not (isinstance(source, data.Captioned) and source.captioned):
            raise SitfastError(
                f"text.encoder={cfg.text.encoder} needs captions, and data.path={cfg.data.path} has none; encode it again"
                " from a source with data.caption_column, or use text.encoder=null"
            )
    elif source.num_classes > cfg.model.num_classes:
        raise SitfastError(
            f"model.num_classes={cfg.model.num_classes} is too few: {cfg.data.source} holds labels up to"
            f" {source.num_classes - 1}; use model.num_classes={source.num_classes}"
        )


def serve_states(cfg: Config, source: data.Source, encoder: Frozen) -> None:
    """Batches bring the stored states of the captions, and the encoder rests; SitfastError where they do not fit."""
    if not isinstance(source, Latents):
        raise SitfastError(
            f"text.cache=true wants the latents that sitfast.encode wrote, and data.source={cfg.data.source} brings"
            " images; use data.source=latents, or text.cache=false"
        )
    source.serve_states(encoder)
    encoder.park()


def fingerprint(source: data.Source) -> dict[str, Any]:
    """What tells one data set from another: its counts, its classes and three of its rows."""
    rows: list[str] = []
    for row in (0, source.num_rows // 2, source.num_rows - 1):
        try:
            x, y = source.load(row)
            rows.append(hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:12] + f" of class {y}")
        except data.Unreadable as error:
            rows.append(f"{error.name} is unreadable")
    names = hashlib.sha256("\n".join(source.class_names).encode()).hexdigest()[:12]
    return {
        "number of rows": source.num_rows,
        "number of classes": source.num_classes,
        "class names": names,
        "first, middle and last row": rows,
    }


def _patch_size(cfg: Config) -> int:
    return cfg.model.patch_size or preset_kwargs(cfg.model.preset or "")["patch_size"]


def grid(cfg: Config, downsample: int) -> int:
    """Tokens a side of an image of data.image_size."""
    return cfg.data.image_size // downsample // _patch_size(cfg)


def check_sizes(cfg: Config, vae: Any) -> None:
    """Images must split evenly into patches, through the VAE where there is one."""
    vae.check_image_size(cfg.data.image_size)
    patch, downsample = _patch_size(cfg), vae.downsample
    pixels = patch * downsample
    sizes = [("data.image_size", cfg.data.image_size)]
    sizes += [
        (f"data.resolutions: {height} × {width}: {side}", side)
        for height, width in cfg.data.resolutions
        for side in (height, width)
    ]
    for name, size in sizes:
        if size % pixels:
            below = size // pixels * pixels
            options = f"{below} or {below + pixels}" if below else f"{pixels}"
            through = f" behind a VAE that shrinks {downsample} times" if downsample > 1 else ""
            value = f"{name}={size}" if name == "data.image_size" else name
            raise SitfastError(
                f"{value} is not divisible by {pixels}, the pixels of a patch of {patch}{through}; try {options}"
            )
