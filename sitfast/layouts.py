"""How other code stores the same network, and what turns its weights into ours.

    family        keys                                               t of the network
    sit           ours                                               1 is data
    lightningdit  ours, and buffers feat_rope.*                      1 is data
    repa          ours, and projectors.* (left out)                  1 is noise
    dit           ours                                               steps 0 to 999: refused
    diffusers     its own: q, k, v apart, an embedding in each block  as it was trained

Two differences stand in no key. Both act on the sinusoids φ(t) = [cos(t ω), sin(t ω)] [256] of the timestep embedding,
which only t_embedder.mlp.0.weight W [D, 256] reads, so both are folded into W, in fp64, and W is rounded once.

Direction. A network u trained with t = 1 as noise is our v(x, t) = −u(x, 1 − t). The sign goes into the rows of
final_layer.linear that make the velocity (noise and score have no direction, so no sign). For the time,

    cos((1 − t) ω) = cos ω cos(t ω) + sin ω sin(t ω)
    sin((1 − t) ω) = sin ω cos(t ω) − cos ω sin(t ω)

so φ(1 − t) = R φ(t) with a reflection R = Rᵀ = R⁻¹, and W R does on φ(t) what W did on φ(1 − t).

Frequencies. Ours, and those of SiT, DiT and their kin, are 10000^(−i/128); diffusers' DiT has 10000^(−i/127). A linear
map between the two does not exist for every t, but on [0, 1] no sinusoid turns by more than one radian: cos(t ω) and
sin(t ω) are interpolated in ω from the six nearest frequencies of the other set, Φ(t) = M φ(t) within 2e-11, which is
below the rounding of W. For steps up to 999 neighbours are 70 radians apart and nothing of the kind holds: that, and a
schedule of a thousand steps that is none of our paths, is why DiT's own weights are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sitfast.errors import SitfastError
from sitfast.kernels.qk_norm_rope import axial_angles
from sitfast.layers import FREQUENCY_DIM, MAX_PERIOD
from sitfast.model import SiT, sincos_pos_embed
from sitfast.presets import PRESETS

Time = Literal["data", "noise"]  # what t = 1 is

_HALF = FREQUENCY_DIM // 2
_NODES = 6  # of the interpolation in ω
_SINUSOIDS, _HEAD = "t_embedder.mlp.0.weight", "final_layer.linear"
_LEFT_OUT = re.compile(r"projectors\.|feat_rope\.")
_HEADS = {sizes["hidden_size"]: sizes["num_heads"] for sizes in PRESETS.values()} | {1536: 24, 1792: 28}
_PARTS = (  # keys that say what a network has and ours has not
    (r"blocks\.\d+\.norm\d\.|final_layer\.norm_final\.", "norms with weights (RMSNorm or affine)"),
    (r"blocks\.\d+\.mlp\.w\d+\.", "a SwiGLU feed-forward"),
    (r"decoder_blocks\.", "REPA's first layout; number them on as blocks.*, after the encoder's"),
    (r"t_block\.|.*cross_attn\.|.*scale_shift_table", "adaLN-single or cross-attention"),
)


@dataclass(frozen=True)
class Network:
    """Weights under our names and what they are of."""

    kwargs: dict[str, Any]  # of `SiT`
    weights: dict[str, Tensor]  # fp32
    time: Time = "data"
    prediction: str = "velocity"


# -- what is folded into weights ---------------------------------------------------------------------------------------


def frequencies(family: Literal["ours", "diffusers"] = "ours") -> Tensor:
    """ω [128] in fp64, as the fp32 that the network computes with."""
    steps = torch.arange(_HALF, dtype=torch.float32)
    return torch.exp(-math.log(MAX_PERIOD) * steps / (_HALF - (family == "diffusers"))).double()


def reflection() -> Tensor:
    """R [256, 256] in fp64 with φ(1 − t) = R φ(t)."""
    omega = frequencies()
    cos, sin = omega.cos().diag(), omega.sin().diag()
    return torch.cat((torch.cat((cos, sin), dim=1), torch.cat((sin, -cos), dim=1)))


def resampling(to: Tensor, of: Tensor) -> Tensor:
    """M [256, 256] in fp64 with φ_to(t) = M φ_of(t) for t in [0, 1], between falling frequencies [128]: Lagrange in ω."""
    first = (torch.searchsorted(of.flip(0), to).neg() + _HALF - _NODES // 2).clamp(0, _HALF - _NODES)
    columns = first[:, None] + torch.arange(_NODES)
    nodes = of[columns]
    others = nodes[:, :, None] - nodes[:, None, :] + torch.eye(_NODES)  # its diagonal, 1, divides nothing
    ratios = (to[:, None, None] - nodes[:, None, :]) / others
    ratios = ratios.masked_fill(torch.eye(_NODES, dtype=torch.bool), 1.0)
    block = torch.zeros(_HALF, _HALF, dtype=torch.float64).scatter(1, columns, ratios.prod(dim=-1))
    return torch.block_diag(block, block)


def fold(weights: dict[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    """The weights with t_embedder.mlp.0.weight times `matrix`, as one rounding of the fp64 product."""
    return weights | {_SINUSOIDS: (weights[_SINUSOIDS].double() @ matrix).float()}


def flip(network: Network) -> Network:
    """The same network of the other direction of time; see the module."""
    weights = fold(network.weights, reflection())
    if network.prediction == "velocity":
        channels = network.kwargs["in_channels"]
        outputs = channels * (2 if network.kwargs["learn_sigma"] else 1)
        for key in (f"{_HEAD}.weight", f"{_HEAD}.bias"):
            rows = torch.arange(len(weights[key])) % outputs < channels  # the sigma half has no direction
            weights[key] = torch.where(rows.view(-1, *(1,) * (weights[key].ndim - 1)), -weights[key], weights[key])
    return replace(network, weights=weights, time="noise" if network.time == "data" else "data")


# -- our names -----------------------------------------------------------------------------------------------------------


def build(kwargs: dict[str, Any], weights: dict[str, Tensor]) -> SiT:
    """A `SiT` that shares the memory of `weights`."""
    with torch.device("meta"):
        model = SiT(**kwargs)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def recognise(
    weights: dict[str, Tensor], *, source: str, heads: int | None = None, num_classes: int | None = None
) -> tuple[Network, list[str]]:
    """The network that official, REPA or LightningDiT weights are of, and the keys that were left out.

    Sizes are read from shapes. The number of heads is not in them where there is neither a query norm nor RoPE, and nor
    is whether the last label is the null class; those follow published models, unless given. A SitfastError names the
    keys of whatever ours has not.
    """
    for prefix in ("module.", "_orig_mod."):  # DDP, torch.compile
        if weights and all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    for pattern, what in _PARTS:
        if keys := [key for key in weights if re.match(pattern, key)]:
            raise SitfastError(f"{source} has {what}: {_some(keys)}; this network has no such part")
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", f"{_HEAD}.weight",
              "blocks.0.mlp.fc1.weight", "blocks.0.adaLN_modulation.1.weight")  # fmt: skip
    if missing := [key for key in needed if key not in weights]:
        raise SitfastError(f"{source} is no SiT: it lacks {_some(missing)} and has {_some(list(weights))}")
    width, channels, patch = weights["x_embedder.proj.weight"].shape[:3]
    vectors, outputs = len(weights["blocks.0.adaLN_modulation.1.weight"]), len(weights[f"{_HEAD}.weight"]) // patch**2
    if vectors != 6 * width:
        raise SitfastError(
            f"{source} has {vectors} rows in blocks.0.adaLN_modulation.1.weight, not 6 · {width}: adaLN without shift, or"
            " another; this network has no such part"
        )
    if outputs not in (channels, 2 * channels):
        raise SitfastError(
            f"{source}: {_HEAD}.weight makes {outputs} channels of {channels}; expected as many or twice"
        )
    tokens, rows = weights["pos_embed"].shape[1], len(weights["y_embedder.embedding_table.weight"])
    grid = math.isqrt(tokens)
    if num_classes is not None and rows - num_classes not in (0, 1):
        raise SitfastError(
            f"--num-classes {num_classes}: the label table of {source} has {rows} rows, so {rows - 1} or {rows}"
        )
    norm = "none"
    if "blocks.0.attn.q_norm.weight" in weights:
        norm = "layer" if "blocks.0.attn.q_norm.bias" in weights else "rms"
    rope = weights.get("feat_rope.freqs_cos")
    if heads is None:
        known = weights.get("blocks.0.attn.q_norm.weight", rope)
        heads = _HEADS.get(width) if known is None else width // known.shape[-1]
    if heads is None:
        raise SitfastError(f"{source} does not say how many heads a width of {width} has; give --heads")
    kwargs: dict[str, Any] = {
        "input_size": grid * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, weights) if m),
        "num_heads": heads,
        "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / width,
        "class_dropout_prob": 0.0 if num_classes == rows else 0.1,
        "num_classes": rows - (num_classes != rows),
        "learn_sigma": outputs == 2 * channels,
        "qk_norm": norm,
        "rope": rope is not None,
    }
    if rope is not None and not _same_rope(weights, kwargs):
        raise SitfastError(f"{source} rotates by other angles than 10000^(−4i/d) a step: feat_rope.freqs_cos; refused")
    kept = {key: tensor.float() for key, tensor in weights.items() if not _LEFT_OUT.match(key)}
    _check_keys(kept, kwargs, source)
    time: Time = "noise" if any(key.startswith("projectors.") for key in weights) else "data"
    return Network(kwargs, kept, time), [key for key in weights if key not in kept]


def official(network: Network) -> dict[str, Tensor]:
    """The weights as the official code, REPA's and LightningDiT's load them."""
    if not network.kwargs["rope"]:
        return dict(network.weights)
    cos, sin = _rope(network.kwargs)
    return network.weights | {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}


def _rope(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """LightningDiT's buffers [N, d]: each angle twice, for the two members of its pair."""
    grid, width = kwargs["input_size"] // kwargs["patch_size"], kwargs["hidden_size"] // kwargs["num_heads"]
    cos, sin = axial_angles(grid, width)
    return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def _same_rope(weights: dict[str, Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether the buffers are ours within what fp32 makes of angles up to the grid (its ulp, 1e-7, times 1,000)."""
    theirs = [weights.get(f"feat_rope.freqs_{name}") for name in ("cos", "sin")]
    return all(
        buffer is not None and buffer.shape == own.shape and float((buffer.float() - own).abs().max()) < 1e-4
        for buffer, own in zip(theirs, _rope(kwargs), strict=True)
    )


def _check_keys(weights: dict[str, Tensor], kwargs: dict[str, Any], source: str) -> None:
    with torch.device("meta"):
        own = {key: tensor.shape for key, tensor in SiT(**kwargs).state_dict().items()}
    wrong = [
        f"{what} {_some(keys)}"
        for what, keys in (
            ("it lacks", [key for key in own if key not in weights]),
            ("it has an unknown", [key for key in weights if key not in own]),
            ("another shape has", [key for key in own if key in weights and weights[key].shape != own[key]]),
        )
        if keys
    ]
    if wrong:
        raise SitfastError(f"{source} is not a plain SiT: {'; '.join(wrong)}; nothing was written")


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


# -- diffusers' names ----------------------------------------------------------------------------------------------------

_OUTSIDE = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", _HEAD: "proj_out_2"}
_INSIDE = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_EMBEDDING = {  # each block has one, all the same
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_REQUIRED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def to_diffusers(network: Network) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keywords and state dict of a `DiTTransformer2DModel`; its t is a float in [0, 1]."""
    kwargs, weights = network.kwargs, network.weights
    width, channels = kwargs["hidden_size"], kwargs["in_channels"]
    for field, wanted in (("qk_norm", "none"), ("rope", False), ("mlp_ratio", 4.0)):
        if kwargs[field] != wanted:
            raise SitfastError(f"model.{field}={kwargs[field]}: diffusers' DiT knows {wanted} alone; use --to official")
    if kwargs["class_dropout_prob"] == 0:
        raise SitfastError(
            "model.class_dropout_prob=0: the label table of diffusers' DiT ends in a null class, this one has none; use"
            " --to official"
        )
    fixed = sincos_pos_embed(width, kwargs["input_size"] // kwargs["patch_size"])
    if not float((fixed - weights["pos_embed"]).abs().max()) < 1e-5:  # fp32 of angles up to 100
        raise SitfastError(
            "pos_embed is not the fixed sinusoid (it was resized or learned), and diffusers' DiT has no other"
        )
    state = {}
    weights = fold(weights, resampling(frequencies(), frequencies("diffusers")))
    for end in ("weight", "bias"):
        state |= {f"{theirs}.{end}": weights[f"{ours}.{end}"] for ours, theirs in _OUTSIDE.items()}
        for i in range(kwargs["depth"]):
            block = f"transformer_blocks.{i}"
            state |= {
                f"{block}.{theirs}.{end}": weights[f"blocks.{i}.{ours}.{end}"] for ours, theirs in _INSIDE.items()
            }
            parts = weights[f"blocks.{i}.attn.qkv.{end}"].chunk(3)
            state |= {f"{block}.{name}.{end}": part for name, part in zip(_QKV, parts, strict=True)}
    for i in range(kwargs["depth"]):
        state |= {f"transformer_blocks.{i}.norm1.emb.{theirs}": weights[ours] for ours, theirs in _EMBEDDING.items()}
    config = {
        "num_attention_heads": kwargs["num_heads"],
        "attention_head_dim": width // kwargs["num_heads"],
        "in_channels": channels,
        "out_channels": channels * (2 if kwargs["learn_sigma"] else 1),
        "num_layers": kwargs["depth"],
        "sample_size": kwargs["input_size"],
        "patch_size": kwargs["patch_size"],
        "num_embeds_ada_norm": kwargs["num_classes"],
        "norm_eps": 1e-6,
        **_REQUIRED,
    }
    return config, state


def from_diffusers(
    config: dict[str, Any], state: dict[str, Tensor], *, source: str, time: Time, prediction: str
) -> Network:
    """The network of a `DiTTransformer2DModel` that takes a float t in [0, 1]."""
    for field, wanted in _REQUIRED.items():
        if config[field] != wanted:
            raise SitfastError(f"{source}: {field}={config[field]!r} in config.json; this network has {wanted!r} alone")
    channels, outputs = config["in_channels"], config["out_channels"] or config["in_channels"]
    if outputs not in (channels, 2 * channels):
        raise SitfastError(f"{source}: out_channels={outputs} of in_channels={channels}; expected as many or twice")
    width, depth = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    for i in range(1, depth):
        for name in _EMBEDDING.values():
            keys = [f"transformer_blocks.{block}.norm1.emb.{name}" for block in (0, i)]
            if not torch.equal(state[keys[0]], state[keys[1]]):
                raise SitfastError(f"{source}: {keys[1]} is not {keys[0]}; here one embedding serves all blocks")
    weights = {"pos_embed": sincos_pos_embed(width, config["sample_size"] // config["patch_size"])}
    weights |= {ours: state[f"transformer_blocks.0.norm1.emb.{theirs}"] for ours, theirs in _EMBEDDING.items()}
    for end in ("weight", "bias"):
        weights |= {f"{ours}.{end}": state[f"{theirs}.{end}"] for ours, theirs in _OUTSIDE.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            weights |= {
                f"blocks.{i}.{ours}.{end}": state[f"{block}.{theirs}.{end}"] for ours, theirs in _INSIDE.items()
            }
            weights[f"blocks.{i}.attn.qkv.{end}"] = torch.cat([state[f"{block}.{name}.{end}"] for name in _QKV])
    weights = {key: tensor.float() for key, tensor in weights.items()}
    kwargs = {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": outputs == 2 * channels,
        "qk_norm": "none",
        "rope": False,
    }
    _check_keys(weights, kwargs, source)
    weights = fold(weights, resampling(frequencies("diffusers"), frequencies()))
    return Network(kwargs, weights, time, prediction)
