import threading

import pytest
import torch

from sitfast.kernels import dispatch, layernorm_modulate, use_reference

CPU = torch.device("cpu")


def twice(x):
    return x * 2


def thrice(x):
    return x * 3


def test_kernel_of_the_device_runs_and_reference_elsewhere():
    assert dispatch.choose(CPU, twice, cpu=thrice) is thrice
    assert dispatch.choose(CPU, twice, cuda=thrice) is twice
    assert dispatch.choose(CPU, twice) is twice


def test_use_reference_nests_and_survives_exceptions():
    with use_reference():
        with use_reference():
            assert dispatch.choose(CPU, twice, cpu=thrice) is twice
        assert dispatch.choose(CPU, twice, cpu=thrice) is twice
    assert dispatch.choose(CPU, twice, cpu=thrice) is thrice
    with pytest.raises(RuntimeError), use_reference():
        raise RuntimeError
    assert dispatch.choose(CPU, twice, cpu=thrice) is thrice


def test_use_reference_reaches_other_threads():
    """The recomputation of a checkpointed block runs in autograd's thread and must choose as the forward pass did."""
    chosen = []
    with use_reference():
        thread = threading.Thread(target=lambda: chosen.append(dispatch.choose(CPU, twice, cpu=thrice)))
        thread.start()
        thread.join()
    assert chosen == [twice]


def test_compiled_code_follows_use_reference():
    @torch.compile(fullgraph=True, backend="eager")
    def run(x):
        return dispatch.choose(x.device, twice, cpu=thrice)(x)

    x = torch.ones(2)
    assert run(x).tolist() == [3, 3]
    with use_reference():
        assert run(x).tolist() == [2, 2]
    assert run(x).tolist() == [3, 3]


def test_compute_dtype():
    x = torch.zeros(1)
    assert dispatch.compute_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert dispatch.compute_dtype(x) == torch.float16
        assert dispatch.compute_dtype(x.double()) == torch.float64
        assert dispatch.compute_dtype(x.to("meta")) == torch.float32


def test_compiled_kernel_follows_autocast_and_rejects_bad_shapes():
    run = torch.compile(layernorm_modulate, fullgraph=True, backend="eager")
    x, row = torch.randn(2, 3, 8), torch.randn(2, 8)
    assert torch.equal(run(x, row, row), layernorm_modulate(x, row, row))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(x, row, row).dtype == torch.bfloat16
    with pytest.raises(Exception, match="shift has shape"):
        run(x, row[:1], row)
