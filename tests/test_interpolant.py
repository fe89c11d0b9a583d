from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant, flip_time
from sitfast.philox import Stream, normal, uniform
from tests import exact

PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "score")
TIMES = [1e-6, 1e-5, 1e-3, 0.1, 0.3, 0.5, 0.77, 0.96, 0.999, 1 - 1e-5, 1 - 1e-6]


# Coefficients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("path", PATHS)
def test_coefficients_against_closed_forms(path, dtype, rtol):
    """In fp32 as well, up to 1e-6 from the ends. The forms lose at most a few roundings (6e-8 each), amplified on vp by
    |log alpha| <= 5 in the exponential."""
    t = torch.tensor(TIMES, dtype=dtype)
    times = t.double().numpy()
    alpha, sigma, d_alpha, d_sigma = exact.path(path, times)
    wronskian = d_alpha * sigma - alpha * d_sigma
    expected = {
        "alpha": alpha,
        "sigma": sigma,
        "d_alpha": d_alpha,
        "d_sigma": d_sigma,
        "d_log_alpha": d_alpha / alpha,
        "inv_wronskian": 1 / wronskian,
        "drift_variance": exact.drift_variance(path, times),
    }
    got = Interpolant(path=path).coefficients(t)
    assert set(got._fields) == set(expected)
    for name, value in expected.items():
        field = getattr(got, name)
        assert field.dtype == dtype
        np.testing.assert_allclose(field.double().numpy(), value, rtol=rtol, err_msg=f"{path} {name}")


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_against_finite_differences(path):
    t, h = torch.linspace(0.02, 0.98, 49, dtype=torch.float64), 1e-5
    interpolant = Interpolant(path=path)
    before, here, after = (interpolant.coefficients(t + shift) for shift in (-h, 0, h))
    for value, derivative in (("alpha", "d_alpha"), ("sigma", "d_sigma")):
        slope = (getattr(after, value) - getattr(before, value)) / (2 * h)
        # Central differences: h^2/6 |f'''| < 2e-8 here, and 1e-16/h = 1e-11 of rounding.
        torch.testing.assert_close(getattr(here, derivative), slope, rtol=1e-6, atol=1e-8)
    log_slope = (after.alpha.log() - before.alpha.log()) / (2 * h)
    torch.testing.assert_close(here.d_log_alpha, log_slope, rtol=1e-5, atol=1e-8)


def test_ends_of_the_paths():
    ends = torch.tensor([0.0, 1.0])
    for path in ("linear", "gvp"):
        c = Interpolant(path=path).coefficients(ends)
        assert c.alpha.tolist() == [0, 1]
        assert c.sigma.tolist() == [1, 0]
    c = Interpolant(path="vp").coefficients(ends)
    np.testing.assert_allclose(c.alpha, [np.exp(-5.025), 1], rtol=1e-6)  # vp starts with 0.7 % of data
    assert c.sigma[1] == 0


# Intervals ------------------------------------------------------------------------------------------------------------

EPS = 1e-3


