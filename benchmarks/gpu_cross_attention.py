"""cross_attention on this GPU: what is chosen, then launches of our kernels around the default, checked, then timed.

    python -m benchmarks.gpu_cross_attention

The first line of a shape is that of the start-up table: ms of our kernels and of scaled_dot_product_attention under the
mask, forward + backward, on the problem of `attention_choice`. A launch whose results are wrong, or that raises, says so
and has no time. Launches share one set of inputs, so L2 is as warm as the last call left it.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch

from sitfast.kernels import _cross_attention_triton as kernels
from sitfast.kernels.attention_choice import time_ms

module = import_module("sitfast.kernels.cross_attention")  # the package has a function of this name

SHAPES = [
    (128, 256, 77, 16, 72),
    (128, 256, 20, 16, 72),
    (128, 256, 77, 12, 64),
    (32, 1024, 77, 16, 72),
]  # B, N, L, H, d
FORWARDS = [{}, {"blocks": 1}, {"blocks": 2}, {"stages": 3}, {"warps": 8}]
BACKWARDS = [{}, {"stages": 1}, {"stages": 2}, {"warps": 4}, {"warps": 8}]


def variants(batch: int, tokens: int, length: int, heads: int, width: int) -> None:
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    print(f"\nB, N, L, H, d = {batch}, {tokens}, {length}, {heads}, {width}", flush=True)
    print(module.describe(tokens, length, width, dtype, device), flush=True)
    q, dout = (torch.randn(batch, tokens, heads, width, device=device, dtype=dtype) for _ in range(2))
    kv = torch.randn(batch, length, 2, heads, width, device=device, dtype=dtype)
    mask = torch.arange(length, device=device) < torch.randint(1, length + 1, (batch, 1), device=device)
    defaults = kernels.forward_launch(tokens, length), kernels.backward_launch(length, width)
    for kind, changes in (("forward", FORWARDS), ("backward", BACKWARDS)):
        for change in changes:
            at = list(defaults)
            at[kind == "backward"] = replace(at[kind == "backward"], **change)
            try:
                out, lse = kernels.forward(q, kv, mask, at[0])
                grads = kernels.backward(dout, q, kv, mask, lse, at[1])
                if wrong := module.fault((out, *grads), q, kv, mask, dout):
                    result = wrong
                elif kind == "forward":
                    result = f"{time_ms(lambda at=at: kernels.forward(q, kv, mask, at[0])):.4f} ms"
                else:
                    result = f"{time_ms(lambda at=at, lse=lse: kernels.backward(dout, q, kv, mask, lse, at[1])):.4f} ms"
            except Exception as error:  # too much shared memory, say: the others go on
                result = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            name = "default" if not change else ", ".join(f"{key} {value}" for key, value in change.items())
            print(f"  {kind:8} {name:9} {result}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    for shape in SHAPES:
        try:
            variants(*shape)
        except Exception as error:  # the other shapes go on
            print(f"{shape}: {type(error).__name__}: {error}", flush=True)
