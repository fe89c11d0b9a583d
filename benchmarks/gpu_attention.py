"""Attention on this GPU: every backend, or every variant of our kernels, checked, then timed.

    python benchmarks/gpu_attention.py [--variants]

`err` is max|x − fp64| over that of the plain formula in bf16, the worst of out or of dq, dk, dv: 2 is the limit. `=`
repeats bitwise, `~` does not. A row whose check fails or that raises says so and has no time. Backward times include
packing dqkv. TFLOP/s count 4·N²·d a head forward and 10·N²·d backward.

Every input set is larger than the L2 cache and sets alternate, so L2 is cold. The device is kept busy until a call is
queued, so that no time of the host counts; for forward and backward together the host's own time stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sitfast.kernels import attention_choice, attention_hopper, attention_short
from sitfast.kernels.attention import attention, describe, reference
from sitfast.kernels.attention_backends import BACKENDS
from sitfast.kernels.attention_short import BackwardLaunch, ForwardLaunch

SHAPES = [(128, 256, 16, 72), (256, 256, 12, 64), (32, 1024, 16, 72)]
F, B = ForwardLaunch, BackwardLaunch
# name, launch of "short" (None: "hopper"), ms predicted on an H100 (measured ones in docs/kernels.md)
Variant = tuple[str, Any, float]
FORWARDS: dict[tuple[int, ...], list[Variant]] = {
    SHAPES[0]: [
        ("short 64x256 b4 w4 s2", F(64, 256, 4, 4, 2), 0.23),
        ("short 64x128 b1 w4 s2", F(64, 128, 1, 4, 2), 0.29),
        ("hopper", None, 0.16),
    ],
    SHAPES[1]: [
        ("hopper", None, 0.18),
    ],
    SHAPES[2]: [("short 64x128 b1 w4 s2", F(64, 128, 1, 4, 2), 0.66)],
}
BACKWARDS: dict[tuple[int, ...], list[Variant]] = {
    SHAPES[0]: [
        ("single 256/64 w8 s2", B("single", 256, 64, 8, 2), 0.54),
        ("single 256/64 w8 s3", B("single", 256, 64, 8, 3), 0.51),
        ("separate 64/64 w4 s2", B("separate", 64, 64, 4, 2), 0.66),
        ("hopper", None, 0.31),
    ],
    SHAPES[1]: [
        ("hopper", None, 0.40),
    ],
    SHAPES[2]: [
        ("separate 64/64 w4 s2", B("separate", 64, 64, 4, 2), 1.57),
        ("separate 64/64 w4 s3", B("separate", 64, 64, 4, 3), 1.50),
    ],
}
REPEATS = 20
BUSY_CYCLES = 3_000_000


def time_ms(function: Callable[..., object], sets: list[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Medians of a call's time on the device and of the host's to queue it."""
    inputs = cycle(sets)
    for _ in range(4):
        function(*next(inputs))
    times, host = [], []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        args = next(inputs)
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        before = time.perf_counter()
        function(*args)
        host.append((time.perf_counter() - before) * 1e3)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), statistics.median(host)


def poison(like: Tensor) -> None:
    """Leave NaN where the allocator will put the next tensor of this size."""
    torch.full_like(like, float("nan"))


