"""Results in a file of JSON, whole after each of them: where a run ends early, what it has measured is there."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sitfast.images import replacing

GPU = torch.cuda.is_available()


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else "CPU"


def origin(command: str, *, dtype: str, commit: str = "") -> dict[str, Any]:
    """Where results come from, in the words of pytest-benchmark's reports; `commit` where there is no repository to ask."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    machine = {
        "device": device_name(),
        "cpu_figures": not GPU,
        "dtype": dtype,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "commit": commit,
        "command": command,
    }
    return {
        "machine_info": {"sitfast": machine, "python_version": platform.python_version()},
        "commit_info": {"id": _git("rev-parse", "HEAD") or "unknown", "dirty": bool(_git("status", "--porcelain"))},
        "datetime": datetime.now(timezone.utc).isoformat(),
    }


def _git(*arguments: str) -> str:
    try:
        asked = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return asked.stdout.strip()


class Record:
    """The file of one run; without a path nothing is written."""

    def __init__(self, path: Path | None, origin: dict[str, Any]) -> None:
        self._path, self.content = path, {**origin, "benchmarks": []}

    def add(self, entry: dict[str, Any]) -> None:
        self.content["benchmarks"].append(entry)
        if self._path is not None:
            with replacing(self._path) as temporary:
                temporary.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        """One line a result."""
        head = json.dumps({name: value for name, value in self.content.items() if name != "benchmarks"})
        results = ",\n".join(map(json.dumps, self.content["benchmarks"]))
        return f'{head[:-1]}, "benchmarks": [\n{results}\n]}}\n'
