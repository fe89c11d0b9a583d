"""The scaling benchmark: its arithmetic, and that one part that fails leaves the others their results."""

import argparse
import json
import os
import signal
import threading
import time

import pytest

from benchmarks import gpu_scale
from tests.conftest import command


def kernel(name: str, start: float, end: float, category: str = "kernel") -> dict:
    return {"cat": category, "name": name, "ts": start, "dur": end - start}


def test_what_of_communication_is_exposed():
    """µs:  compute 0–40 and 60–80, a copy 20–50; communication 30–70, 75–78 and 90–100; nothing 80–90."""
    events = [kernel("gemm", 60, 80), kernel("gemm", 0, 40), kernel("Memcpy", 20, 50, "gpu_memcpy")]
    events += [kernel("ncclDevKernel_AllGather", 30, 70), kernel("ncclDevKernel_AllReduce", 75, 78)]
    events += [kernel("ncclDevKernel_AllReduce", 90, 100), kernel("nccl:all_gather", 0, 500, "gpu_user_annotation")]
    events += [{"name": "no times", "ph": "M"}]
    got = gpu_scale.gpu_times(events, steps=2)
    assert got == pytest.approx({"communication_ms": 53 / 2e3, "exposed_ms": (10 + 10) / 2e3, "idle_ms": 10 / 2e3})


def test_the_order_of_what_is_measured():
    jobs = gpu_scale.plan(2, None, variants=False)
    assert [(job.ranks, job.strategy, job.parts) for job in jobs] == [
        (1, "ddp", ["ddp"]),
        (2, "ddp", ["ddp"]),
        (2, "fsdp", ["fsdp-kept", "fsdp", "save"]),
        (2, "ddp graph", ["ddp-graph"]),
    ]
    assert [(job.ranks, job.parts) for job in gpu_scale.plan(2, ["save"], variants=False)] == [
        (1, ["ddp"]),
        (2, ["save"]),
    ]
    assert [job.ranks for job in gpu_scale.plan(1, None, variants=False)] == [1, 1, 1]


def test_a_part_that_hangs_leaves_the_others_their_results(tmp_path, monkeypatch, capsys):
    """Rank 1 is stopped in the first part under fsdp: that part fails, the next one runs in new processes."""
    monkeypatch.setattr(gpu_scale, "PART_S", 8)
    output = tmp_path / "scale.json"
    args = argparse.Namespace(batch=4, seconds=100, output=output, overrides=[])
    session = gpu_scale.Session(args, tmp_path)

    def stop_rank_1() -> None:
        for _ in range(6000):
            time.sleep(0.01)
            for running in session.started:
                if running.job.attempt == 1 and running.part == "fsdp-kept":
                    os.kill(running.processes[1].pid, signal.SIGSTOP)
                    return

    jobs = [gpu_scale.Job("ddp", 1, ["ddp"]), gpu_scale.Job("fsdp", 2, ["fsdp-kept", "fsdp"])]
    thread = threading.Thread(target=stop_rank_1, daemon=True)
    thread.start()
    try:
        session.run(jobs, beside=None)
    finally:
        session.close()
    thread.join()
    written = json.loads(output.read_text())
    assert written["results"].keys() == {"1 × ddp", "2 × fsdp"} and written["results"]["2 × fsdp"]["images_per_s"] > 0
    assert written["errors"].keys() == {"2 × fsdp-kept"}
    assert written["errors"]["2 × fsdp-kept"].startswith("begin: nothing new in 8 s")
    assert "2 × fsdp-kept FAILED" in capsys.readouterr().out


def test_the_whole_in_a_minute_of_a_small_machine(tmp_path):
    """Everything that has no GPU: one rank, two under ddp and fsdp, a save and a resumption, and a failing job."""
    output = tmp_path / "scale.json"
    done = command("benchmarks.gpu_scale", "--output", str(output), "--only", "ddp,fsdp-kept,fsdp,save")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["1 × ddp", "2 × ddp", "2 × fsdp-kept", "2 × fsdp", "2 × save"]
    assert all(value > 0 for row in results.values() for value in row.values())
    assert results["2 × save"].keys() >= {"stalled_s", "written_s", "resumed_s", "to_first_step_s"}
    done = command("benchmarks.gpu_scale", "--only", "ddp", "model.depth=0")
    assert done.returncode == 1
    assert (
        "1 × ddp FAILED, setting up: exit status 1" in done.stdout and "model.depth=0 must be at least 1" in done.stdout
    )


def test_the_time_is_a_limit(tmp_path):
    output = tmp_path / "scale.json"
    done = command("benchmarks.gpu_scale", "--output", str(output), "--only", "ddp", "--seconds", "1")
    assert done.returncode == 1
    assert list(json.loads(output.read_text())["errors"]) == ["1 × ddp", "2 × ddp"]