class Problem:
    """Inputs of one shape, and the errors of the plain formula on the first samples."""

    def __init__(self, batch: int, tokens: int, heads: int, width: int) -> None:
        self.flops = batch * heads * tokens**2 * width
        self.sets = []
        for seed in range(3):
            generator = torch.Generator("cuda").manual_seed(seed)
            options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
            qkv = torch.randn(batch, tokens, 3, heads, width, **options)
            self.sets.append((torch.randn(batch, tokens, heads, width, **options), qkv))
        dout, qkv = self.sets[0]
        self.part = slice(-max(1, 256 // tokens), None)
        self.out, self.lse, self.dqkv = attention_choice.plain(qkv[self.part].double(), dout[self.part].double())
        out, _, dqkv = attention_choice.plain(qkv[self.part], dout[self.part])
        self.out_limit = (out - self.out).abs().max().item()
        self.dqkv_limit = [(dqkv - self.dqkv)[:, :, i].abs().max().item() for i in range(3)]
        self.saved: list[tuple[Tensor, Tensor]] = []

    def save(self) -> None:
        """What the backwards start from."""
        self.saved = [BACKENDS["cudnn"].forward(qkv) for _, qkv in self.sets]

    def _dqkv_error(self, dqkv: Tensor) -> float:
        errors = (dqkv[self.part] - self.dqkv).abs()
        worst = max(errors[:, :, i].max().item() / self.dqkv_limit[i] for i in range(3))
        return worst if dqkv.isfinite().all() else float("nan")

    def forward(self, name: str, function: Callable[[Tensor], tuple[Tensor, Tensor]], note: str = "") -> None:
        qkv = self.sets[0][1]

        def check() -> tuple[float, bool]:
            poison(self.sets[0][0])
            out, lse = function(qkv)
            error = (out[self.part] - self.out).abs().max().item() / self.out_limit
            if not (lse[self.part] - self.lse).abs().max() < 1e-3 or not out.isfinite().all():
                error = float("nan")
            return error, all(torch.equal(out, function(qkv)[0]) for _ in range(5))

        row(f"f {name}", check, lambda: time_ms(function, [(qkv,) for _, qkv in self.sets]), 4 * self.flops, note)

    def backward(self, name: str, function: Callable[..., Tensor], note: str = "") -> None:
        sets = [(*inputs, *saved) for inputs, saved in zip(self.sets, self.saved, strict=True)]

        def check() -> tuple[float, bool]:
            poison(self.sets[0][1])
            dqkv, _ = function(*sets[0])
            return self._dqkv_error(dqkv), all(torch.equal(dqkv, function(*sets[0])[0]) for _ in range(5))

        row(f"b {name}", check, lambda: time_ms(function, sets), 10 * self.flops, note)

    def both(self, name: str, function: Callable[..., Tensor], bias: str = "") -> None:
        """Forward and backward through autograd; the gradient of qkv's bias "inside" attention, or "after" it."""
        vector = self.sets[0][1].new_zeros(self.sets[0][1][0, 0].numel(), requires_grad=True)

        def step(dout: Tensor, qkv: Tensor) -> Tensor:
            leaf = qkv.detach().requires_grad_()
            if bias == "inside":
                return torch.autograd.grad(function(leaf, bias=vector), (leaf, vector), dout)[0]
            dqkv = torch.autograd.grad(function(leaf), leaf, dout)[0]
            if bias == "after":
                dqkv.flatten(2).sum((0, 1))
            return dqkv

        def check() -> tuple[float, bool]:
            dqkv = step(*self.sets[0])
            return self._dqkv_error(dqkv), torch.equal(dqkv, step(*self.sets[0]))

        row(f"fb {name}", check, lambda: time_ms(step, self.sets), 14 * self.flops, "host")


def row(
    name: str, check: Callable[[], tuple[float, bool]], clock: Callable[[], tuple[float, float]], flops: int, note: str
) -> None:
    try:
        error, same = check()
        if not error <= 2:
            print(f"{name:32} WRONG err {error:.2f} {'=' if same else '~'}", flush=True)
            return
        ms, host = clock()
        note = f"host {host:.3f}" if note == "host" else note
        print(f"{name:32} {ms:7.3f} {flops / ms * 1e-9:6.0f} {error:5.2f} {'=' if same else '~'} {note}", flush=True)
    except Exception as exception:
        text = str(exception).strip().replace("\n", " ")
        print(f"{name:32} {type(exception).__name__}: {text[:110]}", flush=True)


def cudnn_sdpa(qkv: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return reference(qkv)


def run_forward(settings: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if isinstance(settings, ForwardLaunch):
        return lambda qkv: attention_short.forward(qkv, settings)
    return lambda qkv: attention_hopper.forward(qkv)


def run_backward(settings: Any) -> Callable[..., Tensor]:
    if isinstance(settings, BackwardLaunch):
        return lambda *saved: attention_short.backward(*saved, launch=settings)
    return lambda *saved: attention_hopper.backward(*saved)


def resources() -> None:
    """Registers, spills and shared memory of every kernel compiled."""
    from sitfast.kernels import _attention_triton as triton_kernels

    modules: list[Any] = [triton_kernels]
    if attention_hopper.unsupported(256, 72, torch.bfloat16) is None:
        from sitfast.kernels import _attention_gluon

        modules.append(_attention_gluon)
    found = []
    for module in modules:
        for name in ("forward_kernel", "single_kernel", "backward_kernel"):
            caches = getattr(getattr(module, name, None), "device_caches", {})
            for kernels in (cache[0] for cache in caches.values()):
                label = f"{'g' if module is not triton_kernels else 't'}.{name[:4]}"
                found += [f"{label} {k.n_regs}r {k.n_spills}s {k.metadata.shared // 1024}K" for k in kernels.values()]
    print("; ".join(found))


def set_up(shape: tuple[int, ...]) -> Problem | None:
    try:
        problem = Problem(*shape)
        problem.save()
        return problem
    except Exception as exception:
        print(f"  set-up failed: {type(exception).__name__}: {str(exception)[:300]}")
        return None


def together(problem: Problem, shape: tuple[int, ...]) -> None:
    """Forward and backward through autograd, and what "auto" chose."""
    began = time.perf_counter()
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        text = describe(shape[1], shape[3], torch.bfloat16, device)
    except Exception as exception:
        text = f"describe: {type(exception).__name__}: {exception}"
    print(f"{text[:420]} [chosen in {time.perf_counter() - began:.1f} s]", flush=True)
    for name in ("short", "auto"):
        problem.both(name, partial(attention, backend=name))
    problem.both("auto, bias inside", attention, "inside")
    problem.both("auto, bias after", attention, "after")
    problem.both("cudnn by SDPA and unbind", cudnn_sdpa)


def backends() -> None:
    for shape in SHAPES:
        print(f"B, N, H, d = {shape!s:24} ms TFLOP/s  err")
        if (problem := set_up(shape)) is None:
            continue
        _, tokens, _, width = shape
        names = [n for n in BACKENDS if attention_choice.missing(n, tokens, width, torch.bfloat16) is None]
        for name in names:
            problem.forward(name, BACKENDS[name].forward)
        for name in names:
            problem.backward(name, BACKENDS[name].backward)
        together(problem, shape)


def variants() -> None:
    """Triton first: a Gluon kernel that faults would end the process."""
    for kind in ("cudnn", "short", "hopper"):
        for shape in SHAPES:
            forwards = [v for v in FORWARDS[shape] if (v[1] is None) == (kind == "hopper")]
            backwards = [v for v in BACKWARDS[shape] if (v[1] is None) == (kind == "hopper")]
            if kind == "cudnn":
                forwards, backwards = [], []
            elif not forwards + backwards:
                continue
            print(f"B, N, H, d = {shape!s:24} ms TFLOP/s  err   predicted")
            if (problem := set_up(shape)) is None:
                continue
            if kind == "cudnn":
                problem.forward(kind, BACKENDS[kind].forward)
                problem.backward(kind, BACKENDS[kind].backward)
            for name, settings, predicted in forwards:
                problem.forward(name, run_forward(settings), f"{predicted:.2f}")
            for name, settings, predicted in backwards:
                problem.backward(name, run_backward(settings), f"{predicted:.2f}")
            if kind == "hopper" and shape == SHAPES[0]:
                together(problem, shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", action="store_true", help="the launches of our kernels, not the backends")
    run = variants if parser.parse_args().variants else backends
    print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
    run()
    try:
        resources()
    except Exception as exception:
        print(f"resources: {type(exception).__name__}: {exception}")


if __name__ == "__main__":
    main()
