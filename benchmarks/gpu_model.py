"""Forward and backward of a whole SiT-XL/2, blocks compiled, with the kernels and without: python -m benchmarks.gpu_model

    kernels     this package's kernels, torch.compile(fullgraph=True) around them; also as one CUDA graph, without gaps
    tuned       plain PyTorch in each block, torch.compile with coordinate-descent tuning: the baseline
    reference   the same without that tuning

in two precisions: bf16 weights, and fp32 weights under bf16 autocast. For each: the loss and the gradients of two
batches against fp32, median time, peak memory; for the kernels also where the time goes. Other processes compile first, and
tune before the tuned cases, which come last. A result is printed, and written to `--output`, as soon as it is there; what
would not fit into `--budget` is left out, and said; one precision (`bf16` or `autocast`) takes two thirds of the time of
both. Without a GPU the model is tiny and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record, tuning
from benchmarks.harness import DEVICE, GPU
from sitfast.kernels import use_reference
from sitfast.model import SiT, build_model
from sitfast.profiling import summarize, traced

BATCH, MICRO_BATCH, WARM_UP, REPEATS = (128, 16, 3, 20) if GPU else (2, 1, 1, 2)
BUDGET_S, CASE_S, TUNING_PROCESSES = 170, 60, 10
BACKEND = "inductor" if GPU else "aot_eager"
STARTED = time.time()

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x_t, t, y, target


@dataclass(frozen=True)
class Case:
    name: str
    kernels: bool
    autocast: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name}, {'bf16 autocast, fp32 weights' if self.autocast else 'bf16 weights'}"


TUNED = tuning.TUNED if GPU else {}
CASES = [
    Case("kernels", True, False),
    Case("kernels", True, True),
    Case("reference", False, False),
    Case("reference", False, True),
    Case("tuned", False, False, TUNED),
    Case("tuned", False, True, TUNED),
]


def elapsed() -> float:
    return time.time() - STARTED


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---- the model and its data ------------------------------------------------------------------------------------------


@torch.no_grad()
def make_model(dtype: torch.dtype, **sizes: int) -> SiT:
    """Random weights that bf16 represents, the same in every case; none is zero, so that every path counts."""
    sizes = sizes if GPU else {"hidden_size": 48, "depth": 2, "num_heads": 4, "input_size": 8}
    with torch.device(DEVICE):
        model = build_model("SiT-XL/2", **sizes)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.normal_(0, 1.0 if "embedding_table" in name else 0.02, generator=generator)
        parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def make_batch(seed: int) -> Batch:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    size = 32 if GPU else 8
    x, target = (torch.randn(BATCH, 4, size, size, generator=generator, device=DEVICE).bfloat16() for _ in range(2))
    t = torch.rand(BATCH, generator=generator, device=DEVICE)
    y = torch.randint(0, 1000, (BATCH,), generator=generator, device=DEVICE)
    return x, t, y, target.float()


def loss_of(model: SiT, batch: Batch, dtype: torch.dtype) -> Tensor:
    x, t, y, target = batch
    return F.mse_loss(model(x.to(dtype), t, y).float(), target)


def gradients(model: SiT) -> dict[str, Tensor]:
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def exact_results(batches: list[Batch]) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients in fp32, without kernels or compiler, a few samples at a time."""
    model, results = make_model(torch.float32), []
    with use_reference():
        for batch in batches:
            model.zero_grad(set_to_none=True)
            total = 0.0
            for micro in zip(*(value.split(MICRO_BATCH) for value in batch), strict=True):
                loss = loss_of(model, micro, torch.float32) * MICRO_BATCH / BATCH
                loss.backward()
                total += loss.item()
            results.append((total, gradients(model)))
    return results


# ---- one case --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    ms: float
    host_ms: float
    gib: float
    compile_s: float
    errors: list[str]
    profile: list[str]
    graph: str


