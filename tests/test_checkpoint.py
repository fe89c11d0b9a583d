"""Checkpoints survive a kill at any moment, damage is noticed, and nothing is unpickled."""

import argparse
import errno
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sitfast import checkpoint, config, parallel, shards
from sitfast.errors import SitfastError
from sitfast.model import build_model
from sitfast.parallel import World
from tests.conftest import TINY, losses, train
from tests.ranks import Failed

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

    pwrite = os.pwrite
    os.pwrite = mortal(pwrite, lambda descriptor, data, offset: pwrite(descriptor, data[: len(data) // 2], offset))
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
    monkeypatch.setattr(os, "pwrite", lambda *_: unexpected("wrote"))
    with pytest.raises(SitfastError, match=r"needs 0\.06 GiB and 0\.00 GiB are free .* checkpoint-10, is kept"):
        put(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-10"]


@pytest.mark.parametrize("call", [1, 3, 8])
def test_disk_that_fills_up_while_saving(tmp_path, monkeypatch, call):
    put(tmp_path, 10)
    calls, pwrite = [], os.pwrite

    def filling(descriptor, data, offset) -> int:
        calls.append(offset)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data[:7], offset)  # a write may stop short

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(SitfastError, match=r"cannot save checkpoint-20: it needs .* checkpoint-10, is kept"):
        put(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-10"]
    assert_is(tmp_path / "checkpoint-10", 10)


def test_other_write_errors_are_one_line_too(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SitfastError, match=r"cannot save checkpoint-1 .* no earlier checkpoint"):
        put(tmp_path / "file", 1)


# many ranks, behind the training -------------------------------------------------------------------------------------


def saver(run: Path, **options) -> checkpoint.Saver:
    return checkpoint.Saver(run, keep=0, world=World(0, 1, torch.device("cpu")), **options)


def test_too_little_memory_for_the_copy_is_said_at_the_start(tmp_path):
    saver = checkpoint.Saver(tmp_path, keep=1, world=World(0, 1, torch.device("cpu")))
    weights = {"weight": torch.empty(2**48, device="meta")}
    with pytest.raises(
        SitfastError, match=r"no 1048576\.0 GiB of host memory for the copy that a checkpoint is written from"
    ):
        saver.reserve(model=weights, emas={}, optimizer={})


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is written is what the tensors were when `save` returned."""
    may_write, writing = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(*args) -> int:
        writing.set()
        assert may_write.wait(30)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    parts, behind = content(3), saver(tmp_path)
    assert behind.save(3, **parts) is None
    assert writing.wait(30)
    assert behind.done() is None and not (tmp_path / "checkpoint-3").exists()
    for tensor in parts["model"].values():
        tensor.zero_()
    may_write.set()
    note = behind.wait()
    assert note is not None and note.startswith(f"saved {tmp_path / 'checkpoint-3'} (training stood still for 0.0")
    assert_is(tmp_path / "checkpoint-3", 3)
    assert behind.wait() is None
    assert behind.save(4, **content(4)) is None
    assert "checkpoint-4" in (behind.save(5, **content(5)) or "")  # waits for the one before
    behind.wait()
    assert_is(tmp_path / "checkpoint-5", 5)


def test_a_save_that_fails_behind_the_training_is_an_error_there(tmp_path, monkeypatch):
    put(tmp_path, 1)
    behind = saver(tmp_path)
    monkeypatch.setattr(
        os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    behind.save(3, **content(3))
    behind._thread.join()
    assert behind.failed and behind.done() is None
    with pytest.raises(SitfastError, match=r"cannot save checkpoint-3: it needs .* checkpoint-1, is kept"):
        behind.wait()
    assert names(tmp_path) == ["checkpoint-1"] and not behind.failed


def settings(strategy: str) -> list[str]:
    return [f"parallel.strategy={strategy}", *(["parallel.shard_size=2"] if strategy == "hsdp" else [])]


def sharded(strategy: str, world: World) -> dict:
    """A model and its moments under a strategy, all zero."""
    cfg = config.load(None, [*TINY, *settings(strategy)])
    model = build_model(input_size=8, patch_size=4, in_channels=1, hidden_size=20, depth=1, num_heads=2, num_classes=9)
    mesh = parallel.device_mesh(cfg.parallel, world)
    if mesh is not None:
        parallel.shard(model, mesh, reshard_after_forward=True, dtype=None)
    weights = model.state_dict()
    moments = {f"exp_avg.{name}": torch.zeros_like(value) for name, value in weights.items()}
    tensors = {"model": weights, "emas": {0.9: {k: torch.zeros_like(v) for k, v in weights.items()}}}
    tensors |= {"optimizer": moments | {"step": torch.zeros(3), "scale": torch.zeros(()), "n": torch.zeros(2).long()}}
    for tensor in everything(tensors).values():
        shards.local(tensor).zero_()
    return tensors


def everything(tensors: dict) -> dict[str, Tensor]:
    groups = {"model": tensors["model"], "ema": tensors["emas"][0.9], "optimizer": tensors["optimizer"]}
    return {f"{group}:{name}": tensor for group, values in groups.items() for name, tensor in values.items()}


def values_for(name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def write_as(strategy: str, run: Path) -> int:
    """Returns how many bytes this rank wrote."""
    written = []
    pwrite = os.pwrite
    os.pwrite = lambda descriptor, data, offset: (written.append(len(data)), pwrite(descriptor, data, offset))[1]
    try:
        with parallel.start(config.load(None, [*TINY, *settings(strategy)])) as world:
            tensors = sharded(strategy, world)
            for name, tensor in everything(tensors).items():
                shards.assign(tensor, values_for(name, tensor.shape))
            saver = checkpoint.Saver(run, keep=0, world=world)
            saver.save(7, **tensors, state={"samples": 1}, config_yaml="seed: 0\n")
            saver.wait()
    finally:
        os.pwrite = pwrite
    return sum(written)


def read_as(strategy: str, run: Path) -> None:
    with parallel.start(config.load(None, [*TINY, *settings(strategy)])) as world:
        tensors = sharded(strategy, world)
        assert checkpoint.restore(run / "checkpoint-7", **tensors, world=world) == {"samples": 1, "step": 7}
        for name, tensor in everything(tensors).items():
            want = shards.rows_of(values_for(name, tensor.shape), tensor).to(tensor.dtype)
            assert torch.equal(shards.local(tensor), want), name


def test_the_files_are_the_same_however_the_weights_are_sharded(ranks, tmp_path):
    """20 rows over 3 ranks: 7, 7, 6. Each rank writes its part, and reads its part of what other numbers of them wrote."""
    layouts = [(1, "ddp"), (2, "ddp"), (3, "fsdp"), (4, "fsdp"), (4, "hsdp")]
    files: list[dict[str, bytes]] = []
    for size, strategy in layouts:
        run = tmp_path / f"{strategy}{size}"
        written = ranks(size, write_as, strategy, run)
        files.append({path.name: path.read_bytes() for path in (run / "checkpoint-7").iterdir()})
        assert sum(written) == pytest.approx(sum(map(len, files[0].values())), rel=0.3)  # all but headers, once
        assert max(written) < 1.3 * sum(written) / size
    assert all(one == files[0] for one in files)
    for size, strategy in [(2, "fsdp"), (3, "fsdp"), (2, "ddp"), (4, "hsdp")]:
        ranks(size, read_as, strategy, tmp_path / "fsdp4")


def test_a_run_moves_between_numbers_of_ranks_and_strategies(ranks, tmp_path):
    """Saved at 4, continued at 3, at 2 and alone: the losses are those of a run that nobody disturbed."""
    run = [*TINY, "data.batch_size=12", "optim.clip_norm=0.5"]
    train(*run, f"output_dir={tmp_path / 'straight'}")
    moved = [*run, f"output_dir={tmp_path / 'moved'}"]
    for size, steps, strategy in ((4, 6, "fsdp"), (3, 11, "fsdp"), (2, 16, "ddp"), (1, 20, "fsdp")):
        ranks(size, _train, *moved, f"train.steps={steps}", f"parallel.strategy={strategy}")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    assert len(losses(tmp_path / "moved")) == 20


def _train(*overrides: str) -> int:
    return train(*overrides).step


def fill_disk_of_rank_1(early: bool, *overrides: str) -> int:
    """Rank 1 finds its disk full, before writing or while it writes."""
    if os.environ["RANK"] == "1":
        usage, pwrite = shutil.disk_usage, os.pwrite

        def full(*_) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        try:
            if early:
                shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
            else:
                os.pwrite = full
            return train(*overrides).step
        finally:
            shutil.disk_usage, os.pwrite = usage, pwrite
    return train(*overrides).step


@pytest.mark.parametrize("early", [True, False])
def test_a_full_disk_on_one_rank_is_an_error_on_all(ranks, tmp_path, early):
    run = [*TINY, f"output_dir={tmp_path}", "parallel.strategy=fsdp", "checkpoint.every=5"]
    ranks(2, _train, *run, "train.steps=5")
    for rank, answer in enumerate(ranks.run(2, fill_disk_of_rank_1, early, *run)):
        assert isinstance(answer, Failed) and answer.kind == "SitfastError"
        free = "0.00 GiB are free" if early and rank == 1 else "free in"
        assert "cannot save checkpoint-10 on rank 1: it needs 0.06 GiB and" in answer.text and free in answer.text
        assert "checkpoint-5, is kept" in answer.text
    assert not list(tmp_path.glob(".tmp-*")) and not (tmp_path / "checkpoint-10").exists()
    ranks(2, _train, *run)  # with space again, the run goes on
    assert checkpoint.latest(tmp_path, unexpected) == tmp_path / "checkpoint-20"


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
