"""The gradient norm, and AdamW with averages of the weights and bf16 copies of them, over lists of tensors.

    ‖g‖  = √Σ g²                                                                                     `gradient_norm`

    g    = g / divisor                                      k-th update of the tensor                `adamw_ema`
    p    = p − lr · weight_decay · p
    m    = m + (1 − β₁) (g − m)       v = v + (1 − β₂) (g² − v)
    p    = p − lr / (1 − β₁ᵏ) · m / (√v / √(1 − β₂ᵏ) + eps)
    ema  = ema + (1 − decay) · (p − ema)                    for each average
    copy = p, rounded to bf16                               where copies are kept

Everything happens in one pass over memory and, on a GPU, in one launch for all tensors. `divisor` (loss scale times clip)
and `skip` are single fp32 values on the device: nothing waits for the host, and a skipped update changes no bit.

p, averages and steps are fp32; g is fp32 or bf16; m and v are fp32, or bf16 rounded stochastically: up with the
probability of the share that is cut off, by 16 random bits that are a function of (seed, step, position of the tensor in
the list, element), so that an average over many steps moves although single steps are too small for bf16.

Bytes a parameter: 4 for the norm; 28 for the update with fp32 moments (20 with bf16 ones), 8 more for each average and 2
for the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sitfast.kernels import extension
from sitfast.kernels.dispatch import choose
from sitfast.philox import Stream, words

NAME = "adamw_ema"
Tensors = Sequence[Tensor]


def norm_reference(grads: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(grads).float()


def average_(averages: list[Tensor], params: Tensors, decay: float, skip: Tensor | None) -> None:
    """Move averages towards the weights, in one pass over memory.

    Fused SGD on the averages, with the weights as "gradient", maximised, and a weight decay of 1, is
    ema ← ema − (1 − decay) · (1 · ema − p). Unlike a lerp with weight 0, its `found_inf` leaves every bit alone.
    """
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        averages,
        [p.float() for p in params],
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=1.0 - decay,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        grad_scale=None,
        found_inf=skip,
    )


def stochastic_bf16(x: Tensor, random: Tensor) -> Tensor:
    """fp32 x to bf16: up with the probability of what is cut off; `random` holds 16 random bits for each element."""
    bits = (x.view(torch.int32).to(torch.int64) + random) >> 16
    return torch.where(x.isfinite(), bits.to(torch.int16).view(torch.bfloat16), x.to(torch.bfloat16))


def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    emas: list[list[Tensor]],
    copies: list[Tensor],
    divisor: Tensor | None,
    skip: Tensor | None,
    decays: list[float],
    offsets: list[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int,
    step: int,
) -> None:
    """PyTorch's fused AdamW and SGD; with a divisor they leave the divided gradients behind."""
    narrow = exp_avgs[0].dtype == torch.bfloat16
    m, v = ([x.float() for x in moments] if narrow else moments for moments in (exp_avgs, exp_avg_sqs))
    steps += 1 if skip is None else 1 - skip
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        params,
        [g.to(p.dtype) for g, p in zip(grads, params, strict=True)],
        m,
        v,
        [],
        list(steps.unbind()),
        amsgrad=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        grad_scale=divisor,
        found_inf=skip,
    )
    for position, (wide_m, wide_v) in enumerate(zip(m, v, strict=True) if narrow else ()):
        first, count = (offsets[position] if offsets else 0), wide_m.numel()
        index = torch.tensor([position], device=wide_m.device)
        random = words(seed, index, Stream.ROUNDING, first + count, step=step)[0, first:].view(wide_m.shape)
        for moment, wide, bits in ((exp_avgs, wide_m, random), (exp_avg_sqs, wide_v, random >> 16)):
            rounded = stochastic_bf16(wide, bits & 0xFFFF)
            moment[position].copy_(rounded if skip is None else torch.where(skip > 0, moment[position], rounded))
    for averages, decay in zip(emas, decays, strict=True):
        average_(averages, params, decay, skip)
    for copy, p in zip(copies, params if copies else (), strict=True):
        copy.copy_(p if skip is None else torch.where(skip > 0, copy.float(), p))


def _kernel(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    emas: list[list[Tensor]],
    copies: list[Tensor],
    divisor: Tensor | None,
    skip: Tensor | None,
    decays: list[float],
    offsets: list[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int,
    step: int,
) -> None:
    flat = [average for averages in emas for average in averages]
    settings = decays, offsets, lr, *betas, eps, weight_decay, seed, step
    torch.ops.sitfast.adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, steps, flat, copies, divisor, skip, *settings)


