import pytest
import torch

from benchmarks import harness, results


def case(function):
    return harness.Case(
        kernel="square",
        width=8,
        tokens=256,
        function=function,
        draw=lambda: (torch.randn(16, 8, device=harness.DEVICE),),
        forward=harness.Work(bytes=2_000, flops=0),
        backward=harness.Work(bytes=3_000, flops=0),
        bound="bytes",
    )


class Wrong(torch.autograd.Function):
    """x², with a gradient that is 1 % off."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.02 * ctx.saved_tensors[0]


def unwritten(x):
    return x * x + 0 * torch.empty_like(x)


def drifting(x):
    drifting.calls += 1
    return x * x * (1 + 2.0**-22 * (drifting.calls % 2))


drifting.calls = 0


def test_only_a_correct_kernel_is_timed():
    square = case(lambda x: x * x)
    assert harness.failure(lambda x: x * x, square) is None
    assert "result 1 is off" in harness.failure(Wrong.apply, square)
    assert "result 0 is off by nan" in harness.failure(unwritten, square)


def test_results_that_change_from_run_to_run_are_refused():
    # 2^-22 of the value is within the allowed error of 1e-6 of it, so that only the comparison of the bits can see it
    assert "differs from run to run" in harness.failure(drifting, case(lambda x: x * x))


@pytest.mark.parametrize("direction, rate", [("forward", 2e-3), ("backward", 3e-3)])
def test_rates_count_the_bytes_of_the_direction(direction, rate):
    figures = harness.figures(case(None), direction, 1e-3, {"bytes": 4e6, "flops": 1.0})
    assert figures["rate"] == pytest.approx(rate)
    assert figures["unit"] == "GB/s"
    assert figures["percent_of_ceiling"] == pytest.approx(rate / 4e-3 * 100)


def test_a_measurement_calls_the_direction_it_names():
    calls = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            calls.append("backward")
            return grad

    samples = harness.measure(Watched.apply, case(Watched.apply), "forward", harness.Timer())
    assert len(samples) == harness.REPEATS
    assert all(sample > 0 for sample in samples)
    assert "backward" not in calls
    harness.measure(Watched.apply, case(Watched.apply), "backward", harness.Timer())
    assert calls.count("backward") >= harness.REPEATS


def entry(width, direction, **columns):
    return {
        "extra_info": {
            "kernel": "square",
            "direction": direction,
            "D": width,
            "N": 256,
            "B": 128,
            "median_us": 123.45,
            "rate": 2718.3,
            "unit": "GB/s",
            "percent_of_ceiling": 90.04,
            "ceilings": {"copy_GBs": 3020.4, "gemm_TFLOPs": 798.2},
            **columns,
        }
    }


def run(cpu_figures):
    machine = {"device": "NVIDIA H100", "dtype": "bfloat16", "torch": "2.11", "cuda": "13.0", "triton": "3.6"}
    machine |= {"command": "pytest benchmarks --benchmark-only", "cpu_figures": cpu_figures}
    return {
        "machine_info": {"sitfast": machine, "python_version": "3.12.3"},
        "commit_info": {"id": "abc123", "dirty": True},
        "datetime": "2026-01-02T03:04:05.678",
        "benchmarks": [
            entry(1152, "forward", x_eager=4.0, x_compile=0.8),
            entry(384, "forward", x_eager=5.0, x_compile=1.25, x_liger=1.5),
        ],
    }


def test_page_names_its_origin_and_the_cases_that_lose():
    page = results.page(run(cpu_figures=False))
    for fact in ("NVIDIA H100", "torch 2.11", "CUDA 13.0", "Triton 3.6", "Python 3.12.3", "abc123 with local changes"):
        assert fact in page
    rows = [line for line in page.splitlines() if line.startswith("| ") and "GB/s" in line]
    assert rows == [
        "| 384 | 256 | 128 | 123.5 | 2718 GB/s | 90.0 | 5.00 | 1.25 | 1.50 |",
        "| 1152 | 256 | 128 | 123.5 | 2718 GB/s | 90.0 | 4.00 | 0.80 | - |",
    ]
    assert "- square forward, D = 1152, N = 256: 0.80 ×" in page
    assert "CPU figures" not in page
    assert "CPU figures" in results.page(run(cpu_figures=True))
