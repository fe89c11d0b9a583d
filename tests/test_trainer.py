"""The trainer from outside: exact resume, signals, accumulation, ranks, non-finite numbers, bad input."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sitfast.trainer
from sitfast import checkpoint
from sitfast import train as train_command
from sitfast.errors import SitfastError
from sitfast.kernels import dispatch, mlp
from tests.conftest import assert_equal, command, folder_run, losses, tensors, train

KILLED = """
import os, signal, sys
from sitfast import train, trainer
step = trainer.Trainer.train_step
def killing(self):
    if self.step == {at}:
        self.saver.wait()  # the last save is whole, whatever the machine has to do besides
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
trainer.Trainer.train_step = killing
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("more", [[], ["train.accumulate=2", "log.every=3"]], ids=["plain", "accumulate"])
def test_kill_and_resume_is_bitwise_equal_to_an_undisturbed_run(tiny, tmp_path, image_folder, more):
    """20 steps = 10 + kill -9 in step 14 + the rest; mid-epoch (36 images, batch 8), with other numbers of workers.

    With log.every=3 the mean of steps 10 to 12 spans the checkpoint.
    """
    straight = [*tiny, *folder_run(image_folder), *more]
    train(*straight, f"output_dir={tmp_path / 'straight'}")
    broken = [*straight, f"output_dir={tmp_path / 'broken'}", "data.num_workers=1"]
    result = command("", *broken, code=KILLED.format(at=13))
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "broken/checkpoint-20").exists()
    resumed = command("sitfast.train", *broken[:-1], "data.num_workers=2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 10" in resumed.stdout
    assert_equal(tmp_path / "straight/checkpoint-20", tmp_path / "broken/checkpoint-20")
    assert losses(tmp_path / "straight") == losses(tmp_path / "broken")
    assert len(losses(tmp_path / "straight")) == (20 if not more else 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_zero(tiny, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "sitfast.train", *tiny, "train.steps=1000000", "checkpoint.every=1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 120
    while time.time() < deadline and not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    saved = checkpoint.latest(tmp_path / "run", warn=pytest.fail)
    assert saved is not None and f"stopped by {number.name} after step {checkpoint.load(saved).step}" in out


def test_accumulation_gives_the_update_of_the_big_batch(tiny, tmp_path):
    for parts in (1, 4):
        train(*tiny, "train.steps=3", f"train.accumulate={parts}", f"output_dir={tmp_path / str(parts)}")
    whole, split = (tensors(tmp_path / name / "checkpoint-3") for name in ("1", "4"))
    for key, value in whole.items():
        # fp32 sums in another order; Adam divides by √v, so tiny gradients carry their relative rounding into the weights
        torch.testing.assert_close(split[key], value, rtol=1e-4, atol=2e-6, msg=key)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-6)


def test_two_ranks_see_the_draws_of_one(tiny, tmp_path):
    """torchrun with gloo on CPUs: the same losses up to the order of summation, and one set of files."""
    one = [*tiny, "log.val_every=10", "data.val_samples=50", "train.steps=10", "sample.every=10"]
    train(*one)
    run = tmp_path / "two"
    result = command("sitfast.train", *one, f"output_dir={run}", ranks=2)
    (tmp_path / "two.log").write_text(result.stdout + result.stderr)
    assert result.returncode == 0, result.stderr
    assert losses(run) == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    assert validation(run) == pytest.approx(validation(tmp_path / "run"), rel=1e-5)
    assert (run / "samples/step-10.png").exists()


def validation(run: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {k: v for r in records if r["kind"] == "val" for k, v in r.items() if k.startswith("val_loss")}


def test_validation_and_the_sample_grid_leave_no_trace_in_the_weights(tiny, tmp_path):
    train(*tiny)
    more = ["log.val_every=3", "sample.every=4", "sample.method=sde_heun", "sample.steps=3"]
    held = ["data.val_samples=50"]
    train(*tiny, *held, f"output_dir={tmp_path / 'plain'}")
    train(*tiny, *held, *more, f"output_dir={tmp_path / 'busy'}")
    assert_equal(tmp_path / "plain/checkpoint-20", tmp_path / "busy/checkpoint-20")
    assert len(validation(tmp_path / "busy")) == 11  # ten bins and their mean


def poison(monkeypatch, at: int) -> None:
    original = sitfast.trainer.interpolant_loss
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == at else 1.0)

    monkeypatch.setattr(sitfast.trainer, "interpolant_loss", poisoned)


def test_a_nan_stops_the_run_before_the_weights_are_touched(tiny, tmp_path, monkeypatch):
    train(*tiny, "train.steps=4", f"output_dir={tmp_path / 'good'}")
    poison(monkeypatch, at=5)
    with pytest.raises(SitfastError, match="non-finite loss at step 5 on rank 0"):
        train(*tiny, "log.every=20", "checkpoint.every=7")  # found when step 7 would be saved
    assert not (tmp_path / "run/checkpoint-7").exists()
    monkeypatch.undo()


def test_a_nan_can_be_skipped_and_is_counted(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, at=5)
    trainer = train(*tiny, "optim.on_nonfinite=skip")
    assert trainer.update.skipped.item() == 1
    assert all(torch.isfinite(v).all() for v in tensors(tmp_path / "run/checkpoint-20").values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(tiny, precision):
    trainer = train(*tiny, f"train.precision={precision}", "train.steps=3")
    assert trainer.step == 3 and trainer.model.blocks[0].attn.qkv.weight.dtype == torch.float32


def test_mlp_save_reaches_every_block(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr("sitfast.layers.mlp", lambda *values, save: asked.append(save) or mlp(*values, save=save))
    train(*tiny, "train.steps=1", "train.mlp_save=both")
    assert asked == ["both"] * 2


def test_compiled_and_checkpointed_blocks_give_the_same_run(tiny, tmp_path, monkeypatch):
    """Per-block compile (traced here, not generated: no compiler is needed) and activation checkpointing change no draw."""
    train(*tiny, "train.steps=3", f"output_dir={tmp_path / 'eager'}")
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="aot_eager", fullgraph=True))
    train(*tiny, "train.steps=3", "train.compile=true", "parallel.activation_checkpoint=block")
    eager, compiled = tensors(tmp_path / "eager/checkpoint-3"), tensors(tmp_path / "run/checkpoint-3")
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=2e-6, msg=key)


def test_the_references_give_the_same_run_up_to_rounding(tiny, tmp_path, capsys):
    train(*tiny, "train.steps=3", f"output_dir={tmp_path / 'ours'}")
    assert "draws, loss and update: " in " ".join(capsys.readouterr().out.split())
    train(*tiny, "train.steps=3", "train.kernels=reference")
    assert "train.kernels=reference" in capsys.readouterr().out
    assert not dispatch._reference_only  # only inside the run
    ours, theirs = tensors(tmp_path / "ours/checkpoint-3"), tensors(tmp_path / "run/checkpoint-3")
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=2e-6, msg=key)


