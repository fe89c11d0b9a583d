"""What `make demo` promises, and the commands on the run that it leaves: train, evaluate, sample."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast import evaluate, sample
from sitfast.errors import SitfastError
from tests.conftest import command, losses, train

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """configs/digits.yaml, trained whole."""
    run = tmp_path_factory.mktemp("demo") / "digits"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    config = str(ROOT / "configs/digits.yaml")
    result = command("sitfast.train", "--config", config, f"output_dir={run}", timeout=1200, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Three minutes on two cores, as processor time of one thread: two would also burn what they wait for each other.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 180
    return run


def test_the_demo_reaches_its_figures(demo, capsys):
    evaluate.main(["--ckpt", str(demo)])
    result = json.loads((demo / "evaluation.json").read_text())
    assert result["classifier_accuracy"] >= 0.97
    assert result["label_share"] >= 0.90
    assert result["val_loss"] < 0.5 and len(result["val_loss_bins"]) == 10
    said = capsys.readouterr().out
    assert f"{result['label_share']:.1%} of 1000 samples" in said and str(demo / "loss.png") in said
    for name in ("samples.png", "loss.png", "samples/step-425.png", "samples/step-850.png"):
        assert Image.open(demo / name).size[0] >= 300
    assert min(losses(demo).values()) < 0.5 < losses(demo)[25]


def test_wrong_labels_score_low(demo):
    """The figure is about labels: the same samples against other labels must fail it."""
    from sitfast import data

    run = sample.Restored(str(demo), ema=True, device="cpu", overrides=["sample.method=euler"])
    labels = sample.labels_for(100, None, 10)
    x = run.generate(labels, seed=1)
    source = data.build_source(run.cfg.data)
    assert evaluate.read_by_classifier(x, labels, source, val_samples=360)["label_share"] > 0.9
    assert evaluate.read_by_classifier(x, (labels + 1) % 10, source, val_samples=360)["label_share"] < 0.1


def test_sample_command_writes_each_format(demo, tmp_path, capsys):
    common = ["--ckpt", str(demo), "--classes", "0-9", "--cfg", "3", "--steps", "5", "--method", "euler"]
    sample.main([*common, "--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size[0] >= 10 * 48
    assert "40 samples" in capsys.readouterr().out
    sample.main([*common, "--num", "12", "--format", "png", "--out", str(tmp_path / "many")])
    assert len(list((tmp_path / "many").glob("*.png"))) == 12
    sample.main([*common, "--num", "30", "--format", "npz", "--out", str(tmp_path / "s.npz"), "sample.batch_size=7"])
    packed = np.load(tmp_path / "s.npz")
    assert packed["arr_0"].shape == (30, 8, 8, 3) and packed["arr_0"].dtype == np.uint8
    assert packed["arr_1"].tolist() == [i % 10 for i in range(30)]
    sample.main([*common, "--num", "30", "--format", "npz", "--out", str(tmp_path / "t.npz"), "sample.batch_size=30"])
    difference = packed["arr_0"].astype(int) - np.load(tmp_path / "t.npz")["arr_0"]
    assert np.abs(difference).max() <= 1  # the batch size changes rounding at most


@pytest.mark.parametrize("method", ["heun", "dopri5", "sde_euler", "sde_heun"])
def test_every_method_reads_as_asked(demo, method):
    from sitfast import data

    run = sample.Restored(str(demo), ema=True, device="cpu", overrides=[f"sample.method={method}", "sample.steps=30"])
    labels = sample.labels_for(50, None, 10)
    x = run.generate(labels, seed=2)
    source = data.build_source(run.cfg.data)
    assert evaluate.read_by_classifier(x, labels, source, val_samples=360)["label_share"] >= 0.9


def test_ema_and_raw_weights_differ(demo):
    labels = torch.tensor([3])
    images = [
        sample.Restored(str(demo), ema=ema, device="cpu", overrides=["sample.steps=2"]).generate(labels, seed=0)
        for ema in (True, False)
    ]
    assert not torch.equal(*images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "0-10"], "the model knows classes 0 to 9"),
        (["--classes", "x"], "cannot be read"),
        (["--num", "0"], "at least 1"),
        (["--method", "rk4"], "sample.method='rk4' must be one of"),
        (["sample.stepz=3"], "did you mean sample.steps?"),
        (["--device", "cuda"], "sees no GPU"),
    ],
)
def test_bad_arguments(demo, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        arguments, message = ["--cfg", "-1"], "sample.cfg=-1"
    with pytest.raises(SitfastError, match=message.replace("?", r"\?")):
        sample.main(["--ckpt", str(demo), *arguments])


def test_a_run_that_held_nothing_out_can_be_evaluated(tiny, tmp_path, capsys):
    train(*tiny, "train.steps=1")
    evaluate.main(["--ckpt", str(tmp_path / "run"), "--num", "10", "train.precision=tf32", "--device", "cpu"])
    assert "of the held-out real digits" in capsys.readouterr().out
    with pytest.raises(SitfastError, match="--num 0 must be at least 1"):
        evaluate.main(["--ckpt", str(tmp_path / "run"), "--num", "0"])


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(SitfastError, match="absent"):
        sample.main(["--ckpt", str(tmp_path / "absent")])


def test_parse_classes():
    assert sample.parse_classes("0-2,7", 10) == (0, 1, 2, 7)
    assert sample.labels_for(5, (3, 4), 10).tolist() == [3, 4, 3, 4, 3]
    assert sample.labels_for(4, None, 1000).tolist() == [0, 250, 500, 750]
    assert sample.labels_for(12, None, 10).tolist() == [*range(10), 0, 1]
