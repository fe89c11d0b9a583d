from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant
from sitfast.philox import Stream, normal
from sitfast.sampling import dopri5, sample, start_noise
from tests import exact

PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "score")
FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing")
LAST_STEPS = ("none", "mean", "tweedie", "euler")


def settings(**kwargs: Any) -> SimpleNamespace:
    default: dict[str, Any] = {
        "cfg": 1.0,
        "cfg_interval": (0.0, 1.0),
        "cfg_channels": "all",
        "method": "euler",
        "steps": 8,
        "rtol": 1e-5,
        "atol": 1e-6,
        "diffusion": "sigma",
        "diffusion_norm": 1.0,
        "last_step": "mean",
        "last_step_size": 0.04,
    }
    assert set(kwargs) <= set(default)
    return SimpleNamespace(**default | kwargs)


def labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long)


class Recorder:
    """A model whose velocity is a constant of the label, and which notes what it was asked."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.calls = table, []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == x.dtype == torch.float32
        assert t.shape == y.shape == x.shape[:1]
        assert t.unique().numel() == 1
        self.calls.append((t[0].item(), len(x), y.tolist()))
        return self.table[y][:, :, None].expand(-1, -1, x.shape[2])


# ODE ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "steps", "tolerance"), [("euler", 200, 2e-2), ("heun", 50, 5e-3), ("dopri5", 0, 2e-5)]
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_ode_carries_every_sample_along_the_exact_flow(path, prediction, method, steps, tolerance):
    world, interpolant = exact.Gaussian(path), Interpolant(path=path, prediction=prediction)
    noise = start_noise(0, torch.arange(2000), (2,))
    x, _ = sample(
        world.model(prediction),
        interpolant,
        noise,
        labels(noise),
        null=None,
        settings=settings(method=method, steps=steps),
    )
    assert x.dtype == torch.float32
    expected = world.end(noise.double().numpy(), *interpolant.sample_interval())
    np.testing.assert_allclose(x.numpy(), expected, atol=tolerance)
    # Sampling errors of 4,000 values are 0.4/63 = 0.006 and 0.0045; four of each, and the integration error.
    assert x.mean().item() == pytest.approx(world.mean, abs=0.026 + tolerance)
    assert x.std().item() == pytest.approx(world.std, abs=0.018 + tolerance)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", PATHS)
def test_convergence_order(path, method, order):
    world, interpolant = exact.Gaussian(path), Interpolant(path=path)
    noise = start_noise(0, torch.arange(50), (2,))
    expected = world.end(noise.double().numpy(), *interpolant.sample_interval())
    errors = []
    for steps in (32, 64, 128):
        x, _ = sample(
            world.model("velocity"),
            interpolant,
            noise,
            labels(noise),
            null=None,
            settings=settings(method=method, steps=steps),
        )
        errors.append(np.sqrt(np.mean((x.numpy() - expected) ** 2)))
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(slopes, order, atol=0.25)


def _field(x: np.ndarray, t: float) -> np.ndarray:
    """Nonlinear, coupled, and faster in the middle."""
    return 4 * np.sin(3 * np.roll(x, 1) + 6 * t) - x + 20 * np.exp(-200 * (t - 0.6) ** 2)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_dopri5_against_scipy(rtol):
    """Same tableau, same error norm, same controller as SciPy's RK45: the same steps, up to fp32 rounding."""
    x0, atol, calls = start_noise(0, torch.arange(6), ()), 1e-6, 0

    def field(x: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.from_numpy(_field(x.double().numpy(), t)).float()

    got = dopri5(field, x0, 0.0, 1.0, rtol=rtol, atol=atol).numpy()
    start = x0.double().numpy()
    truth = solve_ivp(lambda t, x: _field(x, t), (0, 1), start, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    peer = solve_ivp(lambda t, x: _field(x, t), (0, 1), start, method="RK45", rtol=rtol, atol=atol)
    assert abs(calls - peer.nfev) <= 6  # one step
    np.testing.assert_allclose(got, truth, atol=2 * np.abs(peer.y[:, -1] - truth).max() + 3e-6)


def test_dopri5_that_cannot_go_on_says_where():
    with pytest.raises(SitfastError, match=r"dopri5 stopped at t=0\.(249|250).*sample\.rtol.*sample\.method=heun"):
        dopri5(lambda x, t: 4 * x * x, torch.ones(2, 3), 0.0, 1.0, rtol=1e-4, atol=1e-6)  # x = 1 / (1 - 4 t)
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(SitfastError, match="dopri5 stopped at t="):
        dopri5(lambda x, t: torch.randn(3, generator=rng), torch.ones(3), 0.0, 1.0, rtol=1e-9, atol=1e-9)
    with pytest.raises(SitfastError, match=r"not finite at t=0\.2"):
        dopri5(lambda x, t: x * torch.nan, torch.ones(3), 0.2, 1.0, rtol=1e-3, atol=1e-3)


def test_dopri5_recovers_from_an_overflow_in_a_trial_step():
    """A non-finite stage is a rejected step, not an answer."""

    def field(x: Tensor, t: float) -> Tensor:
        return torch.where(x.abs() < 3, -50 * x + 50, torch.inf)

    x = dopri5(field, torch.full((2,), -2.0), 0.0, 1.0, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(x, 1.0, atol=1e-3)


# SDE ------------------------------------------------------------------------------------------------------------------


def _strength(path: str, t: float, form: str, norm: float) -> float:
    _, sigma, *_ = exact.path(path, np.float64(t))
    return {
        "constant": lambda: norm,
        "sbdm": lambda: norm * exact.drift_variance(path, np.float64(t)),
        "sigma": lambda: norm * sigma,
        "linear": lambda: norm * (1 - t),
        "decreasing": lambda: 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
        "increasing_decreasing": lambda: norm * np.sin(np.pi * t) ** 2,
    }[form]()


def _reference_sde(
    world: exact.Gaussian, noise: Tensor, interval: tuple[float, float], chosen: SimpleNamespace
) -> np.ndarray:
    """The SDE in fp64, from the exact velocity and score and our Brownian increments."""
    x, (start, end) = noise.double().numpy(), interval

    def drift(x: np.ndarray, t: float) -> np.ndarray:
        strength = _strength(world.path, t, chosen.diffusion, chosen.diffusion_norm)
        return world("velocity", x, t) + strength * world("score", x, t)

    count = chosen.steps - (chosen.last_step != "none")
    h = (end - start) / count
    for k in range(count):
        t = start + k * h
        dw = np.sqrt(h) * normal(4, torch.arange(len(noise)), Stream.SDE, *noise.shape[1:], step=k).double().numpy()
        kick = np.sqrt(2 * _strength(world.path, t, chosen.diffusion, chosen.diffusion_norm)) * dw
        if chosen.method == "sde_euler":
            x = x + h * drift(x, t) + kick
        else:
            x = x + kick
            first = drift(x, t)
            x = x + h / 2 * (first + drift(x + h * first, t + h))
    return {
        "none": lambda: x,
        "mean": lambda: x + chosen.last_step_size * drift(x, end),
        "euler": lambda: x + chosen.last_step_size * world("velocity", x, end),
        "tweedie": lambda: world("data", x, end),
    }[chosen.last_step]()


@pytest.mark.parametrize("method", ["sde_euler", "sde_heun"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_sde_against_fp64_on_the_whole_grid(path, prediction, method):
    world, interpolant = exact.Gaussian(path), Interpolant(path=path, prediction=prediction)
    noise = start_noise(1, torch.arange(3), (2,))
    for form in FORMS:
        for last_step in LAST_STEPS:
            chosen = settings(
                method=method, diffusion=form, last_step=last_step, steps=12, diffusion_norm=0.5, last_step_size=0.1
            )
            x, _ = sample(
                world.model(prediction), interpolant, noise, labels(noise), null=None, settings=chosen, seed=4
            )
            edge = 1e-3 if path != "vp" and (form == "sbdm" or prediction != "velocity") else 0.0
            interval = edge, 0.999 if last_step == "none" else 0.9
            expected = _reference_sde(world, noise, interval, chosen)
            # fp32 rounding (6e-8) over divisors down to 1e-3 in a few of the steps; measured 1.4e-6 at worst.
            np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=f"{form} {last_step}")


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5", "sde_euler", "sde_heun"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_an_imperfect_model_gives_finite_samples_everywhere(path, prediction, method):
    """Official code raises or gives NaN on part of this grid. An untrained model's errors do not cancel at the ends."""
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    noise = start_noise(0, torch.arange(3), (4, 2, 2))
    stochastic = method.startswith("sde")
    for form in FORMS if stochastic else FORMS[:1]:
        for last_step in LAST_STEPS if stochastic else LAST_STEPS[:1]:
            x, _ = sample(
                lambda x, t, y: torch.tanh(torch.einsum("oc,bchw->bohw", weights, x) + t.view(-1, 1, 1, 1)),
                Interpolant(path=path, prediction=prediction),
                noise,
                labels(noise),
                null=None,
                settings=settings(method=method, diffusion=form, last_step=last_step, steps=5, rtol=1e-2, atol=1e-2),
            )
            assert x.isfinite().all(), f"{form} {last_step}"
            assert x.shape == noise.shape


@pytest.mark.parametrize("method", ["sde_euler", "sde_heun"])
@pytest.mark.parametrize(
    ("path", "prediction", "form"),
    [(path, "velocity", form) for path in PATHS for form in FORMS]
    + [(path, prediction, "sigma") for path in PATHS for prediction in ("noise", "score")],
)
def test_sde_recovers_mean_and_std(path, prediction, form, method):
    world = exact.Gaussian(path)
    noise = start_noise(0, torch.arange(2000), (2,))
    x, _ = sample(
        world.model(prediction),
        Interpolant(path=path, prediction=prediction),
        noise,
        labels(noise),
        null=None,
        settings=settings(method=method, diffusion=form, steps=100 if method == "sde_euler" else 50, last_step="euler"),
    )
    # Four sampling errors (0.006 and 0.0045 for 4,000 values) and 0.02 of discretization.
    assert x.mean().item() == pytest.approx(world.mean, abs=0.026 + 0.02)
    assert x.std().item() == pytest.approx(world.std, abs=0.018 + 0.02)


def test_sde_noise_is_a_function_of_seed_and_index():
    noise = start_noise(0, torch.arange(10, 16), (3,))
    kwargs: dict[str, Any] = {"null": None, "settings": settings(method="sde_euler")}

    def run(rows: slice, seed: int) -> Tensor:
        index = torch.arange(10, 16)[rows]
        x = noise[rows]
        return sample(lambda x, t, y: -x, Interpolant(), x, labels(x), seed=seed, index=index, **kwargs)[0]

    whole = run(slice(None), 3)
    assert torch.equal(whole, torch.cat([run(slice(0, 2), 3), run(slice(2, 6), 3)]))
    assert not torch.equal(whole, run(slice(None), 4))
    default, _ = sample(lambda x, t, y: -x, Interpolant(), noise, labels(noise), seed=3, **kwargs)  # index 0 ... 5
    assert not torch.equal(whole, default)


def test_start_noise_is_the_sample_stream():
    index = torch.tensor([5, 1 << 33])
    noise = start_noise(2, index, (4, 3, 3))
    assert torch.equal(noise, normal(2, index, Stream.SAMPLE, 4, 3, 3))
    assert not torch.equal(noise, normal(2, index, Stream.NOISE, 4, 3, 3))


# Counts, dtypes, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"method": "euler"}, 8),
        ({"method": "heun"}, 16),
        ({"method": "sde_euler", "last_step": "none"}, 8),
        ({"method": "sde_euler", "last_step": "mean"}, 8),
        ({"method": "sde_heun", "last_step": "none"}, 16),
        ({"method": "sde_heun", "last_step": "tweedie"}, 15),
        ({"method": "dopri5"}, None),
    ],
)
def test_number_of_model_calls(kwargs, expected):
    model = Recorder(torch.ones(1, 2))
    noise = start_noise(0, torch.arange(2), (2, 3))
    _, calls = sample(model, Interpolant(), noise, labels(noise), null=None, settings=settings(**kwargs))
    assert calls == len(model.calls)
    assert calls == expected or expected is None
    assert all(0 <= t <= 1 for t, *_ in model.calls)


def test_extra_channels_low_precision_and_gradients():
    weight = torch.nn.Parameter(torch.ones(1))

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        first = torch.full_like(x, 1 / 3) * weight
        return torch.cat((first, torch.full_like(x, torch.nan)), dim=1).bfloat16()

    noise = start_noise(0, torch.arange(2), (2, 3)).double()
    x, _ = sample(model, Interpolant(), noise, labels(noise), null=None, settings=settings(steps=64))
    assert x.dtype == torch.float32
    assert not x.requires_grad
    third = torch.tensor(1 / 3).bfloat16().float()
    torch.testing.assert_close(x, noise.float() + third, rtol=0, atol=1e-5)  # a bf16 state would be off by 1e-2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "rk4"}, r"sample\.method='rk4'.*euler, heun, dopri5"),
        ({"method": "sde_euler", "diffusion": "inccreasing-decreasing"}, r"sample\.diffusion='inccreasing-decreasing'"),
        ({"method": "sde_euler", "last_step": "Mean"}, r"sample\.last_step='Mean'"),
        ({"method": "sde_euler", "steps": 1}, r"sample\.steps=1 .*try 2"),
        ({"cfg": 3.0}, r"sample\.cfg=3\.0 needs a null class.*sample\.cfg=1"),
    ],
)
def test_what_cannot_work_is_said(kwargs, message):
    noise = start_noise(0, torch.arange(2), (2,))
    with pytest.raises(SitfastError, match=message):
        sample(lambda x, t, y: x, Interpolant(), noise, labels(noise), null=None, settings=settings(**kwargs))


