"""A run in stages: what is carried over, exact resume everywhere, one folder, and what cannot be."""

import json
import os
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from sitfast import checkpoint, config, growing, parallel, sample
from sitfast import train as train_command
from sitfast.errors import SitfastError
from sitfast.model import interpolate_pos_embed
from sitfast.optim import learning_rate
from sitfast.resize import resized
from sitfast.trainer import Trainer
from tests.conftest import TINY, assert_equal, bits, command, folder_run, losses, tensors

# 8 px in patches of 2; 16 px in patches of 2: four times the tokens; 16 px in patches of 4.
STAGES = (
    "stages=[{steps: 6, image_size: 8, batch_size: 12, lr: 1e-3},"
    " {steps: 4, image_size: 16, batch_size: 6, lr: 5e-4},"
    " {steps: 5, image_size: 16, batch_size: 6, lr: 2e-4, patch_size: 4}]"
)
KILLED = """
import os, signal, sys
from sitfast import growing, train, trainer
step, grow = trainer.Trainer.train_step, growing.grow
def killing(self):
    if self.step == {step}:
        self.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
def killing_at_boundary(path, **given):
    if {boundary} and path.name == "checkpoint-{boundary}":
        os.kill(os.getpid(), signal.SIGKILL)
    return grow(path, **given)
trainer.Trainer.train_step, growing.grow = killing, killing_at_boundary
train.main(sys.argv[1:])
"""


def staged(image_folder, *more: str) -> list[str]:
    run = [o for o in TINY if not o.startswith(("train.steps", "optim.lr"))]
    more = ("model.patch_size=2", "checkpoint.every=3", "optim.schedule=cosine", "optim.warmup_steps=2", *more)
    return [*run, *folder_run(image_folder, STAGES, "model.rope=true", "checkpoint.keep=0", *more)]


def grown(*overrides: str) -> None:
    cfg = config.load(None, list(overrides))
    with parallel.start(cfg) as world:
        assert train_command.train(cfg, world) is None


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """36 smooth 16-px PNGs in three class folders."""
    from PIL import Image

    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for i in range(36):
        path = folder / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((16, 16), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory) -> Path:
    """The run that nothing disturbed: 15 steps in three stages."""
    folder = tmp_path_factory.mktemp("straight")
    grown(*staged(images), f"output_dir={folder}")
    return folder


def test_one_folder_holds_all_stages(straight, images):
    lines = [r for r in records(straight) if r["kind"] == "train"]
    assert [r["step"] for r in lines] == list(range(1, 16))
    assert [r["stage"] for r in lines] == [1] * 6 + [2] * 4 + [3] * 5
    samples = [12 * n for n in range(1, 7)] + [72 + 6 * n for n in range(1, 10)]
    assert [r["samples"] for r in lines] == samples
    cfg = config.load(None, staged(images))
    expected = []
    for stage in cfg.stages:  # warm-up and cosine of each stage, from its own first step
        optim = cfg.optim.model_copy(update={"lr": stage.lr})
        expected += [learning_rate(step, optim, stage.steps) for step in range(stage.steps)]
    assert [r["lr"] for r in lines] == expected and lines[6]["lr"] == 2.5e-4
    assert config.load(straight / "config.yaml").stages == cfg.stages
    last = checkpoint.load(straight / "checkpoint-15")
    assert last.state["model"]["patch_size"] == 4 and last.state["model"]["input_size"] == 16
    assert last.state["model"]["rope_grid"] == 4  # of the first stage
    restored = sample.Restored(str(straight), ema=True, device="cpu", overrides=[])
    assert restored.generate(torch.tensor([0]), seed=0).shape == (1, 3, 16, 16)


