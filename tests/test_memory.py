"""The prediction against what was measured, and the advice that follows from it."""

from collections import Counter

import pytest
import torch
from torch import Tensor

import sitfast.trainer
from sitfast import config, memory
from sitfast.errors import SitfastError
from sitfast.memory import GIB
from sitfast.model import SiT, build_model, count_parameters
from sitfast.trainer import Trainer
from tests.conftest import losses, train
from tests.kernels.harness import DEVICE, use_kernels

XL2 = ["data.path=x", "vae.id=null", "data.batch_size=128", "data.image_size=32", "train.precision=bf16"]


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return build_model("SiT-XL/2", input_size=32)


def predicted(model, *overrides: str, ranks: int = 1) -> memory.Prediction:
    return memory.predict(config.load(None, [*XL2, *overrides]), model, ranks)


def test_activations_and_gradients_are_those_measured_on_an_h100(model):
    """docs/kernels.md: forward and backward of 128 images beyond the weights, with the kernels.

    The blocks that were measured kept one more residual stream each, in the dtype of the stream.
    """
    stream = 28 * 128 * 256 * 1152
    autocast = predicted(model, "train.residual=fp32")
    measured = (autocast.activations + autocast.gathered + autocast.gradients + 4 * stream) / GIB
    assert measured == pytest.approx(36.2, rel=0.02)
    low = predicted(model)
    assert (low.activations + low.gradients + 2 * stream) / GIB == pytest.approx(29.6, rel=0.02)


def test_a_cross_attention_keeps_five_units_and_the_keys_and_values_of_the_caption(model):
    text = {"length": 77, "width": 768, "pooled": 768, "depth": 0}
    with torch.device("meta"):
        reads = build_model("SiT-XL/2", input_size=32, text=text)
    more = predicted(reads).activations - predicted(model).activations
    images, tokens, width, depth = 128, 256, 1152, 28
    assert more == pytest.approx(depth * 2 * images * width * (5 * tokens + 2 * 77), rel=1e-9)
    more = count_parameters(reads) - count_parameters(model)
    linears = depth * (4 * width**2 + 4 * width + width) + (768 + 1) * width  # with their gates, and context_embedder
    assert more == linears + (768 + 1 + width + 1) * width - 1001 * width  # y_embedder, in place of the label's table


