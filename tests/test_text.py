"""Captions: tokens, masks, encoders, the cross-attention, dropped captions, and runs that read them."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sitfast import checkpoint, config, evaluate, memory, philox, sample
from sitfast.config import TextConfig
from sitfast.data import build_source
from sitfast.data.shapes import Shapes
from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant
from sitfast.kernels.interpolate import interpolate
from sitfast.layers import Block
from sitfast.model import SiT, forward_macs
from sitfast.sampling import GuidedModel
from sitfast.text import BEGIN, DROPPED, END, PAD, Text, Tokenizer, build_text, frozen_bytes, text_shape
from tests.conftest import assert_equal, command, losses, train
from tests.test_model import SMALL, published_forward, randomized

BYTES = {"length": 12, "width": 32, "pooled": 32, "depth": 1}
STATES = {"length": 7, "width": 20, "pooled": 12, "depth": 0}
CPU = torch.device("cpu")


def settings(**changes) -> TextConfig:
    return TextConfig(**{"encoder": "bytes", "length": 12, "width": 32, "depth": 1, **changes})


def captions(*texts: str, **changes) -> Text:
    encoder = build_text(settings(**changes), CPU)
    return encoder(texts)


def states(batch: int = 3, lengths=(7, 1, 4)) -> Text:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(STATES["length"]) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(batch, STATES["length"], STATES["width"], generator=generator)
    return Text(tokens, mask, torch.randn(batch, STATES["pooled"], generator=generator))


def noisy(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.rand(batch, generator=generator)


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_the_tokens_of_bytes_are_the_bytes():
    text, cut = Tokenizer(6)(["né", "", "abcd", "abcde"])
    assert text.tokens.tolist() == [
        [BEGIN, 0x6E, 0xC3, 0xA9, END, PAD],
        [BEGIN, END, PAD, PAD, PAD, PAD],
        [BEGIN, 97, 98, 99, 100, END],
        [BEGIN, 97, 98, 99, 100, END],
    ]
    assert text.mask.sum(1).tolist() == [5, 2, 6, 6] and torch.equal(text.mask, text.tokens != PAD)
    assert cut == ("abcde",) and text.tokens.dtype == torch.int64 and text.pooled.shape == (4, 0)


def test_a_caption_cut_inside_a_character_is_still_read():
    text, cut = Tokenizer(4)(["né"])
    assert text.tokens.tolist() == [[BEGIN, 0x6E, 0xC3, END]] and cut == ("né",)


# The model ------------------------------------------------------------------------------------------------------------


def test_output_and_gradients_match_plain_algebra_on_the_unpadded_captions():
    model = randomized(text=STATES)
    y, (x, t) = states(), noisy()
    out = model(x, t, y)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = {key: value.detach().double().requires_grad_(key in names) for key, value in model.state_dict().items()}
    expected = torch.stack([
        published_forward(
            weights, x[i].double(), t[i].item(), 0, heads=SMALL["num_heads"], patch=SMALL["patch_size"],
            caption=(y.tokens[i][y.mask[i]].double(), y.pooled[i].double()),
        )
        for i in range(3)
    ])[:, :4]  # fmt: skip
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((out * weight).sum(), [model.get_parameter(name) for name in names])
    wanted = torch.autograd.grad((expected * weight).sum(), [weights[name] for name in names])
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3 * b.abs().max().item(), msg=name)


@pytest.mark.parametrize("kind", [BYTES, STATES], ids=["bytes", "states"])
def test_what_lies_under_padding_changes_nothing(kind):
    model = randomized(text=kind)
    y = captions("red", "", "blue") if kind is BYTES else states()
    x, t = noisy()
    other = torch.full_like(y.tokens, 65 if kind is BYTES else 1e4)
    where = y.mask if kind is BYTES else y.mask[..., None]
    garbage = y._replace(tokens=torch.where(where, y.tokens, other))
    assert not torch.equal(garbage.tokens, y.tokens)
    out = model(x, t, y)
    assert out.std() > 0.01 and torch.equal(model(x, t, garbage), out)
    changed = y._replace(tokens=(y.tokens + 1) % 259 if kind is BYTES else y.tokens + 0.5)  # and what does not, does
    assert (model(x, t, changed) - out).abs().amax((1, 2, 3)).min() > 1e-4


def test_more_padding_changes_nothing_but_rounding():
    """A caption alone in 12 places and in 30: the same weights, whose position embedding is the longer one's."""
    long, short = randomized(text=BYTES | {"length": 30}), randomized(text=BYTES)
    weights = long.state_dict()
    weights["text_encoder.position_embedding"] = weights["text_encoder.position_embedding"][:12]
    short.load_state_dict(weights)
    x, t = noisy(2)
    a = short(x, t, captions("red", "blue"))
    b = long(x, t, captions("red", "blue", length=30))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_names_of_the_weights():
    own, plain = SiT(**SMALL, text=BYTES).state_dict(), SiT(**SMALL).state_dict()
    expected = {key for key in plain if not key.startswith("y_embedder")}
    linears = ["y_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder", "text_encoder.conv", "text_encoder.norm"]
    linears += [f"blocks.{i}.cross_attn.{name}" for i in range(2) for name in ("q", "kv", "proj")]
    linears += [f"text_encoder.layers.0.{name}" for name in ("norm1", "norm2", "qkv", "proj", "fc1", "fc2")]
    expected |= {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    expected |= {f"blocks.{i}.cross_attn.gate" for i in range(2)}
    expected |= {"text_encoder.token_embedding.weight", "text_encoder.position_embedding"}
    assert set(own) == expected
    assert not any(key.startswith("text_encoder") for key in SiT(**SMALL, text=STATES).state_dict())
    assert own["blocks.1.cross_attn.kv.weight"].shape == (96, 48)


def test_first_weights():
    state = SiT(**{**SMALL, "hidden_size": 384}, text=BYTES).state_dict()
    for key, value in state.items():
        if key.endswith((".bias", "cross_attn.gate")):
            assert value.abs().max() == 0, key
    assert all(torch.equal(v, torch.ones(32)) for k, v in state.items() if "norm" in k and k.endswith("weight"))
    deviations = {"text_encoder.token_embedding.weight": 0.5, "text_encoder.position_embedding": 0.1}
    deviations |= {"t_embedder.mlp.0.weight": 0.02, "y_embedder.mlp.0.weight": (2 / 416) ** 0.5}
    for key, std in deviations.items():
        assert state[key].std().item() == pytest.approx(std, rel=0.1), key
    q = state["blocks.0.cross_attn.q.weight"]
    assert q.abs().max() <= (6 / 768) ** 0.5 and q.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.02)


