"""The feed-forward branch measured piece by piece on one GPU: python -m benchmarks.gpu_mlp [--seconds 150]

The ways to make what is between the GEMMs beside plain ones, then `mlp` itself, forward and backward through autograd, against
eager and torch.compile, with its time beyond six plain GEMMs. What fails its check is not timed. Milliseconds: medians
with L2 flushed and a pause before each run, and after a slash "hot", the mean of runs back to back under a load of half
a second, where the power limit has lowered the clock as it does in a model. "host" is what the CPU needs to queue a call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from unittest import mock

import torch
import triton

from sitfast.kernels import cublaslt, gelu, gemm_gelu
from sitfast.kernels.mlp import mlp, reference

implementation = import_module("sitfast.kernels.mlp")
ROWS = 32768
MAIN_WIDTH = 1152  # measured in every way, the others in brief
DEVICE, DTYPE = "cuda", torch.bfloat16
START = time.monotonic()
Run = Callable[[], object]


LAYERS = 28  # back to back
QUEUE_CYCLES = 1_000_000  # the device is kept busy for half a millisecond while the host queues a run, or for longer


def median_ms(run: Run, *, warmup: int = 3, repeats: int = 15) -> float:
    """Median on the device: a run whose start it reached before all of it was queued does not count."""
    for _ in range(warmup):
        run()
    pairs, cycles = [], QUEUE_CYCLES
    while len(pairs) < repeats:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        FLUSH.zero_()
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        if start.query():
            cycles *= 2
        else:
            pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def hot_ms(run: Run, *, load_s: float = 0.5) -> float:
    """Mean of `LAYERS` runs back to back, the last of `load_s` seconds of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin, ms = time.monotonic(), 0.0
    while time.monotonic() - begin < load_s:
        start.record()
        for _ in range(LAYERS):
            run()
        end.record()
        end.synchronize()
        ms = start.elapsed_time(end) / LAYERS
    return ms


