"""Drop-in use: what is recognised, what is refused, and that a patched model is the model it was."""

import copy
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import sitfast
from sitfast.errors import SitfastError
from sitfast.kernels import dispatch

MODULE = sys.modules["sitfast.patch"]  # the name sitfast.patch is the function
WIDTH, HEADS, CONDITION = 24, 3, 24


class SelfAttention(nn.Module):
    def __init__(self, *, norm=nn.Identity, drop=0.0, bias=True, turn=False):
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.q_norm, self.k_norm = norm(WIDTH // HEADS), norm(WIDTH // HEADS)
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.proj_drop = nn.Dropout(drop)
        self.turn = turn

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.turn:  # what a rotary embedding does: queries and keys depend on their place
            angle = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
            q, k = q * angle.cos(), k * angle.cos()
        weights = self.attn_drop((q @ k.mT * (WIDTH // HEADS) ** -0.5).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, *, act=None, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 3 * WIDTH)
        self.act = act or nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(self.drop1(self.act(self.fc1(x))))


def modulated(x, shift, scale):
    return x * (scale[:, None] + 1) + shift[:, None]


class Layer(nn.Module):
    """An adaLN-zero block of the published shape."""

    def __init__(self, *, norm=None, attn=None, mlp=None, eps=1e-6):
        super().__init__()
        norm = norm or (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False, eps=eps))
        self.norm1 = norm()
        self.attn = attn or SelfAttention()
        self.norm2 = norm()
        self.mlp = mlp or FeedForward()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(CONDITION, 6 * WIDTH))

    def vectors(self, c):
        return self.adaLN_modulation(c).chunk(6, dim=-1)

    def forward(self, x, c, bonus=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.vectors(c)
        x = x + gate1[:, None] * self.attn(modulated(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))
        return x if bonus is None else x + bonus


class Swapped(Layer):
    def vectors(self, c):
        shift1, scale1, *others = self.adaLN_modulation(c).chunk(6, dim=-1)
        return scale1, shift1, *others


class DroppedBranch(Layer):
    """Stochastic depth: the same as a Layer in evaluation."""

    def forward(self, x, c):
        return x + F.dropout(super().forward(x, c) - x, 0.3, self.training)


class OddTokens(Layer):
    """A small error: one percent of one branch, for one token."""

    def forward(self, x, c):
        out = super().forward(x, c)
        return torch.cat((out[:, :1] + 0.01 * (out - x)[:, :1], out[:, 1:]), dim=1)


class Head(nn.Module):
    def __init__(self, *, swapped=False):
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(WIDTH, 8)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(CONDITION, 2 * WIDTH))
        self.swapped = swapped

    def forward(self, x, c):
        vectors = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final(x), *(reversed(vectors) if self.swapped else vectors)))


class Net(nn.Module):
    """Images to tokens that are not contiguous, blocks, final layer."""

    def __init__(self, *blocks, head=None):
        super().__init__()
        self.embed = nn.Conv2d(2, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(blocks or (Layer(), Layer()))
        self.final_layer = head or Head()

    def forward(self, x, c):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        nn.init.normal_(value, std=0.2, generator=generator)
    return model


def inputs(batch=3, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 6, 8, generator=generator)
    return x.to(device, dtype), torch.randn(batch, CONDITION, generator=generator).to(device, dtype)


def outcome(model, *args, **kwargs):
    """The output and the gradient of every parameter."""
    out = model(*args, **kwargs)
    direction = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, list(named.values()), direction.to(out.dtype), allow_unused=True)
    return {"output": out.detach()} | {k: g for k, g in zip(named, grads, strict=True) if g is not None}


