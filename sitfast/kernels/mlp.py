"""The feed-forward branch: two linear layers with a tanh GELU between them.

    y = gelu(x w1ᵀ + b1) w2ᵀ + b2,   gelu(u) = u/2 · (1 + tanh(√(2/π) · (u + 0.044715 u³)))

x [.., D] · w1 [H, D] · b1 [H] · w2 [D, H] · b2 [D] · y [.., D].
Backward needs x and the pre-activation u; the GELU output can be computed again from u.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels.dispatch import check, choose

NAME = "mlp"


def reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """y [.., D] of x [.., D]; the GEMMs follow autocast."""
    check(NAME, "x", x, x.shape, x.device)
    hidden, width = w1.shape[0], x.shape[-1]
    check(NAME, "w1", w1, (hidden, width), x.device)
    check(NAME, "b1", b1, (hidden,), x.device)
    check(NAME, "w2", w2, (width, hidden), x.device)
    check(NAME, "b2", b2, (width,), x.device)
    return choose(x.device, reference)(x, w1, b1, w2, b2)
