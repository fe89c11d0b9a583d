"""cuBLASLt's GEMM with the GELU_AUX_BIAS epilogue, which PyTorch does not offer, through ctypes: no compiler is needed.

    gelu_aux_bias     u = x w1ᵀ + b1 and a = gelu(u), both written by one GEMM

cuBLASLt is column-major: a contiguous [M, H] is its [H, M], so the product is computed as its transpose and the bias,
one value a row there, runs along H. Its GELU is the tanh form. The library is the one that PyTorch has loaded, and
PyTorch's handle is used (a cublasHandle_t is a valid cublasLtHandle_t).

The epilogues of the backward pass lost and are not here: one H100, bf16, 32768 x 1152 x 4608, DGELU_BGRAD 1.65 ms (a
plain GEMM and a pointwise pass 0.83), BGRADB on the weight gradients 0.54 and 0.66 (plain 0.50 and 0.57).

A plan (descriptors and algorithm) is made once for a shape. `works` runs the epilogue on random data of the real shape
against a plain GEMM and answers whether it may be used.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

_GELU_AUX_BIAS = 32 | 128 | 4
_DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FP32, _COMPUTE_FP32 = 0, 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 3, 7, 8, 11, 12
_MAX_WORKSPACE, _MIN_ALIGNMENT_A = 1, 5
_WORKSPACE_LIMIT = 32 << 20  # bytes; what NVIDIA recommends for Hopper


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


_verdicts: dict[tuple[torch.device, torch.dtype, int, int, int], bool] = {}

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
    """x [rows, width], w1 [hidden, width]."""

    device: int
    dtype: torch.dtype
    rows: int
    width: int
    hidden: int
    alignment: int  # of every pointer, in bytes


@dataclass
class Plan:
    """Descriptors and algorithm of one problem; they live as long as the process, as the plan is cached."""

    operation: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ...]  # of w1, x and a, in this order
    algorithm: _Algorithm
    workspace: int  # bytes
    lock: threading.Lock = field(default_factory=threading.Lock)  # the pointers of an epilogue are part of its state

    def run(self, w1: Tensor, x: Tensor, a: Tensor, bias: Tensor, u: Tensor) -> None:
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=a.device)
        with self.lock, torch.cuda.device(a.device):
            for attribute, tensor in ((_BIAS_POINTER, bias), (_AUX_POINTER, u)):
                _set("cublasLtMatmulDescSetAttribute", self.operation, attribute, ctypes.c_void_p(tensor.data_ptr()))
            _call(
                "cublasLtMatmul",
                torch.cuda.current_blas_handle(),
                self.operation,
                ctypes.byref(_ONE),
                w1.data_ptr(),
                self.layouts[0],
                x.data_ptr(),
                self.layouts[1],
                ctypes.byref(_ZERO),
                a.data_ptr(),
                self.layouts[2],
                a.data_ptr(),
                self.layouts[2],
                ctypes.byref(self.algorithm),
                workspace.data_ptr(),
                self.workspace,
                torch.cuda.current_stream(a.device).cuda_stream,
            )


@cache
def plan(problem: Problem) -> Plan:
    kind, set_operation = _DATA_TYPES[problem.dtype], "cublasLtMatmulDescSetAttribute"
    rows, width, hidden = problem.rows, problem.width, problem.hidden
    operation = _create("cublasLtMatmulDescCreate", _COMPUTE_FP32, _FP32)
    _set(set_operation, operation, _TRANSPOSE_A, ctypes.c_int32(1))
    _set(set_operation, operation, _EPILOGUE, ctypes.c_int32(_GELU_AUX_BIAS))
    _set(set_operation, operation, _AUX_LD, ctypes.c_int64(hidden))
    # The heuristic reads the alignment of these two off their values.
    example = ctypes.c_void_p(problem.alignment)
    _set(set_operation, operation, _BIAS_POINTER, example)
    _set(set_operation, operation, _AUX_POINTER, example)
    shapes = ((width, hidden), (width, rows), (hidden, rows))
    layouts = tuple(_create("cublasLtMatrixLayoutCreate", kind, *shape, shape[0]) for shape in shapes)

    preference = _create("cublasLtMatmulPreferenceCreate")
    set_preference = "cublasLtMatmulPreferenceSetAttribute"
    _set(set_preference, preference, _MAX_WORKSPACE, ctypes.c_uint64(_WORKSPACE_LIMIT))
    for matrix in range(4):
        _set(set_preference, preference, _MIN_ALIGNMENT_A + matrix, ctypes.c_uint32(problem.alignment))
    # Of eight candidates that the heuristic ranked for the shape above, its first was the fastest.
    found, count = _Heuristic(), ctypes.c_int()
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
            1,
            ctypes.byref(found),
            ctypes.byref(count),
        )
    _call("cublasLtMatmulPreferenceDestroy", preference)
    if count.value == 0 or found.state != 0:
        raise CublasLtError(f"cuBLASLt has no algorithm for {problem}")
    return Plan(operation, layouts, found.algorithm, found.workspace)


def alignment(tensors: Sequence[Tensor]) -> int:
    """The largest power of two up to 256 that divides every address."""
    bits = 256
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


def gelu_aux_bias(x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """(u, a) [M, H] of contiguous x [M, D], w1 [H, D], b1 [H]: u = x w1ᵀ + b1, a = gelu(u)."""
    (rows, width), hidden = x.shape, w1.shape[0]
    u, a = (torch.empty((rows, hidden), dtype=x.dtype, device=x.device) for _ in range(2))
    index = x.device.index
    plan(Problem(index, x.dtype, rows, width, hidden, alignment((x, w1, b1, u, a)))).run(w1, x, a, b1, u)
    return u, a


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

    def agrees(got: Tensor, plain: Tensor, exact: Tensor) -> bool:
        """Whether `got` is as near to `exact` as twice what a plain GEMM and a pointwise operation reach."""
        bound = 2 * (plain.float() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        return bool(((got.float() - exact).abs().max() <= bound).item())  # a NaN answers False

    return (
        torch.equal(u, u_again)
        and torch.equal(a, a_again)
        and agrees(u[sample], plain, exact)
        and agrees(a[sample], *(torch.nn.functional.gelu(value, approximate="tanh") for value in (plain, exact)))
    )
