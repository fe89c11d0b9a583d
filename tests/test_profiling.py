"""The profiled window, on the CPU, and ranges that cost nothing there."""

from __future__ import annotations

import json
from pathlib import Path

import nvtx
import pytest
import torch

from sitfast import profiling
from sitfast.config import ProfileConfig
from sitfast.profiling import Window, annotate


def steps(window: Window, numbers: range) -> None:
    """Steps that each run one operator of their own, so that the trace tells which were inside."""
    for step in numbers:
        window.step(step)
        with torch.profiler.record_function(f"step-{step}"):
            torch.ones(2).add(step)
    window.close()


def traced(path: Path) -> set[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return {event["name"] for event in events if str(event.get("name", "")).startswith("step-")}


def test_trace_holds_the_window_alone(tmp_path: Path) -> None:
    steps(Window(ProfileConfig(start=3, stop=5, trace=True), tmp_path), range(1, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    assert traced(tmp_path / "trace.json") == {"step-3", "step-4"}


def test_run_that_ends_or_resumes_inside(tmp_path: Path) -> None:
    profile = ProfileConfig(start=3, stop=9, trace=True)
    steps(Window(profile, tmp_path / "ends"), range(1, 5))
    assert traced(tmp_path / "ends" / "trace.json") == {"step-3", "step-4"}
    steps(Window(profile, tmp_path / "resumes"), range(7, 12))
    assert traced(tmp_path / "resumes" / "trace.json") == {"step-7", "step-8"}


@pytest.mark.parametrize(
    ("profile", "rank"),
    [
        (ProfileConfig(), 0),
        (ProfileConfig(start=2, stop=3), 0),
        (ProfileConfig(start=2, stop=3, trace=True), 1),
        (ProfileConfig(start=20, stop=30, trace=True), 0),
    ],
)
def test_nothing_is_written_otherwise(tmp_path: Path, profile: ProfileConfig, rank: int) -> None:
    steps(Window(profile, tmp_path, rank=rank), range(1, 6))
    assert not list(tmp_path.iterdir())


def test_cuda_profiler_brackets_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(profiling, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    window = Window(ProfileConfig(start=2, stop=4), tmp_path)
    for step in range(1, 7):
        window.step(step)
        calls.append(str(step))
    window.close()
    assert calls == ["1", "wait", "start", "2", "3", "wait", "stop", "4", "5", "6"]


@pytest.mark.parametrize("cuda", [True, False])
def test_ranges(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    calls: list[str] = []
    monkeypatch.setattr(profiling, "_has_cuda", lambda: cuda)
    monkeypatch.setattr(nvtx, "push_range", calls.append)
    monkeypatch.setattr(nvtx, "pop_range", lambda: calls.append("pop"))

    @annotate("outer")
    def outer(depth: int) -> int:
        with annotate("inner"):
            return outer(depth - 1) if depth else 7

    assert outer(1) == 7
    with pytest.raises(KeyError), annotate("fails"):
        raise KeyError
    once = ["outer", "inner"]
    assert calls == ([*once, *once, *["pop"] * 4, "fails", "pop"] if cuda else [])


def test_compiled_code_in_and_around(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(profiling, "_has_cuda", lambda: True)
    monkeypatch.setattr(nvtx, "push_range", pushed.append)
    monkeypatch.setattr(nvtx, "pop_range", lambda: None)

    @torch.compile(fullgraph=True, backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        with annotate("inside"):
            return x * 2

    with annotate("outside"):
        assert double(torch.tensor(3.0)).item() == 6
    assert pushed == ["outside"]
