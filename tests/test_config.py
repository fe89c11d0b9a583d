"""The configuration: every mistake at once, every field read somewhere, every shipped file valid."""

import ast
from pathlib import Path

import pytest
import yaml

from sitfast import config
from sitfast.combinations import leaves
from sitfast.errors import SitfastError

ROOT = Path(__file__).parent.parent
FOLDER = ["data.source=folder", "data.path=images"]


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(SitfastError) as caught:
        config.load(None, [*FOLDER, *overrides])
    return str(caught.value).splitlines()


def test_overrides_win_and_numbers_in_scientific_notation_are_numbers():
    cfg = config.load(None, [*FOLDER, "optim.lr=2e-4", "ema.decays=[0.99, 0.999]", "vae.id=null", "seed=7"])
    assert cfg.optim.lr == 2e-4 and cfg.ema.decays == (0.99, 0.999) and cfg.vae.id is None and cfg.seed == 7


def test_all_mistakes_are_reported_at_once_with_path_value_and_remedy():
    lines = mistakes(
        "optim.learning_rat=1",  # unknown
        "data.batch_size=2.5",  # wrong type
        "train.precision=bf17",  # not a choice
        "ema.decays=[0.9, 2]",  # out of range, inside a list
        "model=3",  # not a section
        "sample.cfg_interval=[1, 0]",  # impossible combinations, beside the broken fields
        "optim.warmup_steps=500000",
        "nonsense",
    )
    assert len(lines) == 8
    text = "\n".join(lines)
    for part in (
        "override 'nonsense'",
        "optim.learning_rat is not a setting",
        "data.batch_size=2.5 must be a whole number",
        "train.precision='bf17' must be one of 'fp32', 'tf32', 'bf16' or 'fp16'",
        "ema.decays.1=2 must be",
        "model=3 must be a section",
        "sample.cfg_interval=[1.0, 0.0]: must rise",
        "optim.warmup_steps=500000 with train.steps=400000",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("lr=1", "did you mean optim.lr?"),
        ("train.stepz=1", "train.steps"),
        ("zebra=1", "data"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(override, hint):
    assert hint in mistakes(override)[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.preset=SiT-Q/2"],
        ["model.preset=null", "model.depth=2"],
        ["path.loss_weight=velocity"],
        ["path.prediction=noise", "path.loss_weight=likelihood", "path.train_eps=0"],
        ["data.source=digits"],
        ["train.accumulate=3"],
        ["ema.decays=[]"],
        ["ema.decays=[0.9, 0.9]"],
        ["sample.every=5", "model.class_dropout_prob=0"],
        ["sample.classes=[1000]"],
        ["log.val_every=10"],
        ["profile.start=5"],
        ["profile.start=5", "profile.stop=5"],
        ["profile.trace=true"],
        ["profile.operators=true"],
        ["profile.start=5", "profile.stop=6", "profile.operators=true", "profile.trace=true"],
        ["optim.min_lr=1"],
        ["data.path=null"],
        ["data.source=latents", "data.path=null"],
        ["data.source=latents", "vae.id=null"],
        ["data.source=latents", "data.crop=random"],
        ["data.caption_column=text"],
        ["data.source=latents", "data.decoder=dali"],
        ["vae.scale=0"],
    ],
)
def test_impossible_combinations(overrides):
    assert mistakes(*overrides)


def test_one_number_or_one_a_channel():
    cfg = config.load(None, [*FOLDER, "vae.scale=0.18215", "vae.shift=[1, 2.5]"])
    assert (cfg.vae.scale, cfg.vae.shift) == ((0.18215,), (1.0, 2.5))
    assert "must not be empty" in mistakes("vae.scale=[]")[0]


def test_types_are_strict():
    for override in (
        "vae.scale=wide",
        "vae.scale=true",
        "train.steps='5'",
        "data.flip=1",
        "optim.lr=fast",
        "seed=-1",
        "optim.lr=.nan",
        "model.preset=4",
    ):
        assert len(mistakes(override)) == 1


def test_a_file_that_is_no_config(tmp_path):
    for text, part in (("data: [", "is not YAML"), ("- a", "must hold sections"), ("", "must hold sections")):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(SitfastError, match=part):
            config.load(path)
    with pytest.raises(SitfastError, match="cannot be read"):
        config.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size", "message"),
    [
        (250, 1, 8, "data.batch_size=250 is not divisible by world_size=8; try 248 or 256"),
        (100, 50, 5, "data.batch_size=100 is not divisible by world_size=5 times train.accumulate=50; try 250"),
        (100, 4, 3, "data.batch_size=100 is not divisible by world_size=3 times train.accumulate=4; try 96 or 108"),
        (250, 1, 5, None),
    ],
)
def test_ranks_and_micro_batches_must_divide_the_batch(batch_size, accumulate, world_size, message):
    cfg = config.load(None, [*FOLDER, f"data.batch_size={batch_size}", f"train.accumulate={accumulate}"])
    if message is None:
        config.check_world(cfg, world_size)
    else:
        with pytest.raises(SitfastError, match=f"^{message}$"):
            config.check_world(cfg, world_size)


