import copy
import json
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_parity, harness, record, results, runs, tuning
from sitfast.model import build_model


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
    assert in_time.outcomes(task("error")) == "ValueError: no such thing"
    late = runs.Runs(tasks, [], processes=0, deadline_s=time.monotonic() - 1)
    with pytest.raises(runs.TimeIsOver):
        late.outcomes(task("square"))


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
        assert written["benchmarks"][-1] == entry(width, "forward")
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
