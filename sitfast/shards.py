"""Tensors of which each rank holds some rows: the one place that knows how a sharded weight is cut.

    weight [R, …] over n ranks:   rank r holds rows [r·⌈R/n⌉, (r+1)·⌈R/n⌉), the last ranks fewer or none

`fully_shard` makes every parameter such a DTensor. What works on numbers alone (AdamW, averages, norms, files) takes the
local rows; on a plain tensor every function here is the identity, so one code serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; a plain tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def first_row(tensor: Tensor) -> int:
    """The number of this rank's first row; 0 of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]


def copies_of(tensor: Tensor, rank: int, world_size: int) -> tuple[int, int]:
    """(how many ranks hold the same rows as this one, which of them it is)."""
    if not isinstance(tensor, DTensor):
        return world_size, rank
    copies, own = 1, 0
    for place, size, at in zip(
        tensor.placements, tensor.device_mesh.shape, tensor.device_mesh.get_coordinate() or (), strict=True
    ):
        if place.is_replicate():
            copies, own = copies * size, own * size + at
    return copies, own


def like(owner: Tensor, rows: Tensor) -> Tensor:
    """`rows`, of the shape of `local(owner)`, as a tensor sharded like `owner`."""
    if not isinstance(owner, DTensor):
        return rows
    return DTensor.from_local(
        rows, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
    )


def rows_of(value: Tensor, owner: Tensor) -> Tensor:
    """Of a whole tensor `value`, the rows that `local(owner)` holds."""
    if not isinstance(owner, DTensor):
        return value
    first = first_row(owner)
    return value[first : first + owner.to_local().shape[0]]


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy `value`, whole or sharded like `target`, into `target`."""
    rows = local(value) if isinstance(value, DTensor) else rows_of(value, target)
    local(target).copy_(rows)