def test_dump_reads_back_equal(tmp_path):
    cfg = config.load(None, [*FOLDER, "optim.lr=3e-5", "sample.classes=[1,2]"])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(cfg))
    assert config.load(path) == cfg


def test_differences_name_what_makes_another_run():
    old = config.load(None, FOLDER)
    free = ["train.steps=9", "log.every=3", "data.num_workers=1", "train.accumulate=2", "output_dir=x", "sample.cfg=2"]
    assert config.differences(old, config.load(None, [*FOLDER, *free])) == []
    changed = config.differences(old, config.load(None, [*FOLDER, "optim.lr=1e-3", "seed=3"]))
    assert [c.split(":")[0] for c in changed] == ["seed", "optim.lr"]
    cosine = config.load(None, [*FOLDER, "optim.schedule=cosine"])
    assert config.differences(cosine, config.load(None, [*FOLDER, "optim.schedule=cosine", "train.steps=9"]))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path):
    cfg = config.load(path)
    assert cfg.output_dir == f"runs/{path.stem}"
    if path.stem not in ("digits", "captions", "genes"):  # these have sizes of their own
        assert cfg.model.preset and cfg.data.source == "folder"


def test_there_is_a_config_for_each_size():
    names = {p.stem for p in (ROOT / "configs").glob("*.yaml")}
    assert {"digits", "s2", "b2", "l2", "xl2", "xl2_512"} <= names
    presets = [yaml.safe_load((ROOT / f"configs/{n}.yaml").read_text()) for n in names if n.startswith("pixel_")]
    assert {p["model"]["preset"].split("/")[1] for p in presets} == {"4", "8", "16"}
    assert all(p["vae"]["id"] is None for p in presets)


def test_every_field_is_read_somewhere():
    """Each `section.field` appears as an attribute of something named after its section, outside config.py."""
    read: set[tuple[str, str]] = set()
    for path in (ROOT / "sitfast").rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                read.add((name.lstrip("_"), node.attr))
    aliases = {"sample": {"settings"}, "vae": {"settings"}, "text": {"settings"}, "": {"cfg"}}
    unread = []
    for path, _ in leaves(config.Config().model_dump()):
        section, _, field = path.rpartition(".")
        names = {section, f"{section}_cfg", f"cfg_{section}"} | aliases.get(section, set())
        if not any((name, field) in read for name in names):
            unread.append(path)
    # The numbers of the model section go to build_model as one dict, whose keys are its keyword arguments.
    unread = [path for path in unread if not path.startswith("model.")]
    assert unread == []


def test_every_model_field_is_an_argument_of_the_model():
    import inspect

    from sitfast.model import SiT, build_model

    arguments = {*inspect.signature(SiT.__init__).parameters, *inspect.signature(build_model).parameters}
    assert {*config.ModelConfig.model_fields} - {"init_from"} <= arguments
