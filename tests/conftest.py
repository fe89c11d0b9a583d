"""Small runs that the tests of the trainer and of the commands share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported; its kernels then run on the CPU

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from sitfast import config, parallel
from sitfast.trainer import Trainer
from tests.ranks import Ranks

# A model so small that a step takes milliseconds, on real digits.
TINY = [
    "data.source=digits",
    "data.image_size=8",
    "data.batch_size=8",
    "data.num_workers=0",
    "data.flip=false",
    "vae.id=null",
    "model.preset=null",
    "model.patch_size=4",
    "model.hidden_size=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.num_classes=10",
    "model.learn_sigma=false",
    "optim.lr=1e-3",
    "ema.decays=[0.9, 0.99]",
    "train.steps=20",
    "train.precision=fp32",
    "train.device=cpu",
    "checkpoint.every=10",
    "log.every=1",
    "log.tensorboard=false",
    "sample.steps=2",
]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def ranks():
    """Processes to run a function in as the ranks of a job."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def tiny(tmp_path):
    """The overrides of a tiny run in its own folder."""
    return [*TINY, f"output_dir={tmp_path / 'run'}"]


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """36 random 8-px PNGs in three class folders."""
    generator = np.random.default_rng(0)
    for i in range(36):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def folder_run(image_folder, *more: str) -> list[str]:
    return ["data.source=folder", f"data.path={image_folder}", "data.flip=true", "model.num_classes=3", *more]


def train(*overrides: str) -> Trainer:
    """Train in this process; returns the trainer after its last step."""
    cfg = config.load(None, list(overrides))
    with parallel.start(cfg) as world:
        trainer = Trainer(cfg, world)
        trainer.run()
    return trainer


def command(
    module: str, *arguments: str, code: str | None = None, ranks: int = 1, timeout: int = 240, **env: str
) -> subprocess.CompletedProcess:
    """Run `python -m module …` (or `-c code`, or under torchrun) as a user would and capture what it says."""
    head = ["-c", code] if code else ["-m", module]
    threads = str(torch.get_num_threads()) if ranks == 1 else "1"  # bits depend on how many threads share a sum
    if ranks > 1:
        head = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    return subprocess.run(
        [sys.executable, *head, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": threads, **env},
    )


def losses(run: Path) -> dict[int, float]:
    """step → logged loss."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    return {f"{p.name}:{k}": v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_equal(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys() and len(left) > 20
    different = [key for key in left if not torch.equal(bits(left[key]), bits(right[key]))]
    assert different == []
