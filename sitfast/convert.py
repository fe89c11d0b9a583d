"""Weights from one home to another: `python -m sitfast.convert runs/xl2 --to diffusers --out SiT-XL-2`.

    SOURCE                                                  --to
    a run or checkpoint folder of ours                      sitfast     a folder to sample from, or for model.init_from
    .pt, .pth, .safetensors of SiT, REPA, LightningDiT      official    the state dict that SiT's, REPA's code loads: .pt
    a folder that diffusers' save_pretrained wrote          diffusers   such a folder, of DiTTransformer2DModel

Keys are renamed; what no renaming can do (the direction of time, diffusers' frequencies) is folded into weights:
`sitfast.layouts` says how. Everything else keeps its bits, as fp32. Before a byte is written both networks run on the
same small input, the source as it is and what would be written as it would be read: the outputs must agree to 64 times
what nudging the input by one fp32 rounding does to the source's own.

A checkpoint does not say which way its time runs, or whether it takes steps. SiT and LightningDiT count to the data,
REPA (known by its projectors) to the noise; --time says so where another model hides behind these keys. Of LightningDiT,
RoPE and query norms are known; its RMSNorm and SwiGLU, which the published weights have, are refused by name. DiT's own
weights take steps 0 to 999 and are refused, and so is a diffusers folder, unless this command wrote it (sitfast.json
beside it says) or --time vouches that it takes t in [0, 1].
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sitfast import checkpoint, cli, config, layouts
from sitfast.errors import SitfastError
from sitfast.images import replacing
from sitfast.interpolant import flip_time
from sitfast.layouts import Network, Time
from sitfast.model import build_model

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [B, C, H, W], t [B], y [B] → the prediction [B, C, H, W]

_NOTE = "sitfast.json"  # beside a diffusers folder of ours: what t and the outputs are
_PATHS = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}  # SiT's and REPA's names
_PREDICTIONS = {"velocity": "velocity", "v": "velocity", "noise": "noise", "score": "score"}
_STEPS = (
    "takes steps 0 to 999, whose frequencies no weight of a network of t in [0, 1] can stand for, on a schedule that is"
    " none of our paths; train from SiT weights instead, or say --time data or --time noise if it was trained on t in"
    " [0, 1]"
)


@dataclass(frozen=True)
class Source:
    """What was read: the network under our names, and the one that runs as it was stored."""

    label: str
    network: Network
    run: Run
    path: str = "linear"
    config: dict[str, Any] | None = None  # of our own checkpoints
    left_out: tuple[str, ...] = ()
    remark: str = ""


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    path: Path,
    *,
    ema: bool = True,
    time: Time | None = None,
    prediction: str | None = None,
    heads: int | None = None,
    num_classes: int | None = None,
) -> Source:
    """The weights at `path`, of whatever family; a SitfastError says what cannot be read and why."""
    if (path / "model_index.json").exists():
        path = path / "transformer"
    if (path / "config.json").exists():
        return _read_diffusers(path, time, prediction)
    if path.is_dir():
        return _read_ours(path, ema, prediction)
    return _read_file(path, ema, time, prediction, heads, num_classes)


def _read_ours(path: Path, ema: bool, prediction: str | None) -> Source:
    folder = checkpoint.find_checkpoint(path)
    cfg = config.load(folder / "config.yaml")
    model = checkpoint.read_state(folder)["model"]
    for key, what in (("genes", "genes"), ("text", "captions")):
        if model.get(key):
            raise SitfastError(
                f"{folder} is a model of {what}, which no other layout has; sitfast.sample reads it as it is"
            )
    with torch.device("meta"):
        kwargs = build_model(**model).config
    weights = {key: tensor.float() for key, tensor in checkpoint.find_weights(folder, ema=ema).items()}
    network = Network(kwargs, weights, "data", prediction or cfg.path.prediction)
    which = "averages" if ema and (folder / "ema.safetensors").exists() else "weights"
    settings = cfg.model_dump(mode="json")
    return Source(f"sitfast, {which} of {folder.name}", network, _ours(network), cfg.path.type, settings)


def _read_file(
    path: Path, ema: bool, time: Time | None, prediction: str | None, heads: int | None, num_classes: int | None
) -> Source:
    content = checkpoint.read_pt(path) if path.suffix in (".pt", ".pth") and path.exists() else None
    if content is None:
        weights, which, args = checkpoint.find_weights(path), "weights", {}
    else:
        weights = checkpoint.weights_in(content, path, ema=ema)
        which = "averages" if ema and "ema" in content else "weights"
        args = _arguments(content)
    network, left_out = layouts.recognise(
        weights, source=str(path), heads=heads, num_classes=num_classes or args.get("num_classes")
    )
    family = "REPA" if network.time == "noise" else "LightningDiT" if network.kwargs["rope"] else "SiT"
    model = str(args.get("model", ""))
    if model.startswith("DiT") or (not model and re.search(r"(?<![a-z])dit[-_]", path.name.lower())):
        if time is None:
            raise SitfastError(f"{path} holds weights of DiT, which {_STEPS}")
        family = "DiT"
    predicts = prediction or _PREDICTIONS.get(str(args.get("prediction", "v")))
    kind = _PATHS.get(str(args.get("path_type", "linear")).lower())
    if predicts is None or kind is None:
        raise SitfastError(
            f"{path} was trained with path_type={args.get('path_type')}, prediction={args.get('prediction')}; known are"
            f" {', '.join(_PATHS)} and {', '.join(_PREDICTIONS)}"
        )
    network = replace(network, time=time or network.time, prediction=predicts)
    return Source(f"{family}, {which}", network, _ours(network), kind, left_out=tuple(left_out))


def _arguments(content: dict[str, Any]) -> dict[str, Any]:
    """What a training file says of its run: SiT's and REPA's args, LightningDiT's config."""
    if isinstance(content.get("args"), argparse.Namespace):
        return vars(content["args"])
    settings = content.get("config")
    sections = [settings.get(name) for name in ("data", "transport")] if isinstance(settings, dict) else []
    return {key: value for section in sections if isinstance(section, dict) for key, value in section.items()}