def test_what_a_stage_takes_over(straight, images, tmp_path, monkeypatch):
    """Weights, averages and moments as they are where shapes agree, resized or begun anew where they do not."""
    seen = {}
    original = growing.grow

    def spying(path, **given):
        said = original(path, **given)
        copies = [("model", given["model"]), ("optimizer", given["optimizer"]), *given["emas"].items()]
        seen[path.name] = said, {kind: {k: v.clone() for k, v in values.items()} for kind, values in copies}
        return said

    trainers = []
    run = Trainer.run

    def running(self):
        assert all(
            earlier() is None for earlier in trainers
        )  # what it held is free before the next stage takes its own
        trainers.append(weakref.ref(self))
        return run(self)

    monkeypatch.setattr(Trainer, "run", running)
    monkeypatch.setattr(growing, "grow", spying)
    grown(*staged(images), f"output_dir={tmp_path}")
    embedder, last = "x_embedder.proj.weight", ("final_layer.linear.weight", "final_layer.linear.bias")
    for name, anew in (("checkpoint-6", set()), ("checkpoint-10", {embedder, *last})):
        before, (said, after) = checkpoint.load(straight / name), seen[name]
        for kind, old in (("model", before.model), *before.emas.items()):
            for key, value in after[kind].items():
                if key == "pos_embed":
                    assert torch.equal(value, interpolate_pos_embed(old[key], 8 if name == "checkpoint-6" else 4))
                elif key in anew:
                    assert value.shape != old[key].shape
                    sizes = {"patch_size": 4, "in_channels": 3, "learn_sigma": False}
                    assert torch.equal(value, resized(key, old[key], sizes))
                else:
                    assert torch.equal(bits(value), bits(old[key])), key
        trained = [key for key in before.model if key != "pos_embed"]
        for key, value in after["optimizer"].items():
            parameter = key.partition(".")[2]
            if parameter in anew:
                assert value.abs().max() == 0
            elif key == "step":
                counts = [0.0 if name in anew else float(before.step) for name in trained]
                assert value.tolist() == counts
            else:
                assert torch.equal(value, before.optimizer[key]), key
        assert f"grown from {name}: pos_embed" in said
        assert ("all moments kept" in said) == (not anew)
        assert all(key in said.partition("the moments of ")[2] for key in anew)


@pytest.mark.parametrize(
    ("step", "boundary"),
    [(4, 0), (6, 0), (-1, 6), (8, 0), (-1, 10), (10, 0), (13, 0)],
    ids=["first", "first-step-of-second", "boundary", "second", "second-boundary", "first-step-of-third", "third"],
)
def test_killed_anywhere_the_same_command_continues_to_the_same_bits(straight, images, tmp_path, step, boundary):
    run = [*staged(images), f"output_dir={tmp_path / 'run'}"]
    result = command("", *run, code=KILLED.format(step=step, boundary=boundary))
    assert result.returncode == -signal.SIGKILL, result.stderr
    grown(*run)
    assert_equal(straight / "checkpoint-15", tmp_path / "run/checkpoint-15")
    assert losses(tmp_path / "run") == losses(straight)


def test_stages_on_other_numbers_of_ranks(straight, images, tmp_path, ranks):
    """Two ranks, sharded, through the first boundary; three, whole, from there on."""
    run = [*staged(images), f"output_dir={tmp_path / 'run'}"]
    ranks(2, interrupted, [*run, "parallel.strategy=fsdp"], 8)
    ranks(3, interrupted, run, 100)
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-4)
    after, expected = tensors(tmp_path / "run/checkpoint-15"), tensors(straight / "checkpoint-15")
    for key, value in expected.items():
        torch.testing.assert_close(after[key], value, rtol=1e-3, atol=2e-5, msg=key)


def interrupted(run: list[str], at: int) -> None:
    """As if SIGTERM came in step `at`."""
    step = Trainer.train_step

    def asking(self):
        if self.step == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    cfg = config.load(None, run)
    Trainer.train_step = asking
    try:
        with parallel.start(cfg) as world:
            ended = train_command.train(cfg, world)
    finally:
        Trainer.train_step = step
    assert (ended is None) == (at == 100)


def test_a_signal_in_the_last_step_of_a_stage_ends_the_run_there(straight, images, tmp_path):
    run = [*staged(images), f"output_dir={tmp_path / 'run'}"]
    interrupted(run, 6)
    assert {r["step"] for r in records(tmp_path / "run")} == set(range(1, 7))
    grown(*run)
    assert_equal(straight / "checkpoint-15", tmp_path / "run/checkpoint-15")