def test_bf16_moments_resume_bit_for_bit(tiny, tmp_path):
    half = [*tiny, "optim.moments=bf16"]
    train(*half, f"output_dir={tmp_path / 'straight'}")
    train(*half, "train.steps=10")
    train(*half)
    assert_equal(tmp_path / "straight/checkpoint-20", tmp_path / "run/checkpoint-20")
    moments = [v for k, v in tensors(tmp_path / "run/checkpoint-20").items() if ":exp_avg" in k]
    assert moments and all(v.dtype == torch.bfloat16 for v in moments)


def test_the_run_folder_holds_the_resolved_config_and_refuses_another_run(tiny, tmp_path):
    train(*tiny, "train.steps=2")
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-2"):
        text = (folder / "config.yaml").read_text()
        assert "hidden_size: 16" in text and "weight_decay: 0.0" in text
    with pytest.raises(SitfastError, match=r"holds another run \(optim.lr: 0.001 → 0.5\)"):
        train(*tiny, "optim.lr=0.5")
    assert train(*tiny, "train.steps=4", "log.every=2").step == 4  # what may change does not count


def test_a_finished_run_trains_no_further(tiny, capsys):
    train(*tiny, "train.steps=3")
    capsys.readouterr()
    assert train(*tiny, "train.steps=3").step == 3
    assert "all 3 steps are done" in capsys.readouterr().out


def test_keep_last_and_newest_valid(tiny, tmp_path, capsys):
    train(*tiny, "checkpoint.every=4", "checkpoint.keep=2")
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-20"]
    torn = run / "checkpoint-20/model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-5])
    trainer = train(*tiny, "checkpoint.every=4", "train.steps=24")
    assert "resumed after step 16" in capsys.readouterr().out.replace("│", "") and trainer.step == 24


def test_training_starts_from_given_weights(tiny, tmp_path):
    train(*tiny, "train.steps=2")
    weights = tmp_path / "run/checkpoint-2"
    started = train(
        *tiny, "train.steps=1", f"model.init_from={weights}", "optim.lr=1e-12", f"output_dir={tmp_path / 'b'}"
    )
    before = checkpoint.find_weights(weights)
    for name, value in started.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)


