"""The Triton kernels behind `layernorm_modulate` and `gated_residual_layernorm_modulate`; they differ by a few lines.

Forward and backward are one pass each over the big tensors. A program owns a chunk of rows of one sample: it loads the
modulation vectors once, each row while the one before is worked on, and in backward keeps the sums over its rows in
registers. These partial sums [B, chunks, sums, D] are added up in a fixed order by a second, small kernel.

Triton's tensors have power-of-two sizes. A row is therefore two pieces, a and b: the largest power of two below D and
the rest of it (1152 = 1024 + 128, 1024 = 512 + 512), where one padded block of 2048 would leave 44 % of the lanes idle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """Rows that a program owns, and its warps."""

    rows: int
    warps: int


# (largest D, launch with the residual, launch without), for 16-bit and fp32 streams alike. Measured on an H100 with
# B · N = 32768, see docs/kernels.md; runners-up in brackets. Many short programs win, since they need no common end.
FORWARD = (
    # 41.0 µs (2 warps 43.8, 16 rows 42.6), fp32 57.6; alone 23.5 (16 rows 27.9)
    (384, (Launch(rows=2, warps=1), Launch(rows=2, warps=1))),
    # 768: 77.9 µs (4 rows 76.5), fp32 107.2 (109.4), alone 40.5 (16 rows 48.4); 1024: 97.4 (99.0), 142.0, 51.8 (63.6)
    (1024, (Launch(rows=2, warps=2), Launch(rows=2, warps=1))),
    # 110.4 µs (2 rows 111.9, 8 rows 113.7; 1 warp 110.1, with spills), fp32 160.8 (163.3); alone 58.3 (8 rows 61.9)
    (1152, (Launch(rows=4, warps=2), Launch(rows=2, warps=1))),
    # From here on not measured: as many elements of a row a thread, or half.
    (2304, (Launch(rows=4, warps=4), Launch(rows=4, warps=4))),
    (4608, (Launch(rows=4, warps=8), Launch(rows=4, warps=8))),
    (8192, (Launch(rows=4, warps=32), Launch(rows=4, warps=32))),
)


@dataclass(frozen=True)
class Wave:
    """Warps of a program, and how many programs one multiprocessor has registers for."""

    warps: int
    programs: int

    @property
    def registers(self) -> int:
        """Of a thread, at most, for that many programs to fit; ptxas hands them out in eights and knows no more than 255."""
        return min(REGISTERS // (32 * self.warps * self.programs) // 8 * 8, 255)


# (largest D, wave with the residual in 16 bits, in fp32, without it in 16 bits, in fp32) of a backward pass, counted from
# the registers on sm_90. The rows follow, see `backward_launch`: of all chunks tried, those that fill their waves were the
# fastest, or within 2 % of it, in all 16 cases; (1) at D = 384 lies between two that were tried.
BACKWARD = (
    # 73.0, 99.0, about 45 and about 58 µs
    (384, (Wave(2, 8), Wave(2, 6), Wave(2, 16), Wave(2, 14))),
    # 128.8 (4 warps 134.8), 176.0 (180.9), 67.6 (68.9), 102.6 µs (104.7)
    (768, (Wave(2, 4), Wave(2, 4), Wave(2, 8), Wave(2, 8))),
    # 157.0 (2 warps 158.6), 227.7 (227.3), 84.1 (4 warps 84.3), 131.2 µs (131.0)
    (1024, (Wave(4, 4), Wave(4, 4), Wave(2, 8), Wave(2, 6))),
    # 181.0 (2 warps 178.2, with spills), 268.9 (4 warps 281.5), 96.4 (4 warps 98.9), 147.0 µs (2 warps 155.0)
    (1152, (Wave(4, 3), Wave(8, 2), Wave(2, 6), Wave(4, 4))),
    # From here on not measured.
    (2304, (Wave(8, 1), Wave(8, 1), Wave(8, 2), Wave(8, 2))),
    (4608, (Wave(16, 1), Wave(16, 1), Wave(16, 1), Wave(16, 1))),
    (8192, (Wave(32, 1), Wave(32, 1), Wave(32, 1), Wave(32, 1))),
)
REGISTERS = 65536  # of a multiprocessor, from sm_80 to sm_120
MIN_ROWS, MAX_ROWS = 16, 128  # of a backward program; partial sums cost 1 / rows of the pass, long ones end unevenly


@triton.jit
def _load_row(ptr, live, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """Both pieces of the row [D] at ptr, padded with zeros; nothing is read unless `live`."""
    a = tl.arange(0, BLOCK_A)
    b = BLOCK_A + tl.arange(0, BLOCK_B)
    return tl.load(ptr + a, mask=live & (a < D), other=0.0), tl.load(ptr + b, mask=live & (b < D), other=0.0)


@triton.jit
def _load_vector(ptr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """Both pieces of the vector [D] at ptr, in fp32."""
    piece_a, piece_b = _load_row(ptr, True, D, BLOCK_A, BLOCK_B)
    return piece_a.to(tl.float32), piece_b.to(tl.float32)


@triton.jit
def _store_row(ptr, value_a, value_b, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    a = tl.arange(0, BLOCK_A)
    b = BLOCK_A + tl.arange(0, BLOCK_B)
    tl.store(ptr + a, value_a.to(ptr.dtype.element_ty), mask=a < D)
    tl.store(ptr + b, value_b.to(ptr.dtype.element_ty), mask=b < D)


@triton.jit
def _row_mean(value_a, value_b, D: tl.constexpr):
    return (tl.sum(value_a, axis=0) + tl.sum(value_b, axis=0)) * (1.0 / D)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "chunk_rows"])
def layernorm_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    x_new_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    num_chunks,
    chunk_rows,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Program (sample, chunk): x_new = x + gate · (y + bias) and h of its rows; without the residual x_new is x."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // num_chunks
    start = sample * num_rows
    begin = (program % num_chunks).to(tl.int32) * chunk_rows
    end = tl.minimum(begin + chunk_rows, num_rows)
    tail = BLOCK_A + tl.arange(0, BLOCK_B) < D

    shift_a, shift_b = _load_vector(shift_ptr + sample * shift_stride, D, BLOCK_A, BLOCK_B)
    scale_a, scale_b = _load_vector(scale_ptr + sample * scale_stride, D, BLOCK_A, BLOCK_B)
    scale_a += 1.0
    scale_b += 1.0
    if HAS_RESIDUAL:
        gate_a, gate_b = _load_vector(gate_ptr + sample * gate_stride, D, BLOCK_A, BLOCK_B)
    if HAS_BIAS:
        bias_a, bias_b = _load_vector(bias_ptr, D, BLOCK_A, BLOCK_B)

    row = start + begin
    next_x_a, next_x_b = _load_row(x_ptr + row * D, True, D, BLOCK_A, BLOCK_B)
    if HAS_RESIDUAL:
        next_y_a, next_y_b = _load_row(y_ptr + row * D, True, D, BLOCK_A, BLOCK_B)
    for n in range(begin, end):
        row = start + n
        x_a, x_b = next_x_a.to(tl.float32), next_x_b.to(tl.float32)
        next_x_a, next_x_b = _load_row(x_ptr + (row + 1) * D, n + 1 < end, D, BLOCK_A, BLOCK_B)
        if HAS_RESIDUAL:
            y_a, y_b = next_y_a.to(tl.float32), next_y_b.to(tl.float32)
            next_y_a, next_y_b = _load_row(y_ptr + (row + 1) * D, n + 1 < end, D, BLOCK_A, BLOCK_B)
            if HAS_BIAS:
                y_a += bias_a
                y_b += bias_b
            # An fma by name, not by the compiler's leave: backward makes the same bits again, see FROM_INPUT.
            x_a = tl.fma(gate_a, y_a, x_a)
            x_b = tl.fma(gate_b, y_b, x_b)
            _store_row(x_new_ptr + row * D, x_a, x_b, D, BLOCK_A, BLOCK_B)

        mean = _row_mean(x_a, x_b, D)
        x_a -= mean
        x_b = tl.where(tail, x_b - mean, 0.0)
        rstd = tl.rsqrt(_row_mean(x_a * x_a, x_b * x_b, D) + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        h_a = x_a * rstd * scale_a + shift_a
        h_b = x_b * rstd * scale_b + shift_b
        _store_row(h_ptr + row * D, h_a, h_b, D, BLOCK_A, BLOCK_B)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "chunk_rows"])
def layernorm_backward_kernel(
    dh_ptr,
    dx_new_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    bias_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_ptr,
    partial_ptr,
    num_rows,
    num_chunks,
    chunk_rows,
    gate_stride,
    scale_stride,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DX_NEW: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FROM_INPUT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Program (sample, chunk): dx and dy of its rows, and over them the sums of dh, dh · x̂, dx · y and dx.

    g = dh · (1 + scale);  dx = dx_new + rstd · (g − mean(g) − x̂ · mean(g · x̂));  dy = gate · dx

    x is x_new, or with FROM_INPUT what forward read: x_new is then computed again and rounded, operation by operation as
    forward did, so that all gradients are the same bits.
    """
    program = tl.program_id(0).to(tl.int64)
    sample = program // num_chunks
    start = sample * num_rows
    begin = (program % num_chunks).to(tl.int32) * chunk_rows
    end = tl.minimum(begin + chunk_rows, num_rows)

    if HAS_DH:
        scale_a, scale_b = _load_vector(scale_ptr + sample * scale_stride, D, BLOCK_A, BLOCK_B)
        scale_a += 1.0
        scale_b += 1.0
        dshift_a = tl.zeros((BLOCK_A,), tl.float32)
        dshift_b = tl.zeros((BLOCK_B,), tl.float32)
        dscale_a = tl.zeros((BLOCK_A,), tl.float32)
        dscale_b = tl.zeros((BLOCK_B,), tl.float32)
    if HAS_RESIDUAL:
        gate_a, gate_b = _load_vector(gate_ptr + sample * gate_stride, D, BLOCK_A, BLOCK_B)
        dgate_a = tl.zeros((BLOCK_A,), tl.float32)
        dgate_b = tl.zeros((BLOCK_B,), tl.float32)
    if HAS_BIAS:
        dx_sum_a = tl.zeros((BLOCK_A,), tl.float32)
        dx_sum_b = tl.zeros((BLOCK_B,), tl.float32)

    row = start + begin
    if HAS_DH:
        next_dh_a, next_dh_b = _load_row(dh_ptr + row * D, True, D, BLOCK_A, BLOCK_B)
        next_x_a, next_x_b = _load_row(x_ptr + row * D, True, D, BLOCK_A, BLOCK_B)
    if HAS_DX_NEW:
        next_dx_a, next_dx_b = _load_row(dx_new_ptr + row * D, True, D, BLOCK_A, BLOCK_B)
    if HAS_RESIDUAL:
        next_y_a, next_y_b = _load_row(y_ptr + row * D, True, D, BLOCK_A, BLOCK_B)
    for n in range(begin, end):
        row = start + n
        more = n + 1 < end
        if HAS_DH:
            dh_a, dh_b = next_dh_a.to(tl.float32), next_dh_b.to(tl.float32)
            x_a, x_b = next_x_a.to(tl.float32), next_x_b.to(tl.float32)
            next_dh_a, next_dh_b = _load_row(dh_ptr + (row + 1) * D, more, D, BLOCK_A, BLOCK_B)
            next_x_a, next_x_b = _load_row(x_ptr + (row + 1) * D, more, D, BLOCK_A, BLOCK_B)
        if HAS_DX_NEW:
            dx_a, dx_b = next_dx_a.to(tl.float32), next_dx_b.to(tl.float32)
            next_dx_a, next_dx_b = _load_row(dx_new_ptr + (row + 1) * D, more, D, BLOCK_A, BLOCK_B)
        if HAS_RESIDUAL:
            y_a, y_b = next_y_a.to(tl.float32), next_y_b.to(tl.float32)
            next_y_a, next_y_b = _load_row(y_ptr + (row + 1) * D, more, D, BLOCK_A, BLOCK_B)

        if not HAS_DX_NEW:
            dx_a = tl.zeros((BLOCK_A,), tl.float32)
            dx_b = tl.zeros((BLOCK_B,), tl.float32)
        if HAS_DH:
            if FROM_INPUT:
                branch_a, branch_b = y_a, y_b
                if HAS_BIAS:  # loaded for each row: kept, its registers would cost a program (at D = 1152, 189 for 168)
                    bias_a, bias_b = _load_vector(bias_ptr, D, BLOCK_A, BLOCK_B)
                    branch_a += bias_a
                    branch_b += bias_b
                x_a = tl.fma(gate_a, branch_a, x_a).to(x_ptr.dtype.element_ty).to(tl.float32)
                x_b = tl.fma(gate_b, branch_b, x_b).to(x_ptr.dtype.element_ty).to(tl.float32)
            mean = tl.load(mean_ptr + row)
            rstd = tl.load(rstd_ptr + row)
            x_hat_a, x_hat_b = (x_a - mean) * rstd, (x_b - mean) * rstd
            dshift_a += dh_a
            dshift_b += dh_b
            dscale_a += dh_a * x_hat_a
            dscale_b += dh_b * x_hat_b
            g_a, g_b = dh_a * scale_a, dh_b * scale_b
            g_mean, g_x_hat_mean = _row_mean(g_a, g_b, D), _row_mean(g_a * x_hat_a, g_b * x_hat_b, D)
            dx_a += rstd * (g_a - g_mean - x_hat_a * g_x_hat_mean)
            dx_b += rstd * (g_b - g_mean - x_hat_b * g_x_hat_mean)
        _store_row(dx_ptr + row * D, dx_a, dx_b, D, BLOCK_A, BLOCK_B)
        if HAS_RESIDUAL:
            _store_row(dy_ptr + row * D, gate_a * dx_a, gate_b * dx_b, D, BLOCK_A, BLOCK_B)
            dgate_a += dx_a * y_a
            dgate_b += dx_b * y_b
        if HAS_BIAS:
            dx_sum_a += dx_a
            dx_sum_b += dx_b

    partial = partial_ptr + program * SUMS * D
    if HAS_DH:
        _store_row(partial, dshift_a, dshift_b, D, BLOCK_A, BLOCK_B)
        _store_row(partial + D, dscale_a, dscale_b, D, BLOCK_A, BLOCK_B)
    if HAS_RESIDUAL:
        _store_row(partial + 2 * D, dgate_a, dgate_b, D, BLOCK_A, BLOCK_B)
    if HAS_BIAS:
        _store_row(partial + 3 * D, dx_sum_a, dx_sum_b, D, BLOCK_A, BLOCK_B)


