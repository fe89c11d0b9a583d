"""The profiled window, on the CPU, ranges that cost nothing there, and where the time of a trace goes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import nvtx
import pytest
import torch
from torch import nn

from sitfast import profiling
from sitfast.config import ProfileConfig
from sitfast.profiling import Profile, Window, annotate, kind_of, named_blocks, summarize, traced


def steps(window: Window, numbers: range) -> None:
    """Steps that each run one operator of their own, so that the trace tells which were inside."""
    for step in numbers:
        window.step(step)
        with torch.profiler.record_function(f"step-{step}"):
            torch.ones(2).add(step)
    window.close()


def steps_in(path: Path) -> set[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return {event["name"] for event in events if str(event.get("name", "")).startswith("step-")}


def test_trace_holds_the_window_alone(tmp_path: Path) -> None:
    steps(Window(ProfileConfig(start=3, stop=5, trace=True), tmp_path), range(1, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    assert steps_in(tmp_path / "trace.json") == {"step-3", "step-4"}


def test_run_that_ends_or_resumes_inside(tmp_path: Path) -> None:
    profile = ProfileConfig(start=3, stop=9, trace=True)
    steps(Window(profile, tmp_path / "ends"), range(1, 5))
    assert steps_in(tmp_path / "ends" / "trace.json") == {"step-3", "step-4"}
    steps(Window(profile, tmp_path / "resumes"), range(7, 12))
    assert steps_in(tmp_path / "resumes" / "trace.json") == {"step-7", "step-8"}


@pytest.mark.parametrize(
    ("profile", "rank"),
    [
        (ProfileConfig(), 0),
        (ProfileConfig(start=2, stop=3), 0),
        (ProfileConfig(start=2, stop=3, trace=True), 1),
        (ProfileConfig(start=20, stop=30, trace=True), 0),
    ],
)
def test_nothing_is_written_otherwise(tmp_path: Path, profile: ProfileConfig, rank: int) -> None:
    steps(Window(profile, tmp_path, rank=rank), range(1, 6))
    assert not list(tmp_path.iterdir())


def test_cuda_profiler_brackets_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(profiling, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    window = Window(ProfileConfig(start=2, stop=4), tmp_path)
    for step in range(1, 7):
        window.step(step)
        calls.append(str(step))
    window.close()
    assert calls == ["1", "wait", "start", "2", "3", "wait", "stop", "4", "5", "6"]


@pytest.mark.parametrize("cuda", [True, False])
def test_ranges(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    calls: list[str] = []
    monkeypatch.setattr(profiling, "_has_cuda", lambda: cuda)
    monkeypatch.setattr(nvtx, "push_range", calls.append)
    monkeypatch.setattr(nvtx, "pop_range", lambda: calls.append("pop"))

    @annotate("outer")
    def outer(depth: int) -> int:
        with annotate("inner"):
            return outer(depth - 1) if depth else 7

    assert outer(1) == 7
    with pytest.raises(KeyError), annotate("fails"):
        raise KeyError
    once = ["outer", "inner"]
    assert calls == ([*once, *once, *["pop"] * 4, "fails", "pop"] if cuda else [])


def test_compiled_code_in_and_around(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(profiling, "_has_cuda", lambda: True)
    monkeypatch.setattr(nvtx, "push_range", pushed.append)
    monkeypatch.setattr(nvtx, "pop_range", lambda: None)

    @torch.compile(fullgraph=True, backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        with annotate("inside"):
            return x * 2

    with annotate("outside"):
        assert double(torch.tensor(3.0)).item() == 6
    assert pushed == ["outside"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.ends = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.ends[0](x)


def ranges_in(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_have_names_while_asked(tmp_path: Path, compiled: bool) -> None:
    inner, frames = Blocks(), []
    network = nn.Sequential(inner)  # as under DistributedDataParallel, one level down

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        frames.append(graph)
        return graph.forward

    blocks = inner.blocks
    if compiled:
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)
    x = torch.ones(2, 4)
    before, calls = network(x), [block._compiled_call_impl for block in blocks]
    num_frames = len(frames)
    with named_blocks(network), traced(tmp_path / "inside.json"):
        assert torch.equal(network(x), before)
    with traced(tmp_path / "outside.json"):
        network(x)
    assert ranges_in(tmp_path / "inside.json") == ["block 0", "block 1", "block 2"]
    assert ranges_in(tmp_path / "outside.json") == []
    assert [block._compiled_call_impl for block in blocks] == calls
    assert (len(frames) == num_frames) and (num_frames > 0) == compiled  # nothing was compiled again


def test_window_names_blocks_and_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextlib.contextmanager
    def emit_nvtx() -> Iterator[None]:
        calls.append("operators")
        yield
        calls.append("no operators")

    monkeypatch.setattr(profiling, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", emit_nvtx)
    monkeypatch.setattr(nvtx, "push_range", calls.append)
    monkeypatch.setattr(nvtx, "pop_range", lambda: None)
    network = Blocks()
    window = Window(ProfileConfig(start=2, stop=3, operators=True), tmp_path, network=network)
    for step in range(1, 5):
        window.step(step)
        network(torch.ones(1, 4))
        calls.append(str(step))
    blocks = ["block 0", "block 1", "block 2"]
    assert calls == ["1", "start", "operators", *blocks, "2", "no operators", "stop", "3", "4"]


def test_ranges_of_a_trace(tmp_path: Path) -> None:
    @annotate("outer")
    def outer(depth: int) -> int:
        with annotate("inner"):
            return outer(depth - 1) if depth else 7

    with traced(tmp_path / "trace.json"):
        assert outer(1) == 7
        with pytest.raises(KeyError), annotate("fails"):
            raise KeyError
    assert ranges_in(tmp_path / "trace.json") == ["outer", "inner", "outer", "inner", "fails"]
    with pytest.raises(KeyError), traced(tmp_path / "none.json"):
        raise KeyError
    assert not annotate.traced


KERNELS = {
    "GEMM": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN",
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(cutlass::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, false, false>()",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false>(float)",
        "gemm_gelu_kernel",
        "dgelu_kernel",
        "triton_tem_fused_addmm_3",
        "aten::addmm",
        "aten::mm",
        "aten::bmm",
    ],
    "attention": [
        "forward_kernel",
        "backward_kernel",
        "single_kernel",
        "queries_kernel",
        "keys_kernel",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x64x128_1x4x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, __nv_bfloat16, 128, 256>(__nv_bfloat16*)",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4, false, false, cutlass::bfloat16_t>>()",
        "void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<96, 64, 128, 8>>(Flash_bwd_params)",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>()",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "triton_tem_fused_flex_attention_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "ScaledDotProductFlashAttentionForCpuBackward0",
    ],
    "fused": [
        "layernorm_forward_kernel",
        "layernorm_backward_kernel",
        "sum_chunks_kernel",
        "sum_samples_kernel",
        "qk_norm_rope_forward_kernel",
        "qk_norm_rope_backward_kernel",
        "_forward_kernel",
        "_backward_kernel",
        "_column_sums_kernel",
        "void sitfast::(anonymous namespace)::interpolate_kernel<float, float>(sitfast::Interpolate, long)",
        "void sitfast::(anonymous namespace)::loss_kernel<__nv_bfloat16>(sitfast::Loss, float*, long)",
        "sitfast::(anonymous namespace)::finish_kernel(sitfast::Loss, float const*, long)",
        "void sitfast::(anonymous namespace)::scale_kernel<float>(sitfast::LossBackward, long)",
        "sitfast::interpolate",
        "sitfast::interpolant_loss_backward",
    ],
    "update": [
        "void sitfast::(anonymous namespace)::square_kernel<float>(sitfast::Table, float*)",
        "sitfast::(anonymous namespace)::norm_kernel(float const*, long, float*)",
        "sitfast::(anonymous namespace)::scalars_kernel(float*, sitfast::AdamW*, float*, float const*, long, sitfast::Hyper)",
        "void sitfast::(anonymous namespace)::update_kernel<float, float, 1>(sitfast::Table, sitfast::Update)",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>()",
        "sitfast::adamw_ema_",
        "sitfast::gradient_norm",
        "aten::_foreach_lerp_",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "c10d::allreduce_",
        "gloo:all_reduce",
    ],
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>(cudnn::ops::Params)",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
    ],
    "copies, elementwise": [
        "triton_poi_fused_addmm_gelu_3",
        "triton_red_fused_convolution_native_layer_norm_0",
        "triton_per_fused__scaled_dot_product_flash_attention_sum_1",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3>>(int)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float>>>()",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "TensorListMetadata<2>, at::native::(anonymous namespace)::Copy<float, c10::BFloat16>>()",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "aten::copy_",
        "aten::gelu",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_kinds(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_every_kernel_of_ours_has_its_kind() -> None:
    """Kernels that are launched from sitfast/kernels and csrc, by the names that the source gives them."""
    root, known = Path(profiling.__file__).parent, {name for names in KERNELS.values() for name in names}
    launched = {
        name for path in (root / "kernels").glob("*.py") for name in re.findall(r"\b(\w+_kernel)\[", path.read_text())
    }
    assert launched >= {"layernorm_forward_kernel", "gemm_gelu_kernel", "backward_kernel"} and launched <= known
    for path in (root.parent / "csrc").glob("*.cu"):
        names = re.findall(r"__global__.*?\b(\w+_kernel)\(", path.read_text())
        assert names
        for name in names:
            assert any(re.search(rf"sitfast::.*\b{name}\b", one) for one in known), name


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_gaps_and_overlap() -> None:
    """Two steps; times in µs, so that a kernel of 2000 µs in all takes 1 ms a step."""
    events = [
        event("aten::mm", 0, 9000, "cpu_op"),  # counts for nothing where there are kernels
        event("forward", 50, 400, "user_annotation"),
        event("forward", 4000, 800, "user_annotation"),
        event("forward", 50, 9000, "gpu_user_annotation"),
        event("block 3", 60, 9, "user_annotation"),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1, "tid": 7},
        event("nvjet_tst_a", 7000, 500),  # in any order
        event("nvjet_tst_a", 1000, 1500),
        event("Memcpy HtoD (Pinned -> Device)", 2000, 1000, "gpu_memcpy", tid=9),  # 500 of it behind the GEMM
        event("Memset (Device)", 2100, 100, "gpu_memset", tid=9),  # wholly behind both
        event("layernorm_forward_kernel", 3000, 400),  # at once: no gap
        event("layernorm_forward_kernel", 7500, 500),
    ]
    profile = summarize(events, 2)
    assert profile.gpu
    assert profile.step_ms == pytest.approx(3.5)  # 1000 to 8000
    assert profile.busy_ms == pytest.approx(1.7)  # 1000 to 3400, 7000 to 8000
    kinds = profile.kinds()
    assert list(kinds) == ["GEMM", "copies, elementwise", "fused"]
    assert [(kind.ms, kind.calls) for kind in kinds.values()] == [
        pytest.approx((1.0, 1.0)),
        pytest.approx((0.55, 1.0)),
        pytest.approx((0.45, 1.0)),
    ]
    assert profile.host == {"forward": pytest.approx(0.6)}


def test_operators_without_those_inside() -> None:
    events = [
        event("aten::linear", 0, 100, "cpu_op"),
        event("aten::addmm", 10, 60, "cpu_op"),
        event("aten::copy_", 20, 15, "cpu_op"),
        event("aten::copy_", 40, 5, "cpu_op"),
        event("aten::view", 70, 10, "cpu_op"),  # begins where addmm ends
        event("aten::add", 130, 20, "cpu_op"),
        event("aten::mul", 50, 20, "cpu_op", tid=8),  # another thread is not inside
    ]
    profile = summarize(events, 1)
    assert not profile.gpu
    own = {kernel.name: (1e3 * kernel.ms, kernel.calls) for kernel in profile.kernels}
    assert own == {
        "aten::linear": pytest.approx((30, 1)),
        "aten::addmm": pytest.approx((40, 1)),
        "aten::copy_": pytest.approx((20, 2)),
        "aten::view": pytest.approx((10, 1)),
        "aten::add": pytest.approx((20, 1)),
        "aten::mul": pytest.approx((20, 1)),
    }
    assert (profile.step_ms, profile.busy_ms) == (pytest.approx(0.15), pytest.approx(0.12))


def test_empty_trace() -> None:
    assert summarize([], 3) == Profile(gpu=False, step_ms=0.0, busy_ms=0.0, kernels=(), host={})
