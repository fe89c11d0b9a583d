"""What people and programs read of a run: the table, the lines, metrics.jsonl, the trackers."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sitfast import trackers
from sitfast.config import LogConfig
from sitfast.errors import SitfastError
from sitfast.metrics import Logger, compact, format_count, format_duration, peak_flops

ROOT = Path(__file__).resolve().parents[1]
QUIET = LogConfig(tensorboard=False)


@pytest.fixture(autouse=True)
def width_of_80(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def record(step: int, **changes: Any) -> dict[str, Any]:
    plain = {"step": step, "loss": 0.43125, "grad_norm": 0.5234, "lr": 1e-3, "images_per_s": 812.4, "mfu": None}
    return plain | {"memory_gib": None, "data_wait": 0.012, "eta_s": 92.0, "samples": step * 128} | changes


def logger(run_dir: Path, log: LogConfig = QUIET, **changes: Any) -> Logger:
    settings: dict[str, Any] = {"config": {"seed": 1}, "total_steps": 850, "is_main": True, "resume_step": None}
    return Logger(run_dir, log, **(settings | changes))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (0.43125, 6, "0.4313"),
        (0.0, 6, "0.0000"),
        (0.0001, 6, "1.0e-4"),
        (0.00123, 6, "0.0012"),
        (1234.5, 6, "1234.5"),
        (123456.0, 6, "123456"),
        (1234567.0, 6, "1.23e6"),
        (0.0123, 5, "0.012"),
        (0.00123, 5, "1e-3"),
        (99.996, 5, "100.0"),
        (math.nan, 6, "nan"),
        (math.inf, 6, "inf"),
        (-0.5, 6, "-0.500"),
    ],
)
def test_compact(value: float, width: int, text: str) -> None:
    assert compact(value, width) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (92, "1m32s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (86399, "1d00h"),
        (3 * 86400 + 4 * 3600, "3d04h"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999, "999"),
        (1797, "1.80k"),
        (999_600, "1.00M"),
        (675_129_632, "675M"),
        (32_963_360, "33.0M"),
        (1.03e9, "1.03B"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


# ---------------------------------------------------------------------------------------------------- the console


def test_line_of_a_cpu_run_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logger(tmp_path) as log:
        log.step(record(120))
    line = "step 120/850  loss 0.4313  grad 0.523  lr 1.0e-3  812 img/s  wait  1%  eta 1m32s\n"
    assert capsys.readouterr().out == line
    assert len(line) == 81


def test_line_of_a_gpu_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file keeps every column, however narrow; where there is room, bars stand between them."""
    gpu = record(120, mfu=0.4123, memory_gib=33.06)
    cells = ["step 120/850", "loss 0.4313", "grad 0.523", "lr 1.0e-3", "812 img/s", "mfu 41.2%", "33.1 GiB"]
    cells += ["wait  1%", "eta 1m32s"]
    for columns, between in (("40", "  "), ("200", " │ ")):
        monkeypatch.setenv("COLUMNS", columns)
        with logger(tmp_path) as log:
            log.step(gpu)
        assert capsys.readouterr().out == between.join(cells) + "\n"


