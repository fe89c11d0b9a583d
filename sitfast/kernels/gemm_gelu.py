"""The GEMM of the backward feed-forward branch that meets the GELU, with it in the epilogue, for Hopper.

    du = (dy w2) ⊙ gelu'(u),  db1 = Σ du,  and a = gelu(u) for the weight gradient, if it was not saved

dy [M, D] · w2 [D, H] · u, a, du [M, H] · db1 [H]; fp16 or bf16 with fp32 accumulators.

A GEMM that writes da to memory and a pass that reads it and writes du cost 2u beyond the GEMM; here only u is read (and
a written). Operands and results travel by tensor memory accelerator (TMA), which fills with zeros what lies beyond the
matrix and leaves it unwritten, so that no tile needs a mask; a row beyond M has dy = 0, hence du = 0, and does not
disturb the sums.

The grid is one program a multiprocessor, each walking over tiles in bands of `group` rows (so that neighbours share
operands in L2). The two nested loops are flattened into one, so that the loads of the next tile are in flight while the
epilogue of this one works. The epilogue runs on column halves of the accumulator, which need half of the registers and
of the shared memory. The column sums of one tile are one row of fp32 partial sums [M / rows of a tile, H], which a
second stage adds up: the same bits in every run.

The kernel here is in Triton. The faster one in `_gemm_gluon`, which has a forward twin, takes its place where
`gluon_works`.
"""

# Pyright reads the kernels as plain Python, which they are not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sitfast.kernels.gelu import column_sums, dgelu_of

DTYPES = (torch.float16, torch.bfloat16)
# Gluon is experimental and its names change: the versions it ran on (3.6) and is compiled for by the tests (3.7).
GLUON_VERSIONS = ("3.6", "3.7")


@dataclass(frozen=True)
class Launch:
    rows: int  # of a tile
    columns: int
    depth: int  # of one step of the inner loop
    warps: int
    stages: int  # steps whose operands are in shared memory at a time
    group: int  # rows of tiles in a band


# Two warp groups of 64 x 256, 128 accumulators a thread: the largest tile that leaves registers for an epilogue. Three
# stages of 48 KiB and the epilogue's two halves of 32 KiB fill the 227 KiB of shared memory.
LAUNCH = Launch(128, 256, 64, warps=8, stages=3, group=8)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile, in tiles: bands of GROUP rows, walked through column by column."""
    band = tile // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return band * GROUP + within % height, within // height


@triton.jit
def _halves(acc):
    """The left and the right half of the columns; no value changes its thread."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _dgelu_part(acc, u_desc, du_desc, a_desc, partial_ptr, row, column, hidden, WITH_A: tl.constexpr):
    u = u_desc.load([row, column]).to(tl.float32)
    du, a = dgelu_of(acc, u)
    if WITH_A:
        a_desc.store([row, column], a.to(a_desc.dtype))
    # The sums stand between the two stores: both use one buffer, and the first leaves it meanwhile.
    lane = column + tl.arange(0, acc.shape[1])
    tl.store(partial_ptr + lane, tl.sum(du, axis=0), mask=lane < hidden)
    du_desc.store([row, column], du.to(du_desc.dtype))


