"""The Scalable Interpolant Transformer and its twin, the Diffusion Transformer.

    tokens = patches(x) + pos_embed;   c = embed(t) + embed(y)
    block:   x = x + gate · attn(LN(x) · (1 + scale) + shift),  then the same with an MLP for attn
             between them, where y is a caption: x = x + gate · cross_attn(LN(x), caption), gate a weight, zero at first
    output = unpatchify(linear(LN(x) · (1 + scale) + shift)),   every shift, scale and gate linear in SiLU(c)

`layers` has the blocks. Parameter names, their order and their initialisation are those of the published SiT and DiT
checkpoints. The model draws nothing at random after that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitfast.errors import SitfastError
from sitfast.kernels.qk_norm_rope import Norm, axial_angles
from sitfast.layers import (
    FREQUENCY_DIM,
    MAX_PERIOD,
    Angles,
    Block,
    FinalLayer,
    HeadNorm,
    LabelEmbedder,
    PatchEmbed,
    PooledEmbedder,
    TimestepEmbedder,
)
from sitfast.presets import preset_kwargs
from sitfast.shards import assign, like, rows_of
from sitfast.text import ByteEncoder, Condition, Text

Grid = tuple[int, int]  # rows and columns of tokens

# Deviations of the byte encoder's first embeddings. At 0.02, and with an embedder of the pooled vector like that of labels, all
# captions look alike at first: on the drawn shapes a caption with the right place had a lower loss than one with a wrong place in
# 48 % of 128 pairs after 1,200 steps, and with these in 97 % after 600.
BYTE_SCALES = {"text_encoder.token_embedding.weight": 0.5, "text_encoder.position_embedding": 0.1}


class SiT(nn.Module):
    """Conditional transformer: x [B, C, H, W], t [B], y [B] to a prediction [B, C, H, W].

    H and W are input_size, or any others that the patch divides: the position embedding is then interpolated, and the
    rotary angles are those of rope_grid × rope_grid tokens (null: of input_size) seen at another scale.

    y = num_classes is the null class, which exists only if class_dropout_prob > 0. With learn_sigma the network has
    twice the output channels and the second half is dropped.

    What a token is, and how many there are, stands in `_check_size`, `_check_shape`, `_lay_out`, `_positions`, `_grid_of`,
    `_placed`, `_rope`, `_unpatchify` and `shape` alone: a model of other data than images overrides them
    (`sitfast.gene_model`).

    With `text` (see `text.text_shape`) y is the captions, a `Text`, and there are no labels: the pooled vector takes the place
    of the label's embedding, and every block attends to the tokens.
    """

    returns_sigma = False
    num_tokens: int

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        qk_norm: Norm = "none",
        rope: bool = False,
        rope_grid: int | None = None,
        text: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "qk_norm": qk_norm,
            "rope": rope,
            "rope_grid": rope_grid,
            "text": text,
        }
        _check_config(self.config)
        self._check_size()
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        x_embedder, patch_values = self._lay_out(hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, hidden_size), requires_grad=False)
        self.x_embedder = x_embedder
        self.t_embedder = TimestepEmbedder(hidden_size)
        if text is None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        else:
            self.y_embedder = PooledEmbedder(text["pooled"], hidden_size)
            self.context_embedder = nn.Linear(text["width"], hidden_size)
            if text["depth"]:
                self.text_encoder = ByteEncoder(text["length"], text["width"], text["depth"])
        mlp_size, reads = int(hidden_size * mlp_ratio), text is not None
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_size, qk_norm, reads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_values * self.out_channels)
        self._angles: dict[tuple[torch.device, Grid], Angles] = {}
        if not self.pos_embed.is_meta:
            self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Zero biases, gates, modulations and output layer; one for the weights of norms; N(0, 0.02) embedders of t and of
        labels; `BYTE_SCALES` for bytes; Xavier-uniform for the rest.

        Each is drawn whole, on the CPU, one after another, so that the numbers are the same on any device and however
        the weights are sharded; the memory needed is that of the largest.
        """
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape, device="cpu")
            if name == "pos_embed":
                value = self._positions(value.shape[-1])
            elif name.endswith(("bias", "gate")) or "adaLN_modulation" in name or name.startswith("final_layer"):
                pass
            elif ".q_norm." in name or ".k_norm." in name or (name.startswith("text_encoder") and ".norm" in name):
                value.fill_(1.0)
            elif name in BYTE_SCALES:
                nn.init.normal_(value, std=BYTE_SCALES[name])
            elif name.startswith("t_embedder") or "embedding_table" in name:
                nn.init.normal_(value, std=0.02)
            else:
                nn.init.xavier_uniform_(value.flatten(1))  # a view; the patch kernel counts as a linear layer
            assign(parameter, value)

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """The prediction for x_t [B, C, H, W] at times t [B] with labels or captions y [B]: [B, C, H, W]."""
        self._check_inputs(x, t, y)
        grid = self._grid_of(x)
        tokens = self.x_embedder(x) + self._placed(grid)
        vector, *caption = self._read(y) if isinstance(y, Text) else (self.y_embedder(y),)
        c_silu = F.silu(self.t_embedder(t) + vector)
        pending = None
        rope = self._rope(x.device, grid) if self.config["rope"] else None
        for block in self.blocks:
            tokens, pending = block(tokens, pending, c_silu, rope, *caption)
        return self._unpatchify(self.final_layer(tokens, pending, c_silu), grid)

    def _read(self, y: Text) -> tuple[Tensor, Tensor, Tensor]:
        """The vector [B, D] of each caption, its tokens [B, L, D] and their mask [B, L] for the blocks."""
        states, pooled = y.tokens, y.pooled
        if self.config["text"]["depth"]:
            states, pooled = self.text_encoder(y.tokens, y.mask)
        dtype = self.context_embedder.weight.dtype
        vector, caption = self.y_embedder(pooled.to(dtype)), self.context_embedder(states.to(dtype))
        return vector, caption, y.mask

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W)."""
        return self.in_channels, self.input_size, self.input_size

    def _check_size(self) -> None:
        """SitfastError where what a sample is does not go with the patches."""
        size, patch = self.config["input_size"], self.config["patch_size"]
        if size % patch:
            near = max(size // patch * patch, patch)
            raise SitfastError(
                f"input_size={size} is not divisible by patch_size={patch}; try {near} or {near + patch}"
            )

    def _lay_out(self, hidden_size: int) -> tuple[nn.Module, int]:
        """Sets the number of tokens; the module that makes them of x, and how many values of a channel each stands for."""
        self.grid = self.input_size // self.patch_size
        self.num_tokens = self.grid**2
        return PatchEmbed(self.patch_size, self.in_channels, hidden_size), self.patch_size**2

    def _positions(self, hidden_size: int) -> Tensor:
        """The position embedding [1, N, D] on the CPU."""
        return sincos_pos_embed(hidden_size, self.grid)

    def _grid_of(self, x: Tensor) -> Grid:
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def _placed(self, grid: Grid) -> Tensor:
        """The position embedding [1, h·w, D] of a grid."""
        return interpolate_pos_embed(self.pos_embed, grid)

    def _rope(self, device: torch.device, grid: Grid | None = None) -> Angles:
        """No buffers: the angles stay fp32 whatever the model is cast to, and weights of any grid fit."""
        key = device, grid or (self.grid, self.grid)
        if key not in self._angles:
            head = self.config["hidden_size"] // self.config["num_heads"]
            base = self.config["rope_grid"] or self.grid
            self._angles[key] = axial_angles(key[1], head, device, base=base)
        return self._angles[key]

    def _unpatchify(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Patches [B, N, p·p·C], channels fastest, to images [B, C, H, W]; here the unused sigma half is dropped."""
        channels = self.out_channels if self.returns_sigma else self.in_channels
        (rows, columns), patch = grid, self.patch_size
        patches = tokens.view(-1, rows, columns, patch, patch, self.out_channels)[..., :channels]
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * patch, columns * patch)

    def _check_shape(self, x: Tensor) -> None:
        patch = self.patch_size
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % patch or x.shape[3] % patch:
            raise SitfastError(
                f"x has shape {tuple(x.shape)}, the model takes (B, {self.in_channels}, H, W) with sides divisible by "
                f"{patch}; resize the input, or build the model with the matching in_channels and patch_size"
            )

    def _check_inputs(self, x: Tensor, t: Tensor, y: Condition) -> None:
        self._check_shape(x)
        if isinstance(y, Text) != (self.config["text"] is not None):
            takes = "captions; make them with sitfast.text.build_text" if self.config["text"] else "class labels [B]"
            raise SitfastError(f"y is {type(y).__name__}, and this model takes {takes}")
        for name, tensor in (("t", t),) if isinstance(y, Text) else (("t", t), ("y", y)):
            if tensor.shape != x.shape[:1]:
                raise SitfastError(
                    f"{name} has shape {tuple(tensor.shape)}, expected ({x.shape[0]},): one value for each sample of x"
                )
        if isinstance(y, Text):
            text = self.config["text"]
            states = (x.shape[0], text["length"], *(() if text["depth"] else (text["width"],)))
            if y.tokens.shape != states or y.mask.shape != states[:2]:
                raise SitfastError(
                    f"captions have tokens {tuple(y.tokens.shape)} and mask {tuple(y.mask.shape)}, expected {states} and"
                    f" {states[:2]}; text.encoder and text.length must be those of the model"
                )
        elif y.dtype not in (torch.int64, torch.int32):
            raise SitfastError(f"y is {y.dtype}, expected class indices as torch.int64; use y.long()")


