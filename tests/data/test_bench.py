"""python -m sitfast.data: what it says, and that a slow loader cannot hide."""

import re
import time

import pytest

from sitfast.data import __main__ as command
from sitfast.data.folder import Folder
from sitfast.errors import SitfastError
from tests.conftest import command as process


def rates(text: str) -> dict[str, float]:
    return {name: float(rate.replace(",", "")) for name, rate in re.findall(r"^(\w+) +([\d,]+) images/s", text, re.M)}


def test_a_summary(tiny, capsys):
    assert command.main([*tiny, "data.val_samples=7"]) == 0
    assert capsys.readouterr().out == "digits: 1,797 rows in 10 classes, 8 px, 7 held out\n"


def test_a_slow_source_shows(tiny, image_folder, capsys, monkeypatch, tmp_path):
    """5 ms an image and one worker: 200 images/s at most, and training waits for nearly all of its time."""
    original = Folder.load

    def slow(*args):
        time.sleep(0.005)
        return original(*args)

    class Ready(command.Loader):
        """Has batches ready when the measurement begins."""

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            time.sleep(0.5)

    monkeypatch.setattr(Folder, "load", slow)
    monkeypatch.setattr(command, "Loader", Ready)
    run = [*tiny, "data.source=folder", f"data.path={image_folder}", "model.num_classes=3", "data.num_workers=1"]
    run.append("data.prefetch=8")
    assert command.main([*run, "--bench", "--seconds", "0.5", "--steps", "10"]) == 0
    out = capsys.readouterr().out
    found = rates(out)
    assert found.keys() == {"decode", "loader", "training"}
    assert 100 < found["decode"] < 200 and 100 < found["loader"] < 202 and 50 < found["training"] < 202
    waiting = float(re.search(r"10 steps; ([\d.]+)% of the time", out)[1])
    assert 30 < waiting < 100
    assert not (tmp_path / "run").exists()  # a measurement leaves no run folder


def test_latents_and_their_encoding(tiny, image_folder, capsys, tmp_path):
    from tests.test_encode import run, tiny_vae

    settings = [
        *tiny, "data.source=folder", f"data.path={image_folder}", f"vae.id={tiny_vae(tmp_path / 'vae')}", "model.patch_size=2",
        "model.num_classes=3", "vae.batch_size=4",
    ]  # fmt: skip
    short = ["--bench", "--seconds", "0.2", "--steps", "2"]
    command.main([*settings, *short])
    assert rates(capsys.readouterr().out).keys() == {"decode", "loader", "encode", "training"}
    run(tmp_path / "out", *settings)
    command.main([*settings, "data.source=latents", f"data.path={tmp_path / 'out'}", *short])
    out = capsys.readouterr().out
    assert "latents: 36 rows in 3 classes, 8 px, 0 held out" in out and "encode" in rates(out)


def test_two_ranks_and_mistakes(tiny):
    result = process("sitfast.data", *tiny, "--bench", "--seconds", "0.2", "--steps", "2", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "2 ranks, no workers each, pil" in result.stdout and len(re.findall("^training", result.stdout, re.M)) == 1
    with pytest.raises(SitfastError, match="data.batch_size=9"):
        command.main([*tiny, "data.batch_size=9", "train.accumulate=2"])