def host_ms(run: Run, *, repeats: int = 20) -> float:
    """Median time until a call returns, with an idle device before it."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


FLUSH = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if torch.cuda.is_available() else torch.empty(0)


def left(seconds: float) -> bool:
    return time.monotonic() - START < seconds


def attempt(run: Callable[[], str | None]) -> str:
    """The result, or the error."""
    try:
        return run() or ""
    except Exception as error:
        return f"{type(error).__name__} {str(error).splitlines()[0][:60] if str(error) else ''}"


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def checked_ms(run: Callable[[], tuple], expected: tuple, bound: float = 6e-3) -> str:
    """Median of a call whose results agree with the expected ones (2^-9 is one rounding to bf16) and repeat."""
    got, again = run(), run()
    error = max(relative(g, e) for g, e in zip(got, expected, strict=True))
    if not error < bound:
        return f"WRONG {error:.1e}"
    if not all(torch.equal(g, a) for g, a in zip(got, again, strict=True)):
        return "CHANGES"
    del got, again
    return f"{median_ms(run):.3f}/{hot_ms(run, load_s=0.2):.3f}"


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def operands(rows: int, width: int, hidden: int) -> tuple[torch.Tensor, ...]:
    """x, w1, b1, w2, b2, dy."""
    return (
        draw(rows, width),
        draw(hidden, width, scale=width**-0.5),
        draw(hidden),
        draw(width, hidden, scale=hidden**-0.5),
        draw(width),
        draw(rows, width),
    )


def six_gemms(x, w1, b1, w2, b2, dy) -> Run:
    u = torch.addmm(b1, x, w1.t())
    outs = [torch.empty_like(t) for t in (u, dy, u, w2, w1, x)]

    def run() -> None:
        torch.addmm(b1, x, w1.t(), out=outs[0])
        torch.addmm(b2, u, w2.t(), out=outs[1])
        torch.mm(dy, w2, out=outs[2])
        torch.mm(dy.t(), u, out=outs[3])
        torch.mm(u.t(), x, out=outs[4])
        torch.mm(u, w1, out=outs[5])

    return run


def exact_pieces(x, w1, b1, w2, dy) -> tuple[torch.Tensor, ...]:
    """u, a, du, db1 with fp32 between the GEMMs."""
    u = torch.addmm(b1, x, w1.t())
    a = torch.nn.functional.gelu(u.float(), approximate="tanh").to(DTYPE)
    du = torch.ops.aten.gelu_backward((dy @ w2).float(), u.float(), approximate="tanh")
    return u, a, du.to(DTYPE), du.sum(0).to(DTYPE)


def pieces(x, w1, b1, w2, dy) -> None:
    """Each way to make (u, a) and (du, db1[, a])."""
    u, a, du, db1 = exact_pieces(x, w1, b1, w2, dy)
    plain = [f"{median_ms(run):.3f}/{hot_ms(run, load_s=0.2):.3f}"
             for run in (lambda: torch.addmm(b1, x, w1.t()), lambda: dy @ w2)]  # fmt: skip
    print(f"D={x.shape[1]}: plain GEMMs: fc1 {plain[0]}, da {plain[1]}; copy of u {median_ms(u.clone):.3f}; column sums of dy "
          f"{median_ms(lambda: gelu.column_sums(dy, DTYPE)):.3f}, torch {median_ms(lambda: dy.sum(0)):.3f}")  # fmt: skip

    def in_two_passes() -> tuple:
        u = torch.addmm(b1, x, w1.t())
        return u, gelu.gelu(u)

    def pointwise(with_a: bool) -> tuple:
        return gelu.gelu_backward_(dy @ w2, u, with_activation=with_a)[:: 1 if with_a else 2]

    def in_triton(with_a: bool) -> tuple:
        return gemm_gelu.gemm_dgelu(dy, w2, u, with_activation=with_a)[:: 1 if with_a else 2]

    def forward_in_gluon() -> tuple:
        from sitfast.kernels import _gemm_gluon  # here, since Gluon may fail to load

        return _gemm_gluon.gemm_gelu(x, w1, b1)

    def in_gluon(with_a: bool) -> tuple:
        from sitfast.kernels import _gemm_gluon

        return _gemm_gluon.gemm_dgelu(dy, w2, u, with_activation=with_a)[:: 1 if with_a else 2]

    ways = {
        "pointwise": (in_two_passes, pointwise),
        "cublaslt | triton": (partial(cublaslt.gelu_aux_bias, x, w1, b1), in_triton),
        "gluon": (forward_in_gluon, in_gluon),
    }
    print("  forward | backward | backward with a")
    for name, (forward, backward) in ways.items():
        parts = [attempt(lambda: checked_ms(forward, (u, a)))]  # noqa: B023
        parts.append(attempt(lambda: checked_ms(partial(backward, False), (du, db1))))  # noqa: B023
        parts.append(attempt(lambda: checked_ms(partial(backward, True), (du, a, db1))))  # noqa: B023
        print(f"    {name}: " + " | ".join(parts), flush=True)


def through_autograd(function: Callable, values: tuple[torch.Tensor, ...], dy: torch.Tensor) -> Callable[[], tuple]:
    leaves = [value.detach().clone().requires_grad_() for value in values]

    def run() -> tuple:
        y = function(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)))

    return run


def without_bias(x, w1, b1, w2):
    return reference(x, w1, b1, w2, None)


def fused(x, w1, b1, w2, b2=None, save="preact"):
    """The kernels at every width."""
    return implementation.fused(x, w1, b1, w2, b2, save)


def whole(width: int, seconds: float, *, brief: bool = False) -> None:
    """Forward and backward of the branch, by the calibrated rule: error over twice the error of eager must be ≤ 1."""
    *values, dy = operands(ROWS, width, 4 * width)
    x, w1, b1, w2, b2 = values
    gemms = six_gemms(x, w1, b1, w2, b2, dy)
    cold_six, hot_six = median_ms(gemms), hot_ms(gemms)
    print(f"D={width}: six GEMMs {cold_six:.3f}/{hot_six:.3f}; beyond them (error ratio) [peak MiB]", flush=True)
    for biased in (False,) if brief else (False, True):
        used = tuple(values[: 4 + biased])
        plain = reference if biased else without_bias
        exact = through_autograd(plain, tuple(value.float() for value in used), dy)()
        allowed = [
            2 * (g.float() - e).abs().max() for g, e in zip(through_autograd(plain, used, dy)(), exact, strict=True)
        ]

        def measure(function: Callable) -> str:
            run = through_autograd(function, used, dy)  # noqa: B023
            got = run()
            ratio = max(
                ((g.float() - e).abs().max() / limit).item()
                for g, e, limit in zip(got, exact, allowed, strict=True)  # noqa: B023
            )
            repeats = all(torch.equal(g, a) for g, a in zip(got, run(), strict=True))
            del got
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            cold, hot = median_ms(run, repeats=11), hot_ms(run)
            peak = (torch.cuda.max_memory_allocated() - before) >> 20
            return (f"{cold - cold_six:+.3f}/{hot - hot_six:+.3f} ({ratio:.2f}{'' if repeats else ' CHANGES'}) [{peak}] "
                    f"host {host_ms(run):.2f}")  # fmt: skip

        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        ways = {"kernels preact": fused, "kernels both": partial(fused, save="both"), "compile": compiled(plain)}
        if not brief:
            ways |= {"eager": plain, "mlp compiled": compiled(mlp)}
        if not brief and not biased:
            ways["compile tuned"] = compiled(plain, options={"coordinate_descent_tuning": True})
        print(f"  b2 {'given' if biased else 'None'}")
        for name, function in ways.items():
            torch._dynamo.reset()
            if left(seconds):
                print(f"    {name}: {attempt(partial(measure, function))}", flush=True)
        others = () if biased else (("cublaslt", "gluon"), ("cublaslt", "triton"), ("pointwise", "pointwise"))
        for first, second in others:
            with (
                mock.patch.object(implementation, "choose_forward", lambda *_, how=first: how),
                mock.patch.object(implementation, "choose_backward", lambda *_, how=second: how),
            ):
                if left(seconds):
                    print(f"    {first} + {second}: {attempt(partial(measure, fused))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="start nothing new after this long")
    parser.add_argument("--widths", type=int, nargs="+", default=[MAIN_WIDTH, 384, 768, 1024])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_properties(0).name
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, bf16, {ROWS} rows, H = 4 D")
    for width in args.widths:
        if left(args.seconds):
            x, w1, b1, w2, _, dy = operands(ROWS, width, 4 * width)
            print(attempt(lambda: pieces(x, w1, b1, w2, dy)))  # noqa: B023
            del x, w1, b1, w2, dy
            print(attempt(lambda: whole(width, args.seconds, brief=width != MAIN_WIDTH)))  # noqa: B023
    print(f"done in {time.monotonic() - START:.0f} s")


if __name__ == "__main__":
    main()
