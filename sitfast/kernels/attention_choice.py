"""Which backend of attention runs: the fastest forward and the fastest backward that are right on this GPU.

The choice is made once a process for each device, dtype, N and d, on the first call. Every backend that is installed
runs a problem of `TIMED_ROWS` tokens × heads and must

    be right    out, lse and dqkv of a few heads against fp64, no further off than twice the plain formula is, and the
                gradient of qkv's bias against the sum of dqkv
    repeat      give the same bits twice; what does not (the backward of cuDNN and FlashAttention adds dq up in the order
                in which programs finish) runs only where none that repeats is left
    be fast     times include what a backend costs around its kernel, as packing dq, dk and dv

All of it happens inside a registered operator, so a compiled graph only ever sees that operator. `cross_attention`
chooses by the same contest (`beyond`, `race` and `once`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from sitfast.kernels.attention_backends import BACKENDS, Backend, heads_first, pack

TIMED_ROWS = 2**18  # 1024 heads of 256 tokens, 750 MiB in all: seven waves or more on every GPU
TIMED_HEADS = 16
QUEUE_CYCLES = 2_000_000  # about a millisecond, in which the host queues the launches that are timed

Key = TypeVar("Key", bound=tuple)


@dataclass(frozen=True)
class Choice:
    """The backends chosen, the times of all in ms (forward, backward), and why one is out or only a last resort."""

    forward: str
    backward: str
    times_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    varying: tuple[str, ...] = ()
    rejected: dict[str, str] = field(default_factory=dict)


def plain(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, dqkv) by the formula, in the dtype of qkv, the weights rounded to it."""
    (q, k, v), grad = heads_first(qkv), dout.transpose(1, 2)
    scale = qkv.shape[-1] ** -0.5
    scores = (q @ k.mT * scale).to(torch.promote_types(qkv.dtype, torch.float32))
    weights = scores.softmax(-1).to(qkv.dtype)
    out = weights @ v
    d_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    grads = d_scores @ k * scale, d_scores.mT @ q * scale, weights.mT @ grad
    return out.transpose(1, 2), scores.logsumexp(-1), pack(grads)


def beyond(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """Why a result is wrong, or None: its error may be twice that of the plain formula in its dtype."""
    error = (got - exact).abs().max().item()
    bound = 2 * (eager - exact).abs().max().item() + torch.finfo(got.dtype).eps * 1e-2
    return None if error <= bound else f"{name} is wrong by {error:.2g}, more than {bound:.2g}"


def fault(result: tuple[Tensor, Tensor, Tensor], qkv: Tensor, dout: Tensor) -> str | None:
    """Why (out, lse, dqkv) of a backend is wrong, or None, judged by the outer heads of the outer samples.

    On random input its error against fp64 may be twice that of the plain formula in the same dtype. The log-sum-exp is
    a sum of exact products in fp32, good to 1e-3 with any order of summation.
    """
    out, lse, dqkv = result
    batch, tokens, _, heads, _ = qkv.shape
    if (out.shape, out.dtype) != (dout.shape, qkv.dtype) or (lse.shape, lse.dtype) != (
        (batch, heads, tokens), torch.float32,
    ):  # fmt: skip
        return f"out {tuple(out.shape)} {out.dtype} and lse {tuple(lse.shape)} {lse.dtype} are not what is expected"

    def corners(x: Tensor, dim: int) -> Tensor:
        return x[:: max(1, batch - 1)].index_select(dim, torch.tensor([0, heads - 1], device=x.device))

    few_qkv, few_dout = corners(qkv, 3), corners(dout, 2)
    exact_out, exact_lse, exact_dqkv = plain(few_qkv.double(), few_dout.double())
    eager_out, _, eager_dqkv = plain(few_qkv, few_dout)
    few_dqkv = corners(dqkv, 3)
    triples = [("out", corners(out, 2), eager_out, exact_out)]
    triples += [(f"d{name}", *(x[:, :, i] for x in (few_dqkv, eager_dqkv, exact_dqkv))) for i, name in enumerate("qkv")]
    for name, got, eager, exact in triples:
        if reason := beyond(name, got, eager, exact):
            return reason
    error = (corners(lse, 1) - exact_lse).abs().max().item()
    if not error <= 1e-3:
        return f"lse is wrong by {error:.2g}"
    return None if out.isfinite().all() and dqkv.isfinite().all() else "some results are not finite"


def rows_fault(rows: Tensor, dqkv: Tensor) -> str | None:
    """Why the rows of a backend do not add up to the sum of its dqkv over B and N, or None.

    The roundings of dqkv add up like the square root of their number: four times that, for the largest value.
    """
    batch, tokens = dqkv.shape[:2]
    error = (rows.sum(0, dtype=torch.float64) - dqkv.sum((0, 1), dtype=torch.float64).flatten()).abs().max().item()
    bound = 4 * torch.finfo(dqkv.dtype).eps * (batch * tokens) ** 0.5 * dqkv.abs().max().item()
    return None if error <= bound else f"the gradient of qkv's bias is wrong by {error:.2g}, more than {bound:.2g}"


def time_ms(function: Callable[[], object], calls: int = 5, repeats: int = 3) -> float:
    """CUDA-event time of a call, the median of `repeats` runs of `calls`, queued while the device is kept busy."""
    function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


@cache
def missing(name: str, tokens: int, width: int, dtype: torch.dtype) -> str | None:
    return BACKENDS[name].missing(tokens, width, dtype)


@dataclass(frozen=True)
class Entry:
    """A backend on the problem that is timed: why it cannot run, or None; a forward, whose results its backward takes and
    whose first result is out; what is wrong with the results of both, or None."""

    missing: Callable[[], str | None]
    forward: Callable[[], tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    fault: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], str | None]


