"""Full self-attention on the packed output of the qkv linear.

    out = softmax(q kᵀ / √d) v   for each sample and head

qkv [B, N, 3, H, d], q, k, v in this order · out [B, N, H, d].
Backward needs qkv, out and the log-sum-exp of each row of scores.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels.dispatch import check, check_rank, choose

NAME = "attention"


def reference(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention(qkv: Tensor) -> Tensor:
    """out [B, N, H, d] of qkv [B, N, 3, H, d]; PyTorch picks the backend, and autocast is followed."""
    check_rank(NAME, "qkv", qkv, 5, "[B, N, 3, H, d]")
    batch, tokens, _, heads, width = qkv.shape
    check(NAME, "qkv", qkv, (batch, tokens, 3, heads, width), qkv.device)
    return choose(qkv.device, reference)(qkv)
