"""The update against AdamW, clip and EMA written out in fp64, and the promise that a bad step changes no bit."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sitfast.errors import SitfastError
from sitfast.optim import EMA, Update, learning_rate

LR, BETAS, EPS, DECAY, TOTAL = 1e-2, (0.9, 0.95), 1e-8, 0.1, 50


def settings(**changes) -> SimpleNamespace:
    base = SimpleNamespace(
        lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip_norm=None, on_nonfinite="stop", moments="fp32"
    )
    schedule = {"schedule": "constant", "warmup_steps": 0, "min_lr": 0.0}
    return SimpleNamespace(**(vars(base) | schedule | changes))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, generator=generator), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(5, 7, generator=generator))
        self.bias = nn.Parameter(torch.randn(37, generator=generator))


def make(
    *, precision: str = "fp32", decays=(0.9,), warmup: bool = False, rank: int = 0, reduce=None, **changes
) -> tuple:
    model = Tiny()
    section = SimpleNamespace(decays=decays, warmup=warmup)
    update = Update(
        model,
        optim=settings(**changes),
        ema=section,
        total_steps=TOTAL,
        precision=precision,
        all_reduce_max=reduce,
        rank=rank,
    )
    return model, update


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Tiny().named_parameters() if p.requires_grad}


def run(model, update, step: int, *, loss: float = 1.0, scale: float = 1.0, poison: float | None = None) -> Tensor:
    update.zero_grad()
    for name, gradient in gradients(step).items():
        model.get_parameter(name).grad = gradient * scale
    if poison is not None:
        model.bias.grad[3] = poison
    return update.step(step, torch.tensor(loss))


def snapshot(model, update) -> dict[str, Tensor]:
    """Everything a step may change, except the counters of the guard itself."""
    tensors = {f"model.{k}": v for k, v in model.named_parameters()}
    for i in range(len(update.ema.decays)):
        tensors |= {f"ema{i}.{k}": v for k, v in update.ema.state(i).items()}
    tensors |= {k: v for k, v in update.state().items() if k.startswith("exp_avg") or k == "step"}
    return {k: v.detach().clone() for k, v in tensors.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


class Fp64:
    """clip → AdamW → EMA in fp64, from the published equations."""

    def __init__(self, model: nn.Module) -> None:
        self.p = {k: v.detach().double() for k, v in model.named_parameters() if v.requires_grad}
        self.m = {k: torch.zeros_like(v) for k, v in self.p.items()}
        self.v = {k: torch.zeros_like(v) for k, v in self.p.items()}
        self.ema = {k: v.clone() for k, v in self.p.items()}
        self.k = 0

    def step(self, grads: dict[str, Tensor], *, lr: float, clip: float | None, decay: float) -> float:
        self.k += 1
        grads = {k: g.double() for k, g in grads.items()}
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        coefficient = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        b1, b2 = BETAS
        for k, g in grads.items():
            g = g * coefficient
            self.m[k] = b1 * self.m[k] + (1 - b1) * g
            self.v[k] = b2 * self.v[k] + (1 - b2) * g * g
            m_hat, v_hat = self.m[k] / (1 - b1**self.k), self.v[k] / (1 - b2**self.k)
            self.p[k] = self.p[k] - lr * DECAY * self.p[k] - lr * m_hat / (v_hat.sqrt() + EPS)
            self.ema[k] = decay * self.ema[k] + (1 - decay) * self.p[k]
        return norm


# learning rate ------------------------------------------------------------------------------------------------------


def test_learning_rate_constant_with_warmup():
    optim = settings(warmup_steps=4)
    assert [learning_rate(s, optim, 100) for s in range(6)] == [LR * f for f in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)]
    assert learning_rate(0, settings(), 100) == LR


def test_learning_rate_cosine():
    optim = settings(schedule="cosine", warmup_steps=10, min_lr=1e-3)
    assert learning_rate(9, optim, 110) == LR
    assert learning_rate(10, optim, 110) == pytest.approx(LR, rel=1e-15)
    assert learning_rate(60, optim, 110) == pytest.approx((LR + 1e-3) / 2)  # half-way
    assert learning_rate(35, optim, 110) == pytest.approx(1e-3 + 9e-3 * (1 + math.sqrt(0.5)) / 2)  # a quarter
    assert learning_rate(110, optim, 110) == pytest.approx(1e-3)
    assert learning_rate(500, optim, 110) == pytest.approx(1e-3)


# EMA ----------------------------------------------------------------------------------------------------------------


def test_ema_follows_the_formula_for_several_decays_with_warmup():
    model = Tiny()
    decays = (0.5, 0.9999)
    ema = EMA(model.named_parameters(), decays, True)
    want = [{k: p.detach().double() for k, p in model.named_parameters()} for _ in decays]
    for n in range(12):
        with torch.no_grad():
            for p in (model.weight, model.bias):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
        ema.update(n, torch.zeros(()))
        for shadow, decay in zip(want, decays, strict=True):
            d = min(decay, (1 + n) / (10 + n))
            for k, p in model.named_parameters():
                shadow[k] = d * shadow[k] + (1 - d) * p.detach().double()
    for i, shadow in enumerate(want):
        got = ema.state(i)
        assert list(got) == ["pos_embed", "weight", "bias"]
        for k in shadow:
            torch.testing.assert_close(got[k].double(), shadow[k], rtol=1e-6, atol=1e-6)
    # After 12 updates 0.5 is capped by itself (from n = 8 on) and 0.9999 by the warm-up, so they differ.
    assert not torch.equal(ema.state(0)["weight"], ema.state(1)["weight"])
    assert [ema.decay(i, 100_000) for i in range(2)] == [0.5, 0.9999]
    assert EMA(model.named_parameters(), (0.9999,), False).decay(0, 0) == 0.9999


def test_ema_is_fp32_for_low_precision_weights_and_owns_its_memory():
    model = Tiny().to(torch.bfloat16)
    ema = EMA(model.named_parameters(), (0.75,), False)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(0, torch.zeros(()))
    want = 0.75 * before.double() + 0.25 * model.weight.detach().double()
    assert all(v.dtype == torch.float32 for v in ema.state(0).values())
    torch.testing.assert_close(ema.state(0)["weight"].double(), want, rtol=1e-6, atol=1e-6)


def test_ema_skip_keeps_even_the_sign_of_zero():
    parameter = nn.Parameter(torch.tensor([-0.0, 1.0]))
    ema = EMA([("p", parameter)], (0.9,), False)
    with torch.no_grad():
        parameter.copy_(torch.tensor([1.0, float("inf")]))
    ema.update(0, torch.ones(()))
    assert ema.state(0)["p"].tolist() == [0.0, 1.0] and ema.state(0)["p"].signbit().tolist() == [True, False]


def test_ema_applied_swaps_the_weights_and_puts_them_back():
    model = Tiny()
    ema = EMA(model.named_parameters(), (0.9, 0.5), False)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(0, torch.zeros(()))
    own = {k: v.detach().clone() for k, v in model.named_parameters()}
    with pytest.raises(KeyError), ema.applied(model, 1):
        torch.testing.assert_close(model.weight.detach(), own["weight"] - 0.5)
        raise KeyError
    assert_same_bits(own, dict(model.named_parameters()))
    with EMA(model.named_parameters(), (), False).applied(model):
        assert_same_bits(own, dict(model.named_parameters()))


# the update ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
def test_update_matches_fp64(clip):
    model, update = make(clip_norm=clip, schedule="cosine", warmup_steps=3, min_lr=1e-3)
    reference = Fp64(model)
    pos_embed = model.pos_embed.detach().clone()
    for step in range(10):
        lr = LR * (step + 1) / 3 if step < 3 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 3) / (TOTAL - 3))) / 2
        norm = run(model, update, step)
        want = reference.step(gradients(step), lr=lr, clip=clip, decay=0.9)
        assert float(norm) == pytest.approx(want, rel=1e-6)
    update.check(10)
    for k, p in reference.p.items():
        # Ten fp32 updates of size lr: the difference stays within a few units in the last place of values below 4.
        torch.testing.assert_close(model.get_parameter(k).detach().double(), p, rtol=0, atol=5e-6)
        torch.testing.assert_close(update.ema.state(0)[k].double(), reference.ema[k], rtol=0, atol=5e-6)
    assert update.state()["step"].tolist() == [10.0, 10.0]
    assert torch.equal(model.pos_embed, pos_embed) and "exp_avg.pos_embed" not in update.state()


def test_update_matches_torch_clip_and_adamw():
    model, update = make(clip_norm=0.5)
    other = Tiny()
    adamw = torch.optim.AdamW(
        [other.weight, other.bias], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False, fused=False
    )
    for step in range(5):
        run(model, update, step)
        for name, gradient in gradients(step).items():
            other.get_parameter(name).grad = gradient
        torch.nn.utils.clip_grad_norm_([other.weight, other.bias], 0.5)
        adamw.step()
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.bias, other.bias, rtol=1e-6, atol=1e-6)


BAD = [{"loss": math.inf}, {"loss": math.nan}, {"poison": math.nan}, {"poison": -math.inf}]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_stop_changes_no_bit_and_names_the_step(bad, first):
    model, update = make(clip_norm=1.0, rank=3, decays=(0.9, 0.99), warmup=True)
    if not first:
        run(model, update, 0)
    update.check(0)
    before = snapshot(model, update)
    run(model, update, 1234, **bad)
    run(model, update, 1235)  # good, but the run has stopped
    run(model, update, 1236, loss=math.nan)  # not the first
    assert_same_bits(before, snapshot(model, update))
    what = "loss" if "loss" in bad else "gradient"
    with pytest.raises(
        SitfastError, match=rf"^non-finite {what} at step 1235 on rank 3: .*weights are those before that step"
    ):
        update.check(1237)
    assert int(update.skipped) == 0


@pytest.mark.parametrize("bad", BAD)
def test_skip_changes_no_bit_counts_and_goes_on(bad):
    model, update = make(on_nonfinite="skip")
    clean_model, clean = make(on_nonfinite="skip")
    run(model, update, 0)
    run(clean_model, clean, 0)
    before = snapshot(model, update)
    run(model, update, 1, **bad)
    assert_same_bits(before, snapshot(model, update))
    assert int(update.skipped) == 1
    run(model, update, 2)
    update.check(3)
    run(clean_model, clean, 2)
    assert_same_bits(snapshot(clean_model, clean), snapshot(model, update))


def test_ranks_decide_alike_and_know_the_culprit():
    seen_by_rank_5 = []

    def collect(flags: Tensor) -> Tensor:
        seen_by_rank_5.append(flags.clone())
        return flags

    there_model, there = make(rank=5, reduce=collect)
    run(there_model, there, 7, loss=math.nan)
    model, update = make(rank=0, reduce=lambda flags: torch.maximum(flags, seen_by_rank_5[0]))
    before = snapshot(model, update)
    run(model, update, 7)
    assert_same_bits(before, snapshot(model, update))
    for one in (there, update):
        with pytest.raises(SitfastError, match="non-finite loss at step 8 on rank 5"):
            one.check(8)


# fp16 ---------------------------------------------------------------------------------------------------------------


def scale_of(update) -> float:
    return float(update.state()["loss_scale"])


def test_fp16_unscales_and_clips_like_fp32():
    model, update = make(precision="fp16", clip_norm=1.0)
    other, plain = make(precision="fp32", clip_norm=1.0)
    loss = torch.tensor(3.0)
    assert float(update.scale_loss(loss)) == 3.0 * 65536 and plain.scale_loss(loss) is loss
    for step in range(3):
        norm = run(model, update, step, scale=65536.0)
        assert float(norm) == float(run(other, plain, step))  # a power of two is exact
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-6, atol=1e-7)


def test_fp16_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    model, update = make(precision="fp16")  # on_nonfinite = stop: an overflow is no reason to stop
    run(model, update, 0, scale=65536.0)
    before = snapshot(model, update)
    run(model, update, 1, poison=math.inf)
    assert_same_bits(before, snapshot(model, update))
    assert (scale_of(update), int(update.skipped)) == (32768.0, 1)
    update.check(2)
    for p in (model.weight, model.bias):
        p.grad = torch.zeros_like(p)
    for step in range(2, 2001):
        update.step(step, torch.tensor(1.0))
    assert scale_of(update) == 32768.0  # 1999 good steps since the overflow
    update.step(2001, torch.tensor(1.0))
    assert scale_of(update) == 65536.0


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_fp16_stops_when_the_scale_would_fall_below_one(mode):
    model, update = make(precision="fp16", on_nonfinite=mode)
    for step in range(16):
        run(model, update, step, poison=math.inf)
    update.check(16)
    assert (scale_of(update), int(update.skipped)) == (1.0, 16)
    run(model, update, 16, poison=math.inf)
    with pytest.raises(SitfastError, match=r"non-finite gradient at step 17 on rank 0: fp16 .* loss scale of 1"):
        update.check(17)


def test_fp16_bad_loss_stops_although_an_overflow_does_not():
    model, update = make(precision="fp16")
    run(model, update, 4, loss=math.nan, poison=math.nan)
    with pytest.raises(SitfastError, match="non-finite loss at step 5"):
        update.check(5)


# state --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 3])
def test_state_round_trip_continues_bit_for_bit(done):
    def train(model, update, steps) -> None:
        for step in steps:
            run(model, update, step, scale=65536.0, poison=math.inf if step == 4 else None)

    options = {"precision": "fp16", "clip_norm": 1.0, "decays": (0.9, 0.99), "warmup": True}
    model, update = make(**options)
    train(model, update, range(done))
    saved = {k: v.clone() for k, v in update.state().items()}
    averages = [{k: v.clone() for k, v in update.ema.state(i).items()} for i in range(2)]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    assert {"exp_avg.weight", "exp_avg_sq.bias", "step", "loss_scale", "growth_tracker", "skipped"} <= saved.keys()

    other, resumed = make(**options)
    train(other, resumed, range(20, 22))  # something to overwrite
    other.load_state_dict(weights)
    resumed.load(saved)
    for i, average in enumerate(averages):
        resumed.ema.load(i, average)
    train(model, update, range(done, done + 5))
    train(other, resumed, range(done, done + 5))
    assert_same_bits(snapshot(model, update), snapshot(other, resumed))
    assert_same_bits(update.state(), resumed.state())
    assert int(resumed.skipped) == 1


def test_state_of_another_model_is_refused_whole():
    model, update = make()
    state = {k: torch.ones_like(v) for k, v in update.state().items()}
    before = snapshot(model, update)
    with pytest.raises(SitfastError, match=r"lacks 'exp_avg.weight'"):
        update.load({k: v for k, v in state.items() if k != "exp_avg.weight"})
    with pytest.raises(SitfastError, match=r"unknown 'exp_avg.head'"):
        update.load(state | {"exp_avg.head": torch.ones(1)})
    with pytest.raises(SitfastError, match=r"'exp_avg_sq.bias' has shape \(2,\), this model needs \(37,\)"):
        update.load(state | {"exp_avg_sq.bias": torch.ones(2)})
    assert_same_bits(before, snapshot(model, update))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_for_the_gpu_and_all_match_the_cpu(precision):
    def train(device: str) -> dict[str, Tensor]:
        model = Tiny().to(device)
        ema = SimpleNamespace(decays=(0.9, 0.99), warmup=True)
        optim = settings(clip_norm=1.0, on_nonfinite="skip")
        update = Update(model, optim=optim, ema=ema, total_steps=TOTAL, precision=precision)
        scale = 65536.0 if precision == "fp16" else 1.0
        batches = [{k: (g * scale).to(device) for k, g in gradients(step).items()} for step in range(4)]
        batches[2]["bias"][3] = math.nan
        loss = torch.tensor(1.0, device=device)
        states = [snapshot(model, update)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step, batch in enumerate(batches):
                for name, gradient in batch.items():
                    model.get_parameter(name).grad = gradient
                update.step(step, loss)
                states.append(snapshot(model, update))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits(states[2], states[3])
        assert int(update.skipped) == 1
        return {name: value.cpu() for name, value in states[-1].items()}

    cpu, cuda = train("cpu"), train("cuda")
    for name, value in cpu.items():
        torch.testing.assert_close(cuda[name], value, rtol=1e-5, atol=1e-6)