@triton.jit(do_not_specialize=["num_chunks"])
def sum_chunks_kernel(
    partial_ptr,
    gate_ptr,
    bias_ptr,
    dshift_ptr,
    dscale_ptr,
    dgate_ptr,
    dbias_ptr,
    num_chunks,
    gate_stride,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Program (sample, columns): the sums over all chunks of the sample, hence its gradients.

    dgate = Σ dx · y + bias · Σ dx;  its share of dbias = gate · Σ dx
    """
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    dshift = tl.zeros((COLUMNS,), tl.float32)
    dscale = tl.zeros((COLUMNS,), tl.float32)
    dgate = tl.zeros((COLUMNS,), tl.float32)
    dx_sum = tl.zeros((COLUMNS,), tl.float32)
    for chunk in range(num_chunks):
        partial = partial_ptr + (sample * num_chunks + chunk) * SUMS * D + columns
        if HAS_DH:
            dshift += tl.load(partial, mask=inside, other=0.0)
            dscale += tl.load(partial + D, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            dgate += tl.load(partial + 2 * D, mask=inside, other=0.0)
        if HAS_BIAS:
            dx_sum += tl.load(partial + 3 * D, mask=inside, other=0.0)
    out = sample * D + columns
    if HAS_DH:
        tl.store(dshift_ptr + out, dshift.to(dshift_ptr.dtype.element_ty), mask=inside)
        tl.store(dscale_ptr + out, dscale.to(dscale_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dbias_ptr + out, gate * dx_sum, mask=inside)
        dgate += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32) * dx_sum
    if HAS_RESIDUAL:
        tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_samples_kernel(in_ptr, out_ptr, num_samples, D: tl.constexpr, COLUMNS: tl.constexpr, SAMPLES: tl.constexpr):
    """Σ over the samples of [B, D]; a program does COLUMNS of it."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((SAMPLES, COLUMNS), tl.float32)
    for first in range(0, num_samples, SAMPLES):
        sample = (first + tl.arange(0, SAMPLES)[:, None]).to(tl.int64)
        total += tl.load(in_ptr + sample * D + columns, mask=(sample < num_samples) & (columns < D), other=0.0)
    result = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out_ptr + columns, result.to(out_ptr.dtype.element_ty), mask=columns < D)