def test_a_finished_run_may_get_a_further_stage_and_no_other(straight, images, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    run = [*staged(images), f"output_dir={tmp_path / 'run'}"]
    grown(*run)
    assert "all 15 steps are done; add a stage to go on" in " ".join(capsys.readouterr().out.split())
    changed = STAGES.replace("lr: 5e-4", "lr: 6e-4")
    with pytest.raises(SitfastError, match="holds another run"):
        grown(*run, changed)
    longer = STAGES[:-1] + ", {steps: 4, image_size: 8, batch_size: 12, lr: 1e-4, patch_size: 2}]"
    grown(*run, longer)
    assert max(losses(tmp_path / "run")) == 19
    assert "stage 4 of 4, steps 16 to 19: 8 px, patches of 2, lr 0.0001" in " ".join(
        capsys.readouterr().out.replace("│", "").split()
    )


def test_a_boundary_that_is_damaged_sends_back_to_the_stage_before(straight, images, tmp_path):
    """The checkpoint of step 6 is torn: the second stage cannot begin, and the first goes on from step 3."""
    for name in ("checkpoint-3", "checkpoint-6", "config.yaml", "metrics.jsonl"):
        source = straight / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    torn = tmp_path / "checkpoint-6/model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    grown(*staged(images), f"output_dir={tmp_path}")
    assert_equal(straight / "checkpoint-15", tmp_path / "checkpoint-15")


def test_stages_with_batches_of_several_sizes(images, tmp_path):
    sizes = "resolutions: [[16, 16], [24, 8]]"
    stages = STAGES.replace("batch_size: 6, lr: 5e-4", f"batch_size: 8, lr: 5e-4, {sizes}")
    grown(*staged(images, stages), "data.batch_multiple=2", f"output_dir={tmp_path}")
    taken = {r["step"]: r["samples"] for r in records(tmp_path) if r["kind"] == "train"}
    steps = [taken[n + 1] - taken[n] for n in range(6, 10)]  # of 16 × 16 images there are 8, of 24 × 8 ones 10
    assert set(steps) <= {8, 10} and taken[6] == 72 and taken[15] == taken[10] + 5 * 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=[{steps: 0, image_size: 8, batch_size: 8, lr: 1e-3}]"], "stages.0.steps=0 must be at least 1"),
        (["stages=[{steps: 5, image_size: 8, batch_size: 8}]"], "stages.0.lr is missing"),
        (["stages=[{steps: 5, image_size: 8, batch_size: 8, lr: -1.0}]"], "stages.0.lr=-1.0 must be above 0"),
        (["stages=[{steps: 5, image_size: 8, batch_size: 8, lr: 1, size: 3}]"], "known here: steps of each stage"),
        (["stages=[{steps: 2, image_size: 8, batch_size: 8, lr: 1e-3}]"], "optim.warmup_steps=2 with train.steps=2"),
        (
            [STAGES.replace("image_size: 16, batch_size: 6, lr: 5e-4", "image_size: 15, batch_size: 6, lr: 5e-4")],
            "stages.1: data.image_size=15 is not divisible by 2, the pixels of a patch of 2; try 14 or 16",
        ),
        ([STAGES.replace("patch_size: 4", "patch_size: 5")], "stages.2: data.image_size=16 is not divisible by 5"),
        (["train.accumulate=4"], "stages.1: data.batch_size=6 with train.accumulate=4"),
        (["optim.min_lr=4e-4"], "stages.2: optim.min_lr=0.0004 with optim.lr=0.0002"),
        (
            ["data.source=digits", "data.flip=false", "model.num_classes=10"],
            "stages.1: data.source=digits with data.image_size=16: the digits are 8 x 8",
        ),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(images, tmp_path, overrides, message):
    with pytest.raises(SitfastError) as caught:
        grown(*staged(images), *overrides, f"output_dir={tmp_path / 'run'}")
    assert message in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_mistake_in_all_stages_is_said_once(images):
    with pytest.raises(SitfastError) as caught:
        config.load(None, [*staged(images), "profile.start=4"])
    assert str(caught.value).count("profile.start") == 1 and "stages" not in str(caught.value)


def test_stages_add_up(images):
    cfg = config.load(None, staged(images))
    assert [(stage.first, stage.last, stage.consumed) for stage in growing.stages(cfg)] == [
        (0, 6, 0),
        (6, 10, 72),
        (10, 15, 96),
    ]
    assert [one.model.patch_size for one in config.stage_configs(cfg)] == [2, 2, 4]
    with_weights = cfg.model_copy(update={"model": cfg.model.model_copy(update={"init_from": "x"})})
    assert [one.model.init_from for one in config.stage_configs(with_weights)] == ["x", None, None]
    plain = cfg.model_copy(update={"stages": ()})
    assert config.stage_configs(plain) == [plain]
    assert growing.stages(plain)[0].last == plain.train.steps


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [[], ["train.compile=true"]])
def test_stages_recorded_on_a_gpu_are_the_stages(images, tmp_path, settings):
    """Each stage records its own step; the losses are those of the run that records nothing."""
    wide = ["model.hidden_size=768", "model.num_heads=12", "train.device=cuda", "train.precision=bf16"]
    for graph in ("false", "true"):
        more = ["train.compile=false", *settings, f"train.cuda_graph={graph}", f"output_dir={tmp_path / graph}"]
        grown(*staged(images), *wide, *more)
    assert len(losses(tmp_path / "true")) == 15 and losses(tmp_path / "true") == losses(tmp_path / "false")
