"""The build: what it finds, what it says when it fails, that the operators are registered, and what nvcc makes of them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sitfast import builder
from sitfast.kernels import extension

OPERATORS = ("interpolate", "interpolant_loss", "interpolant_loss_backward", "gradient_norm", "adamw_ema_")
# sm_90a, by kernel: registers at most. 64 keep 32 warps of a multiprocessor's 64 resident.
REGISTERS = {"interpolate_kernel": 64, "loss_kernel": 40, "scale_kernel": 40, "square_kernel": 40, "update_kernel": 80}


def test_the_operators_are_built_and_registered_where_there_is_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    loaded = extension.load()
    assert "cpu" in loaded.kinds, loaded.missing
    for name in OPERATORS:
        operator = getattr(torch.ops.sitfast, name).default
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CUDA") == ("cuda" in loaded.kinds)
    assert extension.describe(torch.device("cpu")) == "C++"


@pytest.mark.gpu
def test_the_cuda_operators_are_built_on_a_machine_with_a_gpu():
    if builder.find_nvcc() is None:
        pytest.skip("no nvcc")
    assert "cuda" in extension.load().kinds, extension.load().missing
    assert extension.describe(torch.device("cuda")) == "CUDA"


def test_stale_and_missing_libraries_are_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "PACKAGE", tmp_path / "sitfast")
    (tmp_path / "sitfast").mkdir()
    load = extension.load.__wrapped__
    assert load().kinds == () and "not built; python -m sitfast.build" in load().missing["cpu"]
    shutil.copytree(Path(__file__).parents[2] / "csrc", tmp_path / "csrc")
    (tmp_path / "sitfast/_operators.json").write_text(json.dumps({"sources": "other", "cuda": None}))
    assert load().kinds == () and "older than csrc/" in load().missing["cuda"]
    about = {"sources": builder.fingerprint(tmp_path / "csrc"), "cuda": None}
    (tmp_path / "sitfast/_operators.json").write_text(json.dumps(about))
    (tmp_path / "sitfast/_operators_cpu.so").write_text("no library")
    assert load().kinds == () and "cannot be loaded" in load().missing["cpu"]


def test_a_build_that_cannot_be_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(builder.BuildError, match=r"no C\+\+ compiler \(no-such-compiler\); install one"):
        builder.build(tmp_path)
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("SITFAST_BUILD_CUDA", "0")
    with pytest.raises(builder.BuildError, match="false failed"):
        builder.build(tmp_path)
    monkeypatch.setenv("SITFAST_BUILD_CUDA", "yes")
    with pytest.raises(builder.BuildError, match="must be 0 or 1"):
        builder.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_asking_for_cuda_without_it_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text("__version__ = '2.11.0+cpu'\ncuda: Optional[str] = None\n")
    monkeypatch.setenv("SITFAST_BUILD_CUDA", "1")
    with pytest.raises(builder.BuildError, match="built without CUDA"):
        builder.wants_cuda(tmp_path)
    monkeypatch.delenv("SITFAST_BUILD_CUDA")
    assert not builder.wants_cuda(tmp_path)
    (tmp_path / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert builder.cuda_version(tmp_path) == "13.0"
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    assert not builder.wants_cuda(tmp_path)
    monkeypatch.setenv("SITFAST_BUILD_CUDA", "1")
    with pytest.raises(builder.BuildError, match="no nvcc"):
        builder.wants_cuda(tmp_path)


@pytest.mark.skipif(builder.find_nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(path.name for path in builder.csrc().glob("*.cu")))
def test_kernels_compile_for_hopper_without_spills(source, tmp_path):
    options = ("-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v")
    command = builder.compile_command(builder.csrc() / source, tmp_path / "object.o", builder.find_torch(), options)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.DOTALL
    )
    assert found
    for name, spilled, registers in found:
        limit = next((most for kernel, most in REGISTERS.items() if kernel in name), 64)
        assert int(spilled) == 0 and int(registers) <= limit, f"{name}: {registers} registers, {spilled} bytes spilled"