# Guidance -------------------------------------------------------------------------------------------------------------

TABLE = torch.tensor(
    [[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 2.0, 8.0], [0.25, -0.5, 1.0, 2.0]]
)  # the last is the null class


def _guided(**kwargs: Any) -> tuple[Tensor, Recorder]:
    """The straight path of a constant velocity, from zero: the sample is the velocity."""
    model = Recorder(TABLE)
    y = torch.tensor([0, 1, 0])
    x, calls = sample(model, Interpolant(), torch.zeros(3, 4, 2), y, null=2, settings=settings(**kwargs))
    assert calls == len(model.calls)
    return x[:, :, 0], model


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_guidance_by_hand(method):
    x, model = _guided(cfg=3.0, method=method)
    first, second = [0.25 + 3 * 0.75, -0.5 + 3 * 2.5, 1 + 3 * 2.0, 2 + 3 * 2.0], [-3.5, 2.5, 4.0, 20.0]
    torch.testing.assert_close(x, torch.tensor([first, second, first]), rtol=1e-5, atol=1e-5)
    assert all(call[1:] == (6, [0, 1, 0, 2, 2, 2]) for call in model.calls)


def test_guidance_of_the_first_three_channels():
    x, _ = _guided(cfg=3.0, cfg_channels="first3")
    torch.testing.assert_close(x[1], torch.tensor([-3.5, 2.5, 4.0, 8.0]), rtol=1e-5, atol=1e-5)


