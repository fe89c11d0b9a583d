"""benchmarks/gpu_data.py: figures are kept as they come, errors in their place, and the pictures have the size asked for."""

import json

from benchmarks import gpu_data
from benchmarks.gpu_data import Figure, Report


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
