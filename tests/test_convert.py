"""Conversions: foreign layouts built here, small; diffusers' own class runs where it is involved."""

import argparse
import json
import math

import pytest
import torch

from sitfast import checkpoint, config, convert, layouts
from sitfast.errors import SitfastError
from sitfast.interpolant import flip_time
from sitfast.model import SiT, sincos_pos_embed
from sitfast.sample import Restored
from tests.conftest import train

WIDTH, DEPTH, HEADS, CLASSES, CHANNELS, PATCH, GRID = 64, 2, 4, 10, 3, 2, 4
T = torch.linspace(0, 1, 201, dtype=torch.float64)


def foreign(*, outputs=CHANNELS, norm="none", scale=0.1) -> dict[str, torch.Tensor]:
    """A state dict in the official layout, written out by hand, random everywhere."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (PATCH * PATCH * outputs, WIDTH),
        "final_layer.linear.bias": (PATCH * PATCH * outputs,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for i in range(DEPTH):
        inner = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH)}
        inner |= {"mlp.fc2": (WIDTH, 4 * WIDTH), "adaLN_modulation.1": (6 * WIDTH, WIDTH)}
        for name, (rows, columns) in inner.items():
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        if norm != "none":
            ends = ("weight", "bias") if norm == "layer" else ("weight",)
            shapes |= {f"blocks.{i}.attn.{x}_norm.{end}": (WIDTH // HEADS,) for x in "qk" for end in ends}
    weights = {"pos_embed": sincos_pos_embed(WIDTH, GRID)}
    return weights | {key: scale * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def rope_buffers() -> dict[str, torch.Tensor]:
    """LightningDiT's, in fp32 as it computes them."""
    half = WIDTH // HEADS // 2
    freqs = 1.0 / (10000 ** (torch.arange(0, half, 2).float() / half))
    turns = (torch.arange(GRID).float()[:, None] * freqs).repeat_interleave(2, dim=-1)
    both = torch.cat((turns[:, None].expand(GRID, GRID, half), turns[None].expand(GRID, GRID, half)), dim=-1).reshape(
        GRID * GRID, 2 * half
    )
    return {"feat_rope.freqs_cos": both.cos(), "feat_rope.freqs_sin": both.sin()}


def inputs():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, CHANNELS, PATCH * GRID, PATCH * GRID, generator=generator)
    return x, torch.tensor([0.0, 0.21, 0.7, 1.0]), torch.tensor([0, 3, 9, 10])


