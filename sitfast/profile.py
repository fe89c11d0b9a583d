"""Where a step's time goes: `python -m sitfast.profile --config configs/xl2.yaml [section.field=value …]`, or under torchrun.

    warm up (compile, tune, record the CUDA graph) → time some steps → profile some → kernels by kind, against the roofline

Builds the run that sitfast.train would, in a folder that is deleted at the end: runs and their checkpoints are left alone,
and nothing is resumed. Into `output_dir`, if it is among the overrides, or else a new temporary folder go `profile.txt`
(every kernel), `profile.json` and `profile_trace.json` (chrome://tracing, Perfetto). docs/profiling.md reads them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sitfast import cli, config, parallel
from sitfast.errors import SitfastError
from sitfast.graph import WARM_UP
from sitfast.images import replacing
from sitfast.memory import with_changes
from sitfast.profiling import Profile, named_blocks, summarize, traced
from sitfast.shards import local
from sitfast.trainer import Trainer

_GEMM_SIZE, _COPY_BYTES, _REPEATS = 8192, 1 << 30, 20
_LEAST_WARMUP = WARM_UP + 2  # the graph is recorded, and the gates have left zero, where gradients are zero too
_ROWS = 15  # kernels on the screen


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches here and now: FLOP/s of a product of two 8192², bytes/s of a copy, read and written."""
    a, b, out = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(dtype) for _ in range(3))
    flops = 2 * _GEMM_SIZE**3 / _seconds(lambda: torch.mm(a, b, out=out))
    old, new = (torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return {"flops": flops, "bytes": 2 * _COPY_BYTES / _seconds(lambda: new.copy_(old))}


def _seconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, the first three left out."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3 + _REPEATS + 1)]
    for event in events:
        event.record()
        call()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events[3:])) / 1e3


def needs(trainer: Trainer, kernels: set[str]) -> dict[str, tuple[str, float]]:
    """kind → "flops" or "bytes" and how many a step of this rank cannot do without, where the design says it.

    GEMM and attention: 6 FLOPs for each multiply-accumulate of the forward pass; what is computed again is not needed.
    update: see `kernels.adamw_ema`. fused: the norms, q/k norms and GELU passes of `kernels`, by their names.
    """
    cfg, model, copied = trainer.cfg, trainer.model, trainer.copy is not None
    images, width, depth = cfg.data.batch_size // trainer.world.size, model.config["hidden_size"], model.config["depth"]
    attention = depth * 2 * model.num_tokens**2 * width
    narrow = copied and cfg.train.accumulate == 1 and trainer.world.size == 1  # gradients in bf16
    update = 4 + (28 if cfg.optim.moments == "fp32" else 20) + 8 * len(cfg.ema.decays) + 2 * copied - 4 * narrow
    h = 2 if trainer.draw["dtype"] is not None else 4  # bytes of an element of a branch, and of the residual stream
    x = h if copied or trainer.mesh is not None else 4
    hidden, again = int(width * model.config["mlp_ratio"]), cfg.train.mlp_save == "preact"
    per_token = {
        "layernorm_forward_kernel": width * (x + h + 2 * depth * (2 * x + 2 * h)),
        "layernorm_backward_kernel": width * (2 * x + h + 2 * depth * (3 * x + 3 * h)),
        "qk_norm_rope_forward_kernel": width * depth * 6 * h,
        "qk_norm_rope_backward_kernel": width * depth * 8 * h,
        "_forward_kernel": hidden * depth * 2 * h,
        "_backward_kernel": hidden * depth * (3 + again) * h,
    }
    fused = images * model.num_tokens * sum(per_token[name] for name in kernels & per_token.keys())
    return {
        "GEMM": ("flops", 6.0 * images * (trainer.macs - attention)),
        "attention": ("flops", 6.0 * images * attention),
        "update": ("bytes", float(update * sum(local(p).numel() for p in model.parameters() if p.requires_grad))),
        "fused": ("bytes", float(fused)),
    }


def measure(trainer: Trainer, trace: Path, *, warmup: int, steps: int) -> tuple[float, Profile]:
    """Seconds a step without the profiler, and what the profiler sees of later ones; writes its trace."""

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            trainer.train_step()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    trainer._begin_window()
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with trainer.implementation(), named_blocks(trainer.network):
        run(warmup)
        step_s = run(2 * steps)
        with traced(trace, schedule=schedule) as profiler:
            run(1)
            profiler.step()
            run(steps)
    trainer.update.check(trainer.step)
    profile = summarize(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], steps)
    if trainer.device.type == "cuda" and not profile.gpu:
        raise SitfastError(
            "the profiler saw no kernels; end other profilers of this GPU (nsys, ncu, dcgm) and try again"
        )
    return step_s, profile