def test_weights_of_another_resolution_start_a_run(tiny, tmp_path, image_folder):
    small = [*tiny, *folder_run(image_folder), "train.steps=1"]
    train(*small)
    large = [*small, "data.image_size=16", f"model.init_from={tmp_path / 'run'}", "optim.lr=1e-12"]
    trainer = train(*large, f"output_dir={tmp_path / 'large'}")
    before, after = checkpoint.find_weights(tmp_path / "run"), trainer.model.state_dict()
    assert before["pos_embed"].shape == (1, 4, 16) and after["pos_embed"].shape == (1, 16, 16)
    corners = torch.nn.functional.interpolate(
        before["pos_embed"].view(1, 2, 2, 16).permute(0, 3, 1, 2), size=4, mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(after["pos_embed"].view(1, 4, 4, 16).permute(0, 3, 1, 2), corners)
    torch.testing.assert_close(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=folder", "data.path=absent"], "absent"),
        (["data.source=folder", "data.path=EMPTY"], "empty"),
        (["model.num_classes=2", "data.source=folder", "data.path=IMAGES"], "use model.num_classes=3"),
        (["model.patch_size=3"], "data.image_size=8 is not divisible by 3, the pixels of a patch of 3; try 6 or 9"),
        (["model.init_from=absent.safetensors"], "absent.safetensors"),
        (["model.num_heads=3"], "num_heads=3"),
        (["train.device=cuda"], "sees no GPU"),
        (["train.precision=tf32"], "train.precision=tf32 needs a GPU"),
    ],
)
def test_bad_input_is_one_clear_line(tiny, tmp_path, image_folder, overrides, message):
    (tmp_path / "empty").mkdir()
    named = {"absent": str(tmp_path / "absent"), "EMPTY": str(tmp_path / "empty"), "IMAGES": str(image_folder)}
    filled = [o.partition("=")[0] + "=" + named.get(o.partition("=")[2], o.partition("=")[2]) for o in overrides]
    if "train.device=cuda" in overrides and torch.cuda.is_available():
        filled = ["train.device=mps"]
        message = "train.device"
    with pytest.raises(SitfastError) as caught:
        train(*tiny, *filled)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_that_vae_and_patch_do_not_divide(tiny, tmp_path, image_folder):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    run = [*tiny, *folder_run(image_folder), f"vae.id={tmp_path / 'vae'}", "train.steps=1", "data.image_size=8"]
    assert train(*run, "model.patch_size=2").model.in_channels == 4
    message = "data.image_size=8 is not divisible by 6, the pixels of a patch of 3 behind a VAE that shrinks 2 times; try 6 or 12"
    with pytest.raises(SitfastError, match=message):
        train(*run, "model.patch_size=3", f"output_dir={tmp_path / 'b'}")
    with pytest.raises(SitfastError, match=r"data\.image_size=9 .*2"):
        train(*run, "data.image_size=9", f"output_dir={tmp_path / 'c'}")


def test_weights_of_another_shape_or_a_truncated_file(tiny, tmp_path):
    train(*tiny, "train.steps=1")
    model = tmp_path / "run/checkpoint-1/model.safetensors"
    with pytest.raises(SitfastError, match="has shape"):
        train(*tiny, "model.hidden_size=24", f"model.init_from={model}", f"output_dir={tmp_path / 'b'}")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(SitfastError, match=r"cut\.safetensors"):
        train(*tiny, f"model.init_from={cut}", f"output_dir={tmp_path / 'c'}")


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    train(*tiny, "train.steps=10")
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SitfastError, match="free"):
        train(*tiny)
    assert checkpoint.latest(tmp_path / "run", warn=pytest.fail) == tmp_path / "run/checkpoint-10"


def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    result = command("sitfast.train", "data.path=absent", f"output_dir={tmp_path}", "optim.lr=-1", "vae.id=null")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: optim.lr=-1 must be above 0")


def test_unreadable_images_are_counted_in_the_log(tiny, tmp_path, image_folder, capsys):
    (image_folder / "class0/0.png").write_bytes(b"not an image")
    train(*tiny, *folder_run(image_folder, "data.max_unreadable=0.1"), "train.steps=6")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["unreadable"] == 1
    assert "class0" in (tmp_path / "run/quarantine.txt").read_text()
    assert "unreadable 1" in capsys.readouterr().out


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit):
        train_command.main(["--help"])
    assert "checkpoint.every=10000" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_host_synchronisation_between_logging_steps(tiny, image_folder, strategy):
    """CUDA raises on any call that makes the host wait for the device."""
    from sitfast import config, parallel

    run = [*tiny, *folder_run(image_folder), "train.device=cuda", "train.precision=bf16", "optim.clip_norm=1.0"]
    run.append(f"parallel.strategy={strategy}")
    cfg = config.load(None, run)
    with parallel.start(cfg) as world:
        trainer = sitfast.trainer.Trainer(cfg, world)
        trainer._begin_window()
        for _ in range(3):
            trainer.train_step()  # compiles, allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            trainer.close()
