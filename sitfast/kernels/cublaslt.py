"""GEMMs of cuBLASLt that PyTorch does not offer, through ctypes: no compiler is needed.

    gelu_aux_bias     u = x w1ᵀ + b1 and a = gelu(u), both written by one GEMM
    matmul            x wᵀ, x wᵀ + bias or x w, by the fastest of the algorithms that the library proposes

cuBLASLt is column-major: a contiguous [M, N] is its [N, M], so a product is computed as its transpose, and the bias,
one value a row there, runs along N. Its GELU is the tanh form. The library is the one that PyTorch has loaded, and
PyTorch's handle is used (a cublasHandle_t is a valid cublasLtHandle_t).

cuBLAS takes the first algorithm that its heuristic names. `matmul` times eight, once for a shape, on random data of that
shape; one counts only if its result is bit for bit that of the first, so the choice moves time and nothing else. For
32768 rows on an H100 in bf16 it gains 6 % at 1152 x 3456 and 13 % at 1152 x 1152; docs/kernels.md has the table.

The epilogues of the backward pass lost and are not here: one H100, bf16, 32768 x 1152 x 4608, DGELU_BGRAD 1.65 ms (a
plain GEMM and a pointwise pass 0.83), BGRADB on the weight gradients 0.54 and 0.66 (plain 0.50 and 0.57).

A plan (descriptors and algorithm) is made once for a shape. `works` runs the GELU epilogue, `multiplies` the products, on
random data of the real shape against a plain GEMM and answers whether they may be used.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

_BIAS, _GELU_AUX_BIAS = 4, 32 | 128 | 4
_DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FP32, _COMPUTE_FP32 = 0, 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 3, 7, 8, 11, 12
_MAX_WORKSPACE, _MIN_ALIGNMENT_A = 1, 5
_WORKSPACE_LIMIT = 32 << 20  # bytes; what NVIDIA recommends for Hopper
_CANDIDATES = 8  # the heuristic names no more for these shapes
_ROUNDS = 16  # of timing; 50 ms for the largest GEMMs of a SiT-XL/2
_GAIN = 0.98  # of the first one's time: less is noise

Form = Literal["nt", "nn"]  # x [M, K] with w [N, K], or with w [K, N]
Epilogue = Literal["none", "bias", "gelu_aux_bias"]


class CublasLtError(RuntimeError):
    """cuBLASLt refused a call, or has no algorithm for it."""


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


_verdicts: dict[tuple[torch.device, torch.dtype, int, int, int], bool] = {}  # of `works`
_tuned: dict[tuple, bool] = {}  # of `multiplies`

_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)


@cache
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "").split(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{major}")  # by its soname: already in the process
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.cublasLtMatmulDescCreate.argtypes = [pointer, integer, integer]
    library.cublasLtMatmulDescSetAttribute.argtypes = [pointer, integer, pointer, ctypes.c_size_t]
    library.cublasLtMatrixLayoutCreate.argtypes = [pointer, integer, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64]
    library.cublasLtMatmulPreferenceCreate.argtypes = [pointer]
    library.cublasLtMatmulPreferenceDestroy.argtypes = [pointer]
    library.cublasLtMatmulPreferenceSetAttribute.argtypes = [pointer, integer, pointer, ctypes.c_size_t]
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = [pointer] * 7 + [integer, pointer, pointer]
    library.cublasLtMatmul.argtypes = [pointer] * 14 + [ctypes.c_size_t, pointer]
    return library


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status != 0:
        raise CublasLtError(f"{name} returned status {status}")


def _create(name: str, *arguments: object) -> ctypes.c_void_p:
    created = ctypes.c_void_p()
    _call(name, ctypes.byref(created), *arguments)
    return created


def _set(name: str, target: ctypes.c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
    _call(name, target, attribute, ctypes.byref(value), ctypes.sizeof(value))


@dataclass(frozen=True)
class Problem:
    """[rows, inner] times w, whose form says how it lies, into [rows, columns]."""

    device: int
    dtype: torch.dtype
    rows: int
    columns: int
    inner: int
    form: Form
    epilogue: Epilogue
    alignment: int  # of every pointer, in bytes


@dataclass
class Plan:
    """Descriptors and algorithm of one problem; they live as long as the process, as the plan is cached."""

    operation: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ...]  # of w, x and the result, in this order
    algorithms: list[tuple[_Algorithm, int]]  # with the bytes of workspace, as the heuristic ranks them
    chosen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # the pointers of an epilogue are part of its state

    def run(self, w: Tensor, x: Tensor, out: Tensor, bias: Tensor | None = None, aux: Tensor | None = None) -> None:
        algorithm, size = self.algorithms[self.chosen]
        workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
        with self.lock, torch.cuda.device(out.device):
            for attribute, tensor in ((_BIAS_POINTER, bias), (_AUX_POINTER, aux)):
                if tensor is not None:
                    pointer = ctypes.c_void_p(tensor.data_ptr())
                    _set("cublasLtMatmulDescSetAttribute", self.operation, attribute, pointer)
            _call(
                "cublasLtMatmul",
                torch.cuda.current_blas_handle(),
                self.operation,
                ctypes.byref(_ONE),
                w.data_ptr(),
                self.layouts[0],
                x.data_ptr(),
                self.layouts[1],
                ctypes.byref(_ZERO),
                out.data_ptr(),
                self.layouts[2],
                out.data_ptr(),
                self.layouts[2],
                ctypes.byref(algorithm),
                workspace.data_ptr(),
                size,
                torch.cuda.current_stream(out.device).cuda_stream,
            )


@cache
def plan(problem: Problem) -> Plan:
    kind, set_operation = _DATA_TYPES[problem.dtype], "cublasLtMatmulDescSetAttribute"
    rows, columns, inner = problem.rows, problem.columns, problem.inner
    operation = _create("cublasLtMatmulDescCreate", _COMPUTE_FP32, _FP32)
    _set(set_operation, operation, _TRANSPOSE_A, ctypes.c_int32(problem.form == "nt"))
    # The heuristic reads the alignment of the pointers off their values.
    example = ctypes.c_void_p(problem.alignment)
    if problem.epilogue != "none":
        flag = _BIAS if problem.epilogue == "bias" else _GELU_AUX_BIAS
        _set(set_operation, operation, _EPILOGUE, ctypes.c_int32(flag))
        _set(set_operation, operation, _BIAS_POINTER, example)
    if problem.epilogue == "gelu_aux_bias":
        _set(set_operation, operation, _AUX_LD, ctypes.c_int64(columns))
        _set(set_operation, operation, _AUX_POINTER, example)
    of_w = (inner, columns) if problem.form == "nt" else (columns, inner)
    shapes = (of_w, (inner, rows), (columns, rows))
    layouts = tuple(_create("cublasLtMatrixLayoutCreate", kind, *shape, shape[0]) for shape in shapes)

    preference = _create("cublasLtMatmulPreferenceCreate")
    set_preference = "cublasLtMatmulPreferenceSetAttribute"
    _set(set_preference, preference, _MAX_WORKSPACE, ctypes.c_uint64(_WORKSPACE_LIMIT))
    for matrix in range(4):
        _set(set_preference, preference, _MIN_ALIGNMENT_A + matrix, ctypes.c_uint32(problem.alignment))
    found, count = (_Heuristic * _CANDIDATES)(), ctypes.c_int()
    with torch.cuda.device(problem.device):
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            torch.cuda.current_blas_handle(),
            operation,
            layouts[0],
            layouts[1],
            layouts[2],
            layouts[2],
            preference,
            _CANDIDATES,
            found,
            ctypes.byref(count),
        )
    _call("cublasLtMatmulPreferenceDestroy", preference)
    algorithms = [(entry.algorithm, entry.workspace) for entry in found[: count.value] if entry.state == 0]
    if not algorithms:
        raise CublasLtError(f"cuBLASLt has no algorithm for {problem}")
    return Plan(operation, layouts, algorithms)


def alignment(tensors: Sequence[Tensor]) -> int:
    """The largest power of two up to 256 that divides every address."""
    bits = 256
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


def _plan_of(x: Tensor, w: Tensor, form: Form, epilogue: Epilogue, *pointers: Tensor | None) -> Plan:
    (rows, inner), columns = x.shape, w.shape[0 if form == "nt" else 1]
    aligned = alignment([tensor for tensor in (x, w, *pointers) if tensor is not None])
    return plan(Problem(x.device.index, x.dtype, rows, columns, inner, form, epilogue, aligned))


def gelu_aux_bias(x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """(u, a) [M, H] of contiguous x [M, D], w1 [H, D], b1 [H]: u = x w1ᵀ + b1, a = gelu(u)."""
    u, a = (torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device) for _ in range(2))
    _plan_of(x, w1, "nt", "gelu_aux_bias", b1, u, a).run(w1, x, a, b1, u)
    return u, a


def matmul(x: Tensor, w: Tensor, bias: Tensor | None = None, *, form: Form) -> Tensor:
    """x wᵀ (+ bias [N]) for w [N, K], x w for w [K, N], of contiguous x [M, K]; by PyTorch where cuBLASLt may not run."""
    if not multiplies(x, w, bias, form):
        return torch_matmul(x, w, bias, form=form)
    out = torch.empty((x.shape[0], w.shape[0 if form == "nt" else 1]), dtype=x.dtype, device=x.device)
    _plan_of(x, w, form, "none" if bias is None else "bias", out, bias).run(w, x, out, bias)
    return out


def torch_matmul(x: Tensor, w: Tensor, bias: Tensor | None = None, *, form: Form) -> Tensor:
    w = w.t() if form == "nt" else w
    return x @ w if bias is None else torch.addmm(bias, x, w)


def multiplies(x: Tensor, w: Tensor, bias: Tensor | None, form: Form) -> bool:
    """Whether `matmul` runs cuBLASLt for these contiguous operands; the first time for a shape it is tested and tuned.

    A shape first met while a CUDA graph is captured cannot be tested there, and is refused for that call.
    """
    if x.device.type != "cuda" or x.dtype not in _DATA_TYPES or x.numel() == 0 or any(n % 8 for n in w.shape):
        return False
    key = (x.device, x.dtype, *x.shape, *w.shape, bias is not None, form)
    if key not in _tuned and not torch.cuda.is_current_stream_capturing():
        _tuned[key] = _tune(x, w, bias is not None, form)
    return _tuned.get(key, False)


def _tune(x: Tensor, w: Tensor, with_bias: bool, form: Form) -> bool:
    """Choose the algorithm for operands of this shape, dtype and alignment; False if the product is not right."""
    generator = torch.Generator(x.device).manual_seed(0)

    def draw(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=x.device).mul_(scale).to(x.dtype)

    x, w = draw(x, 1.0), draw(w, x.shape[1] ** -0.5)
    columns = w.shape[0 if form == "nt" else 1]
    bias = draw(w.new_empty(columns), 1.0) if with_bias else None
    first, other = (torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device) for _ in range(2))
    try:
        tuned = _plan_of(x, w, form, "bias" if with_bias else "none", bias, first)
        tuned.run(w, x, first, bias)
    except (CublasLtError, OSError, AttributeError):
        return False
    sample = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], 512), device=x.device).long()
    exact = torch_matmul(x[sample].float(), w.float(), None if bias is None else bias.float(), form=form)
    if not _agrees(first[sample], torch_matmul(x[sample], w, bias, form=form), exact):
        return False
    same = []  # the algorithms whose every bit is that of the first
    for index in range(len(tuned.algorithms)):
        tuned.chosen = index
        try:
            tuned.run(w, x, other.fill_(torch.nan), bias)
        except CublasLtError:
            continue
        if torch.equal(first, other):
            same.append(index)
    if 0 not in same:
        return False
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(len(same) + 1)] for _ in range(_ROUNDS)]
    for marks in events:  # in turn and without a pause, since the clock falls under load
        marks[0].record()
        for index, mark in zip(same, marks[1:], strict=True):
            tuned.chosen = index
            tuned.run(w, x, other, bias)
            mark.record()
    torch.cuda.synchronize()
    times = {
        index: statistics.median(marks[i].elapsed_time(marks[i + 1]) for marks in events)
        for i, index in enumerate(same)
    }
    best = min(same, key=times.__getitem__)
    tuned.chosen = best if times[best] < _GAIN * times[0] else 0
    return True


def works(x: Tensor, w1: Tensor) -> bool:
    """Whether `gelu_aux_bias` may be used for contiguous x [M, D] and w1 [H, D]: see `_tested`.

    A shape first met while a CUDA graph is captured cannot be tested there, and is refused for that call.
    """
    (rows, width), hidden = x.shape, w1.shape[0]
    if x.device.type != "cuda" or x.dtype not in _DATA_TYPES or width % 8 or hidden % 8 or rows == 0:
        return False
    key = (x.device, x.dtype, rows, width, hidden)
    if key not in _verdicts and not torch.cuda.is_current_stream_capturing():
        _verdicts[key] = _tested(*key)
    return _verdicts.get(key, False)


def _tested(device: torch.device, dtype: torch.dtype, rows: int, width: int, hidden: int) -> bool:
    """Whether the epilogue answers as precisely as PyTorch, and the same twice, on a sample of rows of random data."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    x, w1, b1 = draw(rows, width), draw(hidden, width, scale=width**-0.5), draw(hidden)
    try:
        u, a = gelu_aux_bias(x, w1, b1)
        u_again, a_again = gelu_aux_bias(x, w1, b1)
    except (CublasLtError, OSError, AttributeError):
        return False
    sample = torch.linspace(0, rows - 1, min(rows, 512), device=device).long()
    plain = torch.addmm(b1, x[sample], w1.T)
    exact = x[sample].float() @ w1.float().T + b1.float()

    return (
        torch.equal(u, u_again)
        and torch.equal(a, a_again)
        and _agrees(u[sample], plain, exact)
        and _agrees(a[sample], *(torch.nn.functional.gelu(value, approximate="tanh") for value in (plain, exact)))
    )


def _agrees(got: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether `got` is as near to `exact` as twice what a plain GEMM and a pointwise operation reach."""
    bound = 2 * (plain.float() - exact).abs().max() + torch.finfo(got.dtype).eps * exact.abs().max()
    return bool(((got.float() - exact).abs().max() <= bound).item())  # a NaN answers False