def _read_diffusers(path: Path, time: Time | None, prediction: str | None) -> Source:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        note = json.loads((path / _NOTE).read_text(encoding="utf-8")) if (path / _NOTE).exists() else {}
        kind = settings.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise SitfastError(f"the settings in {path} cannot be read ({error}); copy the folder again") from error
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):  # the second is how early DiT folders say it
        raise SitfastError(f"{path} holds a {kind}; of diffusers only DiTTransformer2DModel is known")
    time = time or note.get("time")
    if time is None:
        raise SitfastError(f"{path} holds a DiTTransformer2DModel, which {_STEPS}")
    classes = _diffusers()
    try:
        model, info = classes.from_pretrained(
            path, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise SitfastError(f"{path} cannot be loaded by diffusers: {' '.join(str(error).split())}") from error
    if wrong := [key for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[name]]:
        raise SitfastError(f"{path} does not hold what its config.json says: {', '.join(map(str, wrong[:3]))}")
    state, predicts = model.state_dict(), prediction or note.get("prediction", "velocity")
    network = layouts.from_diffusers(dict(model.config), state, source=str(path), time=time, prediction=predicts)
    eps, remark = model.config["norm_eps"], ""
    if eps != 1e-6:
        run = _theirs(model, network)
        reference = _outputs(run, network.kwargs)
        for block in model.transformer_blocks:
            block.norm3.eps = 1e-6
        change = float((_outputs(run, network.kwargs) - reference).abs().max() / reference.abs().max())
        remark = f"norm_eps is {eps:g} there, 1e-6 here: this moves the outputs by {change:.1e} of the largest"
    return Source("diffusers", network, _theirs(model, network), note.get("path", "linear"), remark=remark)


def _diffusers() -> Any:
    try:
        return importlib.import_module("diffusers").DiTTransformer2DModel
    except ImportError as error:
        raise SitfastError('diffusers is not installed; pip install "sitfast[vae]"') from error


# -- both networks run -------------------------------------------------------------------------------------------------


def _ours(network: Network) -> Run:
    model = layouts.build(network.kwargs, network.weights)
    return _directed(model, network)


def _theirs(model: Any, network: Network) -> Run:
    model, channels = model.eval().float(), network.kwargs["in_channels"]
    return _directed(lambda x, t, y: model(x, timestep=t, class_labels=y).sample[:, :channels], network)


def _directed(run: Run, network: Network) -> Run:
    """In our direction of time, by turning t and the output rather than weights."""
    if network.time == "data":
        return run
    if network.prediction == "velocity":
        return lambda x, t, y: flip_time(t, run(x, 1 - t, y))[1]
    return lambda x, t, y: run(x, 1 - t, y)


def _outputs(run: Run, kwargs: dict[str, Any], nudge: float = 0.0) -> Tensor:
    """Outputs on one fixed input of three samples, its x moved by `nudge` of itself up or down."""
    generator = torch.Generator().manual_seed(0)
    size, rows = kwargs["input_size"], kwargs["num_classes"] + (kwargs["class_dropout_prob"] > 0)
    x = torch.randn(3, kwargs["in_channels"], size, size, generator=generator)
    x = x * (1 + nudge * torch.randn(x.shape, generator=generator).sign())
    with torch.no_grad():
        return run(x, torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, (rows - 1) // 2, rows - 1]))


def compare(source: Run, target: Run, kwargs: dict[str, Any]) -> float:
    """The largest difference of the outputs, relative to the largest output; SitfastError if they disagree."""
    expected, found = _outputs(source, kwargs), _outputs(target, kwargs)
    largest = float(expected.abs().max())
    own = float((_outputs(source, kwargs, nudge=2.0**-23) - expected).abs().max())
    difference = float((found - expected).abs().max())
    if not difference <= 64 * own + 1e-6 * largest:  # NaN too
        raise SitfastError(
            f"the converted network disagrees with the source by {difference:.1e}, its outputs are up to {largest:.1e}, and"
            f" a nudge of the input moves them by {own:.1e}; nothing was written"
        )
    return difference / largest if largest else 0.0


# -- writing -----------------------------------------------------------------------------------------------------------


def convert(source: Source, to: str, out: Path, *, time: Time = "data", overrides: list[str] | None = None) -> float:
    """Check, then write `source` to `out`; returns what `compare` found."""
    if out.exists():
        raise SitfastError(f"--out {out} exists; choose another name or remove it")
    network = source.network
    if network.time != time:
        network = layouts.flip(network)
    if to == "diffusers":
        return _write_diffusers(source, network, out)
    difference = compare(source.run, _ours(network), network.kwargs)
    if to == "official":
        with replacing(out) as temporary:
            torch.save(layouts.official(network), temporary)
    elif out.suffix == ".safetensors":
        with replacing(out) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in network.weights.items()}, temporary)
    else:
        text = config.dump(_config(source, out, overrides or []))
        state = {"samples": 0, "window": [], "model": network.kwargs}
        checkpoint.save(out, 0, model=network.weights, emas={}, optimizer={}, state=state, config_yaml=text, keep=0)
    return difference


