"""The GEMM of `gemm_gelu` in Gluon, Triton's language of explicit layouts, where the tile of u is loaded early.

    du = (dy w2) ⊙ gelu'(u),  db1 = Σ du,  and a = gelu(u), if asked for

Triton loads u when the epilogue asks for it, and the tensor cores wait; here the copy is in flight from the second step
of the inner loop on, and du takes the place of u in shared memory, which is full: three stages of 48 KiB, u of 64 KiB
and 16 KiB for a part of a. Gluon is experimental: see `GLUON_VERSIONS` in `gemm_gelu`.
"""

# Pyright reads the kernels as plain Python, which they are not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false

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

from sitfast.kernels.gelu import DGELU_PTX, column_sums
from sitfast.kernels.gemm_gelu import multiprocessors

# The tile, bands and stages of the Triton kernel; the epilogue in four parts, whose registers fit beside the accumulator.
BM, BN, BK, PART, STAGES, GROUP = 128, 256, 64, 64, 3, 8
WARPS = 8


@gluon.jit
def _place(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    band = tile // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return band * GROUP + within % height, within // height


@gluon.jit
def _load(dy_desc, w_desc, a_smem, b_smem, ready, slot, row, column, k, there):
    mbarrier.expect(ready.index(slot), dy_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(dy_desc, [row, k], ready.index(slot), a_smem.index(slot), pred=there)
    tma.async_copy_global_to_shared(w_desc, [k, column], ready.index(slot), b_smem.index(slot), pred=there)


@gluon.jit
def _halves(x):
    return gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def _finish(
    acc, index: gl.constexpr, u_smem, out_smem, du_desc, a_desc, sums, row, column, hidden, WITH_A: gl.constexpr
):
    PART: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PART, 16])
    acc = gl.convert_layout(acc, layout, assert_trivial=True)
    u = u_smem.index(index).load(layout).to(gl.float32)
    du, a = gl.inline_asm_elementwise(
        DGELU_PTX, "=f,=f,f,f", [acc, u], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
    start = column + index * PART
    if WITH_A:
        tma.store_wait(pendings=1)  # the a of the part before has left its buffer; its du need not have
        out_smem.store(a.to(a_desc.dtype))
    u_smem.index(index).store(du.to(du_desc.dtype))
    fence_async_shared()
    if WITH_A:
        tma.async_copy_shared_to_global(a_desc, [row, start], out_smem)
    tma.async_copy_shared_to_global(du_desc, [row, start], u_smem.index(index))
    lane = start + gl.arange(0, PART, gl.SliceLayout(0, layout))
    gl.store(sums + lane, gl.sum(du, axis=0), mask=lane < hidden)


@gluon.jit
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
    WITH_A: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    PARTS: gl.constexpr = BN // PART
    dtype: gl.constexpr = dy_desc.dtype
    a_smem = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], dy_desc.layout)
    b_smem = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], w_desc.layout)
    u_smem = gl.allocate_shared_memory(dtype, [PARTS, BM, PART], u_desc.layout)
    if WITH_A:  # noqa: SIM108
        out_smem = gl.allocate_shared_memory(dtype, [BM, PART], a_desc.layout)
    else:
        out_smem = u_smem
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    u_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(u_ready, count=1)

    tiles_m = gl.cdiv(rows, BM)
    tiles_n = gl.cdiv(hidden, BN)
    tiles = tiles_m * tiles_n
    steps = gl.cdiv(width, BK)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])

    # The loads run STAGES - 1 steps ahead, over the borders of tiles.
    ahead_tile = gl.program_id(0)
    ahead_m, ahead_n = _place(ahead_tile, tiles_m, tiles_n, GROUP)
    ahead_k = 0
    for i in gl.static_range(STAGES - 1):
        _load(dy_desc, w_desc, a_smem, b_smem, ready, i, ahead_m * BM, ahead_n * BN, ahead_k * BK, ahead_tile < tiles)
        ahead_k += 1
        if ahead_k == steps:
            ahead_k = 0
            ahead_tile += programs
            ahead_m, ahead_n = _place(ahead_tile, tiles_m, tiles_n, GROUP)

    step = 0
    u_phase = 0
    for tile in range(gl.program_id(0), tiles, programs):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row = tile_m * BM
        column = tile_n * BN
        acc = gl.zeros((BM, BN), gl.float32, layout)
        for k in range(steps):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
            acc = warpgroup_mma(a_smem.index(slot), b_smem.index(slot), acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before is done with its slot, and the stores of the tile before with u's.
            _load(
                dy_desc,
                w_desc,
                a_smem,
                b_smem,
                ready,
                (step + STAGES - 1) % STAGES,
                ahead_m * BM,
                ahead_n * BN,
                ahead_k * BK,
                ahead_tile < tiles,
            )
            if k == 0:
                tma.store_wait(pendings=0)
                mbarrier.expect(u_ready, PARTS * u_desc.block_type.nbytes)
                for i in gl.static_range(PARTS):
                    tma.async_copy_global_to_shared(u_desc, [row, column + i * PART], u_ready, u_smem.index(i))
            ahead_k += 1
            if ahead_k == steps:
                ahead_k = 0
                ahead_tile += programs
                ahead_m, ahead_n = _place(ahead_tile, tiles_m, tiles_n, GROUP)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.wait(u_ready, u_phase)
        u_phase ^= 1
        sums = partial_ptr + tile_m.to(gl.int64) * hidden
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        _finish(first, 0, u_smem, out_smem, du_desc, a_desc, sums, row, column, hidden, WITH_A)
        _finish(second, 1, u_smem, out_smem, du_desc, a_desc, sums, row, column, hidden, WITH_A)
        _finish(third, 2, u_smem, out_smem, du_desc, a_desc, sums, row, column, hidden, WITH_A)
        _finish(fourth, 3, u_smem, out_smem, du_desc, a_desc, sums, row, column, hidden, WITH_A)
    tma.store_wait(pendings=0)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
    mbarrier.invalidate(u_ready)


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    kind = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, kind))


def gemm_dgelu(dy: Tensor, w2: Tensor, u: Tensor, *, with_activation: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(du [M, H], gelu(u) [M, H] or None, db1 [H]) of contiguous dy [M, D], w2 [D, H], u [M, H]."""
    (rows, width), hidden = dy.shape, w2.shape[1]
    du = torch.empty_like(u)
    a = torch.empty_like(u) if with_activation else None
    partial = torch.empty((triton.cdiv(rows, BM), hidden), dtype=torch.float32, device=u.device)
    programs = min(multiprocessors(u.device), partial.shape[0] * triton.cdiv(hidden, BN))
    dgelu_kernel[(programs,)](
        _describe(dy, [BM, BK]),
        _describe(w2, [BK, BN]),
        _describe(u, [BM, PART]),
        _describe(du, [BM, PART]),
        _describe(du if a is None else a, [BM, PART]),
        partial,
        rows,
        hidden,
        width,
        programs,
        WITH_A=with_activation,
        BM=BM,
        BN=BN,
        BK=BK,
        PART=PART,
        STAGES=STAGES,
        GROUP=GROUP,
        num_warps=WARPS,
    )
    return du, a, column_sums(partial, u.dtype)
