"""The update against AdamW in fp64 and torch.optim.AdamW; lists of every kind; skips, roundings, state, shards."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sitfast.kernels import use_reference
from sitfast.kernels.adamw_ema import adamw_ema, gradient_norm, stochastic_bf16
from sitfast.optim import Update
from sitfast.philox import Stream, words
from tests.conftest import command
from tests.kernels.operators import needs_operators, on_each_device, same_bits

pytestmark = needs_operators
BF16, FP32 = torch.bfloat16, torch.float32


def lists(sizes, *, decays=(0.9,), grads=FP32, moments=FP32, copies=True, device="cpu", seed=0, aligned=True):
    """Random operands, as keywords of adamw_ema; unaligned ones begin 4 bytes into their memory."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype, scale=1.0, positive=False):
        made = []
        for size in sizes:
            values = torch.randn(size, generator=generator) * scale
            memory = torch.zeros(values.numel() + 1, dtype=dtype, device=device)
            memory = memory if aligned else memory[1:]
            view = memory[: values.numel()].view(size)
            made.append(view.copy_(values.abs() if positive else values))
        return made

    return {
        "params": draw(FP32),
        "grads": draw(grads),
        "exp_avgs": draw(moments, 0.1),
        "exp_avg_sqs": draw(moments, 0.01, positive=True),
        "steps": torch.arange(len(sizes), dtype=FP32, device=device),
        "emas": [draw(FP32) for _ in decays],
        "decays": list(decays),
        "copies": draw(BF16) if copies else [],
    }


