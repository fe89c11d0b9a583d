"""Data parallelism by any strategy and at any number of ranks is the same training: gloo processes on CPUs."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sitfast import config, parallel, shards
from sitfast.errors import SitfastError
from sitfast.model import build_model
from sitfast.trainer import Trainer
from tests.conftest import TINY, folder_run, train
from tests.ranks import Failed

COMPARED = [*TINY, "optim.clip_norm=0.5", "log.val_every=10", "data.val_samples=51", "sample.every=20"]
COMPARED += ["sample.batch_size=7"]  # 51 rows in sevens: the ranks validate different numbers of batches
SMALL = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 10}


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run(overrides: list[str]) -> None:
    """torch.compile traces and partitions here, without generating code; all of a block must be one graph."""
    original = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: original(self, backend="aot_eager", fullgraph=True)
    try:
        train(*overrides)
    finally:
        torch.nn.Module.compile = original


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process, 20 steps."""
    folder = tmp_path_factory.mktemp("alone")
    train(*COMPARED, f"output_dir={folder}")
    return folder


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, ["strategy=ddp", "train.accumulate=2"]),
        (2, ["strategy=ddp", "train.compile=true"]),
        (1, ["strategy=fsdp"]),
        (2, ["strategy=fsdp", "reshard_after_forward=false"]),
        (4, ["strategy=fsdp"]),
        (4, ["strategy=hsdp", "shard_size=2", "activation_checkpoint=selective"]),
        (2, ["strategy=fsdp", "activation_checkpoint=block", "train.accumulate=2"]),
        (2, ["strategy=fsdp", "activation_checkpoint=selective", "train.compile=true"]),
    ],
    ids=[
        "ddp2-accumulate",
        "ddp2-compiled",
        "fsdp1",
        "fsdp2-kept",
        "fsdp4",
        "hsdp2x2-selective",
        "fsdp2-block-accumulate",
        "fsdp2-compiled",
    ],
)
def test_the_same_training_at_any_number_of_ranks(ranks, tmp_path, alone, size, settings):
    """20 steps with clipping: losses and gradient norms within 1e-5, relative, and the held-out losses too."""
    named = [s if s.startswith("train.") else f"parallel.{s}" for s in settings]
    ranks(size, run, [*COMPARED, *named, f"output_dir={tmp_path}"])
    for ours, theirs in zip(records(tmp_path), records(alone), strict=True):
        for name in ours:
            if name in ("loss", "grad_norm") or name.startswith("val_loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    assert (tmp_path / "samples/step-20.png").exists()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_weights(strategy: str) -> dict[str, torch.Tensor]:
    cfg = config.load(None, [*TINY, f"parallel.strategy={strategy}"])
    with parallel.start(cfg) as world:
        with torch.device("meta"):
            model = build_model(**SMALL, depth=2)
        mesh = parallel.device_mesh(cfg.parallel, world)
        if mesh is not None:
            parallel.shard(model, mesh, reshard_after_forward=True, dtype=None)
        assert next(model.parameters()).is_meta
        torch.manual_seed(5)
        parallel.materialize(model, world.device)
        return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def test_first_weights_do_not_depend_on_the_number_of_ranks(ranks):
    (want,) = ranks(1, first_weights, "ddp")
    assert want["blocks.1.mlp.fc1.weight"].std() > 0.05 and want["y_embedder.embedding_table.weight"].std() > 0.01
    for answer in ranks(3, first_weights, "fsdp"):  # 16 rows over 3 ranks: 6, 6 and 4
        assert answer.keys() == want.keys()
        assert all(torch.equal(answer[name], value) for name, value in want.items())


def gradients(size: int, *, sharded: bool) -> dict[str, torch.Tensor]:
    """Of the mean loss over six samples, of which each rank sees its part; no weight is zero, so every path counts."""
    cfg = config.load(None, [*TINY, "parallel.strategy=fsdp"])
    with parallel.start(cfg) as world:
        model = build_model(**SMALL, depth=3).double()
        if sharded:
            mesh = parallel.device_mesh(cfg.parallel, world)
            assert mesh is not None
            parallel.shard(model, mesh, reshard_after_forward=True, dtype=None)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            shards.assign(p, 0.3 * torch.randn(p.shape, generator=generator))
        x, t, y = torch.randn(6, 1, 8, 8, generator=generator).double(), torch.linspace(0.1, 0.9, 6), torch.arange(6)
        part = slice(world.rank * 6 // size, (world.rank + 1) * 6 // size) if sharded else slice(None)
        if sharded:
            freed = [m for m in model.modules() if isinstance(m, FSDPModule)][1:3]
            seen: list[bool] = []
            model.blocks[2].register_forward_pre_hook(
                lambda *_: seen.extend(isinstance(p, DTensor) for p in freed[0].parameters())
            )
        model(x[part], t[part], y[part]).square().mean().backward()
        assert not sharded or (seen and all(seen))  # the block before was freed when its pending branch was added
        return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_pending_branch_crosses_freed_blocks(ranks):
    """The bias of fc2 is added in the next block's kernel: its gradient must reach the block that owns it."""
    (want,) = ranks(1, _plain_gradients)
    for answer in ranks(2, _sharded_gradients):
        for name, value in want.items():
            torch.testing.assert_close(answer[name], value, rtol=1e-9, atol=1e-9)
    biases = [want[f"blocks.{i}.mlp.fc2.bias"] for i in range(3)]
    assert all(bias.norm() > 1e-2 for bias in biases) and not torch.allclose(biases[0], biases[1], rtol=0.1)


def _plain_gradients():
    return gradients(1, sharded=False)


def _sharded_gradients():
    return gradients(2, sharded=True)


def collectives(overrides: list[str]) -> dict[str, int]:
    """How often one step reduces gradients and adds up norms."""
    names = {
        "reduce_scatter_single": "reduce_scatter_tensor",
        "all_gather_single": "all_gather_into_tensor",
    }  # 2.13: 2.11
    counts = {name if hasattr(dist, name) else old: 0 for name, old in names.items()} | {"all_reduce": 0}
    cfg = config.load(None, overrides)
    with parallel.start(cfg) as world:
        trainer = Trainer(cfg, world)
        trainer._begin_window()
        trainer.train_step()
        originals = {name: getattr(dist, name) for name in counts}
        for name, original in originals.items():

            def counted(*args, name=name, original=original, **kwargs):
                counts[name] += 1
                return original(*args, **kwargs)

            setattr(dist, name, counted)
        try:
            trainer.train_step()
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)
            trainer.close()
    return dict(zip(("reduce_scatter", "all_gather", "all_reduce"), counts.values(), strict=True))


def graphs_of_blocks(overrides: list[str]) -> int:
    """How many graphs the compiler gets for three blocks of 4.5 MiB in buckets of 1 MiB."""
    graphs, original, bucket = [], torch.nn.Module.compile, parallel._BUCKET_MIB

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.nn.Module.compile = lambda self: original(self, backend=backend, fullgraph=True)
    parallel._BUCKET_MIB = 1
    try:
        with parallel.start(config.load(None, overrides)) as world:
            trainer = Trainer(config.load(None, overrides), world)
            trainer._begin_window()
            trainer.train_step()
            trainer.close()
        return len(graphs)
    finally:
        torch.nn.Module.compile, parallel._BUCKET_MIB = original, bucket


def test_buckets_do_not_cut_the_graph_of_a_block(ranks, tmp_path):
    """One graph for the first block, which has nothing pending, and one that all others share."""
    run = [*TINY, "model.hidden_size=256", "model.depth=3", "train.compile=true", f"output_dir={tmp_path}"]
    assert ranks(2, graphs_of_blocks, run) == [2, 2]


def test_accumulation_reduces_once_and_the_norm_is_one_number(ranks, tmp_path):
    run = [*TINY, "parallel.strategy=fsdp", "optim.clip_norm=1.0"]
    once = ranks(2, collectives, [*run, f"output_dir={tmp_path / 'a'}"])
    often = ranks(2, collectives, [*run, "train.accumulate=4", f"output_dir={tmp_path / 'b'}"])
    for answer in (*once, *often):
        assert answer["reduce_scatter"] == 3  # two blocks and the rest
        assert answer["all_reduce"] == 2  # the norm, and the guard against non-finite values
    assert often[0]["all_gather"] == 4 * once[0]["all_gather"]


def order_of_gathering(overrides: list[str]) -> list[str]:
    """What happens first in a forward pass: blocks that compute, and weights that are asked for."""
    seen, name = [], "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    cfg, original = config.load(None, overrides), getattr(dist, name)
    with parallel.start(cfg) as world:
        trainer = Trainer(cfg, world)
        trainer._begin_window()
        for _ in range(2):
            trainer.train_step()
        for i, block in enumerate(trainer.model.blocks):
            block.attn.register_forward_pre_hook(lambda *_, i=i: seen.append(f"block {i}"))
        trainer.model.final_layer.register_forward_pre_hook(lambda *_: seen.append("end"))
        setattr(dist, name, lambda *args, **kwargs: (seen.append("gather"), original(*args, **kwargs))[1])
        try:
            trainer.train_step()
        finally:
            setattr(dist, name, original)
            trainer.close()
    return seen[: seen.index("end")]


def test_weights_are_asked_for_one_block_ahead(ranks, tmp_path):
    run = [*TINY, "parallel.strategy=fsdp", "model.depth=3", f"output_dir={tmp_path}"]
    want = ["gather", "gather", "gather", "block 0", "gather", "block 1", "block 2"]  # the root's come first
    assert ranks(2, order_of_gathering, run) == [want, want]


def precisions() -> dict[str, set[str]]:
    cfg = config.load(None, [*TINY, "parallel.strategy=fsdp", "train.precision=bf16", f"output_dir={'/nowhere'}"])
    with parallel.start(cfg) as world:
        model = build_model(**SMALL, depth=2)
        mesh = parallel.device_mesh(cfg.parallel, world)
        assert mesh is not None
        parallel.shard(model, mesh, reshard_after_forward=True, dtype=torch.bfloat16)
        seen: dict[str, set[str]] = {"weights": set(), "stream": set(), "times": set()}
        model.t_embedder.register_forward_pre_hook(lambda _, args: seen["times"].add(str(args[0].dtype)))

        def look(block, args) -> None:
            seen["weights"] |= {str(p.dtype) for p in block.parameters()}
            seen["stream"] |= {str(args[0].dtype)}

        for block in model.blocks:
            block.register_forward_pre_hook(look)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2))
        out.float().square().mean().backward()
        seen["shards"] = {str(p.dtype) for p in model.parameters()}
        seen["gradients"] = {str(p.grad.dtype) for p in model.parameters() if p.requires_grad}
        return seen


