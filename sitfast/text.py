"""Captions: their tokens, the encoders that read them, and what a model is given of them.

    caption ─ Tokenizer ─▶ ids, mask [B, L] ─ encode ─▶ Text(tokens, mask, pooled) ─▶ SiT: the pooled vector joins c,
                                                                                         every block attends to the tokens

    text.encoder=bytes     the ids are UTF-8 bytes; a small transformer inside the model (`ByteEncoder`) learns to read them
    text.encoder=<model>   a frozen CLIP text model or T5 encoder of transformers, by hub id or folder, with its tokenizer

L is `text.length` for every batch, so that shapes are static; the mask is true where there is a token, and what lies under
padding reaches nothing. Longer captions are cut, their end mark kept, and counted. The caption that guidance drops to is the
empty one, as in Stable Diffusion: it needs no weights of its own, and `--prompt ""` samples it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitfast.errors import SitfastError
from sitfast.vae import fingerprint

if TYPE_CHECKING:
    from sitfast.config import TextConfig

PAD, BEGIN, END = 256, 257, 258  # the ids after the 256 bytes
_VOCABULARY = 259
_HEAD = 32  # width of a head of the byte encoder
_WORD = 7  # bytes that its convolution sees
DROPPED = -1  # stands in place of a label for "the caption is dropped": no label is negative


class Text(NamedTuple):
    """The captions of a batch.

    tokens: ids `[B, L]` int64, or states of a frozen encoder `[B, L, C]`; mask `[B, L]` bool, true where there is a token;
    pooled `[B, P]`, one vector a caption (P = 0 before a frozen encoder has read them, and for bytes).
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def to(self, device: torch.device | str) -> Text:
        return Text(*(value.to(device, non_blocking=True) for value in self))

    def replaced(self, where: Tensor, other: Text) -> Text:
        """`other` (of one caption) for the rows that `where` `[B]` marks."""
        marks = (where.view(-1, *(1,) * (value.ndim - 1)) for value in self)
        return Text(*(torch.where(mark, new, old) for mark, new, old in zip(marks, other, self, strict=True)))


Condition = Tensor | Text  # labels y [B], or captions


def with_unconditional(y: Condition, null: int | Text) -> Condition:
    """y, and behind it as many null labels, or empty captions."""
    if isinstance(y, Text):
        assert isinstance(null, Text)
        return Text(*(torch.cat((value, other.expand_as(value))) for value, other in zip(y, null, strict=True)))
    assert isinstance(null, int)
    return torch.cat((y, torch.full_like(y, null)))


# Tokens ---------------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    text: Text  # ids, on the CPU
    cut: tuple[str, ...]  # the captions that were too long


class Tokenizer:
    """Captions to ids and mask `[B, L]`. It is copied into the worker processes."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.pad = PAD

    def __call__(self, captions: Sequence[str]) -> Tokens:
        ids = torch.full((len(captions), self.length), self.pad)
        counts = torch.zeros(len(captions), dtype=torch.int64)
        cut = []
        for row, caption in enumerate(captions):
            found, whole = self.read(caption)
            ids[row, : len(found)] = torch.tensor(found)
            counts[row] = len(found)
            if not whole:
                cut.append(caption)
        mask = torch.arange(self.length) < counts[:, None]
        return Tokens(Text(ids, mask, torch.empty(len(captions), 0)), tuple(cut))

    def read(self, caption: str) -> tuple[list[int], bool]:
        """At most `length` ids with their begin and end marks, and whether they are all."""
        found = caption.encode()
        return [BEGIN, *found[: self.length - 2], END], len(found) <= self.length - 2


class _Borrowed(Tokenizer):
    """A tokenizer of transformers."""

    def __init__(self, inner: Any, length: int) -> None:
        super().__init__(length)
        self.inner = inner
        self.pad = inner.pad_token_id if inner.pad_token_id is not None else inner.eos_token_id

    def read(self, caption: str) -> tuple[list[int], bool]:
        # One more than there is room for says that it is too long; without a limit, transformers would warn of it.
        found = self.inner(caption, truncation=True, max_length=self.length + 1)["input_ids"]
        if len(found) <= self.length:
            return found, True
        return self.inner(caption, truncation=True, max_length=self.length)["input_ids"], False


# Encoders -------------------------------------------------------------------------------------------------------------


class ByteEncoder(nn.Module):
    """ids `[B, L]`, mask `[B, L]` → states `[B, L, W]` and their mean `[B, W]`: a pre-norm transformer of `depth` layers.

    A convolution before it sees words where attention over single bytes would have to spell them.
    """

    def __init__(self, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(_VOCABULARY, width)
        self.position_embedding = nn.Parameter(torch.zeros(length, width))
        self.conv = nn.Conv1d(width, width, _WORD, padding=_WORD // 2)
        self.layers = nn.ModuleList(_ByteLayer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = (
            self.token_embedding(ids) * mask[..., None]
        )  # beyond the caption the convolution sees zeros, as at the end of L
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2) + self.position_embedding
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        states = self.norm(x)
        return states, masked_mean(states, mask)


class _ByteLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // _HEAD)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean `[B, C]` of states `[B, L, C]` over the tokens that the mask `[B, L]` has, summed in fp32."""
    weights = mask[..., None].float()
    return ((states.float() * weights).sum(1) / weights.sum(1)).to(states.dtype)


