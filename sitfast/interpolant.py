"""Time runs from t = 0 (noise) to t = 1 (data): x_t = alpha(t) data + sigma(t) noise.

The velocity is v = alpha'(t) data + sigma'(t) noise, and a model predicts velocity, noise, or score = -noise / sigma.
This file is the only place that knows the paths, the time intervals, the draws of t and noise, and how one prediction
becomes another; training, validation and sampling all call it.

    path     alpha                                       sigma             1 / (alpha' sigma - alpha sigma')
    linear   t                                           1 - t             1
    gvp      sin(pi t / 2)                               cos(pi t / 2)     2 / pi
    vp       exp(-(1-t)^2 (20 - 0.1)/4 - (1-t) 0.1/2)    sqrt(1-alpha^2)   sigma / (alpha lambda)

where lambda = d log alpha / dt. For vp it is (0.1 + (1-t)(20 - 0.1)) / 2, half the beta of DDPM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sitfast.errors import SitfastError
from sitfast.kernels.interpolate import PREDICTIONS, TIME_SAMPLINGS, interpolate
from sitfast.philox import Stream, normal, uniform

_BETA_MIN, _BETA_MAX = 0.1, 20.0
_HALF_ULP = 2.0**-24  # distance of the last fp32 below 1 from 1
_EPS = 1e-3  # default distance from an end of the path where a conversion diverges
_VP_TRAIN_EPS = 1e-5

_LOSS_WEIGHTS = ("none", "velocity", "likelihood")


class Coefficients(NamedTuple):
    """What a path is at the times t; every field has t's shape and dtype.

    Infinite only here: `d_log_alpha` and `drift_variance` at t = 0 for linear and gvp (alpha = 0), `d_sigma` at t = 1
    for vp.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    d_log_alpha: Tensor  # alpha' / alpha
    inv_wronskian: Tensor  # 1 / (alpha' sigma - alpha sigma')
    drift_variance: Tensor  # g = sigma (alpha' sigma - alpha sigma') / alpha, so that v = d_log_alpha x + g score


def _linear(t: Tensor) -> Coefficients:
    one, sigma = torch.ones_like(t), 1 - t
    return Coefficients(t, sigma, one, -one, 1 / t, one, sigma / t)


def _gvp(t: Tensor) -> Coefficients:
    rate = math.pi / 2
    # sin(pi (1 - t) / 2), not the cosine: in fp32 that is -4e-8 at t = 1 and loses its digits on the way there.
    alpha, sigma = torch.sin(rate * t), torch.sin(rate * (1 - t))
    cotangent = sigma / alpha
    return Coefficients(
        alpha, sigma, rate * sigma, -rate * alpha, rate * cotangent, torch.full_like(t, 1 / rate), rate * cotangent
    )


def _vp(t: Tensor) -> Coefficients:
    rest = 1 - t
    log_alpha = -0.25 * rest**2 * (_BETA_MAX - _BETA_MIN) - 0.5 * rest * _BETA_MIN
    rate = 0.5 * (_BETA_MIN + rest * (_BETA_MAX - _BETA_MIN))
    alpha = log_alpha.exp()
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()  # 1 - alpha^2 would cancel near the data
    return Coefficients(alpha, sigma, rate * alpha, -rate * alpha**2 / sigma, rate, sigma / (alpha * rate), rate)


_PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": _linear, "gvp": _gvp, "vp": _vp}


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def flip_time(t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Map a time and a velocity to the other convention, in which t = 0 is data: (1 - t, -velocity). Its own inverse.

    A model of the other camp serves here as `lambda x, t, y: flip_time(t, other(x, 1 - t, y))[1]`.
    """
    return 1 - t, -velocity


@dataclass(frozen=True)
class Interpolant:
    """A path, what the model predicts on it, and how training draws t and noise.

    Intervals of t (`eps` is `train_eps` or `sample_eps`; where it is given, it holds for every path and prediction):

        path, prediction               training, eps unset     sampling, eps unset    eps given
        linear | gvp, velocity         [0, 1]                  [0, 1]                 [eps, 1 - eps]
        linear | gvp, noise | score    [1e-3, 1 - 1e-3]        [1e-3, 1 - 1e-3]       [eps, 1 - eps]
        vp, any                        [0, 1 - 1e-5]           [0, 1 - 1e-3]          [0, 1 - eps]

    Time sampling draws u in (0, 1) and maps it linearly into the training interval:

        uniform         u
        logit_normal    sigmoid(logit_mean + logit_std z), z standard normal
        shifted         u / (u + s (1 - u)), s = time_shift; s > 1 moves t towards the noise (smaller t). In the other
                        convention, with r = 1 - u, the same shift reads s r / (1 + (s - 1) r).
    """

    path: str = "linear"
    prediction: str = "velocity"
    loss_weight: str = "none"
    train_eps: float | None = None
    sample_eps: float | None = None
    time_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_shift: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("type", self.path, tuple(_PATHS)),
            ("prediction", self.prediction, PREDICTIONS),
            ("loss_weight", self.loss_weight, _LOSS_WEIGHTS),
            ("time_sampling", self.time_sampling, TIME_SAMPLINGS),
        ):
            if value not in allowed:
                raise SitfastError(f"path.{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
        for name, value in (("train_eps", self.train_eps), ("sample_eps", self.sample_eps)):
            if value is not None and not 0 <= value < 0.5:
                raise SitfastError(f"path.{name}={value} is not in [0, 0.5); try {_EPS}")
        for name, value in (("logit_std", self.logit_std), ("time_shift", self.time_shift)):
            if not value > 0:
                raise SitfastError(f"path.{name}={value} is not positive; try 1.0")

    @classmethod
    def from_config(cls, path: Any, seed: int) -> Interpolant:
        """From the `path` section of a config and the run's seed."""
        return cls(
            path=path.type,
            prediction=path.prediction,
            loss_weight=path.loss_weight,
            train_eps=path.train_eps,
            sample_eps=path.sample_eps,
            time_sampling=path.time_sampling,
            logit_mean=path.logit_mean,
            logit_std=path.logit_std,
            time_shift=path.time_shift,
            seed=seed,
        )

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their kin at the times t, in t's shape and dtype."""
        return _PATHS[self.path](t)

    # Time intervals ---------------------------------------------------------------------------------------------------

    @property
    def _open_ended(self) -> bool:
        """Whether t may touch both ends: the velocity of these paths is finite there."""
        return self.path != "vp" and self.prediction == "velocity"

    def train_interval(self) -> tuple[float, float]:
        """Where training draws t."""
        default = _VP_TRAIN_EPS if self.path == "vp" else 0.0 if self._open_ended else _EPS
        eps = default if self.train_eps is None else self.train_eps
        return (0.0 if self.path == "vp" else eps), 1 - eps

    def sample_interval(
        self, *, sde: bool = False, diffusion: str = "sigma", last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """Where the integrator runs from and to.

        An SDE with a last step ends at 1 - last_step_size (earlier if a given sample_eps is larger), and the last step
        covers the rest. The score, which an SDE needs, diverges at t = 1, and sbdm diverges at t = 0 on linear and gvp:
        an SDE keeps 1e-3 off these ends, even where an ODE on the velocity need not. A given sample_eps that leads into
        a divergence is an error.
        """
        at_start = at_end = 0.0 if self._open_ended else _EPS
        if sde:
            at_end = _EPS
            at_start = _EPS if diffusion == "sbdm" else at_start
        if self.sample_eps is not None:
            at_start = at_end = self.sample_eps
        if sde and last_step_size > 0:
            at_end = max(last_step_size, self.sample_eps or 0.0)
        start, end = (0.0 if self.path == "vp" else at_start), 1 - at_end

        diverges_at_0 = self.path != "vp" and (self.prediction != "velocity" or (sde and diffusion == "sbdm"))
        diverges_at_1 = self.prediction == "noise" or (sde and self.prediction == "velocity")
        if (start == 0 and diverges_at_0) or (end == 1 and diverges_at_1):
            what = f"an SDE ({diffusion})" if sde else "an ODE"
            raise SitfastError(
                f"path.sample_eps={self.sample_eps} takes {what} on the {self.path} path with {self.prediction} "
                f"prediction to an end where it divides by zero; try {_EPS}, or leave it unset"
            )
        if start >= end:
            raise SitfastError(f"sample.last_step_size={last_step_size} leaves nothing to integrate; try 0.04")
        return start, end

    # Training draws ---------------------------------------------------------------------------------------------------

    def sample_time(self, index: Tensor) -> Tensor:
        """The training times of the samples `index` `[B]`, fp32 `[B]`."""
        if self.time_sampling == "logit_normal":
            unit = torch.sigmoid(self.logit_mean + self.logit_std * normal(self.seed, index, Stream.TIME))
        else:
            unit = uniform(self.seed, index, Stream.TIME)
            if self.time_sampling == "shifted":
                unit = unit / (unit + self.time_shift * (1 - unit))
        start, end = self.train_interval()
        # The clamp acts only where fp32 rounds to an end of (0, 1), at which a loss weight can be infinite.
        return start + (end - start) * unit.clamp(_HALF_ULP, 1 - _HALF_ULP)

    def sample(self, data: Tensor, index: Tensor, t: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One training draw: data `[B, ...]`, index `[B]` -> x_t `[B, ...]`, t `[B]` fp32, target `[B, ...]`.

        The target is the velocity, or for noise and score prediction the noise (the score loss is written with it). x_t
        and the target are fp32 (fp64 for fp64 data). A given t `[B]` is used as it is.
        """
        draw = interpolate(self, data, index, t=t)
        return draw.xt, draw.t, draw.target

    # Conversions of a model output `[B, C, ...]` at x `[B, C, ...]`, t `[B]` ------------------------------------------
    # With 1/w = alpha' sigma - alpha sigma', solving the two lines of the module docstring for data and noise gives
    #     noise = w (alpha' x - alpha v)        data = w (sigma v - sigma' x)        v = (alpha'/alpha) x + g score
    # Limits, by prediction: from velocity, noise and data are finite on all of [0, 1) and the score diverges as t -> 1;
    # from noise, the score (and on vp the velocity) diverges as t -> 1, data and velocity as alpha -> 0, that is t -> 0
    # on linear and gvp; from score, data and velocity diverge as alpha -> 0. `sample_interval` keeps off these ends.

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity, from an output of the configured prediction."""
        out, x = at_least_fp32(out), at_least_fp32(x)
        if self.prediction == "velocity":
            return out
        c = self.coefficients(_expand(t, x))
        return c.d_log_alpha * x + c.drift_variance * self.score(out, x, t)

    def noise(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise, from an output of the configured prediction."""
        out, x = at_least_fp32(out), at_least_fp32(x)
        if self.prediction == "noise":
            return out
        c = self.coefficients(_expand(t, x))
        if self.prediction == "score":
            return -c.sigma * out
        return c.inv_wronskian * (c.d_alpha * x - c.alpha * out)

    def score(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score, the gradient of log p_t at x, from an output of the configured prediction."""
        if self.prediction == "score":
            return at_least_fp32(out)
        return -self.noise(out, x, t) / self.coefficients(_expand(t, x)).sigma

    def data(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The expected data given x_t = x (Tweedie's formula), from an output of the configured prediction."""
        out, x = at_least_fp32(out), at_least_fp32(x)
        c = self.coefficients(_expand(t, x))
        if self.prediction == "velocity":
            return c.inv_wronskian * (c.sigma * out - c.d_sigma * x)
        return (x - c.sigma * self.noise(out, x, t)) / c.alpha


def _expand(t: Tensor, x: Tensor) -> Tensor:
    """t `[B]` as `[B, 1, ...]`, to broadcast against x `[B, ...]`."""
    return t.view(-1, *(1,) * (x.ndim - 1))
