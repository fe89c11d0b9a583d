"""The configuration of a run: typed sections, a YAML file, dotted overrides.

    defaults  ◁  config.yaml  ◁  section.field=value …      (each overrides what stands to its left)

`load` reports every mistake at once (unknown keys, wrong types, combinations that cannot work), each with its dotted path,
the value and what would work. The defaults are the recipe of the SiT paper for ImageNet at 256 px. The object is frozen:
what `save` wrote into the run folder is what ran.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sitfast.combinations import Problem, impossible, leaves, plain
from sitfast.errors import SitfastError

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Epsilon = Annotated[float, Field(ge=0, lt=0.5)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def loose(default: Any) -> Any:
    """A tuple field: YAML has only lists, so the container (not its items) is taken leniently."""
    return Field(default=default, strict=False)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


Size = Annotated[tuple[Positive, Positive], Field(strict=False)]  # height, width
Channels = Annotated[tuple[float, ...], BeforeValidator(_listed), Field(min_length=1)]  # one number is a list of one


class DataConfig(Section):
    source: Literal["digits", "folder", "hf", "webdataset", "latents", "shapes", "genes"] = "folder"
    path: str | None = None  # class folders; hub id, Parquet, Arrow; tar files; what sitfast.encode wrote; .h5ad
    split: str = "train"  # hf
    image_column: str = "image"  # hf
    label_column: str | None = "label"  # hf, .json members of webdataset, .obs of genes; null is one class for all
    caption_column: str | None = None  # the same, or .txt members; null is no texts
    image_size: Positive = 256  # pixels a side
    batch_size: Positive = 256  # global: over all ranks and accumulated micro-batches
    resolutions: tuple[Size, ...] = loose(())  # [height, width] of a batch, one drawn a step; none: image_size
    batch_multiple: Positive = 8  # with resolutions: the images of a batch are a multiple of it
    num_workers: Count = 8  # decoding processes a rank; 0 decodes in the training process
    prefetch: Positive = 4  # batches each worker keeps ready
    decoder: Literal["pil", "dali"] = "pil"  # dali decodes JPEGs on the GPU; without a GPU on its own threads
    decoder_threads: Positive = 8  # dali
    hw_decoder_load: Share = 0.65  # dali: share of the JPEGs for the GPU's hardware decoder
    crop: Literal["center", "random"] = "center"  # random: of 0.8 to all of the shorter side, anywhere
    flip: bool = True  # mirror half of the images
    val_samples: Count = 0  # rows held out of training for the validation loss
    max_unreadable: Share = 0.01  # a larger share of unreadable images stops the run
    window_mib: Positive = 512  # latents, genes: as much of the disk is shuffled at a time
    verify: bool = False  # latents, genes: compare every shard's hash at the start
    layer: str | None = None  # genes: the matrix, a layer or "raw"; null is X
    transform: Literal["log1p", "none"] = "log1p"  # genes: counts to 1e4 a cell, then log(1 + x); none: done already
    num_genes: Positive | None = None  # genes: only so many, the most variable; null keeps all


class VAEConfig(Section):
    id: str | None = "stabilityai/sd-vae-ft-ema"  # hub id or local folder; null trains on pixels
    scale: Channels | None = loose(
        None
    )  # latents = (z - shift) * scale; one number or one a channel; null: the VAE's own
    shift: Channels | None = loose(None)
    posterior: Literal["sample", "mean"] = "sample"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: Positive = 64  # images in one encode or decode call
    compile: bool | None = None  # torch.compile of the encoder; null means on GPUs


class TextConfig(Section):
    encoder: str | None = None  # bytes, or hub id or folder of a CLIP text model or T5 encoder; null: classes
    length: Annotated[int, Field(ge=2)] = 77  # tokens of every caption: longer ones are cut, shorter ones padded
    width: Positive = 256  # of the byte encoder
    depth: Positive = 2  # of the byte encoder
    precision: Literal["fp32", "bf16"] = "fp32"  # of a frozen encoder
    cache: bool = False  # sitfast.encode stores the states of a frozen encoder beside the latents; training reads them


class PathConfig(Section):
    type: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    train_eps: Epsilon | None = None  # null takes the official interval of path and prediction
    sample_eps: Epsilon | None = None
    time_sampling: Literal["uniform", "logit_normal", "shifted"] = "uniform"
    logit_mean: float = 0.0  # of logit_normal
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    time_shift: Annotated[float, Field(gt=0)] = 1.0  # of shifted; above 1 favours the noise end


class ModelConfig(Section):
    preset: str | None = "SiT-XL/2"  # (SiT|DiT)-(S|B|L|XL)/(2|4|8|16), or null and the four numbers below
    patch_size: Positive | None = None
    hidden_size: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    class_dropout_prob: Share = 0.1  # share of labels replaced by the null class, of captions by the empty one
    num_classes: Positive = 1000
    qk_norm: Literal["none", "rms", "layer"] = "none"  # of each head of q and k, with learned weights
    rope: bool = False  # axial rotary embedding of q and k, beside the position embedding
    rope_grid: Positive | None = None  # tokens a side that its angles were learned on; null: of the (first) image_size
    learn_sigma: bool = True  # twice the output channels, the second half unused (as published weights have it)
    init_from: str | None = None  # weights to start from: .safetensors, checkpoint folder, or official .pt


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Decay, Decay] = loose((0.9, 0.999))
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Count = 0
    min_lr: NonNegative = 0.0  # the floor of the cosine
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    moments: Literal["fp32", "bf16"] = "fp32"  # bf16 halves AdamW's state, rounded stochastically
    on_nonfinite: Literal["stop", "skip"] = "stop"


class EMAConfig(Section):
    decays: tuple[Decay, ...] = loose((0.9999,))  # the first is the one that samples
    warmup: bool = False  # decay = min(decay, (1 + n) / (10 + n)) after n updates


class TrainConfig(Section):
    steps: Positive = 400_000
    accumulate: Positive = 1  # micro-batches a step
    auto_accumulate: bool = False  # more of them where the predicted memory needs it; the global batch stays
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    residual: Literal["bf16", "fp32"] = "bf16"  # of bf16: a bf16 copy of the weights computes, or autocast does, slower
    compile: bool | None = None  # torch.compile of each block; null means on GPUs
    cuda_graph: bool | None = None  # replay a recorded forward and backward; null: on one GPU; true: under ddp too
    mlp_save: Literal["preact", "both"] = "preact"  # "both" keeps the GELU's output too: hardly faster, for memory
    kernels: Literal["auto", "reference"] = "auto"  # "reference" runs everything in plain PyTorch, to compare with
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ParallelConfig(Section):
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    timeout_s: Positive = 600  # a collective that takes longer stops the run
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # whole weights on each rank, sharded over all, over some
    shard_size: Positive | None = None  # of hsdp: ranks that share one copy of the weights; null: those of one host
    reshard_after_forward: bool = True  # of fsdp, hsdp: free a block's gathered weights until its backward pass
    activation_checkpoint: Literal["none", "selective", "block"] = "none"  # recompute nothing, all but GEMMs, all


class CheckpointConfig(Section):
    every: Positive = 10_000
    keep: Count = 3  # the newest so many; 0 keeps all
    background: bool = True  # training goes on while a checkpoint is written


class LogConfig(Section):
    every: Positive = 100
    tensorboard: bool | None = None  # null means when installed
    wandb: bool = False
    trackio: bool = False
    project: str = "sitfast"
    val_every: Count = 0  # steps between validation losses; 0 never
    val_bins: Positive = 10  # equal bins of t


class SampleConfig(Section):
    every: Count = 0  # steps between sample grids while training; 0 never
    num: Positive = 16
    classes: tuple[Count, ...] | None = loose(None)  # cycled through; null spreads over all
    prompts: tuple[str, ...] | None = loose(None)  # captions in place of classes, cycled through
    cfg: NonNegative = 4.0  # guidance scale; 1 is none
    cfg_interval: tuple[Share, Share] = loose((0.0, 1.0))  # t outside it is not guided
    cfg_channels: Literal["all", "first3"] = "all"
    method: Literal["euler", "heun", "dopri5", "sde_euler", "sde_heun"] = "heun"
    steps: Positive = 50
    rtol: Annotated[float, Field(gt=0)] = 1e-3  # of dopri5
    atol: Annotated[float, Field(gt=0)] = 1e-6
    diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"] = "sigma"
    diffusion_norm: NonNegative = 1.0
    last_step: Literal["none", "mean", "tweedie", "euler"] = "mean"
    last_step_size: Annotated[float, Field(gt=0, lt=1)] = 0.04
    batch_size: Positive = 64  # samples integrated together
    size: Size | None = None  # [height, width] in pixels; null: data.image_size


class ProfileConfig(Section):
    start: Positive | None = None  # first profiled step
    stop: Positive | None = None  # first step after the window
    trace: bool = False  # also write a Chrome trace into the run folder
    operators: bool = False  # an NVTX range around every operator in the window, in backward too


class StageConfig(Section):
    """One stage of a run that grows; what it does not name stays as the config has it."""

    steps: Positive  # of this stage; warm-up and cosine span it
    image_size: Positive
    batch_size: Positive
    lr: Annotated[float, Field(gt=0)]
    patch_size: Positive | None = None  # null: the model's
    resolutions: tuple[Size, ...] = loose(())  # as data.resolutions


class Config(Section):
    output_dir: str = "runs/sitfast"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    path: PathConfig = PathConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    profile: ProfileConfig = ProfileConfig()
    stages: tuple[StageConfig, ...] = loose(())  # in turn, each from the weights of the one before


# Fields that may differ when a run continues: they change where, how fast or how visibly it runs, not what it computes.
_FREE = (
    "output_dir",
    "data.path",
    "data.num_workers",
    "data.prefetch",
    "data.decoder_threads",
    "data.hw_decoder_load",
    "data.max_unreadable",
    "data.verify",
    "vae.id",
    "vae.batch_size",
    "vae.compile",
    "train.accumulate",
    "train.auto_accumulate",
    "train.compile",
    "train.cuda_graph",
    "train.mlp_save",
    "train.kernels",
    "train.device",
    "parallel",
    "checkpoint",
    "log",
    "sample",
    "profile",
)


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in a YAML file (None: the defaults) with overrides; SitfastError lists all mistakes."""
    raw = _read(Path(path)) if path is not None else {}
    problems = override(raw, overrides)
    cfg = parse(raw, problems)
    return cfg


