"""When one rank fails, every rank ends with one line that names it: no hang, no guessing."""

import os
import signal
import socket
import subprocess
import time

import pytest
import torch.distributed as dist

from sitfast import checkpoint, train, watch
from sitfast.errors import SitfastError
from sitfast.trainer import Trainer
from sitfast.watch import Watch
from tests import chaos
from tests.conftest import TINY, assert_equal, folder_run
from tests.conftest import train as run_training
from tests.ranks import Failed


def disturbed(step: int, rank: int, how: str, overrides: list[str]) -> int:
    """The exit status of a training in which something happens to one rank in one step."""
    original = Trainer._next_batch

    def next_batch(self):
        if self.step == step - 1 and self.world.rank == rank:
            self.world.at(self.step, "reading data")
            if how == "raise":
                raise SitfastError("the cat sat on row 7; remove the cat")
            if how == "sleep":
                time.sleep(7)
            if how == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Trainer._next_batch = next_batch
    try:
        return train.main(overrides)
    finally:
        Trainer._next_batch = original
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_the_others_name_the_rank_that_failed(ranks, tmp_path):
    answers = ranks.run(3, disturbed, 4, 1, "raise", [*TINY, "data.batch_size=9", f"output_dir={tmp_path}"])
    assert [answer.kind for answer in answers] == ["SitfastError"] * 3
    assert answers[1].text == "the cat sat on row 7; remove the cat"
    for answer in (answers[0], answers[2]):
        assert answer.text.startswith("stopped in step 4 (")
        assert answer.text.endswith(") because rank 1 failed first: the cat sat on row 7; remove the cat")


def test_a_hanging_rank_is_named_with_the_time_out(ranks, tmp_path):
    run = [*TINY, "parallel.timeout_s=4", "parallel.strategy=fsdp", f"output_dir={tmp_path}"]
    waiting, hanging = ranks.run(2, disturbed, 4, 1, "sleep", run)
    why = "because rank 1 failed first: no answer within parallel.timeout_s=4; it is in step 4 (reading data)"
    assert waiting.text.startswith("stopped in step 4 (training)") and waiting.text.endswith(why)
    # When it comes back, it hears so too, unless rank 0, which keeps the store here, has left by then.
    assert hanging.text.endswith((why, "because rank 0 or torchrun itself was ended first"))


def test_a_signal_to_one_rank_saves_and_lets_torchrun_start_again(ranks, tmp_path):
    """Status 0 where the signal came, 75 elsewhere, so that an agent whose rank was not told to stop starts it anew."""
    run = [*TINY, "parallel.strategy=fsdp", f"output_dir={tmp_path}"]
    assert ranks(2, disturbed, 7, 1, "SIGTERM", run) == [75, 0]
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "checkpoint-7"
    assert ranks(2, disturbed, 0, 0, "nothing", run) == [0, 0]
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "checkpoint-20"


def train_with(each: list[list[str]], overrides: list[str]) -> int:
    return run_training(*overrides, *each[int(os.environ["RANK"])]).step


def test_ranks_that_do_not_agree_stop_before_the_first_step(ranks, tmp_path, image_folder):
    run = [*TINY, f"output_dir={tmp_path / 'run'}"]
    for answer in ranks.run(2, train_with, [["optim.lr=1e-3"], ["optim.lr=0.5"]], run):
        assert answer.kind == "SitfastError" and "optim.lr: 0.001 on rank 0, 0.5 on rank 1" in answer.text
    # The same path holds other files on another node: here a link that each rank would follow to its own.
    (image_folder / "class0/0.png").rename(tmp_path / "0.png")
    answers = ranks.run(2, train_on_own_folder, tmp_path, folder_run(tmp_path / "linked"), run)
    for answer in answers:
        assert "the ranks have different data (number of rows: 36 on rank 0, 35 on rank 1" in answer.text
    assert not (tmp_path / "run/checkpoint-20").exists()


def train_on_own_folder(tmp_path, folder: list[str], run: list[str]) -> int:
    from sitfast.data import folder as source

    original, rank = source.build, int(os.environ["RANK"])
    if rank == 0:
        (tmp_path / "0.png").rename(tmp_path / "images/class0/0.png")

    def build(data):
        built = original(data.model_copy(update={"path": str(tmp_path / "images")}))
        built.num_rows -= rank
        return built

    source.build = build
    try:
        time.sleep(0.3 * rank)
        return run_training(*run, *folder).step
    finally:
        source.build = original


