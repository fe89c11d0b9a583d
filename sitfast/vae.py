"""Between pixels and latents.

    z = mean(x) + std(x) · ε,   latents = (z − shift) · scale,        x = decoder(latents / scale + shift)

ε is a Philox draw of (seed, sample index), so the posterior sample of an image does not depend on the batch it came in.
scale and shift are one number, or one a channel. Cached moments (mean, std) take the same road from the second step on.
Pixel models use `Pixels`, which passes everything through.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sitfast import philox
from sitfast.errors import SitfastError

if TYPE_CHECKING:
    from sitfast.config import VAEConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Pixels:
    """No VAE: the model works on the pixels themselves."""

    downsample = 1

    def latent_channels(self, pixel_channels: int) -> int:
        return pixel_channels

    def check_image_size(self, image_size: int) -> None:
        """Every size will do."""

    def encode(self, x: Tensor, index: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


class AutoencoderVAE:
    """A frozen diffusers AutoencoderKL; images go through it `batch_size` at a time."""

    def __init__(self, model: Any, settings: VAEConfig, *, device: torch.device | str, seed: int) -> None:
        self.device = torch.device(device)
        self.dtype = _DTYPES[settings.precision]
        self.memory_format = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.memory_format).requires_grad_(False).eval()
        if self.device.type == "cuda" if settings.compile is None else settings.compile:
            self.model.encoder.compile(dynamic=False)
        own = model.config
        self.id = settings.id
        self.scale = self._channels("scale", settings.scale, own.scaling_factor)
        self.shift = self._channels("shift", settings.shift, own.shift_factor or 0.0)
        self.downsample = 2 ** (len(own.block_out_channels) - 1)
        self.posterior = settings.posterior
        self.batch_size = settings.batch_size
        self.seed = seed

    def latent_channels(self, pixel_channels: int) -> int:
        own = self.model.config
        if pixel_channels != own.in_channels:
            raise SitfastError(
                f"the data has {pixel_channels} channels, but vae.id={self.id!r} takes {own.in_channels}; "
                f"choose another VAE, or vae.id=null to train on pixels"
            )
        return own.latent_channels

    def check_image_size(self, image_size: int) -> None:
        if rest := image_size % self.downsample:
            lower = image_size - rest
            choices = f"{lower} or {lower + self.downsample}" if lower else f"{self.downsample}"
            raise SitfastError(
                f"data.image_size={image_size} is not divisible by {self.downsample}, the downsampling of "
                f"vae.id={self.id!r}; try {choices}"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @torch.no_grad()
    def encode(self, x: Tensor, index: Tensor) -> Tensor:
        """Images x `[B, 3, H, W]` in [−1, 1], or their moments `[B, 2, C, h, w]`, with their sample indices `[B]` → fp32 latents
        `[B, C, h, w]`.
        """
        mean, std = x.float().unbind(1) if x.ndim == 5 else self.moments(x)
        return self._draw(mean, std, index)

    @torch.no_grad()
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images x `[B, 3, H, W]` in [−1, 1] → mean and standard deviation of the posterior, fp32 `[B, C, h, w]` each."""
        with self._own_precision():
            equal = x.tensor_split(-(-len(x) // self.batch_size))  # few sizes: the compiler makes code for each
            parts = [self.model.encode(self._cast(part)).latent_dist for part in equal]
            mean = torch.cat([part.mean.float() for part in parts])
            std = torch.cat([(0.5 * part.logvar.float()).exp() for part in parts])
        return mean, std

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents z `[B, C, h, w]` → fp32 images `[B, 3, h·f, w·f]`, about [−1, 1]."""
        parts = (z / self.scale + self.shift).split(self.batch_size)
        with self._own_precision():
            return torch.cat([self.model.decode(self._cast(part)).sample.float() for part in parts])

    def _draw(self, mean: Tensor, std: Tensor, index: Tensor) -> Tensor:
        z = mean
        if self.posterior == "sample":
            z = mean + std * philox.normal(self.seed, index, philox.Stream.VAE, *mean.shape[1:])
        return ((z - self.shift) * self.scale).contiguous()

    def _channels(self, name: str, values: tuple[float, ...] | None, own: float) -> Tensor:
        """`[1 or C, 1, 1]` of a setting, or of the VAE's own number."""
        values = (own,) if values is None else values
        channels = self.model.config.latent_channels
        if len(values) not in (1, channels):
            raise SitfastError(
                f"vae.{name} has {len(values)} numbers, and the latents of vae.id={self.id!r} have {channels} channels;"
                f" give one number, or {channels}"
            )
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None, None]

    def _own_precision(self) -> torch.autocast:
        """`vae.precision` holds inside the caller's autocast too."""
        return torch.autocast(self.device.type, enabled=False)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous(memory_format=self.memory_format)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the weights rounded to bf16: the same for every precision, format and place they come from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def build_vae(settings: VAEConfig, *, device: torch.device | str, seed: int) -> Pixels | AutoencoderVAE:
    """The VAE that `vae.id` names, a hub id or a local folder; `Pixels` where it is null."""
    if settings.id is None:
        return Pixels()
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise SitfastError(f'vae.id={settings.id!r} needs diffusers: pip install "sitfast[vae]"') from None
    folder = Path(settings.id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SitfastError(
                f"vae.id={settings.id!r} is a folder without config.json; give the folder that save_pretrained wrote "
                f"(in a whole pipeline, its subfolder vae)"
            )
    elif folder.is_absolute() or settings.id.startswith((".", "~")) or settings.id.count("/") != 1:
        raise SitfastError(f"vae.id={settings.id!r} is no folder, and a hub id reads owner/name")
    name = str(folder) if folder.is_dir() else settings.id
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            name,
            torch_dtype=_DTYPES[settings.precision],
            use_safetensors=True,  # never a pickle
            low_cpu_mem_usage=False,  # True wants accelerate, and says so at length
            output_loading_info=True,
        )
    except Exception as error:  # of diffusers, safetensors, huggingface_hub, httpx …: all mean that it did not load
        reason = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
        where = "the folder" if folder.is_dir() else "the name and the network, or give a local folder"
        raise SitfastError(f"vae.id={settings.id!r} cannot be loaded: {reason}; check {where}") from error
    model, info = loaded
    if missing := info["missing_keys"]:  # diffusers leaves them at random values
        raise SitfastError(
            f"vae.id={settings.id!r} has no weights for {len(missing)} tensors of an AutoencoderKL "
            f"({sorted(missing)[0]} …); it is incomplete, or another kind of model"
        )
    return AutoencoderVAE(model, settings, device=device, seed=seed)
