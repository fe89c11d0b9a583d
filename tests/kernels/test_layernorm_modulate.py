"""The reference on the CPU; then the Triton kernel, on the GPU or, where there is none, in Triton's interpreter."""

from importlib import import_module

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sitfast.kernels import layernorm_modulate
from tests.kernels.harness import DEVICE, assert_calibrated, assert_equal, poisoned_memory, run_all

module = import_module("sitfast.kernels.layernorm_modulate")

SHAPES = [(1, 3, 1152), (2, 5, 72), (3, 1, 1152), (2, 7, 6)]
KERNEL_SHAPES = [(1, 5, 1152), (2, 7, 48), (3, 2, 384), (2, 9, 64), (1, 1, 6)]


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


def kernel(x, shift, scale, eps=1e-6):
    return module.kernel(x, shift, scale, eps)


def operands(batch=2, tokens=5, width=48, device=DEVICE):
    """x and the adaLN output [B, 6·D]."""
    return [torch.randn(shape).to(device) for shape in ((batch, tokens, width), (batch, 6 * width))]


def on_chunks(function):
    """The function of x and the six modulation vectors in one tensor."""

    def run(x, adaln):
        return function(x, *adaln.chunk(6, dim=1)[3:5])

    return run


@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel_matches_the_formula(shape, assert_agrees, small_chunks):
    def moved(*inputs):
        return on_chunks(kernel)(*(value.to(DEVICE) for value in inputs)).cpu()

    x, adaln = operands(*shape, device="cpu")
    assert_agrees(moved, on_chunks(formula), x * 3 + 1, adaln)


def test_kernel_keeps_the_variance_of_a_large_mean():
    x, zero = torch.randn(1, 4, 1152) + 1000, torch.zeros(1, 1152)
    h = kernel(*(value.to(DEVICE) for value in (x, zero, zero))).cpu()
    assert (h - formula(x.double(), zero, zero)).abs().max() < 1000 * 2.0**-22


def plain(x, shift, scale):
    """As a model without kernels does it, in the dtypes of the inputs."""
    normal = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6).to(shift.dtype)
    return normal * (1 + scale[:, None]) + shift[:, None]


def assert_exact_enough(inputs, dtype, x_dtype):
    narrow = [inputs[0].to(x_dtype), inputs[1].to(dtype)]
    grad = torch.randn(inputs[0].shape).to(DEVICE, dtype)
    with torch.autocast(DEVICE, dtype, enabled=x_dtype != dtype):
        assert_calibrated(on_chunks(kernel), on_chunks(plain), on_chunks(formula), narrow, [grad])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_x", [False, True])
def test_kernel_is_as_exact_as_its_dtype_allows(dtype, wide_x, small_chunks):
    assert_exact_enough(operands(2, 7, 48), dtype, torch.float32 if wide_x else dtype)


def test_kernel_takes_gradients_with_strides_of_zero(small_chunks):
    inputs, one = operands(), torch.ones(2, 5, 48, device=DEVICE)
    zero_strides = [one[0, 0, 0].expand(one.shape)]
    assert_equal(run_all(on_chunks(kernel), inputs, zero_strides), run_all(on_chunks(kernel), inputs, [one]))


def test_kernel_writes_all_it_returns_and_repeats_bitwise(small_chunks):
    inputs, grads = operands(3, 5, 48), [torch.randn(3, 5, 48).to(DEVICE)]
    first = run_all(on_chunks(kernel), inputs, grads)
    with poisoned_memory():
        second = run_all(on_chunks(kernel), inputs, grads)
    assert_equal(first, second)  # NaN is not equal to itself


def test_operators_are_registered_completely():
    x, adaln = operands(2, 3, 16)
    shift, scale = adaln.chunk(6, dim=1)[3:5]
    leaves = [value.detach().requires_grad_() for value in (x, shift, scale)]
    torch.library.opcheck(module.forward_op, (*leaves, 1e-6, torch.float16))
    h, mean, rstd = module.forward_op(x, shift, scale, 1e-6, torch.float32)
    torch.library.opcheck(module.backward_op, (h, x, scale, mean, rstd))


def test_kernel_compiles_whole_and_goes_through_checkpointing():
    inputs, grads = operands(), [torch.randn(2, 5, 48).to(DEVICE)]
    eager = run_all(on_chunks(kernel), inputs, grads)
    compiled = torch.compile(on_chunks(kernel), fullgraph=True, backend="aot_eager")
    assert_equal(eager, run_all(compiled, inputs, grads))
    assert_equal(eager, run_all(lambda *a: checkpoint(on_chunks(kernel), *a, use_reentrant=False), inputs, grads))


@pytest.mark.parametrize(
    "width, dtype, message",
    [
        (24, torch.float64, "x is torch.float64 on a GPU; cast it"),
        (8200, torch.float32, "x has rows of 8200, the GPU kernel takes up to 8192"),
        (0, torch.float32, r"x has shape \(1, 2, 0\), the GPU kernel takes no empty tensor"),
    ],
)
def test_kernel_names_what_it_does_not_take(width, dtype, message):
    with pytest.raises(ValueError, match=f"layernorm_modulate: {message}"):
        kernel(torch.zeros(1, 2, width, dtype=dtype), torch.zeros(1, width), torch.zeros(1, width))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", [(4, 256, 1152), (1, 1000, 1152), (8, 256, 384), (3, 100, 768), (2, 1024, 1024)])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_kernel_on_real_shapes(shape, x_dtype):
    assert_exact_enough(operands(*shape), torch.bfloat16, x_dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")
def test_public_function_runs_the_kernel_on_a_gpu():
    x, adaln = operands(2, 256, 1152)
    shift, scale = adaln.chunk(6, dim=1)[3:5]
    assert torch.equal(layernorm_modulate(x, shift, scale), kernel(x, shift, scale))
