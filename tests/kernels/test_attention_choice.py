"""The choice of a backend, with backends and clocks of our own."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sitfast.kernels import attention, attention_choice
from sitfast.kernels.attention import attention_op, describe
from sitfast.kernels.attention_backends import BACKENDS, Backend, with_rows
from sitfast.kernels.attention_choice import plain

CPU = torch.device("cpu")
HEADS = 32, 24, torch.bfloat16, CPU  # N, d, dtype, device


def backend(name, missing=None, out=1.0, dqkv=1.0, lse=0.0, fails=False, varies=False, unwritten=False, rows=1.0):
    """The plain formula in fp64, scaled or shifted to be wrong."""
    runs = itertools.count()

    def forward(qkv):
        if fails:
            raise RuntimeError("no kernel image\nmore lines")
        exact_out, exact_lse, _ = plain(qkv.double(), torch.zeros_like(qkv[:, :, 0]).double())
        return (exact_out * out).to(qkv.dtype), (exact_lse + lse).float()

    def backward(dout, qkv, _out, _lse):
        result = plain(qkv.double(), dout.double())[2] * dqkv
        result[0, 0] *= 1 + (1e-3 * next(runs) if varies else 0)
        if unwritten:
            result[1, 0, 2, 5, 3] = float("nan")  # in no head that is compared
        result = result.to(qkv.dtype)
        return result, with_rows(result)[1].float() * rows

    return Backend(name, lambda *_: missing, forward, backward)


@pytest.fixture
def contest(monkeypatch):
    def run(times, *candidates):
        clock = iter(times)
        monkeypatch.setattr(attention_choice, "BACKENDS", {c.name: c for c in candidates})
        monkeypatch.setattr(attention_choice, "TIMED_ROWS", 3 * 32 * 16)
        monkeypatch.setattr(attention_choice, "time_ms", lambda _: next(clock))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(attention_choice, "_choices", {})
        attention_choice.missing.cache_clear()
        return attention_choice.select(*HEADS)

    yield run
    attention_choice.missing.cache_clear()


def test_fastest_forward_and_fastest_backward_win(contest):
    choice = contest([2.0, 5.0, 3.0, 4.0], backend("a"), backend("b"))
    assert (choice.forward, choice.backward) == ("a", "b")
    assert choice.times_ms == {"a": (2.0, 5.0), "b": (3.0, 4.0)}
    assert attention_choice.select(*HEADS) is choice  # one choice for each device, dtype, N and d
    assert attention_choice.describe(choice) == "forward a, backward b (a 2.000 + 5.000 ms, b 3.000 + 4.000 ms)"


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"out": 1.1}, "out is wrong by"),
        ({"dqkv": 1.1}, "dq is wrong by"),
        ({"dqkv": float("nan")}, "dq is wrong by nan"),
        ({"lse": 0.01}, "lse is wrong by 0.01"),
        ({"rows": 0.0}, "the gradient of qkv's bias is wrong by"),
        ({"unwritten": True}, "some results are not finite"),
        ({"fails": True}, "RuntimeError: no kernel image"),
        ({"missing": "not installed"}, "not installed"),
    ],
)
def test_a_wrong_backend_is_out_however_fast(contest, wrong, reason):
    choice = contest([2.0, 5.0], backend("wrong", **wrong), backend("right"))
    assert (choice.forward, choice.backward) == ("right", "right")
    assert choice.rejected["wrong"].startswith(reason)
    assert "; no wrong: " in attention_choice.describe(choice)


def test_one_that_varies_from_run_to_run_is_the_last_resort(contest):
    choice = contest([1.0, 1.0, 2.0, 2.0], backend("fast", varies=True), backend("same"))  # dqkv varies, out does not
    assert (choice.forward, choice.backward, choice.varying) == ("fast", "same", ("fast",))
    choice = contest([2.0, 2.0, 1.0, 3.0], backend("a", varies=True), backend("b", varies=True))
    assert (choice.forward, choice.backward) == ("b", "a")  # neither repeats
    assert "a 2.000 + 2.000 ms (varies from run to run)" in attention_choice.describe(choice)


def test_no_backend_at_all_is_an_error_that_names_each(contest):
    with pytest.raises(ValueError, match=r"N=32, d=24, torch.bfloat16 on cpu: a: not installed; b: RuntimeError: no"):
        contest([], backend("a", missing="not installed"), backend("b", fails=True))


def test_first_call_inside_a_graph_capture_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="attention: N=32, d=24, torch.bfloat16 is first met inside a CUDA graph"):
        attention_choice.select(*HEADS)


def test_forced_backend_is_checked():
    with pytest.raises(ValueError, match=r"attention: backend 'cudnn' cannot run: torch\.float32 is not bf16 or fp16"):
        attention_choice.select(256, 64, torch.float32, CPU, "cudnn")
    with pytest.raises(ValueError, match="attention: backend 'slow' is unknown; use auto, torch, short"):
        attention(torch.zeros(1, 4, 3, 1, 8), backend="slow")


def test_what_runs_on_pytorch_alone_is_named():
    cuda = torch.device("cuda", 0)
    assert describe(16, 64, torch.bfloat16, CPU).startswith("torch (cpu has")
    assert describe(16, 64, torch.float32, cuda) == "torch (torch.float32 is not bf16 or fp16)"
    assert describe(16, 60, torch.bfloat16, cuda) == "torch (d = 60 is not a multiple of 8 up to 256)"


def test_autograd_adds_nothing_between_the_two_operators(monkeypatch):
    """Forward and backward cost what the two backends cost: no copy, no fill, no gradient added up."""
    monkeypatch.setitem(BACKENDS, "short", backend("short"))
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    qkv = torch.randn(2, 16, 3, 2, 24, requires_grad=True)
    dout = torch.randn(2, 16, 2, 24)
    monkeypatch.setattr(attention_choice, "missing", lambda *_: None)
    with Log():
        torch.autograd.grad(attention_op(qkv, None, "short")[0], qkv, dout)
    work = [name for name in seen if not name.startswith(("aten.detach", "aten.view", "aten.alias"))]
    assert work == ["sitfast.attention.default", "sitfast.attention_backward.default"]


def test_plain_formula_is_exact_in_fp64():
    qkv = torch.randn(2, 9, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 9, 2, 8, dtype=torch.float64)
    out = attention(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    got_out, _, got_dqkv = plain(qkv.detach(), dout)
    assert torch.allclose(got_out, out, atol=1e-12)
    assert torch.allclose(got_dqkv, dqkv, atol=1e-12)