class DiT(SiT):
    """The same network; `forward` returns every output channel, with learn_sigma [B, 2·C, H, W]."""

    returns_sigma = True


def _check_config(config: dict[str, Any]) -> None:
    if config["qk_norm"] not in HeadNorm.EPS:
        raise SitfastError(f"qk_norm={config['qk_norm']!r} is unknown; choose one of {', '.join(HeadNorm.EPS)}")
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
        if config[name] < 1:
            raise SitfastError(f"{name}={config[name]} is not positive; use 1 or more")
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise SitfastError(f"class_dropout_prob={config['class_dropout_prob']} is not a probability; use 0 to 1")
    width, heads = config["hidden_size"], config["num_heads"]
    if int(width * config["mlp_ratio"]) < 1:
        raise SitfastError(f"mlp_ratio={config['mlp_ratio']} leaves the MLP no hidden units; use 4.0")
    if width % 4:
        near = max(width // 4 * 4, 4)
        raise SitfastError(f"hidden_size={width} is not divisible by 4 (position embedding); try {near} or {near + 4}")
    if width % heads:
        raise SitfastError(f"hidden_size={width} is not divisible by num_heads={heads}; change one of them")
    if config["rope"] and width // heads % 4:
        raise SitfastError(f"rope=true needs heads of a width divisible by 4, not {width // heads}; change num_heads")
    if config["rope_grid"] is not None and config["rope_grid"] < 1:
        raise SitfastError(f"rope_grid={config['rope_grid']} is not positive; use the grid that the weights learned on")


def sincos_pos_embed(hidden_size: int, grid: int) -> Tensor:
    """Fixed position embedding [1, grid², D], row-major: half of D for the column, half for the row; sin, then cos.

    Evaluated in fp64 on the CPU and rounded once to fp32, so that it is the same everywhere.
    """
    quarter = hidden_size // 4
    omega = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * omega
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
    columns, rows = waves.expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)
    return torch.cat((columns, rows), dim=-1).reshape(1, grid * grid, hidden_size).float()