def assert_close(actual, expected, tolerance=2e-6):
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        scale = max(value.abs().max(), 0.01 * largest)
        assert (actual[name] - value).abs().max() <= tolerance * scale, name


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel was called from a patched forward."""
    counts = {}

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return counted

    for name in ("layernorm_modulate", "gated_residual_layernorm_modulate", "attention", "mlp"):
        monkeypatch.setattr(MODULE, name, counting(name, getattr(MODULE, name)))
    return counts


def statuses(report):
    return {row.path: row.status for row in report.rows}


def test_patched_model_computes_the_same_with_the_kernels(calls):
    model = randomise(Net())
    expected = outcome(model, *inputs())
    report = sitfast.patch(model)
    assert statuses(report) == {"blocks.0": "patched", "blocks.1": "patched", "final_layer": "patched"}
    assert len(report.patched) == 3 and not report.skipped
    calls.clear()
    assert_close(outcome(model, *inputs()), expected)
    assert report.rows[0].reason.startswith("not when called with bonus; relative error")
    assert report.rows[2].reason.startswith("relative error")
    assert calls == {"layernorm_modulate": 3, "gated_residual_layernorm_modulate": 2, "attention": 2, "mlp": 2}

    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class"] and lines[-1] == "3 patched, 0 skipped"
    assert lines[1].split()[:3] == ["blocks.0", "Layer", "patched"] and "float32" in lines[1] and "bfloat16" in lines[1]


def test_nothing_but_forward_changes_and_unpatch_restores_it():
    model = randomise(Net()).train()
    model.blocks[1].mlp.eval()
    model.blocks[0].register_buffer("count", torch.zeros(3))
    outcome_before = outcome(model, *inputs())
    model.final_layer.linear.weight.grad = torch.ones(8, WIDTH)
    fired = []
    model.blocks[0].register_forward_hook(lambda *_: fired.append("forward"))
    model.blocks[0].register_full_backward_hook(lambda *_: fired.append("backward"))

    def picture():
        return {
            "state": {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()},
            "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
            "parameters": [(n, id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
            "attributes": {n: m.__dict__.keys() - {"forward"} for n, m in model.named_modules()},
            "rng": torch.get_rng_state().tolist(),
        }

    before = picture()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert len(sitfast.patch(model).patched) == 3
    assert picture() == before and fired == []
    outcome(model, *inputs())
    assert fired == ["forward", "backward"]

    assert sitfast.unpatch(model) == 3 and sitfast.unpatch(model) == 0
    assert picture() == before and not any("forward" in module.__dict__ for module in model.modules())
    after = outcome(model, *inputs())
    assert all(torch.equal(after[name], value) for name, value in outcome_before.items())


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Swapped(), "computes something else: output"),
        (lambda: DroppedBranch(), "(training)"),
        (lambda: OddTokens(), "computes something else: output"),
        (lambda: Layer(mlp=FeedForward(act=nn.GELU())), "the activation of mlp differs from tanh GELU by 4.7e-04"),
        (lambda: Layer(mlp=FeedForward(act=nn.SiLU())), "differs from tanh GELU"),
        (lambda: Layer(mlp=FeedForward(drop=0.1)), "mlp.drop1 drops with p = 0.1"),
        (lambda: Layer(mlp=nn.Sequential(nn.Linear(WIDTH, WIDTH))), "mlp is Sequential"),
        (lambda: Layer(norm=lambda: nn.RMSNorm(WIDTH)), "norm1 is RMSNorm, expected LayerNorm"),
        (lambda: Layer(norm=lambda: nn.LayerNorm(WIDTH)), "norm1 has a weight of its own"),
    ],
)
def test_what_is_not_the_same_is_left_alone_even_with_zero_gates(block, reason):
    model = Net(block(), Layer())
    for layer in model.blocks:
        nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(layer.adaLN_modulation[1].bias)
    report = sitfast.patch(model)
    assert statuses(report) == {"blocks.0": "skipped", "blocks.1": "patched", "final_layer": "patched"}
    assert reason in report.skipped[0].reason
    assert "forward" not in model.blocks[0].__dict__


def test_small_differences_are_seen_in_every_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert "something else" in sitfast.patch(OddTokens().to(dtype)).rows[0].reason
        assert sitfast.patch(Layer(eps=1e-3).to(dtype)).patched
    assert "something else" in sitfast.patch(Head(swapped=True)).rows[0].reason
    silent = Layer()
    silent.norm1.forward = lambda x: F.layer_norm(x, (WIDTH,), eps=1e-5)  # the module says 1e-6
    assert "something else" in sitfast.patch(silent).rows[0].reason


def test_a_kernel_that_is_off_is_caught(monkeypatch):
    right = MODULE.mlp
    monkeypatch.setattr(MODULE, "mlp", lambda *a, **k: right(*a, **k) * (1 if dispatch._reference_only else 1.001))
    reason = sitfast.patch(Layer()).rows[0].reason
    assert "the kernels are off" in reason and "(float32)" in reason
    monkeypatch.setattr(MODULE, "mlp", lambda *a, **k: right(*a, **k).float())
    assert "output would be torch.float32, not torch.bfloat16" in sitfast.patch(Layer().bfloat16()).rows[0].reason

    def refuses(x, *_, **__):
        raise ValueError("mlp: x is too wide\nand more")

    monkeypatch.setattr(MODULE, "mlp", refuses)
    assert sitfast.patch(Layer()).rows[0].reason == "the check failed: ValueError: mlp: x is too wide"


@pytest.mark.parametrize(
    ("attn", "note"),
    [
        (lambda: SelfAttention(norm=nn.LayerNorm), "keeps its attention: q_norm is LayerNorm"),
        (lambda: SelfAttention(drop=0.2), "keeps its attention: attn_drop drops with p = 0.2"),
        (lambda: SelfAttention(turn=True), "keeps its attention: it computes something else"),
        (lambda: SelfAttention(bias=False), None),
    ],
)
def test_an_attention_that_is_not_ours_stays_and_the_rest_is_fused(attn, note, calls):
    model = randomise(Net(Layer(attn=attn()))).eval()
    expected = outcome(model, *inputs())
    report = sitfast.patch(model)
    assert len(report.patched) == 2
    assert note is None or report.rows[0].reason.startswith(note)
    calls.clear()
    assert_close(outcome(model, *inputs()), expected)
    assert calls.get("attention", 0) == (note is None)
    assert calls["gated_residual_layernorm_modulate"] == calls["mlp"] == 1


def test_gelu_by_another_name():
    for act in (lambda u: F.gelu(u, approximate="tanh"), nn.GELU("tanh")):
        assert sitfast.patch(Layer(mlp=FeedForward(act=act))).patched


def test_hooks_inside_a_block_always_run():
    model = randomise(Net())
    expected = outcome(model, *inputs())
    fired = []
    handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: fired.append("fc1"))
    report = sitfast.patch(model)
    assert report.skipped[0].reason == "mlp.fc1 has hooks" and len(report.patched) == 2 and fired == []
    handle.remove()
    assert len(sitfast.patch(model).patched) == 1

    for part in ("mlp", "mlp.act", "norm1", "norm2", "attn", "attn.qkv", "adaLN_modulation.1"):
        model.blocks[1].get_submodule(part).register_forward_hook(lambda *_, part=part: fired.append(part))
        fired.clear()
        assert_close(outcome(model, *inputs()), expected)
        assert part in fired


def test_a_linear_exchanged_after_patch_is_used():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean()

    model = randomise(Net(Layer()))
    sitfast.patch(model)
    block = model.blocks[0]
    adapted = Adapted(WIDTH, 3 * WIDTH)
    adapted.load_state_dict(block.mlp.fc1.state_dict())
    block.mlp.fc1 = adapted
    actual = outcome(model, *inputs())
    sitfast.unpatch(model)
    assert_close(actual, outcome(model, *inputs()))


def test_calls_that_are_not_covered_take_the_own_forward():
    block = randomise(Layer())
    x, c = torch.randn(3, 5, WIDTH), torch.randn(3, CONDITION)
    cases = [
        ((x, c), {"bonus": torch.ones(())}),
        ((x, c, torch.ones(())), {}),
        ((x, c[:1]), {}),
        ((), {"x": x, "c": c}),
        ((x, c, None), {}),
    ]
    expected = [block(*args, **kwargs) for args, kwargs in cases]
    sitfast.patch(block)
    for (args, kwargs), value in zip(cases, expected, strict=True):
        torch.testing.assert_close(block(*args, **kwargs), value, rtol=1e-5, atol=1e-5)


def test_twice_is_once_and_ours_needs_nothing():
    model = Net()
    sitfast.patch(model)
    bound = model.blocks[0].forward
    report = sitfast.patch(model)
    assert not report.patched and {row.reason for row in report.skipped} == {"patched already"}
    assert model.blocks[0].forward == bound

    ours = sitfast.SiT(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=4)
    report = sitfast.patch(ours)
    assert [row.kind for row in report.skipped] == ["Block", "FinalLayer"]
    assert {row.reason for row in report.rows} == {"sitfast's own, on the kernels already"}
    assert str(sitfast.patch(nn.Linear(2, 2))) == "0 patched, 0 skipped: no block or final layer of a known shape"


def test_foreign_forward_and_unknown_parts_are_named():
    block = Layer()
    block.forward = lambda x, c: x
    assert sitfast.patch(block).rows[0].reason == "its forward was replaced on the instance"
    other = nn.Module()
    other.adaLN_modulation = nn.Linear(2, 2)
    assert sitfast.patch(other).rows[0].reason == "not the parts of a known block or final layer"


def test_copies():
    model = randomise(Net())
    sitfast.patch(model)
    expected = outcome(model, *inputs())
    twin = copy.deepcopy(model)
    assert_close(outcome(twin, *inputs()), expected, 0)
    assert twin.blocks[0].forward.__self__ is twin.blocks[0]  # not bound to the original
    nn.init.zeros_(twin.blocks[0].adaLN_modulation[1].weight)
    assert_close(outcome(model, *inputs()), expected, 0)
    assert sitfast.unpatch(twin) == 3 and sitfast.unpatch(model) == 3

    sitfast.patch(model)
    loaded = pickle.loads(pickle.dumps(model))  # has its own forwards, and can be patched again
    assert_close(outcome(loaded, *inputs()), expected)
    assert sitfast.unpatch(loaded) == 0 and len(sitfast.patch(loaded).patched) == 3


def test_low_precision_and_meta():
    model = randomise(Net()).bfloat16()
    exact = outcome(copy.deepcopy(model).double(), *(value.double() for value in inputs(dtype=torch.bfloat16)))
    own = outcome(model, *inputs(dtype=torch.bfloat16))
    assert len(sitfast.patch(model).patched) == 3
    ours = outcome(model, *inputs(dtype=torch.bfloat16))
    for name, value in exact.items():
        limit = 2 * (own[name].double() - value).abs().max() + 2**-6 * value.abs().max()
        assert (ours[name].double() - value).abs().max() <= limit, name

    with torch.device("meta"):
        model = Net()
    assert len(sitfast.patch(model).patched) == 3
    randomise(model.to_empty(device="cpu"))
    ours = outcome(model, *inputs())
    sitfast.unpatch(model)
    assert_close(ours, outcome(model, *inputs()))


def test_compile_after_patch_but_not_before():
    block = randomise(Layer())
    x, c = torch.randn(3, 5, WIDTH), torch.randn(3, CONDITION)
    expected = outcome(block, x, c)
    sitfast.patch(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    actual = {name.removeprefix("_orig_mod."): value for name, value in outcome(compiled, x, c).items()}
    assert_close(actual, expected)
    with pytest.raises(SitfastError, match=r"the model \(OptimizedModule\) is compiled already.*before torch.compile"):
        sitfast.patch(compiled)
    model = Net()
    model.blocks[1].compile(backend="eager")
    with pytest.raises(SitfastError, match=r"blocks.1 \(Layer\) is compiled already"):
        sitfast.patch(model)
    with pytest.raises(SitfastError, match="takes a torch.nn.Module, not list"):
        sitfast.patch([model])


def test_a_class_that_compiles_its_forward_is_checked_without_compiling():
    def backend(*_):
        raise AssertionError("compiled")

    class Compiled(Layer):
        forward = torch.compile(Layer.forward, backend=backend)

    (row,) = sitfast.patch(Compiled()).rows
    assert row.status == "patched" and "its own forward is compiled, ours is not yet" in row.reason


def test_checkpointing_ddp_and_fsdp():
    model = randomise(Net())
    expected = outcome(model, *inputs())
    sitfast.patch(model)
    x, c = torch.randn(3, 5, WIDTH, requires_grad=True), torch.randn(3, CONDITION)
    direct = torch.autograd.grad(model.blocks[0](x, c).sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(model.blocks[0], x, c, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], direct)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert {row.reason for row in sitfast.patch(wrapped).rows} == {"patched already"}
        ours = {name.removeprefix("module."): value for name, value in outcome(wrapped, *inputs()).items()}
        assert_close(ours, expected)

        mesh = dist.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            dist.fsdp.fully_shard(block, mesh=mesh)
        dist.fsdp.fully_shard(model, mesh=mesh)
        out = model(*inputs())
        torch.testing.assert_close(out.detach(), expected["output"], rtol=1e-5, atol=1e-5)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        assert_close({"output": out.detach()} | grads, expected)
        with pytest.raises(SitfastError, match="is sharded already; call sitfast.patch before FSDP"):
            sitfast.patch(model)
    finally:
        dist.destroy_process_group()


DIFFUSERS = dict(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    sample_size=8,
    num_embeds_ada_norm=10,
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
)


def test_diffusers(calls):
    from diffusers import DiTTransformer2DModel

    model = randomise(DiTTransformer2DModel(**DIFFUSERS)).eval()
    args = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 3, 9])

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args):
            return self.model(*args).sample

    def run():
        return outcome(Sample(), *args)

    expected, keys = run(), list(model.state_dict())
    report = sitfast.patch(model)
    assert len(report.patched) == 2 and not report.skipped
    assert all(row.reason.startswith("keeps its attention: q, k and v are separate") for row in report.rows)
    calls.clear()
    assert_close(run(), expected)
    assert calls == {"layernorm_modulate": 2, "gated_residual_layernorm_modulate": 2, "mlp": 2}
    assert list(model.state_dict()) == keys

    calls.clear()
    model.enable_gradient_checkpointing()
    model.train()  # labels may drop in training, so only its calls are looked at
    model(*args).sample.sum().backward()
    assert calls["mlp"] == 4  # each twice
    block = model.transformer_blocks[0]
    block.set_chunk_feed_forward(1, 1)  # not covered: the block runs its own
    calls.clear()
    assert torch.isfinite(block(torch.randn(2, 4, 16), timestep=args[1][:2], class_labels=args[2][:2])).all()
    assert calls == {}
    assert sitfast.unpatch(model) == 2


def test_other_diffusers_blocks_are_left_alone():
    from diffusers import DiTTransformer2DModel

    for change, reason in (
        ({"activation_fn": "gelu"}, "the activation of ff differs from tanh GELU by 4.7e-04"),
        ({"activation_fn": "geglu"}, "expected 16 to H and back"),
        ({"dropout": 0.1}, "ff.net.1 drops with p = 0.1"),
        ({"norm_elementwise_affine": True}, "norm3 has a weight of its own"),
    ):
        report = sitfast.patch(DiTTransformer2DModel(**DIFFUSERS | {"num_layers": 1} | change))
        assert not report.patched and reason in report.rows[0].reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu(dtype, autocast):
    model = randomise(Net())
    exact = outcome(copy.deepcopy(model).to("cuda", dtype).double(), *(v.double() for v in inputs(4, dtype, "cuda")))
    model = model.to("cuda", dtype)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        own = outcome(model, *inputs(4, dtype, "cuda"))
        report = sitfast.patch(model)
        assert len(report.patched) == 3, str(report)
        ours = outcome(model, *inputs(4, dtype, "cuda"))
        again = outcome(model, *inputs(4, dtype, "cuda"))
    largest = max(value.abs().max() for value in exact.values())
    precision = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for name, value in exact.items():
        limit = 2 * (own[name] - value).abs().max() + 2 * precision * max(value.abs().max(), 0.01 * largest)
        assert (ours[name] - value).abs().max() <= limit, name
    assert torch.equal(ours["output"], again["output"])
