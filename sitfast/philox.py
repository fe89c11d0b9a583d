"""Counter-based randomness: every draw is a pure function of (seed, sample index, stream).

    words(seed, index, stream, step)[block] = Philox4x32-10(counter = (block, stream | step << 8, index_lo, index_hi),
                                                            key     = (seed_lo, seed_hi))

No generator has state, so a run that resumes, or that runs on another number of GPUs, workers or micro-batches, sees the
same draws: the integers are equal bit for bit on every device. `index` is the number of the sample in the run's whole
sequence (samples consumed before it), so each epoch draws afresh; `step` tells repeated draws for one sample apart, as an
SDE sampler needs them. Value i of a sample is word i % 4 of block i // 4.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """What a draw is for. The numbers are part of a run's identity: never renumber, only add."""

    NOISE = 0  # the noise end of the interpolant
    TIME = 1  # t
    LABEL_DROP = 2  # whether the label becomes the null class
    FLIP = 3  # whether the image is mirrored
    VAE = 4  # the posterior sample
    SAMPLE = 5  # the starting noise of generation
    SDE = 6  # the Brownian increments of generation; `step` is the integrator's step
    ORDER = 7  # the order of the rows of an epoch, or of the blocks they lie in
    ROUNDING = 8  # the rounding of bf16 moments; `index` is the tensor, `step` the update
    WINDOW = 9  # the order within a window of blocks
    CROP = 10  # zoom, top and left of a random crop
    BUCKET = 11  # the size of the images of a batch; `index` is the update


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox 4×32 on Python integers, 64-bit NumPy arrays or int64 tensors (all 0 ≤ word < 2³²).

    A 32×32-bit product fits 64 bits; where the integer type is signed it wraps, and the mask after the shift restores the
    high half, so all three kinds give the same words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32, ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + _KEY_STEPS[0]) & MASK32, (k1 + _KEY_STEPS[1]) & MASK32
    return c0, c1, c2, c3


def split64(value: int) -> tuple[int, int]:
    """The low and high 32 bits of an integer taken modulo 2⁶⁴."""
    return value & MASK32, (value >> 32) & MASK32


def words(seed: int, index: Tensor, stream: Stream, count: int, *, step: int = 0) -> Tensor:
    """Random 32-bit words as int64, `[B, count]`, on the device of `index` (`[B]`, int64)."""
    assert 0 <= step < 1 << 24, "the step shares a 32-bit word with the stream"
    # The mask changes nothing but that Inductor takes the blocks for values, not for indices, which it multiplies in 32 bits.
    blocks = torch.arange((count + 3) // 4, device=index.device) & MASK32
    lo, hi = index[:, None] & MASK32, (index[:, None] >> 32) & MASK32
    zero = torch.zeros_like(lo + blocks)
    out = philox4x32((zero + blocks, zero + (int(stream) | step << 8), zero + lo, zero + hi), split64(seed))
    return torch.stack(out, dim=-1).flatten(1)[:, :count]


def uniform(seed: int, index: Tensor, stream: Stream, *shape: int, step: int = 0) -> Tensor:
    """fp32 uniforms `[B, *shape]` strictly inside (0, 1): (top 23 bits + ½) · 2⁻²³, exact in fp32."""
    bits = words(seed, index, stream, math.prod(shape), step=step)
    return (((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23).view(len(index), *shape)


def normal(seed: int, index: Tensor, stream: Stream, *shape: int, step: int = 0) -> Tensor:
    """fp32 standard normals `[B, *shape]` by Box–Muller: words (0, 1) give values (0, 1), words (2, 3) give (2, 3).

    radius = √(−2 ln((w₀ + ½) 2⁻³²)) reaches 6.7; angle = 2π · (w₁ + ½) 2⁻³². Evaluated in fp64 and rounded once, so that
    the value does not depend on where in a vector register the element happened to fall.
    """
    count = math.prod(shape)
    pairs = words(seed, index, stream, (count + 3) // 4 * 4, step=step).unflatten(1, (-1, 2))
    unit = (pairs.to(torch.float64) + 0.5) * 2.0**-32
    radius, angle = (-2.0 * unit[..., 0].log()).sqrt(), unit[..., 1] * (2.0 * math.pi)
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return values.flatten(1)[:, :count].to(torch.float32).reshape(len(index), *shape)
