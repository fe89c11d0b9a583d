"""Cross-attention: the reference, the Triton kernels interpreted and compiled ahead of time, and which of the two runs."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sitfast import parallel
from sitfast.kernels import attention_choice, cross_attention
from sitfast.kernels.cross_attention import cross_attention_op, describe, reference
from tests.kernels.aot import compile_ahead, job
from tests.kernels.harness import DEVICE, assert_calibrated, assert_equal, poisoned_memory, run_all

pytest.importorskip("triton")

from sitfast.kernels import _cross_attention_triton as kernels
from sitfast.kernels.attention_short import split_width

module = import_module("sitfast.kernels.cross_attention")
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="fp32 on the CPU; the tests marked gpu do this in bf16")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
# B, N, L, H, d
SHAPES = [(2, 48, 5, 3, 72), (2, 1, 2, 1, 16), (2, 7, 16, 3, 64), (2, 256, 77, 1, 72), (1, 48, 128, 1, 128)]
SHAPES += [(3, 70, 20, 1, 24), (1, 330, 40, 1, 40)]
GPU_SHAPES = [
    (64, 256, 77, 16, 72),
    (3, 256, 77, 12, 64),
    (2, 1024, 120, 16, 72),
    (2, 256, 64, 7, 72),
    (5, 48, 16, 3, 16),
]
GPU_SHAPES += [(2, 7, 5, 3, 128), (2, 256, 128, 3, 128), (3, 1, 2, 1, 64), (2, 200, 33, 5, 120)]


def formula(mask, q, kv):
    """Caption by caption over the tokens that count, without a mask and without softmax."""
    rows = []
    for sample in range(len(q)):
        k, v = kv[sample, mask[sample]].unbind(1)
        scores = torch.einsum("nhd,lhd->hnl", q[sample], k) / q.shape[-1] ** 0.5
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        rows.append(torch.einsum("hnl,lhd->nhd", weights / weights.sum(-1, keepdim=True), v))
    return torch.stack(rows)


def eager(mask, q, kv):
    """Statistics in fp32, weights rounded to the dtype of q, as the kernels round them."""
    (k, v), rows = kv.permute(2, 0, 3, 1, 4).unbind(0), q.transpose(1, 2)
    scores = (rows @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask[:, None, None, :], float("-inf"))
    return (scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v).transpose(1, 2)


def short(mask, q, kv):
    return cross_attention_op(q, kv, mask)[0]


def operands(batch, tokens, length, heads, width, dtype=torch.float32):
    q = torch.randn(batch, tokens, heads, width, device=DEVICE).to(dtype)
    kv = torch.randn(batch, length, 2, heads, width, device=DEVICE).to(dtype)
    return q, kv, torch.randn_like(q)


def masks(batch, length):
    """All tokens, the first of them, and some with holes; at least one a caption, and two in the first if there are two."""
    lengths = torch.randint(1, length + 1, (batch, 1), device=DEVICE)
    lengths[0] = length // 2 + 1
    prefix = torch.arange(length, device=DEVICE) < lengths
    holes = torch.rand(batch, length, device=DEVICE) < 0.5
    holes[:, -1] = holes[0, 0] = True
    return torch.ones_like(prefix), prefix, holes


# The reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 16, 12, 2, 72), (1, 1, 1, 4, 8), (3, 7, 130, 1, 18)])
def test_outputs_and_gradients_match_the_formula(shape, assert_agrees):
    q, kv, _ = operands(*shape)
    for mask in masks(shape[0], shape[2]):
        mask = mask.cpu()
        assert_agrees(lambda q, kv, mask=mask: cross_attention(q, kv, mask), partial(formula, mask), q.cpu(), kv.cpu())


def test_views_of_the_outputs_of_the_linears(assert_agrees):
    mask = torch.tensor([[True, False, True], [True, True, False]])

    def packed(function):
        return lambda q, kv: function(q.view(2, 5, 4, 6), kv.view(2, 3, 2, 4, 6)).flatten(2)

    flat = torch.randn(2, 5, 24), torch.randn(2, 3, 48)
    assert_agrees(packed(lambda q, kv: cross_attention(q, kv, mask)), packed(partial(formula, mask)), *flat)


def test_dtype_follows_autocast():
    q, kv, _ = (value.cpu() for value in operands(1, 4, 3, 2, 8))
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert cross_attention(q.bfloat16(), kv.bfloat16(), mask).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_attention(q, kv.bfloat16(), mask).dtype == torch.bfloat16


# The kernels ----------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_the_formula_and_repeat_bitwise(shape, dtype):
    q, kv, dout = operands(*shape, dtype)
    for mask in masks(shape[0], shape[2]):
        functions = [partial(function, mask) for function in (short, eager, formula)]
        with poisoned_memory():
            assert_calibrated(*functions, [q, kv], [dout])
        assert_equal(run_all(functions[0], [q, kv], [dout]), run_all(functions[0], [q, kv], [dout]))


@pytest.mark.parametrize("where", [pytest.param("cpu", marks=interpreted), pytest.param("gpu", marks=pytest.mark.gpu)])
def test_one_token_has_all_the_weight(where):
    q, kv, dout = operands(2, 70, 1, 3, 72, torch.float16)
    out, dq, dkv = run_all(partial(short, masks(2, 1)[0]), [q, kv], [dout])
    assert torch.equal(out, kv[:, :, 1].expand_as(out))
    assert max(dq.abs().max(), dkv[:, :, 0].abs().max()) <= 1e-4  # the softmax of one number has no gradient
    torch.testing.assert_close(dkv[:, 0, 1].double(), dout.double().sum(1), rtol=2.0**-11, atol=1e-4)


@interpreted
def test_lse_is_that_of_the_tokens_that_count():
    q, kv, _ = operands(2, 40, 9, 2, 24)
    mask = masks(2, 9)[2]
    lse = cross_attention_op(q, kv, mask)[1]
    for sample in range(2):
        k = kv[sample, mask[sample], 0].double()
        scores = torch.einsum("nhd,lhd->hnl", q[sample].double(), k) / 24**0.5
        torch.testing.assert_close(lse[sample].double(), scores.exp().sum(-1).log(), rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_any_number_of_blocks_a_program(blocks):
    q, kv, _ = operands(1, 140, 20, 2, 72)
    mask = masks(1, 20)[2]
    out, _ = kernels.forward(q, kv, mask, kernels.Launch(32, 4, 1, blocks))
    torch.testing.assert_close(out.double(), formula(mask, q.double(), kv.double()), rtol=1e-5, atol=1e-5)


@interpreted
def test_what_is_masked_is_not_read_and_gets_no_gradient():
    q, kv, dout = operands(2, 20, 9, 3, 72)
    mask = masks(2, 9)[2]
    mask[:, 2] = False
    clean = run_all(partial(short, mask), [q, kv], [dout])
    got = run_all(partial(short, mask), [q, kv.masked_fill(~mask[..., None, None, None], float("nan"))], [dout])
    assert_equal(got, clean)
    assert clean[2][~mask].abs().max() == 0 and clean[2][mask].abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("function", [reference, pytest.param(lambda *x: cross_attention_op(*x)[0], marks=interpreted)])
def test_a_caption_without_a_token_gives_zeros(function):
    q, kv, dout = (value.cpu() for value in operands(3, 20, 9, 2, 24))
    mask = torch.tensor([True, False, True])[:, None].expand(3, 9)
    for value in run_all(lambda q, kv: function(q, kv, mask), [q, kv], [dout]):
        assert value.isfinite().all() and value[1].abs().max() == 0 and value[0].abs().max() > 0.1


@interpreted
def test_very_negative_scores_leave_masked_tokens_without_weight():
    """A lse far below zero makes exp(0 − lse) of a masked token overflow; that must not reach a gradient."""
    q, kv, dout = operands(1, 20, 7, 1, 16)
    q, kv[:, :, 0] = 8 * q.abs(), -8 * kv[:, :, 0].abs()
    mask = masks(1, 7)[2]
    assert cross_attention_op(q, kv, mask)[1].min() < -90
    assert_calibrated(*(partial(function, mask) for function in (short, eager, formula)), [q, kv], [dout])


@interpreted
def test_operator():
    q, kv, dout = operands(2, 20, 9, 3, 24)
    mask = masks(2, 9)[1]
    attend = partial(short, mask)
    torch.library.opcheck(cross_attention_op, (q.requires_grad_(), kv.requires_grad_(), mask))
    expected = run_all(attend, [q, kv], [dout])
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_equal(run_all(compiled, [q, kv], [dout]), expected)
    assert_equal(run_all(partial(checkpoint, attend, use_reentrant=False), [q, kv], [dout]), expected)
    assert_equal(torch.autograd.grad(attend(q, kv), [kv], dout), expected[2:])
    ones = torch.ones(()).expand_as(dout)  # a gradient whose strides are all zero
    assert_calibrated(attend, partial(eager, mask), partial(formula, mask), [q.detach(), kv.detach()], [ones])
    strided = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(strided, kv), expected[0])


def in_block(policy, function):
    """The function as a block with this `parallel.activation_checkpoint`."""
    block = torch.nn.Module()
    block.forward = function
    parallel.prepare_blocks(torch.nn.ModuleList([block]), activation_checkpoint=policy, compiled=False)
    return block


@interpreted
@pytest.mark.parametrize("policy, runs", [("none", 1), ("selective", 1), ("block", 2)])
def test_how_often_each_policy_computes_it(policy, runs, monkeypatch):
    q, kv, dout = operands(1, 16, 9, 2, 24)
    calls, forward = [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: (calls.append(args), forward(*args))[1])
    run_all(in_block(policy, partial(short, masks(1, 9)[1])), [q, kv], [dout])
    assert len(calls) == runs


TYPES = {"lse": "*fp32", "mask": "*u8", "scale": "fp32"}


@pytest.mark.parametrize(
    "length, width, capabilities",
    [(77, 72, (80, 90, 100)), (128, 128, (80, 90, 100)), (16, 72, (90,)), (64, 64, (90,))],
)
def test_compiles_ahead_of_time(length, width, capabilities):
    """As launched by default, for 256 and for 200 tokens: no spills, but where sm_80 lacks the warp group's products; two
    forward programs on a multiprocessor up to d = 80."""
    jobs, (head, tail) = [], split_width(width)
    for tokens in (256, 200):
        shape = {"types": TYPES, "H": 16, "N": tokens, "L": length, "D": width, "HEAD": head, "TAIL": tail, "BM": 64}
        at = kernels.forward_launch(tokens, length)
        shape |= {"BN": at.keys, "STAGES": at.stages}
        kernel = "sitfast.kernels._cross_attention_triton:forward_kernel"
        jobs.append(job(kernel, at.warps, BLOCKS=at.blocks, **shape))
        at = kernels.backward_launch(length, width)
        shape |= {"BN": at.keys, "STAGES": at.stages}
        jobs.append(job("sitfast.kernels._cross_attention_triton:backward_kernel", at.warps, **shape))
    for result in compile_ahead(*jobs, capabilities=capabilities):
        old, forward = result["capability"] == 80, "forward" in result["kernel"]
        assert result["shared"] <= (163 if old else 227) * 1024 / (2 if forward and width <= 80 else 1)
        assert result["stack"] == 0 or (old and not forward)


# Which of the two runs ------------------------------------------------------------------------------------------------

PROBLEM = (16, 9, 24, torch.float16, CPU)  # N, L, d, dtype, device


@pytest.fixture
def contest(monkeypatch):
    """contest(times): a GPU for which our kernels are interpreted, and what the clock says of them and of torch's."""

    def begin(times, capturing=False):
        clock = iter(times)
        monkeypatch.setattr(module, "TIMED_ROWS", 3 * 16 * 16)
        monkeypatch.setattr(attention_choice, "time_ms", lambda _: next(clock))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(module, "choose", lambda *_, cuda: cuda)
        monkeypatch.setattr(module, "_choices", {})

    return begin


