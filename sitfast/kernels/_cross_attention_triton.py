"""The Triton kernels of `cross_attention`, which has their equations; heads are tiled as in `_attention_triton`.

The keys and values of one caption and head stay on chip, a block of queries at a time passes by. What is masked is not
read: its key and value count as zero, its weight is zero, whatever lies there.
"""

from __future__ import annotations

from dataclasses import dataclass

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# (this is Triton's language, in Python's syntax; a kernel is launched by indexing and takes options it does not declare)
import torch
import triton
import triton.language as tl
from torch import Tensor

from sitfast.kernels._attention_triton import _add_product, _load, _load_lse, _scores, _store, _zeros
from sitfast.kernels.attention_short import _ceil_div, _power_of_2, split_width, unsupported_head

MAX_LENGTH = 128
BLOCK = 64  # queries that pass by at a time


@triton.jit
def _seen(mask, sample, L: tl.constexpr, BN: tl.constexpr):
    """Which keys of the sample count [BN], and the row each lies in: for those that do not one past the end."""
    keys = tl.arange(0, BN)
    seen = tl.load(mask + sample * L + keys, mask=keys < L, other=0) != 0
    return seen, tl.where(seen, keys, L)


@triton.jit
def forward_kernel(
    q, kv, mask, out, lse, scale,
    H: tl.constexpr, N: tl.constexpr, L: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCKS` blocks of BM queries of one head against its BN ≥ L keys."""
    EVEN: tl.constexpr = N % (BM * BLOCKS) == 0
    GROUPS: tl.constexpr = (N + BM * BLOCKS - 1) // (BM * BLOCKS)
    group = tl.program_id(0) % GROUPS
    pair = (tl.program_id(0) // GROUPS).to(tl.int64)
    sample, head = pair // H, pair % H
    q_offset = sample * (N * H * D) + head * D
    kv += sample * (L * 2 * H * D) + head * D
    log2_scale = scale * 1.4426950408889634
    seen, places = _seen(mask, sample, L, BN)
    k_head, k_tail = _load(kv, places, 2 * H * D, L, HEAD, TAIL, D, False)
    v_head, v_tail = _load(kv + H * D, places, 2 * H * D, L, HEAD, TAIL, D, False)
    for block in tl.range(BLOCKS, num_stages=STAGES):
        rows = (group * BLOCKS + block) * BM + tl.arange(0, BM)
        q_head, q_tail = _load(q + q_offset, rows, H * D, N, HEAD, TAIL, D, EVEN)
        scores = tl.where(seen[None, :], _scores(q_head, q_tail, k_head, k_tail, TAIL), float("-inf"))
        top = tl.maximum(tl.max(scores, 1) * log2_scale, -1e38)  # finite where no key counts: out is 0
        weights = tl.exp2(scores * log2_scale - top[:, None])
        total = tl.sum(weights, 1)
        total = tl.where(total > 0, total, 1.0)
        o_head, o_tail = _zeros(BM, HEAD, TAIL)
        o_head, o_tail = _add_product(weights.to(q_head.dtype), v_head, v_tail, o_head, o_tail, TAIL)
        _store(out + q_offset, o_head, o_tail, (1.0 / total)[:, None], rows, H * D, N, HEAD, TAIL, D, EVEN)
        value = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + pair * N + rows, value, mask=rows < N)


@triton.jit
def backward_kernel(
    dout, q, kv, mask, lse, dq, dkv, scale,
    H: tl.constexpr, N: tl.constexpr, L: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one head. Its BN ≥ L keys stay, with dk and dv; queries pass by. Scores are [keys, queries]."""
    EVEN_M: tl.constexpr = N % BM == 0
    EVEN_N: tl.constexpr = L == BN
    ROW: tl.constexpr = 2 * H * D
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // H, pair % H
    q_offset = sample * (N * H * D) + head * D
    kv_offset = sample * (L * ROW) + head * D
    log2_scale = scale * 1.4426950408889634
    seen, places = _seen(mask, sample, L, BN)
    k_head, k_tail = _load(kv + kv_offset, places, ROW, L, HEAD, TAIL, D, False)
    v_head, v_tail = _load(kv + kv_offset + H * D, places, ROW, L, HEAD, TAIL, D, False)
    dk_head, dk_tail = _zeros(BN, HEAD, TAIL)
    dv_head, dv_tail = _zeros(BN, HEAD, TAIL)
    for start in tl.range(0, N, BM, num_stages=STAGES):
        rows = start + tl.arange(0, BM)
        q_head, q_tail = _load(q + q_offset, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
        do_head, do_tail = _load(dout + q_offset, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
        lse2 = _load_lse(lse, pair, rows, N, EVEN_M)
        scores = _scores(k_head, k_tail, q_head, q_tail, TAIL)
        weights = tl.where(seen[:, None], tl.exp2(scores * log2_scale - lse2[None, :]), 0.0)
        d_weights = _scores(v_head, v_tail, do_head, do_tail, TAIL)
        delta = tl.sum(weights * d_weights, 0)
        dv_head, dv_tail = _add_product(weights.to(q_head.dtype), do_head, do_tail, dv_head, dv_tail, TAIL)
        d_scores = (weights * (d_weights - delta[None, :])).to(q_head.dtype)
        dk_head, dk_tail = _add_product(d_scores, q_head, q_tail, dk_head, dk_tail, TAIL)
        dq_head, dq_tail = _zeros(BM, HEAD, TAIL)
        dq_head, dq_tail = _add_product(tl.trans(d_scores), k_head, k_tail, dq_head, dq_tail, TAIL)
        _store(dq + q_offset, dq_head, dq_tail, scale, rows, H * D, N, HEAD, TAIL, D, EVEN_M)
    keys = tl.arange(0, BN)
    _store(dkv + kv_offset, dk_head, dk_tail, scale, keys, ROW, L, HEAD, TAIL, D, EVEN_N)
    _store(dkv + kv_offset + H * D, dv_head, dv_tail, 1.0, keys, ROW, L, HEAD, TAIL, D, EVEN_N)


# -- launches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Keys that stay on chip, warps, stages of the pipeline; blocks of queries a program (in backward it is all)."""

    keys: int
    warps: int
    stages: int
    blocks: int = 1


def forward_launch(tokens: int, length: int) -> Launch:
    """Up to four blocks of queries a program, which reads K and V once for them. Not timed against others."""
    blocks = _ceil_div(tokens, BLOCK)
    return Launch(max(16, _power_of_2(length)), 4, 2, _ceil_div(blocks, _ceil_div(blocks, 4)))


def backward_launch(length: int, width: int) -> Launch:
    """Keys are the rows of the products that make dk and dv, so there are at least the 64 of a warp group's instruction.

    What fits without spilling on sm_90 and sm_100, compiled ahead of time: at d = 72 and 128 keys 235 registers a thread
    with 8 warps, at 64 keys with 4. A third stage exceeds the shared memory of sm_80 beyond d = 80. Not timed against others.
    """
    keys, narrow = max(64, _power_of_2(length)), width <= 80
    return Launch(keys, 4 if keys == 64 and narrow else 8, 3 if narrow else 2)


def unsupported(length: int, width: int, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run, or None."""
    if length > MAX_LENGTH:
        return f"L = {length} is more than {MAX_LENGTH}"
    return unsupported_head(width, dtype)


def forward(q: Tensor, kv: Tensor, mask: Tensor, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, d], lse [B, H, N]); every operand contiguous."""
    batch, tokens, heads, width = q.shape
    length = kv.shape[1]
    at = launch or forward_launch(tokens, length)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    grid = (batch * heads * _ceil_div(tokens, BLOCK * at.blocks),)
    forward_kernel[grid](
        q, kv, mask.view(torch.uint8), out, lse, width**-0.5,
        heads, tokens, length, width, *split_width(width), BLOCK, at.keys, at.blocks, at.stages, num_warps=at.warps,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, kv: Tensor, mask: Tensor, lse: Tensor, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(dq [B, N, H, d], dkv [B, L, 2, H, d]); every operand contiguous."""
    batch, tokens, heads, width = q.shape
    length = kv.shape[1]
    at = launch or backward_launch(length, width)
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    backward_kernel[(batch * heads,)](
        dout, q, kv, mask.view(torch.uint8), lse, dq, dkv, width**-0.5,
        heads, tokens, length, width, *split_width(width), BLOCK, at.keys, at.stages, num_warps=at.warps,
    )  # fmt: skip
    return dq, dkv
