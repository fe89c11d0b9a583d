"""Inductor's coordinate-descent tuning of many graphs at once, before anything is timed.

Tuning a graph compiles some twenty variants of each of its kernels one after the other: a quarter of an hour for a page
of results. Here several processes tune, each other graphs, and only one at a time has the GPU while it times a variant.
What they find stays in Inductor's and Triton's caches on disk, from where the process that benchmarks takes it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

Task = tuple[str, dict[str, Any]]  # module with a function `case`, and its arguments


def take_turns(lock: Any) -> None:
    """Times the variants of a kernel only while no other process does, and compiles in this process alone."""
    import torch._inductor.config
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    torch._inductor.config.compile_threads = 1  # the processes are many already
    bench = CachingAutotuner.bench

    def alone(*args: Any, **kwargs: Any) -> float:
        with lock:
            return bench(*args, **kwargs)

    CachingAutotuner.bench = alone


@contextmanager
def share_of_kernels(index: int, count: int) -> Iterator[None]:
    """Inside, of the kernels met in order only every `count`-th is tuned, from `index` on; the others run untuned.

    With this, several processes that run the same graph tune it together.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    tune, met = CachingAutotuner.coordinate_descent_tuning, {}

    def mine(self: Any, launcher: Any, *args: Any, **kwargs: Any) -> Any:
        position = met.setdefault(self.inductor_meta.get("kernel_name"), len(met))
        return tune(self, launcher, *args, **kwargs) if position % count == index else launcher

    CachingAutotuner.coordinate_descent_tuning = mine
    try:
        yield
    finally:
        CachingAutotuner.coordinate_descent_tuning = tune


def processes(count: int | None = None) -> ProcessPoolExecutor:
    """Processes that take turns on the GPU; two fewer than cores, or as many as asked for."""
    context = multiprocessing.get_context("spawn")
    most = max(1, (os.cpu_count() or 2) - 2)
    return ProcessPoolExecutor(min(count or most, most), context, take_turns, (context.Lock(),))


def _call(task: Task, compiled: bool) -> float:
    """Run forward and backward of a case once; returns the seconds it took."""
    from benchmarks import harness

    start = time.monotonic()
    module, arguments = task
    case = importlib.import_module(module).case(**arguments)
    function = harness.compiled(case.function) if compiled else case.function
    harness.calls(function, case, "backward")(0)()
    if harness.GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return time.monotonic() - start


def prepare(tasks: list[Task], say: Callable[[str], None], *, tune: bool = True) -> None:
    """Compile the kernels of all cases, then, if `tune`, tune the compiled reference of each."""
    start = time.monotonic()
    try:
        with processes(len(tasks)) as pool:
            for what, compiled in (("compiled", False), ("tuned", True))[: 1 + tune]:
                futures = {pool.submit(_call, task, compiled): task for task in tasks}
                for done, future in enumerate(as_completed(futures), 1):
                    module, arguments = futures[future]
                    name = " ".join([module.removeprefix("benchmarks.bench_"), *map(str, arguments.values())])
                    error = future.exception()
                    took = f"{type(error).__name__}: {str(error)[:200]}" if error else f"{future.result():.0f} s"
                    say(f"{what} {done}/{len(tasks)}, {time.monotonic() - start:.0f} s: {name} ({took})")
    except BrokenProcessPool:  # the rest is then compiled and tuned where it is timed, which only takes longer
        say("a process that compiles or tunes has died; going on without them")


def num_timed() -> int:
    """How many variants this process has timed since it was asked last: none, if `prepare` has done its work."""
    from torch._dynamo.utils import counters

    return counters["inductor"].pop("coordesc_tuning_bench", 0)
