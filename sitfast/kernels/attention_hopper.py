"""Attention over heads of 256 tokens on sm_90, by the Gluon kernels; equations and layouts as in `attention_short`.

Forward: one program a head, K and V on chip; it takes the exponentials of 64 queries while the other program of the
multiprocessor multiplies. Backward: two programs a head, one for dk and dv and one for dq, seven products a tile, no
atomics, the same bits every time; the sums over N for the gradient of qkv's bias come with it.

Milliseconds on an H100, bf16, B = 128, d = 72, torch 2.11: forward 0.138 (cuDNN 0.169), backward 0.417 (cuDNN 0.842).
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


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """dqkv [B, N, 3, H, d] and its sums over N [B, 3·H·d] in fp32; every operand contiguous."""
    from sitfast.kernels import _attention_gluon as kernels

    batch, tokens, _, heads, width = qkv.shape
    dqkv = torch.empty_like(qkv)
    sums = qkv.new_empty(batch, 3 * heads * width, dtype=torch.float32)
    grid = (2 * batch * heads,)
    kernels.backward_kernel[grid](qkv, out, dout, lse, dqkv, sums, width**-0.5, heads, tokens, width, num_warps=4)
    return dqkv, sums
