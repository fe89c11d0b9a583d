"""Forward and backward of a micro-batch as a CUDA graph: recorded once, then launched by one call of the host.

    step 1 … WARM_UP     as it is: the compiler compiles, kernels are chosen and tuned
    the step after       recorded, then replayed like every later one

A step of SiT-XL/2 is some 800 kernels, and what Python needs to launch them is what the GPU waits for where they are short.
A replay runs the same kernels on the same memory: its inputs are copied into those of the recording, and the gradients
lie where they lay. The first micro-batch of a step writes the gradients, the others add to them, so each kind has a
graph of its own; all share one pool of memory.

Where batches have several shapes, each has its own warm-up and its own graphs. All write the gradients of the first that was
recorded: the others make theirs in memory that the pool reuses and copy them there, a pass over the gradients more, in place
of one set of gradients for each shape. What a graph leaves elsewhere (its loss) is read before one of another shape runs.

What ranks reduce meanwhile is part of the recording (NCCL's kernels are kernels); that takes longer to warm up. Sharded
weights are not recorded: FSDP2 copies through tables of addresses in host memory, which a replay would read too late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sitfast.errors import SitfastError

WARM_UP = 3  # steps
WARM_UP_OF_RANKS = 12  # DistributedDataParallel waits for the GPU in its first ten

# Whether it is the first micro-batch of a step; the shape of x, where there are several.
Key = tuple[bool, torch.Size | None]


class Recorded:
    """`run(*inputs) -> loss` for CUDA tensors of the same shapes every time, or of `shapes` of the first of them.

    What `run` leaves behind (gradients) must be None before the first call of a step while nothing is recorded; after
    that it stays, and is written anew: see `active`. The loss returned is overwritten by the next call. Of several shapes,
    name the `parameters` whose gradients `run` leaves.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        device: torch.device,
        *,
        warm_up: int = WARM_UP,
        shapes: Iterable[Sequence[int]] = (),
        parameters: Iterable[nn.Parameter] = (),
    ) -> None:
        self._run, self._warm_up = run, warm_up
        self._shapes = {torch.Size(shape) for shape in shapes}
        self._parameters = tuple(parameters)
        self._gradients: list[Tensor | None] = []  # where every recording leaves them, of several shapes
        self._stream = torch.cuda.Stream(device)  # warming up where it is recorded, autograd stays on one stream
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._steps: Counter[torch.Size | None] = Counter()

    @property
    def active(self) -> bool:
        """Whether the gradients belong to a recording: they must not be freed or replaced."""
        return bool(self._graphs)

    def __call__(self, first: bool, *inputs: Tensor) -> Tensor:
        """`first` is true for the first micro-batch of a step."""
        shape = inputs[0].shape if self._shapes else None
        if shape is not None and shape not in self._shapes:
            known = ", ".join(str(tuple(one)) for one in sorted(self._shapes))
            raise SitfastError(
                f"a batch has the shape {tuple(shape)}, the recorded steps take {known}; use train.cuda_graph=false"
            )
        self._steps[shape] += first and (True, shape) not in self._graphs
        if self._steps[shape] <= self._warm_up:
            if first and self._gradients:
                # This one makes its own, and leaves those of the recordings.
                self._place([None] * len(self._parameters))
            with self.aside():
                return self._run(*inputs)
        if (first, shape) not in self._graphs:
            self._record((first, shape), inputs)
        elif first and self._gradients:
            self._place(self._gradients)
        graph, memory, loss = self._graphs[first, shape]
        for old, new in zip(memory, inputs, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise SitfastError(
                    f"a batch has a tensor of {new.dtype} {tuple(new.shape)}, the recorded step takes {old.dtype}"
                    f" {tuple(old.shape)}; use train.cuda_graph=false"
                )
            old.copy_(new)
        graph.replay()
        return loss

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work goes to the stream of the recording. What autograd keeps over the steps must be made there."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _place(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _gather(self) -> None:
        """The gradients that a first micro-batch has just made, to where those of every shape lie; part of the recording."""
        made = [parameter.grad for parameter in self._parameters]
        if not self._gradients:
            self._gradients = made
            return
        pairs = [(a, b) for a, b in zip(self._gradients, made, strict=True) if a is not None and b is not None]
        old, new = [a for a, _ in pairs], [b for _, b in pairs]
        torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]
        self._place(self._gradients)

    def _record(self, key: Key, inputs: tuple[Tensor, ...]) -> None:
        first, shape = key
        if first and self._gradients:
            self._place([None] * len(self._parameters))
        memory = tuple(value.clone() for value in inputs)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        try:
            # Other threads (decoders, pinned memory) go on meanwhile, which only the mode "thread_local" allows.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                loss = self._run(*memory)
                if first and shape is not None:
                    self._gather()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise SitfastError(
                f"the step cannot be recorded as a CUDA graph: {reason}; use train.cuda_graph=false"
            ) from error
        self._graphs[key] = graph, memory, loss
