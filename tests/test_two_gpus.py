"""Two GPUs and NCCL: what the gloo processes of the other tests cannot show."""

import os
import signal
import time

import pytest
import torch

from sitfast import checkpoint, config, parallel
from sitfast.trainer import Trainer
from tests import chaos
from tests.conftest import TINY, folder_run, losses, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WIDE = ["model.hidden_size=64", "model.num_heads=1", "train.device=cuda", "train.compile=false", "optim.clip_norm=0.5"]
ON_GPUS = [*TINY, *WIDE, "parallel.timeout_s=60"]


def train_here(*overrides: str) -> int:
    """In a rank that stays for other tests: as many steps as the config says."""
    try:
        return train(*overrides).step
    finally:
        torch.cuda.empty_cache()


# Summing in another order changes the last bits of fp32, 6e-8, and 20 steps carry that on. bf16 rounds each value to 0.4 %,
# each path differently; a loss is a mean over 8 × 3 × 64 of them.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, image_folder_once) -> dict[str, dict[int, float]]:
    """The losses of one GPU, by precision."""
    found = {}
    for precision in TOLERANCE:
        folder = tmp_path_factory.mktemp(precision)
        train(*ON_GPUS, *image_folder_once, f"train.precision={precision}", f"output_dir={folder}")
        found[precision] = losses(folder)
    return found


@pytest.fixture(scope="module")
def image_folder_once(tmp_path_factory) -> list[str]:
    """The overrides for a folder of random images."""
    import numpy as np
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(36):
        path = root / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder_run(root)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    "settings",
    [
        ["parallel.strategy=ddp"],
        ["parallel.strategy=ddp", "train.accumulate=2"],
        ["parallel.strategy=fsdp"],
        ["parallel.strategy=fsdp", "parallel.reshard_after_forward=false", "train.accumulate=2"],
        ["parallel.strategy=ddp", "train.cuda_graph=true"],
    ],
    ids=["ddp", "ddp-accumulate", "fsdp", "fsdp-kept-accumulate", "ddp-graph"],
)
def test_two_gpus_have_the_losses_of_one(ranks, tmp_path, alone, image_folder_once, settings, precision):
    run = [*ON_GPUS, *image_folder_once, *settings, f"train.precision={precision}", f"output_dir={tmp_path}"]
    ranks(2, train_here, *run)
    assert losses(tmp_path) == pytest.approx(alone[precision], rel=TOLERANCE[precision])


def test_saved_by_two_gpus_and_continued_by_one(ranks, tmp_path, alone, image_folder_once):
    run = [*ON_GPUS, *image_folder_once, f"output_dir={tmp_path}"]
    ranks(2, train_here, *run, "parallel.strategy=fsdp", "train.steps=10")
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "checkpoint-10"
    train(*run)
    assert losses(tmp_path) == pytest.approx(alone["fp32"], rel=TOLERANCE["fp32"])


def steps_that_wait_for_nothing(*overrides: str) -> None:
    """CUDA raises where PyTorch would wait for it."""
    cfg = config.load(None, overrides)
    with parallel.start(cfg) as world:
        trainer = Trainer(cfg, world)
        trainer._begin_window()
        for _ in range(12):  # DistributedDataParallel takes the time of its first ten
            trainer.train_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                trainer.train_step()
                world.most(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            trainer.close()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nothing_waits_for_the_gpus(ranks, tmp_path, image_folder_once, strategy):
    run = [*ON_GPUS, *image_folder_once, f"parallel.strategy={strategy}", f"output_dir={tmp_path}"]
    ranks(2, steps_that_wait_for_nothing, *run)


@pytest.mark.parametrize("every", [1, 100_000], ids=["waiting-for-the-gpu", "ahead-of-the-gpu"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_other_with_its_name(tmp_path, image_folder_once, strategy, every):
    """The one that is left waits in a kernel of NCCL or in a collective of the CPUs; either way it says who failed."""
    log, run = tmp_path / "log", tmp_path / "run"
    steps = ["train.steps=10000000", f"log.every={every}", "checkpoint.every=20", f"parallel.strategy={strategy}"]
    agent = chaos.launch(run, [*ON_GPUS, *image_folder_once, *steps], log)
    try:
        assert chaos.until(lambda: chaos.reported(log) >= 20, agent, 120), log.read_text()[-2000:]
        victim = chaos.workers(agent.pid)[1]
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        assert agent.wait(60) != 0
    finally:
        agent.kill()
        agent.wait()
    assert time.monotonic() - start < 60
    assert "because rank 1 failed first: killed, or its machine was lost" in log.read_text()