@interpreted
def test_the_faster_of_forward_and_backward_together_runs(contest):
    contest([1.0, 3.0, 2.0, 2.5])
    choice = module.select(*PROBLEM)
    assert (choice.forward, choice.backward) == ("short", "short") and module.select(*PROBLEM) is choice
    line = "forward short, backward short (short 1.000 + 3.000 ms, torch 2.000 + 2.500 ms)"
    assert attention_choice.describe(choice) == line
    contest([1.0, 3.0, 2.0, 1.5])
    assert module.select(*PROBLEM).forward == "torch"


@interpreted
@pytest.mark.parametrize(
    "function, which, name", [("forward", 0, "out"), ("backward", 0, "dq"), ("backward", 1, "dkv")]
)
@pytest.mark.parametrize("wrong_by", [1.1, float("inf")])
def test_wrong_kernels_are_out_however_fast(function, which, name, wrong_by, contest, monkeypatch):
    """By a factor everywhere, or not finite in the second sample of three, which is not compared."""
    contest([2.0, 2.0])
    right = getattr(kernels, function)

    def wrong(*args):
        results = right(*args)
        (results[which] if wrong_by < 2 else results[which][1]).mul_(wrong_by)
        return results

    monkeypatch.setattr(kernels, function, wrong)
    choice = module.select(*PROBLEM)
    assert (choice.forward, choice.backward) == ("torch", "torch")
    reason = f"{name} is wrong by" if wrong_by < 2 else "some results are not finite"
    assert choice.rejected["short"].startswith(reason)


