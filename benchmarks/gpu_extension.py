"""The compiled operators on one GPU, each against the best there is without them: python -m benchmarks.gpu_extension

    update        clip + AdamW + averages + bf16 copies over the tensors of SiT-XL/2, against fused AdamW,
                  clip_grad_norm_ and _foreach_lerp_; bytes a parameter over the time, as a share of a copy's rate
    interpolate   draw, loss and gradient of 256 latents 4 × 32 × 32, against eager and torch.compile

Medians of CUDA events around one call with a cold L2; the device is kept busy until the launches are queued.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Timer
from sitfast import Interpolant, build_model, interpolant_loss
from sitfast.kernels import extension, use_reference
from sitfast.kernels.adamw_ema import adamw_ema, gradient_norm
from sitfast.kernels.interpolate import interpolate

HYPER = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def milliseconds(timer: Timer, run: Callable[[], object], repeats: int = 15, busy_cycles: int = 4_000_000) -> float:
    """Median on the device, which sleeps (2 ms) until the host has queued the call; eager draws take the host longer."""
    run(), run()
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        timer.flush.zero_()
        torch.cuda._sleep(busy_cycles)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def host_us(run: Callable[[], object], repeats: int = 50) -> float:
    """Microseconds that the host needs to queue a call."""
    for _ in range(repeats):  # the allocator has its blocks after this
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    passed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * passed / repeats


def shapes_of(preset: str) -> list[torch.Size]:
    with torch.device("meta"):
        model = build_model(preset, input_size=32, in_channels=4, num_classes=1000)
    return [p.shape for p in model.parameters() if p.requires_grad]


def draw(shapes: list[torch.Size], scale: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(shape, device=DEVICE) * scale).to(dtype) for shape in shapes]


class Operands:
    """Everything an update touches."""

    def __init__(
        self, shapes: list[torch.Size], *, averages: int, copies: bool, grads: torch.dtype, moments: torch.dtype
    ):
        self.params, self.grads = draw(shapes, 0.02), draw(shapes, 1e-3, grads)
        self.m, self.v = draw(shapes, 1e-3, moments), [x.abs() for x in draw(shapes, 1e-6, moments)]
        self.steps = torch.full((len(shapes),), 100.0, device=DEVICE)
        self.emas = [[p.clone() for p in self.params] for _ in range(averages)]
        self.copies = [p.bfloat16() for p in self.params] if copies else []
        self.decays = [0.9999, 0.999, 0.99, 0.9][:averages]
        self.skip = torch.zeros((), device=DEVICE)
        self.count = sum(p.numel() for p in self.params)

    def update(self, norm: Tensor | None = None) -> None:
        norm = gradient_norm(self.grads) if norm is None else norm
        divisor = ((norm + 1e-6) / 1.0).clamp(min=1.0)
        positional = self.params, self.grads, self.m, self.v, self.steps
        adamw_ema(
            *positional,
            emas=self.emas,
            decays=self.decays,
            copies=self.copies,
            divisor=divisor,
            skip=self.skip,
            **HYPER,
        )

    def bytes(self) -> int:
        g, m = self.grads[0].element_size(), self.m[0].element_size()
        return self.count * (2 * g + 8 + 4 * m + 8 * len(self.emas) + 2 * bool(self.copies))


def update_table(timer: Timer, preset: str, copy_rate: float) -> None:
    shapes = shapes_of(preset)
    fp32, bf16 = torch.float32, torch.bfloat16
    print(
        f"{preset}: {len(shapes)} tensors, {sum(s.numel() for s in shapes):,} parameters; copy {copy_rate / 1e9:.0f} GB/s"
    )
    print("update                                            ms   B/param   GB/s   of copy")
    variants = {
        "norm, clip, AdamW, 1 average, bf16 copy": dict(averages=1, copies=True, grads=fp32, moments=fp32),
        "norm, clip, AdamW, 2 averages, bf16 copy": dict(averages=2, copies=True, grads=fp32, moments=fp32),
        "norm, clip, AdamW, 1 average": dict(averages=1, copies=False, grads=fp32, moments=fp32),
        "norm, clip, AdamW, 1 average, bf16 moments": dict(averages=1, copies=False, grads=fp32, moments=bf16),
        "norm, clip, AdamW, 1 average, bf16 grads": dict(averages=1, copies=True, grads=bf16, moments=fp32),
        "norm, clip, AdamW, 4 averages": dict(averages=4, copies=False, grads=fp32, moments=fp32),
    }
    for name, options in variants.items():
        operands = Operands(shapes, **options)
        ms = milliseconds(timer, operands.update)
        rate, each = operands.bytes() / ms * 1e3, operands.bytes() / operands.count
        print(f"{name:46s} {ms:6.2f}   {each:5.0f}   {rate / 1e9:6.0f}   {rate / copy_rate:6.1%}", flush=True)
        if "1 average, bf16 copy" in name:
            parts = milliseconds(timer, partial(gradient_norm, operands.grads))
            print(f"    of which the norm {parts:.2f} ms, {4 * operands.count / parts * 1e3 / copy_rate:.1%} of copy")
            baselines(timer, operands)
        operands = None
        torch.cuda.empty_cache()


def torch_update(operands: Operands) -> Callable[[], None]:
    """The same on the same tensors by the fastest that PyTorch offers."""
    params = [nn.Parameter(p) for p in operands.params]
    for p, g in zip(params, operands.grads, strict=True):
        p.grad = g
    adamw = torch.optim.AdamW(params, fused=True, **HYPER)
    for p, m, v, step in zip(params, operands.m, operands.v, operands.steps, strict=True):
        adamw.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    @torch.no_grad()
    def run() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        adamw.step()
        for averages, decay in zip(operands.emas, operands.decays, strict=True):
            torch._foreach_lerp_(averages, params, 1 - decay)
        if operands.copies:
            torch._foreach_copy_(operands.copies, params)

    return run


def baselines(timer: Timer, operands: Operands) -> None:
    def reference() -> None:
        with use_reference():
            operands.update()

    print(f"    fused AdamW, clip_grad_norm_, lerp, copy {milliseconds(timer, torch_update(operands)):8.2f}")
    print(f"    the reference (torch's fused kernels) {milliseconds(timer, reference):11.2f}", flush=True)


def interpolate_table(timer: Timer) -> None:
    batch = 256
    latents, index = torch.randn(batch, 4, 32, 32, device=DEVICE), torch.arange(batch, device=DEVICE)
    labels, law = index % 1000, Interpolant(seed=1)
    out = torch.randn(batch, 8, 32, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def draws() -> tuple:
        return interpolate(law, latents, index, labels=labels, drop=0.1, null=1000, dtype=torch.bfloat16)

    drawn = draws()

    def loss() -> Tensor:
        return interpolant_loss(out, drawn.target, drawn.t, interpolant=law).mean()

    def both() -> None:
        draw = draws()
        torch.autograd.grad(interpolant_loss(out, draw.target, draw.t, interpolant=law).mean(), out)

    def plain(run: Callable) -> Callable:
        def inside() -> object:
            with use_reference():
                return run()

        return inside

    runs = {"draw, loss and gradient": both, "draw alone": draws, "loss alone, forward": loss}
    print("\n256 latents 4 × 32 × 32, bf16, µs                   ours    eager   torch.compile   our host")
    for name, run in runs.items():
        times = [milliseconds(timer, run, 30), milliseconds(timer, plain(run), 5, 40_000_000)]
        torch._dynamo.reset()
        try:
            times.append(milliseconds(timer, torch.compile(plain(run), dynamic=False), 30))
        except Exception as error:
            print(f"    torch.compile: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            times.append(float("nan"))
        print(
            f"{name:46s} " + " ".join(f"{1e3 * ms:8.1f}" for ms in times) + f"        {host_us(run):8.1f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="SiT-XL/2")
    parser.add_argument("--only", choices=["update", "interpolate"])
    arguments = parser.parse_args()
    started, timer = time.monotonic(), Timer()
    torch.manual_seed(0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; operators: {extension.describe(torch.device('cuda'))}"
    )
    if arguments.only != "interpolate":
        update_table(timer, arguments.preset, timer.copy_rate())
    if arguments.only != "update":
        interpolate_table(timer)
    print(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