def test_a_new_cross_attention_changes_nothing_and_learns():
    model = randomized(text=STATES)
    with torch.no_grad():
        for block in model.blocks:
            block.cross_attn.gate.zero_()
    y, (x, t) = states(), noisy()
    out = model(x, t, y)
    assert torch.equal(model(x, t, y._replace(tokens=y.tokens + 1)), out)
    out.square().sum().backward()
    for block in model.blocks:
        assert block.cross_attn.gate.grad.abs().min() > 0 and block.cross_attn.proj.weight.grad.abs().max() == 0


def test_a_block_with_cross_attention_compiles_whole():
    torch._dynamo.reset()
    model = randomized(text=STATES)
    block = model.blocks[0]
    assert isinstance(block, Block)
    y = states()
    vector, caption, mask = model._read(y)
    x = torch.randn(3, 16, 48, requires_grad=True)

    def run(function):
        x.grad = None
        out, (pending, gate, bias) = function(x, None, torch.nn.functional.silu(vector), None, caption, mask)
        (out.square().sum() + (pending * gate[:, None] + bias).sum()).backward(retain_graph=True)
        return out.detach(), pending.detach(), x.grad

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled), run(block), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [BYTES, STATES], ids=["bytes", "states"])
def test_multiply_accumulates_of_captions(kind):
    """Those that PyTorch counts, for both: what the captions add is exact."""

    def counted(y, **changes) -> tuple[int, int]:
        model = SiT(**SMALL, **changes)
        x, t = noisy(1)
        plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain_attention:
            model(x, t, y)
        return counter.get_total_flops() // 2, forward_macs(model)

    plain, by_us = counted(torch.tensor([1]))
    y = captions("red") if kind is BYTES else states(1, (3,))
    with_text, with_text_by_us = counted(y, text=kind)
    assert with_text > plain and with_text - plain == with_text_by_us - by_us