@pytest.mark.parametrize(
    ("path", "prediction", "train", "ode"),
    [
        ("linear", "velocity", (0, 1), (0, 1)),
        ("gvp", "velocity", (0, 1), (0, 1)),
        ("linear", "noise", (EPS, 1 - EPS), (EPS, 1 - EPS)),
        ("linear", "score", (EPS, 1 - EPS), (EPS, 1 - EPS)),
        ("gvp", "noise", (EPS, 1 - EPS), (EPS, 1 - EPS)),
        ("gvp", "score", (EPS, 1 - EPS), (EPS, 1 - EPS)),
        ("vp", "velocity", (0, 1 - 1e-5), (0, 1 - EPS)),
        ("vp", "noise", (0, 1 - 1e-5), (0, 1 - EPS)),
        ("vp", "score", (0, 1 - 1e-5), (0, 1 - EPS)),
    ],
)
def test_default_intervals(path, prediction, train, ode):
    interpolant = Interpolant(path=path, prediction=prediction)
    assert interpolant.train_interval() == pytest.approx(train, abs=1e-12)
    assert interpolant.sample_interval() == pytest.approx(ode, abs=1e-12)
    # SDE: the end is given up to the last step; sbdm must also stay off the noise end of linear and gvp.
    start = {"sbdm": EPS if path != "vp" else 0, "sigma": ode[0]}
    for form in ("sbdm", "sigma"):
        with_last = interpolant.sample_interval(sde=True, diffusion=form, last_step_size=0.04)
        without = interpolant.sample_interval(sde=True, diffusion=form)
        assert with_last == pytest.approx((start[form], 0.96), abs=1e-12)
        assert without == pytest.approx((start[form], 1 - EPS), abs=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_given_eps_is_obeyed(path, prediction):
    interpolant = Interpolant(path=path, prediction=prediction, train_eps=0.2, sample_eps=0.05)
    start = 0 if path == "vp" else 1
    assert interpolant.train_interval() == pytest.approx((0.2 * start, 0.8))
    assert interpolant.sample_interval() == pytest.approx((0.05 * start, 0.95))
    assert interpolant.sample_interval(sde=True, last_step_size=0.04) == pytest.approx((0.05 * start, 0.95))
    assert interpolant.sample_interval(sde=True, last_step_size=0.1) == pytest.approx((0.05 * start, 0.9))
    _, t, _ = interpolant.sample(torch.zeros(4000, 1), torch.arange(4000))
    assert 0.2 * start <= t.min() < 0.2 * start + 0.01
    assert 0.79 < t.max() <= 0.8
    # one given, the other not: each keeps to its own
    assert Interpolant(path=path, prediction=prediction, train_eps=0.2).sample_interval() == (
        Interpolant(path=path, prediction=prediction).sample_interval()
    )
    assert Interpolant(path=path, prediction=prediction, sample_eps=0.2).train_interval() == (
        Interpolant(path=path, prediction=prediction).train_interval()
    )


def test_eps_of_zero_is_obeyed_or_refused():
    for prediction in PREDICTIONS:
        assert Interpolant(prediction=prediction, train_eps=0.0).train_interval() == (0, 1)
    assert Interpolant(path="vp", sample_eps=0.0).sample_interval() == (0, 1)
    assert Interpolant(path="vp", prediction="score", sample_eps=0.0).sample_interval(sde=True) == (0, 1)
    refused = [
        (Interpolant(prediction="noise", sample_eps=0.0), {}),
        (Interpolant(prediction="score", sample_eps=0.0), {}),
        (Interpolant(path="vp", prediction="noise", sample_eps=0.0), {}),
        (Interpolant(sample_eps=0.0), {"sde": True}),
        (Interpolant(sample_eps=0.0), {"sde": True, "diffusion": "sbdm", "last_step_size": 0.04}),
    ]
    for interpolant, kwargs in refused:
        with pytest.raises(SitfastError, match=r"path\.sample_eps=0\.0 .*try 0\.001"):
            interpolant.sample_interval(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"path": "cosine"}, r"path\.type='cosine'.*linear, gvp, vp"),
        ({"prediction": "x0"}, r"path\.prediction='x0'"),
        ({"loss_weight": "snr"}, r"path\.loss_weight='snr'"),
        ({"time_sampling": "beta"}, r"path\.time_sampling='beta'"),
        ({"train_eps": 0.5}, r"path\.train_eps=0\.5"),
        ({"sample_eps": -1e-3}, r"path\.sample_eps=-0\.001"),
        ({"time_shift": 0.0}, r"path\.time_shift=0\.0"),
        ({"logit_std": float("nan")}, r"path\.logit_std=nan"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(SitfastError, match=message):
        Interpolant(**kwargs)


def test_a_last_step_may_not_swallow_the_path():
    with pytest.raises(SitfastError, match=r"sample\.last_step_size=0\.9995"):
        Interpolant(prediction="noise").sample_interval(sde=True, last_step_size=0.9995)


def test_from_config_carries_every_field():
    section = SimpleNamespace(
        type="vp",
        prediction="score",
        loss_weight="likelihood",
        train_eps=0.01,
        sample_eps=0.02,
        time_sampling="logit_normal",
        logit_mean=0.5,
        logit_std=2.0,
        time_shift=3.0,
    )
    expected = Interpolant("vp", "score", "likelihood", 0.01, 0.02, "logit_normal", 0.5, 2.0, 3.0, seed=9)
    assert Interpolant.from_config(section, 9) == expected


# Training draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_xt_and_target(path, prediction):
    interpolant = Interpolant(path=path, prediction=prediction, seed=5)
    data = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    index = torch.arange(100, 164)
    xt, t, target = interpolant.sample(data, index)
    assert xt.dtype == t.dtype == target.dtype == torch.float32
    assert t.shape == (64,)
    noise = normal(5, index, Stream.NOISE, 3, 4, 4).double().numpy()
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None, None] for c in exact.path(path, t.double().numpy()))
    clean = data.double().numpy()
    np.testing.assert_allclose(xt.numpy(), alpha * clean + sigma * noise, rtol=1e-5, atol=3e-6)
    expected = d_alpha * clean + d_sigma * noise if prediction == "velocity" else noise
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-5, atol=3e-6 * np.abs(expected).max())


