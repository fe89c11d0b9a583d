"""In which numbers a step computes, and where the weights that learn are.

    fp32, tf32            one set of weights
    fp16                  fp32 weights, autocast, loss scaling
    bf16                  fp32 weights learn, a bf16 copy of them computes: activations and gradients are bf16 throughout,
                          and the update that reads those gradients writes the weights and the copy in one pass
    bf16, residual=fp32   fp32 weights, autocast: the residual stream stays fp32, 15u a norm there and back in place of 10u

Sharded weights (fsdp, hsdp) are gathered in bf16 instead. Gradients of several micro-batches, and of several ranks, are
added in fp32 in every case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sitfast.config import Config

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def wants_copy(cfg: Config) -> bool:
    """Whether a bf16 copy computes in place of the model."""
    return cfg.train.precision == "bf16" and cfg.train.residual == "bf16" and cfg.parallel.strategy == "ddp"


class WorkingCopy:
    """The bf16 copy of a model, made while the model is on the meta device; `network` is what runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.network: Any = copy.deepcopy(model).to(torch.bfloat16)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    @cached_property
    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(weight, its copy); asked for once both have memory, which makes them anew."""
        return list(zip(self.model.parameters(), self.network.parameters(), strict=True))

    @torch.no_grad()
    def renew(self) -> None:
        """Round the weights into the copy; the update does so itself from then on."""
        for weight, parameter in self._pairs:
            parameter.copy_(weight)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copy's gradients to those of the model, which are fp32, and drop them."""
        fresh: list[Tensor] = []
        sums: list[Tensor] = []
        for weight, parameter in self._pairs:
            if parameter.grad is None:
                continue
            if weight.grad is None:
                weight.grad = parameter.grad.float()
            else:
                sums.append(weight.grad)
                fresh.append(parameter.grad)
            parameter.grad = None
        if sums:
            torch._foreach_add_(sums, fresh)  # pyright: ignore[reportPrivateImportUsage]

    def reduction(self, size: int) -> Callable[[Any, Any], torch.futures.Future[Tensor]]:
        """For DistributedDataParallel.register_comm_hook: the mean over `size` ranks, in fp32, becomes the model's gradient.

        What `collect` has added up before is part of it.
        """
        owner = {id(parameter): weight for weight, parameter in self._pairs}

        def reduce(_, bucket):  # DDP refuses annotations that are strings, as they are in this file
            narrow = bucket.buffer()
            wide = narrow.float()
            for parameter, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
                first = grad.storage_offset() - narrow.storage_offset()
                weight = owner[id(parameter)]
                mine = wide[first : first + grad.numel()].view_as(grad)
                if weight.grad is not None:
                    mine += weight.grad
                weight.grad = mine
            future = dist.all_reduce(wide.div_(size), async_op=True).get_future()  # pyright: ignore[reportOptionalMemberAccess]
            return future.then(lambda _: narrow)

        return reduce
