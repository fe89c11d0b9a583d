"""Checkpoints survive a kill at any moment, damage is noticed, and nothing is unpickled."""

import argparse
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sitfast import checkpoint
from sitfast.errors import SitfastError

# Python warns of a fork beside threads; these children only write small files or end at once.
quiet_fork = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 5, generator=generator).to(dtype) for name in ("a.weight", "b.bias")}


def content(step: int) -> dict:
    return {
        "model": tensors(step, torch.bfloat16),
        "emas": {0.9999: tensors(step + 1), 0.99: tensors(step + 2)},
        "optimizer": {"exp_avg.a.weight": torch.full((4,), float(step)), "skipped": torch.tensor(7)},
        "state": {"samples": step * 8, "window": [0.1, float(step)]},
        "config_yaml": f"seed: {step}  # ä\n",
    }


def put(run: Path, step: int, keep: int = 0) -> Path:
    return checkpoint.save(run, step, keep=keep, **content(step))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_is(path: Path, step: int) -> None:
    """The checkpoint at `path` loads, bit for bit."""
    loaded, want = checkpoint.load(path), content(step)
    assert (loaded.path, loaded.step, loaded.state) == (path, step, want["state"])
    assert loaded.config_yaml == want["config_yaml"]
    assert_equal(loaded.model, want["model"])
    assert_equal(loaded.optimizer, want["optimizer"])
    assert list(loaded.emas) == [0.9999, 0.99]
    for decay, ema in want["emas"].items():
        assert_equal(loaded.emas[decay], ema)


def unexpected(message: str) -> None:
    raise AssertionError(message)


def test_round_trip(tmp_path):
    path = put(tmp_path / "new" / "run", 20)
    assert path == tmp_path / "new" / "run" / "checkpoint-20"
    assert names(path.parent) == ["checkpoint-20"]
    assert names(path) == [
        "config.yaml",
        "ema-0.99.safetensors",
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ]
    assert_is(path, 20)
    assert checkpoint.read_state(path) == {"samples": 160, "window": [0.1, 20.0], "step": 20}


def test_strided_tensors_and_no_ema(tmp_path):
    parts = content(1) | {"emas": {}, "model": {"w": torch.arange(12.0).view(3, 4).T}}
    path = checkpoint.save(tmp_path, 1, keep=0, **parts)
    assert torch.equal(checkpoint.load(path).model["w"], torch.arange(12.0).view(3, 4).T)
    assert checkpoint.load(path).emas == {}
    assert torch.equal(checkpoint.find_weights(path)["w"], torch.arange(12.0).view(3, 4).T)


# a kill -------------------------------------------------------------------------------------------------------------


