import pytest
import torch

from sitfast.kernels import layernorm_modulate

SHAPES = [(1, 3, 1152), (2, 5, 72), (3, 1, 1152), (2, 7, 6)]


def formula(x, shift, scale, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_match_the_formula_on_chunk_views(shape, assert_agrees):
    batch, _, width = shape

    def on_chunks(function):
        def run(x, adaln):
            shift, scale = adaln.chunk(6, dim=1)[3:5]
            assert shift.stride() == (6 * width, 1)
            return function(x, shift, scale)

        return run

    x, adaln = torch.randn(shape) * 3 + 1, torch.randn(batch, 6 * width)
    assert_agrees(on_chunks(layernorm_modulate), on_chunks(formula), x, adaln)


def test_eps_counts_for_rows_of_small_variance():
    x, zero = torch.randn(1, 4, 64) * 1e-3, torch.zeros(1, 64)
    expected = formula(x.double(), zero, zero, eps=1e-6)
    assert (layernorm_modulate(x, zero, zero) - expected).abs().max() < 1e-5
    assert (layernorm_modulate(x, zero, zero, eps=1e-2) - formula(x.double(), zero, zero, 1e-2)).abs().max() < 1e-5


def test_large_mean_keeps_its_variance():
    x, zero = torch.randn(1, 4, 1152) + 1000, torch.zeros(1, 1152)
    # x itself is exact in fp64, so what is left is the rounding of mean and difference: 1000 · 2^-24 each
    assert (layernorm_modulate(x, zero, zero) - formula(x.double(), zero, zero)).abs().max() < 1000 * 2.0**-22


@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_rounds_once(dtype, unit):
    x, shift, scale = (torch.randn(shape).to(dtype) for shape in ((2, 5, 1152), (2, 1152), (2, 1152)))
    h = layernorm_modulate(x, shift, scale)
    expected = formula(x.double(), shift.double(), scale.double())
    assert h.dtype == dtype
    assert ((h.double() - expected).abs() <= unit * expected.abs() + 1e-5).all()


def test_dtype_follows_autocast_and_else_x():
    x, shift, scale = torch.randn(2, 5, 24), torch.randn(2, 24), torch.randn(2, 24)
    narrow = [value.bfloat16() for value in (shift, scale)]
    assert layernorm_modulate(x, *narrow).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        h = layernorm_modulate(x, shift, scale)
        assert layernorm_modulate(x.double(), shift, scale).dtype == torch.float64
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, layernorm_modulate(x, shift, scale).bfloat16())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(5, 24)}, r"x has shape \(5, 24\), expected \[B, N, D\]"),
        ({"shift": torch.zeros(2, 23)}, r"shift has shape \(2, 23\), expected \(2, 24\)"),
        ({"scale": torch.zeros(1, 24)}, r"scale has shape \(1, 24\), expected \(2, 24\)"),
        ({"x": torch.zeros(2, 5, 24, dtype=torch.int64)}, "x is torch.int64"),
        ({"scale": torch.zeros(2, 24, device="meta")}, "scale is on meta, the first operand on cpu"),
        ({"shift": torch.zeros(24, 2).t()}, "shift has last stride 2, expected 1"),
        ({"x": torch.zeros(2, 24, 5).transpose(1, 2)}, "x has last stride 5, expected 1"),
    ],
)
def test_bad_operands_are_named(change, message):
    operands = {"x": torch.zeros(2, 5, 24), "shift": torch.zeros(2, 24), "scale": torch.zeros(2, 24), **change}
    with pytest.raises(ValueError, match=f"layernorm_modulate: {message}"):
        layernorm_modulate(**operands)
