"""A thousand random lists of tensors, dtypes and settings against AdamW in fp64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sitfast.kernels.adamw_ema import gradient_norm
from tests.kernels.operators import needs_operators
from tests.kernels.test_adamw_ema import BF16, FP32, assert_follows, formula, lists, run

pytestmark = needs_operators
sizes = st.lists(st.one_of(st.integers(0, 40), st.integers(1000, 1100), st.sampled_from([1024, 4099])), max_size=6)


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sizes=sizes,
    decays=st.lists(st.floats(0, 0.9999), max_size=3),
    grads=st.sampled_from([FP32, BF16]),
    moments=st.sampled_from([FP32, BF16]),
    copies=st.booleans(),
    aligned=st.booleans(),
    divisor=st.one_of(st.none(), st.floats(1.0, 1e4)),
    seed=st.integers(0, 1 << 30),
    weight_decay=st.sampled_from([0.0, 0.1]),
    lr=st.floats(1e-6, 0.1),
)
def test_random_lists_follow_the_formula(
    sizes, decays, grads, moments, copies, aligned, divisor, seed, weight_decay, lr
):
    made = lists(
        [(n,) for n in sizes], decays=decays, grads=grads, moments=moments, copies=copies, aligned=aligned, seed=seed
    )
    given_divisor = None if divisor is None else torch.tensor(divisor)
    exact = 1.0 if divisor is None else float(given_divisor)
    expected = formula(made, divisor=exact, weight_decay=weight_decay, lr=lr)
    if sizes:
        norm = gradient_norm(made["grads"])
        exact = math.sqrt(sum(float(g.double().square().sum()) for g in made["grads"]))
        assert float(norm) == pytest.approx(exact, rel=1e-6)
    run(made, divisor=given_divisor, lr=lr, weight_decay=weight_decay, seed=seed)
    assert_follows(made, expected, moments)
