"""From counts to a trained model and back into an .h5ad file, on cells that the test makes."""

import json

import numpy as np
import pytest
import torch

from sitfast import build_model, config, data, evaluate, forward_macs, parallel, sample
from sitfast.data import genes
from sitfast.errors import SitfastError
from sitfast.gene_model import GeneSiT, sincos_positions
from sitfast.trainer import Trainer
from tests.conftest import assert_equal, train

anndata = pytest.importorskip("anndata")
pandas = pytest.importorskip("pandas")

TYPES = ["B", "NK, activated", "T"]
GENES = 50  # no multiple of a patch of 8


def model(**changes):
    torch.manual_seed(0)
    sizes = dict(input_size=21, in_channels=1, patch_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    made = build_model(genes=True, **{**sizes, "learn_sigma": False, **changes})
    for parameter in made.parameters():  # the output is zero at first
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def inputs(size=21):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, size, generator=generator, requires_grad=True)
    return x, torch.rand(4, generator=generator), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_genes_in_and_genes_out(learn_sigma):
    made = model(learn_sigma=learn_sigma)
    assert isinstance(made, GeneSiT) and made.shape == (21,) and made.num_tokens == 3
    x, t, y = inputs()
    out = made(x, t, y)
    assert out.shape == (4, 21)
    (gradient,) = torch.autograd.grad(
        out[0, 20], x
    )  # the last gene hears of all genes of its cell, and of no other cell
    assert gradient[0].abs().min() > 0 and gradient[1:].abs().max() == 0


def test_what_fills_the_last_patch_counts_nothing():
    """21 genes in patches of 8 are the first 21 of 24, of which three are zero."""
    short, full = model(), model(input_size=24)
    full.load_state_dict(short.state_dict())
    x, t, y = inputs()
    padded = torch.cat([x.detach(), torch.zeros(4, 3)], dim=1)
    torch.testing.assert_close(short(x, t, y), full(padded, t, y)[:, :21], rtol=0, atol=0)
    short(x, t, y).square().sum().backward()
    unused = short.final_layer.linear.weight.grad  # of the last three outputs the first two patches alone use any
    assert unused.shape == (8, 16) and unused.abs().sum(1).min() > 0


def test_positions_are_those_of_the_formula():
    found = sincos_positions(8, 5)[0]
    for place in range(5):
        angles = [place * 10000 ** (-i / 4) for i in range(4)]
        np.testing.assert_allclose(found[place], [*np.sin(angles), *np.cos(angles)], rtol=1e-6, atol=1e-7)
    assert torch.equal(model().pos_embed, torch.nn.Parameter(sincos_positions(16, 3)))


def test_macs_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    made, (x, t, y) = model(), inputs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x, t, y)
    attention = 2 * 2 * 3**2 * 16  # of two blocks and three tokens; the counter does not know attention on a CPU
    assert counter.get_total_flops() == 2 * 4 * (forward_macs(made) - attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rope": True}, "rope=true"), ({"in_channels": 2}, "in_channels=2"), ({"input_size": 0}, "input_size=0")],
)
def test_a_model_that_cannot_be(changes, message):
    with pytest.raises(SitfastError, match=message):
        model(**changes)


