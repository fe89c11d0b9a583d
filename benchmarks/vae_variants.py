"""Two other ways to compute parts of an SD VAE's encoder, for `gpu_data vae` to time: what wins there moves into sitfast/vae.py.

Each changes an encoder in place, before it is compiled; the function stays the same, and so do the names of its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FEW_TOKENS = 4096  # 512 px; scores of 32 MiB an image in bf16


def attend_by_products(encoder: torch.nn.Module) -> None:
    """Attention as two matrix products where its scores are small: heads of 512 suit no fused kernel, which takes the slowest."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    class Processor:
        few, many = AttnProcessor(), AttnProcessor2_0()

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: None = None,
            attention_mask: None = None,
            temb: None = None,
        ) -> Tensor:
            run = self.few if hidden_states[0, 0].numel() <= _FEW_TOKENS else self.many
            return run(attn, hidden_states)

    for module in encoder.modules():
        if isinstance(module, Attention):
            module.set_processor(Processor())  # pyright: ignore[reportArgumentType]  anything that can be called


def normalize_by_channels(encoder: torch.nn.Module) -> None:
    """Group norm from sums over each channel, which the compiler reads in the order of channels-last memory."""
    for module in encoder.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = _ChannelSums


class _ChannelSums(torch.nn.GroupNorm):
    """torch's own begins with a copy in the other layout, or reads four channels of every 128 at a time."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 4:
            return super().forward(input)
        x = input.float()
        first, second = x.mean((2, 3)), x.square().mean((2, 3))
        mean, square = (value.unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True) for value in (first, second))
        rstd = (square - mean.square()).clamp_min(0).add(self.eps).rsqrt()
        scale = self.weight.float().unflatten(0, (self.num_groups, -1)) * rstd
        shift = self.bias.float().unflatten(0, (self.num_groups, -1)) - mean * scale
        return (x * scale.flatten(1)[:, :, None, None] + shift.flatten(1)[:, :, None, None]).to(input.dtype)
