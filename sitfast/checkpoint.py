"""Checkpoints: whole or absent, found by themselves, never unpickled.

    run/checkpoint-{step}/  model.safetensors       weights
                            ema.safetensors         averages of the first decay, ema-{decay}.safetensors for others
                            optimizer.safetensors   moments, step counts, loss scale
                            config.yaml             the resolved config
                            trainer_state.json      counters, and the name and size of every file above

A checkpoint is written to a temporary folder beside its place, every file and then the folder reaches the disk, and one
rename puts it in its place; old ones go the same way backwards. So a kill at any moment leaves whole checkpoints and
temporaries, and `clean` removes the temporaries of processes that are gone.

All ranks write, each its rows (see `checkpoint_storage`), so the files are the same whatever the number of ranks and the
sharding, and are read under any other. `Saver` copies the tensors to host memory, which is all that training waits for,
and writes behind it.
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
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sitfast.checkpoint_storage import Layout, Planner, Reader, Rows, Writer, read_header
from sitfast.errors import SitfastError
from sitfast.parallel import World
from sitfast.shards import copies_of, first_row, local

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
    """Write checkpoint `step` from this process alone and wait for it; returns its folder. See `Saver.save`."""
    saver = Saver(run_dir, keep=keep, world=World(0, 1, torch.device("cpu")), background=False)
    saver.save(step, model=model, emas=emas, optimizer=optimizer, state=state, config_yaml=config_yaml)
    saver.wait()
    return run_dir / f"checkpoint-{step}"


class Saver:
    """Writes the checkpoints of a run, all ranks together, behind the training.

    Construct it, and call `save` and `wait`, on all ranks. One save is under way at a time: the next one waits for it.
    """

    def __init__(self, run_dir: Path, *, keep: int, world: World, background: bool = True) -> None:
        self.run_dir, self.keep, self.world, self.background = run_dir, keep, world, background
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None  # other threads have their own
        self._main_pid = world.share(os.getpid())
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._note: str | None = None

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        emas: Mapping[float, Mapping[str, Tensor]],
        optimizer: Mapping[str, Tensor],
        state: dict[str, Any],
        config_yaml: str,
    ) -> str | None:
        """Write checkpoint `step`, then remove all but the newest `keep` valid ones (0 keeps all).

        Returns once the tensors may change again, with the note of the save before this one, if there was one. A valid
        checkpoint of that step is left as it is: the same run writes the same bits. Tensors may be whole or sharded, on
        any device, of any dtype.
        """
        start = time.perf_counter()
        note = self.wait()
        final = self.run_dir / f"checkpoint-{step}"
        if self.world.share(_is_valid(final)):
            if self.world.is_main:
                _retire(self.run_dir, step, self.keep)
            return note
        files, ema_files = _files(model, emas, optimizer)
        layouts = {name: Layout(tensors) for name, tensors in files.items()}
        rows = self._copy(files)
        stalled = time.perf_counter() - start

        def finish() -> None:
            header = {
                "format": _FORMAT,
                "step": step,
                "files": {name: layout.size for name, layout in layouts.items()},
                "emas": [[decay, name] for decay, name in ema_files.items()],
                "state": state,
            }
            _complete(temporary, header, config_yaml)
            if final.exists():  # broken, or it would have been valid
                _discard(final)
            os.replace(temporary, final)
            _sync(self.run_dir)
            _retire(self.run_dir, step, self.keep)

        def work() -> None:
            try:
                self._write(rows, writer)
                written = time.perf_counter() - start - stalled
                self._note = f"saved {final} (training stood still for {stalled:.2f} s, written in {written:.2f} s)"
            except BaseException as error:  # it reaches the training by `wait`
                if self.world.is_main:
                    shutil.rmtree(temporary, ignore_errors=True)
                self._error = _save_error(self.run_dir, final.name, writer.needed, error, self.world)

        temporary = self.run_dir / f".tmp-{final.name}-{self._main_pid}"
        needed = _MARGIN + sum(layout.size for layout in layouts.values())
        writer = Writer(temporary, layouts, needed=needed, finish=finish)
        if not self.background:
            work()
            return note
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()
        return note

    @property
    def failed(self) -> bool:
        """Whether the last save has failed; then `wait` raises, on all ranks."""
        return self._error is not None

    def done(self) -> str | None:
        """The note of a save that has ended since the last call, without waiting."""
        busy = self._thread is not None and self._thread.is_alive()
        return None if busy or self.failed else self.wait()

    def wait(self) -> str | None:
        """Wait for the save under way; its note, or a SitfastError if it failed on any rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        note, self._note = self._note, None
        return note

    def reserve(
        self,
        *,
        model: Mapping[str, Tensor],
        emas: Mapping[float, Mapping[str, Tensor]],
        optimizer: Mapping[str, Tensor],
    ) -> None:
        """Take the host memory for copies of this rank's part, ahead of the first save."""
        self._reserve(_files(model, emas, optimizer)[0])

    def _reserve(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        mine = [local(tensor) for _, tensor in self._mine(files)]
        size = sum(map(_padded, mine))
        if self._memory.numel() >= size:
            return
        try:
            self._memory = torch.empty(size, dtype=torch.uint8)
            if mine[0].is_cuda:  # fixed in its place, so that the GPU copies at the speed of the bus
                runtime: Any = torch.cuda.cudart()
                torch.cuda.check_error(int(runtime.cudaHostRegister(self._memory.data_ptr(), size, 0)))
                weakref.finalize(self, runtime.cudaHostUnregister, self._memory.data_ptr()).atexit = False
        except RuntimeError as error:
            cause = " ".join(str(error).split())
            raise SitfastError(
                f"no {size / 2**30:.1f} GiB of host memory for the copy that a checkpoint is written from ({cause});"
                " a rank needs that much: free some, keep fewer ema.decays, or use more ranks"
            ) from error

    def _mine(self, files: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes: its shard, and of what several ranks hold about the same number of bytes each."""
        loads: dict[int, list[int]] = {}
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                copies, own = copies_of(tensor, self.world.rank, self.world.size)
                load = loads.setdefault(copies, [0] * copies)
                writer = load.index(min(load))
                load[writer] += tensor.numel() * tensor.element_size()
                if writer == own and local(tensor).numel():
                    yield f"{file}/{name}", tensor

    def _copy(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Rows]:
        """This rank's part of the tensors, in host memory that the saves share."""
        self._reserve(files)
        rows, end = {}, 0
        for name, tensor in self._mine(files):
            values = local(tensor).detach()
            begin, end = end, end + _padded(values)
            copy = self._memory[begin : begin + values.nbytes].view(values.dtype).view(values.shape)
            copy.copy_(values, non_blocking=True)
            rows[name] = Rows(copy, first_row(tensor), tensor.shape)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return rows

    def _write(self, rows: dict[str, Rows], writer: Writer) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            alone = self.world.size == 1
            dcp_save(rows, storage_writer=writer, planner=Planner(), process_group=self._group, no_dist=alone)


def _files(
    model: Mapping[str, Tensor], emas: Mapping[float, Mapping[str, Tensor]], optimizer: Mapping[str, Tensor]
) -> tuple[dict[str, Mapping[str, Tensor]], dict[float, str]]:
    """The tensors of each file, and the file of each decay."""
    names = {decay: f"ema-{decay}.safetensors" if i else _EMA for i, decay in enumerate(emas)}
    return {_MODEL: model, _OPTIMIZER: optimizer} | {names[decay]: ema for decay, ema in emas.items()}, names


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // 64) * 64


def _complete(folder: Path, header: dict[str, Any], config_yaml: str) -> None:
    """Add what makes the tensor files in `folder` a checkpoint, and see it to the disk."""
    (folder / _CONFIG).write_text(config_yaml, encoding="utf-8")
    header["files"][_CONFIG] = (folder / _CONFIG).stat().st_size
    (folder / _STATE).write_text(json.dumps(header, indent=2), encoding="utf-8")
    for name in (_CONFIG, _STATE):
        _sync(folder / name)
    _sync(folder)


def _retire(run_dir: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` valid checkpoints up to `step`; 0 keeps all."""
    if keep:
        for old in [path for path in _folders(run_dir) if _step(path) < step and _is_valid(path)][keep - 1 :]:
            _discard(old)


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


def _save_error(run_dir: Path, name: str, needed: int, error: BaseException, world: World) -> BaseException:
    """What `wait` raises: one clear line where a disk is at fault, on this rank or on another; else the error itself."""
    rank, error = _root(error)
    if not isinstance(error, (OSError, SafetensorError)):
        return error
    where = f" on rank {rank}" if world.size > 1 else ""
    good = next((path for path in _folders(run_dir) if _is_valid(path)), None)
    kept = f"the last good checkpoint, {good.name}, is kept" if good else "there is no earlier checkpoint"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        free = (
            f"{shutil.disk_usage(run_dir).free / 2**30:.2f} GiB are free" if rank == world.rank else "too few are free"
        )
        return SitfastError(
            f"cannot save {name}{where}: it needs {needed / 2**30:.2f} GiB and {free} in {run_dir}; "
            f"{kept}; free some space or lower checkpoint.keep, then start again to resume"
        )
    return SitfastError(
        f"cannot save {name}{where} in {run_dir}: {error}; {kept}; check that the folder can be written to"
    )


def _root(error: BaseException) -> tuple[int, BaseException]:
    """The rank that failed, and how."""
    if not isinstance(error, CheckpointException):
        return 0, error
    rank = min(error.failures)
    return rank, error.failures[rank][0]


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


def restore(
    path: Path,
    *,
    model: Mapping[str, Tensor],
    emas: Mapping[float, Mapping[str, Tensor]],
    optimizer: Mapping[str, Tensor],
    world: World,
    apart: Collection[str] = (),
) -> dict[str, Any]:
    """Copy a checkpoint into tensors of the same names, each rank its own rows; returns what `read_state` does.

    All ranks call it; a file that cannot be read on one is an error on all. What belongs to the parameters `apart` is left
    as it is.
    """
    header = _header(path)
    saved = {float(decay): name for decay, name in header["emas"]}
    files = {_MODEL: model, _OPTIMIZER: optimizer} | {saved[decay]: ema for decay, ema in emas.items()}
    left = {f"{kind}{name}" for kind in ("", "exp_avg.", "exp_avg_sq.") for name in apart}
    files = {file: {key: value for key, value in ts.items() if key not in left} for file, ts in files.items()}
    for name, tensors in files.items():
        with _readable(path / name):
            found = {key: value for key, value in read_header(path / name).items() if key not in left}
            _check_fit(path / name, found, tensors)
    targets = {f"{name}/{key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load(
                targets,
                storage_reader=Reader(path, list(files)),
                process_group=world.host_group,
                no_dist=world.size == 1,
            )
    except CheckpointException as error:
        rank, cause = _root(error)
        raise SitfastError(f"{path} cannot be read on rank {rank} ({cause}); copy it again or remove it") from error
    return header["state"] | {"step": header["step"]}


def _check_fit(file: Path, saved: Mapping[str, tuple[torch.dtype, torch.Size]], tensors: Mapping[str, Tensor]) -> None:
    """The names and the shapes must agree."""
    for names, fault in ((tensors.keys() - saved.keys(), "lacks"), (saved.keys() - tensors.keys(), "has an unknown")):
        if names:
            raise SitfastError(
                f"{file} {fault} {min(names)!r} ({len(names)} such): it is another model's; use the config it was saved with"
            )
    for name, tensor in tensors.items():
        if saved[name][1] != tensor.shape:
            raise SitfastError(
                f"{file}: {name!r} has shape {tuple(saved[name][1])}, this model needs {tuple(tensor.shape)}; "
                "use the config it was saved with"
            )


def shapes(path: Path) -> dict[str, torch.Size]:
    """Of the weights of a checkpoint folder, by name."""
    with _readable(path / _MODEL):
        return {name: shape for name, (_, shape) in read_header(path / _MODEL).items()}


def read(path: Path, names: Collection[str], *, decay: float | None = None) -> dict[str, Tensor]:
    """Some weights of a checkpoint folder, whole, on the CPU; of the average of `decay` where one is given."""
    averages = {float(key): name for key, name in _header(path)["emas"]}
    file = path / (_MODEL if decay is None else averages[decay])
    with _readable(file), safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in names}


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
        return weights_in(read_pt(path), path, ema=ema)
    raise SitfastError(f"{path} is not of a kind that holds weights; give a .safetensors or .pt file, or a folder")


def weights_in(content: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    """The weights in what a .pt file held: under "ema" or "model" in a training file, else all of it."""
    for name in ("ema", "model") if ema else ("model",):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise SitfastError(f'{path} holds no weights; expected a state dict, or one under "ema" or "model"')
    return dict(content)


def read_pt(path: Path) -> Any:
    """What a .pt file holds, through the unpickler that builds tensors, containers and an argparse.Namespace only.

    Official training files are {"model", "ema", "opt", "args": argparse.Namespace}, released ones a plain state dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SitfastError(
            f"{path} is damaged or holds more than tensors, and reading that could run foreign code; "
            "convert it to .safetensors"
        ) from error
    except Exception as error:  # a damaged stream of pickle instructions can fail in any way
        cause = str(error).partition("\n")[0]
        raise SitfastError(f"{path} is truncated or no PyTorch file ({cause}); copy it again") from error