@interpreted
def test_one_that_varies_is_the_last_resort(contest, monkeypatch):
    contest([3.0, 3.0, 1.0, 1.0])
    calls = iter(range(9))
    monkeypatch.setattr(module, "reference", lambda q, kv, mask, b="": reference(q, kv, mask) * (1 + next(calls)))
    choice = module.select(*PROBLEM)
    assert choice.forward == "short" and choice.varying == ("torch",)


@interpreted
def test_the_choice_is_made_apart_from_what_surrounds_the_first_call(contest):
    """In inference, in checkpoints, which count saved tensors or calls, and while a compiler traces."""
    q, kv, dout = operands(2, 16, 9, 2, 24, torch.float16)
    mask = masks(2, 9)[1]
    expected = run_all(partial(short, mask), [q, kv], [dout])

    def attend(q, kv):
        return cross_attention(q, kv, mask)

    for wrap in (
        partial(in_block, "block"),
        partial(in_block, "selective"),
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
    ):
        contest([1.0, 1.0, 2.0, 2.0])
        torch._dynamo.reset()
        assert_equal(run_all(wrap(attend), [q, kv], [dout]), expected)
        assert len(module._choices) == 1
    contest([1.0, 1.0, 2.0, 2.0])
    with torch.inference_mode():
        assert torch.equal(attend(q, kv), expected[0])


