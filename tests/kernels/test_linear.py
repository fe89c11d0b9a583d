import pytest
import torch

from sitfast.kernels import cublaslt, linear
from sitfast.kernels.linear import linear_op, reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def operands(lead=(3, 5), inner=24, columns=40, dtype=torch.float32, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((*lead, inner), (columns, inner), (columns,))
    return [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in shapes]


def gradients(function, values, dy):
    values = [value.detach().clone().requires_grad_() for value in values]
    y = function(*values)
    return [y.detach(), *torch.autograd.grad(y, values, dy.to(y.dtype))]


def test_outputs_and_gradients_match_the_formula():
    values = operands(dtype=torch.float64)
    x, w, bias = (value.detach() for value in values)
    dy = torch.randn(3, 5, 40, dtype=torch.float64)
    expected = (
        torch.einsum("bik,nk->bin", x, w) + bias,
        torch.einsum("bin,nk->bik", dy, w),
        torch.einsum("bin,bik->nk", dy, x),
        dy.sum((0, 1)),
    )
    for got, wanted in zip(gradients(linear, values, dy), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_operator_matches_the_reference_and_its_own_formulas():
    """On the CPU, where the operator multiplies by PyTorch."""
    x, w, bias = operands(lead=(7,))
    dy = torch.randn(7, 40)
    ours = gradients(lambda x, w: linear_op(x, w, bias.detach()), [x, w], dy)
    theirs = gradients(lambda x, w: reference(x, w, bias.detach()), [x, w], dy)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)
    torch.library.opcheck(linear_op, (x, w, bias.detach()))
    compiled = torch.compile(lambda x, w: linear_op(x, w, None).sin().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, w), (x, w))
    wanted = torch.autograd.grad(reference(x, w).sin().sum(), (x, w))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_dtype_follows_autocast():
    x, w, bias = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w, b: (x, w[:, :20], b), r"w has shape \(40, 20\), expected \(40, 24\)"),
        (lambda x, w, b: (x, w, b[:9]), r"bias has shape \(9,\), expected \(40,\)"),
        (lambda x, w, b: (x.int(), w, b), "x is torch.int32"),
        (lambda x, w, b: (x, w.t().contiguous().t(), b), "w has last stride 40, expected 1"),
    ],
)
def test_bad_operands_are_named(change, message):
    with pytest.raises(ValueError, match=f"linear: {message}"):
        linear(*change(*(value.detach() for value in operands())))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rows, inner, columns", [(32768, 1152, 3456), (1000, 1152, 1152), (3, 72, 200), (5, 9, 11)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_meets_the_calibrated_rule_and_repeats(rows, inner, columns, dtype):
    values = operands((rows,), inner, columns, dtype, "cuda")
    dy = torch.randn(rows, columns, device="cuda").to(dtype)
    ours, again = (gradients(linear, values, dy) for _ in range(2))
    eager = gradients(reference, values, dy)
    exact = gradients(reference, [value.detach().double() for value in values], dy)
    for got, repeated, theirs, truth in zip(ours, again, eager, exact, strict=True):
        assert torch.equal(got, repeated)
        assert (got - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6


@needs_gpu
@pytest.mark.gpu
def test_gpu_choice_of_algorithm_moves_no_bit(monkeypatch):
    x, w, bias = (value.detach() for value in operands((4096,), 1152, 3456, torch.bfloat16, "cuda"))
    tuned = cublaslt.matmul(x, w, bias, form="nt")
    plan = cublaslt._plan_of(x, w, "nt", "bias", bias, tuned)
    monkeypatch.setattr(plan, "chosen", 0)
    assert torch.equal(cublaslt.matmul(x, w, bias, form="nt"), tuned)


@needs_gpu
@pytest.mark.gpu
def test_gpu_shape_first_met_in_a_capture_runs_pytorch():
    x, w, _ = (value.detach() for value in operands((264,), 136, 88, torch.bfloat16, "cuda"))
    graph = torch.cuda.CUDAGraph()
    x @ w.t()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = linear(x, w)
    graph.replay()
    assert torch.equal(y, x @ w.t())
    assert torch.allclose(linear(x, w).float(), y.float(), rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.gpu
def test_gpu_mixed_dtypes_are_named():
    x, w, bias = (value.detach() for value in operands(device="cuda"))
    with pytest.raises(ValueError, match="linear: w is torch.float32 and x torch.bfloat16"):
        linear(x.bfloat16(), w, bias)