def test_columns_stay_aligned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over many orders of magnitude each label stands at one place."""
    with logger(tmp_path, total_steps=400_000) as log:
        for i, value in enumerate([1234.5, 0.0001, 7.0, 123456.0, 0.4, 3e-9, math.nan, 0.0, 99999.9]):
            log.step(record(10**i % 400_000, loss=value, grad_norm=value, data_wait=i / 10, eta_s=3600.0 * (8 - i)))
    lines = capsys.readouterr().out.splitlines()
    for label in ("loss", "grad", "lr", "img/s", "wait", "eta"):
        assert len({line.index(label) for line in lines}) == 1, label
    assert len({len(line) for line in lines}) == 1


def test_troubles_show_only_when_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logger(tmp_path) as log:
        log.step(record(1, skipped=0, unreadable=0))
        log.step(record(2, skipped=1, unreadable=12))
    first, second = capsys.readouterr().out.splitlines()
    assert "skipped" not in first and "unreadable" not in first
    assert second.endswith("  skipped 1  unreadable 12")


def test_startup_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "/data/" + "folder/" * 20
    with logger(tmp_path) as log:
        log.startup([("device", "CPU [2 threads]"), ("output", path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 80
    assert "CPU [2 threads]" in out  # not taken for markup
    assert path in re.sub(r"[\s│]|output", "", out)  # folded, with nothing lost


def test_other_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logger(tmp_path) as log:
        log.scalars(50, {"val_loss": 0.5} | {f"val_loss_bin_{i}": i / 10 for i in range(10)})
        log.image(50, "samples", tmp_path)
        log.note("[b]saved[/b] " + "x" * 100)
        for text in ("slow", "slow", "odd"):
            log.warn(text)
    out, err = capsys.readouterr()
    val, image, note = out.splitlines()
    assert val.startswith("val   50/850 │ loss 0.5000 │ loss_bin_0 0.0000 │ ") and len(val) <= 80
    assert image == f"samples  50/850 │ {tmp_path}"
    assert note == "[b]saved[/b] " + "x" * 100
    assert err == "warning: slow\nwarning: odd\n"


def on_terminal(body: str, columns: int) -> str:
    """What a script writes to a pseudo-terminal of that width, control codes included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", body], stdout=theirs, stderr=theirs, stdin=theirs, env=env, cwd=ROOT
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the other side is gone
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            120,
            "step 850/850 │ loss 0.5000 │ grad 0.250 │ lr 1.0e-3 │ 700 img/s │ mfu 41.0% │ 33.1 GiB │ wait  1%"
            " │ eta 9s",
        ),
        (80, "step 850/850  loss 0.5000  grad 0.250  700 img/s  mfu 41.0%  wait  1%  eta 9s"),
        (50, "step 850/850  loss 0.5000  700 img/s  eta 9s"),
        (20, "step 850/850"),
    ],
)
def test_terminal_widths(tmp_path: Path, columns: int, expected: str) -> None:
    """On a terminal lines never wrap; a bar is drawn below them and taken away at the end."""
    body = f"""
from pathlib import Path
from sitfast.config import LogConfig
from sitfast.metrics import Logger
quiet = LogConfig(tensorboard=False)
log = Logger(Path({str(tmp_path)!r}), quiet, config={{}}, total_steps=850, is_main=True, resume_step=None)
log.advance(400)
speed = dict(images_per_s=700., mfu=.41, memory_gib=33.1, data_wait=.01, eta_s=9.)
log.step(dict(step=850, loss=.5, grad_norm=.25, lr=1e-3, **speed))
log.warn("look here")
log.close()
"""
    raw = on_terminal(body, columns)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    lines = [part.rstrip() for part in re.split(r"[\r\n]+", plain)]
    assert expected in lines
    if columns >= 50:
        assert any("400/850" in line and "━" in line for line in lines)
    assert max(map(len, lines)) <= columns
    assert "warning: look here" in " ".join(lines)
    assert raw.rstrip().endswith(("\x1b[?25h", "\x1b[2K"))  # the cursor is back, the bar is gone


def test_no_bar_and_no_colour_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with logger(tmp_path) as log:
        for step in range(1, 100):
            log.advance(step)
        log.step(record(100))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out


# --------------------------------------------------------------------------------------------------- metrics.jsonl


def test_floats_survive_exactly(tmp_path: Path) -> None:
    values = np.array([0.1, 1 / 3, 1e-38, 3.4e38, 16777217.0], dtype=np.float32)
    with logger(tmp_path) as log:
        for i, value in enumerate(values):
            log.step(record(i + 1, loss=torch.tensor(value), grad_norm=value, lr=0.1 + 0.2))
    read = lines_of(tmp_path)
    assert [np.float32(r["loss"]).tobytes() for r in read] == [v.tobytes() for v in values]
    assert [r["grad_norm"] for r in read] == [float(v) for v in values]
    assert read[0]["lr"] == 0.30000000000000004
    assert all(r["kind"] == "train" and abs(r["time"] - time.time()) < 60 for r in read)
    assert [(r["step"], r["samples"]) for r in read] == [(i, i * 128) for i in range(1, 6)]


def test_file_is_strict_json(tmp_path: Path) -> None:
    with logger(tmp_path) as log:
        log.step(record(1, loss=math.nan, grad_norm=-math.inf))
        log.scalars(1, {"val_loss": math.inf, "num": 3})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    train, val = lines_of(tmp_path)
    assert train["loss"] is None and train["grad_norm"] is None
    assert (val["kind"], val["step"], val["val_loss"], val["num"]) == ("val", 1, None, 3)


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with logger(tmp_path) as log:
        log.step(record(1))
        assert len(lines_of(tmp_path)) == 1


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, logger(tmp_path) as log:
        log._file.close()
        log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        log.step(record(1))
    assert caught.value.filename == "/dev/full"


