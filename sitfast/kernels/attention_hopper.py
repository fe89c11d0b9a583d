"""Attention over heads of 256 tokens on sm_90, by the Gluon kernels; equations and layouts as in `attention_short`.

One program a head. Forward keeps K and V on chip and takes the exponentials of 64 queries while the other program of
the multiprocessor multiplies. Backward keeps q, k, v, do and the fp32 dq of the whole head on chip: 225 KiB of shared
memory at d = 72, five products a tile, no atomics, the same bits every time.

Milliseconds on an H100, bf16, B = 128, d = 72, torch 2.11: forward 0.138 (cuDNN 0.169), backward 0.477 (cuDNN 0.842).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

# pyright: reportIndexIssue=false, reportCallIssue=false
# (a kernel is launched by indexing and takes options that it does not declare)

TOKENS = 256


def unsupported(tokens: int, width: int, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on the current GPU, or None."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.experimental.gluon") is None:
        return "triton 3.5 or later, which has gluon, is not installed"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is not sm_90"
    if tokens != TOKENS or width not in (64, 72, 80):
        return f"N = {tokens}, d = {width} is not N = {TOKENS}, d = 64, 72 or 80"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not bf16 or fp16"
    return None


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, d], lse [B, H, N]) of a contiguous qkv [B, N, 3, H, d]."""
    from sitfast.kernels import _attention_gluon as kernels

    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, width)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    kernels.forward_kernel[(batch * heads,)](qkv, out, lse, width**-0.5, heads, tokens, width, num_warps=4)
    return out, lse


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """dqkv [B, N, 3, H, d]; every operand contiguous."""
    from sitfast.kernels import _attention_gluon as kernels

    batch, tokens, _, heads, width = qkv.shape
    dqkv = torch.empty_like(qkv)
    kernels.backward_kernel[(batch * heads,)](qkv, out, dout, lse, dqkv, width**-0.5, heads, tokens, width, num_warps=8)
    return dqkv