def kept_for_backward(model: SiT, x: Tensor) -> Counter[int]:
    """Sizes in bytes of all storages that autograd keeps, each counted once, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(x, torch.rand(len(x)), torch.arange(len(x)))
    return Counter(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreted kernels keep")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_a_block_keeps_what_the_formula_says(precision, compiled, monkeypatch):
    """Two blocks against one, with the kernels: one residual stream more, that in the middle of the block."""
    use_kernels(monkeypatch)
    overrides = {"fp32": ["train.precision=fp32"], "bf16": [], "autocast": ["train.residual=fp32"]}[precision]
    cfg = config.load(None, [*XL2, *overrides, "data.batch_size=5"])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes, activations = [], []
    for depth in (1, 2):
        model = SiT(input_size=8, patch_size=4, hidden_size=32, depth=depth, num_heads=2, num_classes=10).to(dtype)
        if compiled:
            torch.compiler.reset()
            for block in model.blocks:
                block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            sizes.append(kept_for_backward(model, torch.randn(5, 4, 8, 8, dtype=dtype)))
        activations.append(memory.predict(cfg, model, 1).activations)
    unit, stream = 5 * 4 * 32 * (4 if precision == "fp32" else 2), 5 * 4 * 32 * dtype.itemsize
    whole = Counter({size: count for size, count in (sizes[1] - sizes[0]).items() if size % unit == 0})
    # Two normed inputs, attention's output and two branches; qkv; fc1's pre-activation; the stream.
    assert whole == Counter({unit: 5, 3 * unit: 1, 4 * unit: 1}) + Counter({stream: 1})
    assert sum(size * count for size, count in whole.items()) == activations[1] - activations[0]


def test_what_is_held_follows_from_the_parameters(model):
    count = 675_129_632
    one = predicted(model, "ema.decays=[0.9, 0.99]")
    assert (one.weights, one.moments, one.averages) == (4 * count, 8 * count, 8 * count)
    assert (one.gathered, one.gradients) == (2 * count, 2 * count)  # the bf16 copy and its gradients
    assert predicted(model, ranks=2).gradients == predicted(model, "train.accumulate=2").gradients == 6 * count
    wide = predicted(model, "train.precision=fp32")
    assert (wide.gathered, wide.gradients) == (0, 4 * count)
    eight = predicted(model, "parallel.strategy=fsdp", ranks=8)
    assert (eight.weights, eight.moments) == (count // 2, count)
    assert predicted(model, "optim.moments=bf16").moments == 4 * count
    pairs = predicted(model, "parallel.strategy=hsdp", "parallel.shard_size=2", ranks=8)
    assert (pairs.weights, pairs.gradients) == (2 * count, 2 * count)
    summed = predicted(model, "parallel.strategy=fsdp", "train.accumulate=2", ranks=8)
    assert summed.gradients - eight.gradients == 4 * count  # whole until the last micro-batch
    kept = predicted(model, "parallel.strategy=fsdp", "parallel.reshard_after_forward=false", ranks=8)
    assert kept.gathered - eight.gathered == pytest.approx(2 * count * 26 / 28, rel=0.02)


def test_every_way_to_need_less_needs_less(model):
    before = predicted(model, ranks=2).total
    for change in ("train.accumulate=2", "parallel.strategy=fsdp", "parallel.activation_checkpoint=selective"):
        assert predicted(model, change, ranks=2).total < before
    both = predicted(model, "train.mlp_save=both").activations - predicted(model).activations
    assert both == 28 * 4 * 128 * 256 * 1152 * 2
    selective = predicted(model, "parallel.activation_checkpoint=selective").activations
    assert predicted(model, "parallel.activation_checkpoint=block").activations < selective


def test_micro_batches_that_fit_keep_the_global_batch(model):
    cfg = config.load(None, XL2)
    needed = {n: memory.predict(memory.with_changes(cfg, train={"accumulate": n}), model, 1).total for n in (1, 2, 4)}
    for n in (1, 2, 4):
        assert memory.fitting_accumulate(cfg, model, 1, needed[n] + memory.RESERVE) == n
        assert memory.fitting_accumulate(cfg, model, 1, needed[n] + memory.RESERVE - 1) == 2 * n
    assert memory.fitting_accumulate(cfg, model, 1, 1) == 128
    assert memory.fitting_accumulate(cfg, model, 1, None) == 1


def test_remedies_name_what_would_fit(model):
    cfg = config.load(None, XL2)
    text = memory.remedies(cfg, model, 2, 40 * GIB)
    for change in ("train.accumulate=2 (", "parallel.strategy=fsdp (", "parallel.activation_checkpoint=selective ("):
        assert change in text
    assert text.count("accumulate") == 1  # of each field the least change that fits
    assert "parallel.strategy=fsdp" not in memory.remedies(cfg, model, 1, 40 * GIB)
    assert "no single change would fit; one image at a time" in memory.remedies(cfg, model, 1, 12 * GIB)
    # Where a step did not fit although it was predicted to, the changes are taken to need as much more.
    now = predicted(model).total + memory.RESERVE
    less = predicted(model, "train.accumulate=2").total + memory.RESERVE
    assert f"train.accumulate=2 ({less / GIB:.1f} GiB)" in memory.remedies(cfg, model, 1, now)
    assert f"train.accumulate=2 ({2 * less / GIB:.1f} GiB)" in memory.remedies(cfg, model, 1, 2 * now)


def test_running_out_of_memory_is_one_clear_line(tiny, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(sitfast.trainer.memory, "capacity", lambda _: 2 * GIB)
    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(SitfastError) as caught:
        train(*tiny)
    text = str(caught.value)
    assert text.startswith("out of GPU memory in step 1 (CUDA out of memory): 0.0 GiB predicted, the GPU has 2.0 GiB; ")
    assert "\n" not in text


def test_auto_accumulate_trains_the_same_batch_in_parts(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sitfast.trainer.memory, "fitting_accumulate", lambda *_: 4)
    trainer = train(*tiny, "train.steps=2", "train.auto_accumulate=true")
    assert trainer.cfg.train.accumulate == 4 and trainer.step == 2
    assert "accumulate: 4" in (tmp_path / "run/checkpoint-2/config.yaml").read_text()
    train(*tiny, "train.steps=2", f"output_dir={tmp_path / 'whole'}")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
