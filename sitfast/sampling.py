"""From noise to data: integrators for the flow and for its stochastic twins, with guidance.

    ODE    dx = v(x, t) dt                                    euler, heun, dopri5
    SDE    dx = (v + w(t) score) dt + sqrt(2 w(t)) dW         sde_euler (Euler-Maruyama), sde_heun; then one last step

Any w >= 0 keeps the marginals of the flow. Guidance acts on the model's output, before it becomes v or the score. All
state is fp32, times are kept in fp64, and the model sees t as fp32 `[B]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant
from sitfast.philox import Stream, normal
from sitfast.text import Condition, Text, with_unconditional

Model = Callable[[Tensor, Tensor, Any], Tensor]  # (x [B, C, ...], t [B], y as in `sample`) -> [B, C or 2C, ...]
Field = Callable[[Tensor, float], Tensor]  # (x, t) -> dx/dt


def start_noise(seed: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """The noise that generation starts from, `[B, *shape]` fp32: a function of (seed, index `[B]`) alone."""
    return normal(seed, index, Stream.SAMPLE, *shape)


@torch.no_grad()
def sample(
    model: Model,
    interpolant: Interpolant,
    noise: Tensor,
    y: Condition,
    *,
    null: int | Text | None,
    settings: Any,
    seed: int = 0,
    index: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Carry noise `[B, C, ...]` with y to data `[B, C, ...]`; also the number of model calls that it took.

    y is labels `[B]`, or captions (`Text`). `settings` is the `sample` section of a config; its `steps` include an SDE's last
    step. `null` is the label of the null class, or the empty caption (None: the model has none). `index` `[B]` numbers the
    samples for the SDE's noise (default 0, 1, ...), so that a sample does not depend on the batch it is part of, dopri5's
    common step size aside.
    """
    x = noise.to(torch.float32)
    guided = GuidedModel(model, y, null=null, settings=settings)
    if settings.method in ("sde_euler", "sde_heun"):
        index = torch.arange(len(x), device=x.device) if index is None else index
        x = _integrate_sde(guided, interpolant, x, settings, seed, index)
    else:
        x = _integrate_ode(guided, interpolant, x, settings)
    return x, guided.num_calls


class GuidedModel:
    """The model with classifier-free guidance, and a count of its calls.

    Inside `cfg_interval` one call takes the batch twice, [conditional; unconditional], and the output is
    uncond + cfg (cond - uncond), on all channels or on the first three only (the others conditional). Outside it, and
    everywhere if cfg = 1, only the conditional half is evaluated.
    """

    def __init__(self, model: Model, y: Condition, *, null: int | Text | None, settings: Any) -> None:
        if settings.cfg != 1 and null is None:
            raise SitfastError(
                f"sample.cfg={settings.cfg} needs a null class, and this model was trained without one "
                "(model.class_dropout_prob=0); use sample.cfg=1"
            )
        self.model, self.y, self.scale = model, y, settings.cfg
        self.both = y if null is None else with_unconditional(y, null)
        self.interval: tuple[float, float] = settings.cfg_interval
        self.channels = 3 if settings.cfg_channels == "first3" else None
        self.num_calls = 0

    def is_guided(self, t: float) -> bool:
        """Whether guidance acts at time t."""
        return self.scale != 1 and self.interval[0] <= t <= self.interval[1]

    def __call__(self, x: Tensor, t: float, guide: bool) -> Tensor:
        """The output at x `[B, C, ...]`, fp32 `[B, C, ...]`."""
        self.num_calls += 1
        if not guide:
            return self._evaluate(x, t, self.y)
        cond, uncond = self._evaluate(torch.cat((x, x)), t, self.both).chunk(2)
        touched = slice(None, self.channels)
        out = cond.clone()
        out[:, touched] = uncond[:, touched] + self.scale * (cond - uncond)[:, touched]
        return out

    def _evaluate(self, x: Tensor, t: float, y: Condition) -> Tensor:
        return self.model(x, _time(x, t), y)[:, : x.shape[1]].to(torch.float32)


