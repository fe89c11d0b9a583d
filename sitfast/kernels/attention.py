"""Full self-attention on the packed output of the qkv linear.

    out = softmax(q kᵀ / √d) v   for each sample and head

qkv [B, N, 3, H, d], q, k, v in this order · out [B, N, H, d] · bias [3·H·d], that of the linear layer, or None.
Backward needs qkv, out and the log-sum-exp of each row of scores, and returns the gradient packed as qkv is.

The bias is in qkv already. It is passed for its gradient, the sum of that of qkv over B and N, which our kernels have at
hand: dq block by block, Σ dk = 0 since softmax ignores a shift of its row, Σ dv = Σ dout since its rows add up to 1. So
the linear layer before, called with a detached bias, needs no pass over the gradient of qkv.

On a GPU, bf16 and fp16 have several backends, chosen in `attention_choice`. What none of them takes, fp32 for one, runs
PyTorch's scaled_dot_product_attention, the backend "torch", and `describe` says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels import attention_choice
from sitfast.kernels.attention_backends import BACKENDS, MAX_WIDTH, sum_rows
from sitfast.kernels.dispatch import check, check_rank, choose, compute_dtype

NAME = "attention"


class _BiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx, dqkv: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dqkv.dtype, torch.float32)
        return dqkv, dqkv.sum((0, 1), dtype=wide).flatten().to(ctx.dtype)


def bias_gradient(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """qkv as it is; in backward, Σ over B and N of its gradient goes to the bias, if there is one."""
    return qkv if bias is None or not bias.requires_grad else _BiasGradient.apply(qkv, bias)  # pyright: ignore[reportReturnType]


def reference(qkv: Tensor, bias: Tensor | None = None, backend: str = "torch") -> Tensor:
    qkv = bias_gradient(qkv, bias)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# -- the operators -----------------------------------------------------------------------------------------------------


def _chosen(qkv: Tensor, backend: str) -> attention_choice.Choice:
    return attention_choice.select(qkv.shape[1], qkv.shape[4], qkv.dtype, qkv.device, backend)


@torch.library.custom_op("sitfast::attention", mutates_args=())
def attention_op(qkv: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse); `backend` is a name of BACKENDS or "auto"."""
    return BACKENDS[_chosen(qkv, backend).forward].forward(qkv.contiguous())


@attention_op.register_fake
def _(qkv: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("sitfast::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, backend: str, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias); dbias is empty unless its dtype is given."""
    backward = BACKENDS[_chosen(qkv, backend).backward].backward
    dqkv, rows = backward(dout.contiguous(), qkv.contiguous(), out, lse)
    return dqkv, qkv.new_empty(0) if bias_dtype is None else sum_rows(rows, bias_dtype)


@attention_backward_op.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, backend: str, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    num_biases = 0 if bias_dtype is None else qkv[0, 0].numel()
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return dqkv, qkv.new_empty(num_biases, dtype=bias_dtype or qkv.dtype)


def _setup(ctx, inputs, output) -> None:
    qkv, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if dout is None:
        return None, None, None
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[1] else None
    dqkv, dbias = attention_backward_op(dout, *ctx.saved_tensors, ctx.backend, bias_dtype)
    return dqkv, None if bias_dtype is None else dbias, None


attention_op.register_autograd(_backward, setup_context=_setup)


# -- the function ------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _only_torch(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no backend but PyTorch's can run, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not bf16 or fp16"
    if width % 8 or width > MAX_WIDTH:
        return f"d = {width} is not a multiple of 8 up to {MAX_WIDTH}"
    if _capability(device.index) < (8, 0):
        return "the GPU is older than sm_80"
    return None


def _kernel(qkv: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    qkv = qkv.to(compute_dtype(qkv))
    if backend == "auto" and _only_torch(qkv.shape[-1], qkv.dtype, qkv.device):
        return reference(qkv, bias)
    return attention_op(qkv, bias, backend)[0]


def attention(qkv: Tensor, *, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """out [B, N, H, d] of qkv [B, N, 3, H, d]; autocast is followed.

    `bias` [3·H·d] is that of the linear layer which made qkv, called with `bias.detach()`: it is not added here, only
    given its gradient.

    `backend` is "auto" (the fastest that passes its test on this GPU), "torch" (PyTorch's scaled_dot_product_attention)
    or one of "short", "hopper", "cudnn", "flash", "flash2", "flash3", "flash4". CPUs run "torch" whatever it says.
    """
    if backend not in ("auto", "torch", *BACKENDS):
        raise ValueError(f"{NAME}: backend {backend!r} is unknown; use auto, torch, {', '.join(BACKENDS)}")
    check_rank(NAME, "qkv", qkv, 5, "[B, N, 3, H, d]")
    batch, tokens, _, heads, width = qkv.shape
    check(NAME, "qkv", qkv, (batch, tokens, 3, heads, width), qkv.device)
    if bias is not None:
        check(NAME, "bias", bias, (3 * heads * width,), qkv.device)
    if backend == "torch":
        return reference(qkv, bias)
    return choose(qkv.device, reference, cuda=_kernel)(qkv, bias, backend)


def describe(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """One line for the start-up table: what `attention` runs for heads [N, d], and why. Measures on first use."""
    if device.type != "cuda":
        return f"torch ({device.type} has no kernels of ours)"
    if reason := _only_torch(width, dtype, device):
        return f"torch ({reason})"
    return attention_choice.describe(attention_choice.select(tokens, width, dtype, device))
