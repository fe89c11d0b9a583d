"""The command on a CPU, end to end, and the arithmetic of its roofline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sitfast import config
from sitfast.errors import SitfastError
from sitfast.model import build_model, forward_macs
from sitfast.profile import main, needs, table
from tests.conftest import TINY, command, train

ROOT = Path(__file__).resolve().parents[1]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_digits_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "profile"
    config_file = str(ROOT / "configs" / "digits.yaml")
    done = command("sitfast.profile", "--config", config_file, "--steps=2", "data.batch_size=16", f"output_dir={out}")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "profile.txt", "profile_trace.json"]
    found = json.loads((out / "profile.json").read_text())
    assert (found["device"], found["mfu"], found["limits"]) == ("CPU", None, {})
    assert {"GEMM", "attention", "update", "copies, elementwise"} <= found["kinds"].keys()
    parts = sum(kind["ms"] for kind in found["kinds"].values())
    assert parts - found["overlap_ms"] + found["gaps_ms"] == pytest.approx(found["profiled_ms"])
    assert found["images_per_s"] == pytest.approx(16e3 / found["step_ms"])
    kernels = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert kernels["aten::_scaled_dot_product_flash_attention_for_cpu"]["calls"] == 4  # of one step
    assert set(found["host_ms"]) == {"data", "encode", "interpolate", "forward", "backward", "clip_optimizer_ema"}
    names = [event["name"] for event in json.loads((out / "profile_trace.json").read_text())["traceEvents"]]
    assert names.count("forward") == names.count("block 0") == names.count("block 3") == 2  # the profiled steps alone
    shown = done.stdout[done.stdout.index("SiT, fp32, 16 images") :]
    assert "figures of a CPU" in shown and str(out) in shown and "roofline" not in shown and "MFU" not in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    assert len((out / "profile.txt").read_text().splitlines()) > len(shown.splitlines())  # all operators


def test_run_folder_is_left_alone(tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train(*tiny, "train.steps=10")
    run = tmp_path / "run"
    before = contents(run)
    assert main(["--steps=1", "--warmup=5", *tiny, "log.tensorboard=true", "profile.start=1", "profile.stop=9"]) == 0
    after = contents(run)
    new = {path.name for path in after.keys() - before.keys()}
    assert new == {"profile.json", "profile.txt", "profile_trace.json"}
    assert {path: after[path] for path in before} == before
    assert "resumed" not in capsys.readouterr().out


def test_new_folder_unless_one_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["--steps=1", "--warmup=5", *TINY]) == 0
    (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith("sitfast-")]  # the run's own is deleted
    assert folder.name.startswith("sitfast-profile-") and (folder / "profile.json").is_file()
    assert str(folder) in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_two_ranks(tmp_path: Path, tiny: list[str]) -> None:
    done = command("sitfast.profile", "--steps=1", "--warmup=5", *tiny, "parallel.timeout_s=60", ranks=2)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert found["ranks"] == 2 and found["kinds"]["communication"]["calls"] >= 1
    assert done.stdout.count("2 × CPU, torch") == 1
    assert found["kinds"]["GEMM"]["flops"] < 6 * 8 * 1e6  # of this rank's 4 images; see `needs`


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps=0 is too few; use 1 or more"),
        (["--warmup=4"], "--warmup=4 is too few; use 5 or more"),
        (["optim.rate=1"], "optim.rate"),
        (["--config", "absent.yaml"], "config file absent.yaml cannot be read"),
        ([*TINY, "data.source=folder", "data.path=/absent"], "/absent"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(SitfastError, match=message):
        main(arguments)


def trainer_of(*overrides: str, copied: bool = True, ranks: int = 1) -> Any:
    """What `needs` reads of a Trainer of SiT-XL/2 at 256 px, without its weights."""
    cfg = config.load(None, ["data.path=x", "data.batch_size=128", *overrides])
    with torch.device("meta"):
        model = build_model(cfg.model.preset)
    dtype = {"bf16": torch.bfloat16, "fp32": None}[cfg.train.precision]
    return SimpleNamespace(
        cfg=cfg,
        model=model,
        macs=forward_macs(model),
        copy=object() if copied else None,
        mesh=None,
        draw={"dtype": dtype},
        world=SimpleNamespace(size=ranks),
    )


LEARNED = 675_129_632 - 256 * 1152  # all but the position embedding
UNIT = 128 * 256 * 1152 * 2  # bytes of one [B, N, D] in bf16


def test_flops_needed() -> None:
    found = needs(trainer_of(), set())
    attention = 128 * 28 * 16 * 2 * (2 * 256 * 256 * 72) * 3  # blocks, heads, q kᵀ and p v; backward is twice forward
    assert found["attention"] == ("flops", attention)
    assert found["GEMM"][1] + attention == pytest.approx(128 * 6 * 118.62e9, rel=1e-3)
    assert needs(trainer_of(ranks=4), set())["attention"][1] == attention / 4


@pytest.mark.parametrize(
    ("overrides", "copied", "ranks", "per_parameter"),
    [
        ((), True, 1, 2 + (8 + 8 + 8 + 2 + 8 + 2)),  # norm; p, m, v, g, ema, copy
        (("train.accumulate=2",), True, 1, 4 + (8 + 8 + 8 + 4 + 8 + 2)),
        ((), True, 2, 4 + (8 + 8 + 8 + 4 + 8 + 2)),
        ((), False, 1, 4 + (8 + 8 + 8 + 4 + 8)),
        (("optim.moments=bf16", "ema.decays=[0.9,0.99]"), False, 1, 4 + (8 + 4 + 4 + 4 + 16)),
    ],
)
def test_bytes_of_an_update(overrides: tuple[str, ...], copied: bool, ranks: int, per_parameter: int) -> None:
    found = needs(trainer_of(*overrides, copied=copied, ranks=ranks), set())
    assert found["update"] == ("bytes", LEARNED * per_parameter)


def test_bytes_of_fused_kernels() -> None:
    """In units of one [B, N, D] in bf16; of 57 norms one has no residual before it."""
    norms = {"layernorm_forward_kernel", "layernorm_backward_kernel", "sum_chunks_kernel", "nvjet_a"}
    assert needs(trainer_of(), norms)["fused"][1] == (2 + 56 * 4 + 3 + 56 * 6) * UNIT
    wide = needs(trainer_of("train.residual=fp32", copied=False), norms)["fused"][1]
    assert wide == (3 + 56 * 6 + 5 + 56 * 9) * UNIT  # the stream is fp32: x counts twice
    assert needs(trainer_of(), {"_forward_kernel"})["fused"][1] == 28 * 4 * 2 * UNIT
    assert needs(trainer_of(), {"_backward_kernel"})["fused"][1] == 28 * 4 * 4 * UNIT
    assert needs(trainer_of("train.mlp_save=both"), {"_backward_kernel"})["fused"][1] == 28 * 4 * 3 * UNIT
    assert (
        needs(trainer_of(), {"qk_norm_rope_forward_kernel", "qk_norm_rope_backward_kernel"})["fused"][1]
        == 28 * 14 * UNIT
    )


def test_table_of_a_gpu() -> None:
    found = {
        "device": "NVIDIA H100 80GB HBM3",
        "ranks": 8,
        "torch": "2.11.0+cu130",
        "model": "SiT-XL/2",
        "precision": "bf16",
        "batch_size": 1024,
        "cuda_graph": True,
        "step_ms": 200.0,
        "images_per_s": 5120.0,
        "mfu": 0.46,
        "limits": {"flops": 800e12, "bytes": 3.02e12},
        "profiled_ms": 201.0,
        "gaps_ms": 4.0,
        "overlap_ms": 3.0,
        "kinds": {
            "GEMM": {"ms": 160.0, "share": 160 / 201, "calls": 500.0, "flops": 1e14, "of_roofline": 0.78125},
            "update": {"ms": 40.0, "share": 40 / 201, "calls": 4.0, "bytes": 1e11, "of_roofline": 0.8278},
        },
        "host_ms": {"data": 0.4},
        "kernels": [{"name": "void k<" + "x" * 90 + ">", "kind": "GEMM", "ms": 160.0, "calls": 500.0}],
    }
    lines = table(found).splitlines()
    assert max(map(len, lines)) == 80
    assert [
        re.sub(" +", " ", line) for line in lines if line.startswith(("GEMM", "update", "at the", "gaps", "step"))
    ] == [
        "GEMM 160.00 79.6% 500 78% of 800 TFLOP/s",
        "update 40.00 19.9% 4 83% of 3.02 TB/s",
        "at the same time -3.00 -1.5%",
        "gaps 4.00 2.0%",
        "step 201.00 100.0%",
    ]
    assert "200.00 ms a step, 5120.0 images/s, MFU 46.0%" in table(found)
    assert "x" * 90 in table(found, None)
