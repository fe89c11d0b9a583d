"""The SiT and its training step as one writes them in PyTorch: what a whole step of this package is compared with.

Linear layers, layer_norm, scaled_dot_product_attention and tanh GELU in the order of the published network, nothing fused
by hand. Parameters have the names and shapes of `sitfast.model.SiT`, so that one loads the other's weights. A step draws
t and noise on the device, takes the loss, clips, updates and averages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitfast.layers import adaln_linear
from sitfast.model import SiT, sincos_pos_embed

DROP, NULL = 0.1, 1000  # share of labels replaced by the null class
CLIP_NORM, DECAY, LEARNING_RATE = 1.0, 0.9999, 1e-4


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D], normalized, scaled and shifted by vectors [B, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = Attention(width, heads), Mlp(width), adaln_linear(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(width, out), adaln_linear(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class PlainSiT(SiT):
    """Embeddings and unpatchify are plain PyTorch there already; blocks and last layer are those above."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        width, heads, depth = (self.config[name] for name in ("hidden_size", "num_heads", "depth"))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, self.patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self._unpatchify(self.final_layer(tokens, c), self._grid_of(x))


@torch.no_grad()
def random_weights(model: nn.Module) -> None:
    """Every weight from a normal distribution, drawn where it is: no branch is zero, as in the middle of a training.

    Products of zeros would draw less power, and the GPU's clock would be higher.
    """
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            grid = int(parameter.shape[1] ** 0.5)
            parameter.copy_(sincos_pos_embed(parameter.shape[-1], grid))
        else:
            parameter.normal_(0, 1.0 if "embedding_table" in name else 0.02)


def draw(x: Tensor, y: Tensor, drop: bool) -> tuple[Tensor, ...]:
    """x_t, t, target [B, C, H, W] and labels [B] of latents x: the linear path, the velocity."""
    t = torch.rand(x.shape[0], device=x.device)
    noise, s = torch.randn_like(x), t.view(-1, 1, 1, 1)
    if drop:
        y = torch.where(torch.rand(y.shape, device=y.device) < DROP, NULL, y)
    return s * x + (1 - s) * noise, t, x - noise, y


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out.float(), target)


class Averaging:
    """The exponential average of weights in fp32, by the fewest calls that PyTorch offers, or one by one."""

    def __init__(self, parameters: list[Tensor], *, fused: bool) -> None:
        self.parameters, self.fused = parameters, fused
        self.averages = [p.detach().float().clone() for p in parameters]
        narrow = parameters[0].dtype != torch.float32
        self.wide = [torch.empty_like(average) for average in self.averages] if narrow else None

    @torch.no_grad()
    def __call__(self) -> None:
        if not self.fused:
            for average, p in zip(self.averages, self.parameters, strict=True):
                average.mul_(DECAY).add_(p, alpha=1 - DECAY)
            return
        weights = self.parameters
        if self.wide is not None:  # lerp takes no mixed dtypes
            torch._foreach_copy_(self.wide, self.parameters)
            weights = self.wide
        torch._foreach_lerp_(self.averages, weights, 1 - DECAY)


class Training:
    """`step()` trains `model` on the same batch of latents every time; `compiler` is applied to what surrounds the model.

    With `fused`, gradients are clipped, and the optimizer and the average are PyTorch's fastest. Without, as the official
    code does it: no clipping, AdamW as it comes, one weight after another averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        latents: Tensor,
        labels: Tensor,
        *,
        dtype: torch.dtype,
        autocast: bool,
        fused: bool,
        drops_itself: bool = False,
        compiler: Callable[[Callable], Callable] = lambda function: function,
    ) -> None:
        self.model, self.latents, self.labels, self.dtype, self.fused = model, latents, labels, dtype, fused
        self.autocast, self.drop = autocast, not drops_itself
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True if fused and latents.is_cuda else None
        )
        self.average = Averaging(self.parameters, fused=fused)
        self.draw, self.loss = compiler(draw), compiler(loss_of)

    def step(self) -> None:
        xt, t, target, y = self.draw(self.latents, self.labels, self.drop)
        with torch.autocast(xt.device.type, torch.bfloat16, enabled=self.autocast):
            out = self.model(xt.to(self.dtype), t, y)
        self.loss(out, target).backward()
        if self.fused:
            nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average()
