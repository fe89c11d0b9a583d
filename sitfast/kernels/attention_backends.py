"""The implementations of attention on a GPU; `attention_choice` picks among them.

A backend is a pair of functions on contiguous tensors that agree on what is saved, so that the forward of one may meet
the backward of another:

    forward(qkv [B, N, 3, H, d]) -> out [B, N, H, d], lse [B, H, N] (fp32, natural logarithm)
    backward(dout, qkv, out, lse) -> dqkv [B, N, 3, H, d], rows [·, 3·H·d]

The rows add up to the gradient of a bias of qkv: partial sums where a kernel has them at hand, else dqkv itself.

"short" (Triton), "hopper" (Gluon) and FlashAttention-2 and -3 write the packed dqkv themselves; the others return dq,
dk and dv, which one kernel packs. cuDNN and FlashAttention lay out as q is laid out, so `out` needs no copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

aten = torch.ops.aten
MAX_WIDTH = 256  # of FlashAttention-2; the others take less and say so


@dataclass(frozen=True)
class Backend:
    """`missing(tokens, width, dtype)` says why it cannot run, or None."""

    name: str
    missing: Callable[[int, int, torch.dtype], str | None]
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v [B, H, N, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def pack(grads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[B, N, 3, H, d] of three [B, H, N, d]."""
    return torch.stack([grad.transpose(1, 2) for grad in grads], dim=2)


def with_rows(dqkv: Tensor) -> tuple[Tensor, Tensor]:
    """What a backward returns that has no partial sums."""
    return dqkv, dqkv.flatten(2).flatten(0, 1)


def sum_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over rows [·, 3·H·d] in fp32, as `dtype` [3·H·d]."""
    if rows.is_cuda and importlib.util.find_spec("triton") is not None:
        from sitfast.kernels.gelu import column_sums

        return column_sums(rows, dtype)
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(dtype)


# -- our kernels -------------------------------------------------------------------------------------------------------


def _short_missing(tokens: int, width: int, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from sitfast.kernels import attention_short

    return attention_short.unsupported(tokens, width, dtype)


def _short_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    from sitfast.kernels import attention_short

    return attention_short.forward(qkv)


def _short_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    from sitfast.kernels import attention_short

    return attention_short.backward(dout, qkv, out, lse)


def _hopper_missing(tokens: int, width: int, dtype: torch.dtype) -> str | None:
    from sitfast.kernels import attention_hopper

    return attention_hopper.unsupported(tokens, width, dtype)


def _hopper_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    from sitfast.kernels import attention_hopper

    return attention_hopper.forward(qkv)


def _hopper_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    from sitfast.kernels import attention_hopper

    return attention_hopper.backward(dout, qkv, out, lse)


# -- what PyTorch brings -----------------------------------------------------------------------------------------------


def _half(limit: int) -> Callable[[int, int, torch.dtype], str | None]:
    def missing(tokens: int, width: int, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"{dtype} is not bf16 or fp16"
        if width % 8 or width > limit:
            return f"d = {width} is not a multiple of 8 up to {limit}"
        return None

    return missing


def _cudnn_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, _ = qkv.shape
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first(qkv), None, True)
    return out.transpose(1, 2).contiguous(), lse.reshape(batch, heads, tokens)


@cache
def _cudnn_lse_rank(device: torch.device) -> int:
    """PyTorch releases differ in whether cuDNN's log-sum-exp is [B, H, N] or [B, H, N, 1]."""
    probe = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return aten._scaled_dot_product_cudnn_attention(probe, probe, probe, None, True)[1].ndim


def _cudnn_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    tokens = qkv.shape[1]
    lse = lse if _cudnn_lse_rank(qkv.device) == 3 else lse.unsqueeze(-1)
    unused = torch.empty((), dtype=torch.int64, device=qkv.device)  # dropout's seed and offset
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        dout.transpose(1, 2), *heads_first(qkv), out.transpose(1, 2), lse, unused, unused,
        None, None, None, tokens, tokens, 0.0, False,
    )  # fmt: skip
    return with_rows(pack(grads))


def _flash_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads_first(qkv))
    return out.transpose(1, 2).contiguous(), lse


def _flash_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    tokens = qkv.shape[1]
    unused = torch.empty(2, dtype=torch.uint64, device=qkv.device)  # dropout's random state
    grads = aten._scaled_dot_product_flash_attention_backward(
        dout.transpose(1, 2), *heads_first(qkv), out.transpose(1, 2), lse,
        None, None, tokens, tokens, 0.0, False, unused, unused,
    )  # fmt: skip
    return with_rows(pack(grads))


# -- FlashAttention packages, where installed --------------------------------------------------------------------------


def _installed(module: str, distribution: str) -> Callable[[int, int, torch.dtype], str | None]:
    def missing(tokens: int, width: int, dtype: torch.dtype) -> str | None:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        return _half(MAX_WIDTH)(tokens, width, dtype) if found else f"{distribution} is not installed"

    return missing


def _flash2_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    scale = qkv.shape[-1] ** -0.5
    out, lse, *_ = _flash_attn_forward(*qkv.unbind(2), 0.0, scale, False, -1, -1, 0.0, None, False)
    return out, lse


def _flash2_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dqkv, scale = torch.empty_like(qkv), qkv.shape[-1] ** -0.5
    _flash_attn_backward(dout, *qkv.unbind(2), out, lse, *dqkv.unbind(2), 0.0, scale, False, -1, -1, 0.0, None, False)
    return with_rows(dqkv)


def _flash3_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward

    out, lse, *_ = _flash_attn_forward(*qkv.unbind(2), softmax_scale=qkv.shape[-1] ** -0.5)
    return out, lse


def _flash3_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_backward

    dqkv = torch.empty_like(qkv)
    dq, dk, dv = dqkv.unbind(2)
    _flash_attn_backward(dout, *qkv.unbind(2), out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=qkv.shape[-1] ** -0.5)
    return with_rows(dqkv)


def _flash4_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(*qkv.unbind(2), softmax_scale=qkv.shape[-1] ** -0.5, return_lse=True)
    return out, lse


def _flash4_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = _flash_attn_bwd(*qkv.unbind(2), out, dout, lse, softmax_scale=qkv.shape[-1] ** -0.5)
    return with_rows(torch.stack(grads[:3], dim=2))


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("short", _short_missing, _short_forward, _short_backward),
        Backend("cudnn", _half(128), _cudnn_forward, _cudnn_backward),
        Backend("flash", _half(MAX_WIDTH), _flash_forward, _flash_backward),
        Backend("flash2", _installed("flash_attn_2_cuda", "flash-attn"), _flash2_forward, _flash2_backward),
        Backend("flash3", _installed("flash_attn_interface", "flash-attn 3"), _flash3_forward, _flash3_backward),
        Backend("flash4", _installed("flash_attn.cute", "flash-attn-4"), _flash4_forward, _flash4_backward),
        Backend("hopper", _hopper_missing, _hopper_forward, _hopper_backward),
    )
}
