"""The GEMMs of the feed-forward branch that meet the GELU, in Gluon, Triton's language of explicit layouts, for Hopper.

    forward     u = x w1ᵀ + b1 and a = gelu(u)
    backward    du = (dy w2) ⊙ gelu'(u), db1 = Σ du, and a = gelu(u), if asked for

One program a multiprocessor, of three groups of four warps, walks over tiles of 128 x 256:

    first, second   each multiplies 64 rows, 64 x 256 x 64 a step, rounds its product (plus b1) to 16 bits and hands it on
    finish          takes it, does the rest and writes to memory, while the tensor cores are at the next tile

    x, w ─TMA─▶ stages ─full─▶ first ─done─▶ second, which begins the next load into the stage it has left
                                 └──────┬──────┘
                                  ready │ ▲ free
                           shared memory for half a tile ─▶ finish ─▶ memory

`second` is a step behind `first`, so that the tensor cores always have one of them to work for while the other hands its
product on. Where a tile hangs over its matrix TMA loads zeros, and `finish` masks what it reads and writes.

Gluon is experimental: see `GLUON_VERSIONS` in `gemm_gelu`.
"""

# Pyright reads the kernels as plain Python, which they are not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sitfast.kernels.gelu import DGELU_PTX, GELU_PTX, column_sums
from sitfast.kernels.gemm_gelu import multiprocessors

# Four stages of 48 KiB and half a tile of 32 KiB fill the 227 KiB of shared memory. Two stages would deadlock: `first`
# would wait for a load that `second` begins only when `first` has passed it.
BM, BN, BK, STAGES = 128, 256, 64, 4
GROUP = 8  # rows of tiles in a band
PART = 8  # rows that `finish` treats at a time
AHEAD = 3  # parts of u in flight; with fewer `finish` waits for memory, with more its bursts delay the other groups
# Of a thread of `first` and `second`, 128 of them accumulators; `finish` has the rest of the 504, and in backward needs more.
FORWARD_REGISTERS, BACKWARD_REGISTERS = 168, 160


