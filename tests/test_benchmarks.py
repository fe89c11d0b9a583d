import copy
import json
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    bench_end_to_end,
    bench_step,
    gpu_parity,
    gpu_parity_fp32,
    harness,
    plain,
    record,
    results,
    runs,
    tuning,
)
from sitfast.model import SiT, build_model, forward_macs

ROOT = Path(__file__).parents[1]


def case(function):
    return harness.Case(
        kernel="square",
        width=8,
        tokens=256,
        function=function,
        draw=lambda: (torch.randn(16, 8, device=harness.DEVICE),),
        forward=harness.Work(bytes=2_000, flops=0),
        backward=harness.Work(bytes=3_000, flops=4_000),
    )


class Wrong(torch.autograd.Function):
    """x², with a gradient that is 1 % off."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.02 * ctx.saved_tensors[0]


def unwritten(x):
    return x * x + 0 * torch.empty_like(x)


def drifting(x):
    drifting.calls += 1
    return x * x * (1 + 2.0**-22 * (drifting.calls % 2))


drifting.calls = 0


def test_only_a_correct_kernel_is_timed():
    square = case(lambda x: x * x)
    assert harness.failure(lambda x: x * x, square) is None
    assert "result 1 is off" in harness.failure(Wrong.apply, square)
    assert "result 0 is off by nan" in harness.failure(unwritten, square)


def test_results_that_change_from_run_to_run_are_refused():
    # 2^-22 of the value is within the allowed error of 1e-6 of it, so that only the comparison of the bits can see it
    assert "differs from run to run" in harness.failure(drifting, case(lambda x: x * x))


@pytest.mark.parametrize("direction, rate", [("forward", 2e-3), ("backward", 3e-3)])
def test_rates_count_the_bytes_of_the_direction(direction, rate):
    work = getattr(case(None), direction)
    figures = harness.figures(work, 1e-3, {"bytes": 4e6, "flops": 1e12})
    assert figures["rate"] == pytest.approx(rate)
    assert figures["unit"] == "GB/s"
    assert figures["percent_of_ceiling"] == pytest.approx(rate / 4e-3 * 100)


def test_a_kernel_bound_by_operations_is_measured_in_them():
    figures = harness.figures(case(None).backward, 1e-3, {"bytes": 4e6, "flops": 5e6})  # 0.75 and 0.8 ms
    assert figures["rate"] == pytest.approx(4e-6)
    assert figures["unit"] == "TFLOP/s"
    assert figures["percent_of_ceiling"] == pytest.approx(80)


def test_part_of_the_work_is_compared_with_its_own_reference():
    half = case(lambda x: x * x)
    assert harness.failure(lambda x: 2 * x, half, reference=lambda x: x + x, repeats=False) is None
    assert "result 0 is off" in harness.failure(lambda x: 2 * x, half, repeats=False)
    assert "differs" in harness.failure(drifting, case(lambda x: x * x))
    assert harness.failure(drifting, case(lambda x: x * x), repeats=False) is None


def test_a_measurement_calls_the_direction_it_names():
    calls = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            calls.append("backward")
            return grad

    samples = harness.measure(Watched.apply, case(Watched.apply), "forward", harness.Timer())
    assert len(samples) == harness.REPEATS
    assert all(sample > 0 for sample in samples)
    assert "backward" not in calls
    harness.measure(Watched.apply, case(Watched.apply), "backward", harness.Timer())
    assert calls.count("backward") >= harness.REPEATS


@pytest.mark.parametrize("host_cycles, error", [(300_000, None), (3_000_000, None), (1e12, "too long")])
def test_calls_that_the_host_queues_too_late_are_not_counted(host_cycles, error, monkeypatch):
    slept = [0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.slept = slept[-1]

        def query(self):  # of the first event: whether the device has reached it by now
            return self.slept < host_cycles

        def elapsed_time(self, other):
            return 1e3 * self.slept

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "BUSY_CYCLES", 500_000)
    timer = harness.Timer()
    if error:
        with pytest.raises(RuntimeError, match=error):
            timer._on_device(lambda _: lambda: None, 5)
    else:
        samples = timer._on_device(lambda _: lambda: None, 5)
        assert len(samples) == 5
        assert min(samples) >= host_cycles


# ---- several processes, one GPU --------------------------------------------------------------------------------------


class Lock:
    held = False

    def acquire(self):
        assert not self.held
        self.held = True

    def release(self):
        assert self.held
        self.held = False


def test_a_process_has_the_gpu_but_while_it_compiles():
    lock = Lock()
    turn = tuning.Turn(lock)

    def inner():
        assert not lock.held
        return "compiled"

    def outer():
        assert not lock.held
        assert turn.while_compiling(inner)() == "compiled"
        assert not lock.held

    turn.while_compiling(outer)()  # before its turn
    assert not lock.held
    with turn:
        assert lock.held
        turn.while_compiling(outer)()
        assert lock.held
        with pytest.raises(ZeroDivisionError):
            turn.while_compiling(lambda: 1 / lock.held)()
        assert lock.held
    assert not lock.held


def test_nothing_is_given_up_while_a_graph_is_recorded(monkeypatch):
    lock = Lock()
    turn = tuning.Turn(lock)
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    with turn:
        turn.while_compiling(lambda: lock.held or pytest.fail())()
        assert lock.held


def test_a_lock_ends_with_its_process(tmp_path):
    lock = tuning.FileLock(tmp_path / "lock")
    take = "import os, pickle, sys; pickle.load(sys.stdin.buffer).acquire(); os._exit(0)"
    subprocess.run([sys.executable, "-c", take], input=pickle.dumps(lock), check=True, cwd=ROOT)
    lock.acquire()
    other = tuning.FileLock(lock.path)
    free = threading.Event()
    waiting = threading.Thread(target=lambda: (other.acquire(), free.set()))
    waiting.start()
    assert not free.wait(0.05)
    lock.release()
    assert free.wait(10)
    waiting.join()
    other.release()


def test_short_kernels_are_not_tuned_and_not_asked_for_again(monkeypatch):
    tuner = pytest.importorskip("torch._inductor.runtime.triton_heuristics").CachingAutotuner
    monkeypatch.setattr(tuner, "coordinate_descent_tuning", lambda self, launcher: "tuned")
    monkeypatch.setattr(tuner, "bench", lambda self, launcher: launcher.ms)
    tuning.skip_short_kernels()
    kernel = object.__new__(tuner)
    for ms in (0.5 * tuning.LEAST_MS, 2 * tuning.LEAST_MS):
        launcher = SimpleNamespace(ms=ms, config=SimpleNamespace())
        long = ms > tuning.LEAST_MS
        assert kernel.coordinate_descent_tuning(launcher) == ("tuned" if long else launcher)
        assert getattr(launcher.config, "found_by_coordesc", False) != long


def compare(directions, wanted, what):
    """The case of this module as `runs` finds it."""
    if what == "error":
        raise ValueError("no such\n thing")
    return harness.compare(case(lambda x: x * x), directions, wanted)


def task(what):
    return __name__, (("what", what),)


def test_runs_in_this_process_until_the_time_is_over():
    tasks = {task("square"): ["backward"], task("error"): ["forward"]}
    in_time = runs.Runs(tasks, ["eager"], processes=0, deadline_s=time.monotonic() + 60)
    outcome = in_time.outcomes(task("square"))
    assert list(outcome) == ["backward"]
    assert outcome["backward"].work.flops == 4_000
    assert outcome["backward"].info["x_eager"] > 0
    assert "x_compile" not in outcome["backward"].info
    assert outcome["backward"].info["faults"] == {}
    assert in_time.outcomes(task("error")) == "ValueError: no such thing"
    late = runs.Runs(tasks, [], processes=0, deadline_s=time.monotonic() - 1)
    with pytest.raises(runs.TimeIsOver):
        late.outcomes(task("square"))


def test_a_baseline_that_fails_does_not_take_the_kernel_with_it(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such\n device")

    monkeypatch.setattr(harness, "compiled", lambda function: broken)
    info = harness.compare(case(lambda x: x * x), ["forward"], ["eager", "compile"])["forward"].info
    assert info["faults"] == {"compile": "RuntimeError: no such device"}
    assert info["x_eager"] > 0
    page = results.page([run(entry(8, "forward", faults=info["faults"]))])
    assert "- compile: RuntimeError: no such device: forward at D = 8, N = 256." in page


@pytest.mark.parametrize("deaths, works", [(1, True), (runs.MAX_RESTARTS + 1, False)])
def test_runs_survive_the_death_of_a_process(deaths, works, monkeypatch):
    submitted = []

    def pool(count):
        """Processes that die over the first case, but for those after so many deaths."""
        submitted.append([])

        def submit(call, function, *arguments):
            future = Future()
            submitted[-1].append(arguments[0][1] if arguments else "ceilings")
            dies = arguments and len(submitted) <= deaths
            future.set_exception(BrokenProcessPool()) if dies else future.set_result(function.__name__)
            return future

        return SimpleNamespace(submit=submit)

    monkeypatch.setattr(tuning, "processes", pool)
    started = runs.Runs({("m", "a"): [], ("m", "b"): []}, [], processes=2, deadline_s=time.monotonic() + 60)
    assert started.ceilings() == "ceilings"
    if works:
        assert [started.outcomes(("m", name)) for name in "ab"] == ["outcomes"] * 2
        assert submitted == [["ceilings", "a", "b"], ["a", "b"]]
    else:
        with pytest.raises(BrokenProcessPool):
            started.outcomes(("m", "a"))


def test_a_record_is_whole_after_each_result(tmp_path):
    kept = record.Record(tmp_path / "new" / "run.json", record.origin("a command", dtype="bfloat16", commit="abc"))
    for width in (384, 768):
        kept.add(entry(width, "forward"))
        written = json.loads((tmp_path / "new" / "run.json").read_text())
        assert written == kept.content
    page = results.page([written])
    assert len(rows(page)) == 2
    assert "- commit: abc\n" in page
    assert "`a command`" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]
    record.Record(None, {}).add({})


def entry(width, direction, **columns):
    return {
        "extra_info": {
            "kernel": "square",
            "direction": direction,
            "D": width,
            "N": 256,
            "B": 128,
            "median_us": 123.45,
            "rate": 2718.3,
            "unit": "GB/s",
            "percent_of_ceiling": 90.04,
            "ceilings": {"copy_GBs": 3020.4, "gemm_TFLOPs": 798.2},
            "note": None,
            "rivals": {},
            **columns,
        }
    }


def run(*benchmarks, **machine):
    machine = {
        "device": "NVIDIA H100",
        "dtype": "bfloat16",
        "torch": "2.11",
        "cuda": "13.0",
        "triton": "3.6",
        "commit": "",
        "command": "pytest benchmarks --benchmark-only",
        "cpu_figures": False,
        **machine,
    }
    return {
        "machine_info": {"sitfast": machine, "python_version": "3.12.3"},
        "commit_info": {"id": "abc123", "dirty": True},
        "datetime": "2026-01-02T03:04:05.678",
        "benchmarks": list(benchmarks),
    }


def rows(page):
    return [line for line in page.splitlines() if line.startswith("| ") and "GB/s" in line]


WINS = entry(384, "forward", x_eager=5.0, x_compile=1.25, rivals={"Liger": 1.5})
LOSES = entry(
    1152, "forward", x_eager=4.0, x_compile=0.8, rivals={"Liger": "result 1 is off"}, note="`square` runs PyTorch"
)


def test_page_names_its_origin_and_the_cases_that_lose():
    page = results.page([run(LOSES, WINS)])
    for fact in ("NVIDIA H100", "torch 2.11", "CUDA 13.0", "Triton 3.6", "Python 3.12.3", "abc123 with local changes"):
        assert fact in page
    assert rows(page) == [
        "| fwd | 384 | 256 | 123.5 | 2718 GB/s | 90 | 5.00 | 1.25 | 1.50 |",
        "| fwd | 1152 | 256 | 123.5 | 2718 GB/s | 90 | 4.00 | 0.80 ▼ | wrong |",
    ]
    assert "- square forward, D = 1152, N = 256: 0.80 ×" in page
    assert "- Not the default: `square` runs PyTorch: forward at D = 1152, N = 256." in page
    assert "- Liger: result 1 is off: forward at D = 1152, N = 256." in page
    assert "CPU figures" not in page
    assert "CPU figures" in results.page([run(WINS, cpu_figures=True)])


def test_page_of_several_runs_has_every_case_once_and_the_commit_they_were_given():
    again = copy.deepcopy(WINS)
    again["extra_info"]["x_compile"] = 1.75
    page = results.page(
        [run(LOSES, WINS, commit="def456", command="first"), run(again, commit="def456", command="second")]
    )
    assert ["1.75" in row for row in rows(page)] == [True, False]
    assert "- commit: def456\n" in page
    assert "`first`" in page
    assert "`second`" in page


def test_page_mixes_no_machines_and_no_commits():
    with pytest.raises(SystemExit, match=r"differ in device \(.*H200"):
        results.page([run(WINS), run(WINS, device="NVIDIA H200")])
    with pytest.raises(SystemExit, match="differ in commit"):
        results.page([run(WINS, commit="a"), run(WINS, commit="b")])


def test_command_writes_the_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text(json.dumps(run(WINS)))
    arguments = [str(tmp_path / "run.json"), "--output", str(tmp_path / "page.md")]
    monkeypatch.setattr("sys.argv", ["results", *arguments])
    results.main()
    assert rows((tmp_path / "page.md").read_text())
    assert "page.md" in capsys.readouterr().out


def test_processes_share_the_kernels_of_a_graph(monkeypatch):
    tuner = pytest.importorskip("torch._inductor.runtime.triton_heuristics").CachingAutotuner
    monkeypatch.setattr(tuner, "coordinate_descent_tuning", lambda self, launcher: f"{launcher}, tuned")

    class Kernel:
        def __init__(self, name):
            self.inductor_meta = {"kernel_name": name}

    done = []
    for index in range(2):
        with tuning.share_of_kernels(index, 2):
            tune = tuner.coordinate_descent_tuning
            done.append([tune(Kernel(name), name) for name in ("a", "b", "a", "c")])
    assert done == [["a, tuned", "b", "a, tuned", "c, tuned"], ["a", "b, tuned", "a", "c"]]
    assert tuner.coordinate_descent_tuning(Kernel("b"), "b") == "b, tuned"


# ---- loss parity -----------------------------------------------------------------------------------------------------


def test_reordered_model_is_the_same_function():
    torch.manual_seed(0)
    model = build_model("SiT-S/2", hidden_size=24, depth=2, num_heads=3, input_size=8, num_classes=5).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    other = copy.deepcopy(model)
    gpu_parity.reorder(other, torch.randperm(24))
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.rand(2), torch.tensor([1, 4])
    assert not torch.equal(model.x_embedder.proj.weight, other.x_embedder.proj.weight)
    assert torch.allclose(model(x, t, y), other(x, t, y), rtol=1e-9, atol=1e-9)


def curves(offset=0.0, scale=1.0):
    """Runs that differ by chance, but for what is changed in those with kernels."""
    torch.manual_seed(0)
    base = torch.linspace(2, 1, 100).double()
    noise = 1e-3 * torch.randn(6, 100).double()
    return {
        **{f"kernels {i}": base + scale * noise[i] + offset for i in range(2)},
        **{f"reference {i}": base + noise[2 + i] for i in range(4)},
    }


@pytest.mark.parametrize(
    "changes, passes",
    [({}, True), ({"offset": 2e-3}, False), ({"scale": 3.0}, False), ({"offset": float("nan")}, False)],
)
def test_verdict_on_the_loss_curves(changes, passes):
    passed, lines = gpu_parity.verdict(curves(**changes))
    assert passed == passes
    assert len(lines) == 2
    assert len(gpu_parity.table(curves(**changes))) == gpu_parity.BINS + 2


def test_one_step_far_off_fails():
    spiked = curves()
    for i in range(2):
        spiked[f"kernels {i}"][50] += 0.02
    assert not gpu_parity.verdict(spiked)[0]


def test_a_default_run_may_be_as_far_from_fp32_as_plain_bf16():
    fp32 = torch.linspace(2, 1, 80, dtype=torch.float64)
    wave = torch.linspace(0, 60, 80, dtype=torch.float64).sin()
    curves = {"fp32": fp32, "bf16": fp32 + 1e-3 * wave, "bf16 compiled": fp32 - 2e-3 * wave}
    for ours, passes in ((1e-3, True), (1.9e-3, True), (2.1e-3, False), (float("nan"), False)):
        passed, lines = gpu_parity_fp32.verdict(
            curves | {"sitfast": fp32 + ours * wave, "sitfast eager": fp32 - ours * wave}
        )
        assert passed == passes and len(lines) == 5


def test_crops_of_photographs(tmp_path):
    gpu_parity_fp32.make_images(tmp_path)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 16
    pictures = [[np.asarray(Image.open(path)) for path in sorted(folder.iterdir())] for folder in folders]
    assert {picture.shape for crops in pictures for picture in crops} == {(32, 32, 3)}
    assert all(len(crops) == gpu_parity_fp32.CROPS and np.std(crops) > 2 for crops in pictures)
    assert len({picture.tobytes() for crops in pictures for picture in crops}) == 16 * gpu_parity_fp32.CROPS


# ---- whole steps -----------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 24, "depth": 2, "num_heads": 3, "patch_size": 2, "input_size": 8}


def test_the_plain_network_is_the_same_function():
    torch.manual_seed(0)
    ours, theirs = build_model(None, **TINY).double(), plain.PlainSiT(**TINY).double()
    plain.random_weights(ours)
    assert all(p.ne(0).all() for name, p in ours.named_parameters() if name != "pos_embed")
    theirs.load_state_dict(ours.state_dict())
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.rand(2), torch.tensor([1, 1000])
    assert torch.allclose(ours(x, t, y), theirs(x, t, y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_a_plain_step_clips_updates_and_averages(fused):
    weight = torch.nn.Linear(1, 1, bias=False)
    model = torch.nn.Module()
    model.linear = weight
    model.forward = lambda x, t, y: 1000 * x * weight.weight
    before = weight.weight.item()
    training = plain.Training(
        model, torch.randn(4, 1, 2, 2), torch.arange(4), dtype=torch.float32, autocast=False, fused=fused
    )
    training.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # the step is the gradient
    training.step()
    moved = weight.weight.item() - before
    assert abs(moved) == pytest.approx(1.0, rel=1e-3) if fused else abs(moved) > 10
    assert training.average.averages[0].item() - before == pytest.approx(1e-4 * moved, rel=1e-2)
    assert weight.weight.grad is None


def test_averages_of_bf16_weights_are_fp32():
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    average = plain.Averaging([p], fused=True)
    with torch.no_grad():
        p.zero_()
    for _ in range(3):
        average()
    assert average.averages[0].dtype == torch.float32
    assert average.averages[0][0].item() == pytest.approx(plain.DECAY**3, rel=1e-6)


def step_case(method, model="S/2"):
    return bench_step.Case(model, 256, method, batch=4, steps=3)


@pytest.mark.parametrize("method", ["shipped", "eager", "bf16", "sitfast"])
def test_a_measured_step_has_the_columns_of_the_page(method, monkeypatch):
    monkeypatch.setattr(bench_step, "BACKEND", "eager")
    monkeypatch.setattr(SiT, "initialize_weights", SiT.initialize_weights)  # the case sets others
    monkeypatch.setattr("sitfast.data.build_source", None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    result = bench_step.measure(step_case(method))
    assert len(result["times_ms"]) == 3
    assert result["images_per_s"] == pytest.approx(4e3 / sorted(result["times_ms"])[1])
    assert result["ms_extremes"] == [min(result["times_ms"]), max(result["times_ms"])]
    page = results.page([run({"extra_info": result})])
    assert f"| {result['title']} | 4 |" in page
    assert "### SiT-S/2, 256 px" in page


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def measure(case):
        tried.append(case.batch)
        if case.batch > limit:
            raise torch.OutOfMemoryError
        return case.batch

    monkeypatch.setattr(bench_step, "_measure", measure)
    limit = 1
    assert bench_step.measure(step_case("eager")) == 1
    assert tried == [4, 2, 1]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        bench_step.measure(step_case("eager"))


def test_mfu_and_batches_count_what_they_say(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(bench_step.metrics, "peak_flops", lambda name: 1e12)
    monkeypatch.setattr(bench_step, "step_times", lambda step, count: [2.0] * count)
    result = bench_step.measure(step_case("eager"))
    with torch.device("meta"):
        macs = forward_macs(build_model(None, **step_case("eager").sizes(None)))
    assert result["mfu"] == pytest.approx(6 * macs * (4 / 2e-3) / 1e12)
    assert bench_step.batch_of("XL/2", 512, bench_step.batches("XL/2=96,S/2=8")) == 24


def test_steps_of_a_model_are_ready_before_one_is_measured(monkeypatch):
    """Pools are fakes that do at once what they are asked for."""
    log, stopped = [], []

    class Pool:
        def submit(self, call, function, case):
            future = Future()
            log.append((function.__name__, case.method, case.model))
            if case.method == "eager" and function is bench_step.measure:
                future.set_exception(RuntimeError("broken"))
            elif case.method != "hangs":
                future.set_result(case.method)
            return future

    monkeypatch.setattr(tuning, "processes", lambda count, lock: Pool())
    monkeypatch.setattr(tuning, "stop", lambda pool, patience_s: stopped.append(pool))
    cases = [step_case("shipped"), step_case("eager"), step_case("hangs"), step_case("shipped", "B/2")]
    steps = bench_step.Steps(cases, case_s=0.05, deadline_s=time.monotonic() + 60)
    assert steps.result(cases[0]) == "shipped"
    assert [entry[0] for entry in log] == ["prepare"] * 3 + ["measure"]
    with pytest.raises(RuntimeError, match="broken"):
        steps.result(cases[1])
    with pytest.raises(runs.TimeIsOver, match="not done in time"):
        steps.result(cases[2])
    assert steps.result(cases[3]) == "shipped"
    assert log[-2:] == [("prepare", "shipped", "B/2"), ("measure", "shipped", "B/2")]
    assert len(stopped) == 4
    steps.close()


def step_result(method, rate, **columns):
    return {
        "extra_info": {
            "kind": "step", "model": "SiT-XL/2", "pixels": 256, "method": method, "title": f"by {method}", "B": 128,
            "ms": 1e3 * 128 / rate, "ms_quartiles": [1.0, 2.0], "images_per_s": rate, "mfu": 0.5, "peak_gib": 40.04,
            "note": "a note", **columns,
        }
    }  # fmt: skip


def test_page_and_plot_of_whole_steps(tmp_path):
    twice = run(step_result("compiled", 400.0), step_result("sitfast", 600.0), step_result("compiled", 500.0))
    end = {"kind": "end to end", "model": "SiT-XL/2", "pixels": 256, "B": 128}
    step = {"extra_info": {**end, "run": "step", "images_per_s": 600.0, "data_wait": None}}
    jpeg = {"extra_info": {**end, "run": "jpeg", "images_per_s": 540.0, "data_wait": 0.08}}
    both = [twice, run(step, jpeg, WINS)]
    page = results.page(both)
    assert "| by compiled | 128 | 256.0 (1.0 to 2.0) | 500.0 | 50.0% | 40.0 | 1.20 |" in page
    assert "| by sitfast | 128 | 213.3 (1.0 to 2.0) | 600.0 | 50.0% | 40.0 |  |" in page
    assert "- a note: by compiled." in page
    assert "| SiT-XL/2, 256 px, jpeg | 128 | 540.0 | 8.0% | 90.0% |" in page
    assert len(rows(page)) == 1
    assert results.plot(both, tmp_path / "docs" / "plot.png")
    assert (tmp_path / "docs" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not results.plot([run(WINS)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_end_to_end_reads_what_a_run_writes(tmp_path, monkeypatch):
    """The run is a script that writes metrics, the last line torn, and would go on for ever."""
    metrics = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"kind": kind, "images_per_s": rate}) + "\n" for kind, rate in
                   [("train", 1.0), ("val", 2.0), ("train", 3.0)])  # fmt: skip
    script = "import sys, time; open(sys.argv[1], 'w').write(sys.argv[2]); print('the last word', flush=True)"
    monkeypatch.setattr(bench_end_to_end, "TRAIN", [sys.executable, "-c", f"{script}; time.sleep(60)"])
    watched = [str(metrics), text + '{"kind": "train", "imag']
    start = time.monotonic()
    lines = bench_end_to_end.watch(watched, metrics, count=2, seconds=30)
    assert [line["images_per_s"] for line in lines] == [1.0, 3.0]
    assert time.monotonic() - start < 20
    monkeypatch.setattr(bench_end_to_end, "TRAIN", [sys.executable, "-c", f"{script}; sys.exit(3)"])
    with pytest.raises(RuntimeError, match="2 of 3 lines .* exit status 3: the last word"):
        bench_end_to_end.watch(watched, metrics, count=3, seconds=30)
