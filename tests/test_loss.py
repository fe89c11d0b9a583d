from __future__ import annotations

import numpy as np
import pytest
import torch

from sitfast.interpolant import Interpolant
from sitfast.loss import interpolant_loss
from tests import exact

PATHS, PREDICTIONS, WEIGHTS = (
    ("linear", "gvp", "vp"),
    ("velocity", "noise", "score"),
    ("none", "velocity", "likelihood"),
)


def _batch(interpolant: Interpolant, rows: int = 32, channels: int = 4):
    generator = torch.Generator().manual_seed(0)
    data, out = torch.randn(2, rows, channels, 3, 3, generator=generator)
    _, t, target = interpolant.sample(data, torch.arange(rows))
    return out, target, t


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_against_fp64(path, prediction, weight):
    interpolant = Interpolant(path=path, prediction=prediction, loss_weight=weight)
    out, target, t = _batch(interpolant)
    t[:2] = torch.tensor(interpolant.train_interval()).clamp(1e-6, 1 - 1e-6)  # both ends of the interval
    times = t.double().numpy()
    _, sigma, _, _ = exact.path(path, times)
    spread = exact.drift_variance(path, times)
    factor = {"none": 1.0, "velocity": (spread / sigma) ** 2, "likelihood": spread / sigma**2}[weight]
    o, z = out.double().numpy(), target.double().numpy()
    error = {
        "velocity": lambda: ((o - z) ** 2).mean((1, 2, 3)),
        "noise": lambda: factor * ((o - z) ** 2).mean((1, 2, 3)),
        "score": lambda: factor * ((o * sigma[:, None, None, None] + z) ** 2).mean((1, 2, 3)),
    }[prediction]()
    loss = interpolant_loss(out, target, t, interpolant=interpolant)
    assert loss.shape == (32,)
    assert loss.dtype == torch.float32
    # fp32: sigma and g carry a few 6e-8 each, and their quotient enters squared; measured 4.4e-7 at worst.
    np.testing.assert_allclose(loss.double().numpy(), error, rtol=2e-6)


@pytest.mark.parametrize("prediction", ["noise", "score"])
@pytest.mark.parametrize("path", PATHS)
def test_velocity_weight_is_the_velocity_error(path, prediction):
    """(g / sigma)^2 turns the error of the noise into the error of the velocity that this output implies."""
    weighted = Interpolant(path=path, prediction=prediction, loss_weight="velocity")
    data = torch.randn(16, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.1, 0.9, 16)
    xt, _, noise = weighted.sample(data, torch.arange(16), t)
    _, _, velocity = Interpolant(path=path).sample(data, torch.arange(16), t)
    out = torch.randn(data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    implied = weighted.velocity(out, xt, t)
    expected = (implied - velocity).square().mean((1, 2, 3))
    loss = interpolant_loss(out, noise, t, interpolant=weighted)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_second_half_of_the_channels_is_unused():
    interpolant = Interpolant()
    out, target, t = _batch(interpolant)
    doubled = torch.cat((out, torch.full_like(out, torch.nan)), dim=1).requires_grad_()
    loss = interpolant_loss(doubled, target, t, interpolant=interpolant)
    assert torch.equal(loss, interpolant_loss(out, target, t, interpolant=interpolant))
    loss.sum().backward()
    assert doubled.grad is not None
    assert torch.equal(doubled.grad[:, 4:], torch.zeros_like(out))


def test_low_precision_output_is_reduced_in_fp32():
    interpolant = Interpolant()
    out, target, t = _batch(interpolant)
    loss = interpolant_loss(out.bfloat16(), target, t, interpolant=interpolant)
    expected = (out.bfloat16().double() - target.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_flat_data_and_batch_splits():
    interpolant = Interpolant(path="gvp", prediction="score", loss_weight="likelihood")
    data, out = torch.randn(2, 12, 50, generator=torch.Generator().manual_seed(3))  # genes: [B, G]
    index = torch.arange(12)
    xt, t, target = interpolant.sample(data, index)
    whole = interpolant_loss(out, target, t, interpolant=interpolant)
    parts = []
    for rows in (slice(0, 5), slice(5, 12)):
        _, t_part, target_part = interpolant.sample(data[rows], index[rows])
        parts.append(interpolant_loss(out[rows], target_part, t_part, interpolant=interpolant))
    assert torch.equal(whole, torch.cat(parts))
    assert xt.shape == data.shape
