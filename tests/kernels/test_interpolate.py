"""The draw of a batch against the PyTorch reference and closed forms, its statistics, and that no split of it matters."""

import numpy as np
import pytest
import torch
from scipy import stats

from sitfast import Interpolant
from sitfast.kernels import use_reference
from sitfast.kernels.interpolate import Posterior, interpolate
from sitfast.philox import Stream, normal, uniform
from tests.kernels.operators import needs_operators, on_each_device, same_bits, ulps

pytestmark = needs_operators
PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "score")
SAMPLINGS = (
    {},
    {"time_sampling": "logit_normal", "logit_mean": -0.3, "logit_std": 1.2},
    {"time_sampling": "shifted", "time_shift": 3.0},
)
SEED = 0x1234_5678_9ABC


def batch(device, *shape, rows=33):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(rows, *shape, generator=generator)
    return data.to(device), torch.randint(0, 1 << 62, (rows,), generator=generator).to(device)


def both(*args, **kwargs):
    with use_reference():
        expected = interpolate(*args, **kwargs)
    return interpolate(*args, **kwargs), expected


@on_each_device
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["uniform", "logit_normal", "shifted"])
def test_within_two_units_of_the_reference(device, path, prediction, sampling):
    interpolant = Interpolant(path=path, prediction=prediction, seed=SEED, **sampling)
    data, index = batch(device, 4, 6, 6)
    got, expected = both(interpolant, data, index)
    assert ulps(got.t, expected.t) <= 2
    with use_reference():  # from here on at the kernel's own t: a path is steep where it is steep
        expected = interpolate(interpolant, data, index, t=got.t)
    noise = normal(SEED, index, Stream.NOISE, 4, 6, 6)
    c = interpolant.coefficients(got.t.view(-1, 1, 1, 1))
    assert ulps(got.xt, expected.xt, torch.maximum((c.alpha * data).abs(), (c.sigma * noise).abs())) <= 2
    if prediction == "velocity":
        terms = torch.maximum((c.d_alpha * data).abs(), (c.d_sigma * noise).abs())
        # vp: d_sigma = -rate alpha^2 / sigma doubles the unit by which two libraries' alpha may differ.
        assert ulps(got.target, expected.target, terms) <= (4 if path == "vp" and device == "cpu" else 2)
    else:
        assert ulps(got.target, noise) <= 1


@on_each_device
def test_the_noise_has_the_bits_of_the_reference(device):
    """Linear with uniform t needs no library function but those of the noise, in fp64, rounded once."""
    data, index = batch(device, 4, 32, 32)
    got, expected = both(Interpolant(seed=SEED), data, index)
    assert same_bits(got.t, expected.t)
    for a, b in ((got.xt, expected.xt), (got.target, expected.target)):
        assert (a != b).float().mean() < 1e-5  # where two fp64 libraries round a tie in fp32 to different sides
    noise = interpolate(Interpolant(prediction="noise", seed=SEED), data, index).target
    assert ulps(noise, normal(SEED, index, Stream.NOISE, 4, 32, 32)) <= 1


@on_each_device
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5, 1), (7, 3), (4, 8, 8)])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_and_dtypes(device, shape, rows, dtype):
    interpolant = Interpolant(path="gvp", seed=SEED)
    data, index = batch(device, *shape, rows=rows)
    got, expected = both(interpolant, data.to(dtype), index, dtype=dtype)
    assert got.xt.dtype == dtype and got.target.dtype == torch.float32 and got.xt.shape == data.shape
    exact = (both(interpolant, data.to(dtype), index)[0]).xt
    assert same_bits(got.xt, exact.to(dtype))  # one rounding, from fp32
    torch.testing.assert_close(got.target, expected.target, rtol=1e-6, atol=1e-6)
    assert got.labels.shape == (0,)


