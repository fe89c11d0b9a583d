import pytest
import torch

from sitfast.kernels import gated_residual_layernorm_modulate

SHAPES = [(1, 3, 1152), (2, 5, 72), (3, 1, 1152), (2, 7, 6)]


def formula(x, y, gate, shift, scale, eps=1e-6):
    x_new = x + gate[:, None] * y
    centred = x_new - x_new.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return x_new, centred / (variance + eps).sqrt() * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_match_the_formula_on_chunk_views(shape, assert_agrees):
    batch, _, width = shape

    def on_chunks(function):
        def run(x, y, adaln):
            gate, shift, scale = adaln.chunk(6, dim=1)[2:5]
            assert gate.stride() == (6 * width, 1)
            return function(x, y, gate, shift, scale)

        return run

    inputs = torch.randn(shape) * 2 + 1, torch.randn(shape), torch.randn(batch, 6 * width)
    assert_agrees(on_chunks(gated_residual_layernorm_modulate), on_chunks(formula), *inputs)


def test_gate_zero_passes_x_through_and_still_learns():
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24, requires_grad=True)
    gate = torch.zeros(2, 24, requires_grad=True)
    x_new, h = gated_residual_layernorm_modulate(x, y, gate, torch.randn(2, 24), torch.randn(2, 24))
    assert torch.equal(x_new, x)
    weight = torch.randn_like(x)
    dy, dgate = torch.autograd.grad((x_new * weight).sum() + 0 * h.sum(), (y, gate))
    assert dy.abs().max() == 0
    assert torch.allclose(dgate, (weight * y).sum(1), atol=1e-5)


def test_fp32_residual_stream_with_bf16_branch():
    x = torch.randn(2, 5, 1152)
    y, gate, shift, scale = (torch.randn(s).bfloat16() for s in ((2, 5, 1152), (2, 1152), (2, 1152), (2, 1152)))
    wide_x_new, wide_h = formula(*(value.double() for value in (x, y, gate, shift, scale)))
    with torch.autocast("cpu", torch.bfloat16):
        x_new, h = gated_residual_layernorm_modulate(x, y, gate, shift, scale)
    assert (x_new.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    assert (x_new - wide_x_new).abs().max() < 1e-5  # a product rounded to bf16 would be off by up to 2^-8 of it
    assert ((h.double() - wide_h).abs() <= 2.0**-8 * wide_h.abs() + 1e-5).all()


def test_bf16_residual_stream_rounds_each_output_once():
    operands = [torch.randn(s).bfloat16() for s in ((2, 5, 1152), (2, 5, 1152), (2, 1152), (2, 1152), (2, 1152))]
    wide = formula(*(value.double() for value in operands))
    for got, expected in zip(gated_residual_layernorm_modulate(*operands), wide, strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 24)}, r"x has shape \(2, 24\), expected \[B, N, D\]"),
        ({"y": torch.zeros(2, 6, 24)}, r"y has shape \(2, 6, 24\), expected \(2, 5, 24\)"),
        ({"gate": torch.zeros(2, 1, 24)}, r"gate has shape \(2, 1, 24\), expected \(2, 24\)"),
        ({"y": torch.zeros(2, 5, 24, dtype=torch.bool)}, "y is torch.bool"),
        ({"gate": torch.zeros(2, 24, device="meta")}, "gate is on meta"),
        ({"y": torch.zeros(2, 24, 5).transpose(1, 2)}, "y has last stride 5"),
    ],
)
def test_bad_operands_are_named(change, message):
    rows = {name: torch.zeros(2, 24) for name in ("gate", "shift", "scale")}
    operands = {"x": torch.zeros(2, 5, 24), "y": torch.zeros(2, 5, 24), **rows, **change}
    with pytest.raises(ValueError, match=f"gated_residual_layernorm_modulate: {message}"):
        gated_residual_layernorm_modulate(**operands)