def _pieces(width: int) -> dict[str, int]:
    """Sizes of the two pieces of a row."""
    block_a = 1 << max(width - 1, 1).bit_length() - 1
    block_b = triton.next_power_of_2(width - block_a) if width > block_a else 1
    return {"D": width, "BLOCK_A": block_a, "BLOCK_B": block_b}


def _entry(table: tuple[tuple[int, T], ...], width: int) -> T:
    return next(entry for largest, entry in table if width <= largest)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward_launch(width: int, residual: bool) -> Launch:
    with_residual, alone = _entry(FORWARD, width)
    return with_residual if residual else alone


def backward_wave(width: int, residual: bool, dtype: torch.dtype) -> Wave:
    return _entry(BACKWARD, width)[2 * (not residual) + (dtype == torch.float32)]


@cache
def backward_launch(
    batch: int, tokens: int, width: int, residual: bool, dtype: torch.dtype, device: torch.device
) -> Launch:
    """The fewest chunks of a sample that fill nine tenths of their waves.

    B = 128, N = 256, D = 1152: three chunks are 384 programs on 396 places; four, a wave and a third, took 18 % longer.
    """
    wave = backward_wave(width, residual, dtype)
    places = _multiprocessors(device) * wave.programs
    fewest = triton.cdiv(tokens, MAX_ROWS)
    choices = range(fewest, max(fewest, tokens // MIN_ROWS) + 1)
    filled = {chunks: batch * chunks / (triton.cdiv(batch * chunks, places) * places) for chunks in choices}
    chunks = next((chunks for chunks in choices if filled[chunks] >= 0.9), max(choices, key=filled.__getitem__))
    return Launch(triton.cdiv(tokens, chunks), wave.warps)


def _empty(tensor: Tensor | None, other: Tensor | None = None) -> Tensor:
    """Room for the gradient of a tensor, or an empty tensor where there is none, since an operator returns no None."""
    if tensor is None:
        return torch.empty(0, dtype=other.dtype, device=other.device)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new (x itself without y), h, and mean and rstd [B, N] of x_new in fp32."""
    batch, tokens, width = x.shape
    launch = forward_launch(width, y is not None)
    x = x.contiguous()  # also for y and all gradients: those of a sum arrive with strides of zero
    x_new = x if y is None else torch.empty_like(x)
    h = torch.empty_like(x, dtype=out_dtype)
    mean = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    chunks = triton.cdiv(tokens, launch.rows)
    layernorm_forward_kernel[(batch * chunks,)](
        x,
        None if y is None else y.contiguous(),
        gate,
        bias,
        shift,
        scale,
        None if y is None else x_new,
        h,
        mean,
        rstd,
        tokens,
        chunks,
        launch.rows,
        0 if gate is None else gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        eps,
        HAS_RESIDUAL=y is not None,
        HAS_BIAS=bias is not None,
        num_warps=launch.warps,
        **_pieces(width),
    )
    return x_new, h, mean, rstd


def backward(
    dh: Tensor | None,
    dx_new: Tensor | None,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    from_input: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dshift, dscale, dbias; x is x_new here, or with `from_input` the x that forward read.

    A gradient that does not exist comes back empty.
    """
    batch, tokens, width = x.shape
    launch = backward_launch(batch, tokens, width, y is not None, x.dtype, x.device)
    chunks = triton.cdiv(tokens, launch.rows)
    sums = 4 if bias is not None else 3 if y is not None else 2
    partial = torch.empty((batch, chunks, sums, width), dtype=torch.float32, device=x.device)
    dx = _empty(x)
    dshift, dscale = (_empty(None if dh is None else scale, x) for _ in range(2))
    dy, dgate, dbias = _empty(y, x), _empty(gate, x), _empty(bias, x)
    gate_stride = 0 if gate is None else gate.stride(0)
    flags = {"HAS_DH": dh is not None, "HAS_RESIDUAL": y is not None, "HAS_BIAS": bias is not None, "SUMS": sums}
    # Computing x_new again takes registers, which ptxas saves when told to: without spills at the widths of all presets.
    limit = {"maxnreg": backward_wave(width, True, x.dtype).registers} if from_input else {}
    layernorm_backward_kernel[(batch * chunks,)](
        None if dh is None else dh.contiguous(),
        None if dx_new is None else dx_new.contiguous(),
        x.contiguous(),
        None if y is None else y.contiguous(),
        gate,
        bias,
        scale,
        mean,
        rstd,
        dx,
        dy,
        partial,
        tokens,
        chunks,
        launch.rows,
        gate_stride,
        scale.stride(0),
        HAS_DX_NEW=dx_new is not None,
        FROM_INPUT=from_input,
        **flags,
        num_warps=launch.warps,
        **limit,
        **_pieces(width),
    )
    dbias_shares = None if bias is None else torch.empty((batch, width), dtype=torch.float32, device=x.device)
    sum_chunks_kernel[(batch, triton.cdiv(width, 128))](
        partial,
        gate,
        bias,
        dshift,
        dscale,
        dgate,
        dbias_shares,
        chunks,
        gate_stride,
        D=width,
        COLUMNS=128,
        num_warps=1,
        **flags,
    )
    if bias is not None:
        sum_samples_kernel[(triton.cdiv(width, 32),)](dbias_shares, dbias, batch, D=width, COLUMNS=32, SAMPLES=128)
    return dx, dy, dgate, dshift, dscale, dbias