def test_the_precision_policy(ranks):
    (seen,) = ranks(1, precisions)
    low, full = {"torch.bfloat16"}, {"torch.float32"}
    assert seen == {"weights": low, "stream": low, "times": full, "shards": full, "gradients": full}


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.products += name.startswith(("aten.mm.", "aten.addmm."))
        self.attentions += name.startswith("aten._scaled_dot_product") and "backward" not in name
        self.others += name.startswith("aten.gelu.")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["none", "selective", "block"])
def test_what_each_policy_computes_again(policy):
    torch.manual_seed(0)
    model = build_model(**SMALL, depth=2)
    parallel.prepare_blocks(model.blocks, activation_checkpoint=policy, compiled=False)
    loss = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)).square().mean()
    with Counted() as counted:
        loss.backward()
    plain = {"none": 0, "selective": 0, "block": 2}[policy]
    assert counted.attentions == plain
    assert counted.others == {"none": 0, "selective": 2, "block": 2}[policy]
    products = {"none": 0, "selective": 0, "block": 2 * 4}[policy]  # modulation, qkv, proj, fc1; fc2's is not needed
    assert counted.products == _products_of_backward() + products


def _products_of_backward() -> int:
    model = build_model(**SMALL, depth=2)
    loss = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)).square().mean()
    with Counted() as counted:
        loss.backward()
    return counted.products