def _time(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float32, device=x.device)


def _grid(start: float, end: float, steps: int) -> list[float]:
    """`steps` equal steps from start to end, both exact."""
    return [start + (end - start) * k / steps for k in range(steps)] + [end]


# ODE ------------------------------------------------------------------------------------------------------------------


def _integrate_ode(guided: GuidedModel, interpolant: Interpolant, x: Tensor, settings: Any) -> Tensor:
    def velocity(x: Tensor, t: float, guide: bool | None = None) -> Tensor:
        guide = guided.is_guided(t) if guide is None else guide
        return interpolant.velocity(guided(x, t, guide), x, _time(x, t))

    start, end = interpolant.sample_interval()
    if settings.method == "euler":
        return _euler(velocity, x, _grid(start, end, settings.steps))
    if settings.method == "heun":
        return _heun(velocity, x, _grid(start, end, settings.steps))
    if settings.method != "dopri5":
        raise SitfastError(
            f"sample.method={settings.method!r} is unknown; choose euler, heun, dopri5, sde_euler or sde_heun"
        )
    # The velocity jumps where guidance begins and ends. Adaptive steps would shrink there, so each piece is
    # integrated by itself, guided or not as a whole.
    jumps = sorted({edge for edge in guided.interval if start < edge < end})
    for left, right in pairwise([start, *jumps, end]):
        guide = guided.is_guided((left + right) / 2)
        x = dopri5(
            lambda x, t, guide=guide: velocity(x, t, guide), x, left, right, rtol=settings.rtol, atol=settings.atol
        )
    return x


def _euler(field: Field, x: Tensor, times: list[float]) -> Tensor:
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * field(x, t)
    return x


def _heun(field: Field, x: Tensor, times: list[float]) -> Tensor:
    for t, t_next in pairwise(times):
        slope = field(x, t)
        slope_next = field(x + (t_next - t) * slope, t_next)
        x = x + 0.5 * (t_next - t) * (slope + slope_next)
    return x


# Dormand and Prince 1980: stage times, stage weights (the last row is the fifth-order result, whose slope the next step
# reuses), and the fifth- minus the fourth-order weights.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_MIN_STEP = 1e-6  # 16 spacings of fp32 below 1: the model could hardly tell the stages of a smaller step apart
_MAX_STEPS = 10_000


def dopri5(field: Field, x: Tensor, start: float, end: float, *, rtol: float, atol: float) -> Tensor:
    """Adaptive Dormand-Prince 5(4) from start to end.

    A step is accepted when the root mean square of error / (atol + rtol max(|x|, |x_next|)) over the whole batch is at
    most 1; the next one is 0.9 error^(-1/5) times as long, within 1/5 and 10, and within 1 right after a rejection.
    """
    slope = field(x, start)
    step = _first_step(field, x, slope, start, end, rtol=rtol, atol=atol)
    t, limit = start, 10.0
    for _ in range(_MAX_STEPS):
        last = t + step * (1 + 1e-6) >= end  # no sliver of a step at the end
        step = end - t if last else step
        slopes, x_next = [slope], x
        for node, weights in zip(_NODES, _STAGES, strict=True):
            x_next = x + step * _combine(weights, slopes)
            slopes.append(field(x_next, t + node * step))
        error = _norm(step * _combine(_ERROR, slopes), atol + rtol * torch.maximum(x.abs(), x_next.abs()))
        if error <= 1:
            if last:
                return x_next
            t, x, slope = t + step, x_next, slopes[-1]
            step *= min(limit, 0.9 * max(error, 1e-10) ** -0.2)
            limit = 10.0
        else:
            step *= max(0.2, 0.9 * error**-0.2) if math.isfinite(error) else 0.2
            limit = 1.0
            if step < _MIN_STEP:
                break
    raise SitfastError(
        f"dopri5 stopped at t={t:.6g}: sample.rtol={rtol:g} and sample.atol={atol:g} would need steps shorter than "
        f"{_MIN_STEP:g} or more than {_MAX_STEPS} of them; raise these, or use sample.method=heun"
    )


