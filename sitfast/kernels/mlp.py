"""The feed-forward branch: two linear layers with a tanh GELU between them.

    y = gelu(x w1ᵀ + b1) w2ᵀ + b2,   gelu(u) = u/2 · (1 + tanh(√(2/π) · (u + 0.044715 u³)))

x [.., D] · w1 [H, D] · b1 [H] · w2 [D, H] · b2 [D] · y [.., D].
Backward needs x and the pre-activation u = x w1ᵀ + b1; a = gelu(u) is kept too (`save="both"`) or computed again from u
(`save="preact"`), with du = da ⊙ gelu'(u):

    da = dy w2 · du, db1 = Σ du · dw2 = dyᵀ a · db2 = Σ dy · dw1 = duᵀ x · dx = du w1

What is between the GEMMs rides on them where a fused GEMM exists and measured faster than cuBLAS's and a pass of its own:

    forward    gluon; cublaslt: GELU_AUX_BIAS; each one GEMM that writes u and a · pointwise: a pass over u
    backward   gluon, triton: one GEMM makes du, db1 and, where it was not kept, a · pointwise: a pass over da and u

One H100, bf16, 32768 x 1152 x 4608, in ms with the GEMM's own 0.47: forward gluon 0.55, cublaslt 0.577, pointwise 0.679;
backward with a gluon 0.62, triton 0.788, pointwise 0.909. docs/kernels.md has the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sitfast.kernels import cublaslt
from sitfast.kernels.dispatch import check, choose, compute_dtype

NAME = "mlp"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Save = Literal["preact", "both"]
Forward = Literal["gluon", "cublaslt", "pointwise"]
Backward = Literal["gluon", "triton", "pointwise"]

# Below this width the reference runs on GPUs too: nothing was measured there, nor in fp32, where it therefore runs as well. One
# H100, bf16, 32768 rows, H = 4 D, µs of forward and backward, kernels against compiled reference: D = 384: 165 + 424 against
# 214 + 418; 768: 478 + 1017 against 564 + 1130; 1024: 798 + 1672 against 907 + 1822; 1152: 982 + 2246 against 1111 + 2416.
LEAST_WIDTH = 384


def reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, save: Save = "preact") -> Tensor:
    """`save` is autograd's own business here: it keeps both."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def choose_forward(x: Tensor, w1: Tensor) -> Forward:
    """What makes u and a of contiguous x [M, D] and w1 [H, D]."""
    from sitfast.kernels import gemm_gelu

    if gemm_gelu.supports(x, w1) and w1.shape[0] % 8 == 0 and gemm_gelu.gluon_works(x.device, x.dtype):
        return "gluon"
    return "cublaslt" if cublaslt.works(x, w1) else "pointwise"


def choose_backward(dy: Tensor, w2: Tensor, u: Tensor) -> Backward:
    """What makes du of contiguous dy [M, D], w2 [D, H] and u [M, H]."""
    from sitfast.kernels import gemm_gelu

    if not gemm_gelu.supports(dy, w2, u):
        return "pointwise"
    return "gluon" if gemm_gelu.gluon_works(u.device, u.dtype) else "triton"


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, how: Forward) -> tuple[Tensor, ...]:
    """(y [M, D], u [M, H], a [M, H]) of contiguous operands."""
    if how == "gluon":
        from sitfast.kernels._gemm_gluon import gemm_gelu

        u, a = gemm_gelu(x, w1, b1)
    elif how == "cublaslt":
        u, a = cublaslt.gelu_aux_bias(x, w1, b1)
    else:
        from sitfast.kernels.gelu import gelu

        u = torch.addmm(b1, x, w1.t())
        a = gelu(u)
    return cublaslt.matmul(a, w2, b2, form="nt"), u, a


def backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, u: Tensor, a: Tensor | None, needs: list[bool], how: Backward
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2, None where `needs` says so; an `a` of None is computed again from u."""
    from sitfast.kernels.gelu import column_sums, gelu, gelu_backward_

    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    dx = dw1 = db1 = dw2 = None
    recompute = need_w2 and a is None
    if need_x or need_w1 or need_b1:
        if how == "gluon":
            from sitfast.kernels._gemm_gluon import gemm_dgelu

            du, again, db1 = gemm_dgelu(dy, w2, u, with_activation=recompute)
        elif how == "triton":
            from sitfast.kernels.gemm_gelu import gemm_dgelu

            du, again, db1 = gemm_dgelu(dy, w2, u, with_activation=recompute)
        else:
            du, again, db1 = gelu_backward_(dy @ w2, u, with_activation=recompute)
        a = again if recompute else a
        del again
    elif recompute:
        a = gelu(u)
    if need_w2:
        assert a is not None
        dw2 = dy.t() @ a
    del a
    if need_w1:
        dw1 = du.t() @ x
    if need_x:
        dx = cublaslt.matmul(du, w1, form="nn")
    db2 = column_sums(dy, dy.dtype) if need_b2 else None
    return dx, dw1, db1 if need_b1 else None, dw2, db2


@torch.library.custom_op(
    "sitfast::mlp_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor? b2, bool keep_u, bool keep_a)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward_op(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, keep_u: bool, keep_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, u, a = forward(x, w1, b1, w2, b2, choose_forward(x, w1))
    return y, u if keep_u else u.new_empty(0), a if keep_a else a.new_empty(0)


@_forward_op.register_fake
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, keep_u: bool, keep_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], w1.shape[0])
    return torch.empty_like(x), x.new_empty(shape if keep_u else 0), x.new_empty(shape if keep_a else 0)


@torch.library.custom_op(
    "sitfast::mlp_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor u, Tensor a, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, u: Tensor, a: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    kept = a if a.numel() == u.numel() else None
    dy = dy.contiguous()
    grads = backward(dy, x, w1, w2, u, kept, needs, choose_backward(dy, w2, u))
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, u: Tensor, a: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    hidden, width = w1.shape
    shapes = ((x.shape[0], width), (hidden, width), (hidden,), (width, hidden), (width,))
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    x, w1, _, w2, *_ = inputs
    _, u, a = output
    ctx.save_for_backward(x, w1, w2, u, a)
    ctx.set_materialize_grads(False)  # u and a are outputs of the operator, not of `mlp`: no gradient meets them


def _autograd(ctx, dy, du, da) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.sitfast.mlp_backward(dy, *ctx.saved_tensors, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None)


_forward_op.register_autograd(_autograd, setup_context=_setup_context)


def fused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, save: Save = "preact") -> Tensor:
    """The kernels, whatever the device; what autograd will not need is not kept."""
    dtype = compute_dtype(x)
    operands = [x, w1, b1, w2] if b2 is None else [x, w1, b1, w2, b2]
    if torch.is_autocast_enabled(x.device.type):
        operands = [value.to(dtype) for value in operands]
    for name, value in zip(("x", "w1", "b1", "w2", "b2"), operands, strict=False):
        if value.dtype != dtype or dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"{NAME}: {name} is {value.dtype}; the kernels take fp16, bf16 or fp32, the same for every operand: "
                f"cast it, or call inside use_reference()"
            )
    # Weights that still require grad here are those that autograd will ask for, also after autocast's cast.
    learns = torch.is_grad_enabled() and any(value.requires_grad for value in operands)
    flat, *rest = (value.contiguous() for value in (operands[0].reshape(-1, x.shape[-1]), *operands[1:]))
    bias = rest[3] if b2 is not None else None
    y, _, _ = torch.ops.sitfast.mlp_forward(flat, *rest[:3], bias, learns, learns and save == "both")
    return y.view(x.shape)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None = None, *, save: Save = "preact") -> Tensor:
    """y [.., D] of x [.., D]; the GEMMs follow autocast.

    Without b2 the caller adds it, and has its gradient. `save="both"` keeps a for backward, which saves storing it there
    again: at 32768 x 1152 x 4608 in bf16 on an H100 0.02 ms of 3.2 under sustained load, for 288 MiB more.
    """
    check(NAME, "x", x, x.shape, x.device)
    hidden, width = w1.shape[0], x.shape[-1]
    check(NAME, "w1", w1, (hidden, width), x.device)
    check(NAME, "b1", b1, (hidden,), x.device)
    check(NAME, "w2", w2, (width, hidden), x.device)
    if b2 is not None:
        check(NAME, "b2", b2, (width,), x.device)
    if save not in ("preact", "both"):
        raise ValueError(f"{NAME}: save={save!r}, expected 'preact' or 'both'")
    implementation = choose(x.device, reference, cuda=reference if _why_reference(width, compute_dtype(x)) else fused)
    return implementation(x, w1, b1, w2, b2, save)


def _why_reference(width: int, dtype: torch.dtype) -> str | None:
    """Why the kernels are not the default on a GPU at this width and dtype, or None where they are."""
    if width < LEAST_WIDTH:
        return f"below width {LEAST_WIDTH} the kernels have not been shown to win"
    return "the kernels have not been shown to win in fp32" if dtype == torch.float32 else None


def describe(rows: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device) -> str:
    """One line for the start-up table: what `mlp` runs on a GPU for `rows` of `width`, and why."""
    if reason := _why_reference(width, dtype):
        return f"PyTorch ({reason})"
    x, w1, u = (
        torch.empty(shape, dtype=dtype, device=device) for shape in ((rows, width), (hidden, width), (rows, hidden))
    )
    return f"forward {choose_forward(x, w1)}, backward {choose_backward(x, w1.view(width, hidden), u)}"
