"""The reference on the CPU; then the Triton kernel, on the GPU or, where there is none, in Triton's interpreter."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sitfast.kernels import gated_residual_layernorm_modulate
from tests.kernels.aot import compile_ahead, job
from tests.kernels.harness import DEVICE, assert_calibrated, assert_equal, poisoned_memory, run_all

module = import_module("sitfast.kernels.gated_residual")
_layernorm_triton = import_module("sitfast.kernels._layernorm_triton")

SHAPES = [(1, 3, 1152), (2, 5, 72), (3, 1, 1152), (2, 7, 6)]
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]  # of the branch and of the stream
KERNEL_SHAPES = [(1, 5, 1152), (2, 7, 48), (3, 2, 384), (2, 9, 64), (1, 1, 6)]


def formula(x, y, gate, shift, scale, bias=0.0, eps=1e-6):
    x_new = x + gate[:, None] * (y + bias)
    centred = x_new - x_new.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return x_new, centred / (variance + eps).sqrt() * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_match_the_formula_on_chunk_views(shape, assert_agrees):
    batch, _, width = shape

    def on_chunks(function):
        def run(x, y, adaln):
            gate, shift, scale = adaln.chunk(6, dim=1)[2:5]
            assert gate.stride() == (6 * width, 1)
            return function(x, y, gate, shift, scale)

        return run

    inputs = torch.randn(shape) * 2 + 1, torch.randn(shape), torch.randn(batch, 6 * width)
    assert_agrees(on_chunks(gated_residual_layernorm_modulate), on_chunks(formula), *inputs)


def test_gate_zero_passes_x_through_and_still_learns():
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24, requires_grad=True)
    gate = torch.zeros(2, 24, requires_grad=True)
    x_new, h = gated_residual_layernorm_modulate(x, y, gate, torch.randn(2, 24), torch.randn(2, 24))
    assert torch.equal(x_new, x)
    weight = torch.randn_like(x)
    dy, dgate = torch.autograd.grad((x_new * weight).sum() + 0 * h.sum(), (y, gate))
    assert dy.abs().max() == 0
    assert torch.allclose(dgate, (weight * y).sum(1), atol=1e-5)


def test_fp32_residual_stream_with_bf16_branch():
    x = torch.randn(2, 5, 1152)
    y, gate, shift, scale = (torch.randn(s).bfloat16() for s in ((2, 5, 1152), (2, 1152), (2, 1152), (2, 1152)))
    wide_x_new, wide_h = formula(*(value.double() for value in (x, y, gate, shift, scale)))
    with torch.autocast("cpu", torch.bfloat16):
        x_new, h = gated_residual_layernorm_modulate(x, y, gate, shift, scale)
    assert (x_new.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    assert (x_new - wide_x_new).abs().max() < 1e-5  # a product rounded to bf16 would be off by up to 2^-8 of it
    assert ((h.double() - wide_h).abs() <= 2.0**-8 * wide_h.abs() + 1e-5).all()


def test_bf16_residual_stream_rounds_each_output_once():
    operands = [torch.randn(s).bfloat16() for s in ((2, 5, 1152), (2, 5, 1152), (2, 1152), (2, 1152), (2, 1152))]
    wide = formula(*(value.double() for value in operands))
    for got, expected in zip(gated_residual_layernorm_modulate(*operands), wide, strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 24)}, r"x has shape \(2, 24\), expected \[B, N, D\]"),
        ({"y": torch.zeros(2, 6, 24)}, r"y has shape \(2, 6, 24\), expected \(2, 5, 24\)"),
        ({"gate": torch.zeros(2, 1, 24)}, r"gate has shape \(2, 1, 24\), expected \(2, 24\)"),
        ({"y": torch.zeros(2, 5, 24, dtype=torch.bool)}, "y is torch.bool"),
        ({"gate": torch.zeros(2, 24, device="meta")}, "gate is on meta"),
        ({"y": torch.zeros(2, 24, 5).transpose(1, 2)}, "y has last stride 5"),
    ],
)
def test_bad_operands_are_named(change, message):
    rows = {name: torch.zeros(2, 24) for name in ("gate", "shift", "scale")}
    operands = {"x": torch.zeros(2, 5, 24), "y": torch.zeros(2, 5, 24), **rows, **change}
    with pytest.raises(ValueError, match=f"gated_residual_layernorm_modulate: {message}"):
        gated_residual_layernorm_modulate(**operands)


def test_save_is_one_of_two():
    x, rows = torch.zeros(2, 5, 24), [torch.zeros(2, 24)] * 3
    with pytest.raises(ValueError, match="save='both', expected 'output' or 'input'"):
        gated_residual_layernorm_modulate(x, x, *rows, save="both")


def kernel(x, y, gate, shift, scale, bias=None, eps=1e-6, save="output"):
    return module.kernel(x, y, gate, shift, scale, bias, eps, save)


from_input = partial(kernel, save="input")


def operands(batch=2, tokens=5, width=48, dtype=torch.float32, device=DEVICE):
    """x, y, the adaLN output [B, 6·D] and the bias [D]."""
    shapes = (batch, tokens, width), (batch, tokens, width), (batch, 6 * width), (width,)
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def on_chunks(function):
    """The function of x, y and the six modulation vectors in one tensor."""

    def run(x, y, adaln, bias=None):
        gate, shift, scale = adaln.chunk(6, dim=1)[2:5]
        assert gate.stride() == (6 * x.shape[-1], 1)
        return function(x, y, gate, shift, scale, *(() if bias is None else (bias,)))

    return run


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel_matches_the_formula(shape, with_bias, assert_agrees, small_chunks):
    def moved(*inputs):
        return tuple(output.cpu() for output in on_chunks(kernel)(*(value.to(DEVICE) for value in inputs)))

    x, y, adaln, bias = operands(*shape, device="cpu")
    assert_agrees(moved, on_chunks(formula), x * 2 + 1, y, adaln, *([bias] if with_bias else []))


def plain(x, y, gate, shift, scale, bias):
    """As a model without kernels does it, in the dtypes of the inputs."""
    x_new = x + gate[:, None] * (y + bias)
    normal = torch.nn.functional.layer_norm(x_new, x.shape[-1:], eps=1e-6).to(y.dtype)
    return x_new, normal * (1 + scale[:, None]) + shift[:, None]


def assert_exact_enough(inputs, dtype, x_dtype):
    narrow = [value.to(x_dtype if i == 0 else dtype) for i, value in enumerate(inputs)]
    grads = [torch.randn(inputs[0].shape).to(DEVICE, dtype) for _ in range(2)]
    with torch.autocast(DEVICE, dtype, enabled=x_dtype != dtype):
        assert_calibrated(on_chunks(kernel), on_chunks(plain), on_chunks(formula), narrow, grads)


@pytest.mark.parametrize("dtype, x_dtype", DTYPES)
def test_kernel_is_as_exact_as_its_dtype_allows(dtype, x_dtype, small_chunks):
    assert_exact_enough(operands(2, 7, 48), dtype, x_dtype)


@pytest.mark.parametrize("used", [0, 1])
def test_kernel_with_one_output_unused(used, small_chunks):
    inputs = operands()
    weight = [torch.randn_like(inputs[0])]
    got = run_all(lambda *a: on_chunks(kernel)(*a)[used], inputs, weight)
    expected = run_all(lambda *a: on_chunks(formula)(*a)[used], [v.double() for v in inputs], weight)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 2.0**-16 * b.abs().max().clamp_min(1)


def test_kernel_takes_gradients_with_strides_of_zero(small_chunks):
    inputs, one = operands(), torch.ones(2, 5, 48, device=DEVICE)
    zero_strides = [one[0, 0, 0].expand(one.shape)] * 2
    assert_equal(run_all(on_chunks(kernel), inputs, zero_strides), run_all(on_chunks(kernel), inputs, [one, one]))


def test_kernel_takes_one_gate_for_all_samples(small_chunks):
    """A gate that is a weight, spread over the batch by a stride of zero: its gradient is the sum over the samples."""
    x, y, _, bias = operands()
    plain, gate = torch.zeros(2, 48, device=DEVICE), torch.randn(48, device=DEVICE)
    grads = [torch.randn_like(x), torch.randn_like(x)]

    def spread(function):
        return lambda x, y, gate, bias: function(x, y, gate.expand(2, 48), plain, plain, bias)

    got = run_all(spread(kernel), (x, y, gate, bias), grads)
    expected = run_all(spread(formula), [v.double() for v in (x, y, gate, bias)], grads)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 2.0**-16 * b.abs().max().clamp_min(1)


def test_kernel_with_gate_zero_passes_x_through_and_still_learns():
    x, y, adaln, bias = operands()
    adaln[:, 2 * 48 : 3 * 48] = 0
    grads = [torch.randn_like(x), torch.randn_like(x)]
    x_new, _, dx, dy, dadaln, dbias = run_all(on_chunks(kernel), (x, y, adaln, bias), grads)
    assert torch.equal(x_new, x)
    assert dy.abs().max() == 0
    assert dbias.abs().max() == 0
    dgate = dadaln.chunk(6, dim=1)[2]
    assert torch.allclose(dgate, (dx * (y + bias)).sum(1), atol=1e-5)


def test_kernel_writes_all_it_returns_and_repeats_bitwise(small_chunks):
    inputs, grads = operands(3, 5, 48), [torch.randn(3, 5, 48).to(DEVICE) for _ in range(2)]
    first = run_all(on_chunks(kernel), inputs, grads)
    with poisoned_memory():
        second = run_all(on_chunks(kernel), inputs, grads)
    assert_equal(first, second)  # NaN is not equal to itself


def assert_save_changes_no_bit(inputs, dtype, x_dtype):
    """Of outputs and gradients, where both outputs are used and where one is."""
    leaves = [value.to(x_dtype if i == 0 else dtype).requires_grad_() for i, value in enumerate(inputs)]
    with torch.autocast(DEVICE, dtype, enabled=x_dtype != dtype):
        kept, again = on_chunks(kernel)(*leaves), on_chunks(from_input)(*leaves)
    assert_equal(kept, again)
    grads = [torch.randn_like(output) for output in kept]
    for used in (slice(0, 2), slice(0, 1), slice(1, 2)):
        options = {"grad_outputs": grads[used], "retain_graph": True, "materialize_grads": True}
        expected, got = (torch.autograd.grad(outputs[used], leaves, **options) for outputs in (kept, again))
        assert sum(gradient.abs().max() > 0 for gradient in expected) == len(leaves)
        assert_equal(expected, got)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape, dtype, x_dtype",
    [(shape, torch.float32, torch.float32) for shape in KERNEL_SHAPES]
    + [((2, 7, 48), *dtypes) for dtypes in DTYPES]
    + [((1, 5, 1152), *dtypes) for dtypes in DTYPES],
)
def test_gradients_are_the_same_bits_from_either_end(shape, dtype, x_dtype, with_bias, small_chunks):
    assert_save_changes_no_bit(operands(*shape)[: 3 + with_bias], dtype, x_dtype)


@pytest.mark.parametrize("save", ["output", "input"])
def test_save_decides_which_end_is_kept(save):
    x, y, adaln, bias = (value.requires_grad_() for value in operands())
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        x_new, _ = on_chunks(partial(kernel, save=save))(x, y, adaln, bias)
    assert (x.data_ptr() in kept, x_new.data_ptr() in kept) == (save == "input", save == "output")


def test_operators_are_registered_completely():
    x, y, adaln, bias = operands(2, 3, 16)
    gate, shift, scale = adaln.chunk(6, dim=1)[2:5]
    leaves = [value.detach().requires_grad_() for value in (x, y, gate, shift, scale, bias)]
    for last in (leaves[5], None):
        for save_input in (False, True):
            torch.library.opcheck(module.forward_op, (*leaves[:5], last, 1e-6, torch.float16, save_input))
    x_new, h, mean, rstd = module.forward_op(x, y, gate, shift, scale, bias, 1e-6, torch.float32, False)
    for dx_new, dh in ((x_new, h), (None, h), (x_new, None)):
        for end, is_input in ((x_new, False), (x, True)):
            saved = (end, y, gate, scale, mean, rstd, bias)
            given = [v if v is None else v.detach() for v in (dx_new, dh, *saved)]
            torch.library.opcheck(module.backward_op, (*given, is_input))


@pytest.mark.parametrize("save", ["output", "input"])
def test_kernel_compiles_whole_and_goes_through_checkpointing(save):
    inputs, grads = operands(), [torch.randn(2, 5, 48).to(DEVICE) for _ in range(2)]
    function = on_chunks(partial(kernel, save=save))
    eager = run_all(function, inputs, grads)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(eager, run_all(compiled, inputs, grads))
    assert_equal(eager, run_all(lambda *a: checkpoint(function, *a, use_reentrant=False), inputs, grads))


def test_kernel_follows_autocast():
    x, y, adaln, bias = operands()
    with torch.autocast(DEVICE, torch.float16):
        x_new, h = on_chunks(kernel)(x, y.half(), adaln.half(), bias)
    assert (x_new.dtype, h.dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize(
    "change, message",
    [({"y": torch.float64}, "y is torch.float64 on a GPU"), ({"bias": torch.float64}, "bias is torch.float64")],
)
def test_kernel_names_what_it_does_not_take(change, message):
    shapes = {"x": (2, 5, 24), "y": (2, 5, 24), "gate": (2, 24), "shift": (2, 24), "scale": (2, 24), "bias": (24,)}
    tensors = {name: torch.zeros(shape, dtype=change.get(name)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"gated_residual_layernorm_modulate: {message}"):
        kernel(*tensors.values())


@pytest.mark.parametrize(
    "batch, tokens, residual, dtype, rows",
    [
        (128, 256, True, torch.bfloat16, 86),  # 3 chunks a sample: 384 programs on 132 · 3 = 396 places
        (128, 256, True, torch.float32, 128),  # 2: 256 programs on 264
        (128, 256, False, torch.bfloat16, 43),  # 6: 768 programs on 792
        (128, 256, False, torch.float32, 64),  # 4: 512 programs on 528
        (256, 256, True, torch.bfloat16, 86),  # 2 would be 512 programs, one wave and a third; 3 are 768 on twice 396
        (32, 1024, True, torch.bfloat16, 86),
        (1, 256, True, torch.bfloat16, 16),  # never enough programs: as many as pay
        (1, 5, True, torch.bfloat16, 5),
        (2000, 256, True, torch.bfloat16, 128),  # 4000 programs, 10.1 waves and so 11, filled to 92 %
    ],
)
def test_chunks_of_backward_fill_their_waves(batch, tokens, residual, dtype, rows, monkeypatch):
    monkeypatch.setattr(_layernorm_triton, "_multiprocessors", lambda _: 132)
    device = torch.device("cuda", 99)  # no other test may find these answers
    assert _layernorm_triton.backward_launch(batch, tokens, 1152, residual, dtype, device).rows == rows


@pytest.mark.parametrize("residual", [True, False])
def test_every_width_has_a_launch(residual):
    for width in (1, 384, 385, 1152, 1153, 8192):
        launches = [_layernorm_triton.forward_launch(width, residual)]
        for dtype in (torch.bfloat16, torch.float32):
            launches.append(_layernorm_triton.backward_launch(4, 256, width, residual, dtype, torch.device("cpu")))
        for launch in launches:
            assert launch.rows >= 1
            assert launch.warps in (1, 2, 4, 8, 16, 32)
        pieces = _layernorm_triton._pieces(width)
        assert width <= pieces["BLOCK_A"] + pieces["BLOCK_B"] < 2 * width + 1


KERNELS = "sitfast.kernels._layernorm_triton"
TYPES = {"eps": "fp32", "num_samples": "i32"}
TYPES |= dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr", "in_ptr"), "*fp32")
TYPES |= dict.fromkeys(("num_rows", "num_chunks", "chunk_rows", "gate_stride", "shift_stride", "scale_stride"), "i32")
FP32_STREAM = dict.fromkeys(("x_ptr", "x_new_ptr", "dx_new_ptr", "dx_ptr", "bias_ptr"), "*fp32")


def test_kernels_compile_for_every_generation_of_gpus():
    """In one dtype without the residual; with an fp32 stream, bf16 branches and all there is."""
    name, types = KERNELS, TYPES
    row = {"D": 1152, "BLOCK_A": 1024, "BLOCK_B": 128}

    alone = {"types": types, **row, "HAS_RESIDUAL": False, "HAS_BIAS": False, **dict.fromkeys(("y_ptr", "gate_ptr"))}
    absent = dict.fromkeys(("dx_new_ptr", "dy_ptr"))
    flags = {"HAS_DH": True, "HAS_DX_NEW": False, "FROM_INPUT": False, "SUMS": 2}
    results = compile_ahead(
        job(f"{name}:layernorm_forward_kernel", 2, **alone, bias_ptr=None, x_new_ptr=None),
        job(f"{name}:layernorm_backward_kernel", 4, **alone, bias_ptr=None, **absent, **flags),
    )
    # Values change threads at the end of backward only, where sums are stored; in the loop it would cost barriers.
    assert all(result["layout_conversions"] <= 2 for result in results)

    full = {"types": types | FP32_STREAM, "HAS_RESIDUAL": True, "HAS_BIAS": True}
    flags = {"HAS_DH": True, "SUMS": 4}
    sums = {**full, "types": types | {"dbias_ptr": "*fp32"}}
    backward, more = f"{name}:layernorm_backward_kernel", {**full, **row, **flags, "HAS_DX_NEW": True}
    results = compile_ahead(
        job(f"{name}:layernorm_forward_kernel", 4, **full, **row),
        job(backward, 4, **more, FROM_INPUT=False),
        job(backward, 8, registers=128, **more, FROM_INPUT=True),
        job(f"{name}:sum_chunks_kernel", 1, **sums, **flags, D=1152, COLUMNS=128),
        job(f"{name}:sum_samples_kernel", 4, types=types, D=1152, COLUMNS=32, SAMPLES=128),
    )
    assert all(result["stack"] == 0 for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_many_backward_programs_fit_as_the_table_says(dtype):
    """On sm_90, without spills, at the widths of the presets; computing x_new again stays within the same registers."""
    kernel, jobs, waves = f"{KERNELS}:layernorm_backward_kernel", [], []
    flags = dict.fromkeys(("HAS_DH", "HAS_DX_NEW", "HAS_RESIDUAL", "HAS_BIAS"), True) | {"SUMS": 4}
    flags |= {"types": TYPES | (FP32_STREAM if dtype == torch.float32 else {})}
    for width in (384, 768, 1024, 1152):
        wave, pieces = _layernorm_triton.backward_wave(width, True, dtype), _layernorm_triton._pieces(width)
        waves += [wave, wave]
        jobs.append(job(kernel, wave.warps, **flags, **pieces, FROM_INPUT=False))
        jobs.append(job(kernel, wave.warps, registers=wave.registers, **flags, **pieces, FROM_INPUT=True))
    for wave, result in zip(waves, compile_ahead(*jobs, capabilities=(90,)), strict=True):
        taken = -(-result["registers"] // 8) * 8
        assert taken * 32 * wave.warps * wave.programs <= _layernorm_triton.REGISTERS
        assert result["stack"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", [(4, 256, 1152), (1, 1000, 1152), (8, 256, 384), (3, 100, 768), (2, 1024, 1024)])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_kernel_on_real_shapes(shape, x_dtype):
    inputs = operands(*shape)
    assert_exact_enough(inputs, torch.bfloat16, x_dtype)
    assert_save_changes_no_bit(inputs, torch.bfloat16, x_dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")
def test_public_function_runs_the_kernel_on_a_gpu():
    x, y, adaln, bias = operands(2, 256, 1152, torch.bfloat16)
    gate, shift, scale = adaln.chunk(6, dim=1)[2:5]
    public = gated_residual_layernorm_modulate(x, y, gate, shift, scale, bias=bias)
    assert_equal(public, kernel(x, y, gate, shift, scale, bias))
