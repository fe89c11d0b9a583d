"""The linear layer by the fastest GEMM that the libraries have.

    y = x wᵀ + bias      dx = dy w · dw = dyᵀ x · dbias = Σ dy

x [.., K] · w [N, K] · bias [N] or None · y [.., N]. Backward needs x and w.

On a GPU, in bf16 and fp16, y and dx come from the algorithm of cuBLASLt that is fastest on this shape, see `cublaslt.matmul`;
dw is left to PyTorch, whose choice was the fastest found. Everything else is F.linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels import cublaslt
from sitfast.kernels.dispatch import check, choose, compute_dtype

NAME = "linear"
KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def reference(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, w, bias)


@torch.library.custom_op("sitfast::linear", mutates_args=())
def linear_op(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return cublaslt.matmul(x, w, bias, form="nt")


@linear_op.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


@torch.library.custom_op("sitfast::linear_backward", mutates_args=())
def linear_backward_op(dy: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, dbias), empty where `needs` says so."""
    from sitfast.kernels.gelu import column_sums

    need_x, need_w, need_bias = needs
    dy = dy.contiguous()
    return (
        cublaslt.matmul(dy, w, form="nn") if need_x else dy.new_empty(0),
        dy.t() @ x if need_w else dy.new_empty(0),
        column_sums(dy, dy.dtype) if need_bias else dy.new_empty(0),
    )


@linear_backward_op.register_fake
def _(dy: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, w.shape, w.shape[:1])
    dx, dw, dbias = (dy.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return dx, dw, dbias


def _setup(ctx, inputs, output) -> None:
    x, w, _ = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    grads = linear_backward_op(dy, *ctx.saved_tensors, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


linear_op.register_autograd(_backward, setup_context=_setup)


def _kernel(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = compute_dtype(x)
    if dtype not in KERNEL_DTYPES:
        return F.linear(x, w, bias)
    if torch.is_autocast_enabled(x.device.type):
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    for name, value in (("w", w), ("bias", bias)):
        if value is not None and value.dtype != dtype:
            raise ValueError(f"{NAME}: {name} is {value.dtype} and x {dtype}; cast one, or use torch.autocast")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = linear_op(flat, w.contiguous(), None if bias is None else bias.contiguous())
    return y.view(*x.shape[:-1], -1)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [.., N] of x [.., K], w [N, K] and bias [N]; autocast is followed.

    Raises ValueError for shapes, devices, strides and, on a GPU, mixed dtypes that do not fit.
    """
    check(NAME, "x", x, x.shape, x.device)
    check(NAME, "w", w, (w.shape[0], x.shape[-1]), x.device)
    if bias is not None:
        check(NAME, "bias", bias, (w.shape[0],), x.device)
    return choose(x.device, reference, cuda=_kernel)(x, w, bias)