def parse(raw: dict[str, Any], problems: list[Problem] | None = None) -> Config:
    """Validate a nested dict. `problems` are mistakes found before, reported together with those found here."""
    problems = list(problems or ())
    try:
        cfg = Config.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            problems.append(_explain(item))
            _drop(raw, item["loc"])
        cfg = Config.model_validate(raw)  # the rest, so that impossible combinations are reported in the same breath
    broken = {path for problem in problems for path in problem.paths}
    problems += [p for p in impossible(cfg, stage_configs(cfg)) if broken.isdisjoint(p.paths)]
    if problems:
        raise SitfastError("\n".join(problem.message for problem in problems))
    return cfg


def check_world(cfg: Config, world_size: int) -> None:
    """The global batch must split evenly over ranks and micro-batches."""
    share = world_size * cfg.train.accumulate
    by = f"world_size={world_size}"
    if cfg.train.accumulate > 1:
        by += f" times train.accumulate={cfg.train.accumulate}"
    if cfg.data.resolutions:
        from sitfast.data.buckets import kinds

        for bucket in kinds(cfg.data):
            if bucket.images % share:
                raise SitfastError(
                    f"data.resolutions: a batch of {bucket.height} × {bucket.width} has {bucket.images} images, which is not"
                    f" divisible by {by}; use data.batch_multiple={math.lcm(share, cfg.data.batch_multiple)}"
                )
    elif cfg.data.batch_size % share:
        below = cfg.data.batch_size // share * share
        options = f"{below} or {below + share}" if below else f"{share}"
        raise SitfastError(f"data.batch_size={cfg.data.batch_size} is not divisible by {by}; try {options}")


