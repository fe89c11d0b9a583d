"""Training on batches of several sizes, from outside: exact resume, ranks, the VAE, samples, errors."""

import json
import signal
from pathlib import Path

import pytest
import torch

from sitfast import checkpoint, config, parallel, sample
from sitfast.data.buckets import Buckets
from sitfast.errors import SitfastError
from sitfast.trainer import Trainer
from tests.conftest import TINY, assert_equal, command, folder_run, losses, train
from tests.test_trainer import KILLED

SIZES = "data.resolutions=[[8,8],[16,8],[8,16],[16,16]]"
SEVERAL = [SIZES, "data.batch_size=24", "data.batch_multiple=6", "optim.clip_norm=1.0"]


def several(image_folder, *more: str) -> list[str]:
    return [*TINY, *folder_run(image_folder, *SEVERAL, *more)]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_kill_and_resume_is_bitwise_equal(tmp_path, image_folder, capsys):
    """20 steps = 10 + kill -9 in step 14 + the rest, mid-epoch, in two micro-batches, with rotary places."""
    straight = several(image_folder, "model.rope=true", "model.hidden_size=16", "train.accumulate=2")
    trainer = train(*straight, f"output_dir={tmp_path / 'straight'}")
    assert "24 of 8 × 8 = 1 ranks × 2 micro-batches × 12; 12 of 16 × 8" in " ".join(capsys.readouterr().out.split())
    broken = [*straight, f"output_dir={tmp_path / 'broken'}", "data.num_workers=1"]
    result = command("", *broken, code=KILLED.format(at=13))
    assert result.returncode == -signal.SIGKILL
    resumed = command("sitfast.train", *broken[:-1], "data.num_workers=2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 10" in resumed.stdout
    assert_equal(tmp_path / "straight/checkpoint-20", tmp_path / "broken/checkpoint-20")
    assert losses(tmp_path / "straight") == losses(tmp_path / "broken")
    buckets = Buckets(trainer.cfg.data, trainer.cfg.seed)
    assert len({buckets[step] for step in range(20)}) == 4
    counts = [sum(buckets[step].images for step in range(n)) for n in range(1, 21)]
    for run in ("straight", "broken"):
        assert [r["samples"] for r in records(tmp_path / run)] == counts
        assert checkpoint.read_state(tmp_path / run / "checkpoint-20")["samples"] == counts[-1]


def run(overrides: list[str]) -> None:
    train(*overrides)


@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (3, "fsdp")])
def test_any_number_of_ranks_is_the_same_run(ranks, tmp_path, image_folder, size, strategy):
    one = several(image_folder, "train.steps=8", "checkpoint.every=4")
    train(*one, f"output_dir={tmp_path / 'one'}")
    many = [*one, f"output_dir={tmp_path / 'many'}"]
    ranks(size, run, [*many, "train.steps=4", f"parallel.strategy={strategy}"])
    train(*many)  # and goes on alone
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    samples = [[r["samples"] for r in records(tmp_path / name)] for name in ("one", "many")]
    assert samples[0] == samples[1]


def test_through_a_vae(tmp_path, image_folder):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    small = several(image_folder, f"vae.id={tmp_path / 'vae'}", "model.patch_size=2", "train.steps=6")
    assert train(*small, f"output_dir={tmp_path / 'run'}").step == 6
    assert all(0.1 < loss < 10 for loss in losses(tmp_path / "run").values())
    message = r"data.resolutions: 8 × 18: 18 is not divisible by 4, the pixels of a patch of 2 behind .*; try 16 or 20"
    with pytest.raises(SitfastError, match=message):
        train(*small, "data.resolutions=[[8,8],[8,18]]", f"output_dir={tmp_path / 'b'}")


def test_samples_of_another_size(tmp_path, image_folder):
    train(*several(image_folder, "train.steps=2", f"output_dir={tmp_path / 'run'}"))
    restored = sample.Restored(str(tmp_path / "run"), ema=True, device="cpu", overrides=["sample.size=[16,8]"])
    assert restored.generate(torch.tensor([0, 1]), seed=0).shape == (2, 3, 16, 8)
    restored = sample.Restored(str(tmp_path / "run"), ema=True, device="cpu", overrides=["sample.size=[16,9]"])
    with pytest.raises(SitfastError, match=r"sample.size=\[16, 9\] is not divisible by 4, .*; try \[16, 8\]"):
        restored.generate(torch.tensor([0]), seed=0)


def test_compiled_blocks_have_code_for_each_size(tmp_path, image_folder, monkeypatch):
    """A graph for each number of images and tokens (16 × 8 and 8 × 16 share theirs), first block and others; same losses."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        assert all(isinstance(side, int) for shape in graphs[-1] for side in shape)  # no symbols
        return graph.forward

    one = several(image_folder, "train.steps=16", "checkpoint.every=16")
    train(*one, f"output_dir={tmp_path / 'eager'}")
    torch._dynamo.reset()
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend=backend, fullgraph=True))
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True, recompile_limit=8):  # and back to what they were
        train(*one, "train.compile=true", f"output_dir={tmp_path / 'compiled'}")
    torch._dynamo.reset()
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    assert len(graphs) == 2 * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.resolutions=[[8,8],[10,8]]"], "data.resolutions: 10 × 8: 10 is not divisible by 4"),
        (["data.resolutions=[[8]]"], "data.resolutions"),
        (["data.resolutions=[[8,0]]"], "must be at least 1"),
        (["data.resolutions=[[64,64]]"], "has no room for data.batch_multiple=6 images of 64 × 64"),
        (["train.accumulate=4"], r"has 6 images, .* train.accumulate=4; use data.batch_multiple=12"),
        (["data.source=latents", "vae.id=x"], "data.resolutions=.*: cached latents have one size"),
        (["data.decoder=dali"], "DALI decodes to one size"),
        (["data.source=digits", "data.flip=false", "model.num_classes=10"], "the digits are 8 x 8"),
        (["model.rope_grid=4"], "model.rope_grid=4 with model.rope=false"),
    ],
)
def test_what_cannot_be(tmp_path, image_folder, overrides, message):
    with pytest.raises(SitfastError, match=message):
        train(*several(image_folder, *overrides, f"output_dir={tmp_path / 'run'}"))


def test_commands_that_measure_one_size_say_so(image_folder):
    cfg = config.load(None, several(image_folder))
    with pytest.raises(SitfastError, match="sitfast.profile measures images of one size; use data.resolutions="):
        config.one_stage(cfg, "sitfast.profile")


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [[], ["train.accumulate=2"], ["train.precision=fp16"], ["train.compile=true"]])
def test_each_size_has_its_recording(tmp_path, image_folder, settings):
    """The bits of the run that records nothing, while some sizes are recorded and others still warm up."""
    from tests.conftest import tensors

    wide = [
        "model.hidden_size=768",
        "model.num_heads=12",
        "train.device=cuda",
        "train.precision=bf16",
        "train.steps=40",
    ]
    made = {}
    for graph in ("false", "true"):
        folder = tmp_path / graph
        one = several(image_folder, *wide, "train.compile=false", *settings, f"train.cuda_graph={graph}")
        cfg = config.load(None, [*one, "checkpoint.every=40", f"output_dir={folder}"])
        with parallel.start(cfg) as world:
            trainer = Trainer(cfg, world)
            trainer.run()
            if trainer.recorded:
                assert len(trainer.recorded._graphs) == 4 * (1 + ("train.accumulate=2" in settings))
        made[graph] = tensors(folder / "checkpoint-40")
        del trainer
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    for key, value in made["false"].items():
        assert torch.equal(made["true"][key], value), key
