"""The Triton kernels, interpreted, against the formula in fp64, and compiled ahead of time for three GPUs."""

from functools import partial

import pytest
import torch

from tests.kernels.aot import compile_ahead, job
from tests.kernels.harness import assert_equal, poisoned_memory

pytest.importorskip("triton")

from sitfast.kernels import attention_hopper, attention_short
from sitfast.kernels.attention import attention_op
from sitfast.kernels.attention_backends import BACKENDS
from sitfast.kernels.attention_choice import plain
from sitfast.kernels.attention_short import BackwardLaunch, ForwardLaunch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="fp32 on the CPU; the tests marked gpu do this in bf16")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
SHAPES = [(2, 16, 2, 16), (1, 33, 2, 72), (2, 40, 1, 24), (1, 80, 2, 32)]
GPU_SHAPES = [(1, 16, 2, 64), (21, 256, 16, 72), (2, 256, 4, 64), (1, 256, 1, 80), (1, 200, 3, 72), (2, 1024, 2, 72)]
FORWARDS = [ForwardLaunch(16, 128, 2, 4, 2), ForwardLaunch(32, 16, 1, 4, 1), None]
BACKWARDS = [
    BackwardLaunch("single", 128, 16, 4, 1),
    BackwardLaunch("separate", 32, 16, 4, 1),
    BackwardLaunch("separate", 16, 32, 4, 1),
    None,
]


