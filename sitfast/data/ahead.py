"""The next batch on its way while the model works on this one.

    own stream      copy n+1 → encode n+1 ─ event ┐
    main stream     step n ────────────────────── wait → step n+1

On a GPU the copy to the device and the VAE run on a stream of their own, one batch ahead; elsewhere in line, when asked for.
Which batch comes, and what is drawn for it, does not depend on that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sitfast.data import Batch
from sitfast.profiling import annotate


class Ahead:
    """Iterates over the batches of `fetch`, with `vae.encode` of x in place of x."""

    def __init__(
        self, fetch: Callable[[], Batch], vae: Any, device: torch.device, *, early: bool | None = None
    ) -> None:
        self.fetch = fetch
        self.vae = vae
        self.early = device.type == "cuda" if early is None else early
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: tuple[Batch, Any] | None = None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights of the VAE are there

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Batch:
        batch, done = self._waiting or self._begin()
        self._waiting = self._begin() if self.early else None
        if self.stream:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_event(done)
            for tensor in (batch.x, batch.y, batch.index):
                tensor.record_stream(current)  # its memory is not given away before this stream is done with it
        return batch

    def _begin(self) -> tuple[Batch, Any]:
        with torch.cuda.stream(self.stream):
            with annotate("data"):
                batch = self.fetch()
            with annotate("encode"):
                batch = dataclasses.replace(batch, x=self.vae.encode(batch.x, batch.index))
        return batch, self.stream.record_event() if self.stream else None
