"""Weights of one resolution or patch size as the first weights of another.

A model differs in four tensors then: `pos_embed`, interpolated bicubically, and where the patch changes, the first linear
layer W and the last one V, b. A patch of the larger side P is a picture of one of the smaller side p; with `B` [P², p²] the
bilinear enlargement of a patch, which has full column rank, and B⁺ = (BᵀB)⁻¹Bᵀ the patch that enlarges to the nearest picture:

    growing    W' = W B⁺    V' = B V    b' = B b         the new network answers B · old(B⁺ x)
    shrinking  W' = W B     V' = B⁺ V   b' = B⁺ b        the new network answers B⁺ · old(B x)

The first layer is a function of the patch and the last one makes a patch, so the two change in opposite ways: what enlarges
answers shrinks questions. Since B⁺B = 1, an enlarged patch gives the tokens that it gave before it was enlarged, with the
answer enlarged; and growing, then shrinking again gives back the weights. In the other order only what B can express returns:
finer detail than that has no weights when a patch has grown, and is what the new stage learns.

W' = W B⁺ is FlexiViT's resize (arXiv 2212.08013) of the first layer: the least-squares solution of W'B = W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sitfast.model import interpolate_pos_embed

FIRST, LAST, PLACES = "x_embedder.proj.weight", "final_layer.linear.", "pos_embed"


def enlargement(small: int, large: int) -> Tensor:
    """B [large², small²] of patches, row by row, in fp64: bilinear, each axis by itself."""
    basis = torch.eye(small, dtype=torch.float64)[None]  # [1, p signals, p values]
    axis = F.interpolate(basis, size=large, mode="linear", align_corners=False)[0].T
    return torch.kron(axis.contiguous(), axis.contiguous())


def resized(name: str, value: Tensor, config: dict[str, Any]) -> Tensor:
    """The weight `name` of a model of other sizes as one of `config` (`SiT.config`); any other weight as it is."""
    patch = config["patch_size"]
    if name == PLACES:
        return interpolate_pos_embed(value, config["input_size"] // patch)
    if name == FIRST and value.ndim == 4:
        old, flat = value.shape[-1], value.flatten(2).double()  # [D, C, p²]
        map_ = enlargement(min(old, patch), max(old, patch))
        flat = flat @ (torch.linalg.pinv(map_) if patch > old else map_)
        return value if patch == old else flat.unflatten(2, (patch, patch)).to(value.dtype)
    if name.startswith(LAST):
        channels = config["in_channels"] * (1 + config["learn_sigma"])
        old = round((value.shape[0] / channels) ** 0.5)
        if patch == old or old * old * channels != value.shape[0]:
            return value
        map_ = enlargement(min(old, patch), max(old, patch))
        map_ = map_ if patch > old else torch.linalg.pinv(map_)
        rows = value.unflatten(0, (old * old, channels)).flatten(1).double()  # [p², C·…]: channels are fastest
        return (map_ @ rows).unflatten(1, (channels, -1)).flatten(0, 1).view(-1, *value.shape[1:]).to(value.dtype)
    return value


def fit(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Whole weights of a model of any resolution and patch size for the model of `config`."""
    return {name: resized(name, value, config) for name, value in weights.items()}
