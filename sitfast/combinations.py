"""What is fine alone and impossible together: the rules between the fields of a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from sitfast.errors import SitfastError
from sitfast.presets import preset_kwargs

if TYPE_CHECKING:
    from sitfast.config import Config


class Problem(NamedTuple):
    """One thing wrong with a configuration; `paths` are the dotted fields it involves."""

    paths: tuple[str, ...]
    message: str


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: Any) -> str:
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split("\n")[0]


def impossible(cfg: Config, stages: Sequence[Config]) -> Iterator[Problem]:
    """Fields that are fine alone and impossible together, in any stage; what is so in all of them is said once."""
    found: dict[Problem, list[int]] = {}
    if cfg.data.source == "genes" and cfg.stages:
        yield Problem(("data.source", "stages"), "data.source=genes with stages: genes have one size; use stages=[]")
    if cfg.data.source == "latents" and len({stage.data.image_size for stage in stages}) > 1:
        rule = "cached latents have one size; train from the images"
        yield Problem(("data.source", "stages"), f"data.source=latents with stages of several image sizes: {rule}")
    for number, stage in enumerate(stages):
        for problem in _combinations(stage):
            found.setdefault(problem, []).append(number)
    for (paths, message), numbers in found.items():
        for number in numbers[:1] if len(numbers) == len(stages) else numbers:
            where = "" if len(numbers) == len(stages) else f"stages.{number}: "
            yield Problem((*paths, "stages"), where + message) if cfg.stages else Problem(paths, message)


def _combinations(cfg: Config) -> Iterator[Problem]:
    """Those of one stage, or of a run without stages."""

    def problem(*paths: str, rule: str) -> Problem:
        values = dict(leaves(cfg.model_dump()))
        return Problem(paths, f"{' with '.join(f'{p}={plain(values[p])}' for p in paths)}: {rule}")

    data, path, model, optim, sample, profile = cfg.data, cfg.path, cfg.model, cfg.optim, cfg.sample, cfg.profile
    places = {
        "folder": "the folder of class folders",
        "hf": "the hub id or the folder of the data set",
        "webdataset": "the folder of tar files",
        "latents": "the folder that sitfast.encode wrote",
        "genes": "the .h5ad file",
    }
    if data.source in places and data.path is None:
        yield problem("data.source", "data.path", rule=f"name {places[data.source]} in data.path")
    if data.caption_column is not None and data.source in ("digits", "folder", "genes"):
        yield problem("data.caption_column", "data.source", rule="there are no texts; use data.caption_column=null")
    if data.caption_column is not None and data.source == "shapes":
        yield problem(
            "data.caption_column", "data.source", rule="they have their captions; use data.caption_column=null"
        )
    if cfg.text.encoder is not None:
        if data.source in ("digits", "folder", "genes"):
            yield problem(
                "text.encoder", "data.source", rule="there are no captions; use hf, webdataset, latents, shapes"
            )
        elif data.source in ("hf", "webdataset") and data.caption_column is None:
            yield problem("text.encoder", "data.caption_column", rule="name the captions in data.caption_column")
        if cfg.text.encoder == "bytes" and cfg.text.cache:
            yield problem("text.cache", "text.encoder", rule="it learns along with the model; use text.cache=false")
        if sample.classes is not None:
            yield problem(
                "text.encoder", "sample.classes", rule="captions take the place of classes; use sample.prompts"
            )
        if sample.every and not sample.prompts:
            yield problem("text.encoder", "sample.prompts", rule="sample grids need captions, such as [a red circle]")
    elif cfg.text.cache:
        yield problem("text.cache", "text.encoder", rule="there is no encoder; name a CLIP text model or T5 encoder")
    elif sample.prompts is not None:
        yield problem("sample.prompts", "text.encoder", rule="only a model of captions reads them; use sample.classes")
    if data.source == "shapes":
        if cfg.vae.id is not None:
            yield problem("data.source", "vae.id", rule="the shapes are trained on pixels; use vae.id=null")
        if data.flip:
            yield problem("data.source", "data.flip", rule="a mirrored shape belies its caption; use data.flip=false")
    if data.decoder == "dali" and data.source in ("digits", "latents", "shapes", "genes"):
        yield problem("data.decoder", "data.source", rule="there are no image files to decode; use data.decoder=pil")
    if data.crop == "random" and data.source in ("digits", "latents", "shapes", "genes"):
        yield problem("data.crop", "data.source", rule="there are no images to crop; use data.crop=center")
    if data.source == "latents" and cfg.vae.id is None:
        yield problem("data.source", "vae.id", rule="name the VAE that made the latents")
    if data.resolutions:
        if data.source == "latents":
            rule = "cached latents have one size; train from the images, or use data.resolutions=[]"
            yield problem("data.source", "data.resolutions", rule=rule)
        elif data.source == "genes":
            yield problem("data.source", "data.resolutions", rule="genes are no images; use data.resolutions=[]")
        elif data.source == "digits" and any(size != (8, 8) for size in data.resolutions):
            yield problem("data.source", "data.resolutions", rule="the digits are 8 x 8; use data.resolutions=[]")
        elif data.decoder == "dali":
            yield problem("data.decoder", "data.resolutions", rule="DALI decodes to one size; use data.decoder=pil")
        from sitfast.data.buckets import kinds

        try:
            kinds(data)
        except SitfastError as error:
            yield Problem(("data.resolutions", "data.batch_size", "data.batch_multiple"), str(error))
    if sample.size is not None and data.source == "genes":
        yield problem("data.source", "sample.size", rule="genes are no images; use null")
    if model.rope_grid is not None and not model.rope:
        yield problem("model.rope_grid", "model.rope", rule="there are no angles to space; use null")
    if cfg.vae.scale is not None and 0 in cfg.vae.scale:
        yield problem("vae.scale", rule="a latent times 0 is nothing; 1 leaves it as it is")
    if data.source == "digits":
        if data.image_size != 8:
            yield problem("data.source", "data.image_size", rule="the digits are 8 x 8; use data.image_size=8")
        if cfg.vae.id is not None:
            yield problem("data.source", "vae.id", rule="the digits are trained on pixels; use vae.id=null")
        if data.flip:
            yield problem("data.source", "data.flip", rule="a mirrored digit is another sign; use data.flip=false")
        if model.num_classes < 10:
            yield problem("data.source", "model.num_classes", rule="there are ten digits; use model.num_classes=10")
    if data.source == "genes":
        if cfg.vae.id is not None:
            yield problem("data.source", "vae.id", rule="genes are trained on as they are; use vae.id=null")
        if data.flip:
            yield problem("data.source", "data.flip", rule="a cell has no mirror image; use data.flip=false")
        if model.rope:
            yield problem("data.source", "model.rope", rule="there is no distance between genes; use model.rope=false")
        if model.preset is not None and model.preset.startswith("DiT-"):
            yield problem("data.source", "model.preset", rule=f"use {model.preset.replace('DiT', 'SiT')}")
        if sample.every:
            yield problem("data.source", "sample.every", rule="cells make no picture; use sample.every=0")
        if sample.cfg_channels != "all":
            yield problem("data.source", "sample.cfg_channels", rule="genes are no channels; use all")
    if data.batch_size % cfg.train.accumulate:
        yield problem("data.batch_size", "train.accumulate", rule="the batch must split evenly into micro-batches")
    if path.prediction == "velocity" and path.loss_weight != "none":
        yield problem("path.prediction", "path.loss_weight", rule="weights apply to noise and score; use none")
    if path.train_eps == 0 and path.loss_weight != "none":
        yield problem(
            "path.train_eps", "path.loss_weight", rule="the weight is infinite at an end of the path; try 1e-3"
        )
    sizes = ("patch_size", "hidden_size", "depth", "num_heads")
    if model.preset is None:
        missing = [f"model.{name}" for name in sizes if getattr(model, name) is None]
        if missing:
            yield Problem(("model.preset", *missing), f"model.preset=null needs {', '.join(missing)}")
    else:
        try:
            preset_kwargs(model.preset)
        except SitfastError as error:
            yield Problem(("model.preset",), f"model.preset={model.preset}: {error}")
    if model.class_dropout_prob == 0 and sample.cfg != 1 and sample.every:
        yield problem("model.class_dropout_prob", "sample.cfg", rule="guidance needs a null class; use sample.cfg=1")
    if sample.classes is not None and (not sample.classes or max(sample.classes) >= model.num_classes):
        yield problem("sample.classes", "model.num_classes", rule=f"classes are 0 to {model.num_classes - 1}")
    if sample.cfg_interval[0] >= sample.cfg_interval[1]:
        yield problem("sample.cfg_interval", rule="must rise, as in [0.0, 1.0]")
    if optim.warmup_steps >= cfg.train.steps:
        yield problem("optim.warmup_steps", "train.steps", rule="the warm-up must end before the run does")
    if optim.min_lr > optim.lr:
        yield problem("optim.min_lr", "optim.lr", rule="the floor must not exceed the rate")
    if not cfg.ema.decays:
        yield problem("ema.decays", rule="at least one average is kept; [0.0] follows the weights themselves")
    elif len(set(cfg.ema.decays)) < len(cfg.ema.decays):
        yield problem("ema.decays", rule="each decay once")
    if cfg.log.val_every and not data.val_samples:
        yield problem("log.val_every", "data.val_samples", rule="hold some rows out, such as data.val_samples=1024")
    if cfg.parallel.shard_size is not None and cfg.parallel.strategy != "hsdp":
        yield problem("parallel.shard_size", "parallel.strategy", rule="only hsdp has groups; use null or hsdp")
    if cfg.train.residual == "fp32" and cfg.parallel.strategy != "ddp":
        yield problem(
            "train.residual", "parallel.strategy", rule="sharded weights are gathered in bf16; use bf16 or ddp"
        )
    if (profile.start is None) != (profile.stop is None):
        yield problem("profile.start", "profile.stop", rule="a window needs both")
    elif profile.start is not None and profile.stop is not None and profile.stop <= profile.start:
        yield problem("profile.start", "profile.stop", rule="the window must end after it starts")
    if profile.trace and profile.start is None:
        yield problem(
            "profile.trace", "profile.start", rule="a trace needs a window; set profile.start and profile.stop"
        )
    if profile.operators and (profile.start is None or profile.trace):
        yield problem("profile.operators", "profile.start", "profile.trace", rule="it needs a window without a trace")
