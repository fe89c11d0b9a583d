"""JPEGs decoded by NVIDIA DALI, on the GPU where there is one: `data.decoder=dali`.

    worker process   row ─ read ─▶ bytes ─ header ─▶ plan (halvings, crop, mirror)              order, ranks, resume: the loader's
    main process     bytes, plan ─ DALI: decode ▶ halve with a box filter ▶ bicubic of the crop, mirrored ─▶ uint8 on the device

DALI sees ordinary JPEGs alone. Everything else (PNG, WebP, CMYK, rotated, truncated, huge …) is decoded by Pillow in the worker
and joins its batch, so odd and unreadable files fare as they do without DALI. Where DALI refuses a batch all the same, Pillow
decodes that batch. Batches are decoded ahead, while the model works.

Pixels are those of `adm_crop` within a mean of 0.5 of 255: a halving rounds after each axis, half upwards, as Pillow does.
"""

from __future__ import annotations

import collections
import io
import itertools
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sitfast.data.image import Crop, EncodedImages, adm_plan
from sitfast.data.loader import Loaded, Reader
from sitfast.errors import SitfastError

_DEPTH = 3  # batches in DALI's hands when one is asked for
_PATIENCE = 10  # batches in a row that DALI may refuse
_MAX_HALVINGS = 3
_RGB_IDS = [82, 71, 66]  # component names "R", "G", "B": stored without a colour transform


def _black() -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


_BLACK = _black()
_BLACK_PLAN = np.array([0, 0, 0, 8, 8, *[0] * (3 * _MAX_HALVINGS)], np.float32)


# A worker forked later inherits the pipelines of this process without their threads, and would wait for them for ever where it
# destroyed one: there they stay until it ends.
_pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[Any] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_pipelines))


class Encoded(NamedTuple):
    """A micro-batch in part: JPEGs that DALI decodes, and images that Pillow has decoded already."""

    data: Tensor  # the JPEGs one after another, uint8
    bounds: Tensor  # of each in `data`, [n + 1]
    plans: Tensor  # [n, 14], see `plan`
    places: Tensor  # in the batch, of the JPEGs
    pixels: Tensor  # [B − n, 3, S, S], uint8
    pixel_places: Tensor