def test_a_folder_that_cannot_be_written_is_an_error_on_all(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    main, other = ranks.run(2, disturbed, 0, 0, "nothing", [*TINY, f"output_dir={tmp_path / 'file/run'}"])
    assert main.kind == "NotADirectoryError"
    assert other.text.startswith("stopped while setting up because rank 0 failed first: NotADirectoryError")


def join_alone(overrides: list[str]) -> int:
    os.environ["WORLD_SIZE"] = "3"
    return run_training(*overrides).step


def test_ranks_that_do_not_come(ranks, tmp_path):
    (answer,) = ranks.run(1, join_alone, [*TINY, "parallel.timeout_s=1", f"output_dir={tmp_path}"])
    assert isinstance(answer, Failed) and answer.kind == "SitfastError"
    assert "cannot meet the other ranks at 127.0.0.1:" in answer.text
    assert "within parallel.timeout_s=1 (ranks 1, 2 of 3 did not come)" in answer.text


class Shared(dist.PrefixStore):
    """A store that is its own clone, as clients of one server are."""

    def __init__(self, store) -> None:
        super().__init__("watch", store)

    def clone(self):
        return self


@pytest.fixture
def alone(monkeypatch):
    """A watch whose only peer is on another host and sends no beats but those written here."""
    monkeypatch.setattr(watch, "BEAT_S", 3600.0)
    store = Shared(dist.HashStore())
    store.set("who/1", "elsewhere 1")
    store.set("beat/1", "5 8 training")
    eye = Watch(store, rank=0, size=2, timeout_s=30)
    yield eye, store
    eye._end.set()


def test_a_machine_that_went_silent(alone, monkeypatch):
    monkeypatch.setattr(watch, "_LOOK_S", 0.3)
    eye, store = alone
    eye.at(8, "training")
    reason = eye.judge(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:1"))
    lost = "because rank 1 failed first: killed, or its machine was lost; last heard of in step 9 (training)"
    assert isinstance(reason, SitfastError) and str(reason) == f"stopped in step 9 (training) {lost}"
    assert store.get("failed").startswith(b"1 killed")  # what the next rank to break will hear


def test_an_error_of_its_own_is_written_down_once(alone):
    eye, store = alone
    bug = ZeroDivisionError("division\nby zero")
    assert eye.judge(bug) is bug
    assert eye.judge(SitfastError("a later one")).args == ("a later one",)
    assert store.get("failed") == b"0 ZeroDivisionError: division by zero"


def test_the_thread_ends_a_rank_whose_main_thread_hangs(alone, monkeypatch):
    """What the thread would say: nothing while there is progress, the lost rank once its beat has stopped."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    eye, store = alone
    eye.at(8, "training")
    assert eye._hanging(4) is None
    now[0] += 11  # hangs, and looks for the first time
    assert eye._hanging(4) is None
    now[0] += 10
    store.set("beat/1", "6 8 training")
    assert eye._hanging(8) is None
    now[0] += 16
    assert "rank 1 failed first: killed" in (eye._hanging(12) or "")
    eye.at(9, "training")
    assert eye._hanging(16) is None


def test_a_rank_that_is_done_is_not_missed(alone, monkeypatch):
    """Whoever takes longer at the end (the last image, a slow tracker) hears nothing of the others, and that is well."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    eye, store = alone
    other = Watch(store, rank=1, size=2, timeout_s=30)
    other.leave()
    other._end.set()
    eye.at(8, "training")
    for count in (4, 8, 12):
        now[0] += 12
        assert eye._hanging(count) is None
    assert store.get("beat/1").endswith(b"left")


def test_a_busy_rank_on_this_host_is_not_taken_for_dead(alone, monkeypatch):
    """A process that compiles may keep its watch from beating: while it lives, only the time-out counts."""
    monkeypatch.setattr(watch, "_LOOK_S", 0.2)
    now = [100.0]
    eye, store = alone
    store.set("who/1", f"{socket.gethostname()} {os.getpid()}")
    store.set("beat/0", "9 8 training")
    eye.at(8, "training")
    why = str(eye.judge(RuntimeError("[gloo] timed out waiting for recv")))
    assert why.endswith(
        "because rank 1 failed first: no answer within parallel.timeout_s=30; it is in step 9 (training)"
    )
    store.delete_key("failed")
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    eye.at(8, "training")
    assert eye._hanging(4) is None
    now[0] += 25
    assert eye._hanging(8) is None
    gone = subprocess.Popen(["true"])
    gone.wait()
    store.set("who/1", f"{socket.gethostname()} {gone.pid}")
    now[0] += 1
    monkeypatch.undo()
    monkeypatch.setattr(watch, "_LOOK_S", 0.2)
    eye._moved -= 60
    assert "rank 1 failed first: killed" in (eye._hanging(12) or "")


def test_kills_are_survived(ranks, tmp_path):
    """Two of the hundred of `python -m tests.chaos`: the last checkpoint has the bits of a run without them."""
    run = [*TINY, "train.steps=40", "log.every=50", "parallel.strategy=fsdp", "data.source=digits"]
    killed, log = tmp_path / "killed", tmp_path / "log"
    assert chaos.disturb(killed, run, log, kills=2, seed=1) == 2
    assert b"because rank" in log.read_bytes()
    ranks(2, disturbed, 0, 0, "nothing", [*run, f"output_dir={tmp_path / 'straight'}"])
    assert_equal(killed / "checkpoint-40", tmp_path / "straight/checkpoint-40")
