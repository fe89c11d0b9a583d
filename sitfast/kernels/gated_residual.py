"""The residual that the previous branch left pending, then the layer norm and modulation of the next one.

    x_new = x + gate · y
    h     = (x_new − mean(x_new)) · rsqrt(var(x_new) + eps) · (1 + scale) + shift

x, y [B, N, D] · gate, shift, scale [B, D], any row stride (chunks of one adaLN output) · x_new, h [B, N, D].
Backward needs x_new, y, gate, scale and the row statistics. Bytes moved: read x and y, write x_new and h.
"""

from __future__ import annotations

from torch import Tensor

from sitfast.kernels.dispatch import check, check_rank, choose, compute_dtype, widen
from sitfast.kernels.layernorm_modulate import normalize_modulate

NAME = "gated_residual_layernorm_modulate"


def reference(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_new = widen(x) + widen(gate).unsqueeze(1) * widen(y)
    return x_new.to(x.dtype), normalize_modulate(x_new, shift, scale, eps).to(compute_dtype(x))


def gated_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x_new, h), both [B, N, D], of x, y [B, N, D] and gate, shift, scale [B, D]; fp32 inside.

    x_new has the dtype of x, the residual stream; h has autocast's where autocast is on, else that of x. The statistics
    are those of x_new before it is rounded to its dtype.
    """
    check_rank(NAME, "x", x, 3, "[B, N, D]")
    check(NAME, "x", x, x.shape, x.device)
    check(NAME, "y", y, x.shape, x.device)
    rows = (x.shape[0], x.shape[2])
    check(NAME, "gate", gate, rows, x.device)
    check(NAME, "shift", shift, rows, x.device)
    check(NAME, "scale", scale, rows, x.device)
    return choose(x.device, reference)(x, y, gate, shift, scale, eps)
