"""The next batch on the device, and encoded, while the model still works on this one.

    host            launch step n ─ fetch n+1 ─ launch encode n+1 and step n+1 ─ …        at most `_LEAD` batches before the GPU
    own stream                      copy n+1 → encode n+1 ─ event ┐
    main stream     ─ step n ──────────────────────────────────── wait → step n+1

Batch n + 1 is asked for once step n is launched: a slow loader delays no launch, and the GPU has work meanwhile. On a GPU the
copy, the VAE and a frozen text encoder run on a stream of their own; elsewhere all is in line. Which batch comes, and what is
drawn for it, does not depend on that.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from sitfast.data import Batch
from sitfast.profiling import annotate
from sitfast.text import TextEncoder

_LEAD = 2  # batches; more would hide nothing more, and hold memory


class Ahead:
    """Iterates over the batches of `fetch`, with `vae.encode` of x in place of x, and `text.encode` of captions' tokens."""

    def __init__(
        self, fetch: Callable[[], Batch], vae: Any, device: torch.device, *, text: TextEncoder | None = None
    ) -> None:
        self.fetch = fetch
        self.vae = vae
        self.text = text
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waits: collections.deque[tuple[torch.cuda.Event, torch.cuda.Event]] = collections.deque()
        self._waited_s = 0.0
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights of the VAE are there

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Batch:
        if self.stream is None:
            start = time.perf_counter()
            batch = self._fetch()
            self._waited_s += time.perf_counter() - start
            return self._encode(batch)
        current = torch.cuda.current_stream(self.device)
        ended = _record(current)  # what was launched since the last batch was handed out
        while len(self._waits) >= _LEAD:
            self._count()
        with torch.cuda.stream(self.stream):
            batch = self._fetch()
            self._waits.append((ended, _record(self.stream)))
            batch = self._encode(batch)
        current.wait_stream(self.stream)
        for tensor in (batch.x, batch.y, batch.index, *(batch.text or ())):
            tensor.record_stream(current)  # its memory is not given away before this stream is done with it
        return batch

    def take_waited(self) -> float:
        """Seconds since the last call in which there was nothing to do but wait for a batch.

        On a GPU, those between the end of its work and the arrival of the next batch, by its own clock; it is waited for.
        """
        while self._waits:
            self._count()
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def _count(self) -> None:
        """Wait for what came before the oldest batch that is not counted, and for that batch."""
        ended, arrived = self._waits.popleft()
        ended.synchronize()
        arrived.synchronize()
        self._waited_s += max(0.0, ended.elapsed_time(arrived)) / 1e3

    def _fetch(self) -> Batch:
        with annotate("data"):
            return self.fetch()

    def _encode(self, batch: Batch) -> Batch:
        with annotate("encode"):
            text = self.text.encode(batch.text) if self.text and batch.text else None
            return dataclasses.replace(batch, x=self.vae.encode(batch.x, batch.index), text=text)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(stream)
    return event
