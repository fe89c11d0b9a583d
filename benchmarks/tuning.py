"""Many processes that compile and tune, one at a time on the GPU.

What takes long in a page of results is compiling: our kernels, the rivals', and above all the variants that Inductor's
coordinate descent tries of each of its kernels. That runs on all cores. What needs the GPU needs it for itself, a variant
being timed as much as a result, and is short. So each process holds the GPU (`Turn`) whenever it could use it, and gives
it up while Dynamo, Inductor or Triton compile.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Options of torch.compile for tuning in one process what another runs. Without the launcher in C++, which bundles kernels
# with the cached graph and takes them from there as they were before, where their heuristics had one setting only (torch
# 2.11); Python launches take the host longer.
TUNED: dict[str, Any] = {"coordinate_descent_tuning": True, "use_static_cuda_launcher": False}
LEAST_MS = 5e-3  # kernels below are mostly launch: no block size makes up for that


class FileLock:
    """A lock between processes that ends with the process that holds it, however that ends."""

    def __init__(self, path: Path | None = None) -> None:
        """A new lock; or, in another process, that of a path."""
        self.path = path or Path(tempfile.mkstemp(prefix="sitfast-gpu-", suffix=".lock")[1])
        self._file: int | None = None

    def acquire(self) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file

    def release(self) -> None:
        assert self._file is not None
        os.close(self._file)
        self._file = None

    def __reduce__(self) -> tuple:
        return FileLock, (self.path,)


class Turn:
    """The GPU, for one process at a time: held inside `with turn`, given up while anything compiles."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._held, self._away, self._depth = lock, False, False, 0

    def __enter__(self) -> Turn:
        self._lock.acquire()
        self._held = True
        return self

    def __exit__(self, *_: object) -> None:
        self._held = False
        self._leave()

    def begin_compiling(self, *_: object) -> None:
        self._depth += 1
        if self._held and self._depth == 1 and not _capturing():
            self._away = True
            self._leave()

    def end_compiling(self, *_: object) -> None:
        self._depth -= 1
        if self._away and self._depth == 0:
            self._away = False
            self._lock.acquire()

    def _leave(self) -> None:
        """What was queued is done, and memory that is not used given back, before anyone else begins."""
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        finally:
            self._lock.release()

    def while_compiling(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def compile(*args: Any, **kwargs: Any) -> Any:
            self.begin_compiling()
            try:
                return function(*args, **kwargs)
            finally:
                self.end_compiling()

        return compile


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, when nothing may wait."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_turn = Turn(threading.Lock())  # of a process that works alone


def take_turns(lock: FileLock) -> None:
    """In a new process: `call` holds this lock, and compilers give it up."""
    global _turn
    import torch._inductor.config
    from torch._dynamo.callback import callback_handler

    torch.set_num_threads(1)  # the processes are many already
    torch._inductor.config.compile_threads = 1
    _turn = Turn(lock)
    callback_handler.register_start_callback(_turn.begin_compiling)
    callback_handler.register_end_callback(_turn.end_compiling)
    try:
        import triton
    except ImportError:
        return
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    # Inductor, which calls triton.compile, has work of its own around it; Triton's and Gluon's JIT import the other.
    CachingAutotuner._precompile_config = _turn.while_compiling(CachingAutotuner._precompile_config)
    triton.compiler.compile = _turn.while_compiling(triton.compiler.compile)
    skip_short_kernels()


def skip_short_kernels() -> None:
    """From now on coordinate descent leaves kernels of less than LEAST_MS as they are."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    tune = CachingAutotuner.coordinate_descent_tuning

    def tune_long(self: Any, launcher: Any, *args: Any, **kwargs: Any) -> Any:
        if self.bench(launcher, *args, **kwargs) >= LEAST_MS:
            return tune(self, launcher, *args, **kwargs)
        launcher.config.found_by_coordesc = True  # or it would be asked again at every launch
        return launcher

    CachingAutotuner.coordinate_descent_tuning = tune_long


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


def processes(count: int | None = None, lock: FileLock | None = None) -> ProcessPoolExecutor:
    """Processes that take turns on the GPU, for tasks `call`; two fewer than cores, or as many as asked for.

    Those with the same lock take turns with one another.
    """
    context = multiprocessing.get_context("spawn")
    most = max(1, (os.cpu_count() or 2) - 2)
    return ProcessPoolExecutor(min(count or most, most), context, take_turns, (lock or FileLock(),))


def stop(pool: ProcessPoolExecutor, *, patience_s: float = 0.0) -> None:
    """End the processes of a pool, whatever they do; those with nothing to do may tidy up first, if that is quick."""
    running = list((pool._processes or {}).values())  # `kill_workers` only came with Python 3.14
    pool.shutdown(wait=False, cancel_futures=True)
    end = time.monotonic() + patience_s
    for process in running:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
    for process in running:
        process.join()


def call(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result, computed while this process has its turn."""
    with _turn:
        return function(*args)


def num_timed() -> int:
    """How many variants coordinate descent has timed in this process since it was asked last."""
    from torch._dynamo.utils import counters

    return counters["inductor"].pop("coordesc_tuning_bench", 0)
