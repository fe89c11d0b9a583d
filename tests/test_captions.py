"""Does a model learn to read? A smaller form of configs/captions.yaml; its full figures stand in docs/captions.md."""

import json
from pathlib import Path

import pytest
import torch

from sitfast import config, data, evaluate, parallel, sample
from sitfast.data.loader import fixed_batches
from sitfast.data.shapes import CAPTIONS
from sitfast.trainer import Trainer

ROOT = Path(__file__).parent.parent
SMALLER = ["data.image_size=8", "model.patch_size=2", "model.hidden_size=64", "model.depth=3", "model.num_heads=2"]
SMALLER += ["text.length=40", "text.width=48", "train.steps=550", "optim.lr=6e-3", "data.val_samples=200"]
SMALLER += ["log.val_every=0", "log.val_bins=4", "log.tensorboard=false"]
SMALLER += ["sample.every=0", "sample.method=euler", "sample.steps=12"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions") / "run"
    cfg = config.load(ROOT / "configs/captions.yaml", [*SMALLER, f"output_dir={folder}"])
    with parallel.start(cfg) as world:
        Trainer(cfg, world).run()
    return folder


def test_a_model_learns_to_read(run, capsys):
    evaluate.main(["--ckpt", str(run), "--num", "162"])
    result, said = json.loads((run / "evaluation.json").read_text()), capsys.readouterr().out
    assert result["caption_share"] >= 0.95
    assert result["colour_share"] >= 0.9
    assert f"{result['caption_share']:.1%} of them have a lower loss" in said
    assert f"{result['colour_share']:.1%} show the colour asked for" in said


def test_the_figures_are_about_the_captions(run):
    """The same model under wrong captions must fail both."""
    restored = sample.Restored(str(run), ema=True, device="cpu", overrides=[])
    numbers = sample.labels_for(54, None, len(CAPTIONS))
    x = restored.generate([CAPTIONS[i] for i in numbers.tolist()], seed=1)
    assert evaluate.read_shapes(x, numbers)["colour_share"] >= 0.9
    assert evaluate.read_shapes(x, (numbers + 27) % 162)["colour_share"] <= 0.1
    x = restored.generate([""] * 54, seed=1)  # no caption: any colour
    assert evaluate.read_shapes(x, numbers)["colour_share"] <= 0.5

    # Each caption exchanged for another, which has nothing to do with it.
    read = restored.text
    restored.text = lambda captions: read([CAPTIONS[(CAPTIONS.index(caption) * 59 + 80) % 162] for caption in captions])
    source = data.build_source(restored.cfg.data)
    batches = fixed_batches(source, torch.arange(100).numpy(), batch_size=100, device="cpu")
    assert 0.3 <= evaluate.caption_share(restored, batches) <= 0.7