def interpolate_pos_embed(embed: Tensor, new_grid: int | Grid) -> Tensor:
    """A position embedding [1, N, D] on a square grid, resampled to [1, new_grid², D], or to h × w: bicubic, in fp32.

    Token i of n stands where (i + ½) · g / n − ½ of the old row of g stands, on each axis by itself.
    """
    tokens = embed.shape[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise SitfastError(
            f"pos_embed has {tokens} tokens, which is not a square grid; only square grids can be resized"
        )
    size = (new_grid, new_grid) if isinstance(new_grid, int) else new_grid
    if min(size) < 1:
        raise SitfastError(f"new_grid={new_grid} is not positive; use input_size // patch_size")
    if size == (grid, grid):
        return embed
    image = embed.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).contiguous().to(embed.dtype)


def build_model(preset: str | None = None, *, genes: bool = False, **kwargs: Any) -> SiT:
    """A preset ("DiT-…" gives a `DiT`), or a SiT from keywords alone; keywords other than None override the preset.

    With `genes`, a `GeneSiT` of these sizes, whose input_size is the number of genes.
    """
    kind = DiT if preset is not None and preset.startswith("DiT-") else SiT
    if genes:
        from sitfast.gene_model import GeneSiT as kind
    sizes = {} if preset is None else preset_kwargs(preset)
    return kind(**{**sizes, **{key: value for key, value in kwargs.items() if value is not None}})