@pytest.mark.parametrize(
    ("text", "y", "message"),
    [
        (BYTES, torch.tensor([1, 2, 3]), "this model takes captions"),
        (None, captions("a", "b", "c"), "this model takes class labels"),
        (BYTES, captions("a", "b", "c", length=9), r"captions have tokens \(3, 9\).*text.length"),
        (STATES, captions("a", "b", "c"), r"captions have tokens \(3, 12\)"),
        (BYTES, captions("a", "b"), r"captions have tokens \(2, 12\)"),
    ],
)
def test_a_condition_of_the_wrong_kind(text, y, message):
    with pytest.raises(SitfastError, match=message):
        SiT(**SMALL, text=text)(*noisy(), y)


# Guidance -------------------------------------------------------------------------------------------------------------


def test_guidance_goes_away_from_the_empty_caption():
    encoder = build_text(settings(), CPU)
    y, null = encoder(["red", "greens"]), encoder([""])

    def model(x, t, y):
        return x * y.mask.sum(1)[:, None].float()

    x = torch.ones(2, 1)
    guided = GuidedModel(model, y, null=null, settings=config.SampleConfig(cfg=3.0))
    lengths = torch.tensor([[5.0], [8.0]])
    assert torch.equal(guided(x, 0.5, True), 2 + 3 * (lengths - 2))  # the empty caption has its two marks
    assert torch.equal(guided(x, 0.5, False), lengths)


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_dropped_captions_are_those_that_the_stream_says(drop):
    encoder = build_text(settings(), CPU)
    index = torch.arange(1000, 1400)
    y = encoder([str(i) for i in index.tolist()])
    drawn = interpolate(
        Interpolant(seed=7), torch.zeros(400, 1), index, labels=torch.arange(400) % 5, drop=drop, null=DROPPED
    )
    text = y.replaced(drawn.labels == DROPPED, encoder([""]))
    dropped = philox.uniform(7, index, philox.Stream.LABEL_DROP) < drop
    assert drop in (0.0, 1.0) or 80 < dropped.sum() < 160
    for i in range(400):
        assert bytes(text.tokens[i][1 : text.mask[i].sum() - 1].tolist()) == (b"" if dropped[i] else b"%d" % index[i])


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(tiny):
    """A tiny run that reads captions."""
    shapes = ["data.source=shapes", "text.encoder=bytes", "text.width=16", "text.depth=1", "text.length=48"]
    return [*tiny, *shapes, "sample.prompts=[a red circle]", "sample.num=2", "data.val_samples=20"]


@pytest.mark.parametrize("more", [[], ["train.accumulate=2"], ["train.precision=bf16"]], ids=str)
def test_a_stopped_run_goes_on_bit_for_bit(reads, tmp_path, more):
    run = [*reads, *more, "log.val_every=10", "sample.every=5"]
    train(*run, f"output_dir={tmp_path / 'straight'}")
    train(*run, "train.steps=10")
    train(*run, "data.num_workers=2")
    assert_equal(tmp_path / "straight/checkpoint-20", tmp_path / "run/checkpoint-20")
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")
    assert (tmp_path / "run/samples/step-20.png").exists()


def test_a_step_sees_the_captions_of_its_rows(reads, monkeypatch):
    trainer = train(*reads, "train.steps=1", "model.class_dropout_prob=0.4", "data.batch_size=64")
    seen, network = [], trainer.network
    trainer.network = lambda x, t, y: seen.append(y) or network(x, t, y)
    batch = next(trainer.encoded)
    trainer._compute(batch.x, batch.index, batch.y, *batch.text)
    dropped = philox.uniform(trainer.cfg.seed, batch.index, philox.Stream.LABEL_DROP) < 0.4
    assert 10 < dropped.sum() < 45 and len(set(batch.captions)) > 20
    for i, caption in enumerate(batch.captions):
        read = bytes(seen[0].tokens[i][1 : seen[0].mask[i].sum() - 1].tolist()).decode()
        assert read == ("" if dropped[i] else caption)
    labels = Shapes(8).class_names
    assert [labels[y] for y in batch.y.tolist()] == list(batch.captions)


