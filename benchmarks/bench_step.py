"""Whole training steps, latents on the device to averaged weights: python -m benchmarks.bench_step [--models XL/2 …]

    shipped          eager, fp32 weights, TF32, no clipping, AdamW and averages as the official code has them
    eager            eager, bf16 autocast; here and below fused AdamW, clip_grad_norm_ and _foreach_lerp_
    compiled         bf16 autocast, torch.compile of each block
    bf16             bf16 weights (AdamW on these, averages in fp32), torch.compile of each block
    sitfast          what `sitfast.train` runs: its Trainer, CUDA graph and all, clipping and one average

and, if asked for by `--methods`, `compiled-model` and `bf16-model` (torch.compile of the whole model), `compiled-graphs` and
`bf16-graphs` (the same with mode="reduce-overhead"), `compiled-tuned` and `bf16-tuned` (each block, tuned by coordinate
descent). The network of all but the last is `plain.py`; with `--official PATH`, a checkout of the official SiT, it is the
official one for the rows under autocast or TF32. Attention is scaled_dot_product_attention by the backend, cuDNN, flash or
memory-efficient, that is fastest on the shape.

Each case has a process of its own. Those of one model compile at the same time, most on two blocks; then each in turn has
the GPU: warm-up, then `--steps` steps between CUDA events. Their median counts; quartiles and extremes are kept. A batch
that does not fit is halved. Images/s is batch / median; MFU is 6 · forward MACs · images/s over the GPU's dense bf16 peak.
Weights are random, none zero, the same for all.

Also `pytest benchmarks/bench_step.py --benchmark-only -k "XL and 256 and not shipped" [--record FILE.json]`. Without a GPU
the models are tiny and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures import TimeoutError as TimeIsOver
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import plain, record, tuning
from benchmarks.harness import CHANNELS, CLOCK, DEVICE, GPU, NUM_CLASSES, RandomLatents
from sitfast import metrics
from sitfast.model import build_model, forward_macs
from sitfast.presets import preset_kwargs

WARM_UP, STEPS = (6, 20) if GPU else (1, 2)
MODELS, PIXELS = ("XL/2", "L/2", "B/2", "S/2"), (256, 512)
BATCHES = {"XL/2": 128, "L/2": 128, "B/2": 256, "S/2": 256} if GPU else dict.fromkeys(MODELS, 4)  # at 256 px
TINY = {} if GPU else {"hidden_size": 48, "depth": 2, "num_heads": 2}
BACKEND = "inductor" if GPU else "aot_eager"


@dataclass(frozen=True)
class Method:
    title: str
    dtype: torch.dtype = torch.float32  # of the weights
    autocast: bool = True
    compile: Literal["", "blocks", "model"] = ""
    fused: bool = True
    options: dict[str, Any] = field(default_factory=dict)


_BF16: dict[str, Any] = {"dtype": torch.bfloat16, "autocast": False}
_GRAPHS, _TUNED = {"triton.cudagraphs": True}, tuning.TUNED
METHODS = {
    "shipped": Method("eager, TF32, as shipped", autocast=False, fused=False),
    "eager": Method("eager, bf16 autocast"),
    "compiled": Method("compiled blocks, bf16 autocast", compile="blocks"),
    "compiled-model": Method("compiled model, bf16 autocast", compile="model"),
    "compiled-graphs": Method("compiled model, CUDA graphs, bf16 autocast", compile="model", options=_GRAPHS),
    "compiled-tuned": Method("compiled and tuned blocks, bf16 autocast", compile="blocks", options=_TUNED),
    "bf16": Method("compiled blocks, bf16 weights", compile="blocks", **_BF16),
    "bf16-model": Method("compiled model, bf16 weights", compile="model", **_BF16),
    "bf16-graphs": Method("compiled model, CUDA graphs, bf16 weights", compile="model", options=_GRAPHS, **_BF16),
    "bf16-tuned": Method("compiled and tuned blocks, bf16 weights", compile="blocks", options=_TUNED, **_BF16),
}
OURS = "sitfast"
DEFAULT = ("shipped", "eager", "compiled", "bf16", OURS)


@dataclass(frozen=True)
class Case:
    model: str
    pixels: int
    method: str
    batch: int
    official: Path | None = None
    steps: int = STEPS
    overrides: tuple[str, ...] = ()  # of sitfast's config

    @property
    def name(self) -> str:
        return f"SiT-{self.model}, {self.pixels} px, {self.method}"

    @property
    def size(self) -> int:
        """Latents a side."""
        return self.pixels // 8 if GPU else 8 * self.pixels // 256

    def sizes(self, depth: int | None) -> dict[str, int]:
        sizes = {**preset_kwargs(f"SiT-{self.model}"), **TINY, "input_size": self.size}
        return sizes | ({"depth": depth} if depth else {})


# ---- the trainings ---------------------------------------------------------------------------------------------------

Step = Callable[[], object]


@contextlib.contextmanager
def sitfast_training(case: Case, depth: int | None) -> Iterator[tuple[Step, str]]:
    """A step of the Trainer, and what it says of itself."""
    import sitfast.data
    from sitfast import config, parallel
    from sitfast.model import SiT
    from sitfast.trainer import Trainer

    sitfast.data.build_source = lambda _: RandomLatents(case.size, case.batch)
    SiT.initialize_weights = plain.random_weights
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder, "data.source": "folder", "data.path": "random", "data.image_size": case.size,
            "data.batch_size": case.batch, "data.num_workers": 0, "data.flip": "false", "vae.id": "null",
            "model.preset": f"SiT-{case.model}", "optim.clip_norm": plain.CLIP_NORM, "ema.decays": [plain.DECAY],
            "train.steps": 1_000_000, "log.every": 1_000_000, "log.tensorboard": "false",
            **{f"model.{name}": value for name, value in TINY.items()},
            **({"model.depth": depth} if depth else {}), **({} if GPU else {"train.precision": "fp32"}),
        }  # fmt: skip
        cfg = config.load(None, [*(f"{path}={value}" for path, value in settings.items()), *case.overrides])
        said = io.StringIO()
        with parallel.start(cfg) as world:
            with contextlib.redirect_stdout(said):
                trainer = Trainer(cfg, world)
            try:
                yield trainer.train_step, " ".join(said.getvalue().split())
            finally:
                trainer.close()


@contextlib.contextmanager
def plain_training(case: Case, depth: int | None) -> Iterator[tuple[Step, str]]:
    method, sizes = METHODS[case.method], case.sizes(depth)
    torch.set_float32_matmul_precision("high")
    official = case.official is not None and method.dtype == torch.float32
    with torch.device(DEVICE):
        if official and case.official is not None:
            model: nn.Module = official_model(case.official, **sizes)
        else:
            with torch.device("meta"):
                model = plain.PlainSiT(**sizes)
            model.to_empty(device=DEVICE)
    torch.manual_seed(0)
    plain.random_weights(model)
    model.to(method.dtype).train()
    heads, tokens = sizes["num_heads"], (sizes["input_size"] // sizes["patch_size"]) ** 2
    computed = torch.bfloat16 if method.autocast else method.dtype
    said = fastest_attention(case.batch, tokens, heads, sizes["hidden_size"] // heads, computed)
    arguments: dict[str, Any] = {"dynamic": False, "backend": BACKEND}
    if GPU and method.options:
        arguments["options"] = method.options
    if method.compile == "blocks":
        for module in (*model.blocks, model.final_layer, model.t_embedder):  # pyright: ignore
            module.compile(**arguments)
    elif method.compile == "model":
        model.compile(**arguments)
    latents = torch.randn(case.batch, CHANNELS, case.size, case.size, device=DEVICE)
    labels = torch.randint(0, NUM_CLASSES, (case.batch,), device=DEVICE)
    training = plain.Training(
        model,
        latents,
        labels,
        dtype=method.dtype,
        autocast=method.autocast,
        fused=method.fused,
        drops_itself=official,
        compiler=(lambda f: torch.compile(f, dynamic=False, backend=BACKEND)) if method.compile else (lambda f: f),
    )
    yield training.step, f"{'official network' if official else 'plain network'}, attention by {said}"


def official_model(folder: Path, **sizes: int) -> nn.Module:
    """The network of the checkout's models.py, which drops labels itself."""
    spec = importlib.util.spec_from_file_location("official_models", folder / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SiT(**sizes, in_channels=CHANNELS, num_classes=NUM_CLASSES, learn_sigma=True)


def fastest_attention(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> str:
    """From now on scaled_dot_product_attention takes the backend that is fastest, forward and backward, on this shape."""
    if not GPU:
        return "PyTorch"
    switches = {
        "cuDNN": torch.backends.cuda.enable_cudnn_sdp,
        "flash": torch.backends.cuda.enable_flash_sdp,
        "memory-efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    }

    def only(name: str) -> None:
        for other, switch in switches.items():
            switch(other == name)

    torch.backends.cuda.enable_math_sdp(False)
    times = {}
    for name in switches:
        only(name)
        with contextlib.suppress(RuntimeError):  # not for this shape and dtype
            times[name] = statistics.median(_attention_ms(batch, tokens, heads, width, dtype) for _ in range(5))
    if not times:
        raise RuntimeError(f"no backend of scaled_dot_product_attention takes d = {width} in {dtype}")
    best = min(times, key=lambda name: times[name])
    only(best)
    return f"{best} ({', '.join(f'{name} {ms:.2f} ms' for name, ms in times.items())})"


def _attention_ms(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> float:
    qkv = torch.randn(batch, tokens, 3, heads, width, device=DEVICE, dtype=dtype, requires_grad=True)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    torch.autograd.grad(out, qkv, out)
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def training(case: Case, depth: int | None = None) -> contextlib.AbstractContextManager[tuple[Step, str]]:
    return sitfast_training(case, depth) if case.method == OURS else plain_training(case, depth)


# ---- one case, in a process of its own -------------------------------------------------------------------------------


def prepare(case: Case) -> float:
    """Compile what the case will run: on two blocks, unless the model is compiled as a whole. Returns the seconds."""
    start = time.monotonic()
    method = METHODS.get(case.method)
    if method is None or method.compile:
        whole = method is not None and method.compile == "model"
        with training(case, None if whole else 2) as (step, _):
            for _ in range(2):
                step()
            _synchronize()
        _forget()
    return time.monotonic() - start


def measure(case: Case) -> dict[str, Any]:
    """The columns of the results page."""
    batch = case.batch
    while True:
        try:
            return _measure(replace(case, batch=batch))
        except torch.OutOfMemoryError:
            if batch < 2:
                raise
            batch //= 2
        _forget()  # here, where the error no longer holds the tensors


def _measure(case: Case) -> dict[str, Any]:
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    with training(case) as (step, said):
        for _ in range(WARM_UP):
            step()
        _synchronize()
        ready_s = time.monotonic() - start
        times = step_times(step, case.steps)
    with torch.device("meta"):
        macs = forward_macs(build_model(None, **case.sizes(None)))
    median = statistics.median(times)
    images_per_s, peak = 1e3 * case.batch / median, metrics.peak_flops(record.device_name())
    quartiles = statistics.quantiles(times, n=4)
    title = METHODS[case.method].title if case.method in METHODS else "sitfast"
    return {
        "kind": "step",
        "model": f"SiT-{case.model}",
        "pixels": case.pixels,
        "method": case.method,
        "title": title,
        "B": case.batch,
        "steps": case.steps,
        "ms": median,
        "ms_quartiles": [quartiles[0], quartiles[2]],
        "ms_extremes": [min(times), max(times)],
        "images_per_s": images_per_s,
        "mfu": 6 * macs * images_per_s / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if GPU else None,
        "ready_s": ready_s,
        "note": said,
        "times_ms": times,
    }


def step_times(step: Step, count: int) -> list[float]:
    """Milliseconds from the end of one step to the end of the next on the device; the host never waits in between."""
    if not GPU:
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    _synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def _forget() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


# ---- all cases -------------------------------------------------------------------------------------------------------


class Steps:
    """Results of cases, asked for in order: those of one model compile together, then each is measured alone.

    `overlap` compiles the next model while this one is measured, on a host that is then busy.
    """

    def __init__(self, cases: Sequence[Case], *, case_s: float, deadline_s: float, overlap: bool = False) -> None:
        self._groups: dict[tuple[str, int], list[Case]] = {}
        for case in cases:
            self._groups.setdefault((case.model, case.pixels), []).append(case)
        self._case_s, self._deadline, self._overlap = case_s, deadline_s, overlap
        self._lock = tuning.FileLock()
        self._running: dict[Case, tuple[ProcessPoolExecutor, Future]] = {}
        self._started: set[tuple[str, int]] = set()

    def result(self, case: Case) -> dict[str, Any]:
        """Raises what the case raised, or TimeIsOver."""
        keys = list(self._groups)
        position = keys.index((case.model, case.pixels))
        for key in keys[position : position + 1 + self._overlap]:
            self._start(key)
        compiling = [self._running[other][1] for other in self._groups[keys[position]] if other in self._running]
        wait(compiling, self._limit())  # they would disturb the host
        pool, prepared = self._running.pop(case)
        try:
            prepared.result(0)
            return pool.submit(tuning.call, measure, case).result(self._limit())
        except TimeIsOver:
            raise TimeIsOver("not done in time") from None
        finally:
            tuning.stop(pool, patience_s=5.0)

    def _limit(self) -> float:
        return max(0.0, min(self._case_s, self._deadline - time.monotonic()))

    def _start(self, key: tuple[str, int]) -> None:
        if key in self._started:
            return
        self._started.add(key)
        for case in self._groups[key]:
            pool = tuning.processes(1, self._lock)
            self._running[case] = pool, pool.submit(tuning.call, prepare, case)

    def close(self) -> None:
        for pool, _ in self._running.values():
            tuning.stop(pool)
        self._lock.path.unlink(missing_ok=True)


def line(result: dict[str, Any]) -> str:
    low, high = result["ms_quartiles"]
    columns = [
        f"{result['model']:<8} {result['pixels']} px  {result['title']:<44} B {result['B']:4d}",
        f"{result['ms']:8.2f} ms ({low:.2f} to {high:.2f})  {result['images_per_s']:8.1f} images/s",
    ]
    if result["mfu"] is not None:
        columns.append(f"MFU {result['mfu']:.1%}")
    if result["peak_gib"] is not None:
        columns.append(f"{result['peak_gib']:.1f} GiB")
    return "  ".join(columns)


def batches(text: str) -> dict[str, int]:
    """`XL/2=96,L/2=128`: images at 256 px; a quarter of them at 512."""
    return {name: int(count) for name, _, count in (item.partition("=") for item in text.split(","))}


def batch_of(model: str, pixels: int, chosen: dict[str, int]) -> int:
    return max(1, chosen.get(model, BATCHES[model]) * 256**2 // pixels**2)


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pixels", nargs="+", type=int, choices=PIXELS, default=list(PIXELS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, OURS], default=list(DEFAULT))
    parser.add_argument("--batch", type=batches, default={}, metavar="XL/2=96,…", help="at 256 px; a quarter at 512")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--official", type=Path, help="a checkout of the official SiT, whose models.py needs timm")
    parser.add_argument("--seconds", type=float, default=600, help="for all cases")
    parser.add_argument(
        "--case-seconds", type=float, default=120, help="to compile one model's cases, and to measure one"
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="compile the next model while this one is measured, which takes memory and keeps the host busy",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="results as they come")
    parser.add_argument("--commit", default="", help="the commit that runs, where there is no repository to ask")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of sitfast's config")
    args = parser.parse_args()
    command = " ".join(["python -m benchmarks.bench_step", *sys.argv[1:]])
    kept = record.Record(args.output, record.origin(command, dtype="bfloat16", commit=args.commit))
    cases = [
        Case(
            model,
            pixels,
            method,
            batch_of(model, pixels, args.batch),
            official=args.official,
            steps=args.steps,
            overrides=tuple(args.overrides),
        )
        for model in args.models
        for pixels in args.pixels
        for method in args.methods
    ]
    print(f"{record.device_name()}, torch {torch.__version__}" + ("" if GPU else ": these figures mean nothing"))
    steps = Steps(cases, case_s=args.case_seconds, deadline_s=start + args.seconds, overlap=args.overlap)
    results = []
    try:
        for case in cases:
            try:
                results.append(steps.result(case))
                kept.add({"extra_info": results[-1]})
                said = f"{line(results[-1])}  [{results[-1]['note'][-160:] if case.method != OURS else ''}]"
            except Exception as error:
                said = f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"[{time.monotonic() - start:4.0f} s] {said}", flush=True)
    finally:
        steps.close()
    print(*map(line, results), sep="\n")


# ---- under pytest ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def steps(request: pytest.FixtureRequest) -> Iterator[Steps]:
    params = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function)]
    cases = [case_of(**p) for p in params if "method" in p]
    minutes = float(request.config.getoption("--minutes"))  # pyright: ignore[reportArgumentType]
    started = Steps(cases, case_s=120, deadline_s=time.monotonic() + 60 * minutes)
    yield started
    started.close()


def case_of(model: str, pixels: int, method: str) -> Case:
    return Case(model, pixels, method, batch_of(model, pixels, {}))


@pytest.mark.parametrize("method", DEFAULT)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("model", MODELS)
def test_step(
    benchmark, steps: Steps, recorded: record.Record, say: Callable[[str], None], model: str, pixels: int, method: str
) -> None:
    try:
        result = steps.result(case_of(model, pixels, method))
    except TimeIsOver as error:
        pytest.skip(str(error))
    say(line(result))
    recorded.add({"extra_info": result})
    benchmark.extra_info.update(result)
    CLOCK.pending_s = [ms / 1e3 for ms in result["times_ms"]]
    benchmark.pedantic(CLOCK.tick, rounds=len(result["times_ms"]), iterations=1)


if __name__ == "__main__":
    from benchmarks import bench_step  # by its name, which other processes can import

    bench_step.main()