class TextEncoder:
    """Captions to what the model takes. This one is `text.encoder=bytes`: the model takes the ids themselves."""

    def __init__(self, settings: TextConfig, device: torch.device) -> None:
        self.tokenizer = Tokenizer(settings.length)
        self.device = device

    def encode(self, text: Text) -> Text:
        """ids on the device, or states that were stored → what the model takes."""
        return text

    def __call__(self, captions: Sequence[str]) -> Text:
        """What the model takes for these captions, on the device."""
        return self.encode(self.tokenizer(captions).text.to(self.device))


class Frozen(TextEncoder):
    """A text model of transformers that is never trained: ids to states and one pooled vector a caption.

    pooled is CLIP's own (its last layer at the end mark), and the mean over the tokens for T5, which has none.
    `park` it where states come from elsewhere: it then lies in the host's memory but for the captions of sample grids.
    """

    def __init__(self, settings: TextConfig, device: torch.device) -> None:
        kind, found = _described(settings)
        import transformers

        self.device = device
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of our workers
        transformers.utils.logging.disable_progress_bar()
        with _loading(settings):
            tokenizer = transformers.AutoTokenizer.from_pretrained(settings.encoder)
            self.model: Any = getattr(transformers, _MODELS[kind]).from_pretrained(settings.encoder, dtype=dtype)
        if len(tokenizer) > found.vocab_size:
            raise SitfastError(
                f"text.encoder={settings.encoder}: its tokenizer has {len(tokenizer)} tokens, its model knows"
                f" {found.vocab_size}; name a folder where both belong together"
            )
        self.model.requires_grad_(False).eval().to(device)
        self.tokenizer = _Borrowed(tokenizer, settings.length)
        self.parked = False

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def park(self) -> None:
        self.parked = True
        self.model.to("cpu")

    def __call__(self, captions: Sequence[str]) -> Text:
        self.model.to(self.device)
        text = super().__call__(captions)
        if self.parked:
            self.model.to("cpu")
        return text

    @torch.no_grad()
    def encode(self, text: Text) -> Text:
        if text.tokens.is_floating_point():
            dtype = self.model.dtype
            return Text(text.tokens.to(dtype), text.mask, text.pooled.to(dtype))
        with torch.autocast(self.device.type, enabled=False):  # its precision is its own, whatever the step's is
            out = self.model(input_ids=text.tokens, attention_mask=text.mask.to(torch.int64))
        states = out.last_hidden_state.masked_fill(~text.mask[..., None], 0)
        pooled = out.pooler_output if hasattr(out, "pooler_output") else masked_mean(states, text.mask)
        return Text(states, text.mask, pooled)


_MODELS = {  # of transformers, by the model_type of a config
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def build_text(settings: TextConfig, device: torch.device) -> TextEncoder | None:
    """The encoder that `text.encoder` names; None where there is none."""
    if settings.encoder is None:
        return None
    return (TextEncoder if settings.encoder == "bytes" else Frozen)(settings, device)


def text_shape(settings: TextConfig) -> dict[str, int] | None:
    """What a model must know of its captions: the argument `text` of `SiT`. Loads no weights.

    length L; width C of the states and pooled P; depth of the byte encoder, 0 where the states are given.
    """
    if settings.encoder is None:
        return None
    if settings.encoder == "bytes":
        return {"length": settings.length, "width": settings.width, "pooled": settings.width, "depth": settings.depth}
    kind, found = _described(settings)
    width = found.d_model if kind.endswith("t5") else found.hidden_size
    return {"length": settings.length, "width": width, "pooled": width, "depth": 0}


@functools.lru_cache
def frozen_bytes(settings: TextConfig) -> int:
    """What a frozen encoder holds on a GPU while training; nothing where its states are stored. Loads no weights."""
    if settings.encoder in (None, "bytes") or settings.cache:
        return 0
    kind, found = _described(settings)
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, _MODELS[kind])(found)
    return sum(p.numel() for p in model.parameters()) * (2 if settings.precision == "bf16" else 4)


@contextmanager
def _loading(settings: TextConfig) -> Iterator[None]:
    """What transformers raises while it loads becomes a line that names the setting."""
    try:
        yield
    except Exception as error:  # of transformers, tokenizers, safetensors, huggingface_hub, httpx …
        reason = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
        local = Path(str(settings.encoder)).exists()
        where = "the files" if local else "the name and the network, or give a local folder"
        raise SitfastError(f"text.encoder={settings.encoder} cannot be loaded: {reason}; check {where}") from error


def _described(settings: TextConfig) -> tuple[str, Any]:
    """Model type and text config of a frozen encoder; its weights are not read."""
    try:
        import transformers
    except ImportError:
        raise SitfastError(
            f'text.encoder={settings.encoder} needs transformers: pip install "sitfast[text]"; text.encoder=bytes does not'
        ) from None
    with _loading(settings):
        found: Any = transformers.AutoConfig.from_pretrained(str(settings.encoder))
    kind = found.model_type
    if kind not in _MODELS:
        raise SitfastError(
            f"text.encoder={settings.encoder} holds no text model but a {kind}; CLIP's text models and T5 encoders are known"
        )
    found = getattr(found, "text_config", found) if kind == "clip" else found
    room = getattr(found, "max_position_embeddings", None)
    if room is not None and settings.length > room:
        raise SitfastError(
            f"text.length={settings.length}, and {settings.encoder} reads {room} tokens; use text.length={room}"
        )
    return kind, found
