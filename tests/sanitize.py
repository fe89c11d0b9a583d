"""Every compiled operator on odd sizes, unaligned views and each dtype, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize      (then --tool racecheck)

Prints how many calls ran. Without a GPU the same calls run on the CPU, where nobody watches.
"""

from __future__ import annotations

import itertools

import torch

from sitfast.interpolant import Interpolant
from sitfast.kernels import extension
from sitfast.kernels.adamw_ema import adamw_ema, gradient_norm
from sitfast.kernels.interpolate import PATHS, PREDICTIONS, TIME_SAMPLINGS, Posterior, interpolate
from sitfast.loss import LOSS_WEIGHTS, interpolant_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def at(offset: int, *shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Random positive values, `offset` elements into their memory, which ends with them."""
    count = torch.Size(shape).numel()
    return torch.rand(offset + count, device=DEVICE).to(dtype)[offset:].view(shape)


def draws() -> int:
    calls = 0
    settings = itertools.product(PATHS, PREDICTIONS, TIME_SAMPLINGS, (FP32, BF16, FP16))
    for number, (path, prediction, sampling, dtype) in enumerate(settings):
        interpolant = Interpolant(path=path, prediction=prediction, time_sampling=sampling)
        for shape in ((1, 1), (3, 4, 5, 7), (5, 4, 32, 32)):
            index = torch.arange(shape[0], device=DEVICE) + (1 << 40)
            labels = torch.arange(shape[0], device=DEVICE) if number % 2 else None
            interpolate(interpolant, at(number % 3, *shape), index, labels=labels, drop=0.5, null=9, dtype=dtype)
            calls += 1
        moments, index = at(1, 3, 8, 5, 7), torch.arange(3, device=DEVICE)
        mirrored = at(2, 3, 8, 5, 7)
        interpolate(interpolant, moments, index, mirrored=mirrored, posterior=Posterior(0.18, 0.1), dtype=dtype)
        calls += 1
    return calls


def losses() -> int:
    calls = 0
    settings = itertools.product(PATHS, PREDICTIONS, LOSS_WEIGHTS, (FP32, BF16, FP16), (1, 2))
    for path, prediction, weight, dtype, halves in settings:
        interpolant = Interpolant(path=path, prediction=prediction, loss_weight="none")
        if prediction != "velocity":
            interpolant = Interpolant(path=path, prediction=prediction, loss_weight=weight)
        for shape in ((1, 1), (3, 4, 5, 7), (2, 4, 33, 31)):
            out = at(1, shape[0], halves * shape[1], *shape[2:], dtype=dtype).requires_grad_()
            loss = interpolant_loss(out, at(2, *shape), 0.1 + 0.8 * at(0, shape[0]), interpolant=interpolant)
            loss.sum().backward()
            calls += 1
    return calls


def updates() -> int:
    calls = 0
    sizes = [(1,), (0,), (3, 5), (1023,), (4097,), (257, 129)]
    for grads, moments, averages, copies, offset in itertools.product(
        (FP32, BF16), (FP32, BF16), (0, 1, 2), (False, True), (0, 1, 3)
    ):
        params, gradients, first, second = (
            [at(offset, *size, dtype=dtype) for size in sizes] for dtype in (FP32, grads, moments, moments)
        )
        for skip in (None, torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)):
            adamw_ema(
                params,
                gradients,
                first,
                second,
                torch.zeros(len(sizes), device=DEVICE),
                emas=[[at(offset, *size) for size in sizes] for _ in range(averages)],
                decays=[0.9, 0.99][:averages],
                copies=[at(offset, *size, dtype=BF16) for size in sizes] if copies else (),
                divisor=gradient_norm(gradients),
                skip=skip,
                lr=1e-3,
                weight_decay=0.1,
                seed=3,
                step=calls,
            )
            calls += 1
    return calls


def main() -> None:
    assert DEVICE in extension.load().kinds, f"the operators are not built for {DEVICE}: python -m sitfast.build"
    counts = {each.__name__: each() for each in (draws, losses, updates)}
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{sum(counts.values())} calls on {DEVICE}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


if __name__ == "__main__":
    main()
