"""How the operators in csrc/ are compiled for the installed PyTorch, by `python -m sitfast.build` and by setup.py.

    c++  → sitfast/_operators_cpu.so      always
    nvcc → sitfast/_operators_cuda.so     where there are nvcc and a PyTorch with CUDA; SITFAST_BUILD_CUDA=0 or 1 decides
                                          otherwise, SITFAST_CUDA_ARCHS="90a" builds for fewer GPUs and is faster

Both use PyTorch's stable ABI alone, so that one binary serves torch 2.11 to 2.13 and every Python. Beside the libraries
lies what they were made of (`_operators.json`): they are not loaded once csrc/ has changed.

This file needs the standard library alone: setup.py runs it before there is a package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ARCHS = ("80", "89", "90a", "100", "120")  # and PTX of the last, for what comes after it
_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # the stable ABI of torch 2.11
_OPTIONS = ("-std=c++17", "-O3", _TARGET)
_NO_CONTRACTION = {"cpu": ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"), "cuda": ("-fmad=false",)}


class BuildError(Exception):
    """Why there is no library, in one line, and what to do."""


def csrc() -> Path:
    """The sources: beside the package in a clone, inside it in an installation."""
    beside = PACKAGE.parent / "csrc"
    return beside if (beside / "library.cpp").is_file() else PACKAGE / "csrc"


def fingerprint(sources: Path) -> str:
    """Of everything the libraries are made of."""
    digest = hashlib.sha256(repr((_OPTIONS, _NO_CONTRACTION)).encode())
    for path in sorted(sources.glob("*.*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_torch() -> Path:
    """The folder of the installed PyTorch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    # pip builds in an environment of its own; what is installed lies where it would have put it.
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(key)) / "torch"
        if (folder / "include/torch/csrc/stable").is_dir():
            return folder
    raise BuildError("PyTorch is not installed; install it, then run: python -m sitfast.build")


def cuda_version(torch: Path) -> str | None:
    """The CUDA that PyTorch was built with, such as "13.0"; None for the CPU's."""
    found = re.search(r"^cuda[^=]*= *'([\d.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    return next(filter(None, map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)


def wants_cuda(torch: Path) -> bool:
    """Whether the CUDA operators are to be built; a BuildError if they must be and cannot."""
    wish = os.environ.get("SITFAST_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"SITFAST_BUILD_CUDA={wish} must be 0 or 1")
    if wish == "0":
        return False
    version, nvcc = cuda_version(torch), find_nvcc()
    if wish == "1" and version is None:
        raise BuildError("SITFAST_BUILD_CUDA=1, and this PyTorch is built without CUDA; install one with it")
    if wish == "1" and nvcc is None:
        raise BuildError("SITFAST_BUILD_CUDA=1, and there is no nvcc; install the CUDA toolkit, or set CUDA_HOME")
    return version is not None and nvcc is not None


def architectures(archs: tuple[str, ...]) -> list[str]:
    """nvcc's options for machine code of each, and PTX of the last."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def compile_command(source: Path, target: Path, torch: Path, options: tuple[str, ...] = ()) -> list[str]:
    """The command that makes an object file of a .cpp or .cu file."""
    if source.suffix == ".cu":
        head = [find_nvcc() or "nvcc", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=4"]
        kind = "cuda"
    else:
        head = [os.environ.get("CXX", "c++"), "-fPIC", "-fvisibility=hidden"]
        kind = "cpu"
    tail = ["-I" + str(torch / "include"), "-c", str(source), "-o", str(target)]
    return [*head, *_OPTIONS, *_NO_CONTRACTION[kind], *options, *tail]


def build(into: Path = PACKAGE, *, sources: Path | None = None) -> dict:
    """Compile and put the libraries into the folder; returns what `_operators.json` says. BuildError if it cannot be."""
    sources, torch, started = sources or csrc(), find_torch(), time.monotonic()
    if not (sources / "library.cpp").is_file():
        raise BuildError(f"{sources} does not hold the sources; install sitfast again")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BuildError(f"there is no C++ compiler ({compiler}); install one (apt install g++), or set CXX")
    archs = tuple(os.environ.get("SITFAST_CUDA_ARCHS", " ".join(ARCHS)).split())
    about = {"sources": fingerprint(sources), "torch": _version(torch), "cuda": None}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        libraries = {"cpu": sorted(sources.glob("*.cpp"))}
        if wants_cuda(torch):
            libraries["cuda"] = sorted(sources.glob("*.cu"))
        objects: dict[str, list[Path]] = {kind: [] for kind in libraries}
        jobs = []
        for kind, files in sorted(libraries.items(), reverse=True):  # nvcc takes longest
            for source in files:
                objects[kind].append(Path(folder, f"{source.name}.o"))
                options = tuple(architectures(archs)) if kind == "cuda" else ()
                jobs.append(pool.submit(_run, compile_command(source, objects[kind][-1], torch, options)))
        for job in jobs:
            job.result()
        for kind in libraries:
            target = Path(folder, f"_operators_{kind}.so")
            _run(_link_command(kind, objects[kind], target, torch))
        into.mkdir(parents=True, exist_ok=True)
        for kind in ("cpu", "cuda"):
            final = into / f"_operators_{kind}.so"
            if kind in libraries:  # whole or not at all, also for a process that has the old one loaded
                temporary = into / f".{final.name}.{os.getpid()}"
                shutil.copyfile(Path(folder, final.name), temporary)
                os.replace(temporary, final)
            else:
                final.unlink(missing_ok=True)
    if "cuda" in libraries:
        about["cuda"] = list(archs)
    about["seconds"] = round(time.monotonic() - started, 1)
    (into / "_operators.json").write_text(json.dumps(about) + "\n")
    return about


def _version(torch: Path) -> str:
    found = re.search(r"^__version__ = '([^']+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def _link_command(kind: str, objects: list[Path], target: Path, torch: Path) -> list[str]:
    """PyTorch's libraries are loaded by the time ours is, so it needs their names and no path."""
    libraries = ["-ltorch_cpu", "-lc10"] + (["-ltorch_cuda"] if kind == "cuda" else [])
    compiler = [find_nvcc() or "nvcc"] if kind == "cuda" else [os.environ.get("CXX", "c++")]
    return [*compiler, "-shared", "-o", str(target), *map(str, objects), f"-L{torch / 'lib'}", *libraries]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0].strip() if lines else done.returncode}; the command was "
                         f"{' '.join(command)}")  # fmt: skip