def test_draws_do_not_depend_on_the_batch():
    interpolant = Interpolant(time_sampling="logit_normal", seed=3)
    data, index = torch.randn(10, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(7, 17)
    whole = interpolant.sample(data, index)
    parts = [interpolant.sample(data[rows], index[rows]) for rows in (slice(0, 3), slice(3, 4), slice(4, 10))]
    for tensor, *split in zip(whole, *parts, strict=True):
        assert torch.equal(tensor, torch.cat(split))
    other_seed = Interpolant(time_sampling="logit_normal", seed=4).sample(data, index)
    assert not any(torch.equal(a, b) for a, b in zip(whole, other_seed, strict=True))


def test_a_given_t_is_used_and_dtypes_are_kept():
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    index = torch.arange(2)
    xt, used, _ = Interpolant(train_eps=0.4).sample(torch.ones(2, 3), index, t)
    assert used.tolist() == [0.25, 0.5]
    assert used.dtype == torch.float32
    noise = normal(0, index, Stream.NOISE, 3)
    torch.testing.assert_close(xt, torch.tensor([[0.25], [0.5]]) + torch.tensor([[0.75], [0.5]]) * noise)
    for given, expected in (
        (torch.uint8, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        xt, used, target = Interpolant(prediction="noise").sample(torch.ones(2, 3, dtype=given), index)
        assert xt.dtype == target.dtype == expected
        assert used.dtype == torch.float32


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize(
    ("kwargs", "quantile"),
    [
        ({"time_sampling": "uniform"}, lambda u: u),
        (
            {"time_sampling": "logit_normal", "logit_mean": -0.4, "logit_std": 1.3},
            lambda u: stats.norm.cdf((np.log(u / (1 - u)) + 0.4) / 1.3),
        ),
        ({"time_sampling": "shifted", "time_shift": 3.0}, lambda u: 3 * u / (1 + 2 * u)),
    ],
)
def test_distribution_of_t(path, kwargs, quantile):
    """KS against the closed cumulative distribution of the unit draw, mapped back from the training interval."""
    interpolant = Interpolant(path=path, prediction="noise", seed=1, **kwargs)
    start, end = interpolant.train_interval()
    t = interpolant.sample_time(torch.arange(50_000)).double().numpy()
    # fp32 rounds t by at most half a spacing below 1
    assert t.min() >= start - 3e-8
    assert t.max() <= end + 3e-8
    unit = np.clip((t - start) / (end - start), 1e-9, 1 - 1e-9)
    assert stats.kstest(unit, quantile).pvalue > 1e-3


def test_t_comes_from_its_own_stream():
    """From the noise's stream, t would be a function of the first value of the noise."""
    index = torch.arange(64)
    unit = uniform(8, index, Stream.TIME).double()
    torch.testing.assert_close(Interpolant(seed=8).sample_time(index).double(), unit)
    logits = 0.5 + 2 * normal(8, index, Stream.TIME).double()
    drawn = Interpolant(seed=8, time_sampling="logit_normal", logit_mean=0.5, logit_std=2.0).sample_time(index)
    torch.testing.assert_close(drawn.double(), 1 / (1 + (-logits).exp()), rtol=1e-5, atol=1e-7)


def test_shift_favours_noise():
    index = torch.arange(20_001)
    median = {
        s: Interpolant(time_sampling="shifted", time_shift=s).sample_time(index).median() for s in (1.0, 3.0, 0.5)
    }
    # the median of u is 1/2, so that of t is 1/(1 + s); four standard errors of the median are at most 0.014
    for shift, value in median.items():
        assert value.item() == pytest.approx(1 / (1 + shift), abs=0.014)


def test_extreme_draws_of_t_stay_inside_the_open_interval():
    """sigmoid(20) is 1 in fp32, where a weight would divide by sigma = 0."""
    t = Interpolant(prediction="noise", train_eps=0.0, time_sampling="logit_normal", logit_std=30.0).sample_time(
        torch.arange(2000)
    )
    assert 0 < t.min() < 1e-6
    assert 1 - 1e-6 < t.max() < 1


# Conversions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_conversions_recover_all_four(path, prediction):
    """Whatever a perfect model predicts, velocity, noise, score and data come out; fp64, over the sampling interval."""
    rng = np.random.default_rng(0)
    interpolant = Interpolant(path=path, prediction=prediction)
    start, end = interpolant.sample_interval(sde=True)
    times = np.linspace(start, end, 41)
    data, noise = rng.standard_normal((2, 41, 2, 3, 3))
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None, None] for c in exact.path(path, times))
    truth = {
        "velocity": d_alpha * data + d_sigma * noise,
        "noise": noise,
        "score": -noise / sigma,
        "data": data,
    }
    x = torch.from_numpy(alpha * data + sigma * noise)
    out, t = torch.from_numpy(truth[prediction]), torch.from_numpy(times)
    for name, expected in truth.items():
        got = getattr(interpolant, name)(out, x, t).numpy()
        # the divisors are >= 1e-3 (alpha or sigma at the ends), squared at worst: 1e-16 * 1e6
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_conversions_on_gaussian_data_in_fp32(path, prediction):
    world = exact.Gaussian(path)
    interpolant = Interpolant(path=path, prediction=prediction)
    start, end = interpolant.sample_interval(sde=True)
    t = torch.linspace(start, end, 33)
    alpha, sigma, *_ = exact.path(path, t.double().numpy())
    spread = np.sqrt(alpha**2 * world.std**2 + sigma**2)
    z = np.random.default_rng(1).standard_normal((33, 2))
    x = torch.from_numpy(alpha[:, None] * world.mean + spread[:, None] * z).float()
    args = x.double().numpy(), t.double().numpy()[:, None]
    out = torch.from_numpy(world(prediction, *args)).float()
    for name in ("velocity", "noise", "score", "data"):
        got = getattr(interpolant, name)(out, x, t)
        assert got.dtype == torch.float32
        # an fp32 rounding (6e-8) of x or out, over a divisor of 1e-3, on values of size 1 to 3
        np.testing.assert_allclose(got.numpy(), world(name, *args), rtol=1e-4, atol=5e-4, err_msg=name)


def test_velocity_prediction_converts_at_the_very_ends():
    x, out = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.25]])
    zero, one = torch.zeros(1), torch.ones(1)
    for path, rate in (("linear", 1.0), ("gvp", np.pi / 2)):
        interpolant = Interpolant(path=path)
        # at t = 0, x is the noise itself, the score is -x, and v = rate * (data) - [linear: x]
        torch.testing.assert_close(interpolant.noise(out, x, zero), x)
        torch.testing.assert_close(interpolant.score(out, x, zero), -x)
        expected = out + x if path == "linear" else out / rate
        torch.testing.assert_close(interpolant.data(out, x, zero), expected)
        torch.testing.assert_close(interpolant.data(out, x, one), x)
        assert interpolant.noise(out, x, one).isfinite().all()
    interpolant = Interpolant(path="vp")
    for quantity in (interpolant.noise, interpolant.score, interpolant.data):
        assert quantity(out, x, zero).isfinite().all()


def test_low_precision_output_is_converted_in_fp32():
    x, t = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 4)
    for prediction in PREDICTIONS:
        interpolant = Interpolant(prediction=prediction)
        out = (0.3 * x).bfloat16()
        for name in ("velocity", "noise", "score", "data"):
            got = getattr(interpolant, name)(out, x, t)
            assert torch.equal(got, getattr(interpolant, name)(out.float(), x, t))
            assert got.dtype == torch.float32


def test_flip_time_maps_rectified_flow():
    """Their x = (1 - r) data + r noise with velocity noise - data is our linear path."""
    r = torch.tensor([0.125, 0.75])
    data, noise = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    t, velocity = flip_time(r, noise - data)
    xt, _, _ = Interpolant().sample(data, torch.arange(2), t)
    ours = normal(0, torch.arange(2), Stream.NOISE, 5)
    torch.testing.assert_close(xt, (1 - r[:, None]) * data + r[:, None] * ours)
    torch.testing.assert_close(velocity, data - noise)
    back = flip_time(t, velocity)
    assert torch.equal(back[0], r)
    assert torch.equal(back[1], noise - data)
