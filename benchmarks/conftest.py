"""pytest benchmarks/ --benchmark-only [--baselines eager,compile,rivals] [--minutes 4.5] [--record FILE.json]"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import harness, record, runs
from benchmarks.harness import BASELINES, CLOCK, DIRECTIONS, DTYPE, GPU, TOKENS, WIDTHS, Direction

START = time.monotonic()
collect_ignore = ["bench_step.py", "bench_end_to_end.py"]  # unless named: they take longer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--baselines", default=",".join(BASELINES), help="what to compare with, comma-separated")
    parser.addoption("--minutes", type=float, default=4.5, help="what is not measured by then is left out")
    parser.addoption(
        "--processes", type=int, help="0 does all in this one; default: two fewer than cores, or 0 on CPUs"
    )
    parser.addoption("--record", type=Path, metavar="FILE.json", help="results as they come, for benchmarks.results")
    parser.addoption("--commit", default="", help="the commit that runs, where there is no repository to ask")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """By width, many tokens at the largest width alone; the rest last: the time may not reach those."""

    def position(item: pytest.Function) -> tuple:
        params = item.callspec.params
        if "direction" not in params:
            return ()
        width, tokens = WIDTHS.index(params["width"]), TOKENS.index(params["tokens"])
        place = width > 0 and tokens > 0, width, item.module.__name__, tokens
        return *place, params.get("stream", ""), DIRECTIONS.index(params["direction"])

    items.sort(key=position)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=True))


def pytest_report_header() -> str:
    return f"benchmarks: {record.device_name()}" + ("" if GPU else ", tiny shapes: these are CPU figures")


def _origin(config: pytest.Config) -> dict:
    dtype, commit = str(DTYPE).removeprefix("torch."), str(config.getoption("--commit"))
    return record.origin(" ".join(["pytest", *sys.argv[1:]]), dtype=dtype, commit=commit)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["sitfast"] = _origin(config)["machine_info"]["sitfast"]


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
def all_runs(request: pytest.FixtureRequest) -> Iterator[runs.Runs]:
    """Every case that is asked for, already begun."""
    option = request.config.getoption
    tasks: dict[runs.Task, list[Direction]] = {}
    for item in request.session.items:
        assert isinstance(item, pytest.Function)
        params = dict(item.callspec.params)
        if (direction := params.pop("direction", None)) is None:
            continue
        tasks.setdefault((item.module.__name__, tuple(sorted(params.items()))), []).append(direction)
    count = option("--processes")
    started = runs.Runs(
        tasks,
        str(option("--baselines")).split(","),
        processes=0 if count is None and not GPU else count,
        deadline_s=START + 60 * float(str(option("--minutes"))),
    )
    yield started
    started.close()


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest) -> record.Record:
    return record.Record(request.config.getoption("--record"), _origin(request.config))


@pytest.fixture
def bench(
    benchmark,
    all_runs: runs.Runs,
    recorded: record.Record,
    say: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """bench(direction, **arguments of the module's case): put what was measured of it into the reports."""

    def run(direction: Direction, **arguments: int | str) -> None:
        name = request.module.__name__
        try:
            ceilings = all_runs.ceilings()
            outcomes = all_runs.outcomes((name, tuple(sorted(arguments.items()))))
        except runs.TimeIsOver:
            pytest.skip(f"--minutes {request.config.getoption('--minutes'):g} are over")
        if isinstance(outcomes, str):
            title = " ".join([name.rpartition("bench_")[2], *map(str, arguments.values())])
            say(f"{title}: FAILED, {outcomes}")
            pytest.fail(f"{title} is not timed: {outcomes}")
        outcome = outcomes[direction]
        median = statistics.median(outcome.samples_s)
        info = benchmark.extra_info
        info.update(
            **outcome.info,
            **harness.figures(outcome.work, median, ceilings),
            ceilings={"copy_GBs": ceilings["bytes"] / 1e9, "gemm_TFLOPs": ceilings["flops"] / 1e12},
        )
        recorded.add({"extra_info": dict(info)})
        against = [f"{info[key]:.2f} x {key[2:]}" for key in ("x_eager", "x_compile") if key in info]
        against += [f"{name} {times}" for name, times in (info["rivals"] | info.get("faults", {})).items()]
        say(
            f"{info['kernel']} {direction}, D = {info['D']}, N = {info['N']}: {1e6 * median:.1f} us, "
            f"{info['percent_of_ceiling']:.0f} %, {', '.join(against)}"
        )
        CLOCK.pending_s = list(outcome.samples_s)
        benchmark.group = f"{info['kernel']} {direction}"
        benchmark.pedantic(CLOCK.tick, rounds=len(outcome.samples_s), iterations=1)

    return run
