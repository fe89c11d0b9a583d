"""The compiled loss and its gradient against the formula in fp64, at both ends of an interval and for both halves."""

import pytest
import torch

from sitfast import Interpolant, interpolant_loss
from sitfast.kernels import use_reference
from tests import exact
from tests.kernels.operators import needs_operators, on_each_device, same_bits

pytestmark = needs_operators
PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "score")


def operands(interpolant, *shape, rows=6, channels=1, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(rows, generator=generator)
    if rows > 1:
        t[:2] = torch.tensor(interpolant.train_interval()).clamp(1e-6, 1 - 1e-6)
    target = torch.randn(rows, *shape, generator=generator)
    out = torch.randn(rows, channels * shape[0], *shape[1:], generator=generator).to(dtype)
    return out.to(device), target.to(device), t.to(device)


def formula(out, target, t, interpolant, arriving):
    """Loss and gradient in fp64, from the paths as printed."""
    out, target, times = out.double().cpu(), target.double().cpu(), t.double().cpu().numpy()
    used, rest = out[:, : target.shape[1]], (1,) * (out.ndim - 1)
    sigma, spread = (
        torch.from_numpy(exact.path(interpolant.path, times)[1]),
        exact.drift_variance(interpolant.path, times),
    )
    spread = torch.from_numpy(spread)
    factor = torch.ones_like(sigma)
    if interpolant.prediction != "velocity":
        factor = {"none": factor, "velocity": (spread / sigma) ** 2, "likelihood": spread / sigma**2}[
            interpolant.loss_weight
        ]
    slope = sigma.view(-1, *rest) if interpolant.prediction == "score" else torch.ones(1, *rest, dtype=torch.float64)
    error = used * slope + target if interpolant.prediction == "score" else used - target
    loss = factor * error.square().flatten(1).mean(1)
    gradient = torch.zeros_like(out)
    scale = 2 * factor * arriving.double().cpu() / used[0].numel()
    gradient[:, : target.shape[1]] = scale.view(-1, *rest) * error * slope
    return loss, gradient


@on_each_device
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weight", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize("channels", [1, 2])
def test_loss_and_gradient_follow_the_formula(device, path, prediction, weight, channels):
    interpolant = Interpolant(path=path, prediction=prediction, loss_weight=weight)
    out, target, t = operands(interpolant, 4, 6, 6, channels=channels, device=device)
    arriving = torch.rand(len(t), generator=torch.Generator().manual_seed(1)).to(device)
    want, want_gradient = formula(out, target, t, interpolant, arriving)
    out.requires_grad_()
    loss = interpolant_loss(out, target, t, interpolant=interpolant)
    (gradient,) = torch.autograd.grad(loss, out, arriving)
    torch.testing.assert_close(loss.double().cpu(), want, rtol=2e-6, atol=0)
    # Relative to the largest of its sample: near an end the weights span many orders of magnitude.
    largest = want_gradient.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    assert ((gradient.double().cpu() - want_gradient).abs() <= 4e-6 * largest).all()
    if channels == 2:
        assert gradient[:, 4:].abs().max() == 0


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 32, 32), (3,), (1, 5)])
def test_low_precision_is_as_close_as_eager(device, dtype, shape):
    interpolant = Interpolant()
    out, target, t = operands(interpolant, *shape, channels=2, dtype=dtype, device=device)
    arriving = torch.full_like(t, 0.3)
    want, want_gradient = formula(out, target, t, interpolant, arriving)
    leaf, eager = out.clone().requires_grad_(), out.clone().requires_grad_()
    loss = interpolant_loss(leaf, target, t, interpolant=interpolant)
    (gradient,) = torch.autograd.grad(loss, leaf, arriving)
    with use_reference():
        (rough,) = torch.autograd.grad(interpolant_loss(eager, target, t, interpolant=interpolant), eager, arriving)
    torch.testing.assert_close(loss.double().cpu(), want, rtol=2e-6, atol=0)
    assert gradient.dtype == dtype
    error, allowed = (
        (gradient.double().cpu() - want_gradient).abs().max(),
        (rough.double().cpu() - want_gradient).abs().max(),
    )
    assert error <= 2 * allowed + 1e-6 * want_gradient.abs().max()


@on_each_device
def test_views_expanded_gradients_and_large_samples(device):
    interpolant = Interpolant(prediction="noise")
    whole = torch.randn(3, 4, 70, 70, device=device)  # two parts of 4096 values and a rest
    view, target, t = whole[:, :2], torch.randn(3, 2, 70, 70, device=device), torch.full((3,), 0.5, device=device)
    for out in (view, view.clone(), view.transpose(2, 3)):
        leaf = out.detach().requires_grad_()
        want, want_gradient = formula(leaf.detach(), target, t, interpolant, torch.ones(3) / 3)
        loss = interpolant_loss(leaf, target, t, interpolant=interpolant)
        (gradient,) = torch.autograd.grad(loss.mean(), leaf)  # arrives with stride 0
        torch.testing.assert_close(loss.double().cpu(), want, rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient.double().cpu(), want_gradient, rtol=1e-5, atol=1e-9)
        again = interpolant_loss(leaf, target, t, interpolant=interpolant)
        assert same_bits(loss, again)


def test_empty_batch():
    loss = interpolant_loss(
        torch.zeros(0, 2, 3, requires_grad=True), torch.zeros(0, 2, 3), torch.zeros(0), interpolant=Interpolant()
    )
    assert loss.shape == (0,)
    loss.sum().backward()


@on_each_device
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(device, bad):
    out, target, t = operands(Interpolant(), 2, 3, 3, device=device)
    out[2, 1, 0, 0] = bad
    loss = interpolant_loss(out, target, t, interpolant=Interpolant())
    assert not loss[2].isfinite() and loss.isfinite().sum() == 5


@on_each_device
def test_opcheck_and_fullgraph(device):
    interpolant = Interpolant(prediction="score", loss_weight="velocity")
    out, target, t = operands(interpolant, 2, 3, 3, channels=2, device=device)
    out.requires_grad_()
    torch.library.opcheck(torch.ops.sitfast.interpolant_loss.default, (out, target, t, 0, 2, 1))
    factor = torch.rand(6, device=device)
    torch.library.opcheck(
        torch.ops.sitfast.interpolant_loss_backward.default, (factor, target, factor, 4, torch.bfloat16)
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(out, target, t):
        return interpolant_loss(out, target, t, interpolant=interpolant)

    assert same_bits(compiled(out, target, t), interpolant_loss(out, target, t, interpolant=interpolant))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(6, 3, 3, 3)}, r"out has shape \(6, 3, 3, 3\), target \(6, 2, 3, 3\)"),
        ({"out": torch.zeros(6, 2, 3, 3, dtype=torch.int32)}, "out is Int, expected fp32, bf16 or fp16"),
        ({"t": torch.zeros(5)}, r"t has shape \(5,\), expected \(6,\)"),
        ({"target": torch.zeros(6, 2, 3, 3, device="meta")}, "target is on meta"),
        ({"target": torch.zeros(6, 2, 3, 3, requires_grad=True)}, "target and t have no gradient"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"out": torch.zeros(6, 2, 3, 3), "target": torch.zeros(6, 2, 3, 3), "t": torch.zeros(6)} | change
    with pytest.raises((ValueError, RuntimeError), match=message):
        interpolant_loss(given["out"], given["target"], given["t"], interpolant=Interpolant())