def model(weights, **kwargs) -> SiT:
    """Our network of `weights`, set up by hand."""
    sizes = {"input_size": PATCH * GRID, "patch_size": PATCH, "in_channels": CHANNELS, "hidden_size": WIDTH}
    sizes |= {"depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES, "learn_sigma": False} | kwargs
    net = SiT(**sizes)
    net.load_state_dict(weights)
    return net.eval()


def saved(tmp_path, content, name="x.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def run(*arguments) -> int:
    return convert.main([str(a) for a in arguments])


# -- the mathematics ---------------------------------------------------------------------------------------------------


def sinusoids(t, shift=0):
    """φ(t) in fp64 from the formula, with the fp32 frequencies of a network."""
    omega = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / (128 - shift)).double()
    return torch.cat(((t[:, None] * omega).cos(), (t[:, None] * omega).sin()), dim=1)


def test_the_reflection_turns_time_around_and_is_its_own_inverse():
    r = layouts.reflection()
    assert torch.allclose(sinusoids(1 - T), sinusoids(T) @ r.T, rtol=0, atol=1e-14)
    assert torch.allclose(r @ r, torch.eye(256, dtype=torch.float64), rtol=0, atol=1e-14)


def test_either_set_of_frequencies_is_made_of_the_other():
    ours, theirs = layouts.frequencies(), layouts.frequencies("diffusers")
    assert (sinusoids(T) - sinusoids(T, 1)).abs().max() > 1e-3  # so the map is needed
    for to, of, wanted, given in ((ours, theirs, 0, 1), (theirs, ours, 1, 0)):
        m = layouts.resampling(to, of)
        assert (sinusoids(T, wanted) - sinusoids(T, given) @ m.T).abs().max() < 2e-11
        assert m.abs().max() < 12  # rounding of W grows by no more
        steps = 999 * T  # of DiT, where no such map exists
        assert (sinusoids(steps, wanted) - sinusoids(steps, given) @ m.T).abs().max() > 1


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("sigma", [False, True])
def test_flip_is_flip_time_folded_into_weights(prediction, sigma):
    weights = foreign(outputs=CHANNELS * (1 + sigma))
    network, _ = layouts.recognise(weights, source="x", heads=HEADS)
    flipped = layouts.flip(layouts.replace(network, prediction=prediction))
    x, t, y = inputs()
    with torch.no_grad():
        expected = model(weights, learn_sigma=sigma)(x, 1 - t, y)
        expected = flip_time(t, expected)[1] if prediction == "velocity" else expected
        found = model(flipped.weights, learn_sigma=sigma)(x, t, y)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    changed = {key for key in weights if not torch.equal(weights[key], flipped.weights[key])}
    linear = {"final_layer.linear.weight", "final_layer.linear.bias"} if prediction == "velocity" else set()
    assert changed == {"t_embedder.mlp.0.weight"} | linear
    if sigma:  # rows (p, q, c), c fastest
        rows = flipped.weights["final_layer.linear.bias"].view(PATCH * PATCH, -1)[:, CHANNELS:]
        assert torch.equal(rows, weights["final_layer.linear.bias"].view(PATCH * PATCH, -1)[:, CHANNELS:])
    again = layouts.flip(flipped)
    assert again.time == "data"
    for key, tensor in weights.items():
        ulp = 2.0**-22 * tensor.abs().max() if key == "t_embedder.mlp.0.weight" else 0.0
        assert (again.weights[key] - tensor).abs().max() <= ulp, key


# -- official files ----------------------------------------------------------------------------------------------------


def test_official_files_round_trip_bit_by_bit(tmp_path, capsys):
    weights, other = foreign(outputs=2 * CHANNELS), foreign(outputs=2 * CHANNELS, scale=0.2)
    args = argparse.Namespace(model="SiT-XL/2", num_classes=CLASSES, path_type="GVP", prediction="noise")
    source = saved(tmp_path, {"model": other, "ema": weights, "opt": {}, "args": args})
    run(source, "--heads", HEADS, "--to", "sitfast", "--out", tmp_path / "run", "train.precision=fp32")
    folder = checkpoint.find_checkpoint(tmp_path / "run")
    cfg = config.load(folder / "config.yaml")
    assert (cfg.path.type, cfg.path.prediction, cfg.train.precision) == ("gvp", "noise", "fp32")
    assert cfg.vae.id is None and cfg.data.image_size == PATCH * GRID and cfg.model.learn_sigma
    run(tmp_path / "run", "--to", "official", "--out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == weights.keys() and next(iter(back)) == "pos_embed"
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    run(source, "--heads", HEADS, "--weights", "model", "--to", "sitfast", "--out", tmp_path / "raw.safetensors")
    assert torch.equal(
        checkpoint.find_weights(tmp_path / "raw.safetensors")["blocks.1.mlp.fc1.weight"],
        other["blocks.1.mlp.fc1.weight"],
    )
    assert "averages" in capsys.readouterr().out


def test_a_converted_folder_samples_and_starts_a_run(tmp_path, tiny):
    weights = {f"module.{key}": tensor for key, tensor in foreign().items()}  # as DDP names them
    run(saved(tmp_path, weights), "--heads", HEADS, "--to", "sitfast", "--out", tmp_path / "run", "sample.steps=2")
    x = Restored(str(tmp_path / "run"), ema=True, device="cpu", overrides=[]).generate(
        torch.tensor([1, 10 - 1]), seed=0
    )
    assert x.shape == (2, CHANNELS, PATCH * GRID, PATCH * GRID) and x.isfinite().all()


def test_a_run_of_ours_becomes_official_and_diffusers(tmp_path, tiny):
    train(*tiny, "train.steps=3", "model.hidden_size=32", "model.patch_size=2")
    run(tmp_path / "run", "--to", "official", "--out", tmp_path / "x.pt")
    folder = checkpoint.find_checkpoint(tmp_path / "run")
    ours, theirs = checkpoint.find_weights(folder), torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    raw = checkpoint.find_weights(folder, ema=False)
    assert not torch.equal(raw["x_embedder.proj.weight"], ours["x_embedder.proj.weight"])
    run(tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d")
    assert json.loads((tmp_path / "d" / "sitfast.json").read_text()) == {
        "time": "data", "prediction": "velocity", "path": "linear",
    }  # fmt: skip


def test_repa_is_turned_around_and_loses_its_projectors(tmp_path, capsys):
    weights = foreign()
    extra = {f"projectors.0.{i}.{end}": torch.ones(4) for i in (0, 2, 4) for end in ("weight", "bias")}
    args = argparse.Namespace(num_classes=CLASSES, path_type="cosine", prediction="v", model="SiT-XL/2")
    source = saved(tmp_path, {"ema": weights | extra, "model": {}, "opt": {}, "args": args, "steps": 5})
    run(source, "--heads", HEADS, "--to", "sitfast", "--out", tmp_path / "run")
    folder = checkpoint.find_checkpoint(tmp_path / "run")
    x, t, y = inputs()
    with torch.no_grad():
        expected = -model(weights)(x, 1 - t, y)
        found = model(checkpoint.find_weights(folder))(x, t, y)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert config.load(folder / "config.yaml").path.type == "gvp"
    assert "6 tensors that are no part" in capsys.readouterr().out
    run(tmp_path / "run", "--to", "official", "--out", tmp_path / "back.pt", "--out-time", "noise")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for key, tensor in weights.items():
        ulp = 2.0**-22 * tensor.abs().max() if key == "t_embedder.mlp.0.weight" else 0.0
        assert (back[key] - tensor).abs().max() <= ulp, key


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_lightningdit_with_norms_and_rope(tmp_path, norm):
    weights = foreign(norm=norm) | rope_buffers()
    settings = {"data": {"num_classes": CLASSES}, "transport": {"path_type": "VP", "prediction": "score"}, "model": {}}
    run(saved(tmp_path, {"ema": weights, "config": settings}), "--to", "sitfast", "--out", tmp_path / "run")
    folder = checkpoint.find_checkpoint(tmp_path / "run")
    path = config.load(folder / "config.yaml").path
    assert (path.type, path.prediction) == ("vp", "score")
    state = checkpoint.read_state(folder)["model"]
    assert (state["num_heads"], state["qk_norm"], state["rope"]) == (HEADS, norm, True)  # heads: from the buffers
    run(tmp_path / "run", "--to", "official", "--out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == weights.keys()
    for key, tensor in weights.items():
        assert (back[key] - tensor).abs().max() <= (1e-6 if "rope" in key else 0), key


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def diffusers_model():
    """A DiTTransformer2DModel of diffusers' with random weights, the same embedding in every block."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(3)
    net = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS,
        num_layers=DEPTH, sample_size=PATCH * GRID, patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
        for block in net.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net


def test_diffusers_to_ours_and_back(tmp_path, diffusers_model, capsys):
    diffusers_model.save_pretrained(tmp_path / "d" / "transformer")
    (tmp_path / "d" / "model_index.json").write_text("{}")  # a pipeline's folder
    run(tmp_path / "d", "--time", "noise", "--to", "sitfast", "--out", tmp_path / "run")
    x, t, y = inputs()
    ours = model(checkpoint.find_weights(tmp_path / "run"), learn_sigma=True)
    with torch.no_grad():
        expected = -diffusers_model(x, timestep=1 - t, class_labels=y).sample[:, :CHANNELS]
        found = ours(x, t, y)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

    run(tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "back")
    again = type(diffusers_model).from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert (
            again(x, timestep=t, class_labels=y).sample[:, :CHANNELS] - expected
        ).abs().max() < 1e-5 * expected.abs().max()
    folded, negated = "timestep_embedder.linear_1.weight", "proj_out_2"
    for key, tensor in diffusers_model.state_dict().items():
        if folded not in key and negated not in key:
            assert torch.equal(again.state_dict()[key], tensor), key
    run(tmp_path / "back", "--to", "sitfast", "--out", tmp_path / "third")  # its sitfast.json says what t is
    third = model(checkpoint.find_weights(tmp_path / "third"), learn_sigma=True)
    with torch.no_grad():
        assert (third(x, t, y) - found).abs().max() < 1e-5 * found.abs().max()
    assert "note" not in capsys.readouterr().out


def test_another_eps_is_measured_and_told(tmp_path, diffusers_model, capsys):
    diffusers_model.register_to_config(norm_eps=1e-2)
    for block in diffusers_model.transformer_blocks:
        block.norm3.eps = 1e-2
    diffusers_model.save_pretrained(tmp_path / "d")
    run(tmp_path / "d", "--time", "data", "--to", "official", "--out", tmp_path / "x.pt")
    text = capsys.readouterr().out
    moved = float(text.partition("outputs by ")[2].split()[0])
    assert "norm_eps is 0.01 there" in text and 1e-4 < moved < 0.1


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda m: m.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data.zero_(),
            "one embedding",
        ),
        (lambda m: m.register_to_config(activation_fn="gelu"), "activation_fn='gelu' in config.json"),
        (lambda m: m.register_buffer("mean", torch.ones(2)), "does not hold what its config.json says: mean"),
        (lambda m: m.register_to_config(num_layers=1), "does not hold what its config.json says: transformer_blocks.1"),
        (lambda m: m.register_to_config(patch_size=4), "cannot be loaded by diffusers: .*size mismatch"),
    ],
)
def test_other_diffusers_models_are_refused(tmp_path, diffusers_model, break_it, says):
    break_it(diffusers_model)
    diffusers_model.save_pretrained(tmp_path / "d")
    with pytest.raises(SitfastError, match=says):
        run(tmp_path / "d", "--time", "data", "--to", "official", "--out", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_a_diffusers_folder_must_say_what_its_t_is(tmp_path, diffusers_model):
    diffusers_model.save_pretrained(tmp_path / "d")
    with pytest.raises(SitfastError, match="steps 0 to 999.*--time"):
        run(tmp_path / "d", "--to", "sitfast", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qk_norm": "rms"}, "model.qk_norm=rms"),
        ({"mlp_ratio": 2.0}, "model.mlp_ratio=2.0"),
        ({"class_dropout_prob": 0.0}, "null class"),
        ({"pos_embed": None}, "pos_embed is not the fixed sinusoid"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(changes, says):
    pos = changes.pop("pos_embed", 0) is None
    torch.manual_seed(0)
    net = SiT(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4, **changes)
    weights = net.state_dict()
    if pos:
        weights["pos_embed"] = weights["pos_embed"] * 1.001
    with pytest.raises(SitfastError, match=says):
        layouts.to_diffusers(layouts.Network(net.config, weights))


# -- the check, and what is refused ------------------------------------------------------------------------------------


def swap_qk(weights):
    q, k, v = weights["blocks.0.attn.qkv.weight"].chunk(3)
    return weights | {"blocks.0.attn.qkv.weight": torch.cat((v, k, q))}


@pytest.mark.parametrize(
    "wrong",
    [
        swap_qk,
        lambda w: w | {"final_layer.linear.bias": -w["final_layer.linear.bias"]},
        lambda w: w | {"blocks.1.attn.proj.bias": w["blocks.1.attn.proj.bias"] + 1e-3},
        lambda w: layouts.fold(w, layouts.resampling(layouts.frequencies(), layouts.frequencies("diffusers"))),
        lambda w: w | {"t_embedder.mlp.0.weight": w["t_embedder.mlp.0.weight"] * float("nan")},
    ],
    ids=["qkv order", "sign", "a bias", "frequencies", "NaN"],
)
def test_the_check_sees_what_a_wrong_conversion_does(wrong):
    network, _ = layouts.recognise(foreign(), source="x", heads=HEADS)
    source = convert._ours(network)
    assert convert.compare(source, convert._ours(network), network.kwargs) == 0
    target = convert._ours(layouts.replace(network, weights=wrong(network.weights)))
    with pytest.raises(SitfastError, match="disagrees with the source"):
        convert.compare(source, target, network.kwargs)


def without(key):
    return lambda w: {k: v for k, v in w.items() if k != key}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w | {"blocks.0.norm1.weight": torch.ones(WIDTH)}, "norms with weights.*blocks.0.norm1.weight"),
        (lambda w: w | {"blocks.1.mlp.w12.weight": torch.ones(4, 4)}, "SwiGLU.*blocks.1.mlp.w12.weight"),
        (lambda w: w | {"decoder_blocks.0.mlp.fc1.bias": torch.ones(4)}, "first layout.*decoder_blocks"),
        (lambda w: w | {"blocks.0.adaLN_modulation.1.weight": torch.ones(4 * WIDTH, WIDTH)}, "adaLN without shift"),
        (lambda w: w | {"logvar_linear.weight": torch.ones(1)}, "unknown logvar_linear.weight"),
        (without("blocks.1.attn.qkv.bias"), "lacks blocks.1.attn.qkv.bias"),
        (without("pos_embed"), "is no SiT: it lacks pos_embed"),
        (lambda w: w | {"blocks.1.mlp.fc2.bias": torch.ones(3)}, "another shape has blocks.1.mlp.fc2.bias"),
        (lambda w: w | rope_buffers() | {"feat_rope.freqs_sin": torch.zeros(16, 16)}, "other angles"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, change, says):
    with pytest.raises(SitfastError, match=says):
        run(saved(tmp_path, change(foreign())), "--heads", HEADS, "--to", "sitfast", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dit_is_refused_and_told_by_name_or_arguments(tmp_path):
    args = argparse.Namespace(model="DiT-B/4")
    for name, content in (("0050000.pt", {"ema": foreign(), "args": args}), ("DiT-XL-2-256x256.pt", foreign())):
        with pytest.raises(SitfastError, match="DiT, which takes steps 0 to 999"):
            run(saved(tmp_path, content, name), "--heads", HEADS, "--to", "sitfast", "--out", tmp_path / "run")
    run(tmp_path / name, "--heads", HEADS, "--time", "data", "--to", "sitfast", "--out", tmp_path / "run")
    lightning = saved(tmp_path, foreign(norm="layer"), "lightningdit-xl-imagenet256-64ep.pt")
    run(lightning, "--to", "official", "--out", tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "sitfast"], "how many heads a width of 64 has"),
        (["--heads", "4", "--num-classes", "7", "--to", "sitfast"], "--num-classes 7"),
        (["--heads", "4", "--to", "sitfast", "--out-time", "noise"], "--out-time noise"),
        (["--heads", "4", "--to", "official", "seed=1"], "seed=1: settings"),
        (["--heads", "4", "--to", "official"], "is a .pt file"),
        (["--heads", "4", "--to", "sitfast", "path.type=nope"], "path.type"),
        (["--heads", "5", "--to", "sitfast"], "num_heads=5"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, arguments, says):
    with pytest.raises(SitfastError, match=says):
        run(saved(tmp_path, foreign()), "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "what"), [("genes", "genes"), ("text", "captions")])
def test_a_model_that_no_other_layout_has_is_refused(tmp_path, key, what):
    net = SiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=4)
    state = {"samples": 0, "window": [], "model": {**net.config, key: {"length": 8}}}
    settings = {"model": net.state_dict(), "emas": {}, "optimizer": {}, "state": state}
    text = config.dump(config.load(None, ["data.path=x"]))
    checkpoint.save(tmp_path / "run", 1, **settings, config_yaml=text, keep=0)
    with pytest.raises(SitfastError, match=f"checkpoint-1 is a model of {what}, which no other layout has"):
        run(tmp_path / "run", "--to", "official", "--out", tmp_path / "x.pt")


def test_nothing_is_overwritten(tmp_path):
    source = saved(tmp_path, foreign())
    with pytest.raises(SitfastError, match="exists"):
        run(source, "--heads", HEADS, "--to", "official", "--out", source)


def test_num_classes_says_whether_the_last_row_is_null():
    for num, (classes, drop) in {None: (10, 0.1), 10: (10, 0.1), 11: (11, 0.0)}.items():
        network, _ = layouts.recognise(foreign(), source="x", heads=HEADS, num_classes=num)
        assert (network.kwargs["num_classes"], network.kwargs["class_dropout_prob"]) == (classes, drop)
