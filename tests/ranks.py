"""Four processes that stay, in which a test runs one function as the ranks of a job: `ranks(4, function, *arguments)`.

Starting Python and torch costs seconds, joining a process group milliseconds; so all tests share these processes. What a
rank prints goes to a log of its own, which a failure shows.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

MOST = 4


class Failed(NamedTuple):
    kind: str
    text: str
    trace: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []
        self._logs = Path(tempfile.mkdtemp(prefix="ranks-"))

    def run(self, size: int, function: Any, *arguments: Any, timeout: float = 120) -> list[Any]:
        """What the function returned on each rank, `Failed` where it raised."""
        if not self._workers:
            context = multiprocessing.get_context("spawn")
            for i in range(MOST):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, self._logs / f"rank{i}.log"), daemon=True)
                process.start()
                self._workers.append((process, here))
        port = free_port()
        for rank, (_, pipe) in enumerate(self._workers[:size]):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            pipe.send((function, arguments, {k: str(v) for k, v in env.items()} | {"MASTER_ADDR": "127.0.0.1"}))
        if not all(pipe.poll(timeout) for _, pipe in self._workers[:size]):
            self.close()
            raise TimeoutError(f"a rank did not answer within {timeout} s\n{self.logs()}")
        try:
            return [pipe.recv() for _, pipe in self._workers[:size]]
        except EOFError:
            self.close()
            raise RuntimeError(f"a rank died\n{self.logs()}") from None

    def __call__(self, size: int, function: Any, *arguments: Any, timeout: float = 120) -> list[Any]:
        """The same, where all ranks must succeed."""
        answers = self.run(size, function, *arguments, timeout=timeout)
        for rank, answer in enumerate(answers):
            assert not isinstance(answer, Failed), f"rank {rank}: {answer.trace}\n{self.logs()}"
        return answers

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self._logs.glob("*.log")))

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
        self._workers = []


def _serve(pipe: Any, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, env = pipe.recv()
        except EOFError:
            return
        os.environ.update(env)
        try:
            answer = function(*arguments)
        except BaseException as error:
            answer = Failed(type(error).__name__, str(error), traceback.format_exc())
            traceback.print_exc()
        gc.collect()  # what an error kept alive held connections, whose end the other ranks wait for
        sys.stdout.flush()
        pipe.send(answer)