def test_resume_drops_what_came_after(tmp_path: Path) -> None:
    """Lines up to the step stay byte for byte; later ones, a torn one and rubbish from a crash go."""
    with logger(tmp_path) as log:
        for step in (10, 20, 30):
            log.step(record(step, loss=step / 7))
            log.scalars(step, {"val_loss": step / 3})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    path.write_bytes(b"".join(line.encode() for line in before) + b"\0\0\0\n" + b'{"kind": "train", "step": 15, "lo')
    with logger(tmp_path, resume_step=20) as log:
        log.step(record(21))
    after = path.read_text().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert [(r["kind"], r["step"]) for r in lines_of(tmp_path)[4:]] == [("train", 21)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_last_line_without_its_newline(tmp_path: Path) -> None:
    """A kill between a record and its newline: the record counts, and the next one starts a line."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 1.0}')
    with logger(tmp_path, resume_step=5) as log:
        log.step(record(6))
    assert [r["step"] for r in lines_of(tmp_path)] == [5, 6]


def test_fresh_run_begins_a_fresh_file(tmp_path: Path) -> None:
    for _ in range(2):
        with logger(tmp_path / "new" / "run") as log:
            log.step(record(1))
        assert len(lines_of(tmp_path / "new" / "run")) == 1
    with logger(tmp_path / "resumed", resume_step=3):
        assert lines_of(tmp_path / "resumed") == []


def test_only_the_main_rank_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logger(tmp_path / "run", LogConfig(wandb=True), is_main=False) as log:
        log.startup([("device", "CPU")])
        log.advance(1)
        log.step(record(1))
        log.scalars(1, {"val_loss": 1.0})
        log.image(1, "samples", tmp_path)
        log.note("note")
        log.warn("warn")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- trackers


def test_tensorboard(tmp_path: Path) -> None:
    """Values arrive under train/ and val/; what was logged beyond the step of a resume is hidden."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    with logger(tmp_path, LogConfig(tensorboard=True)) as log:
        log.step(record(10, loss=0.5))
        log.step(record(20, loss=0.25))
        log.scalars(10, {"val_loss": 0.75})
        log.image(10, "samples", tmp_path / "grid.png")
    with logger(tmp_path, LogConfig(), resume_step=10) as log:
        log.step(record(15, loss=0.125))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 0.5), (15, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(10, 0.75)]
    assert [(e.step, e.width) for e in events.Images("samples")] == [(10, 8)]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_tensorboard_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SitfastError, match=r'log\.tensorboard=true needs tensorboard; pip install "sitfast\[track\]"'):
        logger(tmp_path, LogConfig(tensorboard=True))
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    logger(tmp_path, LogConfig(tensorboard=None)).close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_requested_tracker_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SitfastError, match=rf'log\.{name}=true needs {name}; pip install "sitfast\[track\]"'):
        logger(tmp_path, LogConfig.model_validate({"tensorboard": False, name: True}))


def test_wandb_and_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are told project, name and config; a resumed run goes on under its own W&B id."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append(("log", (step, values)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(project: str, **settings: Any) -> Run:
        calls.append(("init", {"project": project} | settings))
        return Run()

    for name in ("wandb", "trackio"):
        fake = types.ModuleType(name)
        fake.__dict__.update(init=init, log=Run().log, finish=Run().finish, Image=lambda path: ("image", path))
        monkeypatch.setitem(sys.modules, name, fake)
    both = LogConfig(tensorboard=False, wandb=True, trackio=True, project="p")
    for resume_step in (None, 5):
        with logger(tmp_path / "run", both, resume_step=resume_step) as log:
            log.scalars(6, {"val_loss": 0.5})
            log.image(6, "samples", Path("a.png"))
    inits = [value for kind, value in calls if kind == "init"]
    assert all((i["project"], i["name"], i["config"]) == ("p", "run", {"seed": 1}) for i in inits)
    assert inits[0]["id"] == inits[2]["id"] and inits[0]["resume"] == "allow"
    assert (inits[1]["resume"], inits[3]["resume"]) == ("never", "allow")
    logged = [value for kind, value in calls if kind == "log"]
    assert logged == [(6, {"val/loss": 0.5})] * 2 + [(6, {"samples": ("image", "a.png")})] * 2 + logged[:4]
    assert [kind for kind, _ in calls].count("finish") == 4