def report(trainer: Trainer, profile: Profile, step_s: float, limits: dict[str, float]) -> dict[str, Any]:
    """What profile.json holds: times in ms a step; `of_roofline` is how much of a kind's time its need would take."""
    cfg, world, images_per_s = trainer.cfg, trainer.world, trainer.cfg.data.batch_size / step_s
    needed, kinds = needs(trainer, {kernel.name for kernel in profile.kernels}), profile.kinds()
    found: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        found[name] = {"ms": kind.ms, "share": kind.ms / profile.step_ms, "calls": kind.calls}
        unit, amount = needed.get(name, ("", 0.0))
        if amount:
            found[name][unit] = amount
            found[name]["of_roofline"] = 1e3 * amount / limits[unit] / kind.ms if limits else None
    return {
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "CPU",
        "ranks": world.size,
        "torch": torch.__version__,
        "model": cfg.model.preset or type(trainer.model).__name__,
        "precision": cfg.train.precision,
        "batch_size": cfg.data.batch_size,
        "cuda_graph": trainer.recorded is not None,
        "step_ms": 1e3 * step_s,
        "images_per_s": images_per_s,
        "mfu": 6 * trainer.macs * images_per_s / (trainer.peak * world.size) if trainer.peak else None,
        "peak_flops": trainer.peak,
        "limits": limits,
        "profiled_ms": profile.step_ms,
        "gaps_ms": profile.step_ms - profile.busy_ms,
        "overlap_ms": sum(kind.ms for kind in kinds.values()) - profile.busy_ms,
        "kinds": found,
        "host_ms": dict(profile.host),
        "kernels": [asdict(kernel) for kernel in profile.kernels],
    }


def table(found: dict[str, Any], rows: int | None = _ROWS) -> str:
    """The report, 80 characters wide, with the first `rows` kernels; None: all of them, with their whole names."""
    on_cpu, whole, limits = found["device"] == "CPU", found["profiled_ms"], found["limits"]
    graph = ", forward and backward as a CUDA graph" if found["cuda_graph"] else ""
    lines = [
        f"{found['model']}, {found['precision']}, {found['batch_size']} images a step{graph}",
        f"{found['ranks']} × {found['device']}, torch {found['torch']}",
        *(["figures of a CPU: operators, each without those that it calls"] if on_cpu else []),
        f"\n{'':<20}{'ms a step':>10}{'share':>8}{'calls':>8}   {'' if on_cpu else 'of the roofline'}".rstrip(),
    ]
    bounds = (
        {"flops": f"{limits['flops'] / 1e12:.0f} TFLOP/s", "bytes": f"{limits['bytes'] / 1e12:.2f} TB/s"}
        if limits
        else {}
    )
    for name, kind in found["kinds"].items():
        line = f"{name:<20}{kind['ms']:>10.2f}{kind['share']:>8.1%}{kind['calls']:>8.0f}"
        if kind.get("of_roofline"):
            line += f"   {kind['of_roofline']:.0%} of {bounds['flops' if 'flops' in kind else 'bytes']}"
        lines.append(line)
    for name, ms in (
        ("at the same time", 0.0 - round(found["overlap_ms"], 3)),
        ("gaps", found["gaps_ms"]),
        ("step", whole),
    ):
        lines.append(f"{name:<20}{ms:>10.2f}{ms / whole:>8.1%}")
    mfu = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
    lines.append(f"without the profiler {found['step_ms']:.2f} ms a step, {found['images_per_s']:.1f} images/s{mfu}")
    lines += textwrap.wrap("host, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in found["host_ms"].items()), 80)
    lines.append(f"\n{'ms a step':>9}{'calls':>7}{'µs each':>10}  {'operator' if on_cpu else 'kernel'}")
    for kernel in found["kernels"][:rows]:
        name = f"{kernel['kind']}: {kernel['name'].removeprefix('void ')}".replace("(anonymous namespace)::", "")
        each = 1e3 * kernel["ms"] / kernel["calls"]
        lines.append(f"{kernel['ms']:>9.2f}{kernel['calls']:>7.0f}{each:>10.1f}  {name[:52] if rows else name}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sitfast.profile", description="Profile a few training steps.")
    cli.add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=5, help="steps to profile, after twice as many to time (5)")
    parser.add_argument("--warmup", type=int, default=8, help="steps before: compilation, tuning, CUDA graphs (8)")
    args = parser.parse_args(argv)
    for name, value, least in (("--steps", args.steps, 1), ("--warmup", args.warmup, _LEAST_WARMUP)):
        if value < least:
            raise SitfastError(f"{name}={value} is too few; use {least} or more")
    cfg = config.one_stage(config.load(args.config, args.overrides), "sitfast.profile")
    with parallel.start(cfg) as world, tempfile.TemporaryDirectory(prefix="sitfast-run-") as scratch:
        out = Path(scratch)
        if world.is_main:
            given = any(override.startswith("output_dir=") for override in args.overrides)
            out = Path(cfg.output_dir if given else tempfile.mkdtemp(prefix="sitfast-profile-"))
            out.mkdir(parents=True, exist_ok=True)
        off = {"tensorboard": False, "wandb": False, "trackio": False}
        cfg = with_changes(cfg, log=off, profile={"start": None, "stop": None, "trace": False, "operators": False})
        trainer = Trainer(cfg.model_copy(update={"output_dir": world.share(scratch)}), world)
        try:
            cuda, dtype = world.device.type == "cuda", trainer.draw["dtype"] or torch.float32
            limits = ceilings(world.device, dtype) if cuda else {}
            torch.cuda.empty_cache()  # while a graph is recorded, the memory could not be given back
            step_s, profile = measure(trainer, out / "profile_trace.json", warmup=args.warmup, steps=args.steps)
        except torch.OutOfMemoryError as error:
            raise trainer._out_of_memory(error) from error
        finally:
            trainer.close()
        world.barrier()  # the others write into the main rank's scratch folder
        if world.is_main:
            found = report(trainer, profile, step_s, limits)
            for name, text in (("profile.json", json.dumps(found, indent=1)), ("profile.txt", table(found, None))):
                with replacing(out / name) as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
            print(f"\n{table(found)}\n\n{out}: profile.txt, profile.json, profile_trace.json", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