HYPER = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def run(operands, **more):
    positional = [operands[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
    adamw_ema(
        *positional, emas=operands["emas"], decays=operands["decays"], copies=operands["copies"], **(HYPER | more)
    )


def flat(operands):
    names = ("params", "exp_avgs", "exp_avg_sqs", "copies")
    return (
        [t for name in names for t in operands[name]] + [t for e in operands["emas"] for t in e] + [operands["steps"]]
    )


def formula(operands, divisor=1.0, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
    """(params, m, v, averages) in fp64, from the published equations."""
    result = []
    for i, (p, g, m, v) in enumerate(
        zip(*(operands[n] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")), strict=True)
    ):
        p, g, m, v = (x.double() for x in (p, g, m, v))
        g, k = g / divisor, float(operands["steps"][i]) + 1
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** k), v / (1 - betas[1] ** k)
        p = p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps)
        averages = [d * e[i].double() + (1 - d) * p for e, d in zip(operands["emas"], operands["decays"], strict=True)]
        result.append((p, m, v, averages))
    return result


def assert_follows(operands, expected, moments=FP32):
    for i, (p, m, v, averages) in enumerate(expected):
        # A few fp32 roundings of values around 1; v² and the bias corrections are well conditioned.
        torch.testing.assert_close(operands["params"][i].double(), p, rtol=1e-6, atol=1e-6)
        rtol = 1e-6 if moments == FP32 else 2.0**-7  # one stochastic rounding: up to one unit of 8 bits
        torch.testing.assert_close(operands["exp_avgs"][i].double(), m, rtol=rtol, atol=1e-7)
        torch.testing.assert_close(operands["exp_avg_sqs"][i].double(), v, rtol=rtol, atol=1e-7)
        for k, average in enumerate(averages):
            torch.testing.assert_close(operands["emas"][k][i].double(), average, rtol=1e-6, atol=1e-6)
        if operands["copies"]:
            assert same_bits(operands["copies"][i], operands["params"][i].to(BF16))


SIZES = [(5, 7), (0,), (1,), (4096,), (3, 0, 2), (20_000,), (65_537,)]


@on_each_device
@pytest.mark.parametrize("decays", [(), (0.9,), (0.9, 0.99), (0.5, 0.9, 0.99)])
@pytest.mark.parametrize("grads", [FP32, BF16])
@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("aligned", [True, False])
def test_one_update_follows_the_formula(device, decays, grads, moments, aligned):
    operands = lists(SIZES, decays=decays, grads=grads, moments=moments, device=device, aligned=aligned)
    expected = formula(operands, divisor=1.7)
    run(operands, divisor=torch.tensor(1.7, device=device), skip=torch.zeros((), device=device))
    assert_follows(operands, expected, moments)
    assert operands["steps"].tolist() == [float(i + 1) for i in range(len(SIZES))]


@on_each_device
@pytest.mark.parametrize("moments", [FP32, BF16])
def test_reference_and_kernel_agree(device, moments):
    operands = lists(SIZES, decays=(0.9, 0.99), moments=moments, device=device)
    other = deepcopy(operands)
    options = dict(divisor=torch.tensor(2.0, device=device), skip=torch.zeros((), device=device), seed=11, step=3)
    run(operands, **options)
    with use_reference():
        run(other, **options)
    for a, b in zip(flat(operands), flat(other), strict=True):
        rtol = 2.0**-7 if a.dtype == BF16 else 1e-6  # where the last bit before the rounding differs
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)
    if moments == BF16:  # the same bits are rounded by the same random numbers, nearly everywhere
        for a, b in zip(operands["exp_avgs"], other["exp_avgs"], strict=True):
            assert a.numel() == 0 or (a != b).float().mean() < 1e-3


@on_each_device
@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("reference", [False, True])
def test_a_skipped_update_changes_no_bit(device, moments, reference):
    operands = lists(SIZES, decays=(0.9, 0.99), moments=moments, device=device)
    operands["params"][0].view(-1)[0] = -0.0
    operands["grads"][3][5] = math.nan
    before = [t.clone() for t in flat(operands)]
    skip = torch.ones((), device=device)
    if reference:
        with use_reference():
            run(operands, skip=skip, divisor=torch.tensor(3.0, device=device))
    else:
        run(operands, skip=skip, divisor=torch.tensor(3.0, device=device))
    assert all(same_bits(a, b) for a, b in zip(flat(operands), before, strict=True))


@on_each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_norm_and_stays_where_it_is(device, bad):
    operands = lists([(100,), (5000,)], device=device)
    operands["grads"][1][4321] = bad
    assert not math.isfinite(float(gradient_norm(operands["grads"])))
    run(operands)
    wrong = ~operands["params"][1].isfinite()
    assert wrong[4321] and wrong.sum() == 1 and operands["params"][0].isfinite().all()


@on_each_device
def test_zero_gradients(device):
    operands = lists([(1000,)], device=device)
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        operands[name][0].zero_()
    p = operands["params"][0].clone()
    assert float(gradient_norm(operands["grads"])) == 0.0
    run(operands, weight_decay=0.0)
    assert torch.equal(operands["params"][0], p)


@on_each_device
def test_equal_bits_from_run_to_run(device):
    results = []
    for _ in range(3):
        operands = lists(SIZES, moments=BF16, device=device)
        norm = gradient_norm(operands["grads"])
        run(operands, divisor=norm, seed=5, step=9)
        results.append([norm, *flat(operands)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_number_of_threads_changes_no_bit():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            operands = lists([(200_000,), (70_001,), (3,)], moments=BF16)
            norm = gradient_norm(operands["grads"])
            run(operands, divisor=norm)
            results.append([norm, *flat(operands)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def random_walk(step, shapes, device):
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(shape, generator=generator) * 0.3).to(device) for shape in shapes]


def walk(device, **options):
    """The weights after 2000 steps: ours, torch's fused AdamW in fp32, and in fp64."""
    shapes = [(40, 25), (999,)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device) for shape in shapes]
    narrow, wide = ([nn.Parameter(p.to(dtype)) for p in deepcopy(start)] for dtype in (FP32, torch.float64))
    optimizers = [(params, torch.optim.AdamW(params, fused=True, **options)) for params in (narrow, wide)]
    ours, m, v = [p.clone() for p in start], *([torch.zeros_like(p) for p in start] for _ in range(2))
    steps = torch.zeros(2, device=device)
    for step in range(2000):
        grads = random_walk(step, shapes, device)
        adamw_ema(ours, grads, m, v, steps, **options)
        for params, adamw in optimizers:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype)
            adamw.step()
    ours, theirs, exact = (torch.cat([p.detach().double().flatten() for p in each]) for each in (ours, narrow, wide))
    size = exact.norm()
    print(f"ours from torch {(ours - theirs).norm() / size:.1e}, from fp64 {(ours - exact).norm() / size:.1e}, "
          f"torch from fp64 {(theirs - exact).norm() / size:.1e}")  # fmt: skip
    return ours, theirs, exact


@on_each_device
@pytest.mark.parametrize("weight_decay", [0.0, 2.0**-6])
def test_two_thousand_steps_track_torch(device, weight_decay):
    """Torch rounds the betas and 1 − lr · weight_decay to fp32 on a CPU and does not on a GPU: here they are exact."""
    ours, theirs, _ = walk(device, lr=2.0**-10, betas=(0.875, 1 - 2.0**-10), eps=1e-8, weight_decay=weight_decay)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@on_each_device
def test_two_thousand_steps_stay_close_to_fp64(device):
    """With betas that fp32 does not hold. 2000 roundings of the weights alone make 1e-6."""
    ours, _, exact = walk(device, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert (ours - exact).norm() < 2e-6 * exact.norm()


# bf16 moments --------------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_right_on_average():
    x = torch.tensor([1.0 + 2.0**-9, -3.14159, 1e-30, 6.5e37]).repeat(20_000, 1)
    random = words(1, torch.arange(20_000), Stream.ROUNDING, 4) & 0xFFFF
    rounded = stochastic_bf16(x, random).double()
    spacing = 2.0 ** (x[0].double().abs().log2().floor() - 7)
    assert ((rounded - x.double()).abs() <= spacing).all()
    error = (rounded.mean(0) - x[0].double()) / spacing
    assert error.abs().max() < 4 * 0.5 / math.sqrt(20_000)  # the standard deviation is at most half a unit
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    kept = stochastic_bf16(special, torch.full((5,), 0xFFFF))
    assert kept[:2].tolist() == [math.inf, -math.inf] and kept[2].isnan() and kept[3:].tolist() == [0.0, 0.0]


@on_each_device
def test_moments_are_rounded_by_the_stated_words(device):
    """16 bits of the word of (seed, tensor, step, element): the lower ones for m, the upper ones for v."""
    seed, step, size = 0xABCDEF0123, 77, 1003
    operands = lists([(3,), (size,)], moments=BF16, device=device)
    wide = deepcopy(operands)
    for name in ("exp_avgs", "exp_avg_sqs"):
        wide[name] = [x.float() for x in wide[name]]
    run(operands, seed=seed, step=step)
    run(wide)
    bits = words(seed, torch.tensor([1], device=device), Stream.ROUNDING, size, step=step)[0]
    assert same_bits(operands["exp_avgs"][1], stochastic_bf16(wide["exp_avgs"][1], bits & 0xFFFF))
    assert same_bits(operands["exp_avg_sqs"][1], stochastic_bf16(wide["exp_avg_sqs"][1], bits >> 16))


@on_each_device
def test_a_shard_rounds_as_its_part_of_the_whole(device):
    """The operator itself, with the index of the first element of the shard, aligned to four elements or not."""
    whole = lists([(1000,)], moments=BF16, device=device)
    for first in (400, 401):
        parts = [deepcopy(whole) for _ in range(2)]
        everything = deepcopy(whole)
        run(everything, seed=3, step=5)
        for part, where in zip(parts, (slice(0, first), slice(first, 1000)), strict=True):
            for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies"):
                part[name] = [part[name][0][where]]
            part["emas"] = [[e[0][where]] for e in part["emas"]]
            torch.ops.sitfast.adamw_ema_(
                part["params"], part["grads"], part["exp_avgs"], part["exp_avg_sqs"], part["steps"], part["emas"][0],
                part["copies"], None, None, part["decays"], [where.start], 1e-2, 0.9, 0.95, 1e-8, 0.1, 3, 5,
            )  # fmt: skip
            assert same_bits(part["exp_avgs"][0], everything["exp_avgs"][0][where])
            assert same_bits(part["exp_avg_sqs"][0], everything["exp_avg_sqs"][0][where])


# State ---------------------------------------------------------------------------------------------------------------


def make_update(moments="fp32"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optim = SimpleNamespace(
        lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, clip_norm=None, on_nonfinite="stop", schedule="constant",
        warmup_steps=0, min_lr=0.0, moments=moments,
    )  # fmt: skip
    return model, Update(
        model, optim=optim, ema=SimpleNamespace(decays=(0.9,), warmup=False), total_steps=9, precision="fp32"
    )


def give_gradients(model, step):
    for p, g in zip(model.parameters(), random_walk(step, [p.shape for p in model.parameters()], "cpu"), strict=True):
        p.grad = g


def test_state_moves_to_torch_and_back():
    model, update = make_update()
    for step in range(3):
        give_gradients(model, step)
        update.step(step, torch.tensor(1.0))
    copy = deepcopy(model)
    adamw = torch.optim.AdamW(copy.parameters(), lr=1e-2, weight_decay=0.1)
    adamw.load_state_dict(deepcopy(update.optimizer.state_dict()))
    for step in range(3, 6):
        give_gradients(model, step)
        give_gradients(copy, step)
        update.step(step, torch.tensor(1.0))
        adamw.step()
    back, resumed = make_update()
    back.load_state_dict(copy.state_dict())
    resumed.optimizer.load_state_dict(deepcopy(adamw.state_dict()))
    assert resumed.state()["step"].tolist() == [6.0] * 4
    for step in range(6, 9):
        for one, advance in ((model, update), (back, resumed)):
            give_gradients(one, step)
            advance.step(step, torch.tensor(1.0))
    assert resumed.state()["step"].tolist() == [9.0] * 4
    for a, b in zip(model.parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bf16_moments_take_half_the_memory_and_train():
    model, update = make_update("bf16")
    other, plain = make_update()
    assert all(t.dtype == BF16 for k, t in update.state().items() if k.startswith("exp_avg"))
    for step in range(9):
        give_gradients(model, step)
        give_gradients(other, step)
        update.step(step, torch.tensor(1.0))
        plain.step(step, torch.tensor(1.0))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=9 * 1e-2 * 0.05)  # nine steps of lr, each within a few per cent
        assert not torch.equal(a, b)


def test_parameters_without_a_gradient_stay_and_their_averages_follow():
    model, update = make_update()
    give_gradients(model, 0)
    model[1].bias.grad = None
    with torch.no_grad():
        model[1].bias.add_(1.0)
    bias, average = model[1].bias.detach().clone(), update.ema.state(0)["1.bias"].clone()
    update.step(0, torch.tensor(1.0))
    assert torch.equal(model[1].bias, bias)
    assert update.state()["step"].tolist() == [1.0, 1.0, 1.0, 0.0]
    torch.testing.assert_close(update.ema.state(0)["1.bias"], average + 0.1 * (bias - average))


def test_shards_are_updated_as_the_whole():
    """Two ranks, DTensors, empty shards, and the rounding of bf16 moments by the index in the whole tensor."""
    result = command("tests.kernels.sharded_update", ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("sharded updates agree") == 2


# Edges ---------------------------------------------------------------------------------------------------------------


def test_empty_lists():
    run(lists([]))
    run(lists([(0,), (0,)]))
    assert float(gradient_norm([torch.zeros(0), torch.zeros(0)])) == 0.0
    with pytest.raises(ValueError, match="no gradients"):
        gradient_norm([])


@on_each_device
def test_opcheck_and_fullgraph(device):
    operands = lists([(5,), (33,)], device=device)
    scalars = ([0.9], [], 1e-2, 0.9, 0.95, 1e-8, 0.1, 0, 0)
    lists_ = [operands[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
    arguments = (*lists_, operands["emas"][0], operands["copies"], torch.tensor(2.0, device=device), None, *scalars)
    torch.library.opcheck(torch.ops.sitfast.adamw_ema_.default, arguments)
    torch.library.opcheck(torch.ops.sitfast.gradient_norm.default, (operands["grads"],))
    other = deepcopy(operands)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params, grads, m, v, steps, averages):
        norm = gradient_norm(grads)
        adamw_ema(params, grads, m, v, steps, emas=[averages], decays=[0.9], divisor=norm, lr=1e-2)
        return norm

    norm = compiled(*lists_, operands["emas"][0])
    assert same_bits(norm, gradient_norm(other["grads"]))
    given = [other[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
    adamw_ema(*given, emas=other["emas"], decays=[0.9], divisor=norm, lr=1e-2)
    assert all(same_bits(a, b) for a, b in zip(flat(operands), flat(other), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o["grads"].pop(), r"grads has 1 tensors, params has 2"),
        (lambda o: o["exp_avgs"].__setitem__(1, torch.zeros(3)), r"exp_avgs number 1 has shape \(3,"),
        (lambda o: o["emas"].append(o["emas"][0]), r"2 lists of averages for 1 decays"),
        (lambda o: o["grads"].__setitem__(0, torch.zeros(5, device="meta")), "grads number 0 has shape .* on meta"),
        (lambda o: o["grads"].__setitem__(0, torch.zeros(5, dtype=torch.int32)), "grads"),
        (lambda o: o["exp_avgs"].__setitem__(1, torch.zeros(33).half()), "exp_avgs mixes dtypes"),
        (lambda o: o["params"].__setitem__(0, torch.zeros(10)[::2]), "params is not contiguous"),
        (lambda o: o.__setitem__("steps", torch.zeros(3)), r"steps must be fp32 of shape \(2,\)"),
        (lambda o: o["copies"].__setitem__(0, torch.zeros(5)), "copies mixes dtypes"),
    ],
)
def test_mismatched_lists_are_named_before_anything_is_written(change, message):
    operands = lists([(5,), (33,)])
    change(operands)
    before = [t.clone() for t in flat(operands)]
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(operands)
    assert all(same_bits(a, b) for a, b in zip(flat(operands), before, strict=True) if a.device.type != "meta")


def test_the_reference_names_mismatched_lists_too():
    operands = lists([(5,), (33,)])
    operands["exp_avgs"][1] = torch.zeros(3)
    with (
        use_reference(),
        pytest.raises(ValueError, match=r"exp_avgs number 1 has shape \(3,\) on cpu, params has \(33,\)"),
    ):
        run(operands)


@pytest.mark.gpu
def test_more_tensors_than_one_launch_takes():
    operands = lists([(i % 50,) for i in range(1500)], decays=(0.9, 0.99), device="cuda")
    expected = formula(operands)
    norm = float(gradient_norm(operands["grads"]))
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in operands["grads"]))
    assert norm == pytest.approx(exact, rel=1e-6)
    run(operands)
    assert_follows(operands, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_bytes_in_one_tensor():
    size = (1 << 29) + 5
    p, g, m, v = (torch.full((size,), value, device="cuda") for value in (1.0, 0.5, 0.0, 0.0))
    adamw_ema([p], [g], [m], [v], torch.zeros(1, device="cuda"), lr=0.25)
    for part in (p[:4], p[1 << 28 : (1 << 28) + 4], p[-7:]):
        torch.testing.assert_close(part, torch.full_like(part, 0.75))  # the first step of Adam is lr · sign
    assert float(gradient_norm([g])) == pytest.approx(0.5 * math.sqrt(size), rel=1e-6)


@pytest.mark.gpu
def test_gpu_and_cpu_agree_to_the_bit():
    for moments in (FP32, BF16):
        here, there = lists(SIZES, moments=moments), lists(SIZES, moments=moments, device="cuda")
        run(here, divisor=torch.tensor(1.7), seed=4, step=2)
        run(there, divisor=torch.tensor(1.7, device="cuda"), seed=4, step=2)
        assert all(same_bits(a, b) for a, b in zip(flat(here), flat(there), strict=True))
