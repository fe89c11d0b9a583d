"""Attention for short sequences by our own Triton kernels: forward, and a backward that writes the packed dqkv itself.

    S = q kᵀ / √d;  P = softmax(S);  out = P v;  lse = log Σ exp S                                      (forward)
    dv = Pᵀ do;  dP = do vᵀ;  dS = P ∘ (dP − Σ_d do ∘ out);  dq = dS k / √d;  dk = dSᵀ q / √d            (backward)

qkv, dqkv [B, N, 3, H, d] · out, do [B, N, H, d], all contiguous · lse [B, H, N] fp32, natural logarithm.
Statistics and sums are fp32; P and dS are rounded to the dtype of qkv where they enter a matrix product.
Bytes moved, in units of one [B, N, H, d]: forward reads 3 and writes 1, backward reads 5 and writes 3.

Two backwards. "single" gives a head to one program, which keeps dq of all queries in registers and passes over the keys
once: five products a tile. "separate" runs one grid for dq and one for dk and dv: seven products, but small programs,
three of which share a multiprocessor and hide each other's loads. Neither needs atomics; both repeat bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from triton import knobs

from sitfast.kernels import _attention_triton as kernels

# pyright: reportIndexIssue=false, reportCallIssue=false
# (a kernel is launched by indexing and takes options that it does not declare)

MAX_TOKENS = 1024
MAX_WIDTH = 128


@dataclass(frozen=True)
class ForwardLaunch:
    """Queries a block, keys a block (all of them: no online softmax), query blocks a program."""

    block_m: int
    block_n: int
    blocks: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BackwardLaunch:
    """`own` rows stay on chip in a program while `block` rows at a time pass by."""

    kind: Literal["single", "separate"]
    own: int
    block: int
    warps: int
    stages: int


def _power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def forward_launch(tokens: int) -> ForwardLaunch:
    """Milliseconds on an H100, bf16, d = 72, torch 2.11.

    N = 256, B = 128: 0.198 with K and V on chip and the scores of 64 queries in 128 registers a thread; 0.226 with an
    online softmax over 128 keys at a time.
    N = 1024, B = 32: 0.630.
    """
    if tokens <= 256:
        return ForwardLaunch(64, max(64, _power_of_2(tokens)), _ceil_div(tokens, 64), 4, 2)
    return ForwardLaunch(64, 128, 1, 4, 2)


def backward_launch(tokens: int, width: int) -> BackwardLaunch:
    """Milliseconds on an H100, bf16, d = 72, torch 2.11.

    N = 256, B = 128: 0.505 single with 3 stages (172 KiB of shared memory, 222 on sm_100), 0.540 with 2, 0.614 separate
    with 2. dq of 256 queries is 80 registers a thread with 8 warps; wider heads or more tokens do not fit.
    N = 1024, B = 32: 1.415 separate with 3 stages, 1.549 with 2.
    """
    if tokens <= 256 and (width <= 80 or tokens <= 128):
        own = max(64, _power_of_2(tokens))
        return BackwardLaunch("single", own, 64, 8 if own > 64 else 4, 3)
    return BackwardLaunch("separate", 64, 64, 4, 3)


def split_width(width: int) -> tuple[int, int]:
    """Columns of the head tile and of the tail tile (0: none), both powers of two and at least 16."""
    head = 1 << (width.bit_length() - 1)
    rest = width - head
    return head, max(16, _power_of_2(rest)) if rest else 0


def unsupported(tokens: int, width: int, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run, or None. fp32 is for the interpreter: on a GPU its tiles exceed shared memory."""
    if tokens > MAX_TOKENS:
        return f"N = {tokens} is more than {MAX_TOKENS}"
    return unsupported_head(width, dtype)


def unsupported_head(width: int, dtype: torch.dtype) -> str | None:
    """The same of the heads alone."""
    if width % 8 or not 16 <= width <= MAX_WIDTH:
        return f"d = {width} is not a multiple of 8 from 16 to {MAX_WIDTH}"
    if dtype not in (torch.bfloat16, torch.float16) and not (dtype == torch.float32 and knobs.runtime.interpret):
        return f"{dtype} is not bf16 or fp16"
    return None


def forward(qkv: Tensor, launch: ForwardLaunch | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, d], lse [B, H, N]) of a contiguous qkv [B, N, 3, H, d]."""
    batch, tokens, _, heads, width = qkv.shape
    head, tail = split_width(width)
    at = launch or forward_launch(tokens)
    out = qkv.new_empty(batch, tokens, heads, width)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    grid = (batch * heads * _ceil_div(tokens, at.block_m * at.blocks),)
    kernels.forward_kernel[grid](
        qkv, out, lse, width**-0.5,
        heads, tokens, width, head, tail, at.block_m, at.block_n, at.blocks, at.stages, num_warps=at.warps,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, launch: BackwardLaunch | None = None
) -> tuple[Tensor, Tensor]:
    """dqkv [B, N, 3, H, d] and partial sums of it over B and N, [·, 3·H·d] in fp32; every operand contiguous."""
    batch, tokens, _, heads, width = qkv.shape
    shape = (heads, tokens, width, *split_width(width))
    at = launch or backward_launch(tokens, width)
    dqkv = torch.empty_like(qkv)
    scale, pairs, blocks = width**-0.5, batch * heads, _ceil_div(tokens, at.own)
    sums = qkv.new_empty(batch * blocks, 3 * heads * width, dtype=torch.float32)
    if at.kind == "single":
        assert at.own >= tokens
        kernels.single_kernel[(pairs,)](
            qkv, out, dout, lse, dqkv, sums, scale, *shape, at.own, at.block, at.stages, num_warps=at.warps
        )
        return dqkv, sums
    delta = torch.empty_like(lse)
    kernels.queries_kernel[(pairs * blocks,)](
        qkv, out, dout, lse, delta, dqkv, sums, scale, *shape, at.own, at.block, at.stages, num_warps=at.warps
    )
    kernels.keys_kernel[(pairs * blocks,)](
        qkv, dout, lse, delta, dqkv, scale, *shape, at.block, at.own, at.stages, num_warps=at.warps
    )
    return dqkv, sums
