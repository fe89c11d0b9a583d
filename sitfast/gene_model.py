"""A SiT over the expression of genes: a row [B, G] in place of an image, patches of neighbouring genes as tokens.

    tokens_j = W · x[j·p … (j+1)·p) + b + pos_j,   j < N = ⌈G / p⌉          output = the first G values of the N patches

G need not be a multiple of p: the last patch is filled with zeros on its way in, and on its way out what belongs to no gene
is cut off, so that neither the loss nor a sample ever sees it. Everything else is the SiT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitfast.errors import SitfastError
from sitfast.layers import MAX_PERIOD
from sitfast.model import Grid, SiT


class GeneEmbed(nn.Module):
    """Expression [B, G] to tokens [B, N, D], the last patch filled with zeros."""

    def __init__(self, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.in_features
        return self.proj(F.pad(x, (0, -x.shape[1] % patch)).unflatten(1, (-1, patch)))


class GeneSiT(SiT):
    """Class-conditional transformer: x [B, G], t [B], y [B] to a prediction [B, G]; `input_size` is G, `in_channels` 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (G,)."""
        return (self.input_size,)

    def _check_size(self) -> None:
        if self.config["in_channels"] != 1:
            raise SitfastError(f"in_channels={self.config['in_channels']}: a gene has one value; use in_channels=1")
        if self.config["rope"]:
            raise SitfastError("rope=true turns by distance, and genes have none between them; use rope=false")

    def _lay_out(self, hidden_size: int) -> tuple[nn.Module, int]:
        self.num_tokens = -(-self.input_size // self.patch_size)
        return GeneEmbed(self.patch_size, hidden_size), self.patch_size

    def _positions(self, hidden_size: int) -> Tensor:
        return sincos_positions(hidden_size, self.num_tokens)

    def _check_shape(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise SitfastError(
                f"x has shape {tuple(x.shape)}, the model takes (B, {self.input_size}); give it the genes that it was built for"
            )

    def _grid_of(self, x: Tensor) -> Grid:
        return 1, self.num_tokens

    def _placed(self, grid: Grid) -> Tensor:
        return self.pos_embed

    def _unpatchify(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Patches [B, N, p·C] to [B, G]; the unused sigma half is dropped, and so is what fills the last patch."""
        values = tokens.unflatten(-1, (self.patch_size, self.out_channels))[..., 0]
        return values.flatten(1)[:, : self.input_size]


def sincos_positions(hidden_size: int, length: int) -> Tensor:
    """Fixed embedding [1, N, D] of the places of a sequence: sin, then cos, D/2 frequencies. In fp64, rounded once."""
    half = hidden_size // 2
    omega = MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * omega
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[None].float()