@pytest.mark.gpu
def test_on_a_gpu_sharding_changes_neither_losses_nor_the_kernels(tmp_path, image_folder):
    """One GPU shards and frees like many. The kernels run in fp32, so that the losses are the same numbers."""
    wide = ["model.hidden_size=64", "model.num_heads=1", "train.device=cuda", "optim.clip_norm=0.5"]
    for name, more in {"ddp": [], "fsdp": ["parallel.activation_checkpoint=selective"]}.items():
        train(
            *TINY, *folder_run(image_folder), *wide, *more, f"parallel.strategy={name}", f"output_dir={tmp_path / name}"
        )
    for ours, theirs in zip(records(tmp_path / "fsdp"), records(tmp_path / "ddp"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_groups_that_do_not_divide_the_world():
    cfg = config.load(None, [*TINY, "parallel.strategy=hsdp", "parallel.shard_size=4"])
    with pytest.raises(SitfastError, match=r"parallel.shard_size=4 does not divide world_size=6.*try 3"):
        parallel.shard_size(cfg.parallel, 6)
    with pytest.raises(SitfastError, match="only hsdp has groups"):
        config.load(None, [*TINY, "parallel.shard_size=4"])
    assert parallel.shard_size(cfg.parallel, 8) == 4


def test_a_batch_that_does_not_split(ranks, tmp_path):
    for answer in ranks.run(2, train, *TINY, "data.batch_size=9", f"output_dir={tmp_path}"):
        assert (answer.kind, answer.text) == (
            "SitfastError",
            "data.batch_size=9 is not divisible by world_size=2; try 8 or 10",
        )


def test_a_rank_that_fails_is_reported(ranks):
    answers = ranks.run(2, _fails_on_rank_1)
    assert answers[0] == 0 and isinstance(answers[1], Failed) and answers[1].kind == "ZeroDivisionError"


def _fails_on_rank_1() -> int:
    import os

    return 0 if os.environ["RANK"] == "0" else 1 // 0
