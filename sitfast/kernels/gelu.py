"""The pointwise halves of the feed-forward branch in Triton: tanh GELU, and its derivative with what backward needs.

    s(u) = sigmoid(2 √(2/π) (u + 0.044715 u³))
    gelu(u) = u s(u),   gelu'(u) = s + u s (1 − s) · 2 √(2/π) (1 + 3 · 0.044715 u²)

The sigmoid form of the tanh formula loses nothing in the negative tail, where 1 + tanh cancels, and one sigmoid serves
the value and the derivative.

forward   read u, write gelu(u)
backward  read da and u, write du and, if it was not saved, gelu(u); the column sums of du fall out as fp32 partial sums
          [chunks, H], added up by a second stage, so that the result is the same in every run.

`gelu_of` and `dgelu_of` serve the GEMM epilogues too (see `gemm_gelu`), where every instruction counts, since the tensor
cores wait for it. Hence the inline assembly: one instruction each for the exponential and the reciprocal (errors 2^-22
and 2^-23) where Triton's exp2 and division take nine, and value and derivative in one block, which the compiler cannot
tear apart and compute twice, once for the layout of each result.
"""

# Pyright reads the kernels as plain Python, which they are not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOPE = 2 * math.sqrt(2 / math.pi)
# The exponent −log2(e) · 2 √(2/π) (u + 0.044715 u³), and the derivative of 2 √(2/π) (u + 0.044715 u³), by powers of u.
EXPONENT_1 = tl.constexpr(-math.log2(math.e) * _SLOPE)
EXPONENT_3 = tl.constexpr(-math.log2(math.e) * _SLOPE * 0.044715)
INNER_0 = tl.constexpr(_SLOPE)
INNER_2 = tl.constexpr(_SLOPE * 3 * 0.044715)
ON_GPU = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no inline assembly


def _hex(value: float) -> str:
    """An fp32 constant as PTX writes it."""
    return "0f" + struct.pack(">f", value).hex().upper()


_SIGMOID_PTX = f"""
    .reg .f32 q, x, s;
    mul.f32 q, U, U;
    fma.rn.f32 x, q, {_hex(EXPONENT_3.value)}, {_hex(EXPONENT_1.value)};
    mul.f32 x, x, U;
    ex2.approx.ftz.f32 x, x;
    add.f32 x, x, {_hex(1.0)};
    rcp.approx.ftz.f32 s, x;
"""
GELU_PTX = tl.constexpr("{" + _SIGMOID_PTX.replace("U", "$1") + "mul.f32 $0, $1, s; }")
DGELU_PTX = tl.constexpr(
    "{"
    + _SIGMOID_PTX.replace("U", "$3")
    + f"""
    .reg .f32 a, t;
    mul.f32 a, $3, s;
    neg.f32 t, a;
    fma.rn.f32 t, t, s, a;
    fma.rn.f32 q, q, {_hex(INNER_2.value)}, {_hex(INNER_0.value)};
    fma.rn.f32 t, t, q, s;
    mul.f32 $0, $2, t;
    mov.f32 $1, a;
}}"""
)


@dataclass(frozen=True)
class Launch:
    block: int  # elements a program of the forward kernel
    rows: int  # rows in flight in the backward kernel
    columns: int  # columns of a program of the backward kernel
    warps: int
    chunk: int  # rows summed by one program, the height of a partial sum


# 16 bytes a load, four to eight of them in flight per thread; a chunk of 256 rows of 4608 columns makes 2304 programs
# at 32768 tokens, 17 for each of 132 multiprocessors, and partial sums of 0.4 % of the bytes of u.
LAUNCH = Launch(block=8192, rows=16, columns=256, warps=4, chunk=256)


@triton.jit
def gelu_of(u):
    """gelu(u) for fp32 u; the power of two overflows to inf in the negative tail, where u / inf is the right answer."""
    if ON_GPU:
        return tl.inline_asm_elementwise(GELU_PTX, "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return u / (tl.exp2(u * (u * u * EXPONENT_3 + EXPONENT_1)) + 1.0)


@triton.jit
def dgelu_of(da, u):
    """(da · gelu'(u), gelu(u)) for fp32 da and u."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            DGELU_PTX, "=f,=f,f,f", [da, u], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        s = 1.0 / (tl.exp2(u * (u * u * EXPONENT_3 + EXPONENT_1)) + 1.0)
        a = u * s
        return da * ((a - a * s) * (u * u * INNER_2 + INNER_0) + s), a


@triton.jit
def _column_sums_kernel(in_ptr, out_ptr, rows, columns, chunk, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    first = part * chunk
    last = tl.minimum(first + chunk, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < columns)[None, :]
        total += tl.load(in_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part * columns + column, sums, mask=column < columns)


@triton.jit
def _forward_kernel(u_ptr, a_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    u = tl.load(u_ptr + at, mask=inside).to(tl.float32)
    tl.store(a_ptr + at, gelu_of(u).to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    da_ptr,
    u_ptr,
    a_ptr,
    partial_ptr,
    rows,
    columns,
    chunk,
    WITH_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * chunk
    last = tl.minimum(first + chunk, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        da = tl.load(da_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        du, a = dgelu_of(da, u)
        tl.store(da_ptr + at, du.to(da_ptr.dtype.element_ty), mask=inside)
        if WITH_ACTIVATION:
            tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=inside)
        total += du
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * columns + column
    tl.store(partial, tl.sum(total, axis=0), mask=column < columns)


def column_sums(x: Tensor, dtype: torch.dtype, chunk: int = 256) -> Tensor:
    """Σ over rows of a contiguous x [M, N], in fp32 by two stages, as `dtype` [N]."""
    rows, columns = x.shape
    if rows > 4 * chunk:
        partial = torch.empty((triton.cdiv(rows, chunk), columns), dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(columns, 256), partial.shape[0])
        _column_sums_kernel[grid](x, partial, rows, columns, chunk, ROWS=16, COLUMNS=256, num_warps=4)
        x, rows = partial, partial.shape[0]
    sums = torch.empty(columns, dtype=dtype, device=x.device)
    _column_sums_kernel[(triton.cdiv(columns, 64), 1)](x, sums, rows, columns, rows, ROWS=64, COLUMNS=64, num_warps=8)
    return sums


def gelu(u: Tensor, launch: Launch = LAUNCH) -> Tensor:
    """gelu(u) of a contiguous u, in its dtype."""
    a = torch.empty_like(u)
    _forward_kernel[(triton.cdiv(u.numel(), launch.block),)](
        u, a, u.numel(), BLOCK=launch.block, num_warps=2 * launch.warps
    )
    return a


def gelu_backward_(
    da: Tensor, u: Tensor, *, with_activation: bool, launch: Launch = LAUNCH
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(du [M, H], gelu(u) [M, H] or None, column sums of du [H]) of contiguous da and u; du overwrites da."""
    rows, columns = u.shape
    chunks = triton.cdiv(rows, launch.chunk)
    a = torch.empty_like(u) if with_activation else None
    partial = torch.empty((chunks, columns), dtype=torch.float32, device=u.device)
    _backward_kernel[(triton.cdiv(columns, launch.columns), chunks)](
        da,
        u,
        da if a is None else a,
        partial,
        rows,
        columns,
        launch.chunk,
        WITH_ACTIVATION=with_activation,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        num_warps=launch.warps,
    )
    return da, a, column_sums(partial, u.dtype)