def test_two_ranks_see_what_one_sees(reads, tmp_path):
    run = [*reads, "train.steps=6", "log.val_every=6", "checkpoint.every=6"]
    train(*run)
    result = command("sitfast.train", *run, f"output_dir={tmp_path / 'two'}", ranks=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def test_sharded_weights_and_compiled_blocks(reads, tmp_path, monkeypatch):
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="aot_eager", fullgraph=True))
    train(*reads, "train.steps=3", f"output_dir={tmp_path / 'eager'}")
    more = ["train.compile=true", "parallel.activation_checkpoint=selective"]
    train(*reads, "train.steps=3", *more)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    train(*reads, "train.steps=3", "parallel.strategy=fsdp", f"output_dir={tmp_path / 'sharded'}")
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [["train.precision=bf16"], ["train.precision=bf16", "train.residual=fp32"]])
def test_a_recorded_run_is_the_same_run(reads, tmp_path, precision):
    size = ["model.hidden_size=384", "model.num_heads=6", "data.image_size=32", "train.device=cuda", "text.width=64"]
    run = [*reads, *size, *precision, "train.steps=8", "checkpoint.every=8", "train.compile=true", "text.length=77"]
    for graph in ("false", "true"):
        trainer = train(*run, f"train.cuda_graph={graph}", f"output_dir={tmp_path / graph}")
        assert bool(trainer.recorded and trainer.recorded.active) == (graph == "true")
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    assert_equal(tmp_path / "true/checkpoint-8", tmp_path / "false/checkpoint-8")


def test_captions_that_are_too_long_are_cut_counted_and_named_once(reads, tmp_path, capsys):
    train(*reads, "train.steps=3", "text.length=20")
    said = capsys.readouterr().err
    assert said.count("is longer than text.length=20 tokens and was cut: 'a ") == 1
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [r["cut_captions"] for r in records if r["kind"] == "train"]
    source = build_source(config.load(None, reads).data)
    share = np.mean([len(source.caption(row)) > 18 for row in range(500)])
    assert counts[2] == pytest.approx(24 * share, abs=10) and counts[0] <= 8 and counts == sorted(counts)


def test_sampling_by_prompt(reads, tmp_path, capsys):
    train(*reads, "train.steps=2")
    run, out = ["--ckpt", str(tmp_path / "run")], ["--format", "npz", "--out", str(tmp_path / "s.npz")]
    sample.main([*run, "--prompt", "a red circle", "--prompt", "", *out])
    assert "8 samples" in capsys.readouterr().out
    packed = np.load(tmp_path / "s.npz")
    assert packed["arr_0"].shape == (8, 8, 8, 3) and packed["arr_1"].tolist() == [0, 1] * 4
    sample.main([*run, *out])  # those of the config
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == [0, 0]
    capsys.readouterr()
    sample.main([*run, *out, "--prompt", "x" * 60, "--num", "1"])
    assert "a prompt is cut after 48 tokens: 'xxx" in capsys.readouterr().err
    restored, images = sample.Restored(str(tmp_path / "run"), ema=True, device="cpu", overrides=[]), []
    for size in (3, 7):  # how many are integrated together is nothing but rounding
        settings = restored.cfg.sample.model_copy(update={"batch_size": size})
        images.append(sample.generate(
            restored.model, restored.vae, restored.interpolant, ["a", "b"] * 4, settings=settings, null=restored.null,
            seed=1, text=restored.text,
        ))  # fmt: skip
    assert images[0].shape == (8, 3, 8, 8) and not torch.equal(images[0][0], images[0][1])
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_class_numbers_and_prompts_are_not_mixed_up(tiny, reads, tmp_path):
    train(*reads, "train.steps=1", "sample.prompts=null")
    with pytest.raises(SitfastError, match="--classes: .* was trained on captions; use --prompt"):
        sample.main(["--ckpt", str(tmp_path / "run"), "--classes", "1"])
    with pytest.raises(SitfastError, match="this model reads captions; give some"):
        sample.main(["--ckpt", str(tmp_path / "run")])
    train(*tiny, "train.steps=1", f"output_dir={tmp_path / 'classes'}")
    with pytest.raises(SitfastError, match="--prompt: .* was trained on classes; use --classes"):
        sample.main(["--ckpt", str(tmp_path / "classes"), "--prompt", "a red circle"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=folder", "data.path=x"], "there are no captions"),
        (["data.source=hf", "data.path=x"], "name the captions in data.caption_column"),
        (["sample.classes=[1]"], "use sample.prompts"),
        (["sample.every=5", "sample.prompts=null"], "sample grids need captions"),
        (["text.encoder=null"], "only a model of captions reads them"),
        (["text.length=1"], "text.length=1 must be at least 2"),
        (["data.flip=true"], "a mirrored shape belies its caption"),
        (["vae.id=a/b"], "the shapes are trained on pixels"),
        (["data.caption_column=text"], "they have their captions"),
        (["data.crop=random"], "no images to crop"),
        (["data.decoder=dali"], "no image files to decode"),
    ],
)
def test_impossible_settings(reads, overrides, message):
    with pytest.raises(SitfastError, match=message):
        config.load(None, [*reads, *overrides])


