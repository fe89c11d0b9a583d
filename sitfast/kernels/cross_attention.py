"""Attention of image tokens to the tokens of a caption, on the outputs of the q and the kv linear.

    S = q kᵀ / √d;  P = softmax(S where mask);  out = P v;  lse = log Σ exp S                            (forward)
    dv = Pᵀ do;  dP = do vᵀ;  dS = P ∘ (dP − Σ P ∘ dP);  dq = dS k / √d;  dk = dSᵀ q / √d                (backward)

for each sample and head. q, out [B, N, H, d] · kv [B, L, 2, H, d], k and v in this order · mask [B, L], True where a token
counts · lse [B, H, N] fp32. Of a caption without a token out is zero, and so are its gradients.

A row of scores is on chip whole, so backward takes Σ P ∘ dP from it, where Σ do ∘ out would read out again. Saved: q, kv,
mask and lse. Bytes beside k, v, dk and dv, in units of one [B, N, H, d]: forward reads 1 and writes 1, backward reads 2 and
writes 1. The Triton kernels, "short", are in `_cross_attention_triton`; they take up to 128 tokens, need no atomics and
repeat bitwise. On a GPU they run where, on the first call for a device, dtype, N, L and d, they are right and their
forward and backward together faster than those of PyTorch's scaled_dot_product_attention, the backend "torch", which
keeps for its own backward what it likes, so that the two cannot be mixed. What they do not take runs "torch" too, and
`describe` says so.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels import attention_choice
from sitfast.kernels.attention_choice import TIMED_HEADS, TIMED_ROWS, Choice, Entry, beyond, numbered, once, race
from sitfast.kernels.dispatch import check, check_rank, choose, compute_dtype

NAME = "cross_attention"


def reference(q: Tensor, kv: Tensor, mask: Tensor, backend: str = "torch") -> Tensor:
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)


# -- the operators -----------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"sitfast::{NAME}", mutates_args=())
def cross_attention_op(q: Tensor, kv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) by our kernels."""
    from sitfast.kernels import _cross_attention_triton  # here, since CPU builds of torch come without Triton

    return _cross_attention_triton.forward(q.contiguous(), kv.contiguous(), mask.contiguous())


