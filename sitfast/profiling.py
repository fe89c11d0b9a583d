"""Looking inside a step: named ranges for Nsight Systems, and a window of steps to profile.

    nsys profile --capture-range=cudaProfilerApi python -m sitfast.train … profile.start=100 profile.stop=110

records steps 100 to 109 alone; `profile.trace=true` writes them as a Chrome trace as well (chrome://tracing, Perfetto).
"""

from __future__ import annotations

import functools
from contextlib import ContextDecorator
from pathlib import Path

import nvtx
import torch

from sitfast.config import ProfileConfig
from sitfast.images import replacing


@functools.cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()


class annotate(ContextDecorator):
    """`with annotate("backward"):` or `@annotate("backward")`: an NVTX range; nothing at all where there is no CUDA.

    Inside a compiled region it vanishes as well: the range would break the graph and measure the tracing.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> annotate:
        if not torch.compiler.is_compiling() and _has_cuda():
            nvtx.push_range(self.name)
        return self

    def __exit__(self, *exc: object) -> None:
        if not torch.compiler.is_compiling() and _has_cuda():
            nvtx.pop_range()


class Window:
    """The steps from profile.start up to, not including, profile.stop. `rank` 0 alone writes the trace."""

    def __init__(self, profile: ProfileConfig, run_dir: Path, *, rank: int = 0) -> None:
        self.start, self.stop = profile.start, profile.stop
        self.trace = run_dir / "trace.json" if profile.trace and rank == 0 else None
        self.profiler: torch.profiler.profile | None = None
        self.open = False

    def step(self, step: int) -> None:
        """Call at the start of each step. A run that resumes within the window opens it there."""
        if self.start is None or self.stop is None:
            return
        inside = self.start <= step < self.stop
        if inside and not self.open:
            self._begin()
        elif self.open and not inside:
            self.close()

    def _begin(self) -> None:
        self.open = True
        if _has_cuda():
            torch.cuda.synchronize()  # the kernels of earlier steps stay outside
            torch.cuda.profiler.start()
        if self.trace is not None:
            profiler = torch.profiler.profile()  # CPU, and the GPU where there is one
            profiler.start()
            self.profiler = profiler

    def close(self) -> None:
        """End the window, if it is open, and write its trace."""
        if not self.open:
            return
        self.open = False
        if _has_cuda():
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        if self.profiler is not None and self.trace is not None:
            self.profiler.stop()
            with replacing(self.trace) as temporary:
                self.profiler.export_chrome_trace(str(temporary))
            self.profiler = None
