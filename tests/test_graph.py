"""Steps recorded as CUDA graphs do what they would have done."""

import pytest
import torch

from sitfast import config, parallel
from sitfast.errors import SitfastError
from sitfast.graph import WARM_UP, Recorded
from sitfast.trainer import Trainer
from tests.conftest import losses, tensors, train

SMALL = ["model.hidden_size=768", "model.num_heads=12", "train.device=cuda", "data.batch_size=16", "train.steps=8"]
SMALL += ["checkpoint.every=8", "train.compile=false"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision=bf16", "train.compile=true"],
        ["train.precision=bf16", "train.accumulate=2"],
        ["train.precision=bf16", "train.residual=fp32", "train.accumulate=4"],
        ["train.precision=fp16"],
        ["train.precision=tf32", "parallel.activation_checkpoint=block"],
        ["train.precision=bf16", "train.kernels=reference"],
    ],
    ids=lambda settings: "-".join(s.partition("=")[2] for s in settings),
)
def test_a_recorded_run_is_the_same_run(tiny, tmp_path, settings):
    runs = {}
    for graph in ("false", "true"):
        trainer = train(*tiny, *SMALL, *settings, f"train.cuda_graph={graph}", f"output_dir={tmp_path / graph}")
        assert bool(trainer.recorded and trainer.recorded.active) == (graph == "true")
        runs[graph] = tensors(tmp_path / graph / "checkpoint-8")
        del trainer
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    for key, value in runs["false"].items():
        assert torch.equal(runs["true"][key], value), key


@pytest.mark.gpu
def test_what_cannot_be_recorded_says_so():
    recorded = Recorded(lambda x: x.sum() + x.sum().item(), torch.device("cuda", 0))
    x = torch.ones(4, device="cuda")
    for _ in range(WARM_UP):
        recorded(True, x)
    with pytest.raises(SitfastError, match="cannot be recorded as a CUDA graph: .*; use train.cuda_graph=false"):
        recorded(True, x)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_batch_of_another_shape_is_refused():
    recorded = Recorded(lambda x: (2 * x).sum(), torch.device("cuda", 0))
    for i in range(WARM_UP + 3):
        assert recorded(True, torch.full((4,), float(i), device="cuda")).item() == 8 * i
    with pytest.raises(SitfastError, match=r"torch.float32 \(5,\), the recorded step takes torch.float32 \(4,\)"):
        recorded(True, torch.ones(5, device="cuda"))


def test_a_graph_needs_one_gpu(tiny):
    cfg = config.load(None, [*tiny, "train.cuda_graph=true"])
    with (
        parallel.start(cfg) as world,
        pytest.raises(SitfastError, match="train.cuda_graph=true needs GPUs without sharding, .* 1 ranks on cpu"),
    ):
        Trainer(cfg, world)


@pytest.mark.gpu
def test_announced_shapes_have_recordings_and_others_are_refused():
    """Gradients of all shapes come to lie where those of the first recorded one do."""
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))

    def run(x):
        loss = (weight * x.sum(0)).sum()
        loss.backward()
        return loss.detach()

    recorded = Recorded(run, torch.device("cuda", 0), shapes=[(4, 3), (2, 3)], parameters=[weight])
    lies = set()
    for i in range(4 * WARM_UP):
        rows = 4 if i % 3 else 2  # one shape is recorded while the other warms up
        x = torch.full((rows, 3), float(i), device="cuda")
        assert recorded(True, x).item() == 3 * rows * i
        assert weight.grad is not None and weight.grad.tolist() == [float(rows * i)] * 3
        if len(recorded._graphs) == 2:
            lies.add(weight.grad.data_ptr())
        if not recorded.active:
            weight.grad = None
    assert len(recorded._graphs) == 2 and len(lies) == 1
    with pytest.raises(SitfastError, match=r"shape \(5, 3\), the recorded steps take \(2, 3\), \(4, 3\)"):
        recorded(True, torch.ones(5, 3, device="cuda"))
