"""How a kernel is timed here, and when it is not.

    check   output and every gradient against the reference in wider arithmetic, in memory that held NaN, and the same
            bits twice: max|out − exact| ≤ 2 max|eager − exact| + atol. A kernel that fails is not timed.
    time    CUDA events around one call; before each the L2 is overwritten and the device kept busy until the launches
            are queued: where the host was too late for that, the call is not counted and the device kept busy for
            longer. Inputs rotate among several random sets. The median counts.

Without a GPU the shapes are tiny and the clock is the host's: such figures say nothing about speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from benchmarks import tuning
from sitfast.data.sampler import BlockOrder
from sitfast.kernels import use_reference

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
WIDTHS, TOKENS = (1152, 768, 1024, 384), (256, 1024)  # SiT-XL, B, L, S
ROWS = 32768 if GPU else 0  # tokens of a batch, for every N; the CPU takes one sample of CPU_TOKENS
CPU_TOKENS = {256: 8, 1024: 16}
REPEATS, NUM_SETS, FLUSH_BYTES, BUSY_CYCLES = (30, 4, 256 << 20, 500_000) if GPU else (5, 2, 0, 0)
MAX_BUSY_CYCLES = 200_000_000  # a tenth of a second

NUM_CLASSES, CHANNELS = 1000, 4  # of latents

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
BASELINES = ("eager", "compile", "rivals")
Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Work:
    """What a kernel must do at the least: the larger of the two times is its floor."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Rival:
    """Another package's kernel on the same inputs. With a `reference` it does only that part of our kernel's work."""

    function: Function
    reference: Function | None = None


@dataclass
class Case:
    """One kernel at one shape. `draw` makes one set of inputs, all of which learn."""

    kernel: str
    width: int
    tokens: int
    function: Function
    draw: Callable[[], tuple[Tensor, ...]]
    forward: Work
    backward: Work
    rivals: dict[str, Rival] = field(default_factory=dict)
    note: str | None = None  # on the default at this shape, where the kernel is not it


@dataclass
class Outcome:
    """What was measured of a case in one direction; `info` are columns of the results page."""

    samples_s: list[float]
    work: Work
    info: dict[str, Any]


def shapes(names: str = "tokens", values: Sequence[Any] = TOKENS) -> Callable[[Callable], Callable]:
    """Parametrize a benchmark over directions, tokens (or whatever `names` and `values` say) and widths."""

    def decorate(test: Callable) -> Callable:
        test = pytest.mark.parametrize("width", WIDTHS)(test)
        test = pytest.mark.parametrize(names, values)(test)
        return pytest.mark.parametrize("direction", DIRECTIONS)(test)

    return decorate


