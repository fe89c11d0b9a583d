"""attention on packed qkv: two products of N² d forward, five backward; head sizes of the SiT family.

Rivals: cuDNN and FlashAttention (the newest package installed, else the FlashAttention-2 inside PyTorch), each with the
packing of its gradients, without which they could not stand where ours does. Neither has to repeat its bits.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import GPU, Case, Direction, Rival, Work, batch, draw, shapes
from sitfast.kernels import attention
from sitfast.kernels.attention_choice import missing

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def rivals(tokens: int, head: int) -> dict[str, Rival]:
    if not GPU:
        return {}
    dtype = draw(1).dtype
    flash = next(
        (name for name in ("flash4", "flash3", "flash2", "flash") if not missing(name, tokens, head, dtype)), None
    )
    names = {"cuDNN": "cudnn", "FlashAttention" if flash == "flash" else f"FlashAttention-{(flash or '')[-1:]}": flash}
    return {title: Rival(partial(attention, backend=name)) for title, name in names.items() if name}


def case(width: int, tokens: int) -> Case:
    samples, length = batch(tokens)
    head = width // HEADS[width]
    unit = samples * length * width * draw(1).element_size()
    product = 2 * samples * length * length * width
    return Case(
        kernel="attention",
        width=width,
        tokens=tokens,
        function=attention,
        draw=lambda: (draw(samples, length, 3, HEADS[width], head),),
        forward=Work(bytes=4 * unit, flops=2 * product),
        backward=Work(bytes=8 * unit, flops=5 * product),
        rivals=rivals(length, head),
    )


@shapes()
def test_attention(bench, width: int, tokens: int, direction: Direction) -> None:
    bench(direction, width=width, tokens=tokens)