@dataclass(frozen=True)
class Race:
    """Times in ms (forward, backward), who does not repeat in forward and in backward, why a backend is out."""

    times: dict[str, tuple[float, float]]
    varying: tuple[list[str], list[str]]
    rejected: dict[str, str]


def race(entries: dict[str, Entry], sizes: Sequence[Tensor]) -> Race:
    """Check and time every entry, each in memory that held NaN: the allocator hands it that of tensors of these `sizes`."""
    result = Race({}, ([], []), {})

    def run(entry: Entry) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        poison = [torch.full_like(size, float("nan")) for size in sizes]
        del poison  # what is not written shows
        out = entry.forward()
        return out, entry.backward(*out)

    for name, entry in entries.items():
        try:
            reason = entry.missing()
            if reason is None:
                out, grads = run(entry)
                reason = entry.fault(out, grads)
            if reason is None:
                for unlike, first, second in zip(result.varying, (out, grads), run(entry), strict=True):
                    if not all(torch.equal(x, y) for x, y in zip(first, second, strict=True)):
                        unlike.append(name)
                forward = time_ms(entry.forward)
                result.times[name] = forward, time_ms(lambda backward=entry.backward, out=out: backward(*out))
        except Exception as error:  # whatever a third-party kernel raises, it is out of the race and the table says why
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if reason is not None:
            result.rejected[name] = reason
    return result


def measure(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Choice:
    """Check and time every backend on this device and choose."""
    batch = max(1, TIMED_ROWS // (tokens * TIMED_HEADS))
    generator = torch.Generator(device).manual_seed(1)
    qkv = torch.randn(batch, tokens, 3, TIMED_HEADS, width, generator=generator, device=device, dtype=dtype)
    dout = torch.randn(batch, tokens, TIMED_HEADS, width, generator=generator, device=device, dtype=dtype)

    def entry(name: str, backend: Backend) -> Entry:
        return Entry(
            missing=lambda: missing(name, tokens, width, dtype),
            forward=lambda: backend.forward(qkv),
            backward=lambda out, lse: backend.backward(dout, qkv, out, lse),
            fault=lambda out, grads: fault((out[0], out[1], grads[0]), qkv, dout) or rows_fault(grads[1], grads[0]),
        )

    found = race({name: entry(name, backend) for name, backend in BACKENDS.items()}, [qkv])
    times, varying = found.times, found.varying
    if not times:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.rejected.items())
        raise ValueError(f"attention: no backend works for N={tokens}, d={width}, {dtype} on {device}: {reasons}")
    forward, backward = (min(times, key=lambda name: (name in varying[i], times[name][i])) for i in (0, 1))
    return Choice(forward, backward, times, tuple(dict.fromkeys([*varying[0], *varying[1]])), found.rejected)


def numbered(device: torch.device) -> torch.device:
    """The device with its index, the current one where it has none."""
    bare = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if bare else device


def once(choices: dict[Key, Choice], key: Key, problem: str, measure: Callable[[], Choice]) -> Choice:
    """The choice for a key, whose first item is the device, measured where it is not known; ValueError in a graph capture."""
    if key not in choices:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{problem} is first met inside a CUDA graph capture, where backends cannot be timed; run it once before"
            )
        with torch.autocast(key[0].type, enabled=False):
            choices[key] = measure()
    return choices[key]


_choices: dict[tuple[torch.device, torch.dtype, int, int], Choice] = {}


def select(tokens: int, width: int, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> Choice:
    """The backends to run; measured on the first call for this (device, dtype, N, d), unless one is named."""
    device = numbered(device)
    if backend != "auto":
        if reason := missing(backend, tokens, width, dtype):
            raise ValueError(f"attention: backend {backend!r} cannot run: {reason}; use 'auto' or 'torch'")
        return Choice(backend, backend)
    key = device, dtype, tokens, width
    problem = f"attention: N={tokens}, d={width}, {dtype}"
    return once(_choices, key, problem, lambda: measure(device, dtype, tokens, width))


def describe(choice: Choice) -> str:
    """One line: what runs, the times, what does not repeat, and what is out and why."""
    text = f"forward {choice.forward}, backward {choice.backward}"
    times = [
        f"{name} {forward:.3f} + {backward:.3f} ms{' (varies from run to run)' if name in choice.varying else ''}"
        for name, (forward, backward) in choice.times_ms.items()
    ]
    out = [f"no {name}: {reason}" for name, reason in choice.rejected.items()]
    return f"{text} ({'; '.join([', '.join(times), *out])})"