def die_at(moment: int) -> None:
    """Make this process end, as kill -9 would end it, just before its `moment`-th touch of the disk."""
    left = [moment]

    def mortal(function, half=None):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(*args, **kwargs)
                os._exit(9)
            return function(*args, **kwargs)

        return call

    def half_a_file(data, filename, **_) -> None:
        save_file(data, filename)
        os.truncate(filename, os.path.getsize(filename) // 2)

    checkpoint.save_file = mortal(save_file, half_a_file)
    for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, mortal(getattr(os, name)))
    Path.write_text = mortal(Path.write_text, lambda self, text, **_: self.write_bytes(text.encode()[: len(text) // 2]))


def in_child(work) -> int:
    """Exit status of `work` in a process of its own; it ends without any cleaning up."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@quiet_fork
def test_kill_at_any_moment_leaves_whole_checkpoints_only(tmp_path):
    seen, moment, status = set(), 0, 9
    while status != 0:
        moment += 1
        run = tmp_path / str(moment)
        put(run, 9)
        put(run, 10)
        status = in_child(lambda: (die_at(moment), put(run, 20, keep=1)))  # noqa: B023
        assert status in (0, 9)
        found = checkpoint.latest(run, unexpected)  # a half one would be met, and warned of
        assert found is not None and found.name in ("checkpoint-10", "checkpoint-20")
        seen.add((found.name, (run / "checkpoint-9").exists()))
        for path in run.glob("checkpoint-*"):
            assert_is(path, int(path.name[11:]))
        checkpoint.clean(run)
        assert not list(run.glob(".tmp-*"))
        assert_is(put(run, 20, keep=1), 20)  # the next process goes on
        assert names(run) == ["checkpoint-20"]
    assert moment > 25  # every file, rename and removal had its turn
    assert seen == {("checkpoint-10", True), ("checkpoint-20", True), ("checkpoint-20", False)}


@quiet_fork
def test_clean_spares_the_temporaries_of_the_living(tmp_path):
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for pid in (dead, os.getpid(), os.getppid()):
        (tmp_path / f".tmp-checkpoint-5-{pid}").mkdir()
        (tmp_path / f".tmp-checkpoint-5-{pid}" / "model.safetensors").write_bytes(b"x")
    (tmp_path / f".tmp-old-checkpoint-4-{dead}").mkdir()
    put(tmp_path, 5)
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == [f".tmp-checkpoint-5-{os.getppid()}", "checkpoint-5"]
    checkpoint.clean(tmp_path / "absent")


# damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "ema-0.99.safetensors", "optimizer.safetensors", "config.yaml"])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, -1, None])
def test_truncated_file_is_noticed_and_passed_over(tmp_path, name, length):
    good, bad = put(tmp_path, 10), put(tmp_path, 20)
    if length is None:
        (bad / name).unlink()
    else:
        os.truncate(bad / name, length % (bad / name).stat().st_size)
    for read in (checkpoint.validate, checkpoint.load, checkpoint.find_weights, checkpoint.find_checkpoint):
        with pytest.raises(SitfastError, match=name):
            read(bad)
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path, warnings.append) == good
    assert len(warnings) == 1 and "checkpoint-20" in warnings[0] and name in warnings[0]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "\x00", '{"format": 1, "files": {}, "emas": [], "step": 2, "state": {}}']
)
def test_damaged_trainer_state_is_noticed(tmp_path, text):
    path = put(tmp_path, 2)
    (path / "trainer_state.json").write_text(text)
    with pytest.raises(SitfastError, match=r"trainer_state\.json"):
        checkpoint.validate(path)
    assert checkpoint.latest(tmp_path, lambda _: None) is None


def test_unreadable_header_and_other_format_are_noticed(tmp_path):
    path = put(tmp_path, 2)
    size = (path / "model.safetensors").stat().st_size
    (path / "model.safetensors").write_bytes(b"\xff" * size)  # the right size
    with pytest.raises(SitfastError, match=r"model.safetensors is truncated or no safetensors file"):
        checkpoint.validate(path)
    path = put(tmp_path, 3)
    header = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(SitfastError, match="format 99"):
        checkpoint.validate(path)


def test_newest_goes_by_number_and_other_folders_do_not_count(tmp_path):
    for step in (9, 100, 20):
        put(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "samples").mkdir()
    assert checkpoint.latest(tmp_path, unexpected) == tmp_path / "checkpoint-100"
    assert checkpoint.latest(tmp_path / "samples", unexpected) is None


def test_saving_again_keeps_a_valid_one_and_replaces_a_broken_one(tmp_path):
    path = put(tmp_path, 5)
    inode = (path / "model.safetensors").stat().st_ino
    put(tmp_path, 5)
    assert (path / "model.safetensors").stat().st_ino == inode
    os.truncate(path / "ema.safetensors", 10)
    put(tmp_path, 5)
    assert_is(path, 5)
    assert names(tmp_path) == ["checkpoint-5"]


# keep ---------------------------------------------------------------------------------------------------------------


def test_keep_counts_valid_ones_only(tmp_path):
    for step in (1, 2, 3, 4):
        put(tmp_path, step, keep=0)
    assert len(names(tmp_path)) == 4
    os.truncate(tmp_path / "checkpoint-4" / "model.safetensors", 5)
    put(tmp_path, 5, keep=3)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
    put(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]  # the broken one is left for people to look at


def test_keep_never_removes_the_new_one_for_a_later_step(tmp_path):
    put(tmp_path, 100)
    put(tmp_path, 50, keep=1)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-50"]


# a full disk --------------------------------------------------------------------------------------------------------


def test_too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    put(tmp_path, 10)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: unexpected("wrote"))
    with pytest.raises(SitfastError, match=r"needs 0\.06 GiB and 0\.00 GiB are free .* checkpoint-10, is kept"):
        put(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-10"]


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("library", [True, False])
def test_disk_that_fills_up_while_saving(tmp_path, monkeypatch, call, library):
    put(tmp_path, 10)
    calls = []

    def filling(data, filename, **_) -> None:
        calls.append(filename)
        Path(filename).write_bytes(b"half")
        if len(calls) == call:
            if library:  # what safetensors raises; its class has no errno
                raise checkpoint.SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                )
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", filling)
    with pytest.raises(SitfastError, match=r"cannot save checkpoint-20: it needs .* checkpoint-10, is kept"):
        put(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-10"]
    assert_is(tmp_path / "checkpoint-10", 10)


def test_other_write_errors_are_one_line_too(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SitfastError, match=r"cannot save checkpoint-1 .* no earlier checkpoint"):
        put(tmp_path / "file", 1)


# weights ------------------------------------------------------------------------------------------------------------


def test_find_weights_in_folders_and_files(tmp_path):
    put(tmp_path, 10)
    path = put(tmp_path, 20)
    for place in (tmp_path, str(path), path / "ema.safetensors"):
        assert_equal(checkpoint.find_weights(place), content(20)["emas"][0.9999])
    for place in (tmp_path, path):
        assert_equal(checkpoint.find_weights(place, ema=False), content(20)["model"])
        assert checkpoint.find_checkpoint(place) == path
    os.truncate(path / "model.safetensors", 12)
    with pytest.warns(UserWarning, match="passing over checkpoint-20"):
        assert_equal(checkpoint.find_weights(tmp_path, ema=False), content(10)["model"])


def test_find_weights_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(pickle.dumps({}))
    save_file(tensors(0), tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 100)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for name, message in {
        "absent": "does not exist",
        "empty": "no valid checkpoint",
        "weights.bin": "not of a kind",
        "cut.safetensors": "truncated",
        "none.pt": "holds no weights",
    }.items():
        with pytest.raises(SitfastError, match=message):
            checkpoint.find_weights(tmp_path / name)
    for name in ("absent", "empty"):
        with pytest.raises(SitfastError):
            checkpoint.find_checkpoint(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_official_pt(tmp_path, legacy):
    parts = {
        "model": tensors(1),
        "ema": tensors(2),
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(model="SiT-XL/2", results_dir="results", cfg_scale=4.0),
    }

    def write(name: str, value: object) -> Path:
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        return tmp_path / name

    training = write("training.pt", parts)
    assert_equal(checkpoint.find_weights(training), parts["ema"])
    assert_equal(checkpoint.find_weights(training, ema=False), parts["model"])
    assert_equal(checkpoint.find_weights(write("no_ema.pth", {"model": parts["model"]})), parts["model"])
    assert_equal(checkpoint.find_weights(write("released.pt", parts["model"])), parts["model"])
    size = training.stat().st_size
    for length in (0, 1, 10, size // 2, size - 1):
        training = write("training.pt", parts)
        os.truncate(training, length)
        with pytest.raises(SitfastError, match=r"training.pt is (truncated|damaged)"):
            checkpoint.find_weights(training)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_malicious_pt_is_refused(tmp_path, how):
    marker, path = tmp_path / "executed", tmp_path / "weights.pt"
    value = {"model": tensors(1), "args": Malicious(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(value["args"], protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(SitfastError, match="could run foreign code"):
        checkpoint.find_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # so the file was a real threat
