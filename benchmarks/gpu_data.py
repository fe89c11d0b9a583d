"""Data on one GPU: python -m benchmarks.gpu_data all|vae|dali|train|latents [--seconds 200] [--output FILE.json]

vae      encode of SD's VAE (random weights) at 256 px: images/s as in training, then of one part of 64 images as each piece is
         added, and where the time goes
dali     images/s of JPEGs decoded by DALI through our loader, by share of the hardware decoder and threads; pixels against Pillow
train    SiT-B/2 from JPEGs by DALI through the VAE, then from cached latents: the share of time that the GPU waits for data
latents  samples/s of the loader of cached latents into GPU memory, in this process and with a worker

`all` runs each in a process of its own, so that none is lost to another's failure. Figures are of the whole path that a run
takes; medians where a call is repeated.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.vae_variants import attend_by_products, normalize_by_channels

START = time.monotonic()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZE = 256 if GPU else 32
CHANNELS = (128, 256, 512, 512) if GPU else (8, 16, 16, 16)
CORES = os.cpu_count() or 1
SHARES = {"vae": 70, "dali": 45, "train": 65, "latents": 20}  # of the seconds of `all`, in the order of their weight
GRACE = 45  # seconds that a part may go on for after its time, to finish what it has begun
PICTURES = {56: (375, 300), 110: (500, 375)} if GPU else {3: (60, 50), 5: (70, 60)}  # kB: width and height
NUM_FILES = 4096 if GPU else 600


class Figure(NamedTuple):
    value: float
    unit: str
    note: str = ""


class Report:
    """Prints each figure when it is there, and keeps all in a file."""

    def __init__(self, path: Path | None, part: str) -> None:
        self.path, self.part = path, part

    def __call__(self, name: str, run: Callable[[], Figure]) -> None:
        """The figure, or the error in its place."""
        try:
            figure = run()
            record: dict[str, Any] = figure._asdict()
            text = f"{figure.value:12,.{0 if figure.value >= 100 else 3}f} {figure.unit:<10} {figure.note}"
        except Exception as error:
            reason = " ".join(str(error).split())
            record = {"error": f"{type(error).__name__}: {reason[:500]}"}
            text = record["error"][:160]
        print(f"{time.monotonic() - START:6.1f} s  {name:<58} {text}", flush=True)
        self.keep("figures", {"part": self.part, "name": name.strip(), **record})

    def keep(self, kind: str, record: dict[str, Any]) -> None:
        if self.path:
            kept = read(self.path)
            kept.setdefault(kind, []).append(record)
            self.path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {
        "device": torch.cuda.get_device_name() if GPU else platform.processor() or "CPU",
        "cores": CORES,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def left(seconds: float) -> bool:
    return time.monotonic() - START < seconds


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def median_s(run: Callable[[], object], *, warmup: int = 2, repeats: int = 7) -> float:
    times = []
    for _ in range(warmup):
        run()
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ------------------------------------------------------------------------------------------------------------------ vae


def sd_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        norm_num_groups=32 if GPU else 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIZE,
    )


def vae(seconds: float, report: Report, images: Path | None) -> None:
    from sitfast.config import VAEConfig
    from sitfast.vae import AutoencoderVAE

    model = sd_vae().to(DEVICE).eval().requires_grad_(False)
    many, part = (256, 64) if GPU else (8, 4)
    x, index = torch.randn(many, 3, SIZE, SIZE, device=DEVICE), torch.arange(many, device=DEVICE)
    with torch.no_grad():
        exact = encoder_of(model)(x[:4].contiguous())

    def measure(run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Figure:
        with torch.no_grad():
            off = (run(images)[:4].float() - exact).norm() / exact.norm()
            duration = median_s(lambda: run(images))
        return Figure(len(images) / duration, "images/s", f"{1e3 * duration:7.2f} ms, off {off:.1e}")

    def bf16(batch: int) -> torch.Tensor:
        return x[:batch].to(torch.bfloat16).contiguous(memory_format=torch.channels_last)

    def whole() -> Figure:
        duration = median_s(lambda: trained.encode(x, index), repeats=5)
        return Figure(many / duration, "images/s", f"{1e3 * duration:7.2f} ms")

    report(f"fp32, eager, {part}", lambda: measure(encoder_of(model), x[:part].contiguous()))
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    settings = VAEConfig(id="random", precision="bf16", batch_size=part, compile=True)
    trained = AutoencoderVAE(copy.deepcopy(model), settings, device=DEVICE, seed=0)
    encode = encoder_of(trained.model)
    report(f"as in training, {many} of fp32 in parts of {part}", whole)
    report(f"its encoder, {part}", lambda: measure(encode, bf16(part)))
    profile(lambda: encode(bf16(part)), "the same", report)
    if GPU:
        report("  and as a CUDA graph", lambda: measure(graphed(encode, bf16(part)), bf16(part)))
        torch.backends.cudnn.benchmark = True
        report("  and cudnn.benchmark", lambda: measure(encode, bf16(part)))
        profile(lambda: encode(bf16(part)), "and cudnn.benchmark", report, rows=8)
        torch.backends.cudnn.benchmark = False
    attention, norm = attend_by_products, normalize_by_channels
    variants = {
        "attention by products, norm by channels": (attention, norm),
        "attention": (attention,),
        "norm": (norm,),
    }
    for name, variant in variants.items():
        if left(seconds):
            torch.compiler.reset()
            changed = copy.deepcopy(model)
            for change in variant:
                change(changed.encoder)
            compiled = torch.compile(encoder_of(changed), dynamic=False)
            report(f"{name}, {part}", lambda c=compiled: measure(c, bf16(part)))
            if len(variant) > 1:
                profile(lambda c=compiled: c(bf16(part)), name, report)
    if left(seconds):
        report(f"bf16, channels last, eager, {part}", lambda: measure(encoder_of(model), bf16(part)))
    for batch in (16, 128) if GPU else ():
        if left(seconds):
            torch.compiler.reset()
            report(f"its encoder, {batch}", lambda b=batch: measure(encode, bf16(b)))


def encoder_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images → mean and logarithm of the variance of the posterior."""

    def encode(images: torch.Tensor) -> torch.Tensor:
        return model.quant_conv(model.encoder(images))

    return encode


