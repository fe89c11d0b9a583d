import math

import pytest
import torch

from sitfast.kernels import mlp


def formula(x, w1, b1, w2, b2):
    u = x @ w1.T + b1
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return gelu @ w2.T + b2


def operands(width=72, hidden=288, lead=(2, 5)):
    shapes = ((*lead, width), (hidden, width), (hidden,), (width, hidden), (width,))
    scales = (1.0, width**-0.5, 1.0, hidden**-0.5, 1.0)
    return [torch.randn(shape) * scale for shape, scale in zip(shapes, scales, strict=True)]


@pytest.mark.parametrize("lead", [(2, 5), (1, 1), (3,), (2, 1, 3)])
def test_outputs_and_gradients_match_the_formula(lead, assert_agrees):
    assert_agrees(mlp, formula, *operands(lead=lead))


def test_wide_rows(assert_agrees):
    assert_agrees(mlp, formula, *operands(width=1152, hidden=36, lead=(1, 3)))


def test_gemms_follow_autocast():
    values = operands()
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(values[0].bfloat16(), *values[1:])
    assert out.dtype == torch.bfloat16
    # operands, hidden layer and result are each rounded to bf16 (2^-8); sums over random signs do not amplify that
    assert (out - formula(*values)).abs().max() < 8 * 2.0**-8 * formula(*values).abs().max()


@pytest.mark.parametrize(
    "position, value, message",
    [
        (1, torch.zeros(288, 71), r"w1 has shape \(288, 71\), expected \(288, 72\)"),
        (2, torch.zeros(72), r"b1 has shape \(72,\), expected \(288,\)"),
        (3, torch.zeros(288, 72), r"w2 has shape \(288, 72\), expected \(72, 288\)"),
        (4, torch.zeros(1), r"b2 has shape \(1,\), expected \(72,\)"),
        (0, torch.zeros(2, 72, dtype=torch.int32), "x is torch.int32"),
        (4, torch.zeros(72, device="meta"), "b2 is on meta"),
    ],
)
def test_bad_operands_are_named(position, value, message):
    values = operands()
    values[position] = value
    with pytest.raises(ValueError, match=f"mlp: {message}"):
        mlp(*values)
