"""text.cache: states of a frozen encoder stored beside the latents, against the encoder itself; runs from them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sitfast import config, data, encode
from sitfast.data.loader import fixed_batches
from sitfast.errors import SitfastError
from sitfast.text import Frozen, build_text
from tests.conftest import assert_equal, command, losses, train
from tests.test_encode import run, shards, tiny_vae
from tests.test_text import tiny_clip

TEXTS = ["a red circle", "", "blue", "z" * 60, "a green square at the top"]  # the last two are longer than 12 tokens


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def captioned(tmp_path, clip) -> list[str]:
    """23 images with captions, in shards of 10; what encodes them, with their states."""
    import datasets

    generator = np.random.default_rng(0)
    pixels = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(23)]
    texts = [TEXTS[row % 5] for row in range(23)]
    datasets.Dataset.from_dict({"image": pixels, "label": [0] * 23, "text": texts}).save_to_disk(tmp_path / "saved")
    return [
        "data.source=hf", f"data.path={tmp_path / 'saved'}", "data.caption_column=text", "data.image_size=8",
        "data.num_workers=0", "train.device=cpu", f"vae.id={tiny_vae(tmp_path / 'vae')}", "vae.batch_size=4",
        f"text.encoder={clip}", "text.length=12", "text.cache=true",
    ]  # fmt: skip


def latents_of(out, *settings: str) -> list[str]:
    kept = [s for s in settings if not s.startswith(("data.source", "data.path", "data.caption"))]
    return [*kept, "data.source=latents", f"data.path={out}"]


@pytest.fixture
def stored(captioned, tmp_path) -> list[str]:
    run(tmp_path / "out", *captioned)
    return latents_of(tmp_path / "out", *captioned)


def served(settings: list[str]):
    cfg = config.load(None, settings)
    source, encoder = data.build_source(cfg.data), build_text(cfg.text, torch.device("cpu"))
    source.serve_states(encoder)
    return source, encoder


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stored_states_are_those_of_the_encoder(captioned, tmp_path, capsys, dtype):
    manifest = run(tmp_path / "out", *captioned, dtype=dtype)
    assert "8 captions cut after 12 tokens" in capsys.readouterr().out
    assert manifest["text"]["length"] == 12 and encode.verify(tmp_path / "out")["count"] == 23
    source, encoder = served(latents_of(tmp_path / "out", *captioned))
    rows = [22, 0, 13, 9, 10, 1]
    found, expected = source.states(rows), encoder([TEXTS[row % 5] for row in rows])
    assert torch.equal(found.mask, expected.mask)
    assert found.tokens.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(found.tokens, expected.tokens.to(found.tokens.dtype))
    assert torch.equal(found.pooled, expected.pooled.to(found.pooled.dtype))
    parts = load_file(tmp_path / "out/shard-00002.safetensors")
    counts = encoder.tokenizer([TEXTS[row % 5] for row in range(20, 23)]).text.mask.sum(1)
    assert parts["state_end"].tolist() == counts.cumsum(0).tolist()  # nothing of padding is stored
    assert parts["state"].shape == (counts.sum(), 32) and parts["pooled"].shape == (3, 32)


def test_a_run_reads_them_and_leaves_the_encoder_alone(tiny, stored, tmp_path, monkeypatch):
    more = ["data.val_samples=6", "log.val_every=5", "checkpoint.every=5", "train.steps=10", "sample.prompts=[blue]"]
    settings = [*tiny, *stored, *more, "data.batch_size=6", "model.patch_size=2"]
    train(*settings, "text.cache=false", f"output_dir={tmp_path / 'anew'}")
    read, inside = [], Frozen.encode
    monkeypatch.setattr(
        Frozen,
        "encode",
        lambda self, text: (read.append(len(text.mask)) if text.tokens.ndim == 2 else 0, inside(self, text))[1],
    )
    straight = train(*settings, "sample.every=10", "sample.num=3")
    assert straight.text.parked and read == [1, 3]  # the empty caption, and the prompts of the grid
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "anew"), rel=2e-3)
    train(*settings, "train.steps=5", f"output_dir={tmp_path / 'b'}")
    train(*settings, "data.num_workers=2", f"output_dir={tmp_path / 'b'}")
    assert_equal(tmp_path / "run/checkpoint-10", tmp_path / "b/checkpoint-10")


def test_validation_reads_them_too(stored):
    source, encoder = served(stored)
    batches = list(fixed_batches(source, np.arange(4, 9), batch_size=3, device="cpu"))
    assert [len(batch.text.mask) for batch in batches] == [3, 2]
    expected = encoder([TEXTS[4], TEXTS[0], TEXTS[1]])
    assert torch.equal(batches[0].text.tokens, expected.tokens.half())
    assert torch.equal(encoder.encode(batches[0].text).tokens, expected.tokens.half().float())


def test_shards_are_the_same_after_a_kill_and_from_two_ranks(captioned, tmp_path):
    arguments = ["--out", str(tmp_path / "two"), "--shard-rows", "10", *captioned]
    assert command("sitfast.encode", *arguments, ranks=2).returncode == 0
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(tmp_path / "one", *captioned)
        expected = shards(tmp_path / "one")
        (tmp_path / "one/shard-00001.safetensors").unlink()
        run(tmp_path / "one", *captioned)
    finally:
        torch.set_num_threads(before)
    assert shards(tmp_path / "one") == expected == shards(tmp_path / "two")


def test_a_shard_without_a_readable_image(captioned, tmp_path):
    source = data.build_source(config.load(None, captioned).data)
    load = source.load

    def broken(row: int):
        if row < 10:
            raise data.Unreadable(f"row {row}", "test")
        return load(row)

    source.load = broken
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitfast.data.build_source", lambda settings: source)
        manifest = run(tmp_path / "out", *captioned, "data.max_unreadable=0.9")
    assert manifest["unreadable"] == 10
    found, encoder = served(latents_of(tmp_path / "out", *captioned))
    assert torch.equal(found.states([0]).tokens, encoder([TEXTS[0]]).tokens.half())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.length=11"], r"text\.length=11, and the texts in .* were encoded with 12; use text\.length=12"),
        (["text.encoder={other}"], "were encoded by '.*', and the one that text.encoder names has other weights"),
        (
            ["data.source=hf", "data.path={saved}", "data.caption_column=text"],
            "wants the latents that sitfast.encode wrote",
        ),
        (["data.path={plain}"], "holds no states of a text encoder; encode again with text.cache=true"),
    ],
)
def test_states_that_do_not_fit(tiny, captioned, stored, tmp_path, overrides, message):
    places = {"other": tiny_clip(tmp_path / "other", seed=1), "saved": tmp_path / "saved", "plain": tmp_path / "plain"}
    run(tmp_path / "plain", *captioned, "text.cache=false")
    settings = [*tiny, *stored, "model.patch_size=2", *(override.format(**places) for override in overrides)]
    with pytest.raises(SitfastError, match=message):
        train(*settings, "sample.prompts=[blue]", "train.steps=1", "data.batch_size=2")


def test_other_states_in_the_same_folder(captioned, stored, tmp_path):
    with pytest.raises(SitfastError, match=r"holds other latents \(text: "):
        run(tmp_path / "out", *captioned, "text.length=11")
    states = json.loads((tmp_path / "out/manifest.json").read_text())["text"]
    assert set(states) == {"encoder", "sha256", "precision", "length"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.encoder=bytes"], r"text\.cache=true with text\.encoder=bytes: it learns along with the model"),
        (["text.encoder=null"], r"text\.cache=true with text\.encoder=null: there is no encoder"),
    ],
)
def test_impossible_settings(captioned, overrides, message):
    with pytest.raises(SitfastError, match=message):
        config.load(None, [*captioned, *overrides])


def test_nothing_to_store(captioned, image_folder, tmp_path):
    settings = [s for s in captioned if not s.startswith("data.caption")]
    with pytest.raises(SitfastError, match="there are no captions"):
        run(tmp_path / "out", *settings, "data.source=folder", f"data.path={image_folder}")
    with pytest.raises(SitfastError, match=r"name the captions in data\.caption_column"):
        run(tmp_path / "out", *settings)