def compare(loss: float, grads: dict[str, Tensor], exact: tuple[float, dict[str, Tensor]]) -> str:
    wide_loss, wide = exact
    assert grads.keys() == wide.keys()
    norm = sum(g.square().sum().item() for g in grads.values()) ** 0.5
    wide_norm = sum(g.square().sum().item() for g in wide.values()) ** 0.5
    off = {name: (grads[name] - g).norm().item() for name, g in wide.items()}
    relative = {name: off[name] / max(wide[name].norm().item(), 1e-30) for name in off}
    worst = max(relative, key=lambda name: relative[name] if relative[name] == relative[name] else float("inf"))
    return (
        f"loss {loss:.6f} ({loss - wide_loss:+.1e}) norm {norm:.5f} ({norm / wide_norm - 1:+.1e}) "
        f"gradient off {sum(v * v for v in off.values()) ** 0.5 / wide_norm:.2e}, worst {relative[worst]:.1e} {worst}"
    )


def make_step(case: Case, **sizes: int) -> tuple[SiT, Callable[[Batch], Tensor]]:
    """The model of a case, and a function that leaves the gradients of a batch in it and returns the loss."""
    torch._dynamo.reset()
    dtype = torch.float32 if case.autocast else torch.bfloat16
    model = make_model(dtype, **sizes)
    for module in (*model.blocks, model.final_layer):
        module.compile(fullgraph=True, dynamic=False, backend=BACKEND, options=case.options or None)

    def step(batch: Batch) -> Tensor:
        model.zero_grad(set_to_none=True)
        with nullcontext() if case.kernels else use_reference():
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.autocast):
                loss = loss_of(model, batch, dtype)
            loss.backward()
        return loss.detach()

    return model, step


def run_case(case: Case, batches: list[Batch], exact: list[tuple[float, dict[str, Tensor]]]) -> Result:
    held = torch.cuda.memory_allocated() if GPU else 0
    model, step = make_step(case)
    start = time.time()
    step(batches[0])
    synchronize()
    compile_s = time.time() - start
    errors = []
    for batch, truth in zip(batches, exact, strict=False):
        loss = step(batch).item()
        errors.append(compare(loss, gradients(model), truth))
    for _ in range(WARM_UP):
        step(batches[0])
    synchronize()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    ms, host_ms = timed(lambda: step(batches[1]))
    gib = (torch.cuda.max_memory_allocated() - held) / 2**30 if GPU else 0.0
    where = where_time_goes(lambda: step(batches[0])) if case.kernels else []
    graph = as_cuda_graph(lambda: step(batches[1])) if case.kernels and GPU else ""
    if late := tuning.num_timed():
        errors.append(f"{late} variants of kernels were tuned only now")
    return Result(ms, host_ms, gib, compile_s, errors, where, graph)


def as_cuda_graph(step: Callable[[], Tensor]) -> str:
    """Time of a captured step, if its loss is that of the step itself; or why there is none."""
    try:
        expected = step().item()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        ms, _ = timed(graph.replay)
        return f"{ms:.1f} ms" if loss.item() == expected else f"WRONG, loss {loss.item():.6f} for {expected:.6f}"
    except Exception as error:
        return f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- compilation and tuning in other processes -------------------------------------------------------------------------


def compile_case(case: Case, share: int, shares: int) -> None:
    """Fill the caches on disk with what the model's two kinds of block and its last layer run; tune a share of it, or none."""
    model, step = make_step(case, depth=2)
    with tuning.share_of_kernels(share, shares):
        step(make_batch(1))
        synchronize()
    model.zero_grad(set_to_none=True)
    if GPU:
        torch.cuda.empty_cache()


