"""One update of the weights: gradient norm, clip, AdamW, EMA and the guard against non-finite values, on the device.

    g    = gradient / loss scale · min(1, clip_norm / (‖gradient / loss scale‖₂ + 1e-6))
    m    = β₁ m + (1 − β₁) g          v = β₂ v + (1 − β₂) g²
    p    = p − lr · (weight_decay · p + m / (1 − β₁ᵏ) / (√(v / (1 − β₂ᵏ)) + eps))          k-th update that is applied
    ema  = ema + (1 − decay) · (p − ema)

The clip coefficient and the loss scale reach the kernel as a divisor on the device, so the gradients are read once for
the norm and once for the update (`kernels.adamw_ema`). Whether this step counts is a 0/1 tensor, which the kernel reads on
the device too: it leaves every bit of weights, moments, step counts and averages alone when it is 1, so nothing waits for
the host.

Of sharded weights each rank updates its own rows, with moments and averages of that size; the norm is that of the whole.

Weight decay, where there is any, applies to every trained parameter, biases and embeddings included: the official
training makes one group of all parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sitfast.errors import SitfastError
from sitfast.kernels.adamw_ema import adamw_ema, average_, gradient_norm
from sitfast.shards import assign, local

_CLIP_EPS = 1e-6  # that of torch.nn.utils.clip_grad_norm_
_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000  # good fp16 steps before the loss scale doubles
_MOMENTS = {"fp32": None, "bf16": torch.bfloat16}  # None: that of the weights
_FINE, _LOSS, _GRADIENT, _SCALE = range(4)  # what stopped the run


def learning_rate(step: int, optim: Any, total_steps: int) -> float:
    """The learning rate of update `step`, counted from 0; `optim` is the config section.

    step < warmup_steps:  lr · (step + 1) / warmup_steps
    constant:             lr
    cosine:               min_lr + (lr − min_lr) · ½ (1 + cos(π · u))
                          u = (step − warmup_steps) / (total_steps − warmup_steps), at most 1

    So the first update after the warm-up has the full lr, and min_lr is reached at step = total_steps, where it stays.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


class EMA:
    """fp32 exponential moving averages of the parameters, one set of shadows for each decay.

    Parameters that do not train (the position embedding) are copied along when the averages are made, so make them
    after the first weights are in place.
    """

    def __init__(self, named_params: Iterable[tuple[str, nn.Parameter]], decays: Sequence[float], warmup: bool) -> None:
        named = dict(named_params)
        self.decays = tuple(decays)
        self.warmup = warmup
        self._shadows = [
            {
                name: p.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                for name, p in named.items()
            }
            for _ in self.decays
        ]
        self._trained = {name: p for name, p in named.items() if p.requires_grad}

    def decay(self, i: int, n: int) -> float:
        """Decay of average `i` after `n` updates: min(decay, (1 + n) / (10 + n)), so that the first weights fade."""
        return min(self.decays[i], (1 + n) / (10 + n)) if self.warmup else self.decays[i]

    @torch.no_grad()
    def update(self, n: int, skip: Tensor) -> None:
        """Move every average towards the weights; `n` updates came before this one.

        `skip`, an fp32 0 or 1 on the device, makes it a no-op. `Update.step` moves them itself, in the pass of AdamW.
        """
        weights = [p.detach() for p in self._trained.values()]
        for i, shadow in enumerate(self._shadows):
            average_([shadow[name] for name in self._trained], weights, self.decay(i, n), skip)

    @contextlib.contextmanager
    def applied(self, model: nn.Module, i: int = 0) -> Iterator[None]:
        """Inside, `model` has the weights of average `i`; its own if there are no averages."""
        shadow = self._shadows[i] if self._shadows else {}
        own = {name: local(model.get_parameter(name)).detach().clone() for name in shadow}
        try:
            _copy_into(model, shadow)
            yield
        finally:
            _copy_into(model, own)

    def state(self, i: int) -> dict[str, Tensor]:
        """The shadows of average `i` by parameter name; views, not copies."""
        return dict(self._shadows[i])

    def load(self, i: int, state: Mapping[str, Tensor]) -> None:
        _restore(self._shadows[i], state, f"EMA {self.decays[i]}")


@torch.no_grad()
def _copy_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        local(model.get_parameter(name)).copy_(local(value))


