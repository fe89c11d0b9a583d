"""The cases of a run, each compiled, checked and timed by one process from start to end, several at once."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TimeIsOver  # another than the built-in before Python 3.11
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from benchmarks import harness, tuning
from benchmarks.harness import Direction, Outcome

MAX_RESTARTS = 2
_unusable = False  # an error has taken this process's CUDA context with it

Task = tuple[str, tuple[tuple[str, Any], ...]]  # module, and the arguments of its function `case` or `compare`
Outcomes = dict[Direction, Outcome] | str  # or why nothing was timed


def ceilings() -> dict[str, float]:
    """Rates of a large copy and of a large GEMM, in bytes and operations a second."""
    timer = harness.Timer()
    return {"bytes": timer.copy_rate(), "flops": timer.gemm_rate()}


def outcomes(task: Task, directions: Sequence[Direction], wanted: Sequence[str]) -> Outcomes:
    global _unusable
    if _unusable:
        os._exit(1)  # the task is not lost: `Runs` starts new processes
    name, arguments = task
    module = importlib.import_module(name)
    try:
        if hasattr(module, "compare"):
            return module.compare(directions, wanted, **dict(arguments))
        return harness.compare(module.case(**dict(arguments)), directions, wanted)
    except Exception as error:
        _unusable = _is_unusable()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _is_unusable() -> bool:
    try:
        if harness.GPU:
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Runs:
    """Results of tasks, in processes or, with none, in this one when asked for; in the order of the tasks.

    A process that dies takes the others with it: what is not done by then is done again by new ones.
    """

    def __init__(
        self, tasks: dict[Task, list[Direction]], wanted: Sequence[str], *, processes: int | None, deadline_s: float
    ) -> None:
        self._tasks, self._wanted, self._count, self._deadline = tasks, wanted, processes, deadline_s
        self._restarts, self._pool = 0, None
        self._futures: dict[Task | None, Future] = {}
        self._results: dict[Task | None, Any] = {}
        if processes != 0:
            self._start()

    def _start(self) -> None:
        self._pool = tuning.processes(self._count)
        for task in (None, *self._tasks):
            done = self._futures.get(task)
            if done is None or not done.done() or done.exception() is not None:
                self._futures[task] = self._pool.submit(tuning.call, *self._job(task))

    def _job(self, task: Task | None) -> tuple:
        return (ceilings,) if task is None else (outcomes, task, self._tasks[task], self._wanted)

    def ceilings(self) -> dict[str, float]:
        return self._result(None)

    def outcomes(self, task: Task) -> Outcomes:
        return self._result(task)

    def _result(self, task: Task | None) -> Any:
        """TimeIsOver if it is not there by then."""
        left = self._deadline - time.monotonic()
        if self._pool is None:
            if task not in self._results:
                if left < 0:
                    raise TimeIsOver
                self._results[task] = tuning.call(*self._job(task))
            return self._results[task]
        try:
            return self._futures[task].result(max(0.0, left))
        except BrokenProcessPool:
            if self._restarts == MAX_RESTARTS or left < 0:
                raise
            self._restarts += 1
            self._start()
            return self._result(task)

    def close(self) -> None:
        """End the processes, whatever they do."""
        if self._pool is not None:
            tuning.stop(self._pool)
