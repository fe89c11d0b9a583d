"""benchmarks/gpu_data.py: figures are kept as they come, errors in their place, and the pictures have the size asked for."""

import json

import pytest
import torch

from benchmarks import gpu_data, vae_variants
from benchmarks.gpu_data import Figure, Report
from benchmarks.vae_variants import attend_by_products, normalize_by_channels
from tests.test_vae import images, tiny


def test_figures_and_errors_are_kept_as_they_come(tmp_path, capsys):
    path = tmp_path / "figures.json"
    Report(path, "vae")("first", lambda: Figure(1234.5, "images/s", "fast"))
    Report(path, "dali")("second", lambda: Figure(1 / 0, "images/s"))
    assert json.loads(path.read_text())["figures"] == [
        {"part": "vae", "name": "first", "value": 1234.5, "unit": "images/s", "note": "fast"},
        {"part": "dali", "name": "second", "error": "ZeroDivisionError: division by zero"},
    ]
    out = capsys.readouterr().out.splitlines()
    assert "1,234 images/s" in out[0] and "ZeroDivisionError" in out[1]


def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_data, "photographs", lambda folder: None)
    monkeypatch.setattr(gpu_data, "GRACE", 0)
    monkeypatch.setattr(gpu_data, "START", gpu_data.time.monotonic())
    code = "import sys, time; time.sleep(60 if sys.argv[1] == 'vae' else 0); sys.exit(sys.argv[1] == 'dali')"
    original, begun = gpu_data.subprocess.Popen, []

    def begin(command, **settings):
        begun.append(command[3])
        return original([command[0], "-c", code, *command[3:]], **settings)

    monkeypatch.setattr(gpu_data.subprocess, "Popen", begin)
    monkeypatch.setattr(gpu_data, "SHARES", {"vae": 1, "dali": 3, "train": 3, "latents": 3})
    gpu_data.run_all(70, tmp_path / "figures.json", tmp_path / "images")
    assert begun == ["vae", "dali", "train", "latents"]
    assert "vae is ended" in capsys.readouterr().out


def test_pictures_are_as_large_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_data, "PICTURES", {3: (80, 60)})
    monkeypatch.setattr(gpu_data, "NUM_FILES", 130)
    gpu_data.photographs(tmp_path)
    files = sorted((tmp_path / "3/class").iterdir())
    contents = [file.read_bytes() for file in files]
    assert len(files) == 130 and len(set(contents)) == 64 and contents[0] == contents[64]
    assert abs(sum(map(len, contents)) / 130 - 3000) < 300


@pytest.mark.parametrize("few", [4096, 0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_variant_of_the_encoder_is_the_same_function(few, memory_format, monkeypatch):
    monkeypatch.setattr(vae_variants, "_FEW_TOKENS", few)
    model = tiny().requires_grad_(False).to(memory_format=memory_format)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.normal_(0.3, 0.3)  # norms that are not the identity, and means beside zero
    x, keys = images().contiguous(memory_format=memory_format), list(model.state_dict())
    expected, expected_fp64 = model.encoder(x), model.double().encoder(x.double())
    model.float()
    for tune in (attend_by_products, normalize_by_channels):
        tune(model.encoder)
    got = model.encoder(x)
    own = (expected - expected_fp64).norm() / expected_fp64.norm()
    assert (got - expected_fp64).norm() / expected_fp64.norm() < 4 * own
    assert list(model.state_dict()) == keys
    assert not any(type(module) is torch.nn.GroupNorm for module in model.encoder.modules())
