"""Looking inside a step: named ranges, a window of steps to profile, and where the time of a trace goes.

    nsys profile --capture-range=cudaProfilerApi python -m sitfast.train … profile.start=100 profile.stop=110

records steps 100 to 109 alone; `profile.trace=true` writes them as a Chrome trace as well (chrome://tracing, Perfetto).
`python -m sitfast.profile` builds a run, profiles a few of its steps and prints the table that `summarize` makes.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ContextDecorator, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nvtx
import torch
from torch import nn

from sitfast.config import ProfileConfig
from sitfast.images import replacing

RANGES = ("data", "encode", "interpolate", "forward", "backward", "clip_optimizer_ema")  # of a step, one after another


@functools.cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()


class annotate(ContextDecorator):
    """`with annotate("backward"):` or `@annotate("backward")`: an NVTX range; nothing at all where there is no CUDA.

    Inside `traced` it is a range of that trace instead, on the CPU too. Inside a compiled region it vanishes: it would
    break the graph and measure the tracing.
    """

    traced = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._end: Callable[[], Any] | None = None

    def _recreate_cm(self) -> annotate:
        return annotate(self.name)  # as a decorator: one for each call

    def __enter__(self) -> annotate:
        if not torch.compiler.is_compiling():
            if annotate.traced:
                function = torch.profiler.record_function(self.name)
                function.__enter__()
                self._end = functools.partial(function.__exit__, None, None, None)
            elif _has_cuda():
                nvtx.push_range(self.name)
                self._end = nvtx.pop_range
        return self

    def __exit__(self, *exc: object) -> None:
        if not torch.compiler.is_compiling() and self._end is not None:
            self._end()


@contextmanager
def traced(path: Path, **options: Any) -> Iterator[torch.profiler.profile]:
    """torch.profiler with our ranges, CPU and GPU; afterwards its Chrome trace is in `path`."""
    with torch.profiler.profile(**options) as profiler:
        annotate.traced = True
        try:
            yield profiler
        finally:
            annotate.traced = False
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))


@contextmanager
def named_blocks(network: nn.Module) -> Iterator[None]:
    """Inside, the forward call of `blocks.7` is a range `block 7`, around the compiled function, not in it."""
    blocks: Any = {name: module for name, module in network.named_modules() if re.search(r"(^|\.)blocks\.\d+$", name)}
    before = {name: block._compiled_call_impl for name, block in blocks.items()}
    for name, block in blocks.items():
        block._compiled_call_impl = annotate(f"block {name.rpartition('.')[2]}")(before[name] or block._call_impl)
    try:
        yield
    finally:
        for name, block in blocks.items():
            block._compiled_call_impl = before[name]


class Window:
    """The steps from profile.start up to, not including, profile.stop. `rank` 0 alone writes the trace.

    Inside, the blocks of `network` are ranges, and with profile.operators every operator is one, in backward too.
    """

    def __init__(
        self, profile: ProfileConfig, run_dir: Path, *, rank: int = 0, network: nn.Module | None = None
    ) -> None:
        self.start, self.stop, self.operators = profile.start, profile.stop, profile.operators
        self.trace = run_dir / "trace.json" if profile.trace and rank == 0 else None
        self.network = network
        self.open = False
        self._inside = ExitStack()

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
            self._inside.callback(torch.cuda.profiler.stop)
            self._inside.callback(torch.cuda.synchronize)
            if self.operators:
                self._inside.enter_context(torch.autograd.profiler.emit_nvtx())
        if self.trace is not None:
            self._inside.enter_context(traced(self.trace))
        if self.network is not None:
            self._inside.enter_context(named_blocks(self.network))

    def close(self) -> None:
        """End the window, if it is open, and write its trace."""
        self.open = False
        self._inside.close()


# -------------------------------------------------------------------------------------------- where the time goes

OTHER = "copies, elementwise"
# The first that matches a kernel's or an operator's name counts. Names alone: a replayed CUDA graph has no operators.
_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("communication", r"(?i)nccl|c10d::|gloo|nvshmem"),
        # inductor's pointwise kernels and sums have the names of what they follow (addmm, convolution) in theirs
        (OTHER, r"^triton_(?!tem_|mm)|^Mem(cpy|set) "),
        ("update", r"sitfast::.*\b(square|norm|scalars|update)_kernel|multi_tensor_apply_kernel(?!.*[Cc]opy)"),
        ("update", r"sitfast::(adamw_ema|average|gradient_norm|adamw|norm)|aten::_(fused_adam|foreach_(?!copy))"),
        ("attention", r"(?i)attention|fmha|flash|sdpa|dotproduct|cudnn::fusion::(compute_dot_do_o|convert_dq)"),
        ("attention", r"^(forward|backward|single|queries|keys)_kernel$"),
        ("convolution", r"(?i)fprop|dgrad|wgrad|implicit|convol|conv[123]d|winograd|nchwToNhwc|nhwcToNchw"),
        ("GEMM", r"(?i)gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|^triton_(tem_|mm)"),
        ("GEMM", r"^dgelu_kernel$|^sitfast::(linear|mlp)|^aten::(addmm|mm|bmm|baddbmm|matmul|linear)$"),
        (
            "fused",
            r"sitfast::|^(layernorm|qk_norm_rope|sum_chunks|sum_samples)_|^_(forward|backward|column_sums)_kernel$",
        ),
    )
)
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name: str) -> str:
    """What a kernel of a GPU, or an operator on a CPU, is for: GEMM, attention, fused, update, communication, …"""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), OTHER)


@dataclass(frozen=True)
class Kernel:
    """All launches of a kernel, or calls of an operator, in a step."""

    name: str
    kind: str
    ms: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """A step, averaged over the profiled ones: from the start of its first kernel to the end of its last."""

    gpu: bool  # or else operators on the CPU, without those that they call
    step_ms: float
    busy_ms: float  # at least one kernel runs; the rest are gaps
    kernels: tuple[Kernel, ...]  # the longest first
    host: Mapping[str, float]  # ms of the host in each of `RANGES` that occurs

    def kinds(self) -> dict[str, Kernel]:
        """kind → its kernels as one, the longest first. Together they are longer than busy_ms where streams overlap."""
        sums: dict[str, Kernel] = {}
        for kernel in self.kernels:
            kind = sums.get(kernel.kind, Kernel(kernel.kind, kernel.kind, 0.0, 0.0))
            sums[kernel.kind] = replace(kind, ms=kind.ms + kernel.ms, calls=kind.calls + kernel.calls)
        return dict(sorted(sums.items(), key=lambda item: -item[1].ms))


def summarize(trace_events: Iterable[Mapping[str, Any]], steps: int) -> Profile:
    """Where the time goes in the `traceEvents` of a Chrome trace that torch.profiler wrote of `steps` steps.

    Kernels where the trace has any; else the CPU's operators, each without the time of those that it calls.
    """
    events = [event for event in trace_events if event.get("ph") == "X"]
    found = [(e["name"], e["ts"], e["ts"] + e["dur"], e["dur"]) for e in events if e.get("cat") in _ON_GPU]
    gpu = bool(found)
    found = found or _operators([event for event in events if event.get("cat") == "cpu_op"])
    found.sort(key=lambda call: call[1])
    scale = 1e-3 / steps  # µs of all to ms of one
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    end = found[0][1] if found else 0.0
    busy, begin = 0.0, end
    for name, first, last, us in found:
        totals[name][0] += us * scale
        totals[name][1] += 1 / steps
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    kernels = [Kernel(name, kind_of(name), ms, calls) for name, (ms, calls) in totals.items()]
    host: dict[str, float] = dict.fromkeys(RANGES, 0.0)
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in host:
            host[event["name"]] += event["dur"] * scale
    return Profile(
        gpu=gpu,
        step_ms=(end - begin) * scale,
        busy_ms=busy * scale,
        kernels=tuple(sorted(kernels, key=lambda kernel: -kernel.ms)),
        host={name: ms for name, ms in host.items() if ms},
    )


def _operators(events: list[Mapping[str, Any]]) -> list[tuple[str, float, float, float]]:
    """(name, start, end, µs without inner operators) of each operator."""
    calls: list[list[Any]] = []
    outer: dict[Any, list[list[Any]]] = defaultdict(list)  # the operators that a thread is inside
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack, first, us = outer[event["tid"]], event["ts"], event["dur"]
        while stack and stack[-1][2] <= first:
            stack.pop()
        if stack:
            stack[-1][3] -= us
        stack.append([event["name"], first, first + us, us])
        calls.append(stack[-1])
    return [(name, first, last, us) for name, first, last, us in calls]
