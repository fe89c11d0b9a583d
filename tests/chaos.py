"""Kill ranks at random, again and again, and see that the run does not mind: python -m tests.chaos --kills 100

One torchrun with two gloo ranks and a tiny model trains and saves every few steps. A random rank gets SIGKILL at a random
moment (training, saving, or starting again); torchrun starts the ranks anew. Afterwards

    every checkpoint that was reported as saved was there after each kill, or a newer one,
    the run has ended by itself with status 0,
    its last checkpoint has the bits of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sitfast import checkpoint

ROOT = Path(__file__).parent.parent


def launch(run: Path, overrides: list[str], log: Path, restarts: int = 0) -> subprocess.Popen[bytes]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [
                sys.executable,
                *torchrun,
                "--monitor-interval=0.05",
                "-m",
                "sitfast.train",
                *overrides,
                f"output_dir={run}",
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def workers(agent: int) -> list[int]:
    """The ranks: children of torchrun that run Python."""
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        return [int(pid) for pid in children if b"sitfast.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def until(condition: Callable[[], object], agent: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the condition; False if the run has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if agent.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.01)
    return True


def reported(log: Path) -> int:
    """The last step that the log calls saved."""
    steps = re.findall(rb"saved \S*/checkpoint-(\d+) ", log.read_bytes())
    return int(steps[-1]) if steps else -1


def assert_kept(run: Path, step: int) -> None:
    """Of what was reported as saved, nothing newer than the last valid checkpoint is lost."""
    newest = checkpoint.latest(run, warn=lambda _: None)
    found = -1 if newest is None else int(newest.name.rpartition("-")[2])
    assert found >= step, f"step {step} was reported as saved, {found} is the newest valid checkpoint"


def disturb(run: Path, overrides: list[str], log: Path, *, kills: int, seed: int) -> int:
    """Train to the end while killing; returns how many kills there were."""
    moment, done = random.Random(seed), 0
    agent = launch(run, overrides, log, restarts=kills + 2)
    try:
        while done < kills:
            if not until(lambda: len(workers(agent.pid)) == 2, agent, 60):
                break
            before = reported(log)
            if moment.random() < 0.8:  # in training, and since a save is nearly always under way, in saving
                if not until(lambda: reported(log) > before, agent, 60):  # noqa: B023
                    break
                time.sleep(moment.uniform(0, 0.3))
            else:
                time.sleep(moment.uniform(0, 4))  # while the ranks start
            victims = workers(agent.pid)
            if len(victims) < 2:
                continue
            saved = reported(log)
            os.kill(moment.choice(victims), signal.SIGKILL)
            done += 1
            assert_kept(run, saved)
            until(lambda: not set(victims) & set(workers(agent.pid)), agent, 60)  # noqa: B023
            print(f"kill {done}: step {saved} was saved", flush=True)
        assert agent.wait(600) == 0, log.read_text()[-3000:]
    finally:
        agent.terminate()
        agent.wait(60)
    return done


def main() -> None:
    from tests.conftest import TINY, assert_equal

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [*TINY, f"train.steps={args.steps}", "checkpoint.every=10", f"parallel.strategy={args.strategy}"]
    overrides += ["log.every=50", "parallel.timeout_s=60"]
    start = time.monotonic()
    done = disturb(folder / "killed", overrides, folder / "killed.log", kills=args.kills, seed=args.seed)
    print(f"{done} kills in {time.monotonic() - start:.0f} s; now the same run undisturbed")
    assert launch(folder / "straight", overrides, folder / "straight.log").wait() == 0
    assert_equal(folder / f"killed/checkpoint-{args.steps}", folder / f"straight/checkpoint-{args.steps}")
    print(f"{done} kills, {args.steps} steps: no saved checkpoint lost, the last one equal bit for bit ({folder})")


if __name__ == "__main__":
    main()
