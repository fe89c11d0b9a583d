"""Who failed first: what ranks tell each other beside the training, so that each one's last line names the cause.

    rank r, every second:   beat/r   = how often so far, step, what it is doing        written by a thread
    rank r, once:           who/r    = host and process
    the first to fail:      failed   = rank and its error                              nobody overwrites it

All of it lies in the store through which the ranks met; torchrun keeps that in its agent, which outlives the ranks. When a
collective breaks on a rank because another one is gone, `judge` looks there for the reason: a failure that was written
down, or else the ranks whose process is gone or whose beat has stopped (a kill, a lost machine), or else, where all are
alive and a time-out passed, those that are behind. A rank whose main thread hangs inside a collective cannot look; its
watching thread does, says the same line, and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from sitfast.errors import SitfastError

BEAT_S = 1.0
_LOOK_S = 2.5  # to tell a beat that has stopped; a failed rank has this long to write down why
_HANGING_S = 10.0  # without progress before the thread looks after the others, and after it has seen a failure
_SILENT_S = 15.0  # without a beat before the thread counts a rank elsewhere as lost; a busy process may miss some
_SET_UP, _LEFT = "setting up", "left"
_LOOK_EVERY = 4  # beats between two looks at the others while it hangs
_BROKEN = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting", "broken pipe")


class Beat(NamedTuple):
    count: int
    step: int
    doing: str


class Watch:
    """This rank's eye on the others; `store` is a torch.distributed.Store that all of them see."""

    def __init__(self, store: Any, *, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store, self._beats = store.clone(), store.clone()  # a client serves one thread at a time
        self._step, self._doing, self._moved = 0, _SET_UP, time.monotonic()
        self._changed: dict[int, tuple[int, float]] = {}  # by rank: its last count, and since when
        self._noticed: float | None = None  # when the thread learnt of a failure
        self._store.set(f"who/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self._beats.set(f"beat/{rank}", f"0 0 {self._doing}")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """Note that the main thread has come here. Costs nothing: the thread passes it on."""
        self._step, self._doing, self._moved = step, doing, time.monotonic()

    def leave(self) -> None:
        """Note that this rank is done, all being well: from now on it is not missed, however long others still take."""
        self._doing = _LEFT
        with contextlib.suppress(RuntimeError):  # the store may have gone with its keeper, who was done before
            self._store.set(f"beat/{self.rank}", f"0 {self._step} {_LEFT}")

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def judge(self, error: Exception) -> Exception:
        """The error to end this rank with: `error` itself, written down for the others, or what broke its collective."""
        if _is_broken_collective(error):
            return SitfastError(self._reason(self._store, _LOOK_S))
        text = str(error) if isinstance(error, SitfastError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store may have gone with its keeper: nobody is left to tell
            self._write_down(self._store, self.rank, text)
        return error

    def _write_down(self, store: Any, rank: int, text: str) -> str:
        """Note who failed first, unless that is known already; the line to end with."""
        known = store.compare_set("failed", "", f"{rank} {' '.join(text.split())}")
        return self._because(known.decode())

    def _because(self, failure: str) -> str:
        rank, _, text = failure.partition(" ")
        return f"{self._stopped()} because rank {rank} failed first: {text}"

    def _stopped(self) -> str:
        return (
            f"stopped in step {self._step + 1} ({self._doing})"
            if self._doing != _SET_UP
            else "stopped while setting up"
        )

    def _reason(self, store: Any, patience_s: float) -> str:
        try:
            before, deadline = self._read(store), time.monotonic() + patience_s
            while time.monotonic() < deadline:
                if store.check(["failed"]):
                    return self._because(store.get("failed").decode())
                if any(self._is_alive(store, rank) is False for rank in before if rank != self.rank):
                    deadline = min(deadline, time.monotonic() + 0.3)  # it may have written down why before it went
                time.sleep(0.1)
            now = self._read(store)
            alive = {rank: self._is_alive(store, rank) for rank in now if rank != self.rank}
            gone = [rank for rank in alive if alive[rank] is False]
            silent = [r for r in alive if alive[r] is None and r in before and now[r].count == before[r].count]
            if lost := gone or silent:
                return self._lost(store, lost[0], now[lost[0]])
        except RuntimeError:
            return f"{self._stopped()} because rank 0 or torchrun itself was ended first"
        last = min(now, key=lambda rank: (now[rank].step, rank == self.rank))
        where = f"it is in step {now[last].step + 1} ({now[last].doing})"
        return self._write_down(store, last, f"no answer within parallel.timeout_s={self.timeout_s:g}; {where}")

    def _lost(self, store: Any, rank: int, beat: Beat) -> str:
        text = f"killed, or its machine was lost; last heard of in step {beat.step + 1} ({beat.doing})"
        return self._write_down(store, rank, text)

    def _read(self, store: Any) -> dict[int, Beat]:
        """The last beat of each rank that has had one and has not left."""
        keys = {rank: f"beat/{rank}" for rank in range(self.size)}
        if not store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        parts = (value.decode().split(" ", 2) for value in store.multi_get(list(keys.values())))
        beats = {
            rank: Beat(int(count), int(step), doing) for rank, (count, step, doing) in zip(keys, parts, strict=True)
        }
        return {rank: beat for rank, beat in beats.items() if beat.doing != _LEFT}

    def _is_alive(self, store: Any, rank: int) -> bool | None:
        """Whether the process of a rank runs, however busy it is; None where it is on another host."""
        host, _, pid = store.get(f"who/{rank}").decode().partition(" ")
        if host != socket.gethostname() or not Path("/proc/self").exists():
            return None
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def _run(self) -> None:
        count = 0
        while not self._end.wait(BEAT_S):
            count += 1
            try:
                self._beats.set(f"beat/{self.rank}", f"{count} {self._step} {self._doing}")
                reason = self._hanging(count)
            except RuntimeError:
                return  # the store has gone; a collective will break and the main thread say so
            if reason is not None and not self._end.is_set():
                sys.stderr.write(f"rank {self.rank}: error: {reason}\n")
                sys.stderr.flush()
                os._exit(1)

    def _hanging(self, count: int) -> str | None:
        """Why the main thread will not come back from where it hangs, or None."""
        now = time.monotonic()
        if now - self._moved < _HANGING_S:
            self._changed, self._noticed = {}, None
            return None
        if self._beats.check(["failed"]):
            self._noticed = self._noticed or now
            return self._reason(self._beats, 0.5) if now - self._noticed > _HANGING_S else None
        if count % _LOOK_EVERY:
            return None
        beats = self._read(self._beats)
        for rank, beat in beats.items():
            if self._changed.get(rank, (-1, 0.0))[0] != beat.count:
                self._changed[rank] = (beat.count, now)
            alive = rank == self.rank or self._is_alive(self._beats, rank)
            if alive is False or (alive is None and now - self._changed[rank][1] > _SILENT_S):
                return self._lost(self._beats, rank, beat)
        late = now - self._moved > self.timeout_s + _HANGING_S
        return self._reason(self._beats, _LOOK_S) if late else None


def _is_broken_collective(error: BaseException) -> bool:
    if isinstance(error, SitfastError) or not isinstance(error, RuntimeError | ConnectionError):
        return False
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _BROKEN)