def batch(tokens: int) -> tuple[int, int]:
    """(samples, tokens a sample)"""
    return (ROWS // tokens, tokens) if GPU else (1, CPU_TOKENS[tokens])


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def plain(function: Function) -> Function:
    """The kernel's PyTorch reference."""

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with use_reference():
            return function(*inputs)

    return run


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def gradients(function: Function, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of all inputs for the loss Σ weight · output."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = tensors(function(*leaves))
    grads = torch.autograd.grad(
        outputs, leaves, [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)], materialize_grads=True
    )
    return [*(output.detach() for output in outputs), *grads]


def failure(function: Function, case: Case, *, reference: Function | None = None, repeats: bool = True) -> str | None:
    """Why the function may not be timed; None if nothing speaks against it. `repeats` asks for the same bits twice."""
    inputs = case.draw()
    reference = reference or plain(case.function)
    with torch.no_grad():
        weights = [torch.randn_like(output) for output in tensors(reference(*inputs))]
    eager = gradients(reference, inputs, weights)
    wide = [value.double() if value.dtype == torch.float32 else value.float() for value in inputs]
    exact = gradients(reference, wide, weights)
    del wide
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
        got = gradients(function, inputs, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    again = gradients(function, inputs, weights)
    for position, (ours, theirs, truth, repeat) in enumerate(zip(got, eager, exact, again, strict=True)):
        error, allowed = (ours - truth).abs().max().item(), 2 * (theirs - truth).abs().max().item()
        allowed += 1e-6 * truth.abs().max().item()
        if not error <= allowed:
            return f"result {position} is off by {error:.3g}, allowed {allowed:.3g}"
        if repeats and not torch.equal(ours, repeat):
            return f"result {position} differs from run to run"
    return None


class RandomLatents:
    """Random latents `[4, size, size]` that cost nothing to read, up to `batch` at a time: a source for the Trainer."""

    num_rows, num_classes, channels, class_names = 1 << 20, NUM_CLASSES, CHANNELS, ()

    def __init__(self, size: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image_size = size
        self._x = torch.randn(batch, CHANNELS, size, size, generator=generator)
        self._y = torch.randint(0, NUM_CLASSES, (batch,), generator=generator)

    def load(self, row: int) -> tuple[Tensor, int]:
        place = row % len(self._x)
        return self._x[place], int(self._y[place])

    def order(self, num_rows: int, seed: int) -> BlockOrder:
        return BlockOrder(num_rows, seed, block=4096, window=65536)

    def gather(self, rows: Sequence[int], mirrored: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._x[: len(rows)], self._y[: len(rows)]

    def read_ahead(self, rows: Sequence[int]) -> None:
        pass


class DeviceClock:
    """Hands measured durations to pytest-benchmark: each call of `tick` lets the next one pass."""

    def __init__(self) -> None:
        self.now_s, self.pending_s = 0.0, []

    def __call__(self) -> float:
        return self.now_s

    def tick(self) -> None:
        self.now_s += self.pending_s.pop(0)


CLOCK = DeviceClock()


class Timer:
    """Times prepared calls; holds the buffer that overwrites the L2."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)

    def samples_s(self, prepare: Callable[[int], Callable[[], object]], repeats: int = REPEATS) -> list[float]:
        """Seconds of each of `repeats` calls; `prepare(i)`, not timed, returns the call on input set i."""
        for index in range(3 if GPU else 1):
            prepare(index % NUM_SETS)()
        return (self._on_device if GPU else self._on_host)(prepare, repeats)

    def _on_device(self, prepare: Callable[[int], Callable[[], object]], repeats: int) -> list[float]:
        events, busy = [], BUSY_CYCLES
        while len(events) < repeats:
            run = prepare(len(events) % NUM_SETS)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            torch.cuda._sleep(busy)
            start.record()
            run()
            end.record()
            if not start.query():  # still busy, and all is queued: nothing between the events waits for the host
                events.append((start, end))
            elif (busy := 2 * busy) > MAX_BUSY_CYCLES:
                raise RuntimeError("the host takes too long to queue this call, or waits for the device in it")
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    @staticmethod
    def _on_host(prepare: Callable[[int], Callable[[], object]], repeats: int) -> list[float]:
        samples = []
        for index in range(repeats):
            run = prepare(index % NUM_SETS)
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return samples

    def copy_rate(self) -> float:
        """Bytes a second of a large copy, those read and those written."""
        source = torch.randn((512 << 20) // 4 if GPU else 1 << 20, device=DEVICE)
        target = torch.empty_like(source)
        return 2 * source.nbytes / statistics.median(self.samples_s(lambda _: lambda: target.copy_(source)))

    def gemm_rate(self) -> float:
        """Operations a second of a large GEMM."""
        size = 8192 if GPU else 256
        left, right = draw(size, size), draw(size, size)
        return 2 * size**3 / statistics.median(self.samples_s(lambda _: lambda: left @ right))


def calls(function: Function, case: Case, direction: Direction) -> Callable[[int], Callable[[], object]]:
    """`prepare` of a Timer. Forward keeps what backward needs; backward starts from a fresh graph each time."""
    sets = [[value.requires_grad_() for value in case.draw()] for _ in range(NUM_SETS)]
    weights = [torch.randn_like(output) for output in tensors(function(*sets[0]))]

    def prepare(index: int) -> Callable[[], object]:
        leaves = sets[index]
        if direction == "forward":
            return lambda: function(*leaves)
        outputs = tensors(function(*leaves))
        return lambda: torch.autograd.grad(outputs, leaves, weights, allow_unused=True)

    return prepare


def measure(function: Function, case: Case, direction: Direction, timer: Timer) -> list[float]:
    """Seconds of each timed call."""
    return timer.samples_s(calls(function, case, direction))


def compiled(function: Function) -> Function:
    """torch.compile at its best: fixed shapes, and coordinate descent over the launch settings of each kernel it makes.

    Tuned are block sizes and warps of its pointwise kernels and reductions, where one takes `tuning.LEAST_MS` or more. GEMMs
    are cuBLAS's and attention is that of scaled_dot_product_attention, which have nothing to tune.
    """
    torch._dynamo.reset()
    options: dict[str, Any] = {"coordinate_descent_tuning": True} if GPU else {}
    return torch.compile(plain(function), fullgraph=True, dynamic=False, options=options)


def compare(case: Case, directions: Sequence[Direction], wanted: Sequence[str]) -> dict[Direction, Outcome] | str:
    """The kernel checked, then timed against what is `wanted` of BASELINES; or why it is not timed."""
    torch.manual_seed(0)
    if reason := failure(case.function, case):
        return reason
    tuning.num_timed()
    timer, others = Timer(), dict[str, Function]()
    if "eager" in wanted:
        others["eager"] = plain(case.function)
    if "compile" in wanted:
        others["compile"] = compiled(case.function)
    rivals = case.rivals if "rivals" in wanted else {}
    faults = {name: _fault(rival, case) for name, rival in rivals.items()}
    results: dict[Direction, Outcome] = {}
    for direction in directions:
        samples = measure(case.function, case, direction, timer)
        median = statistics.median(samples)

        def times(function: Function, direction: Direction = direction, median: float = median) -> float | str:
            try:
                return statistics.median(measure(function, case, direction, timer)) / median
            except RuntimeError as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

        num_samples, tokens = batch(case.tokens)
        info: dict[str, Any] = {
            "kernel": case.kernel,
            "direction": direction,
            "D": case.width,
            "N": tokens,
            "B": num_samples,
            "median_us": 1e6 * median,
            "note": case.note,
            "faults": {},  # baselines that could not be timed, and why
        }
        for name, function in others.items():
            result = times(function)
            info |= {"faults": {**info["faults"], name: result}} if isinstance(result, str) else {f"x_{name}": result}
        info["rivals"] = {name: faults[name] or times(rival.function) for name, rival in rivals.items()}
        info["variants"] = tuning.num_timed()
        results[direction] = Outcome(samples, case.forward if direction == "forward" else case.backward, info)
    return results


def _fault(rival: Rival, case: Case) -> str | None:
    try:
        return failure(rival.function, case, reference=rival.reference, repeats=False)
    except Exception as error:  # whatever another package raises is a finding about it
        return f"{type(error).__name__}: {str(error)[:200]}"


def figures(work: Work, seconds: float, ceilings: dict[str, float]) -> dict[str, float | str]:
    """Rate, and share of the ceiling, in the unit that bounds the kernel: bytes of a copy or operations of a GEMM."""
    moves = work.bytes / ceilings["bytes"] >= work.flops / ceilings["flops"]
    rate = (work.bytes if moves else work.flops) / seconds
    return {
        "rate": rate / (1e9 if moves else 1e12),
        "unit": "GB/s" if moves else "TFLOP/s",
        "percent_of_ceiling": 100 * rate / ceilings["bytes" if moves else "flops"],
    }
