"""Checkpoints: whole or absent, found by themselves, never unpickled.

    run/checkpoint-{step}/  model.safetensors       weights
                            ema.safetensors         averages of the first decay, ema-{decay}.safetensors for others
                            optimizer.safetensors   moments, step counts, loss scale
                            config.yaml             the resolved config
                            trainer_state.json      counters, and the name and size of every file above

A checkpoint is written to a temporary folder beside its place, every file and then the folder reaches the disk, and one
rename puts it in its place; old ones go the same way backwards. So a kill at any moment leaves whole checkpoints and
temporaries, and `clean` removes the temporaries of processes that are gone. Only one rank calls `save` and `clean`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sitfast.errors import SitfastError

_FORMAT = 1
_MODEL, _EMA, _OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
_CONFIG, _STATE = "config.yaml", "trainer_state.json"
_MARGIN = 64 * 2**20  # bytes to leave free: headers, the log, the last images
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"\.tmp-.*-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int  # updates done
    model: dict[str, Tensor]
    emas: dict[float, dict[str, Tensor]]  # by decay, the first one first
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # what the trainer gave to `save`
    config_yaml: str


def save(
    run_dir: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    emas: Mapping[float, Mapping[str, Tensor]],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    config_yaml: str,
    keep: int,
) -> Path:
    """Write checkpoint `step`, then remove all but the newest `keep` valid ones (0 keeps all); returns its folder.

    A valid checkpoint of that step is left as it is: the same run writes the same bits. Tensors may live on any device
    and have any dtype; host memory is needed for one file at a time.
    """
    final = run_dir / f"checkpoint-{step}"
    if not _is_valid(final):
        tensors = {_MODEL: model, _OPTIMIZER: optimizer}
        ema_files = {decay: f"ema-{decay}.safetensors" if i else _EMA for i, decay in enumerate(emas)}
        tensors |= {ema_files[decay]: ema for decay, ema in emas.items()}
        needed = _MARGIN + sum(t.numel() * t.element_size() for ts in tensors.values() for t in ts.values())
        temporary = run_dir / f".tmp-{final.name}-{os.getpid()}"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(run_dir).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _write(temporary, step, tensors, ema_files, state, config_yaml)
            if final.exists():  # broken, or it would have been valid
                _discard(final)
            os.replace(temporary, final)
            _sync(run_dir)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _save_error(run_dir, final.name, needed, error) from error
    if keep:
        for old in [path for path in _folders(run_dir) if _step(path) < step and _is_valid(path)][keep - 1 :]:
            _discard(old)
    return final


def _write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    ema_files: Mapping[float, str],
    state: dict[str, Any],
    config_yaml: str,
) -> None:
    """Write a whole checkpoint into `folder` and see it to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in tensors.items():
        host = {key: value.detach().cpu().contiguous() for key, value in content.items()}
        save_file(host, folder / name, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(config_yaml, encoding="utf-8")
    header = {
        "format": _FORMAT,
        "step": step,
        "files": {name: (folder / name).stat().st_size for name in (*tensors, _CONFIG)},
        "emas": [[decay, name] for decay, name in ema_files.items()],
        "state": state,
    }
    (folder / _STATE).write_text(json.dumps(header, indent=2), encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Remove a folder such that it is whole until it is gone: by another name first."""
    doomed = path.parent / f".tmp-old-{path.name}-{os.getpid()}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _save_error(run_dir: Path, name: str, needed: int, error: Exception) -> SitfastError:
    good = next((path for path in _folders(run_dir) if _is_valid(path)), None)
    kept = f"the last good checkpoint, {good.name}, is kept" if good else "there is no earlier checkpoint"
    # safetensors reports the number of the operating system's error in its text only.
    full = {errno.ENOSPC, errno.EDQUOT}
    if getattr(error, "errno", None) in full or any(f"os error {number})" in str(error) for number in full):
        free = shutil.disk_usage(run_dir).free
        return SitfastError(
            f"cannot save {name}: it needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free in {run_dir}; "
            f"{kept}; free some space or lower checkpoint.keep, then start again to resume"
        )
    return SitfastError(f"cannot save {name} in {run_dir}: {error}; {kept}; check that the folder can be written to")


def clean(run_dir: Path) -> None:
    """Remove what earlier processes left half written or half removed. Call it once, before the first `save`."""
    for path in run_dir.glob(".tmp-*"):
        match = _TEMPORARY.fullmatch(path.name)
        # A process that starts now has no temporaries: those with its number are a dead one's (a container's pid 1).
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _folders(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, valid or not, newest first."""
    return sorted((p for p in run_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _is_valid(path: Path) -> bool:
    try:
        validate(path)
    except SitfastError:
        return False
    return True


def validate(path: Path) -> None:
    """Raise a SitfastError unless every file of a checkpoint is there, has its size and a readable header."""
    _header(path)


def _header(path: Path) -> dict[str, Any]:
    """The content of trainer_state.json of a checkpoint that was found to be whole."""
    if not (path / _STATE).is_file():
        raise SitfastError(f"{path} is no whole checkpoint: {_STATE} is missing; use another one")
    try:
        header = json.loads((path / _STATE).read_text(encoding="utf-8"))
        version, files = header["format"], dict(header["files"])
        names = {_MODEL, _OPTIMIZER, _CONFIG, *(name for _, name in header["emas"])}
        damaged = not (isinstance(header["step"], int) and isinstance(header["state"], dict) and names == files.keys())
    except (ValueError, KeyError, TypeError) as error:
        raise SitfastError(f"{path / _STATE} cannot be read ({error!r}); use another checkpoint") from error
    if version != _FORMAT:
        raise SitfastError(
            f"{path} has checkpoint format {version}, this sitfast reads {_FORMAT}; use the matching version"
        )
    if damaged:
        raise SitfastError(
            f"{path / _STATE} is damaged: its list of files or counters is incomplete; use another checkpoint"
        )
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise SitfastError(f"{path} is no whole checkpoint: {name} is missing; use another one")
        if file.stat().st_size != size:
            raise SitfastError(
                f"{file} is truncated or altered: {file.stat().st_size} bytes instead of {size}; use another one"
            )
        if file.suffix == ".safetensors":
            with _readable(file), safe_open(file, framework="pt"):
                pass
    return header


@contextlib.contextmanager
def _readable(file: Path):
    """Turn the ways in which reading a safetensors file fails into one clear error."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SitfastError(f"{file} is truncated or no safetensors file ({error}); copy or save it again") from error


def latest(run_dir: Path, warn: Callable[[str], Any]) -> Path | None:
    """The newest valid checkpoint of a run, or None; `warn` hears of each newer one that is not valid."""
    for path in _folders(run_dir):
        try:
            validate(path)
        except SitfastError as error:
            warn(f"passing over {path.name}: {error}")
        else:
            return path
    return None


def load(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint folder, after validating it."""
    header = _header(path)
    return Checkpoint(
        path=path,
        step=header["step"],
        model=_load_file(path / _MODEL, device),
        emas={float(decay): _load_file(path / name, device) for decay, name in header["emas"]},
        optimizer=_load_file(path / _OPTIMIZER, device),
        state=header["state"],
        config_yaml=(path / _CONFIG).read_text(encoding="utf-8"),
    )


def read_state(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint folder without its tensors: what the trainer gave to `save`, and "step"."""
    header = _header(path)
    return header["state"] | {"step": header["step"]}


def _load_file(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    with _readable(file):
        return load_file(file, device=str(device))


def find_checkpoint(path: str | Path, *, warn: Callable[[str], Any] = warnings.warn) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest valid one of a run folder."""
    path = Path(path)
    if not path.exists():
        raise SitfastError(f"{path} does not exist; give a checkpoint folder or a run folder")
    if (path / _STATE).exists() or _NAME.fullmatch(path.name):
        validate(path)
        return path
    found = latest(path, warn)
    if found is None:
        raise SitfastError(f"no valid checkpoint in {path}; give a checkpoint folder or a run folder that holds one")
    return found


def find_weights(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Weights, on the CPU, from a .safetensors file, a checkpoint folder, a run folder or an official .pt or .pth file.

    `ema` prefers the averages where there are any: ema.safetensors of a checkpoint, the "ema" entry of a .pt file.
    """
    path = Path(path)
    if path.is_dir():
        path = find_checkpoint(path)
        return _load_file(path / _EMA if ema and (path / _EMA).exists() else path / _MODEL)
    if not path.exists():
        raise SitfastError(
            f"{path} does not exist; give a .safetensors or .pt file, a checkpoint folder or a run folder"
        )
    if path.suffix == ".safetensors":
        return _load_file(path)
    if path.suffix in (".pt", ".pth"):
        return _load_official(path, ema=ema)
    raise SitfastError(f"{path} is not of a kind that holds weights; give a .safetensors or .pt file, or a folder")


def _load_official(path: Path, *, ema: bool) -> dict[str, Tensor]:
    """Weights of a .pt file, through the unpickler that builds tensors, containers and an argparse.Namespace only.

    Official training files are {"model", "ema", "opt", "args": argparse.Namespace}, released ones a plain state dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SitfastError(
            f"{path} is damaged or holds more than tensors, and reading that could run foreign code; "
            "convert it to .safetensors"
        ) from error
    except Exception as error:  # a damaged stream of pickle instructions can fail in any way
        cause = str(error).partition("\n")[0]
        raise SitfastError(f"{path} is truncated or no PyTorch file ({cause}); copy it again") from error
    for name in ("ema", "model") if ema else ("model",):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise SitfastError(f'{path} holds no weights; expected a state dict, or one under "ema" or "model"')
    return dict(content)