def formula(qkv, dout):
    """out, lse and dqkv written out, without autograd and without softmax."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    grad, scale = dout.transpose(1, 2), qkv.shape[-1] ** -0.5
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
    lse = scores.exp().sum(-1).log()
    weights = (scores - lse[..., None]).exp()
    out = weights @ v
    d_weights = torch.einsum("bhnd,bhmd->bhnm", grad, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    grads = (d_scores @ k * scale, d_scores.transpose(2, 3) @ q * scale, weights.transpose(2, 3) @ grad)
    return out.transpose(1, 2), lse, torch.stack([g.transpose(1, 2) for g in grads], 2)


def operands(batch, tokens, heads, width, dtype=torch.float32):
    qkv = torch.randn(batch, tokens, 3, heads, width, device=DEVICE).to(dtype)
    return qkv, torch.randn(batch, tokens, heads, width, device=DEVICE).to(dtype)


def close(got, exact, unit=2.0**-24):
    # sums of at most a few hundred products, roundings added up at worst like their square root, twice in a row
    return (got - exact).abs().max() <= 256 * unit * max(exact.abs().max().item(), 1.0)


@interpreted
@pytest.mark.parametrize("launch", FORWARDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_matches_the_formula(shape, launch):
    qkv, dout = operands(*shape)
    out, lse = attention_short.forward(qkv, launch)
    exact_out, exact_lse, _ = formula(qkv.double(), dout.double())
    assert close(out, exact_out)
    assert close(lse, exact_lse)


@interpreted
@pytest.mark.parametrize("launch", BACKWARDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_matches_the_formula_and_repeats_bitwise(shape, launch):
    qkv, dout = operands(*shape)
    out, lse, exact = formula(qkv.double(), dout.double())
    saved = dout, qkv, out.float().contiguous(), lse.float().contiguous()
    with poisoned_memory():
        dqkv, rows = attention_short.backward(*saved, launch)
    assert close(dqkv, exact)
    assert close(rows.double().sum(0), exact.sum((0, 1)).flatten())
    again, rows_again = attention_short.backward(*saved, launch)
    assert torch.equal(dqkv, again)
    assert torch.equal(rows, rows_again)


@interpreted
def test_fp16_rounds_weights_and_results_only():
    qkv, dout = operands(1, 33, 2, 24, torch.float16)
    exact_out, _, exact = formula(qkv.double(), dout.double())
    out, lse = attention_short.forward(qkv)
    assert out.dtype == torch.float16
    assert (out - exact_out).abs().max() <= 4 * 2.0**-11 * exact_out.abs().max()
    dqkv, _ = attention_short.backward(dout, qkv, out, lse)
    assert (dqkv - exact).abs().max() <= 8 * 2.0**-11 * exact.abs().max()


@interpreted
@pytest.mark.parametrize("launch", BACKWARDS)
def test_very_negative_scores_leave_absent_keys_without_weight(launch):
    """A lse far below zero makes exp(0 − lse) of a padded key overflow; that must not reach dq."""
    qkv, dout = operands(1, 20, 1, 16)
    qkv[:, :, 0], qkv[:, :, 1] = 8 * qkv[:, :, 0].abs(), -8 * qkv[:, :, 1].abs()
    out, lse = attention_short.forward(qkv)
    assert lse.min() < -90
    assert all(result.isfinite().all() for result in attention_short.backward(dout, qkv, out, lse, launch))


@interpreted
def test_operator():
    qkv, dout = operands(1, 20, 2, 24)
    qkv.requires_grad_()
    torch.library.opcheck(attention_op, (qkv, None, "short"))
    (expected,) = torch.autograd.grad(attention_op(qkv, None, "short")[0], qkv, dout)
    assert close(expected, formula(qkv.detach().double(), dout.double())[2])

    compiled = torch.compile(lambda x: attention_op(x, None, "short")[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(qkv), qkv, dout)[0], expected)
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda x: attention_op(x, None, "short")[0], qkv, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(checkpointed, qkv, dout)[0], expected)
    (zero_stride,) = torch.autograd.grad(attention_op(qkv, None, "short")[0].sum(), qkv)
    assert close(zero_stride, formula(qkv.detach().double(), torch.ones_like(dout).double())[2])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operator_with_bias(dtype):
    qkv, dout = operands(2, 20, 2, 24)
    qkv.requires_grad_()
    bias = torch.zeros(3 * 2 * 24, dtype=dtype, requires_grad=True)
    torch.library.opcheck(attention_op, (qkv, bias, "short"))

    def gradients(function, leaves=(qkv, bias)):
        return torch.autograd.grad(function(qkv, bias), leaves, dout)

    def attend(qkv, bias):
        return attention_op(qkv, bias, "short")[0]

    dqkv, dbias = gradients(attend)
    exact = formula(qkv.detach().double(), dout.double())[2]
    assert close(dqkv, exact)
    assert dbias.dtype == dtype
    assert close(dbias, exact.sum((0, 1)).flatten(), unit=torch.finfo(dtype).eps / 2)
    assert torch.equal(gradients(attend, [bias])[0], dbias)
    assert torch.equal(gradients(attend, [qkv])[0], dqkv)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(compiled), (dqkv, dbias))
    checkpointed = partial(torch.utils.checkpoint.checkpoint, attend, use_reentrant=False)
    assert_equal(gradients(checkpointed), (dqkv, dbias))


@pytest.mark.parametrize(
    "tokens, width, dtype, reason",
    [
        (1025, 64, torch.bfloat16, "N = 1025 is more than 1024"),
        (256, 60, torch.bfloat16, "d = 60 is not a multiple of 8"),
        (256, 136, torch.bfloat16, "d = 136 is not a multiple of 8 from 16 to 128"),
        (256, 64, torch.float64, "torch.float64 is not"),
    ],
)
def test_what_it_cannot_run(tokens, width, dtype, reason):
    assert reason in attention_short.unsupported(tokens, width, dtype)


TYPES = {**dict.fromkeys(("lse", "delta", "sums"), "*fp32"), "scale": "fp32"}


@pytest.mark.parametrize("width, capabilities", [(72, (80, 90, 100)), (64, (90,))])
def test_compiles_ahead_of_time(width, capabilities):
    """As launched by default: the forward kernel and both backwards, within the shared memory of each GPU."""
    head, tail = attention_short.split_width(width)
    jobs, shape = [], {"types": TYPES, "H": 16, "D": width, "HEAD": head, "TAIL": tail}
    at = attention_short.forward_launch(256)
    tiles = {"BM": at.block_m, "BN": at.block_n, "BLOCKS": at.blocks, "STAGES": at.stages}
    jobs.append(job("sitfast.kernels._attention_triton:forward_kernel", at.warps, N=256, **shape, **tiles))
    at = attention_short.backward_launch(256, width)
    tiles = {"BM": at.own, "BN": at.block, "STAGES": at.stages}
    jobs.append(job("sitfast.kernels._attention_triton:single_kernel", at.warps, N=256, **shape, **tiles))
    at = attention_short.backward_launch(1024, width)
    tiles = {"BM": at.own, "BN": at.block, "STAGES": at.stages}
    jobs.append(job("sitfast.kernels._attention_triton:queries_kernel", at.warps, N=1024, **shape, **tiles))
    tiles = {"BM": at.block, "BN": at.own, "STAGES": at.stages}
    jobs.append(job("sitfast.kernels._attention_triton:keys_kernel", at.warps, N=1024, **shape, **tiles))
    for result in compile_ahead(*jobs, capabilities=capabilities):
        assert result["shared"] <= (163 if result["capability"] == 80 else 227) * 1024


def test_hopper_kernels_compile_ahead_of_time():
    jobs = []
    for width in (64, 72, 80):
        for name, warps in (("forward_kernel", 4), ("backward_kernel", 4)):
            shape = {"types": TYPES, "H": 16, "N": 256, "D": width}
            jobs.append(job(f"sitfast.kernels._attention_gluon:{name}", warps, **shape))
    assert all(result["shared"] <= 113 * 1024 for result in compile_ahead(*jobs, capabilities=(90,)))  # two fit


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    "backend, shape",
    [
        (backend, shape)
        for backend in ("short", "hopper", "auto")
        for shape in GPU_SHAPES
        if backend != "hopper" or shape[1] == attention_hopper.TOKENS
    ],
)
def test_half_precision_error_is_at_most_twice_that_of_eager(backend, shape):
    if backend == "hopper" and (reason := attention_hopper.unsupported(shape[1], shape[3], torch.bfloat16)):
        pytest.skip(f"this GPU: {reason}")
    for dtype in (torch.bfloat16, torch.float16):
        qkv, dout = operands(*shape, dtype)
        exact_out, _, exact = formula(qkv.double(), dout.double())
        eager_out, _, eager = plain(qkv, dout)
        qkv.requires_grad_()
        bias = torch.zeros(3 * shape[2] * shape[3], device=DEVICE, dtype=dtype, requires_grad=True)
        out = attention_op(qkv, bias, backend)[0]
        dqkv, dbias = torch.autograd.grad(out, (qkv, bias), dout)
        eager_error = eager.sum((0, 1), dtype=torch.float32).to(dtype).flatten() - exact.sum((0, 1)).flatten()
        error = dbias - exact.sum((0, 1)).flatten()
        assert error.abs().max() <= 2 * eager_error.abs().max() + 1e-4
        assert (out - exact_out).abs().max() <= 2 * (eager_out - exact_out).abs().max() + 1e-4
        for part in range(3):
            error = (dqkv - exact)[:, :, part].abs().max()
            assert error <= 2 * (eager - exact)[:, :, part].abs().max() + 1e-4


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["short", "hopper"])
def test_many_heads_repeat_bitwise(backend):
    """More programs than run at once, many times over: a race between them or within one would show."""
    if backend == "hopper" and (reason := attention_hopper.unsupported(256, 72, torch.bfloat16)):
        pytest.skip(f"this GPU: {reason}")
    qkv, dout = operands(64, 256, 16, 72, torch.bfloat16)
    forward, backward = BACKENDS[backend].forward, BACKENDS[backend].backward
    out, lse = forward(qkv)
    expected = backward(dout, qkv, out, lse)
    for _ in range(20):
        again, lse_again = forward(qkv)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)
        assert_equal(backward(dout, qkv, out, lse), expected)


@pytest.mark.gpu
@on_gpu
def test_cuda_graph_replays_forward_and_backward():
    qkv, dout = operands(4, 256, 16, 72, torch.bfloat16)
    qkv.requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = torch.autograd.grad(attention_op(qkv, None, "short")[0], qkv, dout)[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(attention_op(qkv, None, "short")[0], qkv, dout)[0]
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, expected)