def test_guidance_of_low_precision_outputs_is_combined_in_fp32():
    """In bf16 the difference of nearly equal halves, times cfg, would be rounded to three digits."""
    table = torch.tensor([[1.25, -3.0], [1.0, -2.9]]).bfloat16()
    x, _ = sample(
        Recorder(table),
        Interpolant(),
        torch.zeros(1, 2, 1),
        torch.tensor([0]),
        null=1,
        settings=settings(cfg=7.3, steps=1),
    )
    cond, uncond = table.double().numpy()
    np.testing.assert_allclose(x[0, :, 0], uncond + 7.3 * (cond - uncond), rtol=1e-6)


def test_no_guidance_evaluates_the_condition_only():
    x, model = _guided(cfg=1.0)
    torch.testing.assert_close(x, TABLE[[0, 1, 0]], rtol=1e-5, atol=1e-5)
    assert all(call[1:] == (3, [0, 1, 0]) for call in model.calls)
    x, _ = _guided(cfg=0.0)
    torch.testing.assert_close(x, TABLE[[2, 2, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "heun", "sde_euler", "sde_heun"])
def test_guidance_interval_skips_the_unconditional_half(method):
    _, model = _guided(cfg=3.0, cfg_interval=(0.3, 0.7), method=method, steps=10)
    assert {rows for _, rows, _ in model.calls} == {3, 6}
    for t, rows, _ in model.calls:
        assert rows == (6 if 0.3 - 1e-6 <= t <= 0.7 + 1e-6 else 3)


def test_guidance_interval_with_adaptive_steps():
    """The pieces join exactly, and the jumps cost no rejected steps: each of the three pieces takes two calls to choose a
    first step (1e-4 of the piece, as this flow starts at zero) and six for each of at most five steps."""
    x, model = _guided(cfg=3.0, cfg_interval=(0.25, 0.75), method="dopri5")
    guided = TABLE[2] + 3 * (TABLE[[0, 1, 0]] - TABLE[2])
    torch.testing.assert_close(x, 0.5 * guided + 0.5 * TABLE[[0, 1, 0]], rtol=1e-5, atol=1e-5)
    assert len(model.calls) <= 3 * (2 + 6 * 5)
    for t, rows, _ in model.calls:
        assert rows == 6 if 0.25 < t < 0.75 else rows == 3 or t in (0.25, 0.75)
