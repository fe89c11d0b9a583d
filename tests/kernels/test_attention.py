import pytest
import torch

from sitfast.kernels import attention


def formula(qkv):
    q, k, v = (part.permute(0, 2, 1, 3) for part in qkv.unbind(2))
    scores = q @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return (weights @ v).permute(0, 2, 1, 3)


@pytest.mark.parametrize("shape", [(2, 16, 3, 2, 72), (1, 1, 3, 4, 8), (3, 7, 3, 1, 18)])
def test_outputs_and_gradients_match_the_formula(shape, assert_agrees):
    assert_agrees(attention, formula, torch.randn(shape))


def test_view_of_the_packed_linear_output(assert_agrees):
    def packed(function):
        return lambda flat: function(flat.view(2, 5, 3, 4, 6)).flatten(2)

    assert_agrees(packed(attention), packed(formula), torch.randn(2, 5, 3 * 24))


def test_key_bias_has_no_gradient():
    """Softmax does not see a shift that all keys share, so Σ over tokens of dk vanishes."""
    qkv = torch.randn(2, 16, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((attention(qkv) * torch.randn(2, 16, 2, 8, dtype=torch.float64)).sum(), qkv)
    assert grad[:, :, 1].abs().max() > 1e-3
    assert grad[:, :, 1].sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bias_gets_the_gradient_of_the_linear_layer_before(backend):
    h, weight = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(3 * 12, 12, dtype=torch.float64)
    bias = torch.randn(3 * 12, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 5, 2, 6, dtype=torch.float64)
    plain = formula((h @ weight.T + bias).view(2, 5, 3, 2, 6))
    (expected,) = torch.autograd.grad(plain, bias, dout)

    def attend(bias):
        qkv = torch.nn.functional.linear(h, weight, bias.detach()).view(2, 5, 3, 2, 6)
        return attention(qkv, bias=bias, backend=backend)

    assert torch.allclose(attend(bias), plain, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(attend(bias), bias, dout)[0], expected, atol=1e-12)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.allclose(torch.autograd.grad(compiled(bias), bias, dout)[0], expected, atol=1e-12)


def test_dtype_follows_autocast():
    qkv = torch.randn(1, 4, 3, 2, 8)
    assert attention(qkv.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(qkv).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "qkv, message",
    [
        (torch.zeros(2, 5, 72), r"qkv has shape \(2, 5, 72\), expected \[B, N, 3, H, d\]"),
        (torch.zeros(2, 5, 2, 4, 6), r"qkv has shape \(2, 5, 2, 4, 6\), expected \(2, 5, 3, 4, 6\)"),
        (torch.zeros(2, 5, 3, 4, 6, dtype=torch.int8), "qkv is torch.int8"),
        (torch.zeros(2, 5, 3, 6, 4).transpose(3, 4), "qkv has last stride 4"),
    ],
)
def test_bad_operands_are_named(qkv, message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(qkv)


def test_bad_bias_is_named():
    with pytest.raises(ValueError, match=r"attention: bias has shape \(24,\), expected \(72,\)"):
        attention(torch.zeros(2, 5, 3, 4, 6), bias=torch.zeros(24))
