# Pyright does not see through `**constants`, optional results that are there, and stand-ins for tensors.
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportOptionalIterable=false, reportGeneralTypeIssues=false

import ctypes
import importlib
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sitfast.kernels import cublaslt, mlp
from tests.kernels.aot import compile_ahead, job

implementation = importlib.import_module("sitfast.kernels.mlp")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def formula(x, w1, b1, w2, b2=0.0):
    u = x @ w1.T + b1
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return gelu @ w2.T + b2


def operands(width=72, hidden=288, lead=(2, 5), dtype=torch.float32):
    shapes = ((*lead, width), (hidden, width), (hidden,), (width, hidden), (width,))
    scales = (1.0, width**-0.5, 1.0, hidden**-0.5, 1.0)
    return [(torch.randn(shape) * scale).to(DEVICE, dtype) for shape, scale in zip(shapes, scales, strict=True)]


def run(function, values, weight=None):
    """[output, gradients] for the loss Σ weight · output, or Σ output."""
    leaves = [value.detach().clone().requires_grad_() for value in values]
    out = function(*leaves)
    loss = out.sum() if weight is None else (out * weight.to(out)).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.fixture
def poisoned():
    """Memory that a kernel allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def fused(save="preact"):
    def call(x, w1, b1, w2, b2=None):
        return implementation.fused(x, w1, b1, w2, b2, save)

    return call


# Reference


@pytest.mark.parametrize("lead", [(2, 5), (1, 1), (3,), (2, 1, 3)])
def test_outputs_and_gradients_match_the_formula(lead, assert_agrees):
    assert_agrees(mlp, formula, *operands(lead=lead))


def test_without_output_bias(assert_agrees):
    assert_agrees(mlp, formula, *operands()[:4])


def test_wide_rows(assert_agrees):
    assert_agrees(mlp, formula, *operands(width=1152, hidden=36, lead=(1, 3)))


def test_reference_passes_gradcheck():
    values = [value.double().requires_grad_() for value in operands(width=5, hidden=7, lead=(3,))]
    assert torch.autograd.gradcheck(implementation.reference, values)


@pytest.mark.parametrize("function", [mlp, fused()], ids=["public", "kernels"])
def test_gemms_follow_autocast(function):
    values = operands(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        out, *grads = run(function, [values[0].half(), *values[1:]])
    assert out.dtype == torch.float16
    assert [grad.dtype for grad in grads] == [torch.float16] + [torch.float32] * 4
    # operands, hidden layer and result are each rounded to fp16 (2^-11); sums over random signs do not amplify that
    assert (out - formula(*values)).abs().max() < 8 * 2.0**-11 * formula(*values).abs().max()


# Kernels, through the interpreter where there is no GPU


@pytest.mark.parametrize("save", ["preact", "both"])
@pytest.mark.parametrize("biased", [True, False])
def test_kernels_match_the_formula(save, biased, assert_agrees, poisoned):
    assert_agrees(fused(save), formula, *operands()[: 4 + biased])


@pytest.mark.parametrize(
    "width, hidden, lead", [(8, 40, (1, 1)), (72, 1000, (2, 3)), (16, 264, (1, 67)), (6, 10, (3,))]
)
def test_kernels_match_on_awkward_shapes(width, hidden, lead, assert_agrees, poisoned):
    """Hidden sizes that no block divides, one row, rows that end in the middle of a block."""
    assert_agrees(fused(), formula, *operands(width, hidden, lead))


def test_bias_gradient_adds_up_its_partial_sums(poisoned):
    """More rows than one program sums, and a last chunk that is not full."""
    from sitfast.kernels.gelu import LAUNCH, gelu_backward_

    rows = 2 * LAUNCH.chunk + 3
    da, u = torch.randn(rows, 24, device=DEVICE), torch.randn(rows, 24, device=DEVICE) * 2
    leaf = u.double().requires_grad_()
    activation = torch.nn.functional.gelu(leaf, approximate="tanh")
    expected = torch.autograd.grad(activation, leaf, da.double())[0]
    du, a, sums = gelu_backward_(da.clone(), u, with_activation=True)
    # 1 − s rounds at 2^-24 where s is near 1, times u · 2 √(2/π)(1 + 0.13 u²), which is below 80 for |u| < 7
    assert (du - expected).abs().max() < 80 * 2.0**-24 * da.abs().max()
    assert (a - activation).abs().max() < 8 * 2.0**-24 * activation.abs().max()
    assert (sums - expected.sum(0)).abs().max() < 2.0**-24 * rows * da.abs().max()
    again = gelu_backward_(da.clone(), u, with_activation=False)
    assert again[1] is None
    assert torch.equal(again[0], du)
    assert torch.equal(again[2], sums)


@pytest.mark.parametrize("rows", [1, 32, 70])
def test_fused_gemm_matches_the_formula(rows, poisoned):
    """Tiles that hang over every edge, more tiles than programs, bands that are not full."""
    from sitfast.kernels.gemm_gelu import Launch, gemm_dgelu

    launch = Launch(32, 64, 16, warps=4, stages=2, group=2)
    dy, w1, b1, w2, _ = operands(40, 136, (rows,), torch.float16)
    u = torch.randn_like(dy) @ w1.T + b1
    leaf = u.double().requires_grad_()
    exact_a = torch.nn.functional.gelu(leaf, approximate="tanh")
    exact = torch.autograd.grad(exact_a, leaf, dy.double() @ w2.double())[0]
    # one rounding to fp16 (2^-11 of the value), and fp32 sums
    du, again, db1 = gemm_dgelu(dy, w2, u, with_activation=True, launch=launch)
    assert (du - exact).abs().max() <= 2.0**-10 * exact.abs().max()
    assert (again - exact_a).abs().max() <= 2.0**-10 * exact_a.abs().max()
    assert (db1 - exact.sum(0)).abs().max() <= 2.0**-10 * exact.sum(0).abs().max()
    without = gemm_dgelu(dy, w2, u, with_activation=False, launch=launch)
    assert without[1] is None
    assert torch.equal(without[0], du)
    assert torch.equal(without[2], db1)


@pytest.mark.parametrize("rows, columns", [(1, 1), (100, 300), (1500, 70)])
def test_column_sums(rows, columns, poisoned):
    from sitfast.kernels.gelu import column_sums

    x = torch.randn(rows, columns, device=DEVICE)
    # one rounding of 2^-24 of the partial sum for each term
    assert (column_sums(x, torch.float32) - x.double().sum(0)).abs().max() <= 2.0**-24 * x.abs().sum(0).max() * 8


def test_fused_gemm_needs_hopper_and_aligned_rows():
    from sitfast.kernels import gemm_gelu

    assert not gemm_gelu.supports(torch.zeros(16, 16, dtype=torch.bfloat16))
    if DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        whole = torch.zeros(16 * 17, device=DEVICE, dtype=torch.bfloat16)
        assert gemm_gelu.supports(whole[:256].view(16, 16))
        assert not gemm_gelu.supports(whole[1:257].view(16, 16))
        assert not gemm_gelu.supports(whole[:256].view(64, 4))
        assert not gemm_gelu.supports(whole[:256].view(16, 16).float())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
def test_gelu_keeps_its_tails():
    from sitfast.kernels.gelu import gelu

    u = torch.tensor([-30.0, -10.0, -5.0, -3.0, -1e-4, 0.0, 1e-4, 3.0, 10.0, 3e4], device=DEVICE)
    wide = u.double()
    inner = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    expected = wide * torch.sigmoid(inner)
    # relative, also where the value is 1e-6 of its argument; the exponent of 30 rounds at 2^-24 of itself
    assert ((gelu(u) - expected).abs() <= 64 * 2.0**-24 * expected.abs() + 1e-38).all()


@pytest.mark.parametrize("how", ["triton", "pointwise"])
@pytest.mark.parametrize("save", ["preact", "both"])
def test_calibrated_error_in_half_precision(how, save, poisoned, monkeypatch):
    """max|out − exact| ≤ 2 max|eager − exact| + atol for the output and every gradient, and the same bits twice."""
    monkeypatch.setattr(implementation, "choose_backward", lambda *_: how)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter truncates to bf16
    values = operands(lead=(2, 64), dtype=dtype)
    weight = torch.randn(2, 64, 72, device=DEVICE)
    exact = run(formula, [value.double() for value in values], weight)
    eager, got = run(implementation.reference, values, weight), run(fused(save), values, weight)
    for ours, theirs, truth in zip(got, eager, exact, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (theirs - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= allowed
    assert all(torch.equal(ours, again) for ours, again in zip(got, run(fused(save), values, weight), strict=True))


def test_expanded_gradient_and_strided_input(assert_agrees):
    wide = torch.randn(2, 5, 3 * 72, device=DEVICE)

    def middle(function):
        return lambda whole, *rest: function(whole[..., 72:144], *rest)

    assert_agrees(middle(fused()), middle(formula), wide, *operands()[1:])


def test_only_what_is_asked_for_is_computed(monkeypatch):
    asked = []
    original = implementation.backward
    monkeypatch.setattr(implementation, "backward", lambda *args: asked.append(args[6]) or original(*args))
    x, *weights = operands()
    weights[0].requires_grad_()
    fused()(x, *weights).sum().backward()
    expected = torch.autograd.grad(formula(x, *weights).sum(), weights[0])[0]
    assert asked == [[False, True, False, False, False]]
    assert torch.allclose(weights[0].grad, expected, atol=1e-4)


def test_nothing_is_saved_without_gradients():
    flat = operands(lead=(10,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t), torch.no_grad():
        fused()(*[value.requires_grad_() for value in flat])
    assert saved == []
    _, u, a = torch.ops.sitfast.mlp_forward(*flat, False, False)
    assert (u.numel(), a.numel()) == (0, 0)


@pytest.mark.parametrize("save, tensors", [("preact", 1), ("both", 2)])
def test_save_decides_what_is_kept(save, tensors):
    sizes = []
    values = [value.requires_grad_() for value in operands()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        fused(save)(*values)
    assert sizes.count(10 * 288) == tensors


@pytest.mark.parametrize("biased", [True, False])
def test_operators_keep_their_contracts(biased):
    x, w1, b1, w2, b2 = (value.requires_grad_() for value in operands(lead=(10,)))
    bias = b2 if biased else None
    torch.library.opcheck(torch.ops.sitfast.mlp_forward.default, (x, w1, b1, w2, bias, True, not biased))
    u = torch.randn(10, 288, device=DEVICE)
    kept = u.new_empty(0) if biased else u.clone()
    needs = [True, False, True, True, biased]
    dy, x, w1, w2 = (value.detach() for value in (torch.randn_like(x), x, w1, w2))
    torch.library.opcheck(torch.ops.sitfast.mlp_backward.default, (dy, x, w1, w2, u, kept, needs))


@pytest.mark.parametrize("save", ["preact", "both"])
def test_compiles_into_one_graph(save):
    values, weight = operands(), torch.randn(2, 5, 72, device=DEVICE)
    compiled = torch.compile(fused(save), fullgraph=True, backend="aot_eager")
    for ours, expected in zip(run(compiled, values, weight), run(fused(save), values, weight), strict=True):
        assert torch.equal(ours, expected)


def test_passes_through_checkpointing():
    values, weight = operands(), torch.randn(2, 5, 72, device=DEVICE)

    def recomputed(*leaves):
        return checkpoint(fused(), *leaves, use_reentrant=False)

    for ours, expected in zip(run(recomputed, values, weight), run(fused(), values, weight), strict=True):
        assert torch.equal(ours, expected)


def test_pointwise_kernels_compile_ahead_of_time():
    numbers = dict.fromkeys(("numel", "rows", "columns", "chunk"), "i32")
    tile = {"ROWS": 16, "COLUMNS": 256}
    jobs = []
    for pointer in ("*fp16", "*bf16", "*fp32"):
        tensors = {"pointer": pointer, "types": {**numbers, "partial_ptr": "*fp32"}}
        sums = {"pointer": pointer, "types": {**numbers, "out_ptr": "*fp32"}}
        jobs.append(job("sitfast.kernels.gelu:_forward_kernel", 8, **tensors, BLOCK=4096))
        jobs.append(job("sitfast.kernels.gelu:_backward_kernel", 4, **tensors, WITH_ACTIVATION=True, **tile))
        jobs.append(job("sitfast.kernels.gelu:_column_sums_kernel", 4, **sums, **tile))
    compile_ahead(*jobs)


@pytest.mark.parametrize("with_a", [False, True])
def test_gemm_kernel_compiles_ahead_of_time(with_a):
    """It runs on Hopper, where two copies of the epilogue or a spilled accumulator would cost what the fusion gains."""
    from sitfast.kernels.gemm_gelu import LAUNCH

    numbers = dict.fromkeys(("rows", "hidden", "width", "programs"), "i32") | {"partial_ptr": "*fp32"}

    shapes = {"dy_desc": (LAUNCH.rows, LAUNCH.depth), "w_desc": (LAUNCH.depth, LAUNCH.columns)}
    shapes |= dict.fromkeys(("u_desc", "a_desc", "du_desc"), (LAUNCH.rows, LAUNCH.columns // 2))
    types = numbers | {name: f"tensordesc<bf16[{rows},{columns}]>" for name, (rows, columns) in shapes.items()}
    sizes = {"ROWS": LAUNCH.rows, "COLUMNS": LAUNCH.columns, "DEPTH": LAUNCH.depth, "GROUP": LAUNCH.group}
    one = job("sitfast.kernels.gemm_gelu:dgelu_kernel", LAUNCH.warps, stages=LAUNCH.stages, types=types,
              WITH_A=with_a, **sizes)  # fmt: skip
    (result,) = compile_ahead(one, capabilities=(90,))
    assert result["shared"] <= 227 << 10
    assert result["layout_conversions"] <= 4  # those of the sums, one a part; none of a tile


def test_gluon_kernel_compiles_ahead_of_time():
    """Products that ptxas serialises would make it wait, after every one, for what the stages are there to overlap."""
    from sitfast.kernels import _gemm_gluon as in_gluon

    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
    numbers = dict.fromkeys(("rows", "hidden_8", "width", "programs"), "i32") | {"partial_ptr": "*fp32"}
    constants = {name: getattr(in_gluon, name) for name in ("STAGES", "PART", "AHEAD", "GROUP")}
    x, (depth, columns) = (in_gluon.BM, in_gluon.BK), (in_gluon.BK, in_gluon.BN)

    def ahead(forward, with_a, dtype="bf16"):
        w = (columns, depth) if forward else (depth, columns)
        registers = in_gluon.FORWARD_REGISTERS if forward else in_gluon.BACKWARD_REGISTERS
        types = {name: f"tensordesc<{dtype}[{m},{n}],{layout}>" for name, (m, n) in (("x_desc", x), ("w_desc", w))}
        return job("sitfast.kernels._gemm_gluon:gemm_gelu_kernel", 4, pointer=f"*{dtype}", types=numbers | types,
                   FORWARD=forward, WITH_A=with_a, REGISTERS=registers, **constants)  # fmt: skip

    jobs = [ahead(True, True), ahead(False, True), ahead(False, False), ahead(False, True, "fp16")]
    for result in compile_ahead(*jobs, capabilities=(90,)):
        assert result["shared"] <= 227 << 10
        assert result["product_waits"] == 4  # one in the loop and one behind it, for each of two groups of warps
        assert result["spills"] <= 32  # what stays the same in the loops; an accumulator has 128


@pytest.mark.parametrize("scale, verdict", [(1.0, True), (1.05, False), (float("nan"), False), (None, False)])
def test_gluon_must_agree_with_pytorch(scale, verdict, monkeypatch):
    """Stand-ins for the kernels that are right, a little wrong, NaN, and refused by the compiler."""
    from sitfast.kernels import _gemm_gluon, gemm_gelu

    def forward(x, w1, b1):
        u = torch.addmm(b1, x, w1.T)
        return u, torch.nn.functional.gelu(u, approximate="tanh")

    def backward(dy, w2, u, *, with_activation):
        if scale is None:
            raise RuntimeError
        du = torch.ops.aten.gelu_backward(dy @ w2, u, approximate="tanh")
        return scale * du, torch.nn.functional.gelu(u, approximate="tanh"), du.sum(0)

    monkeypatch.setattr(_gemm_gluon, "gemm_gelu", forward)
    monkeypatch.setattr(_gemm_gluon, "gemm_dgelu", backward)
    assert gemm_gelu._tested(torch.device(DEVICE), torch.bfloat16) == verdict


def test_gluon_serves_the_versions_it_was_tried_with(monkeypatch):
    from sitfast.kernels import gemm_gelu

    monkeypatch.setattr(gemm_gelu, "supports", lambda *_: True)
    monkeypatch.setattr(gemm_gelu, "_verdicts", {(operands()[0].device, torch.float32): True})
    chosen = {}
    for version in ("3.5.1", "3.6.0", "3.7.1+git0", "3.70.0"):
        monkeypatch.setattr(gemm_gelu.triton, "__version__", version)
        gemm_gelu.has_gluon.cache_clear()
        chosen[version] = implementation.choose_backward(*operands()[:3])
    gemm_gelu.has_gluon.cache_clear()
    assert chosen == {"3.5.1": "triton", "3.6.0": "gluon", "3.7.1+git0": "gluon", "3.70.0": "triton"}


@pytest.mark.parametrize(
    "width, dtype, expected",
    [
        (376, torch.bfloat16, "reference"),
        (384, torch.bfloat16, "kernels"),
        (392, torch.float16, "kernels"),
        (392, torch.float32, "reference"),
    ],
)
def test_narrow_layers_and_fp32_run_the_reference(width, dtype, expected, monkeypatch):
    """On GPUs; here the choice by device is replaced by what it would take there."""
    monkeypatch.setattr(implementation, "choose", lambda _device, _reference, *, cuda: cuda)
    monkeypatch.setattr(implementation, "reference", lambda *_: "reference")
    monkeypatch.setattr(implementation, "fused", lambda *_: "kernels")
    assert mlp(*operands(width, 24, (1,), dtype)) == expected
    described = implementation.describe(1, width, 24, dtype, torch.device(DEVICE))
    assert described.startswith("forward" if expected == "kernels" else "PyTorch (")


# cuBLASLt


def test_heuristic_result_has_the_library_layout():
    assert ctypes.sizeof(cublaslt._Heuristic) == 96
    assert cublaslt._Heuristic.workspace.offset == 64


def test_alignment_is_the_least_of_all_addresses():
    class At:
        def __init__(self, address):
            self.address = address

        def data_ptr(self):
            return self.address

    assert cublaslt.alignment([At(4096), At(512)]) == 256
    assert cublaslt.alignment([At(4096), At(48)]) == 16


def test_epilogue_is_refused_where_cublaslt_has_none():
    x, w1, *_ = operands(lead=(10,), dtype=torch.bfloat16)
    assert not cublaslt.works(x.float(), w1.float())
    assert not cublaslt.works(x[:, :60], w1[:, :60])
    assert not cublaslt.works(x.cpu(), w1.cpu())


# GPUs


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("first", ["gluon", "cublaslt", "pointwise"])
@pytest.mark.parametrize("second", ["gluon", "triton", "pointwise"])
@pytest.mark.parametrize(
    "rows, width, hidden", [(32768, 1152, 4608), (1000, 1152, 4608), (256, 384, 1536), (3, 72, 200)]
)
def test_gpu_backends_meet_the_calibrated_rule(first, second, rows, width, hidden):
    if (first == "gluon" or second != "pointwise") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    values = [value.detach() for value in operands(width, hidden, (rows,), torch.bfloat16)]
    dy = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    exact = run(implementation.reference, [value.float() for value in values], dy)
    eager = run(implementation.reference, values, dy)
    for keep in (False, True):
        y, u, a = implementation.forward(*values, first)
        grads = implementation.backward(dy, *values[:2], values[3], u, a if keep else None, [True] * 5, second)
        for ours, theirs, truth in zip((y, *grads), eager, exact, strict=True):
            assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6


@needs_gpu
@pytest.mark.gpu
def test_hopper_gets_the_fused_gemms():
    from sitfast.kernels import gemm_gelu

    x, w1, _, w2, _ = operands(lead=(10,), dtype=torch.bfloat16)
    chosen = implementation.choose_forward(x, w1), implementation.choose_backward(x, w2, x @ w1.T)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert (chosen[1] in ("gluon", "triton")) == hopper
    assert (chosen == ("gluon", "gluon")) == (hopper and gemm_gelu.has_gluon())
    described = implementation.describe(256, 1152, 4608, torch.bfloat16, x.device)
    assert described == "forward {}, backward {}".format(*chosen)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, width, hidden", [(32768, 1152, 4608), (1000, 768, 3072), (130, 64, 264), (3, 8, 40)])
def test_gluon_agrees_with_triton(dtype, rows, width, hidden):
    """The same formula, where Gluon rounds the product before it multiplies; and runs that repeat."""
    from sitfast.kernels import _gemm_gluon, gemm_gelu

    if torch.cuda.get_device_capability() != (9, 0) or not gemm_gelu.has_gluon():
        pytest.skip("needs a Hopper GPU and a known Gluon")
    dy, _, _, w2, _ = operands(width, hidden, (rows,), dtype)
    u = torch.randn(rows, hidden, device="cuda", dtype=dtype)
    for keep in (False, True):
        first, again = (_gemm_gluon.gemm_dgelu(dy, w2, u, with_activation=keep) for _ in range(2))
        assert (first[1] is None) == (not keep)
        for ours, repeated, theirs in zip(
            first, again, gemm_gelu.gemm_dgelu(dy, w2, u, with_activation=keep), strict=True
        ):
            if ours is not None and repeated is not None and theirs is not None:
                assert torch.equal(ours, repeated)
                assert (ours - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()


@needs_gpu
@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    values = operands(768, 3072, (512,), torch.bfloat16)
    expected = mlp(*values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mlp(*values)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


# Edges


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


def test_unknown_save_is_refused():
    with pytest.raises(ValueError, match="save='all', expected 'preact' or 'both'"):
        mlp(*operands(), save="all")


def test_kernels_name_the_dtype_they_do_not_take():
    with pytest.raises(ValueError, match=r"x is torch.float64; the kernels take fp16, bf16 or fp32"):
        fused()(*[value.double() for value in operands()])
    values = operands()
    values[3] = values[3].half()
    with pytest.raises(ValueError, match=r"w2 is torch.float16"):
        fused()(*values)