def _norm_kernel(grads: list[Tensor]) -> Tensor:
    return torch.ops.sitfast.gradient_norm(grads)


def _fake(params: list[Tensor], grads: Any, exp_avgs: Any, exp_avg_sqs: Any, *_: Any) -> None:
    _check(params, {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs})


_KERNELS, _NORM_KERNELS = extension.kernels(_kernel), extension.kernels(_norm_kernel)
if _KERNELS:
    torch.library.register_fake("sitfast::gradient_norm", lambda grads: grads[0].new_empty((), dtype=torch.float32))
    torch.library.register_fake("sitfast::adamw_ema_", _fake)


def gradient_norm(grads: Tensors) -> Tensor:
    """The 2-norm of all gradients together, an fp32 scalar on their device; of DTensors, that of the whole tensors.

    The sum runs in a fixed order: equal gradients give equal bits.
    """
    if not grads:
        raise ValueError("gradient_norm: no gradients")
    local = [g if g.is_contiguous() else g.contiguous() for g in _locals(grads)]
    norm = choose(local[0].device, norm_reference, **_NORM_KERNELS)(local)
    if not hasattr(grads[0], "device_mesh"):
        return norm
    groups = [_sharded_groups(g) for g in grads]
    if any(other != groups[0] for other in groups):
        raise ValueError("gradient_norm: the gradients are sharded in different ways; take their norms separately")
    total = norm.double().square()
    for group in groups[0]:
        dist.all_reduce(total, group=group)
    return total.sqrt().float()


@torch.no_grad()
def adamw_ema(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    *,
    emas: Sequence[Tensors] = (),
    decays: Sequence[float] = (),
    copies: Tensors = (),
    divisor: Tensor | None = None,
    skip: Tensor | None = None,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: int = 0,
    step: int = 0,
) -> None:
    """One update of every list in place; `steps` `[len(params)]` fp32 counts the updates of each tensor.

    `emas` holds one list a decay. `step` numbers the update for the draws of bf16 moments, nothing else. DTensors are
    updated shard by shard, empty shards included; all lists must be sharded alike. Mismatched lists, devices and dtypes are
    an error before anything is written. The gradients are not read again: they may hold anything afterwards.
    """
    if len(emas) != len(decays):
        raise ValueError(f"{NAME}: {len(emas)} lists of averages for {len(decays)} decays")
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {f"emas[{i}]": averages for i, averages in enumerate(emas)} | ({"copies": copies} if copies else {})
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{NAME}: {name} has {len(tensors)} tensors, params has {len(params)}")
    if not params:
        return
    run = choose(params[0].device, reference, **_KERNELS)
    if run is reference:  # the kernels check what they get, at less cost to the host
        _check(params, lists)
    narrow = exp_avgs[0].dtype == torch.bfloat16
    run(
        _locals(params),
        [g if g.is_contiguous() else g.contiguous() for g in _locals(grads)],
        _locals(exp_avgs),
        _locals(exp_avg_sqs),
        steps,
        [_locals(averages) for averages in emas],
        _locals(copies),
        divisor,
        skip,
        list(decays),
        [_first_element(p) for p in params] if narrow else [],
        lr,
        betas,
        eps,
        weight_decay,
        seed,
        step,
    )


def _check(params: Tensors, lists: dict[str, Tensors]) -> None:
    for name, tensors in lists.items():
        for i, (tensor, p) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != p.shape or tensor.device != p.device:
                raise ValueError(
                    f"{NAME}: {name} number {i} has shape {tuple(tensor.shape)} on {tensor.device}, params has "
                    f"{tuple(p.shape)} on {p.device}"
                )


def _locals(tensors: Tensors) -> list[Tensor]:
    """The parts of DTensors that lie here; the tensors themselves otherwise."""
    if tensors and hasattr(tensors[0], "to_local"):
        return [tensor.to_local() for tensor in tensors]  # pyright: ignore[reportAttributeAccessIssue]
    return list(tensors)


def _sharded_groups(tensor: Any) -> list[dist.ProcessGroup]:
    """The groups over which a DTensor is split."""
    mesh = tensor.device_mesh
    return [mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard()]


def _first_element(tensor: Any) -> int:
    """The index in the whole tensor of the first element that lies here; sharding is along the first dimension."""
    if not hasattr(tensor, "device_mesh"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0] * (tensor.numel() // max(1, tensor.shape[0])) if offset else 0
