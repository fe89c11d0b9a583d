"""Experiment trackers behind one small interface: TensorBoard when installed, W&B and Trackio on request."""

from __future__ import annotations

import json
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sitfast.config import LogConfig
from sitfast.errors import SitfastError


class Tracker(Protocol):
    """Somewhere else that a run is watched."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, tag: str, path: Path) -> None: ...
    def close(self) -> None: ...


def open_trackers(run_dir: Path, log: LogConfig, config: dict[str, Any], resume_step: int | None) -> list[Tracker]:
    """Those that `log` asks for. `resume_step` is the last step that counts of an earlier process, None for a new run."""
    wanted = {
        "tensorboard": find_spec("tensorboard") is not None if log.tensorboard is None else log.tensorboard,
        "wandb": log.wandb,
        "trackio": log.trackio,
    }
    kinds = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}
    trackers: list[Tracker] = []
    for name in (name for name, on in wanted.items() if on):
        try:
            trackers.append(kinds[name](run_dir, log.project, config, resume_step))
        except ImportError:
            raise SitfastError(f'log.{name}=true needs {name}; pip install "sitfast[track]"') from None
    return trackers


class _TensorBoard:
    def __init__(self, run_dir: Path, project: str, config: dict[str, Any], resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = 0 if resume_step is None else resume_step + 1  # hides what an earlier process logged beyond it
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge, flush_secs=30)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```", global_step=purge)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def image(self, step: int, tag: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run_dir: Path, project: str, config: dict[str, Any], resume_step: int | None) -> None:
        import wandb

        self.wandb = wandb
        id_file = run_dir / "wandb-id.txt"
        if resume_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        run_id = id_file.read_text().strip()
        self.run = wandb.init(
            project=project, name=run_dir.name, id=run_id, dir=str(run_dir), config=config, resume="allow"
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, tag: str, path: Path) -> None:
        self.run.log({tag: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, run_dir: Path, project: str, config: dict[str, Any], resume_step: int | None) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project, name=run_dir.name, config=config, resume="never" if resume_step is None else "allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def image(self, step: int, tag: str, path: Path) -> None:
        self.trackio.log({tag: self.trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        self.trackio.finish()
