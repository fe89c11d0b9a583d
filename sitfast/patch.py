"""The kernels inside other people's diffusion transformers.

    report = sitfast.patch(model);  print(report);  sitfast.unpatch(model)

What is recognised is a shape, whatever its class is called:

    block        norm1, attn, norm2, mlp, adaLN_modulation      forward(x [B, N, D], c [B, D])   SiT, DiT and their kin
    final layer  norm_final, linear, adaLN_modulation           forward(x, c)
    block        norm1 (emb, linear, norm), attn1, norm3, ff    diffusers' adaLN-zero blocks

A shape is only a guess at what a forward computes, so ours must agree with it before it is bound (see `patch_check`).
Only `forward` of the instance changes: parameters, submodules and state-dict keys stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitfast.errors import SitfastError
from sitfast.kernels import attention, gated_residual_layernorm_modulate, layernorm_modulate, mlp
from sitfast.layers import Block, FinalLayer
from sitfast.patch_check import Problem, Unfit, largest, one_line, verify


@dataclass(frozen=True)
class Row:
    path: str
    kind: str  # class name
    status: Literal["patched", "skipped"]
    reason: str  # why it was skipped; of a patched module, what was measured


@dataclass(frozen=True)
class Report:
    """What `patch` did with each module that looks like a part of a diffusion transformer."""

    rows: tuple[Row, ...]

    @property
    def patched(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "patched")

    @property
    def skipped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "skipped")

    def __str__(self) -> str:
        head = f"{len(self.patched)} patched, {len(self.skipped)} skipped"
        if not self.rows:
            return f"{head}: no block or final layer of a known shape"
        cells = [("module", "class", "", ""), *((r.path, r.kind, r.status, r.reason) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
        return "\n".join((*(line.rstrip() for line in lines), head))


# -- our forwards ------------------------------------------------------------------------------------------------------
# Each is bound to a module, so self is the user's. A call that ours does not cover goes to the class's own forward:
# other arguments or ranks, and a module which was hooked or exchanged after `patch` among those that ours steps over.


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _plain(fc1: nn.Module, fc2: nn.Module, *others: Any) -> bool:
    if type(fc1) is not nn.Linear or type(fc2) is not nn.Linear or _hooked(fc1) or _hooked(fc2):
        return False
    return not any(isinstance(module, nn.Module) and _hooked(module) for module in others)


def _covered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """(x [B, N, D], c [B, D]), and nothing else that is not None."""
    if len(args) < 2 or any(value is not None for value in (*args[2:], *kwargs.values())):
        return False
    x, c = args[:2]
    return x.ndim == 3 and c.ndim == 2 and len(x) == len(c)


def _own_attention(attn: Any, h: Tensor) -> Tensor:
    return attn(h).contiguous()


def _packed_attention(attn: Any, h: Tensor) -> Tensor:
    linear, bias = attn.qkv, None
    if type(linear) is nn.Linear and linear.bias is not None and not _hooked(linear):
        bias = linear.bias  # gets its gradient from the attention
    qkv = linear(h) if bias is None else F.linear(h, linear.weight, bias.detach())
    return attn.proj(attention(qkv.unflatten(-1, (3, attn.num_heads, -1)), bias=bias).flatten(2))


def _block(self: Any, attend: Callable[[Any, Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ff = self.mlp
    bypassed = (self.norm1, self.norm2, ff, ff.act) + ((self.attn,) if attend is _packed_attention else ())
    if not (_covered(args, kwargs) and _plain(ff.fc1, ff.fc2, *bypassed)):
        return type(self).forward(self, *args, **kwargs)
    x, c = args[0].contiguous(), args[1]  # patch embeddings hand over a transposed x
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
    y = attend(self.attn, layernorm_modulate(x, shift_msa, scale_msa, eps=self.norm1.eps))
    x, h = gated_residual_layernorm_modulate(x, y, gate_msa, shift_mlp, scale_mlp, eps=self.norm2.eps)
    return x + gate_mlp.unsqueeze(1) * mlp(h, ff.fc1.weight, ff.fc1.bias, ff.fc2.weight, ff.fc2.bias)


def _block_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _block(self, _packed_attention, args, kwargs)


def _block_forward_own_attention(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _block(self, _own_attention, args, kwargs)


def _final_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not _covered(args, kwargs) or _hooked(self.norm_final):
        return type(self).forward(self, *args, **kwargs)
    shift, scale = self.adaLN_modulation(args[1]).chunk(2, dim=1)
    return self.linear(layernorm_modulate(args[0].contiguous(), shift, scale, eps=self.norm_final.eps))


def _diffusers_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    timestep: Any = None,
    cross_attention_kwargs: Any = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> Tensor:
    norm1, (gelu, _, fc2, *_) = self.norm1, self.ff.net
    options = (attention_mask, encoder_hidden_states, encoder_attention_mask, cross_attention_kwargs, added_cond_kwargs)
    if (
        any(option is not None for option in (*options, self._chunk_size))
        or hidden_states.ndim != 3
        or not _plain(gelu.proj, fc2, norm1, norm1.norm, self.norm3, self.ff, gelu)
    ):
        return type(self).forward(
            self, hidden_states, *options[:3], timestep, cross_attention_kwargs, class_labels, added_cond_kwargs
        )
    x = hidden_states.contiguous()
    condition = norm1.silu(norm1.emb(timestep, class_labels, hidden_dtype=x.dtype))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = norm1.linear(condition).chunk(6, dim=1)
    y = _own_attention(self.attn1, layernorm_modulate(x, shift_msa, scale_msa, eps=norm1.norm.eps))
    x, h = gated_residual_layernorm_modulate(x, y, gate_msa, shift_mlp, scale_mlp, eps=self.norm3.eps)
    return x + gate_mlp.unsqueeze(1) * mlp(h, gelu.proj.weight, gelu.proj.bias, fc2.weight, fc2.bias)


_FORWARDS = (_block_forward, _block_forward_own_attention, _final_forward, _diffusers_forward)
for _forward in _FORWARDS:
    _forward.__name__ = "forward"  # pickle stores a bound method by its name: a loaded copy has its class's forward


# -- what is recognised ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Forwards to try, the best first, each with what to say about it, and the input to try them on."""

    forwards: tuple[tuple[Callable[..., Tensor], str], ...]
    problem: Problem