@cross_attention_op.register_fake
def _(q: Tensor, kv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, width = q.shape
    return q.new_empty(batch, tokens, heads, width), q.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op(f"sitfast::{NAME}_backward", mutates_args=())
def cross_attention_backward_op(
    dout: Tensor, q: Tensor, kv: Tensor, mask: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(dq, dkv)"""
    from sitfast.kernels import _cross_attention_triton

    dout, q, kv, mask = (value.contiguous() for value in (dout, q, kv, mask))
    return _cross_attention_triton.backward(dout, q, kv, mask, lse)


@cross_attention_backward_op.register_fake
def _(dout: Tensor, q: Tensor, kv: Tensor, mask: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    dq, dkv = (torch.empty_like(value, memory_format=torch.contiguous_format) for value in (q, kv))
    return dq, dkv


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if dout is None:
        return None, None, None
    return *cross_attention_backward_op(dout, *ctx.saved_tensors), None


cross_attention_op.register_autograd(_backward, setup_context=_setup)


# -- the choice --------------------------------------------------------------------------------------------------------


def plain(q: Tensor, kv: Tensor, mask: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, dq, dkv) by the formula, in the dtype of q, the weights rounded to it."""
    (k, v), grad, rows = kv.permute(2, 0, 3, 1, 4).unbind(0), dout.transpose(1, 2), q.transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    scores = (rows @ k.mT * scale).to(torch.promote_types(q.dtype, torch.float32))
    weights = scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1).to(q.dtype)
    out = weights @ v
    d_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    dk, dv = d_scores.mT @ rows * scale, weights.mT @ grad
    dkv = torch.stack((dk.transpose(1, 2), dv.transpose(1, 2)), dim=2)
    return out.transpose(1, 2), (d_scores @ k * scale).transpose(1, 2), dkv


def fault(result: tuple[Tensor, Tensor, Tensor], q: Tensor, kv: Tensor, mask: Tensor, dout: Tensor) -> str | None:
    """Why (out, dq, dkv) is wrong, or None, judged by the outer heads of the outer samples."""

    def corners(x: Tensor) -> Tensor:
        x = x[:: max(1, len(x) - 1)]
        return x.index_select(-2, torch.tensor([0, x.shape[-2] - 1], device=x.device)) if x.ndim > 2 else x

    few = [corners(x) for x in (q, kv, mask, dout)]
    exact = plain(few[0].double(), few[1].double(), few[2], few[3].double())
    for name, *three in zip(("out", "dq", "dkv"), map(corners, result), plain(*few), exact, strict=True):
        if reason := beyond(name, *three):
            return reason
    return None if all(x.isfinite().all() for x in result) else "some results are not finite"


def _missing(length: int, width: int, dtype: torch.dtype) -> str | None:
    """Why our kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from sitfast.kernels import _cross_attention_triton

    return _cross_attention_triton.unsupported(length, width, dtype)


def measure(device: torch.device, dtype: torch.dtype, tokens: int, length: int, width: int) -> Choice:
    """Check our kernels on this device and time both backends."""
    batch = max(1, TIMED_ROWS // (max(tokens, length) * TIMED_HEADS))
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, TIMED_HEADS, width, generator=generator, device=device, dtype=dtype)

    q, kv, dout = draw(tokens), draw(length, 2), draw(tokens)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator, device=device)
    mask = torch.arange(length, device=device) < lengths
    leaves = q.detach().requires_grad_(), kv.detach().requires_grad_()
    entries = {
        "short": Entry(
            missing=lambda: _missing(length, width, dtype),
            forward=lambda: cross_attention_op(q, kv, mask),
            backward=lambda _, lse: cross_attention_backward_op(dout, q, kv, mask, lse),
            fault=lambda out, grads: fault((out[0], grads[0], grads[1]), q, kv, mask, dout),
        ),
        "torch": Entry(
            missing=lambda: None,
            forward=lambda: (reference(*leaves, mask),),
            backward=lambda out: torch.autograd.grad(out, leaves, dout, retain_graph=True),
            fault=lambda *_: None,
        ),
    }
    found = race(entries, [q, q, kv])
    varying = tuple(dict.fromkeys([*found.varying[0], *found.varying[1]]))
    best = min(found.times, key=lambda name: (name in varying, sum(found.times[name])), default="torch")
    return Choice(best, best, found.times, varying, found.rejected)


_choices: dict[tuple[torch.device, torch.dtype, int, int, int], Choice] = {}


def select(tokens: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """What runs; measured on the first call for this (device, dtype, N, L, d).

    In a thread of its own, which knows nothing of what surrounds the call: activation checkpointing would take the tensors
    that are saved here for its own, and a compiler or no_grad would change what is timed.
    """
    device = numbered(device)
    key = device, dtype, tokens, length, width

    def timed() -> Choice:
        with torch.cuda.device(-1 if device.index is None else device.index):  # a thread begins with the first GPU
            return measure(*key)

    def apart() -> Choice:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(timed).result()

    return once(_choices, key, f"{NAME}: N={tokens}, L={length}, d={width}, {dtype}", apart)


# -- the function ------------------------------------------------------------------------------------------------------


def _only_torch(length: int, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why our kernels cannot run on this GPU, or None."""
    if reason := _missing(length, width, dtype):
        return reason
    return "the GPU is older than sm_80" if torch.cuda.get_device_capability(device) < (8, 0) else None


@torch.compiler.assume_constant_result
def _runs(tokens: int, length: int, width: int, dtype: torch.dtype, device: torch.device, backend: str) -> str:
    """The backend, "short" or "torch"; one choice a process, which a compiled graph holds as a constant."""
    if reason := _only_torch(length, width, dtype, device):
        if backend == "short":
            raise ValueError(f"{NAME}: backend 'short' cannot run: {reason}; use 'auto' or 'torch'")
        return "torch"
    return "short" if backend == "short" else select(tokens, length, width, dtype, device).forward


def _kernel(q: Tensor, kv: Tensor, mask: Tensor, backend: str) -> Tensor:
    dtype = compute_dtype(q)
    q, kv = q.to(dtype), kv.to(dtype)
    # Numbers, also where a compiler has symbols for them.
    tokens, length, width = index(q.shape[1]), index(kv.shape[1]), index(q.shape[3])
    if _runs(tokens, length, width, dtype, q.device, backend) == "torch":
        return reference(q, kv, mask)
    return cross_attention_op(q, kv, mask)[0]


def cross_attention(q: Tensor, kv: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """out [B, N, H, d] of q [B, N, H, d], kv [B, L, 2, H, d] and mask [B, L] bool, False where a token does not count;
    autocast is followed.

    `backend` is "auto" (ours where it is right and faster on this GPU), "torch" (PyTorch's scaled_dot_product_attention)
    or "short" (ours). CPUs run "torch" whatever it says. ValueError for operands that do not fit together.
    """
    if backend not in ("auto", "torch", "short"):
        raise ValueError(f"{NAME}: backend {backend!r} is unknown; use auto, torch or short")
    check_rank(NAME, "q", q, 4, "[B, N, H, d]")
    check_rank(NAME, "kv", kv, 5, "[B, L, 2, H, d]")
    batch, _, heads, width = q.shape
    length = kv.shape[1]
    check(NAME, "q", q, q.shape, q.device)
    check(NAME, "kv", kv, (batch, length, 2, heads, width), q.device)
    if q.numel() == 0 or kv.numel() == 0:
        raise ValueError(f"{NAME}: q {tuple(q.shape)} and kv {tuple(kv.shape)}: one is empty; give at least one token")
    if q.dtype != kv.dtype and compute_dtype(q) == q.dtype:
        raise ValueError(f"{NAME}: kv is {kv.dtype} and q {q.dtype}, expected the same; cast one of them")
    if mask.dtype != torch.bool or mask.device != q.device or mask.shape != (batch, length):
        raise ValueError(
            f"{NAME}: mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}, expected torch.bool"
            f" {(batch, length)} on {q.device}"
        )
    if backend == "torch":
        return reference(q, kv, mask)
    return choose(q.device, reference, cuda=_kernel)(q, kv, mask, backend)


def describe(tokens: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """One line for the start-up table: what runs for heads [N, d] and captions of L tokens, and why. Measures on first use."""
    if device.type != "cuda":
        return f"torch ({device.type} has no kernels of ours)"
    if reason := _only_torch(length, width, dtype, device):
        return f"torch ({reason})"
    return attention_choice.describe(select(tokens, length, width, dtype, device))
