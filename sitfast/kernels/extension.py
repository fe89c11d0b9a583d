"""The compiled operators of csrc/: loads what `python -m sitfast.build` made, and says what there is.

Which implementation an operation takes is decided by `dispatch.choose` like everywhere; `kernels` gives it what is there
for each kind of device. Nothing is built here: a run that finds no library uses PyTorch and says so when it starts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from sitfast import builder

F = TypeVar("F", bound=Callable[..., Any])


class Loaded(NamedTuple):
    """The kinds of devices with operators, and for the others the reason why there are none."""

    kinds: tuple[str, ...]
    missing: dict[str, str]


@functools.cache
def load() -> Loaded:
    """Load the libraries, once a process."""
    about_path = builder.PACKAGE / "_operators.json"
    remedy = "python -m sitfast.build compiles them"
    if not about_path.is_file():
        return Loaded((), dict.fromkeys(("cpu", "cuda"), f"not built; {remedy}"))
    about = json.loads(about_path.read_text())
    if (builder.csrc() / "library.cpp").is_file() and about["sources"] != builder.fingerprint(builder.csrc()):
        return Loaded((), dict.fromkeys(("cpu", "cuda"), f"older than csrc/; {remedy}"))
    kinds, missing = [], {}
    for kind in ("cpu", "cuda"):
        path = builder.PACKAGE / f"_operators_{kind}.so"
        if not path.is_file():
            missing[kind] = f"built without CUDA; {remedy} where nvcc and a GPU's PyTorch are installed"
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            missing[kind] = f"{path.name} cannot be loaded ({str(error).splitlines()[0]}); {remedy}"
            if kind == "cpu":  # it defines the schemas, which the other needs
                return Loaded((), dict.fromkeys(("cpu", "cuda"), missing["cpu"]))
        else:
            kinds.append(kind)
    return Loaded(tuple(kinds), missing)


def kernels(kernel: F) -> dict[str, F]:
    """The `kernels` of `dispatch.choose`: `kernel` for every kind of device that has operators."""
    return dict.fromkeys(load().kinds, kernel)


def describe(device: torch.device) -> str:
    """What the operations outside the network run on `device`, and why."""
    loaded = load()
    if device.type in loaded.kinds:
        return "CUDA" if device.type == "cuda" else "C++"
    return f"PyTorch (C++ operators: {loaded.missing.get(device.type, 'none for this device')})"
