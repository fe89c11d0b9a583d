"""pytest benchmarks/ --benchmark-only [--baselines eager,compile,rivals] [--minutes 9] [--benchmark-json FILE]"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness, tuning
from benchmarks.harness import CLOCK, DEVICE, DIRECTIONS, DTYPE, GPU, TOKENS, WIDTHS, Case, Direction, Timer

BASELINES = ("eager", "compile", "rivals")
START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--baselines", default=",".join(BASELINES), help="what to compare with, comma-separated")
    parser.addoption("--minutes", type=float, default=9.0, help="start no case after this long")
    parser.addoption("--commit", default="", help="the commit that runs, where there is no repository to ask")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """By width, whatever the file: those that the time does not reach are the least asked for. Then by shape."""

    def position(item: pytest.Function) -> tuple:
        params = item.callspec.params
        shape = WIDTHS.index(params["width"]), item.module.__name__, TOKENS.index(params["tokens"])
        return *shape, params.get("stream", ""), DIRECTIONS.index(params["direction"])

    items.sort(key=position)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=True))


def pytest_report_header() -> str:
    return f"benchmarks: {_device_name()}" + ("" if GPU else ", tiny shapes: these are CPU figures")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    machine_info["sitfast"] = {
        "device": _device_name(),
        "cpu_figures": not GPU,
        "dtype": str(DTYPE).removeprefix("torch."),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "commit": config.getoption("--commit"),
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def _device_name() -> str:
    return torch.cuda.get_device_name(DEVICE) if GPU else "CPU"


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Progress, on the terminal at once."""
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    assert reporter is not None and capture is not None

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"[{time.monotonic() - START:4.0f} s] {text}")
            reporter.flush()

    return line


@pytest.fixture(scope="session")
def timer() -> Timer:
    return Timer()


@pytest.fixture(scope="session")
def ceilings(timer: Timer) -> dict[str, float]:
    return {"bytes": timer.copy_rate(), "flops": timer.gemm_rate()}


@pytest.fixture(scope="session")
def wanted(request: pytest.FixtureRequest) -> list[str]:
    return str(request.config.getoption("--baselines")).split(",")


@pytest.fixture(scope="session")
def prepared(request: pytest.FixtureRequest, wanted: list[str], say: Callable[[str], None]) -> None:
    """Everything compiled and tuned that this run will need, of the modules that have a function `case`."""
    if not GPU:
        return
    tasks = []
    for item in request.session.items:
        assert isinstance(item, pytest.Function)
        arguments = {name: value for name, value in item.callspec.params.items() if name != "direction"}
        task = item.module.__name__, arguments
        if hasattr(item.module, "case") and task not in tasks:
            tasks.append(task)
    tuning.prepare(tasks, say, tune="compile" in wanted)


@pytest.fixture(scope="session")
def once() -> Callable[[Case, str, Callable[[], Any]], Any]:
    """once(case, what, make): made for the first direction of a shape, there for the second; checks and compilation."""
    kept: dict[Any, Any] = {}

    def get(case: Case, what: str, make: Callable[[], Any]) -> Any:
        shape = (case.kernel, case.width, case.tokens)
        if kept.get("shape") != shape:
            kept.clear()
            kept["shape"] = shape
        if what not in kept:
            kept[what] = make()
        return kept[what]

    return get


@pytest.fixture
def bench(
    benchmark,
    prepared: None,
    timer: Timer,
    ceilings: dict[str, float],
    wanted: list[str],
    once: Callable,
    say: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> Callable[[Case, Direction], None]:
    """Check the kernel, time it and its baselines, and put the columns into extra_info."""
    minutes = float(str(request.config.getoption("--minutes")))

    def run(case: Case, direction: Direction) -> None:
        title = f"{case.kernel} {direction}, D = {case.width}, N = {harness.batch(case.tokens)[1]}"
        if time.monotonic() - START > 60 * minutes:
            pytest.skip(f"--minutes {minutes:g} are over")
        torch.manual_seed(0)
        if reason := once(case, "failure", lambda: harness.failure(case.function, case)):
            say(f"{title}: FAILED, {reason}")
            pytest.fail(f"{case.kernel} is not timed, its check fails: {reason}")
        samples = harness.measure(case.function, case, direction, timer)
        median = statistics.median(samples)
        num_samples, tokens = harness.batch(case.tokens)
        info = benchmark.extra_info
        info.update(
            kernel=case.kernel,
            direction=direction,
            D=case.width,
            N=tokens,
            B=num_samples,
            median_us=1e6 * median,
            note=case.note,
            **harness.figures(case, direction, median, ceilings),
            ceilings={"copy_GBs": ceilings["bytes"] / 1e9, "gemm_TFLOPs": ceilings["flops"] / 1e12},
            rivals={},
        )
        if "eager" in wanted:
            info["x_eager"] = _times(harness.plain(case.function), case, direction) / median
        if "compile" in wanted:
            function = once(case, "compiled", lambda: harness.compiled(case.function))
            info["x_compile"] = _times(function, case, direction) / median
        for name, rival in case.rivals.items() if "rivals" in wanted else ():
            info["rivals"][name] = _against(name, rival, case, direction, median)
        against = ", ".join(f"{info[key]:.2f} x {key[2:]}" for key in ("x_eager", "x_compile") if key in info)
        others = "".join(f", {name} {times}" for name, times in info["rivals"].items())
        late = tuning.num_timed()
        say(
            f"{title}: {1e6 * median:.1f} us, {info['percent_of_ceiling']:.0f} %, {against}{others}"
            + (f" ({late} variants tuned only now)" if late else "")
        )
        CLOCK.pending_s = samples
        benchmark.group = f"{case.kernel} {direction}"
        benchmark.pedantic(CLOCK.tick, rounds=len(samples), iterations=1)

    def _times(function: harness.Function, case: Case, direction: Direction) -> float:
        return statistics.median(harness.measure(function, case, direction, timer))

    def _against(name: str, rival: harness.Rival, case: Case, direction: Direction, ours: float) -> float | str:
        """The rival's time over ours, or why it was not timed."""

        def fault() -> str | None:
            try:
                return harness.failure(rival.function, case, reference=rival.reference, repeats=False)
            except Exception as error:  # whatever another package raises is a finding about it
                return f"{type(error).__name__}: {str(error)[:200]}"

        return once(case, name, fault) or _times(rival.function, case, direction) / ours

    return run
