"""A run in stages, each at a resolution (and a patch size) of its own, that starts from the weights of the one before.

    stage 1 ─ checkpoint ─▶ resize ─▶ stage 2 ─ checkpoint ─▶ resize ─▶ …        one folder, one metrics.jsonl

Each stage is a Trainer with a config of its own. Updates and samples are numbered through, so every draw is new, and the
last checkpoint of a stage is all that the next one needs: a run that is killed at a boundary, before or after it, continues
like one that was not. Averages are resized as the weights are; AdamW's moments stay where the shape does, and begin anew,
with their count of updates, where it does not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sitfast import checkpoint, config
from sitfast.config import Config
from sitfast.data.buckets import Buckets
from sitfast.errors import SitfastError
from sitfast.parallel import World
from sitfast.resize import resized
from sitfast.shards import assign


class Stage(NamedTuple):
    cfg: Config  # as if it were the run
    first: int  # updates before it
    consumed: int  # samples before it

    @property
    def last(self) -> int:
        """Updates done when it ends."""
        return self.first + self.cfg.train.steps


def stages(cfg: Config) -> list[Stage]:
    """The stages of a run; of a config without any, the run as one stage."""
    made: list[Stage] = []
    for one in config.stage_configs(cfg):
        before = made[-1] if made else Stage(one, 0, 0)
        steps = before.cfg.train.steps if made else 0
        taken = Buckets(before.cfg.data, cfg.seed).samples(before.first, before.first + steps)
        made.append(Stage(one, before.first + steps, before.consumed + taken))
    return made


def each(cfg: Config, check: Callable[[Config], None]) -> None:
    """Call `check` for the config of each stage; its errors name the stage."""
    for number, stage in enumerate(config.stage_configs(cfg)):
        try:
            check(stage)
        except SitfastError as error:
            raise SitfastError(f"stages.{number}: {error}" if cfg.stages else str(error)) from error


def current(cfg: Config, world: World) -> int:
    """The number, from 0, of the stage that the run folder's newest valid checkpoint leaves off in, or ends just before."""
    if len(cfg.stages) < 2:
        return 0
    step = 0
    if world.is_main:
        path = checkpoint.latest(Path(cfg.output_dir), warn=lambda _: None)  # the trainer warns
        step = 0 if path is None else checkpoint.read_state(path)["step"]
    step = world.share(step)
    made = stages(cfg)
    return max(number for number, stage in enumerate(made) if number == 0 or stage.first <= step)


def grow(
    path: Path,
    *,
    model: Mapping[str, Tensor],
    emas: Mapping[float, Mapping[str, Tensor]],
    optimizer: Mapping[str, Tensor],
    sizes: dict[str, Any],
    world: World,
) -> str:
    """Copy a checkpoint of the former stage into tensors of this one, `sizes` being its `SiT.config`; says what was made.

    All ranks call it. Tensors of the same shape are read as `restore` reads them, each rank its rows; the few others whole.
    """
    shapes = checkpoint.shapes(path)
    changed = [name for name, tensor in model.items() if tensor.shape != shapes[name]]
    checkpoint.restore(path, model=model, emas=emas, optimizer=optimizer, world=world, apart=changed)
    for decay, targets in [(None, model), *emas.items()]:
        for name, value in checkpoint.read(path, changed, decay=decay).items():
            assign(targets[name], resized(name, value, sizes))
    anew = [name for name in changed if f"exp_avg.{name}" in optimizer]
    trained = [key.removeprefix("exp_avg.") for key in optimizer if key.startswith("exp_avg.")]
    for name in anew:
        optimizer["step"][trained.index(name)] = 0.0  # its moments are zeros already
    told = [f"{name} {'×'.join(map(str, shapes[name]))} → {'×'.join(map(str, model[name].shape))}" for name in changed]
    text = f"grown from {path.name}: {', '.join(told) or 'all weights as they were'}"
    return text + (f"; the moments of {', '.join(anew)} begin anew" if anew else "; all moments kept")


def release() -> None:
    """Give back what a stage held, before the next one begins."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.compiler.reset()  # what was compiled for the former shapes
