"""Exit statuses and messages of the commands, in a process of their own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sitfast import cli
from sitfast.errors import SitfastError

ROOT = Path(__file__).resolve().parents[1]


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *, code: int | None = None) -> int:
    """The exit status of a command whose main raises `error` or returns `code`."""
    monkeypatch.setattr(sys, "argv", ["verb"])

    def main(argv: list[str]) -> int | None:
        if error is not None:
            raise error
        return code

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code  # pyright: ignore[reportReturnType]


def process(body: str, *, shell_tail: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script that ends with `cli.run(main)`, perhaps into a pipe."""
    script = f"from sitfast import cli\nfrom sitfast.errors import SitfastError\n{body}\ncli.run(main)\n"
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | env
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {shell_tail}', sys.executable, script]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)


def test_status_of_success(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(monkeypatch, None) == 0
    assert ended(monkeypatch, None, code=3) == 3


def test_one_line_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert ended(monkeypatch, SitfastError("a=1 is too small\n\nb=2 is too large\n")) == 2
    assert capsys.readouterr().err == "error: a=1 is too small\nerror: b=2 is too large\n"


def test_rank_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert ended(monkeypatch, SitfastError("one\ntwo")) == 2
    assert capsys.readouterr().err == "rank 3: error: one\nrank 3: error: two\n"


def test_disk_errors_name_the_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert ended(monkeypatch, OSError(28, "No space left on device", "/runs/a/model.safetensors")) == 2
    assert capsys.readouterr().err == "error: /runs/a/model.safetensors: the disk is full; free some space\n"
    assert ended(monkeypatch, PermissionError(13, "Permission denied", "/data/runs")) == 2
    assert capsys.readouterr().err.startswith("error: /data/runs: permission denied; ")
    assert ended(monkeypatch, OSError(28, "No space left on device")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_other_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["verb"])

    def broken(argv: list[str]) -> int:
        raise FileNotFoundError(2, "No such file", "x")

    with pytest.raises(FileNotFoundError):
        cli.run(broken)


def test_arguments() -> None:
    parser = argparse.ArgumentParser()
    cli.add_config_arguments(parser)
    args = parser.parse_args(["--config", "a.yaml", "optim.lr=2e-4", "seed=1"])
    assert (args.config, args.overrides) == ("a.yaml", ["optim.lr=2e-4", "seed=1"])
    assert (parser.parse_args([]).config, parser.parse_args([]).overrides) == (None, [])


def test_no_traceback_in_a_real_process() -> None:
    done = process("def main(argv): raise SitfastError('data.path=x does not exist')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: data.path=x does not exist\n")


def test_bug_keeps_its_traceback() -> None:
    done = process("def main(argv): raise RuntimeError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: a bug" in done.stderr


def test_interrupt() -> None:
    # Python's own handler, which a shell that starts the tests in the background takes away
    code = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    done = process(code + "def main(argv): os.kill(os.getpid(), signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("line", ["print('x' * 99)", "console.print('x' * 99)"])
def test_reader_that_leaves(line: str) -> None:
    """`… | head -1` ends the command silently, whether it prints by itself or through rich."""
    body = f"import rich.console\nconsole = rich.console.Console()\ndef main(argv):\n  for _ in range(20000): {line}"
    done = process(body, shell_tail="| head -1")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (1, 1, "")


def test_broken_pipe_elsewhere_is_a_bug() -> None:
    done = process("import os\ndef main(argv):\n  r, w = os.pipe()\n  os.close(r)\n  os.write(w, b'x')")
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_character_that_the_terminal_lacks() -> None:
    done = process("def main(argv): print('\\u03b1 ok')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "? ok\n")


def test_error_of_a_data_worker_is_still_one_line() -> None:
    body = """
import torch
class Rows(torch.utils.data.Dataset):
  def __len__(self): return 2
  def __getitem__(self, i): raise SitfastError("row 0 is broken; remove it")
def main(argv): list(torch.utils.data.DataLoader(Rows(), num_workers=1))
"""
    done = process(body)
    assert (done.returncode, done.stderr) == (2, "error: row 0 is broken; remove it\n")