def stage_configs(cfg: Config) -> list[Config]:
    """What each stage is by itself, as if it were the run: of a config without stages, that config."""
    made = []
    for number, stage in enumerate(cfg.stages):
        data = {"image_size": stage.image_size, "batch_size": stage.batch_size, "resolutions": stage.resolutions}
        model: dict[str, Any] = {} if stage.patch_size is None else {"patch_size": stage.patch_size}
        if number:
            model["init_from"] = None
        changes = {"data": data, "model": model, "optim": {"lr": stage.lr}, "train": {"steps": stage.steps}}
        sections = {name: getattr(cfg, name).model_copy(update=fields) for name, fields in changes.items()}
        made.append(cfg.model_copy(update=sections | {"stages": ()}))
    return made or [cfg]


def one_stage(cfg: Config, command: str) -> Config:
    """What a command measures that measures one size: of a run in stages the last."""
    cfg = stage_configs(cfg)[-1]
    if cfg.data.resolutions:
        raise SitfastError(f"{command} measures images of one size; use data.resolutions=[] and set data.image_size")
    return cfg


def dump(cfg: Config) -> str:
    """The whole configuration, defaults included, as YAML."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


def flat(cfg: Config) -> dict[str, Any]:
    """Every field by its dotted path."""
    return dict(leaves(cfg.model_dump(mode="json")))


def differences(old: Config, new: Config) -> list[str]:
    """`section.field: old → new` for every field whose change makes it another run."""
    free: set[str] = set(_FREE)
    if new.optim.schedule == "constant":
        free.add("train.steps")  # under a cosine the number of steps shapes every rate
    if old.stages and new.stages[: len(old.stages)] == old.stages:
        free.add("stages")  # further ones may follow
    before, after = dict(leaves(old.model_dump())), dict(leaves(new.model_dump()))
    changed = (path for path in after if before[path] != after[path])
    return [f"{p}: {before[p]} → {after[p]}" for p in changed if p not in free and p.split(".")[0] not in free]


def describe() -> str:
    """Every field with its default, one a line, for `--help`."""
    return "\n".join(f"  {path}={plain(value)}" for path, value in leaves(Config().model_dump()))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as a string; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise SitfastError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SitfastError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise SitfastError(f"config file {path} must hold sections such as `data:`, not a {type(raw).__name__}")
    return raw


def override(raw: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> list[Problem]:
    """Write `section.field=value` overrides into `raw`; returns those that have no such form."""
    problems = []
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            problems.append(Problem((path,), f"override {item!r} is not of the form section.field=value"))
            continue
        node = raw
        for key in keys[:-1]:
            child = node.get(key)
            node[key] = node = dict(child) if isinstance(child, dict) else {}
        try:
            node[keys[-1]] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            problems.append(Problem((path,), f"override {item!r}: the value is not YAML; quote it"))
    return problems


def _explain(item: Any) -> Problem:
    """One pydantic error as `path=value …; what would work`."""
    loc = [str(part) for part in item["loc"]]
    path, kind, context = ".".join(loc), item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = dict(leaves(Config().model_dump()))
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
        same = [k for k in known if k.rsplit(".", 1)[-1] == loc[-1]]
        section = [k for k in known if k.startswith(loc[0] + ".")] if len(loc) > 1 else []
        if loc[0] == "stages" and len(loc) > 1:
            near, same, section = [], [], [f"{field} of each stage" for field in StageConfig.model_fields]
        guess = (near or same)[:1]
        hint = f"did you mean {guess[0]}?" if guess else f"known here: {', '.join(section or Config.model_fields)}"
        return Problem((path,), f"{path} is not a setting; {hint}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Problem((path,), f"{path}={item['input']!r} must be a section with fields, such as `{path}: {{…}}`")
    rules = {
        "literal_error": f"must be one of {context.get('expected')}",
        "greater_than": f"must be above {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be below {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "tuple_type": "must be a list such as [0.9, 0.999]",
        "missing": "is missing from the list",
        "too_long": f"must be a list of {context.get('max_length')}",
        "too_short": "must not be empty",
    }
    rule = rules.get(kind, item["msg"][:1].lower() + item["msg"][1:])
    value = "" if kind == "missing" else f"={item['input']!r}"
    return Problem((path,), f"{path}{value} {rule}")


def _drop(raw: dict[str, Any], loc: tuple[int | str, ...]) -> None:
    """Remove the field at `loc` (or the list it is an item of), so that its default takes its place."""
    node: Any = raw
    for depth, key in enumerate(loc):
        if depth == len(loc) - 1 or not isinstance(node.get(key), dict):
            node.pop(key, None)
            return
        node[key] = node = dict(node[key])
