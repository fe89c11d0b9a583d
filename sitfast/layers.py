"""The layers of a SiT: embeddings, attention, feed-forward, the block and the final layer.

A block does not add its last branch itself: it hands (x, y, gate, bias) on with x + gate · (y + bias) still pending, so
that one kernel does that sum and the next layer norm, and the gradient of the bias falls out of its backward.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitfast.kernels import (
    attention,
    cross_attention,
    gated_residual_layernorm_modulate,
    layernorm_modulate,
    linear,
    mlp,
    qk_norm_rope,
)
from sitfast.kernels.mlp import Save
from sitfast.kernels.qk_norm_rope import Norm

Angles = tuple[Tensor, Tensor]  # cos and sin [N, d/2] of the rotary embedding
Pending = tuple[Tensor, Tensor, Tensor]  # y [B, N, D], gate [B, D], bias [D]: gate · (y + bias) is still to be added

FREQUENCY_DIM = 256  # width of the sinusoidal timestep embedding
MAX_PERIOD = 10_000.0


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to tokens [B, N, D] by a convolution whose stride is the patch: a linear layer of the patches.

    As such it writes the tokens in their order, where a convolution's [B, D, H/p, W/p] would have to be transposed.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        patch = self.proj.kernel_size[0]
        patches = x.reshape(batch, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch, -1, channels * patch * patch)
        return F.linear(flat, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Times [B] in [0, 1] to vectors [B, D]: sinusoids in fp32 whatever the model's precision, then a small MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoids(t).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels [B] to vectors [B, D]; a null class comes last if labels can be dropped."""

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PooledEmbedder(nn.Module):
    """Pooled vectors [B, P] of captions to vectors [B, D]."""

    def __init__(self, pooled_size: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(pooled_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.mlp(pooled)


class HeadNorm(nn.Module):
    """The parameters of the norm of each head of q or of k, under timm's names; `qk_norm_rope` computes it."""

    EPS: ClassVar[dict[Norm, float]] = {"none": 0.0, "rms": 1e-6, "layer": 1e-5}

    def __init__(self, kind: Norm, width: int) -> None:
        super().__init__()
        self.weight = None if kind == "none" else nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None


class Attention(nn.Module):
    """Multi-head self-attention of h [B, N, D], without the bias of its last layer, which is left pending.

    `qk_norm` normalizes each head of q and k, as timm's ("layer") and LightningDiT's ("rms") modules do. The gradient of
    qkv's bias comes from the operation after the linear layer.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: Norm = "none") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm: Norm = qk_norm
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = (HeadNorm(qk_norm, hidden_size // num_heads) for _ in range(2))
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, h: Tensor, rope: Angles | None = None) -> Tensor:
        qkv, bias = linear(h, self.qkv.weight, self.qkv.bias.detach()), self.qkv.bias
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        if self.qk_norm != "none" or rope is not None:
            q, k = self.q_norm, self.k_norm
            qkv = qk_norm_rope(
                qkv, norm=self.qk_norm, q_weight=q.weight, k_weight=k.weight, q_bias=q.bias, k_bias=k.bias,
                rope=rope, bias=bias, eps=HeadNorm.EPS[self.qk_norm],
            )  # fmt: skip
            bias = None
        return linear(attention(qkv, bias=bias).flatten(2), self.proj.weight)


class CrossAttention(nn.Module):
    """Attention of h [B, N, D] to a caption [B, L, D] where mask [B, L] is true, the bias of its last layer left pending.

    `gate` [D] is that of its residual branch: a weight, zero at first, and not a seventh to ninth modulation vector, which
    would cost 3·D² weights a block.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, h: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        q = self.q(h).unflatten(-1, (self.num_heads, -1))
        kv = self.kv(caption).unflatten(-1, (2, self.num_heads, -1))
        return linear(cross_attention(q, kv, mask).flatten(2), self.proj.weight)


class Mlp(nn.Module):
    """Feed-forward branch of h [B, N, D], without the bias of its last layer, which is left pending.

    `save` is what backward keeps, see `mlp`; it may be set at any time.
    """

    save: Save = "preact"

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return mlp(h, self.fc1.weight, self.fc1.bias, self.fc2.weight, save=self.save)


def adaln_linear(hidden_size: int, num_chunks: int) -> nn.Sequential:
    """SiLU and the linear layer that makes `num_chunks` modulation vectors of the condition; see `modulation`."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_chunks * hidden_size))


def modulation(adaln: nn.Sequential, c_silu: Tensor, num_chunks: int) -> tuple[Tensor, ...]:
    """The vectors [B, D], views of one output; SiLU(c) is the same for all blocks, so it is computed once, outside."""
    return adaln[1](c_silu).chunk(num_chunks, dim=1)


class Block(nn.Module):
    """One transformer block with adaLN-zero conditioning.

    Takes x [B, N, D], what is pending (None before the first block) and SiLU(c) [B, D]; returns x and its own last
    branch as pending: y [B, N, D], gate [B, D] and bias [D]. With `text` it also takes the caption [B, L, D] and its
    mask [B, L], and has a cross-attention of its own.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, qk_norm: Norm = "none", text: bool = False
    ) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads) if text else None
        self.mlp = Mlp(hidden_size, mlp_size)
        self.adaLN_modulation = adaln_linear(hidden_size, 6)

    def forward(
        self,
        x: Tensor,
        pending: Pending | None,
        c_silu: Tensor,
        rope: Angles | None = None,
        caption: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Pending]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation(self.adaLN_modulation, c_silu, 6)
        if pending is None:
            h = layernorm_modulate(x, shift_msa, scale_msa)
        else:
            y, gate, bias = pending
            x, h = gated_residual_layernorm_modulate(x, y, gate, shift_msa, scale_msa, bias=bias)
        y, gate, bias = self.attn(h, rope), gate_msa, self.attn.proj.bias
        if self.cross_attn is not None and caption is not None and mask is not None:
            plain = torch.zeros_like(shift_mlp)  # a norm without modulation
            x, h = gated_residual_layernorm_modulate(x, y, gate, plain, plain, bias=bias)
            y, gate = self.cross_attn(h, caption, mask), self.cross_attn.gate.expand_as(plain)
            bias = self.cross_attn.proj.bias
        # The layer norm before this one keeps x for backward already; x + gate · (y + bias) nobody does.
        x, h = gated_residual_layernorm_modulate(x, y, gate, shift_mlp, scale_mlp, bias=bias, save="input")
        # A copy of the bias: the parameter itself belongs to this block, which may be sharded again when it returns.
        return x, (self.mlp(h), gate_mlp, self.mlp.fc2.bias.clone())


class FinalLayer(nn.Module):
    """Adds the pending branch, then norm, modulation and the linear layer to patches [B, N, out_size]."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = adaln_linear(hidden_size, 2)

    def forward(self, x: Tensor, pending: Pending, c_silu: Tensor) -> Tensor:
        shift, scale = modulation(self.adaLN_modulation, c_silu, 2)
        y, gate, bias = pending
        _, h = gated_residual_layernorm_modulate(x, y, gate, shift, scale, bias=bias)
        return self.linear(h)


def timestep_sinusoids(t: Tensor) -> Tensor:
    """[cos(t·ω), sin(t·ω)] [B, 256] in fp32, ω_i = max_period^(−i/128), of times t [B]."""
    half = FREQUENCY_DIM // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