def test_latents_without_texts(reads, tmp_path):
    from tests.data.test_sources import cached

    settings = cached(tmp_path)
    for path in tmp_path.glob("shard-*"):
        assert path.exists()
    source = build_source(settings)
    source.captioned = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitfast.data.build_source", lambda data: source)
        with pytest.raises(SitfastError, match="needs captions, and data.path=.* has none; encode it again"):
            train(*reads)


# Frozen encoders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def tiny_clip(path, seed=0):
    """A CLIP text model of random weights, with a tokenizer of letters."""
    import transformers

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(path)
    shape = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.CLIPTextModel(shape).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 encoder of random weights, with a tokenizer of a few words."""
    import transformers
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle"]
    inner = Inner(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **tokens).save_pretrained(path)
    torch.manual_seed(0)
    shape = transformers.T5Config(vocab_size=7, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    transformers.T5EncoderModel(shape).save_pretrained(path)
    return path


def test_states_of_clip_are_those_of_the_unpadded_caption(clip):
    import transformers

    encoder = build_text(settings(encoder=str(clip), length=15), CPU)
    text = encoder(["a red", "", "circle"])
    assert text.mask.sum(1).tolist() == [6, 2, 8] and text.tokens.shape == (3, 15, 32)
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(clip),
        transformers.CLIPTextModel.from_pretrained(clip),
    )
    for i, caption in enumerate(["a red", "", "circle"]):
        ids = torch.tensor([tokenizer(caption)["input_ids"]])
        with torch.no_grad():
            alone = model(input_ids=ids)
        torch.testing.assert_close(text.tokens[i][text.mask[i]], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text.pooled[i], alone.pooler_output[0], rtol=1e-4, atol=1e-5)
    assert text.tokens[~text.mask].abs().max() == 0
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training


def test_states_of_t5_are_those_of_the_unpadded_caption(t5):
    import transformers

    text = build_text(settings(encoder=str(t5), length=9), CPU)(["a red circle", "", "blue"])
    assert text.mask.sum(1).tolist() == [4, 1, 2] and text.tokens.shape == (3, 9, 24)
    model = transformers.T5EncoderModel.from_pretrained(t5)
    for i, ids in enumerate([[3, 4, 6, 1], [1], [5, 1]]):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(text.tokens[i][text.mask[i]], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text.pooled[i], alone.mean(0), rtol=1e-4, atol=1e-5)
    assert text_shape(settings(encoder=str(t5), length=9)) == {"length": 9, "width": 24, "pooled": 24, "depth": 0}


def test_a_borrowed_tokenizer_keeps_the_end_mark_of_what_it_cuts(clip):
    text, cut = build_text(settings(encoder=str(clip), length=5), CPU).tokenizer(["circle", "abc", "ab"])
    assert text.tokens.tolist() == [[52, 2, 8, 17, 53], [52, 0, 1, 28, 53], [52, 0, 27, 53, 53]]
    assert text.mask.sum(1).tolist() == [5, 5, 4] and cut == ("circle",)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_run_with_a_frozen_encoder(reads, tmp_path, kind, request):
    path = request.getfixturevalue(kind)
    run = [*reads, f"text.encoder={path}", "text.length=40", "train.precision=bf16"]
    train(*run, f"output_dir={tmp_path / 'straight'}")
    train(*run, "train.steps=10")
    trainer = train(*run, "data.num_workers=1")
    assert_equal(tmp_path / "straight/checkpoint-20", tmp_path / "run/checkpoint-20")
    assert not any("text_encoder" in key for key in checkpoint.find_weights(tmp_path / "run"))
    assert trainer.model.config["text"] == {"length": 40, "width": 32 if kind == "clip" else 24} | {
        "pooled": 32 if kind == "clip" else 24, "depth": 0,
    }  # fmt: skip
    sample.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a red circle", "--out", str(tmp_path / "s.png")])
    evaluate.main(["--ckpt", str(tmp_path / "run"), "--num", "6"])
    assert 0 <= json.loads((tmp_path / "run/evaluation.json").read_text())["caption_share"] <= 1


def test_precision_of_a_frozen_encoder(clip):
    wide, narrow = (
        build_text(settings(encoder=str(clip), precision=p), CPU)(["a red"]).tokens for p in ("fp32", "bf16")
    )
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(wide, narrow.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_the_memory_of_a_frozen_encoder_is_predicted(kind, request):
    """Its weights count, unless their states are stored; without loading them."""
    path = str(request.getfixturevalue(kind))
    made = build_text(settings(encoder=path, length=15), CPU)
    held = sum(p.numel() * p.element_size() for p in made.model.parameters())
    assert frozen_bytes(settings(encoder=path, length=15)) == held > 10_000
    assert frozen_bytes(settings(encoder=path, length=15, precision="bf16")) == held // 2
    assert frozen_bytes(settings(encoder=path, length=15, cache=True)) == frozen_bytes(settings()) == 0
    cfg = config.Config(text=settings(encoder=path, length=15))
    with torch.device("meta"):
        model = SiT(**SMALL, text=text_shape(cfg.text))
    without = cfg.model_copy(update={"text": settings(encoder=path, length=15, cache=True)})
    assert memory.predict(cfg, model, 1).total - memory.predict(without, model, 1).total == held


def test_folders_without_a_text_model(tmp_path, clip):
    import transformers

    with pytest.raises(SitfastError, match=r"text\.encoder=.*absent cannot be loaded: .*or give a local folder"):
        build_text(settings(encoder=str(tmp_path / "absent")), CPU)
    transformers.ViTConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    with pytest.raises(SitfastError, match="holds no text model but a vit"):
        build_text(settings(encoder=str(tmp_path / "vit")), CPU)
    with pytest.raises(SitfastError, match=r"text\.length=77, and .* reads 40 tokens; use text\.length=40"):
        build_text(settings(encoder=str(clip), length=77), CPU)
    (tmp_path / "cut").mkdir()
    for file in clip.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 3000 if file.suffix == ".safetensors" else None])
    with pytest.raises(SitfastError, match="cannot be loaded: .*check the files"):
        build_text(settings(encoder=str(tmp_path / "cut")), CPU)


def test_a_tokenizer_of_another_model(tmp_path, clip):
    import transformers

    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shape = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, bos_token_id=48, eos_token_id=49
    )
    transformers.CLIPTextModel(shape).save_pretrained(tmp_path)
    with pytest.raises(SitfastError, match="its tokenizer has 54 tokens, its model knows 50"):
        build_text(settings(encoder=str(tmp_path)), CPU)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SitfastError, match=r'needs transformers: pip install "sitfast\[text\]"'):
        build_text(settings(encoder="some/model"), CPU)
    with pytest.raises(SitfastError, match="needs transformers"):
        text_shape(settings(encoder="some/model"))
    assert build_text(settings(), CPU)(["a"]).mask.sum() == 3
