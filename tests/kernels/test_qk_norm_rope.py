"""qk_norm_rope against the modules and complex rotations it stands for, in fp64."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sitfast.kernels import attention, qk_norm_rope
from sitfast.kernels.qk_norm_rope import axial_angles
from tests.kernels.aot import compile_ahead, job
from tests.kernels.harness import DEVICE, assert_calibrated, assert_equal, poisoned_memory, run_all

pytest.importorskip("triton")
file = importlib.import_module("sitfast.kernels.qk_norm_rope")
triton_file = importlib.import_module("sitfast.kernels._qk_norm_rope_triton")

CASES = [("rms", True), ("layer", True), ("none", True), ("rms", False), ("layer", False)]
SHAPES = [(1, 9, 2, 72), (3, 4, 1, 20), (1, 4, 2, 64), (1, 1, 2, 8)]  # B, N, H, d
NAMES = {"none": (), "rms": ("q_weight", "k_weight"), "layer": ("q_weight", "k_weight", "q_bias", "k_bias")}


def rotated(x):
    """By complex numbers: pair i of d/4 turns by row · 10000^(−4i/d), those of the second half by the column."""
    grid, width = math.isqrt(x.shape[1]), x.shape[-1]
    turns = 10_000.0 ** -(4 * torch.arange(width // 4, device=x.device).double() / width)
    row, column = (torch.arange(grid, device=x.device).double()[:, None] * turns for _ in range(2))
    angles = torch.cat((row.repeat_interleave(grid, 0), column.repeat(grid, 1)), 1)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def formula(norm, rope):
    """In fp64, or rounded after each module as the code that it replaces."""

    def run(qkv, bias, *vectors):
        parts = list((qkv + (bias - bias.detach()).to(qkv.dtype).view(qkv.shape[2:])).unbind(2))
        for i in range(2):
            weights = [vector.to(qkv.dtype) for vector in vectors[i::2]]
            if norm == "rms":
                parts[i] = F.rms_norm(parts[i], qkv.shape[-1:], *weights, eps=1e-6)
            elif norm == "layer":
                parts[i] = F.layer_norm(parts[i], qkv.shape[-1:], *weights, eps=1e-6)
            if rope:
                parts[i] = rotated(parts[i].double()).to(qkv.dtype)
        return torch.stack(parts, 2)

    return run


def ours(norm, rope, kernel=True):
    def run(qkv, bias, *vectors):
        tables = axial_angles(math.isqrt(qkv.shape[1]), qkv.shape[-1], qkv.device) if rope else None
        if kernel:
            four = [*vectors, *[None] * (4 - len(vectors))]
            return file.forward_op(qkv, *four, *(tables or (None, None)), bias, norm, 1e-6)
        return qk_norm_rope(qkv, norm=norm, rope=tables, bias=bias, **dict(zip(NAMES[norm], vectors, strict=True)))

    return run


def operands(shape, norm, dtype=torch.float32, rows=None):
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, device=DEVICE).to(dtype)
    vectors = [torch.randn(width, device=DEVICE).to(rows or dtype) for _ in NAMES[norm]]
    return [qkv, torch.zeros(3 * heads * width, device=DEVICE, dtype=rows or dtype), *vectors]


@pytest.mark.parametrize("norm, rope", CASES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_reference_matches_the_modules(shape, norm, rope):
    values = [value.double().cpu() for value in operands(shape, norm)]
    dout = torch.randn_like(values[0])
    got = run_all(ours(norm, rope, kernel=False), values, [dout])
    for a, b in zip(got, run_all(formula(norm, rope), values, [dout]), strict=True):
        assert torch.allclose(a, b, atol=1e-7 if rope else 1e-12)  # the angles are rounded to fp32


@pytest.mark.parametrize(
    "shape, norm, rope",
    [(shape, *case) for shape in SHAPES[:2] for case in CASES] + [(shape, *CASES[1]) for shape in SHAPES[2:]],
)
def test_kernel_matches_the_modules_and_repeats_bitwise(shape, norm, rope, monkeypatch):
    monkeypatch.setattr(triton_file, "ROWS", 8)  # several programs, the last one not full
    values = operands(shape, norm)
    dout = torch.randn_like(values[0])
    assert_calibrated(ours(norm, rope), ours(norm, rope, kernel=False), formula(norm, rope), values, [dout])
    with poisoned_memory():
        first = run_all(ours(norm, rope), values, [dout])
    assert_equal(first, run_all(ours(norm, rope), values, [dout]))
    assert all(value.isfinite().all() for value in first)
    zero_stride = run_all(ours(norm, rope), values, [torch.ones((), device=DEVICE).expand_as(dout)])
    assert_equal(zero_stride, run_all(ours(norm, rope), values, [torch.ones_like(dout)]))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("norm, rope", CASES)
@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 256, 16, 72), (2, 49, 12, 64)])
def test_bf16_error_is_at_most_twice_that_of_the_modules(shape, norm, rope, rows):
    values = operands(shape, norm, torch.bfloat16, rows)
    dout = torch.randn_like(values[0])
    assert_calibrated(ours(norm, rope), formula(norm, rope), formula(norm, rope), values, [dout])
    assert_equal(run_all(ours(norm, rope), values, [dout]), run_all(ours(norm, rope), values, [dout]))


def test_operator():
    qkv, bias, *vectors = operands((2, 4, 2, 24), "layer")
    tables = axial_angles(2, 24, DEVICE)
    leaves = [value.requires_grad_() for value in (qkv, *vectors, bias)]
    arguments = (leaves[0], *leaves[1:5], *tables, leaves[5], "layer", 1e-6)
    torch.library.opcheck(file.forward_op, arguments)

    def run(*leaves):
        return file.forward_op(*leaves[:5], *tables, leaves[5], "layer", 1e-6)

    dout = torch.randn_like(qkv)
    expected = torch.autograd.grad(run(*leaves), leaves, dout)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal(torch.autograd.grad(compiled(*leaves), leaves, dout), expected)
    again = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False), leaves, dout)
    assert_equal(again, expected)
    (dqkv,) = torch.autograd.grad(run(*[leaves[0], *[leaf.detach() for leaf in leaves[1:]]]), leaves[0], dout)
    assert torch.equal(dqkv, expected[0])


def test_scores_depend_on_distances_alone():
    """After RoPE, equal q and equal k score the same wherever the two tokens stand at the same offset."""
    qkv = torch.randn(1, 1, 3, 1, 16, dtype=torch.float64).expand(1, 25, 3, 1, 16)
    q, k, _ = qk_norm_rope(qkv, rope=axial_angles(5, 16)).unbind(2)
    scores = torch.einsum("bnhd,bmhd->nm", q, k).view(5, 5, 5, 5)
    assert torch.allclose(scores[0, 0, 2, 1], scores[2, 3, 4, 4], atol=1e-6)
    assert not torch.allclose(scores[0, 0, 2, 1], scores[0, 0, 1, 2], atol=1e-2)


def test_attention_of_what_comes_out():
    qkv = torch.randn(2, 4, 3, 2, 8)
    weight = torch.rand(8)
    out = attention(qk_norm_rope(qkv, norm="rms", q_weight=weight, k_weight=weight))
    q, k = (F.rms_norm(qkv[:, :, i], (8,), weight, 1e-6).transpose(1, 2) for i in range(2))
    expected = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"norm": "batch"}, "norm 'batch' is unknown; use none, rms or layer"),
        ({"norm": "rms"}, "norm 'rms' takes q_weight, k_weight; q_weight is not so"),
        ({"q_weight": torch.ones(8)}, "norm 'none' takes no vectors; q_weight is not so"),
        ({"norm": "rms", "q_weight": torch.ones(9), "k_weight": torch.ones(8)}, r"q_weight has shape \(9,\)"),
        ({"rope": axial_angles(3, 8)}, r"cos has shape \(9, 4\), expected \(4, 4\)"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\), expected \(48,\)"),
    ],
)
def test_bad_operands_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"qk_norm_rope: {message}"):
        qk_norm_rope(torch.zeros(1, 4, 3, 2, 8), **arguments)


def test_width_without_row_and_column_pairs_is_an_error():
    with pytest.raises(ValueError, match="d = 18 is not divisible by 4"):
        axial_angles(4, 18)


def test_compiles_ahead_of_time():
    types = {"eps": "fp32", "tokens": "i32"} | dict.fromkeys(("cos", "sin", "norm_sums", "bias_sums"), "*fp32")
    module = "sitfast.kernels._qk_norm_rope_triton"
    jobs = []
    for norm in (1, 2):
        shape = {"H": 16, "N": 256, "D": 72, "HEAD": 64, "TAIL": 16, "NORM": norm, "ROPE": True, "ROWS": 32}
        jobs.append(job(f"{module}:qk_norm_rope_forward_kernel", 4, types=types, **shape))
        jobs.append(job(f"{module}:qk_norm_rope_backward_kernel", 4, types=types, **shape, BIAS=True))
    compile_ahead(*jobs)
