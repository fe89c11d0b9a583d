"""Layer norm without affine, then the adaLN modulation of each sample.

    h = (x − mean(x)) · rsqrt(var(x) + eps) · (1 + scale) + shift

x [B, N, D] · shift, scale [B, D], any row stride (chunks of one adaLN output) · h [B, N, D].
Backward needs x, scale and the row statistics. Bytes moved: read x, write h.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels.dispatch import check, check_rank, choose, compute_dtype, widen

NAME = "layernorm_modulate"


def normalize_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The formula on an already widened x; the result stays wide."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + widen(scale).unsqueeze(1)) + widen(shift).unsqueeze(1)


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return normalize_modulate(widen(x), shift, scale, eps).to(compute_dtype(x))


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """h [B, N, D] of x [B, N, D], shift and scale [B, D]; fp32 inside.

    h has autocast's dtype where autocast is on, else that of x.
    """
    check_rank(NAME, "x", x, 3, "[B, N, D]")
    check(NAME, "x", x, x.shape, x.device)
    rows = (x.shape[0], x.shape[2])
    check(NAME, "shift", shift, rows, x.device)
    check(NAME, "scale", scale, rows, x.device)
    return choose(x.device, reference)(x, shift, scale, eps)
