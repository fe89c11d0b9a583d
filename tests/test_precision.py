"""The bf16 copy that computes for the fp32 weights that learn."""

import pytest
import torch

from sitfast import config, parallel
from sitfast.errors import SitfastError
from sitfast.trainer import Trainer
from tests.conftest import TINY, losses, tensors, train

BF16 = ["train.precision=bf16"]


def start(tmp_path, *overrides: str) -> Trainer:
    cfg = config.load(None, [*TINY, *BF16, f"output_dir={tmp_path / 'run'}", *overrides])
    with parallel.start(cfg) as world:
        return Trainer(cfg, world)


def test_the_copy_is_the_rounded_weights_after_every_step(tmp_path):
    trainer = start(tmp_path)
    for _ in range(3):
        trainer.train_step()
        weights = dict(trainer.model.named_parameters())
        for name, value in trainer.copy.network.named_parameters():
            assert value.dtype == torch.bfloat16 and weights[name].dtype == torch.float32
            assert torch.equal(value, weights[name].bfloat16()), name
    assert not torch.equal(weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"].bfloat16().float())
    trainer.close()


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of one step, as its update sees them."""
    seen = {}
    inner = trainer.update.step

    def look(step, loss):
        seen.update({name: trainer.update._gradient(name) for name in trainer.update._params})
        return inner(step, loss)

    trainer.update.step = look
    trainer.train_step()
    trainer.close()
    return seen


def test_micro_batches_add_up_in_fp32(tmp_path):
    whole = gradients(start(tmp_path / "whole"))
    parts = gradients(start(tmp_path / "parts", "train.accumulate=4"))
    name = "final_layer.linear.weight"
    assert whole[name].dtype == torch.bfloat16 and parts[name].dtype == torch.float32
    assert not torch.equal(parts[name], parts[name].bfloat16().float())  # a sum in bf16 would be one of its numbers
    for name, value in whole.items():
        torch.testing.assert_close(parts[name].float(), value.float(), rtol=0.05, atol=0.02 * value.abs().max().item())


def rank_gradients(path, size: int, accumulate: int) -> dict[str, torch.Tensor]:
    cfg = config.load(None, [*TINY, *BF16, f"train.accumulate={accumulate}", f"output_dir={path}/{size}-{accumulate}"])
    with parallel.start(cfg) as world:
        return gradients(Trainer(cfg, world))


def test_ranks_reduce_in_fp32_whatever_the_split(ranks, tmp_path):
    """Eight samples one by one, two at a time on four ranks' worth: the same sums of the same bf16 gradients."""
    (alone,) = ranks(1, rank_gradients, tmp_path, 1, 4)
    for size, accumulate in ((2, 2), (4, 1)):  # two samples at a time everywhere
        for answer in ranks(size, rank_gradients, tmp_path, size, accumulate):
            for name, value in alone.items():
                assert answer[name].dtype == torch.float32
                torch.testing.assert_close(answer[name], value, rtol=1e-5, atol=1e-6 * value.abs().max().item())


def test_resume_is_bit_for_bit(tiny, tmp_path):
    train(*tiny, *BF16, f"output_dir={tmp_path / 'straight'}")
    train(*tiny, *BF16, "train.steps=10")
    train(*tiny, *BF16)
    straight, resumed = (tensors(tmp_path / name / "checkpoint-20") for name in ("straight", "run"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_it_learns_like_autocast(tiny, tmp_path):
    train(*tiny, *BF16)
    train(*tiny, *BF16, "train.residual=fp32", f"output_dir={tmp_path / 'autocast'}")
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "autocast")
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.02)


def test_sharded_weights_have_no_fp32_stream():
    with pytest.raises(SitfastError, match="train.residual=fp32 with parallel.strategy=fsdp"):
        config.load(None, [*TINY, *BF16, "train.residual=fp32", "parallel.strategy=fsdp"])