@gluon.jit
def _place(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    band = tile // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return band * GROUP + within % height, within // height


@gluon.jit
def _previous(slot, STAGES: gl.constexpr):
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _load(
    x_desc, w_desc, shared, sizes, slot, tile, tile_m, tile_n, k, wanted, FORWARD: gl.constexpr, GROUP: gl.constexpr
):
    """If wanted, begin to load step k of a tile; returns the next step, and nothing is loaded beyond the last tile."""
    x_smem, w_smem, _, full, _, _, _ = shared
    _, tiles_m, tiles_n, steps, programs = sizes
    BK: gl.constexpr = x_desc.block_type.shape[1]
    row = tile_m * x_desc.block_type.shape[0]
    there = wanted & (tile < tiles_m * tiles_n)
    mbarrier.expect(full.index(slot), x_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(x_desc, [row, k * BK], full.index(slot), x_smem.index(slot), pred=there)
    if FORWARD:
        at = [tile_n * w_desc.block_type.shape[0], k * BK]
        tma.async_copy_global_to_shared(w_desc, at, full.index(slot), w_smem.index(slot), pred=there)
    else:
        at = [k * BK, tile_n * w_desc.block_type.shape[1]]
        tma.async_copy_global_to_shared(w_desc, at, full.index(slot), w_smem.index(slot), pred=there)
    if wanted:
        k += 1
        if k == steps:
            k = 0
            tile += programs
            tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
    return tile, tile_m, tile_n, k


@gluon.jit
def _multiply(x_desc, w_desc, bias_smem, shared, sizes, HALF: gl.constexpr, FORWARD: gl.constexpr, GROUP: gl.constexpr):
    x_smem, w_smem, out_smem, full, done, ready, free = shared
    _, tiles_m, tiles_n, steps, programs = sizes
    STAGES: gl.constexpr = x_smem.shape[0]
    ROWS: gl.constexpr = out_smem.shape[0]
    BN: gl.constexpr = out_smem.shape[1]
    START: gl.constexpr = HALF * ROWS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    tile = gl.program_id(0)  # of the next load, with its place and step
    tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
    at = 0
    if HALF == 1:
        for slot in range(STAGES):
            tile, tile_m, tile_n, at = _load(
                x_desc, w_desc, shared, sizes, slot, tile, tile_m, tile_n, at, True, FORWARD, GROUP
            )
    slot = 0
    phase = 0
    parity = 0
    for _ in range(gl.program_id(0), tiles_m * tiles_n, programs):
        acc = gl.zeros((ROWS, BN), gl.float32, layout)
        gl.assume(steps > 0)  # else ptxas cannot follow the accumulator and runs one product at a time
        for k in range(steps):
            before = _previous(slot, STAGES)
            if HALF == 1:
                mbarrier.wait(done.index(slot), phase)
            mbarrier.wait(full.index(slot), phase)
            x = x_smem.index(slot).slice(START, ROWS)
            w = w_smem.index(slot)
            if FORWARD:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done with its stage
            if HALF == 0:
                mbarrier.arrive(done.index(before), count=1, pred=k > 0)
            else:
                tile, tile_m, tile_n, at = _load(
                    x_desc, w_desc, shared, sizes, before, tile, tile_m, tile_n, at, k > 0, FORWARD, GROUP
                )
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        before = _previous(slot, STAGES)
        if HALF == 0:
            mbarrier.arrive(done.index(before), count=1)
        else:
            tile, tile_m, tile_n, at = _load(
                x_desc, w_desc, shared, sizes, before, tile, tile_m, tile_n, at, True, FORWARD, GROUP
            )
        mbarrier.wait(free.index(HALF), parity ^ 1 ^ HALF)  # the first half of the first tile finds the memory free
        if FORWARD:
            acc += bias_smem.load(gl.SliceLayout(0, layout))[None, :]
        out_smem.store(acc.to(out_smem.dtype))
        mbarrier.arrive(ready.index(HALF), count=1)
        parity ^= 1


@gluon.jit
def _take(smem, free, half, PART: gl.constexpr, layout: gl.constexpr):
    """The product of half a tile, as a tuple of [PART, BN]."""
    parts = (smem.slice(0, PART).load(layout),)
    for i in gl.static_range(1, smem.shape[0] // PART):
        parts = parts + (smem.slice(i * PART, PART).load(layout),)  # noqa: RUF005
    mbarrier.arrive(free.index(1 - half), count=1)
    return parts


@gluon.jit
def _part(row, line, column, rows, hidden):
    """Where the part below `row` starts, and which of it is inside a matrix [rows, hidden]."""
    return row.to(gl.int64) * hidden, (row + line < rows)[:, None] & (column < hidden)[None, :]


@gluon.jit
def _bias(bias_ptr, tile, tiles_m, tiles_n, hidden, BN: gl.constexpr, GROUP: gl.constexpr, layout: gl.constexpr):
    """b1 of the columns of a tile."""
    column = _place(tile, tiles_m, tiles_n, GROUP)[1] * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
    return gl.load(bias_ptr + column, mask=(column < hidden) & (tile < tiles_m * tiles_n), other=0.0).to(gl.float32)


@gluon.jit
def _finish_forward(bias_ptr, bias_smem, u_ptr, a_ptr, shared, rows, sizes, PART: gl.constexpr, GROUP: gl.constexpr):
    _, _, smem, _, _, ready, free = shared
    hidden, tiles_m, tiles_n, _, programs = sizes
    HALF: gl.constexpr = smem.shape[0]
    BN: gl.constexpr = smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 4], [1, 0])  # each warp has columns of its own
    line = gl.arange(0, PART, gl.SliceLayout(1, layout))
    parity = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, programs):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        column = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
        at = line[:, None] * hidden + column[None, :]
        next_bias = _bias(bias_ptr, tile + programs, tiles_m, tiles_n, hidden, BN, GROUP, layout)
        for half in range(2):
            row = (2 * tile_m + half) * HALF
            mbarrier.wait(ready.index(half), parity)
            if half == 1:  # both halves of this tile have their bias
                bias_smem.store(next_bias)
            us = _take(smem, free, half, PART, layout)
            for i in gl.static_range(HALF // PART):
                start, inside = _part(row + i * PART, line, column, rows, hidden)
                a = gl.inline_asm_elementwise(
                    GELU_PTX, "=f,f", [us[i].to(gl.float32)], dtype=gl.float32, is_pure=True, pack=1
                )
                gl.store(u_ptr + start + at, us[i], mask=inside)
                gl.store(a_ptr + start + at, a.to(smem.dtype), mask=inside)
        parity ^= 1


@gluon.jit
def _finish_backward(
    u_ptr,
    du_ptr,
    a_ptr,
    partial_ptr,
    shared,
    rows,
    sizes,
    WITH_A: gl.constexpr,
    PART: gl.constexpr,
    AHEAD: gl.constexpr,
    GROUP: gl.constexpr,
):
    _, _, smem, _, _, ready, free = shared
    hidden, tiles_m, tiles_n, _, programs = sizes
    HALF: gl.constexpr = smem.shape[0]
    BN: gl.constexpr = smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 4], [1, 0])  # each warp has columns of its own
    line = gl.arange(0, PART, gl.SliceLayout(1, layout))
    parity = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, programs):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        column = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
        at = line[:, None] * hidden + column[None, :]
        sums = gl.zeros((4, BN), gl.float32, layout)
        for half in range(2):
            row = (2 * tile_m + half) * HALF
            us = ()
            for i in gl.static_range(AHEAD):
                start, inside = _part(row + i * PART, line, column, rows, hidden)
                us = us + (gl.load(u_ptr + start + at, mask=inside, other=0.0),)  # noqa: RUF005
            mbarrier.wait(ready.index(half), parity)
            das = _take(smem, free, half, PART, layout)
            for i in gl.static_range(HALF // PART):
                if i + AHEAD < HALF // PART:
                    start, inside = _part(row + (i + AHEAD) * PART, line, column, rows, hidden)
                    us = us + (gl.load(u_ptr + start + at, mask=inside, other=0.0),)  # noqa: RUF005
                du, a = gl.inline_asm_elementwise(
                    DGELU_PTX,
                    "=f,=f,f,f",
                    [das[i].to(gl.float32), us[i].to(gl.float32)],
                    dtype=(gl.float32, gl.float32),
                    is_pure=True,
                    pack=1,
                )
                start, inside = _part(row + i * PART, line, column, rows, hidden)
                gl.store(du_ptr + start + at, du.to(smem.dtype), mask=inside)
                if WITH_A:
                    gl.store(a_ptr + start + at, a.to(smem.dtype), mask=inside)
                own = gl.sum(gl.reshape(du, (PART // 4, 4, BN)), axis=0)  # of rows that one thread has
                sums += gl.convert_layout(own, layout, assert_trivial=True)
        gl.store(partial_ptr + tile_m.to(gl.int64) * hidden + column, gl.sum(sums, axis=0), mask=column < hidden)
        parity ^= 1


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def gemm_gelu_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    u_ptr,
    du_ptr,
    a_ptr,
    partial_ptr,
    rows,
    hidden_8,
    width,
    programs,
    FORWARD: gl.constexpr,
    WITH_A: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,
    AHEAD: gl.constexpr,
    GROUP: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """hidden_8 is H / 8, from which the compiler sees that 16 bytes of a row are all inside or all outside."""
    dtype: gl.constexpr = x_desc.dtype
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BK: gl.constexpr = x_desc.block_type.shape[1]
    BN: gl.constexpr = w_desc.block_type.shape[0] if FORWARD else w_desc.block_type.shape[1]
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], x_desc.layout)
    w_smem = gl.allocate_shared_memory(
        dtype, [STAGES, w_desc.block_type.shape[0], w_desc.block_type.shape[1]], w_desc.layout
    )
    out_smem = gl.allocate_shared_memory(dtype, [BM // 2, BN], gl.NVMMASharedLayout(128, 16, rank=2))
    full = _barriers(STAGES)
    done = _barriers(STAGES)
    ready = _barriers(2)
    free = _barriers(2)
    fence_async_shared()
    rows = gl.to_tensor(rows)
    hidden = gl.to_tensor(hidden_8) * 8
    programs = gl.to_tensor(programs)
    tiles_m = gl.cdiv(rows, BM)
    tiles_n = gl.cdiv(hidden, BN)
    steps = gl.cdiv(gl.to_tensor(width), BK)
    shared = (x_smem, w_smem, out_smem, full, done, ready, free)
    sizes = (hidden, tiles_m, tiles_n, steps, programs)
    bias_smem = gl.allocate_shared_memory(gl.float32, [BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if FORWARD:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 4], [1, 0])
        bias_smem.store(_bias(bias_ptr, gl.program_id(0), tiles_m, tiles_n, hidden, BN, GROUP, layout))
        gl.warp_specialize(
            [
                (_finish_forward, (bias_ptr, bias_smem, u_ptr, a_ptr, shared, rows, sizes, PART, GROUP)),
                (_multiply, (x_desc, w_desc, bias_smem, shared, sizes, 0, FORWARD, GROUP)),
                (_multiply, (x_desc, w_desc, bias_smem, shared, sizes, 1, FORWARD, GROUP)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _finish_backward,
                    (u_ptr, du_ptr, a_ptr, partial_ptr, shared, rows, sizes, WITH_A, PART, AHEAD, GROUP),
                ),
                (_multiply, (x_desc, w_desc, bias_smem, shared, sizes, 0, FORWARD, GROUP)),
                (_multiply, (x_desc, w_desc, bias_smem, shared, sizes, 1, FORWARD, GROUP)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    kind = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, kind))


def _launch(x, w, bias, u, du, a, partial, *, forward: bool, with_a: bool) -> None:
    (rows, width), hidden = x.shape, u.shape[1]
    programs = min(multiprocessors(x.device), triton.cdiv(rows, BM) * triton.cdiv(hidden, BN))
    gemm_gelu_kernel[(programs,)](
        _describe(x, [BM, BK]),
        _describe(w, [BN, BK] if forward else [BK, BN]),
        bias,
        u,
        du,
        a,
        partial,
        rows,
        hidden // 8,
        width,
        programs,
        FORWARD=forward,
        WITH_A=with_a,
        STAGES=STAGES,
        PART=PART,
        AHEAD=AHEAD,
        GROUP=GROUP,
        REGISTERS=FORWARD_REGISTERS if forward else BACKWARD_REGISTERS,
        num_warps=4,
    )


def gemm_gelu(x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """(u [M, H], gelu(u) [M, H]) of contiguous x [M, D], w1 [H, D], b1 [H]."""
    u, a = (torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, w1, b1, u, u, a, u, forward=True, with_a=True)
    return u, a


def gemm_dgelu(dy: Tensor, w2: Tensor, u: Tensor, *, with_activation: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(du [M, H], gelu(u) [M, H] or None, db1 [H]) of contiguous dy [M, D], w2 [D, H], u [M, H]."""
    du = torch.empty_like(u)
    a = torch.empty_like(u) if with_activation else None
    partial = torch.empty((triton.cdiv(u.shape[0], BM), u.shape[1]), dtype=torch.float32, device=u.device)
    _launch(dy, w2, u, u, du, du if a is None else a, partial, forward=False, with_a=with_activation)
    return du, a, column_sums(partial, u.dtype)