class Update:
    """AdamW, EMA, loss scale and non-finite guard of one model; `optim` and `ema` are the config sections.

    A step is bad when the loss or the gradient norm of any rank is not finite. Then nothing changes, and

    - `on_nonfinite="stop"`: all later steps are no-ops as well, until `check` raises on the host. Call it wherever the
      host waits anyway: when logging, and before saving.
    - `on_nonfinite="skip"`: the step is counted in `skipped`.
    - fp16 gradients that overflow halve the loss scale and are counted in `skipped`, whatever `on_nonfinite` says; they
      stop the run only when the scale would fall below 1. The scale doubles after 2000 good steps in a row.

    The learning rate is that of `total_steps` updates from `first_step` on.

    `all_reduce_max`, where there are several ranks, returns the elementwise maximum of an fp32 tensor over them; it
    runs once a step, so that all ranks decide alike and name the same culprit by its `rank`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optim: Any,
        ema: Any,
        total_steps: int,
        precision: str,
        first_step: int = 0,
        all_reduce_max: Callable[[Tensor], Tensor] | None = None,
        rank: int = 0,
        seed: int = 0,
        copies: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._copies = {name: p for name, p in (copies or {}).items() if p.requires_grad}
        self._optim = optim
        self._total_steps, self._first_step = total_steps, first_step
        self._fp16 = precision == "fp16"
        self._all_reduce_max = all_reduce_max
        self._rank = rank
        self._seed = seed
        self.ema = EMA(model.named_parameters(), ema.decays, ema.warmup)
        device = next(iter(self._params.values())).device
        # Holds the state as everyone knows it; the steps are ours.
        self.optimizer = torch.optim.AdamW(
            self._params.values(),
            lr=optim.lr,
            betas=tuple(optim.betas),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        # The moments exist from the start, so that a checkpoint of step 0 is like any other.
        self._steps = torch.zeros(len(self._params), device=device)
        moments = _MOMENTS[optim.moments]
        for p in self._params.values():
            keys = ("exp_avg", "exp_avg_sq")
            self.optimizer.state[p] = {key: torch.zeros_like(p, dtype=moments or p.dtype) for key in keys}
        self._share_steps()
        self.optimizer.register_load_state_dict_post_hook(lambda _: self._adopt(moments))
        self._scale = torch.full((), _INITIAL_SCALE, device=device)  # used in fp16 only
        self._growth = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._stopped = torch.tensor([-1, _FINE, -1], device=device)  # step, reason, rank of what stopped the run

    def _share_steps(self) -> None:
        """Each tensor's count of updates in the optimizer's state is a view of ours."""
        for step, p in zip(self._steps, self._params.values(), strict=True):
            self.optimizer.state[p]["step"] = step

    def _adopt(self, moments: torch.dtype | None) -> None:
        """After `optimizer.load_state_dict` of any torch.optim.AdamW: its tensors are new, and its moments fp32."""
        state = self.optimizer.state
        for i, p in enumerate(self._params.values()):  # one that never stepped has no state
            self._steps[i] = state[p].get("step", 0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[p][key] = state[p].get(key, torch.zeros_like(p)).to(moments or p.dtype)
        self._share_steps()

    def zero_grad(self) -> None:
        for p in (*self._params.values(), *self._copies.values()):
            p.grad = None

    def _gradient(self, name: str) -> Tensor | None:
        """Of the weight, or else of the copy of it that computed."""
        own = self._params[name].grad
        return own if own is not None or name not in self._copies else self._copies[name].grad

    def scale_loss(self, loss: Tensor) -> Tensor:
        """What to call backward on."""
        return loss * self._scale if self._fp16 else loss

    @torch.no_grad()
    def step(self, step: int, loss: Tensor) -> Tensor:
        """Apply update `step`, counted from 0, given the unscaled loss and the gradients in `p.grad`.

        Returns the norm of the unscaled gradients before the clip, as a tensor on the device.
        """
        found = {name: self._gradient(name) for name in self._params}
        grads = [g for g in found.values() if g is not None]
        learning = {name: p for name, p in self._params.items() if found[name] is not None}
        norm = gradient_norm(grads)
        skip = self._guard(step, loss.detach(), norm)
        divisor = None
        if self._fp16:
            divisor, norm = self._scale, norm / self._scale
        if self._optim.clip_norm is not None:
            clip = ((norm + _CLIP_EPS) / self._optim.clip_norm).clamp(min=1.0)
            divisor = clip if divisor is None else divisor * clip
        self.optimizer.param_groups[0]["lr"] = lr = learning_rate(
            step - self._first_step, self._optim, self._total_steps
        )
        state, shadows = self.optimizer.state, [self.ema.state(i) for i in range(len(self.ema.decays))]
        decays = [self.ema.decay(i, step) for i in range(len(shadows))]
        idle = self._params.keys() - learning.keys()
        steps = torch.stack([state[p]["step"] for p in learning.values()]) if idle else self._steps
        adamw_ema(
            list(learning.values()),
            grads,
            [state[p]["exp_avg"] for p in learning.values()],
            [state[p]["exp_avg_sq"] for p in learning.values()],
            steps,
            emas=[[shadow[name] for name in learning] for shadow in shadows],
            decays=decays,
            copies=[self._copies[name] for name in learning] if self._copies else (),
            divisor=divisor,
            skip=skip,
            lr=lr,
            betas=tuple(self._optim.betas),
            eps=self._optim.eps,
            weight_decay=self._optim.weight_decay,
            seed=self._seed,
            step=step,
        )
        if idle:  # parameters without a gradient keep their state, and their averages still approach them
            for p, count in zip(learning.values(), steps, strict=True):
                state[p]["step"].copy_(count)
            for shadow, decay in zip(shadows, decays, strict=True):
                average_([shadow[name] for name in idle], [self._params[name] for name in idle], decay, skip)
        if self._fp16:
            self._rescale(skip)
        return norm

    def _guard(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 if this update must not be applied, else 0.0; remembers what stops the run, counts what is skipped."""
        # Each entry is the number of the bad rank + 1, so that the maximum over ranks still names one.
        bad = torch.stack([loss.float(), norm]).isfinite().logical_not() * float(self._rank + 1)
        if self._all_reduce_max is not None:
            bad = self._all_reduce_max(bad)
        bad_loss, bad_gradient = (bad > 0).unbind()
        bad_step, stopped = bad_loss | bad_gradient, self._stopped[0] >= 0
        reason = torch.where(bad_loss, _LOSS, _GRADIENT)
        fatal = bad_step if self._optim.on_nonfinite == "stop" else torch.zeros_like(bad_step)
        if self._fp16:
            exhausted = ~bad_loss & bad_gradient & (self._scale * 0.5 < 1.0)
            fatal = (fatal & bad_loss) | exhausted
            reason = torch.where(exhausted, _SCALE, reason)
        rank = torch.where(bad_loss, bad[0], bad[1]).long() - 1
        now = torch.stack([torch.full_like(rank, step), reason, rank])
        self.skipped += bad_step & ~fatal & ~stopped
        self._stopped = torch.where(fatal & ~stopped, now, self._stopped)
        return (bad_step | stopped).float()

    def _rescale(self, skip: Tensor) -> None:
        """Halve the loss scale after a bad step, double it after enough good ones; a stopped run keeps its own."""
        running, overflow = self._stopped[0] < 0, skip > 0
        growth = torch.where(overflow, 0, self._growth + 1)
        grow = growth >= _GROWTH_INTERVAL
        scale = torch.where(overflow, self._scale * 0.5, torch.where(grow, self._scale * 2.0, self._scale))
        # Skipped steps whose loss was bad halve it too, as their gradients are bad; the floor bounds a series of them.
        # In place: a recorded step has read the scale from this memory.
        self._scale.copy_(torch.where(running, scale.clamp(min=1.0), self._scale))
        self._growth = torch.where(running, torch.where(grow, 0, growth), self._growth)

    def check(self, step: int) -> None:
        """Raise if one of the first `step` updates stopped the run. Waits for the device."""
        bad_step, reason, rank = self._stopped.tolist()
        if reason == _FINE:
            return
        what, cause, remedy = {
            _LOSS: (
                "non-finite loss",
                "the forward pass gave NaN or infinity",
                "lower optim.lr, warm up longer, try train.precision=bf16 or fp32, or set optim.on_nonfinite=skip",
            ),
            _GRADIENT: (
                "non-finite gradient",
                "the loss was finite, the gradient norm was not",
                "lower optim.lr, set optim.clip_norm, try train.precision=fp32, or set optim.on_nonfinite=skip",
            ),
            _SCALE: (
                "non-finite gradient",
                "fp16 gradients overflow even at a loss scale of 1",
                "set train.precision=bf16 or fp32",
            ),
        }[reason]
        if self._all_reduce_max is not None and reason != _LOSS:
            cause += " (gradients are averaged over the ranks, so the source may be another one)"
        raise SitfastError(
            f"{what} at step {bad_step + 1} on rank {rank}: {cause}; weights are those before that step, updates "
            f"{bad_step + 1} to {step} were not applied; {remedy}"
        )

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights and the averages, flat; views, not copies."""
        moments = {
            f"{key}.{name}": self.optimizer.state[p][key]
            for key in ("exp_avg", "exp_avg_sq")
            for name, p in self._params.items()
        }
        return moments | {
            "step": self._steps,
            "loss_scale": self._scale,
            "growth_tracker": self._growth,
            "skipped": self.skipped,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        _restore(self.state(), state, "optimizer state")


@torch.no_grad()
def _restore(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copy `state` into `targets`; the names and the shapes must agree, and nothing is copied unless all do."""
    for names, fault in ((targets.keys() - state.keys(), "lacks"), (state.keys() - targets.keys(), "has an unknown")):
        if names:
            name = min(names)
            raise SitfastError(
                f"{what} {fault} {name!r} ({len(names)} such): it is another model's; use the config it was saved with"
            )
    for name, target in targets.items():
        if state[name].shape != target.shape:
            raise SitfastError(
                f"{what}: {name!r} has shape {tuple(state[name].shape)}, this model needs {tuple(target.shape)}; "
                "use the config it was saved with"
            )
    for name, target in targets.items():
        assign(target, state[name])