@on_each_device
def test_everything_in_one_pass(device):
    interpolant = Interpolant(path="vp", seed=SEED)
    moments, index = batch(device, 8, 6, 6, rows=64)
    mirrored = moments.flip(-1) + 1
    labels = torch.arange(64, device=device)
    posterior = Posterior(scale=0.18215, shift=0.1)
    options = dict(mirrored=mirrored, posterior=posterior, labels=labels, drop=0.4, null=1000)
    got, expected = both(interpolant, moments, index, **options)
    assert same_bits(got.labels, expected.labels)
    assert 10 < (got.labels == 1000).sum() < 45
    torch.testing.assert_close(got.xt, expected.xt, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.target, expected.target, rtol=1e-5, atol=2e-5)
    # and from first principles, in fp64
    flip = uniform(SEED, index, Stream.FLIP) < 0.5
    chosen = torch.where(flip.view(-1, 1, 1, 1), mirrored, moments).double()
    mean, logvar = chosen.chunk(2, dim=1)
    latents = (mean + (logvar / 2).exp() * normal(SEED, index, Stream.VAE, 4, 6, 6) - 0.1) * 0.18215
    c = interpolant.coefficients(got.t.double().view(-1, 1, 1, 1))
    want = c.alpha * latents + c.sigma * normal(SEED, index, Stream.NOISE, 4, 6, 6)
    torch.testing.assert_close(got.xt.double(), want, rtol=1e-5, atol=2e-6)
    dropped = torch.where(uniform(SEED, index, Stream.LABEL_DROP) < 0.4, 1000, labels)
    assert torch.equal(got.labels, dropped)