def _first_step(field: Field, x: Tensor, slope: Tensor, start: float, end: float, *, rtol: float, atol: float) -> float:
    """A first step from the sizes of x, its slope and the slope's change (Hairer, Nørsett, Wanner, section II.4)."""
    scale = atol + rtol * x.abs()
    size, speed = _norm(x, scale), _norm(slope, scale)
    if not math.isfinite(speed):
        raise SitfastError(f"the model's output is not finite at t={start:g}; check the weights")
    trial = min(0.01 * size / speed if min(size, speed) > 1e-5 else 1e-6, end - start)
    change = _norm(field(x + trial * slope, start + trial) - slope, scale) / trial
    steepest = max(speed, change) if math.isfinite(change) else math.inf
    guess = max(1e-6, 1e-3 * trial) if steepest <= 1e-15 else (0.01 / steepest) ** 0.2
    return max(_MIN_STEP, min(100 * trial, guess, end - start))


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total


def _norm(x: Tensor, scale: Tensor) -> float:
    return (x / scale).square().mean().sqrt().item()


# SDE ------------------------------------------------------------------------------------------------------------------


def diffusion(interpolant: Interpolant, t: float, *, form: str, norm: float) -> float:
    """w(t), how much noise the SDE stirs in; sbdm is the path's drift variance, as in the classical score SDE."""
    c = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
    match form:
        case "constant":
            return norm
        case "sbdm":
            return norm * c.drift_variance.item()
        case "sigma":
            return norm * c.sigma.item()
        case "linear":
            return norm * (1 - t)
        case "decreasing":
            return 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2
        case "increasing_decreasing":
            return norm * math.sin(math.pi * t) ** 2
    raise SitfastError(
        f"sample.diffusion={form!r} is unknown; choose constant, sbdm, sigma, linear, decreasing, increasing_decreasing"
    )


def _integrate_sde(
    guided: GuidedModel, interpolant: Interpolant, x: Tensor, settings: Any, seed: int, index: Tensor
) -> Tensor:
    def strength(t: float) -> float:
        return diffusion(interpolant, t, form=settings.diffusion, norm=settings.diffusion_norm)

    def drift(x: Tensor, t: float) -> Tensor:
        out, times = guided(x, t, guided.is_guided(t)), _time(x, t)
        return interpolant.velocity(out, x, times) + strength(t) * interpolant.score(out, x, times)

    has_last_step = settings.last_step != "none"
    steps = settings.steps - has_last_step
    if steps < 1:
        raise SitfastError(f"sample.steps={settings.steps} has no step before the last one; try 2 or more")
    start, end = interpolant.sample_interval(
        sde=True, diffusion=settings.diffusion, last_step_size=settings.last_step_size if has_last_step else 0.0
    )
    for k, (t, t_next) in enumerate(pairwise(_grid(start, end, steps))):
        step = t_next - t
        kick = math.sqrt(2 * strength(t) * step) * normal(seed, index, Stream.SDE, *x.shape[1:], step=k)
        if settings.method == "sde_euler":
            x = x + step * drift(x, t) + kick
        else:  # the noise first, then a deterministic Heun step from there
            x = x + kick
            slope = drift(x, t)
            slope_next = drift(x + step * slope, t_next)
            x = x + 0.5 * step * (slope + slope_next)

    match settings.last_step:
        case "none":
            return x
        case "mean":
            return x + (1 - end) * drift(x, end)
        case "euler":
            out = guided(x, end, guided.is_guided(end))
            return x + (1 - end) * interpolant.velocity(out, x, _time(x, end))
        case "tweedie":
            out = guided(x, end, guided.is_guided(end))
            return interpolant.data(out, x, _time(x, end))
    raise SitfastError(f"sample.last_step={settings.last_step!r} is unknown; choose none, mean, tweedie or euler")
