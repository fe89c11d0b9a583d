"""Comparing objectives: the measure against formulas of its own, and the command on tiny runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast import compare, data
from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant
from tests.conftest import TINY, assert_equal

PREDICTIONS, PATHS = ("velocity", "noise", "score"), ("linear", "gvp", "vp")
SHORT = [*TINY, "data.val_samples=40", "log.val_bins=4", "train.steps=6"]


def path(kind, t):
    """alpha, sigma and their derivatives in fp64, from the formulas."""
    if kind == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    if kind == "gvp":
        a, r = math.pi / 2 * t, math.pi / 2
        return a.sin(), a.cos(), r * a.cos(), -r * a.sin()
    s = 1 - t
    log_alpha, rate = -0.25 * s**2 * 19.9 - 0.05 * s, 0.05 + 0.5 * 19.9 * s
    alpha = log_alpha.exp()
    sigma = (1 - alpha**2).sqrt()
    return alpha, sigma, rate * alpha, -rate * alpha**2 / sigma


@pytest.mark.parametrize("kind", PATHS)
def test_time_at_a_ratio(kind):
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    found = compare.time_at(Interpolant(path=kind), t / (1 - t))
    alpha, sigma, *_ = path(kind, found)
    assert torch.allclose(alpha / sigma, t / (1 - t), rtol=1e-6)
    if kind == "linear":
        assert torch.allclose(found, t, rtol=1e-12)


class Shrink:
    """Predicts as if the data were standard normal: D = (x/α) r² / (1 + r²), in the words of each objective."""

    def __init__(self, kind, prediction):
        self.kind, self.prediction = kind, prediction

    def __call__(self, x, t, y):
        x, t = x.double(), t.double()
        alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in path(self.kind, t))
        estimate = x * alpha / (alpha**2 + sigma**2)
        noise = (x - alpha * estimate) / sigma
        kinds = {"velocity": d_alpha * estimate + d_sigma * noise, "noise": noise, "score": -noise / sigma}
        return kinds[self.prediction].float()


class Pixels:
    def encode(self, x, index):
        return x


def test_one_estimate_has_one_error_whatever_the_objective():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 4, 4, generator=generator)
    batch = data.Batch(x, torch.zeros(64, dtype=torch.long), torch.arange(64))
    errors = {}
    for kind, prediction in itertools.product(PATHS, PREDICTIONS):
        interpolant = Interpolant(path=kind, prediction=prediction)
        errors[kind, prediction] = compare.velocity_error(
            Shrink(kind, prediction), [batch], vae=Pixels(), interpolant=interpolant, bins=5
        )
    first = errors["linear", "velocity"]
    for key, error in errors.items():
        # fp32 inputs, of which noise and score divide by an alpha down to 0.01
        assert torch.allclose(error, first, rtol=1e-3), (key, error, first)
    # Of standard normal data the error of D is 1 / (1 + r²), so the measure is 1 / (t² + (1 − t)²), 1 at the ends.
    t = torch.linspace(0.01, 0.99, 5001, dtype=torch.float64)
    expected = (1 / (t**2 + (1 - t) ** 2))[:-1].view(5, -1).mean(dim=1)
    assert torch.allclose(first, expected, rtol=0.1)  # 1,024 values a bin: a standard error of 4 %


def test_run_names():
    runs = compare.parse_runs(
        "velocity-linear,noise-vp-likelihood, late:path.time_sampling=shifted,path.time_shift=3,score-gvp"
    )
    assert list(runs) == ["velocity-linear", "noise-vp-likelihood", "late", "score-gvp"]
    assert runs["noise-vp-likelihood"] == ["path.prediction=noise", "path.type=vp", "path.loss_weight=likelihood"]
    assert runs["late"] == ["path.time_sampling=shifted", "path.time_shift=3"]
    assert compare.parse_runs("a:optim.betas=[0.9,0.95],seed=1")["a"] == ["optim.betas=[0.9,0.95]", "seed=1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("velocity", "'velocity' is no run"),
        ("flow-linear", "'flow-linear' is no run"),
        ("noise-vp,noise-vp", "two runs are called 'noise-vp'"),
        ("seed=1", "belongs to no run"),
        ("../x:seed=1", "cannot be read"),
        ("x:seed", "cannot be read"),
    ],
)
def test_run_names_that_cannot_be_read(text, says):
    with pytest.raises(SitfastError, match=says):
        compare.parse_runs(text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs", "velocity-linear,velocity-vp-velocity"], "weights apply to noise and score"),
        (["data.val_samples=0"], "hold some out"),
        (["--runs", "noise-vp,x:model.no=1"], "model.no is not a setting"),
    ],
)
def test_nothing_trains_before_all_runs_are_sound(tmp_path, arguments, says):
    with pytest.raises(SitfastError, match=says):
        compare.main([*SHORT, f"output_dir={tmp_path / 'c'}", *arguments])
    assert not (tmp_path / "c").exists()


def test_runs_are_measured_shown_and_not_done_again(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "c"
    common = [*SHORT, f"output_dir={folder}", "--num", "20", "--runs"]
    compare.main([*common, "velocity-linear"])
    before = (folder / "velocity-linear" / "checkpoint-6" / "model.safetensors").stat().st_mtime_ns
    compare.main([*common, "velocity-linear,noise-vp,same:path.type=linear"])
    assert (folder / "velocity-linear" / "checkpoint-6" / "model.safetensors").stat().st_mtime_ns == before
    # First weights, data and draws are those of every other run.
    assert_equal(folder / "velocity-linear" / "checkpoint-6", folder / "same" / "checkpoint-6")

    results = json.loads((folder / "compare.json").read_text())["runs"]
    assert list(results) == ["velocity-linear", "noise-vp", "same"]
    first, other = results["velocity-linear"], results["noise-vp"]
    assert first["velocity_error_bins"] == results["same"]["velocity_error_bins"] != other["velocity_error_bins"]
    assert first["velocity_error"] == pytest.approx(np.mean(first["velocity_error_bins"]))
    # Both are the velocity's error on the linear path, one in bins of [0, 1], one of [0.01, 0.99].
    assert first["velocity_error"] == pytest.approx(first["own_loss"], rel=0.05)
    table = (folder / "compare.md").read_text()
    assert f"| {first['velocity_error']:.3f} " in table and "| noise-vp " in table and "read as asked" in table
    assert table.split("\n\n")[1].strip() in capsys.readouterr().out
    picture = np.asarray(Image.open(folder / "compare.png"))
    assert picture.shape[1] > 1000 and picture.std() > 10

    monkeypatch.setattr(compare, "Trainer", None)  # nothing is trained or measured any more
    monkeypatch.setattr(compare, "velocity_error", None)
    compare.main([*common, "velocity-linear,noise-vp"])


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = [*SHORT, "checkpoint.every=3", "--num", "10", "--runs", "noise-linear"]
    compare.main([*common, f"output_dir={whole}"])
    trainer = compare.Trainer

    class Cut(trainer):
        def _log(self, grad_norm):
            super()._log(grad_norm)
            if self.step == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(compare, "Trainer", Cut)
    with pytest.raises(KeyboardInterrupt):
        compare.main([*common, f"output_dir={cut}"])
    assert not (cut / "noise-linear" / "checkpoint-6").exists()
    monkeypatch.setattr(compare, "Trainer", trainer)
    compare.main([*common, f"output_dir={cut}"])
    assert_equal(whole / "noise-linear" / "checkpoint-6", cut / "noise-linear" / "checkpoint-6")


def test_other_data_has_samples_and_no_figure(tmp_path, image_folder):
    common = [*SHORT, "data.source=folder", f"data.path={image_folder}", "data.val_samples=6", "model.num_classes=3"]
    compare.main([*common, f"output_dir={tmp_path / 'c'}"])
    assert "read as asked" not in (tmp_path / "c" / "compare.md").read_text()
    assert np.load(tmp_path / "c" / "noise-vp" / "samples.npy").shape == (20, 8, 8, 3)
    assert Image.open(tmp_path / "c" / "compare.png").size[0] > 1000


def test_runs_that_read_captions(tmp_path):
    """They are measured under their own captions, which count, and their samples are those of prompts."""
    common = [*SHORT, "data.source=shapes", "text.encoder=bytes", "text.width=16", "text.depth=1", "text.length=48"]
    compare.main([*common, f"output_dir={tmp_path / 'c'}", "--runs", "velocity-linear"])
    found = json.loads((tmp_path / "c/velocity-linear/compare.json").read_text())
    assert 0 < found["velocity_error"] < 10 and np.load(tmp_path / "c/velocity-linear/samples.npy").shape == (
        20,
        8,
        8,
        3,
    )
    run = compare.Restored(str(tmp_path / "c/velocity-linear"), ema=True, device="cpu", overrides=[])
    source = data.build_source(run.cfg.data)
    held = list(compare.fixed_batches(source, np.arange(6), batch_size=6, device="cpu"))
    with torch.no_grad():
        for parameter in run.model.parameters():  # at first no caption makes a difference
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    how = {"vae": run.vae, "interpolant": run.interpolant, "bins": 2}
    own = compare.velocity_error(run.model, held, text=run.text, **how)
    other = compare.velocity_error(
        run.model, held, text=lambda captions: run.text(["a blue square"] * len(captions)), **how
    )
    assert not torch.equal(own, other)


def test_runs_in_stages_are_refused(tmp_path):
    stages = "stages=[{steps: 3, image_size: 8, batch_size: 4, lr: 1.0e-3}]"
    with pytest.raises(SitfastError, match=r"stages: 1 of them, and runs of one stage are compared"):
        compare.main([*SHORT, stages, f"output_dir={tmp_path / 'c'}"])
    assert not (tmp_path / "c").exists()