def _write_diffusers(source: Source, network: Network, out: Path) -> float:
    settings, state = layouts.to_diffusers(network)
    model = _diffusers()(**settings)
    model.load_state_dict(state, strict=True)
    difference = compare(source.run, _theirs(model, network), network.kwargs)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        note = {"time": network.time, "prediction": network.prediction, "path": source.path}
        (temporary / _NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def _config(source: Source, out: Path, overrides: list[str]) -> config.Config:
    """The config of the folder: our checkpoint's own, else what the weights say and, for the rest, the defaults."""
    kwargs = {k: v for k, v in source.network.kwargs.items() if k not in ("input_size", "in_channels")}
    raw = source.config
    if raw is None:
        latents = source.network.kwargs["in_channels"] == 4  # of the default VAE; others have to be named
        raw = {
            "data": {"path": ".", "image_size": source.network.kwargs["input_size"] * (8 if latents else 1)},
            "vae": {} if latents else {"id": None},
            "path": {"type": source.path, "prediction": source.network.prediction},
        }
    raw = {**raw, "output_dir": str(out), "model": {"preset": None, **kwargs}}
    return config.parse(raw, config.override(raw, overrides))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sitfast.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder or file to read")
    parser.add_argument("--to", required=True, choices=("sitfast", "official", "diffusers"))
    parser.add_argument("--out", required=True, type=Path, help="folder (sitfast, diffusers), .safetensors or .pt")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averages where there are any, or not"
    )
    parser.add_argument(
        "--time", choices=("data", "noise"), help="what t = 1 is in the source, where it cannot be told"
    )
    parser.add_argument("--out-time", choices=("data", "noise"), default="data", help="and in what is written")
    parser.add_argument("--prediction", choices=("velocity", "noise", "score"), help="of the source, likewise")
    parser.add_argument("--heads", type=int, help="of the source, likewise")
    parser.add_argument("--num-classes", type=int, help="of the source, without the null class, likewise")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of the written config")
    args = parser.parse_intermixed_args(argv)  # settings may stand after the options
    to_ours = args.to == "sitfast"
    if to_ours and args.out_time == "noise":
        raise SitfastError("--out-time noise: here t = 1 is data; use --to official or --to diffusers")
    if args.overrides and not (to_ours and args.out.suffix != ".safetensors"):
        raise SitfastError(f"{args.overrides[0]}: settings are written with a folder of ours alone; use --to sitfast")
    if args.to == "official" and args.out.suffix not in (".pt", ".pth"):
        raise SitfastError(f"--out {args.out}: the official layout is a .pt file; name it so")
    source = read(
        args.source, ema=args.weights == "ema", time=args.time, prediction=args.prediction, heads=args.heads,
        num_classes=args.num_classes,
    )  # fmt: skip
    k = source.network.kwargs
    print(
        f"read   {args.source}: {source.label}; {k['hidden_size']} wide, {k['depth']} deep, {k['num_heads']} heads,"
        f" {k['num_classes']} classes, patch {k['patch_size']} of {k['in_channels']} × {k['input_size']} × {k['input_size']};"
        f" {source.network.prediction}, t = 1 is {source.network.time}"
    )
    if source.left_out:
        print(f"left   {len(source.left_out)} tensors that are no part of the network: {source.left_out[0]}, …")
    if source.remark:
        print(f"note   {source.remark}")
    difference = convert(source, args.to, args.out, time=args.out_time, overrides=args.overrides)
    print(f"check  both networks ran; their outputs agree to {difference:.1e} of the largest")
    print(f"wrote  {args.out}: {args.to}, t = 1 is {args.out_time}")
    return 0


if __name__ == "__main__":
    cli.run(main)