def _has(module: nn.Module, *names: str) -> bool:
    return all(getattr(module, name, None) is not None for name in names)


def _candidate(module: nn.Module) -> bool:
    return isinstance(module, Block | FinalLayer) or _has(module, "adaLN_modulation") or _has(module, "attn1", "ff")


def _norm_width(name: str, norm: Any) -> int:
    if not isinstance(norm, nn.LayerNorm):
        raise Unfit(f"{name} is {type(norm).__name__}, expected LayerNorm")
    if norm.weight is not None or norm.bias is not None:
        raise Unfit(f"{name} has a weight of its own, expected elementwise_affine=False")
    if len(norm.normalized_shape) != 1:
        raise Unfit(f"{name} normalizes {len(norm.normalized_shape)} dimensions, expected the last one")
    return norm.normalized_shape[0]


def _check_modulation(name: str, linear: Any, width: int, vectors: int) -> None:
    if not isinstance(linear, nn.Linear) or linear.out_features != vectors * width:
        raise Unfit(f"{name} is {linear}, expected Linear with {vectors} · {width} outputs")


def _check_mlp(name: str, fc1: Any, act: Any, fc2: Any, module: nn.Module, width: int) -> None:
    for which, linear in (("first", fc1), ("second", fc2)):
        if type(linear) is not nn.Linear:
            raise Unfit(f"the {which} linear of {name} is {type(linear).__name__}, expected Linear")
    if (fc1.in_features, fc2.out_features) != (width, width) or fc1.out_features != fc2.in_features:
        raise Unfit(f"{name} is {fc1} and {fc2}, expected {width} to H and back")
    if fc1.bias is None:
        raise Unfit(f"the first linear of {name} has no bias")
    for path, part in module.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            raise Unfit(f"{name}.{path} drops with p = {part.p}")
    u = torch.linspace(-8, 8, 513, dtype=torch.float64, device="cpu")
    try:
        error = largest(act(u) - F.gelu(u, approximate="tanh"))
    except Exception as problem:  # the user's code, which may raise anything
        raise Unfit(f"the activation of {name} failed: {one_line(problem)}") from problem
    if not error <= 1e-6:  # GELU modules that compute in fp32 whatever comes in are within 5e-7
        raise Unfit(f"the activation of {name} differs from tanh GELU by {error:.1e}")


def _other_attention(attn: Any, width: int) -> str | None:
    """Why the packed attention is not the one of this module, or None; what is not asked here, the check will tell."""
    if not (_has(attn, "qkv", "proj", "num_heads") and isinstance(attn.num_heads, int)):
        return "no qkv, proj and num_heads"
    if not isinstance(attn.qkv, nn.Linear) or attn.qkv.out_features != 3 * width or width % attn.num_heads:
        return f"qkv is {attn.qkv}"
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(attn, name, None), nn.Identity | None):
            return f"{name} is {type(getattr(attn, name)).__name__}"
    for path, part in attn.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return f"{path} drops with p = {part.p}"
    return None


def _check_adaln(adaln: Any, width: int, vectors: int) -> Problem:
    if not (isinstance(adaln, nn.Sequential) and len(adaln) == 2 and isinstance(adaln[0], nn.SiLU)):
        raise Unfit(f"adaLN_modulation is {type(adaln).__name__}, expected Sequential of SiLU and Linear")
    linear: Any = adaln[1]
    _check_modulation("adaLN_modulation[1]", linear, width, vectors)
    return Problem(width, condition_width=linear.in_features)