@on_each_device
def test_no_split_of_the_batch_matters(device):
    """1, 2 and 4 ranks, and B = 8 as 2 × 4."""
    interpolant = Interpolant(seed=SEED)
    data, index = batch(device, 3, 4, 4, rows=8)
    whole = interpolate(interpolant, data, index, labels=index, drop=0.5)
    for ranks in (1, 2, 4):
        for take in (
            [slice(r, None, ranks) for r in range(ranks)],
            [slice(i, i + 8 // ranks) for i in range(0, 8, 8 // ranks)],
        ):
            for part in take:
                piece = interpolate(interpolant, data[part], index[part], labels=index[part], drop=0.5)
                assert all(same_bits(a, b[part]) for a, b in zip(piece, whole, strict=True))


@on_each_device
def test_unaligned_views_and_expanded_data(device):
    interpolant = Interpolant(seed=SEED)
    data, index = batch(device, 4, 4, 4, rows=4)
    storage = torch.zeros(data.numel() + 1, device=device)
    view = storage[1:].view(data.shape).copy_(data)
    assert same_bits(interpolate(interpolant, view, index).xt, interpolate(interpolant, data, index).xt)
    wide = data[:, :, :1, :1].expand(4, 4, 4, 4)
    assert same_bits(interpolate(interpolant, wide, index).xt, interpolate(interpolant, wide.clone(), index).xt)


@pytest.mark.gpu
def test_gpu_and_cpu_draw_the_same():
    """Up to what exp differs in the two libraries: a unit of 1 + exp(−z) is up to two of t, and x_t is compared at one t."""
    data, index = batch("cpu", 4, 32, 32, rows=64)
    for path in PATHS:
        interpolant = Interpolant(path=path, seed=SEED, time_sampling="logit_normal")
        here, there = interpolate(interpolant, data, index), interpolate(interpolant, data.cuda(), index.cuda())
        assert ulps(there.t.cpu(), here.t) <= 2
        there = interpolate(interpolant, data.cuda(), index.cuda(), t=here.t.cuda())
        print(f"{path}: {(there.xt.cpu() != here.xt).float().mean().item():.2e} of x_t differ between GPU and CPU")
        torch.testing.assert_close(there.xt.cpu(), here.xt, rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_bytes():
    rows, size = 9, 1 << 26  # 2.4 GB of data
    index = torch.arange(rows, device="cuda")
    data = torch.zeros(rows, size, device="cuda")
    got = interpolate(Interpolant(prediction="noise", seed=SEED), data, index, dtype=torch.bfloat16)
    last = index[-1:]
    assert ulps(got.target[-1:, :8], normal(SEED, last, Stream.NOISE, 8)) <= 1
    alone = interpolate(Interpolant(prediction="noise", seed=SEED), data[-1:], last)
    assert same_bits(alone.target[0, -64:], got.target[-1, -64:])
    assert not same_bits(got.target[-1, -64:], got.target[-1, :64])


@on_each_device
def test_noise_is_normal_and_t_follows_its_law(device):
    rows = 20_000
    index = torch.arange(rows, device=device)
    draw = interpolate(Interpolant(prediction="noise", seed=7), torch.zeros(rows, 8, device=device), index)
    noise, n = draw.target.cpu().double().numpy(), rows * 8
    assert abs(noise.mean()) < 4 / np.sqrt(n)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.kurtosis(noise, axis=None)) < 4 * np.sqrt(24 / n)
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in noise.T)
    assert stats.kstest(draw.t.cpu().numpy(), lambda t: np.clip((t - 1e-3) / (1 - 2e-3), 0, 1)).pvalue > 1e-3
    law = Interpolant(time_sampling="logit_normal", logit_mean=0.5, logit_std=0.7, seed=7)
    t = interpolate(law, torch.zeros(rows, 1, device=device), index).t.cpu().double().numpy()
    assert stats.kstest((np.log(t / (1 - t)) - 0.5) / 0.7, "norm").pvalue > 1e-3


@on_each_device
def test_gradient_of_the_data(device):
    interpolant = Interpolant(path="gvp", seed=SEED)
    data, index = batch(device, 2, 3, rows=4)
    weights = torch.randn(2, 4, 2, 3, device=device)
    grads = []
    for reference in (False, True):
        leaf = data.clone().requires_grad_()
        if reference:
            with use_reference():
                draw = interpolate(interpolant, leaf, index)
        else:
            draw = interpolate(interpolant, leaf, index)
        loss = (draw.xt * weights[0]).sum() + (draw.target * weights[1]).sum()
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
    leaf = data.requires_grad_()
    (alone,) = torch.autograd.grad(interpolate(interpolant, leaf, index).xt.sum(), leaf)
    t = interpolant.sample_time(index)
    torch.testing.assert_close(alone, interpolant.coefficients(t).alpha.view(-1, 1, 1).expand_as(alone))


@on_each_device
def test_opcheck_and_fullgraph(device):
    data, index = batch(device, 2, 3, rows=4)
    settings = (SEED, 1, True, 0, 0.0, 1.0, 0.0, 1.0, 1.0, False, 1.0, 0.0, 0.5, 10, torch.bfloat16)
    for values, labels in ((data, index), (data.requires_grad_(), None)):
        torch.library.opcheck(torch.ops.sitfast.interpolate.default, (values, index, None, None, labels, *settings))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, i):
        return interpolate(Interpolant(seed=SEED), x, i, labels=i, drop=0.3, null=5)

    for a, b in zip(
        compiled(data.detach(), index),
        interpolate(Interpolant(seed=SEED), data.detach(), index, labels=index, drop=0.3, null=5),
        strict=True,
    ):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.arange(3)}, r"index is torch.int64 of shape \(3,\) .* expected int64 of shape \(4,\)"),
        ({"index": torch.arange(4).int()}, r"index is torch.int32"),
        ({"labels": torch.zeros(4)}, r"labels is torch.float32"),
        ({"t": torch.zeros(5)}, r"t is torch.float32 of shape \(5,\)"),
        ({"mirrored": torch.zeros(4, 3, 2)}, r"mirrored has shape \(4, 3, 2\), expected \(4, 2, 3\)"),
        ({"mirrored": torch.zeros(4, 2, 3).half()}, "mirrored is torch.float16, data is torch.float32"),
        ({"data": torch.zeros(4, 3, 2), "posterior": Posterior(1.0, 0.0)}, r"expected \[B, 2 C, ...\]"),
        ({"data": torch.tensor(1.0)}, r"expected \[B, ...\]"),
        ({"posterior": Posterior(1.0, 0.0), "data": torch.zeros(4, 2, 3, requires_grad=True)}, "have no gradient"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    operands = {"data": torch.zeros(4, 2, 3), "index": torch.arange(4)} | changes
    with pytest.raises(ValueError, match=message):
        interpolate(Interpolant(), operands.pop("data"), operands.pop("index"), **operands)
