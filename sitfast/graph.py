"""Forward and backward of a micro-batch as a CUDA graph: recorded once, then launched by one call of the host.

    step 1 … WARM_UP     as it is: the compiler compiles, kernels are chosen and tuned
    the step after       recorded, then replayed like every later one

A step of SiT-XL/2 is some 800 kernels, and what Python needs to launch them is what the GPU waits for where they are short.
A replay runs the same kernels on the same memory: its inputs are copied into those of the recording, and the gradients
lie where they lay. The first micro-batch of a step writes the gradients, the others add to them, so each kind has a
graph of its own; all share one pool of memory.

What ranks reduce meanwhile is part of the recording (NCCL's kernels are kernels); that takes longer to warm up. Sharded
weights are not recorded: FSDP2 copies through tables of addresses in host memory, which a replay would read too late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sitfast.errors import SitfastError

WARM_UP = 3  # steps
WARM_UP_OF_RANKS = 12  # DistributedDataParallel waits for the GPU in its first ten


class Recorded:
    """`run(*inputs) -> loss` for CUDA tensors of the same shapes every time.

    What `run` leaves behind (gradients) must be None before the first call of a step while nothing is recorded; after
    that it stays, and is written anew: see `active`. The loss returned is overwritten by the next call.
    """

    def __init__(self, run: Callable[..., Tensor], device: torch.device, *, warm_up: int = WARM_UP) -> None:
        self._run, self._warm_up = run, warm_up
        self._stream = torch.cuda.Stream(device)  # warming up where it is recorded, autograd stays on one stream
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._steps = 0

    @property
    def active(self) -> bool:
        """Whether the gradients belong to a recording: they must not be freed or replaced."""
        return bool(self._graphs)

    def __call__(self, first: bool, *inputs: Tensor) -> Tensor:
        """`first` is true for the first micro-batch of a step."""
        self._steps += first and not self._graphs
        if self._steps <= self._warm_up:
            with self.aside():
                return self._run(*inputs)
        if first not in self._graphs:
            self._record(first, inputs)
        graph, memory, loss = self._graphs[first]
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

    def _record(self, first: bool, inputs: tuple[Tensor, ...]) -> None:
        memory = tuple(value.clone() for value in inputs)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        try:
            # Other threads (decoders, pinned memory) go on meanwhile, which only the mode "thread_local" allows.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                loss = self._run(*memory)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise SitfastError(
                f"the step cannot be recorded as a CUDA graph: {reason}; use train.cuda_graph=false"
            ) from error
        self._graphs[first] = graph, memory, loss