def plan(data: bytes, size: int, crop: Crop | None = None) -> list[float] | None:
    """[halvings, y0, x0, y1, x1, h, w, odd, h, w, odd, h, w, odd] of an ordinary JPEG, None where Pillow is to see to it.

    The crop is in pixels of the halved image; (h, w) is the size before each halving, odd whether one of them is.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":  # no JPEG, or one without an end
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Any = Image.open(io.BytesIO(data), formats=("JPEG",))
            if image.mode not in ("L", "RGB") or ("exif" in image.info and image.getexif().get(0x0112, 1) != 1):
                return None
    except Exception:  # whatever it is, Pillow will say it again when it decodes
        return None
    if image.info.get("adobe_transform") == 0 or [layer[0] for layer in image.layer] == _RGB_IDS:
        return None
    full: tuple[int, int] = image.size
    if max(full) > 16 * min(full):
        return None
    halved, (width, height), left, top = adm_plan(full[0], full[1], size, crop)
    if len(halved) > _MAX_HALVINGS:
        return None
    w, h = halved[-1] if halved else full
    corners = [top * h / height, left * w / width, (top + size) * h / height, (left + size) * w / width]
    before = [full, *halved][: len(halved)]
    stages = [float(value) for w, h in before for value in (h, w, (h | w) & 1)]
    return [len(halved), *corners, *stages, *[0.0] * (3 * _MAX_HALVINGS - len(stages))]


class EncodedReader(Reader):
    """Reads what `Reader` decodes."""

    source: EncodedImages

    def fetch(self, row: int, crop: Crop | None) -> tuple[Any, int]:
        try:
            data = self.source.read(row)
        except Exception:
            return self.source.load(row, crop)  # which says what is wrong with it
        found = plan(data, self.source.image_size, crop)
        return ((data, found), self.source.label(row)) if found else self.source.load(row, crop)

    def collate(self, images: tuple[Any, ...], mirrored: Tensor | None) -> Encoded:
        flips = [False] * len(images) if mirrored is None else mirrored.tolist()
        jpegs = [(place, *image) for place, image in enumerate(images) if isinstance(image, tuple)]
        others = [(place, image) for place, image in enumerate(images) if isinstance(image, Tensor)]
        plans = [
            [found[0], found[1], found[4], found[3], found[2], *found[5:]] if flips[place] else found
            for place, _, found in jpegs
        ]
        size = self.source.image_size
        pixels = [image.flip(-1) if flips[place] else image for place, image in others]
        return Encoded(
            data=torch.frombuffer(bytearray(b"".join(data for _, data, _ in jpegs)) or bytearray(1), dtype=torch.uint8),
            bounds=torch.tensor([*itertools.accumulate((len(data) for _, data, _ in jpegs), initial=0)]),
            plans=torch.tensor(plans, dtype=torch.float32),
            places=torch.tensor([place for place, _, _ in jpegs], dtype=torch.int64),
            pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8),
            pixel_places=torch.tensor([place for place, _ in others], dtype=torch.int64),
        )


class Decoder:
    """Iterates over micro-batches with pixels `[B, 3, S, S]` uint8 on the device, given those with `Encoded` ones."""

    def __init__(
        self,
        encoded: Iterator[Loaded],
        fallback: Reader,
        *,
        size: int,
        batch_size: int,
        device: torch.device,
        num_threads: int,
        hw_decoder_load: float,
    ) -> None:
        if not isinstance(fallback.source, EncodedImages):
            raise SitfastError("data.decoder=dali decodes image files, and this source has none; use data.decoder=pil")
        self.encoded = encoded
        self.fallback = fallback
        self.size = size
        self.device = device
        self.refused = 0  # batches that DALI could not decode
        self._in_a_row = 0
        self._settings = {
            "batch_size": batch_size,
            "num_threads": num_threads,
            "device_id": device.index or 0 if device.type == "cuda" else None,
            "prefetch_queue_depth": _DEPTH,
        }
        self._graph = _graph(size, mixed=device.type == "cuda", hw_decoder_load=hw_decoder_load)
        self._pipeline = self._build()
        self._waiting: collections.deque[Loaded] = collections.deque()

    def __iter__(self) -> Decoder:
        return self

    def __next__(self) -> Loaded:
        while len(self._waiting) < _DEPTH:
            loaded = next(self.encoded)
            self._waiting.append(loaded)
            self._submit(loaded)
            if loaded.failure:
                break
        loaded = self._waiting.popleft()
        if loaded.failure:
            return loaded
        try:
            decoded = self._outputs()
        except RuntimeError as error:  # DALI's one error for all; it takes the pipeline with it
            self._complain(error)
            self._pipeline = self._build()
            for waiting in self._waiting:
                self._submit(waiting)
            again = self.fallback[loaded.index.tolist()]
            return again._replace(unreadable=loaded.unreadable + again.unreadable)
        self._in_a_row = 0
        return loaded._replace(x=self._merge(decoded, loaded.x))

    def _complain(self, error: RuntimeError) -> None:
        """Say so once, and give up where DALI refuses one batch after another."""
        self.refused += 1
        self._in_a_row += 1
        reason = " ".join(str(error).split())[-300:]
        if self.refused == 1:
            print(
                f"warning: DALI refused a batch, which Pillow decodes instead: … {reason}", file=sys.stderr, flush=True
            )
        if self._in_a_row > _PATIENCE:
            raise SitfastError(f"DALI refuses every batch (… {reason}); use data.decoder=pil") from error

    def _build(self) -> Any:
        self._fed = 0
        pipeline = self._graph(**self._settings)
        pipeline.build()
        _pipelines.add(pipeline)
        return pipeline

    def _submit(self, loaded: Loaded) -> None:
        """Every batch goes to DALI, one without a JPEG as a black square. DALI begins when it has `_DEPTH` of them."""
        if loaded.failure:
            return
        data, bounds = loaded.x.data.numpy(), loaded.x.bounds.tolist()
        self._pipeline.feed_input("raw", [data[start:end] for start, end in itertools.pairwise(bounds)] or [_BLACK])
        self._pipeline.feed_input("plan", loaded.x.plans.numpy() if len(bounds) > 1 else [_BLACK_PLAN])
        self._fed += 1
        if self._fed >= _DEPTH:
            self._pipeline.schedule_run()

    def _outputs(self) -> Tensor:
        """`[n, S, S, 3]`, in order on the current stream."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (images,) = self._pipeline.outputs(cuda_stream=stream)
        return torch.from_dlpack(images.as_tensor())

    def _merge(self, decoded: Tensor, batch: Encoded) -> Tensor:
        """`[B, 3, S, S]`, channels last in memory."""
        decoded = decoded.permute(0, 3, 1, 2)
        if not len(batch.pixel_places):
            return decoded
        count = len(batch.places) + len(batch.pixel_places)
        x = torch.empty(count, self.size, self.size, 3, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        there = {"device": self.device, "non_blocking": True}
        x[batch.places.to(**there)] = decoded[: len(batch.places)]
        x[batch.pixel_places.to(**there)] = batch.pixels.to(**there)
        return x


def _graph(size: int, *, mixed: bool, hw_decoder_load: float) -> Any:
    """The pipeline, as a function of DALI's own settings."""
    try:
        from nvidia.dali import fn, math, pipeline_def, types
    except ImportError as error:
        raise SitfastError(f'data.decoder=dali needs DALI ({error}): pip install "sitfast[dali]"') from None
    tuning = {"hw_decoder_load": hw_decoder_load} if mixed else {}

    def drop_middle(image: Any, side: Any, axis: int) -> Any:
        """Without the middle row or column where their number is odd: there Pillow's box takes in three, not two."""
        half = math.floor(side / 2)
        whole = {"axes": [axis], "normalized_anchor": False, "normalized_shape": False}
        return fn.cat(
            fn.slice(image, 0.0 * half, half, **whole), fn.slice(image, side - half, half, **whole), axis=axis
        )

    def mean_of_two(image: Any, height: Any, width: Any) -> Any:
        """Half of the columns or of the rows, rounded half upwards as Pillow rounds: k + ½ becomes k + ¾."""
        linear = {"interp_type": types.INTERP_LINEAR, "antialias": False, "dtype": types.FLOAT}
        return fn.cast(fn.resize(image, size=fn.stack(height, width), **linear) + 0.25, dtype=types.UINT8)

    def halve(image: Any, stage: Any) -> Any:
        if stage[2] > 0:
            image = drop_middle(drop_middle(image, stage[0:1], 0), stage[1:2], 1)
        height, width = math.floor(stage[0] / 2), math.floor(stage[1] / 2)
        return mean_of_two(mean_of_two(image, 2 * height, width), height, width)

    def finish(image: Any, plan: Any) -> Any:
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True, "dtype": types.FLOAT}
        cropped = fn.resize(image, size=[size, size], roi_start=plan[1:3], roi_end=plan[3:5], **cubic)
        return fn.cast(cropped, dtype=types.UINT8)  # rounded and clamped

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        raw = fn.external_source(name="raw", dtype=types.UINT8, ndim=1)
        plan = fn.external_source(name="plan", dtype=types.FLOAT, ndim=1)
        image = fn.decoders.image(
            raw,
            device="mixed" if mixed else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as libjpeg-turbo and Pillow do
            **tuning,
        )
        if plan[0] > 0:
            halved = halve(image, plan[5:8])
            if plan[0] > 1:
                halved = halve(halved, plan[8:11])
            if plan[0] > 2:
                halved = halve(halved, plan[11:14])
            out = finish(halved, plan)
        else:
            out = finish(image, plan)
        return out

    return graph
