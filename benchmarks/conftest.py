"""pytest benchmarks/ --benchmark-only [--baselines eager,compile,liger] [--minutes 9] [--benchmark-json FILE]"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import CLOCK, DEVICE, DTYPE, GPU, WIDTHS, Case, Direction, Timer

BASELINES = ("eager", "compile", "liger")
START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--baselines", default=",".join(BASELINES), help="what to compare with, comma-separated")
    parser.addoption("--minutes", type=float, default=9.0, help="start no case after this long")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """The widths in their order, whatever the file: those that the time does not reach are the least asked for."""
    items.sort(key=lambda item: WIDTHS.index(item.callspec.params["width"]))
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
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def _device_name() -> str:
    return torch.cuda.get_device_name(DEVICE) if GPU else "CPU"


@pytest.fixture(scope="session")
def timer() -> Timer:
    return Timer()


@pytest.fixture(scope="session")
def ceilings(timer: Timer) -> dict[str, float]:
    return {"bytes": timer.copy_rate(), "flops": timer.gemm_rate()}


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
    benchmark, timer: Timer, ceilings: dict[str, float], once: Callable, request: pytest.FixtureRequest
) -> Callable[[Case, Direction], None]:
    """Check the kernel, time it and its baselines, and put the columns into extra_info."""
    wanted = str(request.config.getoption("--baselines")).split(",")
    minutes = float(str(request.config.getoption("--minutes")))

    def run(case: Case, direction: Direction) -> None:
        if time.monotonic() - START > 60 * minutes:
            pytest.skip(f"--minutes {minutes:g} are over")
        torch.manual_seed(0)
        if reason := once(case, "failure", lambda: harness.failure(case.function, case)):
            pytest.fail(f"{case.kernel} is not timed, its check fails: {reason}")
        samples = harness.measure(case.function, case, direction, timer)
        median = statistics.median(samples)
        samples_shape = harness.batch(case.tokens)
        benchmark.extra_info.update(
            kernel=case.kernel,
            direction=direction,
            D=case.width,
            N=samples_shape[1],
            B=samples_shape[0],
            median_us=1e6 * median,
            **harness.figures(case, direction, median, ceilings),
            ceilings={"copy_GBs": ceilings["bytes"] / 1e9, "gemm_TFLOPs": ceilings["flops"] / 1e12},
        )
        for name, make in {
            "eager": lambda: harness.plain(case.function),
            "compile": lambda: once(case, "compiled", lambda: harness.compiled(case.function)),
            "liger": lambda: case.liger,
        }.items():
            if name in wanted and (function := make()) is not None:
                benchmark.extra_info.update(_against(name, function, case, direction, median))
        CLOCK.pending_s = samples
        benchmark.group = f"{case.kernel} {direction}"
        benchmark.pedantic(CLOCK.tick, rounds=len(samples), iterations=1)

    def _against(name: str, function: harness.Function, case: Case, direction: Direction, ours: float) -> dict:
        if name == "liger" and (reason := once(case, name, lambda: harness.failure(function, case))):
            return {f"{name}_note": reason}
        theirs = statistics.median(harness.measure(function, case, direction, timer))
        return {f"{name}_us": 1e6 * theirs, f"x_{name}": theirs / ours}

    return run