def _plan_block(module: Any) -> _Plan:
    width, ff = _norm_width("norm1", module.norm1), module.mlp
    _norm_width("norm2", module.norm2)
    problem = _check_adaln(module.adaLN_modulation, width, 6)
    if not _has(ff, "fc1", "act", "fc2"):
        raise Unfit(f"mlp is {type(ff).__name__} without fc1, act and fc2")
    _check_mlp("mlp", ff.fc1, ff.act, ff.fc2, ff, width)
    other = _other_attention(module.attn, width)
    own = (_block_forward_own_attention, f"keeps its attention: {other or 'it computes something else'}")
    return _Plan((own,) if other else ((_block_forward, ""), own), problem)


def _plan_final(module: Any) -> _Plan:
    width = _norm_width("norm_final", module.norm_final)
    return _Plan(((_final_forward, ""),), _check_adaln(module.adaLN_modulation, width, 2))


def _plan_diffusers(module: Any) -> _Plan:
    norm1, net = module.norm1, getattr(module.ff, "net", ())
    if not _has(norm1, "emb", "silu", "linear", "norm"):
        raise Unfit(f"norm1 is {type(norm1).__name__}, expected adaLN-zero with an embedding of its own")
    if getattr(module, "attn2", None) is not None:
        raise Unfit("attn2, a second attention")
    width = _norm_width("norm1.norm", norm1.norm)
    _norm_width("norm3", module.norm3)
    _check_modulation("norm1.linear", norm1.linear, width, 6)
    if len(net) < 3 or not _has(net[0], "proj", "gelu"):
        raise Unfit("ff.net is not GELU, dropout and Linear")
    _check_mlp("ff", net[0].proj, net[0].gelu, net[2], module.ff, width)
    table: Any = getattr(getattr(norm1.emb, "class_embedder", None), "embedding_table", None)
    if not isinstance(table, nn.Embedding):
        raise Unfit(f"norm1.emb is {type(norm1.emb).__name__}, expected an embedding of timesteps and labels")
    # One GEMM for q, k and v would need their weights side by side, which is a copy each step.
    note = "keeps its attention: q, k and v are separate"
    return _Plan(((_diffusers_forward, note),), Problem(width, num_labels=table.num_embeddings))


def _plan(module: nn.Module) -> _Plan:
    if _has(module, "norm1", "attn", "norm2", "mlp", "adaLN_modulation"):
        return _plan_block(module)
    if _has(module, "norm_final", "linear", "adaLN_modulation"):
        return _plan_final(module)
    if _has(module, "norm1", "attn1", "norm3", "ff"):
        return _plan_diffusers(module)
    raise Unfit("not the parts of a known block or final layer")


# -- the public functions ----------------------------------------------------------------------------------------------


def _is_patched(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) in _FORWARDS


def _remarks(own: Callable[..., Any]) -> list[str]:
    """What a caller has to know of the class's own forward."""
    remarks = []
    more = [*inspect.signature(own).parameters][3:]
    if more:
        remarks.append(f"not when called with {', '.join(more)}")
    if hasattr(own, "_torchdynamo_orig_callable"):
        remarks.append("its own forward is compiled, ours is not yet")
    return remarks


def _bind(module: nn.Module) -> str:
    """Bind the first of our forwards that passes; returns what to say about it."""
    if isinstance(module, Block | FinalLayer):
        raise Unfit("sitfast's own, on the kernels already")
    if _is_patched(module):
        raise Unfit("patched already")
    bound = module.__dict__.get("forward")
    if bound is not None and getattr(bound, "__func__", None) is not type(module).forward:
        raise Unfit("its forward was replaced on the instance")
    for path, part in module.named_modules():
        if path and _hooked(part):
            raise Unfit(f"{path} has hooks")
    for name, value in module.named_parameters():
        if type(value.data) is not Tensor:
            raise Unfit(f"{name} is a {type(value.data).__name__}, expected a plain tensor")
    plan = _plan(module)
    failure = Unfit()
    for forward, note in plan.forwards:
        try:
            measured = verify(module, forward, plan.problem)
        except Unfit as reason:
            failure = reason
        else:
            module.forward = MethodType(forward, module)
            return "; ".join(filter(None, (note, *_remarks(type(module).forward), measured)))
    raise failure


def _sharded(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # here, for it takes 0.4 s

    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise SitfastError(f"patch takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise SitfastError(f"{where} is compiled already; call sitfast.patch before torch.compile")
        if _sharded(module):
            raise SitfastError(f"{where} is sharded already; call sitfast.patch before FSDP")


def patch(model: nn.Module) -> Report:
    """Run the kernels in every block and final layer of `model` that they compute the same for; the report says which.

    Before torch.compile, DDP and FSDP, after hooks and changes of structure. Parameters and state-dict keys stay.
    """
    _check_model(model)
    rows: list[Row] = []
    for path, module in model.named_modules():
        if _candidate(module):
            try:
                row = Row(path, type(module).__name__, "patched", _bind(module))
            except Unfit as reason:
                row = Row(path, type(module).__name__, "skipped", str(reason))
            rows.append(row)
    return Report(tuple(rows))


def unpatch(model: nn.Module) -> int:
    """Undo `patch`; returns the number of modules that have their own forward again."""
    modules = [module for module in model.modules() if _is_patched(module)]
    for module in modules:
        del module.forward
    return len(modules)
