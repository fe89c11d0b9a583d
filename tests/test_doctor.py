"""The doctor finds what would stop a run, on every rank, and says what to do."""

import os
import shutil

import pytest

from sitfast import config, doctor, parallel
from sitfast.doctor import GIB, Finding
from tests.conftest import TINY


def examined(overrides: list[str]) -> dict[str, Finding]:
    cfg = config.load(None, overrides)
    with parallel.start(cfg) as world:
        return {finding.name: finding for finding in doctor.examine(cfg, world)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_STEADY_S", 0.05)


def test_a_healthy_machine(tmp_path, capsys):
    found = examined([*TINY, f"output_dir={tmp_path}"])
    assert {name for name, finding in found.items() if finding.level == "FAIL"} == set()
    assert found["data"].text.startswith("1,797 rows of 10 classes")
    assert "GB/s a rank" in found["output"].text and list(tmp_path.iterdir()) == []
    assert "predicted" in found["memory"].text
    assert doctor.main([*TINY, f"output_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.endswith("nothing stands in the way\n")


@pytest.mark.parametrize(
    ("overrides", "name", "text"),
    [
        (["data.source=folder", "data.path=absent"], "data", "absent"),
        (["output_dir=FILE/run"], "output", "cannot be written to (Not a directory); choose another output_dir"),
        (["model.num_heads=3"], "config", "hidden_size=16 is not divisible by num_heads=3"),
        (["parallel.strategy=hsdp", "parallel.shard_size=2"], "config", "parallel.shard_size=2 does not divide"),
        (["data.source=folder", "data.path=IMAGES", "model.num_classes=2"], "data", "use model.num_classes=3"),
    ],
)
def test_what_is_found(tmp_path, image_folder, capsys, overrides, name, text):
    (tmp_path / "file").write_text("")
    places = {"FILE": str(tmp_path / "file"), "IMAGES": str(image_folder)}
    for word, place in places.items():
        overrides = [override.replace(word, place) for override in overrides]
    assert doctor.main([*TINY, f"output_dir={tmp_path / 'run'}", *overrides]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"FAIL  {name}") and text in line]
    assert lines[-1] == "1 checks failed"


def test_too_little_space_for_the_checkpoints_to_keep(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=20 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = examined([*TINY, "model.preset=SiT-L/2", "model.hidden_size=1024", "model.num_heads=16", "model.depth=24"])
    assert found["output"].level == "FAIL" and "checkpoint.keep=3 needs" in found["output"].text


def examined_by_rank(folder, overrides: list[str]) -> dict[str, Finding]:
    return examined([*overrides, f"output_dir={folder / os.environ['RANK'] if folder.name == 'own' else folder}"])


def test_ranks_add_up_and_must_share_the_folder(ranks, tmp_path):
    for found in ranks(2, examined_by_rank, tmp_path / "shared", TINY):
        assert found["all-reduce"].level == "ok" and "GB/s a rank" in found["all-reduce"].text
        assert found["output"].level == "ok"
    answers = ranks.run(2, examined_by_rank, tmp_path / "own", TINY)
    for answer in answers:  # the doctor is started like the run, so settings that differ are found first
        assert "different settings" in answer.text and "output_dir" in answer.text
    everyone = [[Finding("ok", "output", "fine")], [Finding("FAIL", "output", "not shared")]]
    assert doctor.report(everyone) == 1