def graphed(
    run: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`run` recorded once as a CUDA graph; its result is overwritten by the next call."""
    fixed = example.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            run(fixed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run(fixed)

    def replay(images: torch.Tensor) -> torch.Tensor:
        fixed.copy_(images)
        graph.replay()
        return out

    return replay


def profile(run: Callable[[], object], name: str, report: Report, *, rows: int = 16) -> None:
    """The kernels that take longest."""
    if not GPU:
        return
    try:
        with torch.no_grad():
            run()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                run()
                synchronize()
        kernels = sorted(profiler.key_averages(), key=lambda k: -k.self_device_time_total)
    except Exception as error:
        print(f"    no profile of {name}: {type(error).__name__} {error}", flush=True)
        return
    total = sum(k.self_device_time_total for k in kernels)
    print(f"    {name}: {total / 1e3:.2f} ms on the device in {sum(k.count for k in kernels)} kernels")
    for k in kernels[:rows]:
        print(f"    {k.self_device_time_total / 1e3:8.3f} ms {k.count:4d} ×  {k.key[:110]}", flush=True)
    rest = [{"kernel": k.key, "count": k.count, "ms": k.self_device_time_total / 1e3} for k in kernels[:32]]
    report.keep("profiles", {"part": report.part, "name": name, "ms": total / 1e3, "kernels": rest})


# -------------------------------------------------------------------------------------------------------------- latents


def data_config(source: str, path: Path, **changes: Any) -> SimpleNamespace:
    defaults = {
        "source": source, "path": str(path), "image_size": SIZE, "batch_size": 256, "num_workers": 0, "prefetch": 4,
        "flip": True, "max_unreadable": 0.01, "window_mib": 512, "verify": False, "decoder": "pil",
        "crop": "center", "decoder_threads": 8, "hw_decoder_load": 0.65,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


def loader_rate(data: SimpleNamespace, *, seconds: float = 3.0, warmup: int = 12) -> Figure:
    from sitfast.data import build_source
    from sitfast.data.loader import Loader

    source = build_source(data)  # pyright: ignore[reportArgumentType]
    batches = Loader(
        source, np.arange(source.num_rows), data=data, seed=0, consumed=0, accumulate=1, rank=0, world_size=1,
        device=torch.device(DEVICE, 0) if GPU else "cpu", quarantine=None,
    )  # pyright: ignore[reportArgumentType]  # fmt: skip
    for _ in range(warmup):
        next(batches)
    synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches).x)
    synchronize()
    rate = count / (time.perf_counter() - start)
    batches.close()
    refused = getattr(batches._batches, "refused", 0)
    return Figure(rate, "samples/s", f"{refused} batches refused" if refused else "")


def latents(seconds: float, report: Report, images: Path | None) -> None:
    from sitfast.data import latents as shards

    torch.set_num_threads(1)  # one core
    side, each = 32, 8192 if GPU else 1024  # of 256 px; 256 MiB a shard
    num = 6 * each
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moments = torch.randn(each, 2, 2, 4, side, side).half()
        job = {"vae": {"id": "random", "sha256": ""}, "image_size": 256, "views": 2, "num_rows": num}
        for k in range(num // each):
            rows = np.arange(k * each, (k + 1) * each)
            shards.write_shard(
                folder, k, job=job, moments=moments, labels=rows % 1000, rows=rows, sums=[[0.0] * 4, [1.0] * 4]
            )
        paths = sorted(folder.glob("shard-*"))
        about = {"channels": 3, "class_names": [str(i) for i in range(1000)]}
        shards.write_manifest(folder, [shards.read_shard(path) for path in paths], about=about)
        for workers, flip in ((0, True), (1, True), (0, False)):
            if left(seconds):
                config = data_config("latents", folder, num_workers=workers, flip=flip, image_size=256)
                report(
                    f"moments of 16 KiB, {workers} workers, {'flips' if flip else 'no flips'}",
                    lambda c=config: loader_rate(c, warmup=num // 256),
                )


# ----------------------------------------------------------------------------------------------------------------- dali


def photograph(width: int, height: int, slope: float, seed: int) -> bytes:
    """A JPEG of a picture with a natural spectrum; the slope of the spectrum says how much detail it has."""
    generator = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None, None] * height, np.fft.rfftfreq(width)[None, :, None] * width
    spectrum = np.fft.rfft2(generator.normal(size=(height, width, 3)), axes=(0, 1))
    x = np.fft.irfft2(spectrum / np.maximum(np.hypot(fy, fx), 1) ** slope, s=(height, width), axes=(0, 1))
    file = io.BytesIO()
    pixels = ((x - x.mean()) / x.std() * 50 + 128).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, format="JPEG", quality=90)
    return file.getvalue()


def photographs(folder: Path) -> None:
    """For each size of `PICTURES` a folder of `NUM_FILES` JPEGs, 64 different ones, on all cores."""
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("fork")) as pool:
        for kilobytes, (width, height) in PICTURES.items():
            low, high = 0.6, 2.5
            for _ in range(8):
                middle = (low + high) / 2
                large = len(photograph(width, height, middle, 0)) > kilobytes * 1000
                low, high = (middle, high) if large else (low, middle)
            contents = pool.map(photograph, *zip(*((width, height, high, seed) for seed in range(64)), strict=True))
            target = folder / str(kilobytes) / "class"
            target.mkdir(parents=True)
            for seed, content in enumerate(contents):
                for i in range(seed, NUM_FILES, 64):
                    (target / f"{i:05}.jpg").write_bytes(content)


def dali(seconds: float, report: Report, images: Path) -> None:
    small, large = (images / str(kilobytes) for kilobytes in PICTURES)
    cases = [
        (small, 0.65, 12), (small, 0.0, 8), (large, 0.65, 12), (small, 0.9, 12), (large, 0.0, 8), (small, 0.65, 8),
    ] if GPU else [(small, 0.0, 2), (large, 0.0, 2)]  # fmt: skip

    def compare(folder: Path, load: float) -> None:
        name = f"{folder.name} kB, hardware decoder {load:.0%}: largest mean difference of an image"
        report(name, lambda: pixels(folder, hw_decoder_load=load))

    compare(large, 0.65)
    for number, (folder, load, threads) in enumerate(cases):
        if number == 2:
            compare(large, 0.0)
        if left(seconds):
            size = statistics.mean(path.stat().st_size for path in list((folder / "class").iterdir())[:256]) / 1e3
            config = data_config(
                "folder",
                folder,
                decoder="dali",
                num_workers=min(4, CORES),
                decoder_threads=threads,
                hw_decoder_load=load,
            )
            report(f"{size:.0f} kB, {threads} threads, hardware decoder {load:.0%}", lambda c=config: loader_rate(c))
    if left(seconds):
        config = data_config("folder", small, num_workers=CORES)
        report(f"{small.name} kB, Pillow, {CORES} workers", lambda: loader_rate(config))


def pixels(folder: Path, *, hw_decoder_load: float) -> Figure:
    """The mean absolute difference of 255 of the worst image of one batch."""
    from sitfast.data import build_source
    from sitfast.data.loader import Loader

    results = []
    for decoder in ("dali", "pil"):
        data = data_config("folder", folder, decoder=decoder, hw_decoder_load=hw_decoder_load)
        batches = Loader(
            build_source(data), np.arange(512), data=data, seed=0, consumed=0, accumulate=1, rank=0, world_size=1,
            device=torch.device(DEVICE, 0) if GPU else "cpu", quarantine=None,
        )  # pyright: ignore[reportArgumentType]  # fmt: skip
        results.append(next(batches).x.cpu())
        batches.close()
    difference = (results[0] - results[1]).abs().mul(127.5).flatten(1)
    return Figure(difference.mean(dim=1).max().item(), "of 255", f"largest of a pixel {difference.max():.0f}")


# ---------------------------------------------------------------------------------------------------------------- train


def train(seconds: float, report: Report, images: Path) -> None:
    from sitfast import config, encode, parallel
    from sitfast.data.__main__ import _QUIET, training_rate

    with tempfile.TemporaryDirectory() as name:
        root, large = Path(name), images / str(list(PICTURES)[1])
        sd_vae().save_pretrained(root / "vae")
        common = [f"data.path={large}", f"vae.id={root / 'vae'}", f"data.image_size={SIZE}", "model.num_classes=1000"]
        if not GPU:
            common += ["data.batch_size=8", "train.precision=fp32", "model.preset=null", "model.patch_size=2"]
            common += ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "data.prefetch=1"]
        common.append(f"data.num_workers={min(14, CORES)}")
        by_dali = ["data.decoder=dali", f"data.num_workers={min(4, CORES)}"]
        from_latents = ["data.source=latents", f"data.path={root / 'latents'}", f"data.num_workers={min(2, CORES)}"]

        def rate(case: str, *changes: str) -> Figure:
            quiet = [*_QUIET, f"output_dir={root / 'run' / case}", f"train.steps={10**9}"]
            cfg = config.load(Path("configs/b2.yaml"), [*common, *changes, *quiet])
            with parallel.start(cfg) as world:
                images_per_s, waiting = training_rate(cfg, world, steps=40 if GPU else 2)
            return Figure(images_per_s, "images/s", f"{waiting:.2%} of the time waiting")

        def encoding() -> Figure:
            start = time.perf_counter()
            encode.main(["--config", "configs/b2.yaml", *common, "--out", str(root / "latents")])
            took = time.perf_counter() - start
            return Figure(2 * NUM_FILES / took, "images/s", "mirrors counted, start and compilation included")

        report(f"B/2, JPEGs of {large.name} kB by DALI, VAE", lambda: rate("dali", *by_dali))
        report("sitfast.encode of them, by Pillow", encoding)
        report("B/2, latents", lambda: rate("latents", *from_latents))
        if left(seconds):
            report(f"B/2, JPEGs of {large.name} kB by Pillow, VAE", lambda: rate("pillow"))


# ------------------------------------------------------------------------------------------------------------------ all


def run_all(seconds: float, output: Path, images: Path) -> None:
    """Each part in its own process, the time that one leaves shared among those after it; then a table."""
    pictures = threading.Thread(target=photographs, args=(images,))  # meanwhile the VAE compiles
    pictures.start()
    for part in SHARES:
        if part == "dali":
            pictures.join()
        after = list(SHARES)[list(SHARES).index(part) :]
        budget = (seconds - (time.monotonic() - START)) * SHARES[part] / sum(SHARES[name] for name in after)
        if budget < 5:
            print(f"no time left for {part}", flush=True)
            continue
        print(f"{time.monotonic() - START:6.1f} s  --- {part}, {budget:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu_data", part, "--seconds", str(budget)]
        child = subprocess.Popen([*command, "--output", str(output), "--images", str(images)], start_new_session=True)
        try:
            child.wait(budget + GRACE)
        except subprocess.TimeoutExpired:
            print(f"    {part} is ended", flush=True)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    pictures.join()
    print(f"\n{time.monotonic() - START:6.1f} s in all")
    for figure in read(output).get("figures", []):
        value = (
            f"{figure['value']:12,.3f} {figure['unit']:<10} {figure['note']}" if "value" in figure else figure["error"]
        )
        print(f"{figure['part']:<8} {figure['name']:<62} {value[:90]}", flush=True)


def main() -> None:
    parts = {"vae": vae, "dali": dali, "train": train, "latents": latents}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", *parts))
    parser.add_argument("--seconds", type=float, default=200, help="start nothing after this long")
    parser.add_argument("--output", type=Path, help="JSON of all figures; what is there already stays")
    parser.add_argument("--images", type=Path, help="a folder with the JPEGs, made where it is missing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or Path(folder) / "images"
        if args.what == "all":
            run_all(args.seconds, args.output or Path(folder) / "figures.json", images)
            return
        if args.what in ("dali", "train") and not images.exists():
            photographs(images)
        parts[args.what](args.seconds, Report(args.output, args.what), images)


if __name__ == "__main__":
    main()
