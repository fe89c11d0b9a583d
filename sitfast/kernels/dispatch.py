"""What every kernel file shares: which implementation runs, in which dtype, and the check of the operands at the edge.

    implementation = kernels[device] if there is one and we are not inside `use_reference()`, else the reference

All of it can be traced: torch.compile sees plain Python and guards on the flag behind `use_reference()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_WIDTH = 8192  # of a row that a GPU kernel keeps in registers

# One flag for the process, not one a thread: autograd recomputes checkpointed blocks in threads of its own, which must
# choose as the forward pass did, and torch.compile guards on a module global but not on a ContextVar or a thread-local.
_reference_only = False


@contextmanager
def use_reference() -> Iterator[None]:
    """Run every kernel as its plain PyTorch reference; nests."""
    global _reference_only
    previous, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = previous


def choose(device: torch.device, reference: Callable[P, R], **kernels: Callable[P, R]) -> Callable[P, R]:
    """The implementation for `device`; `kernels` are named by device type (`cuda=…`, `cpu=…`)."""
    return reference if _reference_only else kernels.get(device.type, reference)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that arithmetic and statistics run in: fp32, or fp64 for fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a result meets the next GEMM: autocast's where it is on, else that of x.

    Autocast leaves fp64 alone and does not know the meta device; so do we.
    """
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def check(kernel: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise a ValueError unless the operand is a floating tensor `[*shape]` on `device` with dense rows."""
    if tensor.shape != shape:
        raise ValueError(f"{kernel}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{kernel}: {name} is {tensor.dtype}, expected fp16, bf16, fp32 or fp64; cast it first")
    if tensor.device != device:
        raise ValueError(f"{kernel}: {name} is on {tensor.device}, the first operand on {device}; move one of them")
    if shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{kernel}: {name} has last stride {tensor.stride(-1)}, expected 1; call .contiguous() on it")


def check_rank(kernel: str, name: str, tensor: Tensor, rank: int, layout: str) -> None:
    """Raise a ValueError unless the operand has `rank` dimensions, described by `layout`."""
    if tensor.ndim != rank:
        raise ValueError(f"{kernel}: {name} has shape {tuple(tensor.shape)}, expected {layout}")


def check_cuda(kernel: str, **operands: Tensor | None) -> None:
    """Raise a ValueError for what the CUDA kernels do not take and the references do."""
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if tensor.numel() == 0:
            raise ValueError(f"{kernel}: {name} has shape {tuple(tensor.shape)}, the GPU kernel takes no empty tensor")
        if tensor.dtype == torch.float64:
            raise ValueError(f"{kernel}: {name} is torch.float64 on a GPU; cast it, or call inside use_reference()")
        if tensor.shape[-1] > MAX_WIDTH:
            raise ValueError(f"{kernel}: {name} has rows of {tensor.shape[-1]}, the GPU kernel takes up to {MAX_WIDTH}")
