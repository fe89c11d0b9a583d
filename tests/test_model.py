import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitfast import philox
from sitfast.errors import SitfastError
from sitfast.kernels.interpolate import drop_labels
from sitfast.layers import timestep_sinusoids
from sitfast.model import (
    DiT,
    SiT,
    build_model,
    count_parameters,
    forward_macs,
    interpolate_pos_embed,
    load_state,
)
from sitfast.presets import PRESETS, preset_kwargs
from tests.kernels.harness import use_kernels

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}


def randomized(kind: type[SiT] = SiT, **changes) -> SiT:
    """A small model in which no parameter is zero, so that every path counts."""
    generator = torch.Generator().manual_seed(1)
    model = kind(**{**SMALL, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(batch: int = 3, channels: int = 4, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randint(0, 11, (batch,), generator=generator)


# An independent forward pass: plain fp64 algebra on a dictionary of weights, one sample at a time.


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def published_forward(
    weights: dict[str, Tensor],
    x: Tensor,
    t: float,
    label: int,
    *,
    heads: int,
    patch: int,
    caption: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One image [C, H, W] to all output channels; in place of the label, states [n, C] and pooled vector [P] of a caption."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    grid, width = x.shape[-1] // patch, weights["pos_embed"].shape[-1]
    kernel, bias = weights["x_embedder.proj.weight"].reshape(width, -1), weights["x_embedder.proj.bias"]
    cells = [(row * patch, column * patch) for row in range(grid) for column in range(grid)]
    patches = [x[:, i : i + patch, j : j + patch].reshape(-1) for i, j in cells]
    tokens = torch.stack([kernel @ cell + bias for cell in patches]) + weights["pos_embed"][0]

    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    if caption is None:
        c = silu(c + weights["y_embedder.embedding_table.weight"][label])
    else:
        c = silu(c + linear("y_embedder.mlp.2", silu(linear("y_embedder.mlp.0", caption[1]))))
        words = linear("context_embedder", caption[0])

    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    for name in (f"blocks.{i}" for i in range(depth)):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", c).split(width)
        qkv = linear(f"{name}.attn.qkv", layer_norm(tokens) * (1 + scale1) + shift1)
        q, k, v = (part.reshape(-1, heads, width // heads).transpose(0, 1) for part in qkv.split(width, dim=-1))
        scores = (q @ k.transpose(1, 2) / math.sqrt(width // heads)).softmax(-1)
        tokens = tokens + gate1 * linear(f"{name}.attn.proj", (scores @ v).transpose(0, 1).reshape(-1, width))
        if caption is not None:
            parts = (
                linear(f"{name}.cross_attn.q", layer_norm(tokens)),
                *linear(f"{name}.cross_attn.kv", words).chunk(2, -1),
            )
            q, k, v = (part.reshape(-1, heads, width // heads).transpose(0, 1) for part in parts)
            scores = (q @ k.transpose(1, 2) / math.sqrt(width // heads)).softmax(-1)
            read = linear(f"{name}.cross_attn.proj", (scores @ v).transpose(0, 1).reshape(-1, width))
            tokens = tokens + weights[f"{name}.cross_attn.gate"] * read
        hidden = linear(f"{name}.mlp.fc1", layer_norm(tokens) * (1 + scale2) + shift2)
        tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", gelu(hidden))

    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(width)
    flat = linear("final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
    image = torch.stack([cell.reshape(patch, patch, -1).permute(2, 0, 1) for cell in flat])
    rows = [torch.cat(list(image[row * grid : (row + 1) * grid]), dim=-1) for row in range(grid)]
    return torch.cat(rows, dim=-2)


CASES = [
    (SiT, {}),
    (DiT, {}),
    (SiT, {"learn_sigma": False, "class_dropout_prob": 0.0, "num_classes": 11}),
    (DiT, {"patch_size": 4, "in_channels": 3, "hidden_size": 72, "num_heads": 1, "depth": 1, "mlp_ratio": 2.5}),
]


@pytest.mark.parametrize("kind, changes", CASES)
def test_output_and_gradients_match_the_published_formulas(kind, changes):
    model = randomized(kind, **changes)
    x, t, y = inputs(channels=model.in_channels)
    out = model(x, t, y)

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = {key: value.detach().double().requires_grad_(key in names) for key, value in model.state_dict().items()}
    sizes = {"heads": model.config["num_heads"], "patch": model.patch_size}
    samples = [
        published_forward(weights, *row, **sizes) for row in zip(x.double(), t.tolist(), y.tolist(), strict=True)
    ]
    expected = torch.stack(samples)
    if kind is SiT:
        expected = expected[:, : model.in_channels]
    assert out.shape == expected.shape == (3, model.out_channels if kind is DiT else model.in_channels, 8, 8)
    assert (out - expected).abs().max() < 1e-5  # outputs of order 1; a chain of some 50 fp32 operations

    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad((out * cotangent).sum(), [dict(model.named_parameters())[name] for name in names])
    wide_loss = (expected * cotangent.double()).sum()
    wide = torch.autograd.grad(wide_loss, [weights[name] for name in names])
    largest = max(grad.abs().max() for grad in wide)
    for name, grad, reference in zip(names, grads, wide, strict=True):
        assert (grad - reference).abs().max() < 1e-5 * largest, name
        dead = kind is SiT and model.out_channels > model.in_channels and name.startswith("final_layer.linear")
        assert (grad != 0).any() or dead, name


def test_state_dict_keys_and_order():
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"]
    layers += [f"blocks.{i}.{layer}" for i in range(2) for layer in block]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    keys = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    keys.remove("y_embedder.embedding_table.bias")
    model = SiT(**SMALL)
    assert list(model.state_dict()) == ["pos_embed", *keys]
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["pos_embed"]
    assert model.y_embedder.embedding_table.weight.shape == (11, 48)
    assert SiT(**SMALL, class_dropout_prob=0.0).y_embedder.embedding_table.weight.shape == (10, 48)


PUBLISHED = [
    ("SiT-S/2", 32_963_360, 6.06),
    ("SiT-B/2", 130_512_416, 23.01),
    ("SiT-L/2", 458_102_816, 80.70),
    ("SiT-XL/2", 675_129_632, 118.62),
    ("DiT-XL/2", 675_129_632, 118.62),
    ("SiT-XL/4", 675_074_432, None),
    ("DiT-XL/8", 675_683_072, None),
]


@pytest.mark.parametrize("name, parameters, gmac", PUBLISHED)
def test_parameter_and_mac_counts(name, parameters, gmac):
    with torch.device("meta"):
        model = build_model(name)
    assert type(model) is (DiT if name.startswith("DiT") else SiT)
    assert count_parameters(model) == parameters
    assert len(model.state_dict()) == 12 + 10 * model.config["depth"]
    if gmac is not None:
        assert round(forward_macs(model) / 1e9, 2) == gmac


def test_xl_at_512_pixels_and_its_tensor_count():
    with torch.device("meta"):
        model = build_model("SiT-XL/2", input_size=64)
        out = model(torch.zeros(2, 4, 64, 64), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert len(model.state_dict()) == 292
    assert round(forward_macs(model) / 1e9, 1) == 524.5
    assert out.shape == (2, 4, 64, 64)


def test_presets():
    sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    assert len(PRESETS) == 32
    for size, (hidden_size, depth, num_heads) in sizes.items():
        for patch_size in (2, 4, 8, 16):
            expected = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}
            assert preset_kwargs(f"SiT-{size}/{patch_size}") == preset_kwargs(f"DiT-{size}/{patch_size}") == expected
    with pytest.raises(SitfastError, match=r"model.preset='SiT-M/2' is unknown; choose one of SiT-S/2, .*DiT-XL/16$"):
        preset_kwargs("SiT-M/2")


def test_build_model_overrides_the_preset_except_with_none():
    model = build_model("DiT-S/2", depth=1, hidden_size=None, num_heads=4, input_size=8)
    assert type(model) is DiT
    assert [model.config[name] for name in ("depth", "hidden_size", "num_heads", "input_size")] == [1, 384, 4, 8]
    assert type(build_model(**SMALL)) is SiT


def test_initialization():
    torch.manual_seed(0)
    model = SiT(**{**SMALL, "hidden_size": 192, "num_classes": 100})
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert value.abs().max() == 0, name
        elif "embedding_table" in name or name.startswith("t_embedder"):
            assert abs(value.std() / 0.02 - 1) < 0.03, name
        elif name != "pos_embed":  # uniform in ±√(6 / (fan_in + fan_out)), the patch kernel flattened to a matrix
            bound = math.sqrt(6 / sum(value.flatten(1).shape))
            assert 0.98 * bound < value.abs().max() <= bound, name
            assert abs(value.std() * math.sqrt(3) / bound - 1) < 0.05, name
    assert model(*inputs()).abs().max() == 0


def test_position_embedding_has_columns_first_and_sine_before_cosine():
    embed = SiT(**SMALL).pos_embed
    assert embed.dtype == torch.float32
    for row in range(4):
        for column in range(4):
            waves = [f(p * 10000 ** (-i / 12)) for p in (column, row) for f in (math.sin, math.cos) for i in range(12)]
            assert (embed[0, row * 4 + column] - torch.tensor(waves)).abs().max() < 1e-6


def test_position_embedding_interpolation():
    embed = torch.randn(1, 16, 6)
    assert torch.equal(interpolate_pos_embed(embed, 4), embed)
    for new_grid in (2, 6, 7):
        weights = torch.zeros(new_grid, 4, dtype=torch.float64)  # cubic convolution, a = -3/4, borders repeated
        for i in range(new_grid):
            centre = (i + 0.5) * 4 / new_grid - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                s, a = abs(centre - j), -0.75
                near = (a + 2) * s**3 - (a + 3) * s**2 + 1
                weights[i, min(max(j, 0), 3)] += near if s <= 1 else a * (s**3 - 5 * s**2 + 8 * s - 4)
        expected = torch.einsum("ij,kl,jld->ikd", weights, weights, embed.double().view(4, 4, 6)).flatten(0, 1)
        resized = interpolate_pos_embed(embed, new_grid)
        assert resized.shape == (1, new_grid**2, 6)
        assert (resized[0] - expected).abs().max() < 1e-5
    with pytest.raises(SitfastError, match="15 tokens, which is not a square"):
        interpolate_pos_embed(embed[:, :15], 8)


def test_interpolated_weights_run_at_another_resolution():
    weights = dict(randomized().state_dict())
    larger = SiT(**{**SMALL, "input_size": 12})
    weights["pos_embed"] = interpolate_pos_embed(weights["pos_embed"], larger.grid)
    load_state(larger, weights, source="weights")
    assert larger(*inputs(size=12)).shape == (3, 4, 12, 12)


def test_unused_sigma_rows_get_no_gradient():
    dead = [row for start in (4, 12, 20, 28) for row in range(start, start + 4)]
    for kind in (SiT, DiT):
        model = randomized(kind)
        model(*inputs()).square().sum().backward()
        grad = model.final_layer.linear.weight.grad
        assert grad is not None
        silent = (grad == 0).all(dim=1).nonzero().flatten().tolist()
        assert silent == (dead if kind is SiT else [])


def added(x: Tensor, pending: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    y, gate, bias = pending
    return x + gate[:, None] * (y + bias)


def test_blocks_hand_their_last_branch_on():
    block = randomized().blocks[0]
    x, c_silu = torch.randn(2, 16, 48), torch.randn(2, 48)
    x1, pending = block(x, None, c_silu)
    assert [value.shape for value in (x1, *pending)] == [x.shape, x.shape, (2, 48), (48,)]
    assert pending[2].data_ptr() != block.mlp.fc2.bias.data_ptr()
    later, sooner = block(x1, pending, c_silu), block(added(x1, pending), None, c_silu)
    assert torch.allclose(later[0], sooner[0], atol=1e-5)
    assert torch.allclose(added(*later), added(*sooner), atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_block_compiles_as_one_graph(backend):
    block = randomized().blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x, c_silu, pending = torch.randn(2, 16, 48), torch.randn(2, 48), None
    for _ in range(2):  # without, then with a pending branch
        expected, got = block(x, pending, c_silu), compiled(x, pending, c_silu)
        for left, right in zip((expected[0], *expected[1]), (got[0], *got[1]), strict=True):
            assert torch.allclose(left, right, atol=1e-6)
        x, pending = got
    added(x, pending).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16 autocast", "fp16 weights"])
def test_kernels_and_references_agree_in_the_model(precision, compiled, monkeypatch):
    """The Triton kernels, interpreted where there is no GPU, behind the same model: output and every gradient."""
    model = randomized()
    x, t, y = inputs()
    if precision == "fp16 weights":
        model, x = model.half(), x.half()

    def run() -> list[Tensor]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16 autocast"):
            out = model(x, t, y)
        return [out.detach(), *torch.autograd.grad(out.float().square().mean() * 64, parameters)]

    expected = run()
    use_kernels(monkeypatch)
    if compiled:
        torch.compiler.reset()
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    # 64 roundings of the largest value of each, of fp16 or of fp32 with its longer sums
    rounding = 64 * (2.0**-11 if precision != "fp32" else 2.0**-20)
    for got, wanted in zip(run(), expected, strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).abs().max() <= rounding * wanted.abs().max().clamp_min(1e-3)


def test_autocast_keeps_an_fp32_residual_stream():
    model = randomized()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append([v.dtype for v in (out[0], *out[1])]))
    exact = model(*inputs())
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs())
    assert seen == [[torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]] * 2
    assert out.dtype == torch.bfloat16
    # a dozen roundings to bf16 (2^-8 each) between input and output, adding up like a random walk
    assert (out - exact).abs().max() < 4 * 2.0**-8 * exact.abs().max()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_timestep_sinusoids_stay_fp32():
    t = torch.tensor([0.5, 0.5001])  # the same number in bf16
    with torch.autocast("cpu", torch.bfloat16):
        waves = timestep_sinusoids(t)
    assert waves.dtype == torch.float32 and waves.shape == (2, 256)
    assert waves[0, 0] == pytest.approx(math.cos(0.5), abs=1e-7)
    assert waves[1, 128] == pytest.approx(math.sin(0.5001), abs=1e-7)
    assert waves[1, 129] == pytest.approx(math.sin(0.5001 * 10000 ** (-1 / 128)), abs=1e-7)


def test_bf16_weights():
    x, t, y = inputs()
    out = randomized().bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize(
    "position, value, message",
    [
        (
            0,
            torch.zeros(3, 4, 8, 7),
            r"x has shape \(3, 4, 8, 7\), the model takes \(B, 4, H, W\) with sides divisible by 2",
        ),
        (0, torch.zeros(3, 3, 8, 8), r"x has shape \(3, 3, 8, 8\)"),
        (0, torch.zeros(4, 8, 8), r"x has shape \(4, 8, 8\)"),
        (1, torch.tensor(0.5), r"t has shape \(\), expected \(3,\)"),
        (2, torch.zeros(3, 1, dtype=torch.int64), r"y has shape \(3, 1\), expected \(3,\)"),
        (2, torch.zeros(3), "y is torch.float32, expected class indices"),
    ],
)
def test_bad_inputs_are_named(position, value, message):
    arguments = list(inputs())
    arguments[position] = value
    with pytest.raises(SitfastError, match=message):
        SiT(**SMALL)(*arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": 9}, "input_size=9 is not divisible by patch_size=2; try 8 or 10"),
        ({"hidden_size": 50}, "hidden_size=50 is not divisible by 4 .*; try 48 or 52"),
        ({"num_heads": 5}, "hidden_size=48 is not divisible by num_heads=5"),
        ({"depth": 0}, "depth=0 is not positive"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob=1.5 is not a probability"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 leaves the MLP no hidden units"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(SitfastError, match=message):
        SiT(**{**SMALL, **changes})


def test_load_state_copies_and_names_what_does_not_fit():
    source, target = randomized(), SiT(**SMALL)
    load_state(target, source.state_dict(), source="a.safetensors")
    assert torch.equal(target(*inputs()), source(*inputs()))

    broken = {key: value for key, value in source.state_dict().items() if not key.startswith("t_embedder")}
    broken["extra"] = torch.zeros(1)
    first = r"t_embedder.mlp.0.weight, t_embedder.mlp.0.bias, t_embedder.mlp.2.weight"
    with pytest.raises(SitfastError, match=rf"a.safetensors .*4 missing \({first}, …\); 1 unexpected \(extra\)"):
        load_state(target, broken, source="a.safetensors")

    wider = SiT(**{**SMALL, "input_size": 16}).state_dict()
    with pytest.raises(
        SitfastError, match=r"b.pt .*pos_embed has shape \(1, 64, 48\), the model needs \(1, 16, 48\)"
    ) as info:
        load_state(target, wider, source="b.pt")
    assert "\n" not in str(info.value)


def test_label_drop_share_and_independence_of_the_batch():
    index, y = torch.arange(20_000), torch.arange(20_000) % 1000
    dropped = drop_labels(y, index, prob=0.1, null=1000, seed=7)
    chosen = dropped == 1000
    assert abs(chosen.sum().item() - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)
    assert torch.equal(dropped[~chosen], y[~chosen])
    assert torch.equal(chosen, philox.uniform(7, index, philox.Stream.LABEL_DROP) < 0.1)

    pieces = [drop_labels(y[i], index[i], prob=0.1, null=1000, seed=7) for i in index.split(777)]
    assert torch.equal(torch.cat(pieces), dropped)
    assert not torch.equal(drop_labels(y, index, prob=0.1, null=1000, seed=8), dropped)
    assert torch.equal(drop_labels(y, index, prob=0.0, null=1000, seed=7), y)
    assert (drop_labels(y, index, prob=1.0, null=1000, seed=7) == 1000).all()


@pytest.mark.parametrize("qk_norm", ["rms", "layer"])
def test_normalized_and_rotated_heads(qk_norm):
    """Keys as timm and LightningDiT have them; the whole model against its formula, module by module."""
    model = SiT(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=3, qk_norm=qk_norm, rope=True).double()
    keys = [key.removeprefix("blocks.0.attn.") for key in model.state_dict() if ".attn." in key]
    norms = [f"{name}.{key}" for name in ("q_norm", "k_norm") for key in ("weight", "bias")[: 1 + (qk_norm == "layer")]]
    assert keys == ["qkv.weight", "qkv.bias", *norms, "proj.weight", "proj.bias"]
    attn = model.blocks[0].attn
    assert torch.equal(attn.q_norm.weight, torch.ones(8, dtype=torch.float64))
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    h = torch.randn(2, 16, 32, dtype=torch.float64)

    q, k, v = attn.qkv(h).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
    if qk_norm == "rms":
        q, k = F.rms_norm(q, (8,), attn.q_norm.weight, 1e-6), F.rms_norm(k, (8,), attn.k_norm.weight, 1e-6)
    else:
        q, k = (F.layer_norm(x, (8,), norm.weight, norm.bias) for x, norm in ((q, attn.q_norm), (k, attn.k_norm)))
    turns = torch.tensor([1.0, 0.01], dtype=torch.float64)  # 10000^(−2i/4), i = 0, 1
    at = torch.arange(4, dtype=torch.float64)[:, None] * turns
    angles = torch.cat((at.repeat_interleave(4, 0), at.repeat(4, 1)), 1)  # rows, then columns
    q, k = (torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) for x in (q, k))
    q, k = (torch.view_as_real(x * torch.polar(torch.ones_like(angles), angles)).flatten(-2) for x in (q, k))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = F.linear(out, attn.proj.weight)
    got = attn(h, model._rope(h.device))
    assert torch.allclose(got, expected, atol=1e-6)  # the angles are rounded to fp32
    leaves = list(attn.parameters())[:-1]
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    x, t, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.rand(2), torch.tensor([0, 2])
    assert model(x, t, y).shape == x.shape


def test_settings_of_heads_are_checked():
    with pytest.raises(SitfastError, match="qk_norm='batch' is unknown; choose one of none, rms, layer"):
        SiT(input_size=8, hidden_size=32, depth=1, num_heads=4, qk_norm="batch")
    with pytest.raises(SitfastError, match="rope=true needs heads of a width divisible by 4, not 2"):
        SiT(input_size=8, hidden_size=32, depth=1, num_heads=16, rope=True)


def test_images_of_any_sides_that_the_patch_divides():
    """Each sample of another size is what a model built for that size, with interpolated places, answers."""
    model = randomized()
    t, y = torch.rand(2), torch.tensor([0, 2])
    for height, width in ((8, 12), (12, 8), (4, 6), (16, 16)):
        x = torch.randn(2, 4, height, width)
        out = model(x, t, y)
        assert out.shape == x.shape
        tokens = height // 2 * (width // 2)
        places = interpolate_pos_embed(model.pos_embed, (height // 2, width // 2))
        assert places.shape == (1, tokens, 48)
    square = SiT(**{**SMALL, "input_size": 16})
    square.load_state_dict(dict(model.state_dict()) | {"pos_embed": interpolate_pos_embed(model.pos_embed, 8)})
    x = torch.randn(2, 4, 16, 16)
    assert torch.equal(square(x, t, y), model(x, t, y))


def test_places_of_a_rectangle_are_interpolated_along_each_axis():
    """The embedding of a product of two lines is the product of the two lines interpolated."""
    rows, columns = torch.randn(4), torch.randn(4)
    embed = (rows[:, None] * columns).reshape(1, 16, 1)
    line = {n: interpolate_pos_embed(embed_of(rows), (n, 4)).view(n, 4)[:, 0] for n in (3, 6)}
    other = {
        n: interpolate_pos_embed(embed_of(columns).view(4, 4).T.reshape(1, 16, 1), (4, n)).view(4, n)[0] for n in (3, 6)
    }
    for h in (3, 6):
        for w in (3, 6):
            torch.testing.assert_close(
                interpolate_pos_embed(embed, (h, w)).view(h, w), line[h][:, None] * other[w], rtol=1e-5, atol=1e-6
            )


def embed_of(line):
    return line[:, None].expand(4, 4).reshape(1, 16, 1)


def test_rotary_angles_at_another_scale():
    """A token of a larger image stands between those of the grid that was learned on; of that grid, on them."""
    model = SiT(input_size=16, hidden_size=32, depth=1, num_heads=4, num_classes=3, rope=True, rope_grid=4)
    cos, sin = model._rope(torch.device("cpu"), (8, 2))
    at = torch.tensor([(i + 0.5) * 4 / 8 - 0.5 for i in range(8)], dtype=torch.float64)
    across = torch.tensor([0.5, 2.5], dtype=torch.float64)
    turns = torch.tensor([1.0, 0.01], dtype=torch.float64)
    angles = torch.cat((at.repeat_interleave(2)[:, None] * turns, across.repeat(8)[:, None] * turns), 1)
    torch.testing.assert_close(cos, angles.cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, angles.sin().float(), rtol=0, atol=1e-7)
    learned = SiT(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=3, rope=True)
    for own, other in zip(learned._rope(torch.device("cpu")), model._rope(torch.device("cpu"), (4, 4)), strict=True):
        assert torch.equal(own, other)
    with pytest.raises(SitfastError, match="rope_grid=0 is not positive"):
        SiT(input_size=8, hidden_size=32, depth=1, num_heads=4, rope=True, rope_grid=0)
