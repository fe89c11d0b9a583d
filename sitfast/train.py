"""Train: `python -m sitfast.train --config configs/digits.yaml [section.field=value …]`, or the same under torchrun.

The same command continues a run that stopped: the newest valid checkpoint in `output_dir` is found by itself.
"""

from __future__ import annotations

import argparse

from sitfast import cli, config, growing, parallel
from sitfast.config import Config
from sitfast.parallel import World
from sitfast.trainer import ELSEWHERE, Trainer

RESTART = (
    75  # EX_TEMPFAIL: saved because another rank was told to stop; `torchrun --max-restarts` goes on without that one
)


def train(cfg: Config, world: World) -> str | None:
    """The run, stage by stage where it has stages; the name of the signal that ended it."""
    for stage in range(growing.current(cfg, world), len(growing.stages(cfg))):
        ended_by = Trainer(cfg, world, stage).run()
        if ended_by is not None:
            return ended_by
        growing.release()
    return None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sitfast.train",
        description="Train a SiT or DiT. Every setting can be overridden by its dotted path.",
        epilog="settings and their defaults:\n" + config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_config_arguments(parser)
    args = parser.parse_args(argv)
    cfg = config.load(args.config, args.overrides)
    with parallel.start(cfg) as world:
        ended_by = train(cfg, world)
    return RESTART if ended_by == ELSEWHERE else 0


if __name__ == "__main__":
    cli.run(main)