@triton.jit
def dgelu_kernel(
    dy_desc,
    w_desc,
    u_desc,
    du_desc,
    a_desc,
    partial_ptr,
    rows,
    hidden,
    width,
    programs,
    WITH_A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tl.assume(width > 0)
    tiles_m = tl.cdiv(rows, ROWS)
    tiles_n = tl.cdiv(hidden, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=True):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row = tile_m * ROWS
        column = tile_n * COLUMNS
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, width, DEPTH):
            acc = tl.dot(dy_desc.load([row, k]), w_desc.load([k, column]), acc)
        sums = partial_ptr + tile_m.to(tl.int64) * hidden
        left, right = _halves(acc)
        _dgelu_part(left, u_desc, du_desc, a_desc, sums, row, column, hidden, WITH_A)
        _dgelu_part(right, u_desc, du_desc, a_desc, sums, row, column + COLUMNS // 2, hidden, WITH_A)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def supports(*operands: Tensor) -> bool:
    """Whether the kernels take these contiguous matrices, and run on a GPU that they were measured on.

    A TMA matrix starts at a multiple of 16 bytes, and so does each of its rows.
    """
    return all(
        _is_hopper(t.device) and t.dtype in DTYPES and t.numel() > 0 and t.shape[1] % 8 == 0 and t.data_ptr() % 16 == 0
        for t in operands
    )


@cache
def has_gluon() -> bool:
    """Whether this Triton has the Gluon that `_gemm_gluon` is written in."""
    if not triton.__version__.startswith(tuple(f"{version}." for version in GLUON_VERSIONS)):
        return False
    try:
        from sitfast.kernels import _gemm_gluon  # noqa: F401
    except ImportError:
        return False
    return True


_verdicts: dict[tuple[torch.device, torch.dtype], bool] = {}


def gluon_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `_gemm_gluon` may be used: it compiles, agrees with PyTorch and repeats, see `_tested`.

    A device first met while a CUDA graph is captured cannot be tested there, and is refused for that call.
    """
    if not has_gluon():
        return False
    key = (device, dtype)
    if key not in _verdicts and not torch.cuda.is_current_stream_capturing():
        _verdicts[key] = _tested(device, dtype)
    return _verdicts.get(key, False)


def _tested(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels answer as precisely as PyTorch, and the same twice, on two tiles a program that fit nowhere."""
    from sitfast.kernels._gemm_gluon import BM, BN
    from sitfast.kernels._gemm_gluon import gemm_dgelu as in_gluon
    from sitfast.kernels._gemm_gluon import gemm_gelu as forward

    rows, width = 8 * BM - 27, 200
    hidden = BN * triton.cdiv(2 * multiprocessors(device), 8) - 24
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    x, w1, b1 = draw(rows, width), draw(hidden, width, scale=width**-0.5), draw(hidden)
    dy, w2 = draw(rows, width), draw(width, hidden, scale=width**-0.5)

    def by_pytorch(x: Tensor, w1: Tensor, b1: Tensor, dy: Tensor, w2: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        du = torch.ops.aten.gelu_backward(dy @ w2, u, approximate="tanh")
        a = torch.nn.functional.gelu(u, approximate="tanh")
        return torch.addmm(b1, x, w1.t()), a, du, a, du.sum(0)

    def by_gluon() -> tuple[Tensor, ...]:
        u, a = forward(x, w1, b1)
        return u, a, *in_gluon(dy, w2, u, with_activation=True)

    try:
        got, again = by_gluon(), by_gluon()
    except Exception:  # whatever an experimental compiler raises, there is another kernel
        return False
    operands = (x, w1, b1, dy, w2, got[0])
    plain, exact = by_pytorch(*operands), by_pytorch(*(value.float() for value in operands))
    return all(
        torch.equal(one, other)
        and bool(((one - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-2 * torch.finfo(dtype).eps).item())
        for one, other, eager, truth in zip(got, again, plain, exact, strict=True)
    )


def gemm_dgelu(
    dy: Tensor, w2: Tensor, u: Tensor, *, with_activation: bool, launch: Launch = LAUNCH
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(du [M, H], gelu(u) [M, H] or None, db1 [H]) of contiguous dy [M, D], w2 [D, H], u [M, H]."""
    (rows, width), hidden = dy.shape, w2.shape[1]
    du = torch.empty_like(u)
    a = torch.empty_like(u) if with_activation else None
    partial = torch.empty((triton.cdiv(rows, launch.rows), hidden), dtype=torch.float32, device=u.device)
    part = [launch.rows, launch.columns // 2]
    tiles = partial.shape[0] * triton.cdiv(hidden, launch.columns)
    programs = min(tiles, multiprocessors(u.device))
    dgelu_kernel[(programs,)](
        TensorDescriptor.from_tensor(dy, [launch.rows, launch.depth]),
        TensorDescriptor.from_tensor(w2, [launch.depth, launch.columns]),
        TensorDescriptor.from_tensor(u, part),
        TensorDescriptor.from_tensor(du, part),
        TensorDescriptor.from_tensor(du if a is None else a, part),
        partial,
        rows,
        hidden,
        width,
        programs,
        WITH_A=with_activation,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        DEPTH=launch.depth,
        GROUP=launch.group,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return du, a, column_sums(partial, u.dtype)