def test_another_number_of_genes():
    x, t, y = inputs(20)
    with pytest.raises(SitfastError, match=r"shape \(4, 20\), the model takes \(B, 21\)"):
        model()(x, t, y)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """1,000 cells of three types, each with ten genes of its own and two programs that its cells share in part."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 1000)
    rate = np.tile(random.uniform(0.5, 4, GENES), (1000, 1))
    for kind in range(3):
        rate[np.ix_(labels == kind, np.arange(kind * 10, kind * 10 + 10))] *= 6
    rate[:, 30:40] *= np.exp(random.normal(size=(1000, 1)))
    counts = random.poisson(rate * random.uniform(0.5, 2, (1000, 1))).astype(np.float32)
    cells = [f"cell{k}" for k in range(1000)]
    obs = pandas.DataFrame({"type": pandas.Categorical.from_codes(labels, TYPES)}, index=cells)
    var = pandas.DataFrame(index=[f"gene{k}" for k in range(GENES)])
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    anndata.AnnData(counts, obs=obs, var=var).write_h5ad(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genes, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


def run_of(file, folder, *more):
    return [
        "data.source=genes", f"data.path={file}", "data.label_column=type", "data.batch_size=64", "data.num_workers=0",
        "data.flip=false", "data.val_samples=250", "vae.id=null", "model.preset=null", "model.patch_size=8",
        "model.hidden_size=48", "model.depth=2", "model.num_heads=2", "model.num_classes=3", "model.learn_sigma=false",
        "optim.lr=3e-3", "optim.betas=[0.9, 0.99]", "optim.schedule=cosine", "optim.warmup_steps=20", "ema.decays=[0.98]",
        "ema.warmup=true", "train.steps=800", "train.precision=fp32", "train.device=cpu", "log.tensorboard=false",
        "log.val_every=200", "log.val_bins=4", "sample.cfg=1.5", "sample.steps=20", "sample.batch_size=300",
        f"output_dir={folder}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "genes"
    train(*run_of(file, folder))
    return folder


def test_generated_cells_are_like_real_ones(trained, capsys):
    """The figures of docs/genes.md in small, at the same bounds."""
    evaluate.main(["--ckpt", str(trained), "--num", "300"])
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["classifier_accuracy"] > 0.9
    assert found["label_share"] >= 0.8 * found["classifier_accuracy"]
    assert found["mean_correlation"] >= 0.95 and found["variance_correlation"] >= 0.8
    assert 0.5 < found["total_variance"] < 1.5 and 0.9 < found["real_total_variance"] < 1.1
    assert found["distance"] > 0.5 * found["real_distance"]  # no copies
    assert len(found["val_loss_bins"]) == 4
    said = capsys.readouterr().out
    assert "250 held-out cells" in said and f"{found['label_share']:.1%}" in said


def test_cells_of_other_types_fail_the_figure(trained):
    run = sample.Restored(str(trained), ema=True, device="cpu", overrides=["sample.method=euler"])
    source = data.build_source(run.cfg.data)
    labels = sample.labels_for(90, None, 3)
    x = run.generate(labels, seed=1)
    read = [evaluate.evaluate_genes.read_cells(x, y, source, val_samples=250) for y in (labels, (labels + 1) % 3)]
    assert read[0]["label_share"] > 0.8 and read[1]["label_share"] < 0.2
    noise = evaluate.evaluate_genes.read_cells(torch.rand_like(x), labels, source, val_samples=250)
    assert noise["mean_correlation"] < 0.5 and noise["variance_correlation"] < 0.5


def test_samples_are_written_as_cells(trained, tmp_path, capsys):
    out = tmp_path / "made.h5ad"
    sample.main(["--ckpt", str(trained), "--classes", "T,0", "--num", "6", "--format", "h5ad", "--out", str(out)])
    read = anndata.read_h5ad(out)
    assert "6 samples" in capsys.readouterr().out
    assert read.obs["type"].tolist() == ["T", "B"] * 3 and read.obs["type"].cat.categories.tolist() == TYPES
    assert read.var_names.tolist() == [f"gene{k}" for k in range(GENES)]
    assert read.X.min() >= 0 and 1 < read.X.max() < np.log1p(1e4)
    assert read.uns["sitfast"]["transform"] == "log1p" and read.uns["sitfast"]["step"] == 800
    run = sample.Restored(str(trained), ema=True, device="cpu", overrides=[])
    torch.testing.assert_close(
        torch.from_numpy(read.X), run.generate(torch.tensor([2, 0] * 3), seed=0), rtol=1e-4, atol=1e-4
    )
    sample.main(["--ckpt", str(trained), "--num", "2"])  # the form is that of the data where none is named
    assert anndata.read_h5ad(trained / "samples-800.h5ad").shape == (2, GENES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "grid"], "--format grid: .* was trained on genes; use h5ad"),
        (["--classes", "Tcell"], r"cannot be read at 'Tcell'; .*or by name, such as "),
        (["--classes", "0-3"], "the model knows classes 0 to 2"),
    ],
)
def test_bad_arguments(trained, arguments, message):
    with pytest.raises(SitfastError, match=message):
        sample.main(["--ckpt", str(trained), *arguments])


def test_names_of_classes():
    names = ["10", "CD4+/CD25 T Reg", "CD8-"]
    assert sample.parse_classes("CD4+/CD25 T Reg, CD8-,1", 3, names) == (1, 2, 1)
    with pytest.raises(SitfastError, match="knows classes 0 to 2"):
        sample.parse_classes("10", 3, names)  # what can be a number is one


def test_a_run_resumes_bit_for_bit_in_the_middle_of_an_epoch(file, tmp_path):
    short = [
        "train.steps=18",
        "checkpoint.every=6",
        "log.val_every=0",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
    ]
    train(*run_of(file, tmp_path / "whole", *short))
    train(*run_of(file, tmp_path / "parts", *short, "train.steps=14"))  # 896 samples, of epochs of 750
    train(*run_of(file, tmp_path / "parts", *short, "data.num_workers=1"))
    assert_equal(tmp_path / "whole/checkpoint-18", tmp_path / "parts/checkpoint-18")


def test_a_run_does_not_go_on_with_other_cells(file, tmp_path):
    short = [
        "train.steps=2",
        "checkpoint.every=2",
        "log.val_every=0",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
    ]
    train(*run_of(file, tmp_path / "run", *short))
    other = anndata.read_h5ad(file)
    other.X[0, 0] += 1
    other.write_h5ad(tmp_path / "other.h5ad")
    cfg = config.load(None, run_of(tmp_path / "other.h5ad", tmp_path / "run", *short, "train.steps=4"))
    with parallel.start(cfg) as world, pytest.raises(SitfastError, match="has other genes, or other values, than"):
        Trainer(cfg, world)
    with pytest.raises(SitfastError, match="has other genes or values than"):
        evaluate.main(["--ckpt", str(tmp_path / "run"), f"data.path={tmp_path / 'other.h5ad'}"])