def load_state(model: nn.Module, weights: dict[str, Tensor], *, source: str) -> None:
    """Copy `weights`, whole, into the model (of a sharded one, into what this rank holds), strictly.

    `source` names the file in the error.
    """
    own = model.state_dict()
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", [key for key in own if key not in weights]),
            ("unexpected", [key for key in weights if key not in own]),
        )
        if keys
    ]
    if problems:
        raise SitfastError(f"{source} does not fit the model, keys: {'; '.join(problems)}; check the model settings")
    for key, tensor in own.items():
        if weights[key].shape != tensor.shape:
            raise SitfastError(
                f"{source} does not fit the model: {key} has shape {tuple(weights[key].shape)}, "
                f"the model needs {tuple(tensor.shape)}; check the model settings"
            )
    mine = {key: like(tensor, rows_of(weights[key], tensor)) for key, tensor in own.items()}
    model.load_state_dict(mine, strict=True)


def count_parameters(model: nn.Module) -> int:
    """All parameters, the fixed position embedding included, as published counts have it."""
    return sum(parameter.numel() for parameter in model.parameters())


def forward_macs(model: SiT, tokens: int | None = None) -> int:
    """Multiply-accumulates of one forward pass an image of so many tokens (None: of input_size); a training step costs 6
    FLOPs for each."""
    width, depth = model.config["hidden_size"], model.config["depth"]
    tokens = model.num_tokens if tokens is None else tokens
    mlp_size = int(width * model.config["mlp_ratio"])
    condition = FREQUENCY_DIM * width + width**2 + depth * 6 * width**2 + 2 * width**2
    linears = tokens * (3 * width**2 + width**2 + 2 * width * mlp_size)  # qkv, proj, fc1 and fc2
    attention_scores = 2 * tokens**2 * width
    patch = model.final_layer.linear.out_features // model.out_channels  # values of a channel in a token
    ends = tokens * width * patch * (model.in_channels + model.out_channels)
    return condition + depth * (linears + attention_scores) + ends + _caption_macs(model, tokens)


def _caption_macs(model: SiT, tokens: int) -> int:
    """Those of the captions: their embedders, the byte encoder where there is one, and every cross-attention."""
    if (text := model.config["text"]) is None:
        return 0
    width, depth, length = model.config["hidden_size"], model.config["depth"], text["length"]
    cross = 2 * (tokens + length) * width**2 + 2 * tokens * length * width  # q and proj, kv; scores and sums
    reading = text["depth"] * length * (12 * text["width"] ** 2 + 2 * length * text["width"])
    if text["depth"]:
        reading += length * model.text_encoder.conv.weight.numel()
    ends = (length * text["width"] + text["pooled"] + width) * width
    return reading + ends + depth * cross