def in_processes(cases: list[Case], what: str, shares: int = 0) -> None:
    """Compile each case in a process of its own, or in so many that each tunes its share of the kernels."""
    parts = [(i, shares) for i in range(shares)] or [(-1, 1)]  # of one, none is tuned
    try:
        with tuning.processes(min(TUNING_PROCESSES, len(cases) * len(parts))) as pool:
            jobs = [pool.submit(tuning.call, compile_case, case, *part) for case in cases for part in parts]
            for job in as_completed(jobs):
                if error := job.exception():
                    say(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    except BrokenProcessPool:
        say("a process that compiles or tunes has died; going on without them")
    say(f"{what}, {elapsed():.0f} s")


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(call) -> tuple[float, float]:
    """Medians of a call's time on the device and of the time the host took to launch it, in ms."""
    device, host = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        if GPU:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            host.append(1e3 * (time.perf_counter() - start))
            last.synchronize()
            device.append(first.elapsed_time(last))
        else:
            call()
            host.append(1e3 * (time.perf_counter() - start))
    return statistics.median(device or host), statistics.median(host)


# ---- where the time goes ---------------------------------------------------------------------------------------------


def where_time_goes(call, steps: int = 2, rows: int = 20) -> list[str]:
    """Kernels by kind, in ms a step: totals, the gaps between kernels, then the longest."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with traced(trace):
            for _ in range(steps):
                call()
            synchronize()
        found = summarize(json.loads(trace.read_text())["traceEvents"], steps)
    kinds = {name: kind.ms for name, kind in found.kinds().items()} | {"gaps": found.step_ms - found.busy_ms}
    lines = ["  ".join(f"{kind} {ms:.1f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]))]
    return lines + [
        f"  {k.ms:7.2f} ms {k.calls:5.0f} x {1e3 * k.ms / k.calls:7.1f} us  {k.kind:<10.10} {k.name[:62]}"
        for k in found.kernels[:rows]
    ]


def backends_used() -> str:
    """What attention runs, and why."""
    from sitfast.kernels.attention import describe

    return f"attention: {describe(256, 72, torch.bfloat16, torch.device(DEVICE))}"


def report(case: Case, result: Result) -> None:
    say(
        f"{case.title:<45} {result.ms:7.1f} ms  {1e3 * BATCH / result.ms:5.0f} img/s  host {result.host_ms:6.1f} ms  "
        f"{result.gib:5.1f} GiB  first call {result.compile_s:.0f} s"
        + (f"  as a CUDA graph {result.graph}" if result.graph else "")
    )
    for line in result.errors:
        say(f"    {line}")
    for line in result.profile:
        say(f"    {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="*", choices=["bf16", "autocast", []], help="both, if none is named")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=["kernels", "reference", "tuned"])
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="begin nothing that would not fit"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--commit", default="", help="the commit that runs, where there is no repository to ask")
    args = parser.parse_args()
    precisions = args.precisions or ["bf16", "autocast"]
    cases = [c for c in CASES if c.name in args.cases and ("autocast" if c.autocast else "bf16") in precisions]
    command = " ".join(["python -m benchmarks.gpu_model", *sys.argv[1:]])
    kept = record.Record(args.output, record.origin(command, dtype="bfloat16", commit=args.commit))
    say(
        f"{record.device_name()}, torch {torch.__version__}, SiT-XL/2 forward + backward, B = {BATCH}, median of {REPEATS}"
    )
    if not GPU:
        say("tiny model: these figures mean nothing")
    else:
        tuning.skip_short_kernels()
        in_processes(cases, "compiled")
    batches = [make_batch(1), make_batch(2)]
    exact: list[tuple[float, dict[str, Tensor]]] = []
    try:
        exact = exact_results(batches)
        say(f"fp32: {[round(loss, 6) for loss, _ in exact]}, {elapsed():.0f} s")
    except Exception as error:
        say(f"fp32: FAILED {type(error).__name__}: {str(error)[:300]}")
    tuned = False
    for case in cases:
        if elapsed() > args.budget - 12:
            say(f"{case.title}: left out, {elapsed():.0f} s have passed")
            continue
        if case.options and not tuned:
            in_processes([c for c in cases if c.options], "tuned", TUNING_PROCESSES)
            tuned = True
        try:
            with at_most(max(1.0, min(CASE_S, args.budget + 15 - elapsed()))):
                result = run_case(case, batches, exact)
            report(case, result)
            kept.add({"case": case.name, "autocast": case.autocast, "B": BATCH, **asdict(result)})
        except Exception as error:
            say(f"{case.title}: FAILED {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        say(f"{case.title}: {elapsed():.0f} s")
        if GPU:
            torch.cuda.empty_cache()
    if GPU:
        say(backends_used())


if __name__ == "__main__":
    main()