@interpreted
def test_compiled_for_sizes_in_general_it_knows_the_number_of_tokens(contest):
    contest([1.0, 1.0, 2.0, 2.0] * 3)
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (16, 20, 24):
        q, kv, _ = operands(2, tokens, 9, 2, 24, torch.float16)
        mask = masks(2, 9)[1]
        assert torch.equal(compiled(q, kv, mask), short(mask, q, kv))
    assert [key[2] for key in module._choices] == [16, 20, 24]


@interpreted
def test_first_call_inside_a_graph_capture_is_an_error(contest):
    contest([], capturing=True)
    q, kv, _ = operands(2, 16, 9, 2, 24, torch.float16)
    with pytest.raises(ValueError, match=r"N=16, L=9, d=24, torch.float16 is first met inside a CUDA graph capture"):
        cross_attention(q, kv, masks(2, 9)[0])
    cross_attention(q, kv, masks(2, 9)[0], backend="short")
    cross_attention(q, kv, masks(2, 9)[0], backend="torch")


@interpreted
@pytest.mark.parametrize(
    "length, width, dtype, reason",
    [
        (129, 64, torch.bfloat16, "L = 129 is more than 128"),
        (77, 60, torch.bfloat16, "d = 60 is not a multiple of 8 from 16 to 128"),
        (77, 136, torch.bfloat16, "d = 136 is not a multiple of 8 from 16 to 128"),
        (77, 8, torch.bfloat16, "d = 8 is not a multiple of 8 from 16 to 128"),
        (77, 64, torch.float64, "torch.float64 is not bf16 or fp16"),
    ],
)
def test_what_runs_on_pytorch_alone_is_named(length, width, dtype, reason, contest):
    contest([])
    assert describe(16, length, width, dtype, torch.device("cuda", 0)) == f"torch ({reason})"
    q, kv, _ = operands(1, 3, length, 2, width, dtype)
    mask = masks(1, length)[1]
    assert torch.equal(cross_attention(q, kv, mask), reference(q, kv, mask))
    with pytest.raises(ValueError, match="backend 'short' cannot run: " + reason.replace(".", r"\.")):
        cross_attention(q, kv, mask, backend="short")
    assert describe(16, 77, 64, torch.bfloat16, CPU) == "torch (cpu has no kernels of ours)"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 5, 24)}, r"q has shape \(2, 5, 24\), expected \[B, N, H, d\]"),
        ({"q": torch.zeros(2, 5, 4, 6, dtype=torch.int8)}, "q is torch.int8, expected"),
        ({"q": torch.zeros(2, 5, 6, 4).transpose(2, 3)}, "q has last stride 4"),
        ({"kv": torch.zeros(2, 3, 4, 6)}, r"kv has shape \(2, 3, 4, 6\), expected \[B, L, 2, H, d\]"),
        ({"kv": torch.zeros(2, 3, 2, 2, 6)}, r"kv has shape \(2, 3, 2, 2, 6\), expected \(2, 3, 2, 4, 6\)"),
        ({"kv": torch.zeros(2, 3, 2, 4, 6, dtype=torch.float64)}, "kv is torch.float64 and q torch.float32, expected"),
        ({"kv": torch.zeros(2, 3, 2, 4, 6, device="meta")}, "kv is on meta"),
        (
            {"kv": torch.zeros(2, 0, 2, 4, 6), "mask": torch.ones(2, 0, dtype=torch.bool)},
            r"q .* and kv .*: one is empty",
        ),
        (
            {"mask": torch.ones(2, 1, 1, 3, dtype=torch.bool)},
            r"mask is torch.bool \(2, 1, 1, 3\) on cpu, expected torch.b",
        ),
        ({"mask": torch.ones(2, 3)}, r"mask is torch.float32 \(2, 3\) on cpu, expected torch.bool \(2, 3\) on cpu"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, r"mask is torch.bool \(2, 3\) on meta, expected"),
        ({"backend": "slow"}, "backend 'slow' is unknown; use auto, torch or short"),
    ],
)
def test_bad_operands_are_named(change, message):
    good = {"q": torch.zeros(2, 5, 4, 6), "kv": torch.zeros(2, 3, 2, 4, 6), "mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=f"cross_attention: {message}"):
        cross_attention(**{**good, **change})


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["short", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_half_precision_error_is_at_most_twice_that_of_eager(shape, dtype, backend):
    q, kv, dout = operands(*shape, dtype)
    for mask in masks(shape[0], shape[2]):
        attend = partial(cross_attention, mask=mask, backend=backend)
        assert_calibrated(attend, partial(eager, mask), partial(formula, mask), [q, kv], [dout])


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_what_is_masked_is_not_read_and_no_token_gives_zeros():
    q, kv, dout = operands(3, 256, 77, 16, 72, torch.bfloat16)
    mask = masks(3, 77)[1]
    mask[1] = False
    clean = run_all(partial(short, mask), [q, kv], [dout])
    got = run_all(partial(short, mask), [q, kv.masked_fill(~mask[..., None, None, None], float("nan"))], [dout])
    assert_equal(got, clean)
    assert all(value[1].abs().max() == 0 and value.isfinite().all() for value in clean)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape", [(64, 256, 77, 16, 72), (64, 256, 20, 12, 64)])
def test_many_heads_repeat_bitwise(shape):
    """More programs than run at once, many times over: a race between them or within one would show."""
    q, kv, dout = operands(*shape, torch.bfloat16)
    attend = partial(short, masks(shape[0], shape[2])[1])
    expected = run_all(attend, [q, kv], [dout])
    for _ in range(20):
        assert_equal(run_all(attend, [q, kv], [dout]), expected)


@pytest.mark.gpu
@on_gpu
def test_cuda_graph_replays_forward_and_backward():
    q, kv, dout = operands(4, 256, 77, 16, 72, torch.bfloat16)
    mask = masks(4, 77)[1]
    leaves = q.requires_grad_(), kv.requires_grad_()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            expected = [g.clone() for g in torch.autograd.grad(short(mask, *leaves), leaves, dout)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(short(mask, *leaves), leaves, dout)
    for value in got:
        value.fill_(float("nan"))
    graph.replay()
    assert_equal(got, expected)
