"""Data on one GPU: python -m benchmarks.gpu_data vae|latents|dali|train [--seconds 100]

vae      encode of SD's VAE (random weights) at 256 px: images/s by precision, layout, compiler and batch, and where its time goes
latents  samples/s of the loader of cached latents into GPU memory, with workers and without
dali     images/s of JPEGs decoded by DALI through our loader, by share of the hardware decoder and threads; pixels against Pillow
train    SiT-B/2 from JPEGs through the VAE, with Pillow and with DALI, then from cached latents: the share of time spent waiting

Figures are of the whole path that a run takes; medians where a call is repeated.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

START = time.monotonic()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZE = 256 if GPU else 32
CHANNELS = (128, 256, 512, 512) if GPU else (8, 16, 16, 16)


def left(seconds: float) -> bool:
    return time.monotonic() - START < seconds


def attempt(name: str, run: Callable[[], str]) -> None:
    """Print the result, or the error."""
    try:
        result = run()
    except Exception as error:
        result = f"{type(error).__name__} {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"
    print(f"{time.monotonic() - START:6.1f} s  {name:<58} {result}", flush=True)


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


def vae(seconds: float) -> None:
    model = sd_vae().to(DEVICE).eval().requires_grad_(False)
    encode = encoder_of(model)
    x = torch.randn(256, 3, SIZE, SIZE, device=DEVICE)
    with torch.no_grad():
        exact = encode(x[:4].contiguous())

    def measure(run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> str:
        with torch.no_grad():
            off = (run(images)[:4].float() - exact).norm() / exact.norm()
            duration = median_s(lambda: run(images))
        return f"{len(images) / duration:7.0f} images/s  {1e3 * duration:7.2f} ms   off {off:.1e}"

    def bf16(batch: int) -> torch.Tensor:
        return x[:batch].to(torch.bfloat16).contiguous(memory_format=torch.channels_last)

    attempt("fp32, eager, B = 64 (as shipped)", lambda: measure(encode, x[:64].contiguous()))
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    attempt("bf16, channels last, eager, B = 64", lambda: measure(encode, bf16(64)))
    torch.backends.cudnn.benchmark = True
    attempt("  and cudnn.benchmark", lambda: measure(encode, bf16(64)))
    attempt("  and cudnn.benchmark, B = 256", lambda: measure(encode, bf16(256)))
    torch.backends.cudnn.benchmark = False
    compiled = torch.compile(encode, dynamic=False)
    attempt("bf16, channels last, compiled, B = 64", lambda: measure(compiled, bf16(64)))
    profile(lambda: compiled(bf16(64)), "compiled, B = 64")
    torch.backends.cudnn.benchmark = True
    attempt("  and cudnn.benchmark (same code)", lambda: measure(compiled, bf16(64)))
    profile(lambda: compiled(bf16(64)), "compiled, cudnn.benchmark, B = 64")
    if GPU:
        attempt("  and as a CUDA graph", lambda: measure(graphed(compiled, bf16(64)), bf16(64)))
    for batch in (32, 128):
        if left(seconds):
            attempt(f"compiled, cudnn.benchmark, B = {batch}", lambda b=batch: measure(compiled, bf16(b)))
    if GPU and left(seconds):  # slow to compile: last
        torch.compiler.reset()
        tuned = torch.compile(encode, dynamic=False, mode="max-autotune-no-cudagraphs")
        attempt("max-autotune, cudnn.benchmark, B = 64", lambda: measure(tuned, bf16(64)))


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


def profile(run: Callable[[], object], name: str, *, rows: int = 16) -> None:
    """The kernels that take longest."""
    if not GPU:
        return
    with torch.no_grad():
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels)
    print(f"    {name}: {total / 1e3:.2f} ms on the device")
    for k in kernels[:rows]:
        print(f"    {k.self_device_time_total / 1e3:8.3f} ms {k.count:4d} ×  {k.key[:110]}")


# -------------------------------------------------------------------------------------------------------------- latents


def data_config(source: str, path: Path, **changes: Any) -> SimpleNamespace:
    defaults = {
        "source": source, "path": str(path), "image_size": SIZE, "batch_size": 256, "num_workers": 0, "prefetch": 4,
        "flip": True, "max_unreadable": 0.01, "window_mib": 512, "verify": False, "decoder": "pil",
        "crop": "center", "decoder_threads": 8, "hw_decoder_load": 0.65,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


def loader_rate(data: SimpleNamespace, *, seconds: float = 4.0, warmup: int = 12) -> str:
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
    return f"{rate:9.0f} samples/s" + (f"   {refused} batches refused" if refused else "")


def latents(seconds: float) -> None:
    from sitfast.data import latents as shards

    side, each = 32, 8192  # of 256 px; 256 MiB a shard
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
        for workers in (0, 1, 4) if GPU else (0, 1):
            for flip in (True, False):
                changes = {"num_workers": workers, "flip": flip, "image_size": 256}
                attempt(
                    f"moments of 16 KiB, {workers} workers, {'flips' if flip else 'no flips'}",
                    lambda c=changes: loader_rate(data_config("latents", folder, **c), warmup=num // 256),
                )


# ----------------------------------------------------------------------------------------------------------------- dali


def photographs(folder: Path, *, kilobytes: int, width: int, height: int, num: int) -> float:
    """JPEGs of pictures with a natural spectrum, the detail chosen for the size of the file; returns the mean size in kB."""
    generator = np.random.default_rng(0)

    def picture(slope: float) -> Image.Image:
        fy, fx = np.fft.fftfreq(height)[:, None, None] * height, np.fft.rfftfreq(width)[None, :, None] * width
        spectrum = np.fft.rfft2(generator.normal(size=(height, width, 3)), axes=(0, 1))
        x = np.fft.irfft2(spectrum / np.maximum(np.hypot(fy, fx), 1) ** slope, s=(height, width), axes=(0, 1))
        return Image.fromarray(((x - x.mean()) / x.std() * 50 + 128).clip(0, 255).astype(np.uint8))

    def encoded(slope: float) -> bytes:
        file = io.BytesIO()
        picture(slope).save(file, format="JPEG", quality=90)
        return file.getvalue()

    low, high = 0.6, 2.5
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if len(encoded(middle)) > kilobytes * 1000 else (low, middle)
    (folder / "class").mkdir(parents=True)
    contents = [encoded(high) for _ in range(min(num, 64))]
    for i in range(num):
        (folder / "class" / f"{i:05}.jpg").write_bytes(contents[i % len(contents)])
    return statistics.mean(map(len, contents)) / 1000


def dali(seconds: float) -> None:
    cores = os.cpu_count() or 1
    sets = ((56, 375, 300), (110, 500, 375)) if GPU else ((5, 60, 50),)
    with tempfile.TemporaryDirectory() as name:
        for kilobytes, width, height in sets:
            folder = Path(name) / str(kilobytes)
            size = photographs(folder, kilobytes=kilobytes, width=width, height=height, num=4096 if GPU else 600)
            print(f"{width} x {height}, {size:.0f} kB:")
            attempt("  pixels, DALI against Pillow", lambda f=folder: pixels(f))
            cases = [(load, threads) for threads in (12, 8) for load in (0.65, 0.0, 0.9)] if GPU else [(0.0, 2)]
            for load, threads in cases:
                if left(seconds):
                    changes = {"num_workers": min(4, cores), "decoder_threads": threads, "hw_decoder_load": load}
                    config = data_config("folder", folder, decoder="dali", **changes)
                    attempt(f"  {threads} threads, hardware decoder {load:.0%}", lambda c=config: loader_rate(c))
            workers = {"num_workers": cores}
            attempt(
                f"  Pillow, {cores} workers", lambda f=folder, w=workers: loader_rate(data_config("folder", f, **w))
            )


def pixels(folder: Path) -> str:
    """The mean absolute difference of 255, by the worst image of one batch."""
    from sitfast.data import build_source
    from sitfast.data.loader import Loader

    results = []
    for decoder in ("dali", "pil"):
        data = data_config("folder", folder, decoder=decoder)
        batches = Loader(
            build_source(data), np.arange(512), data=data, seed=0, consumed=0, accumulate=1, rank=0, world_size=1,
            device=torch.device(DEVICE, 0) if GPU else "cpu", quarantine=None,
        )  # pyright: ignore[reportArgumentType]  # fmt: skip
        results.append(next(batches).x.cpu())
        batches.close()
    difference = (results[0] - results[1]).abs().mul(127.5).flatten(1)
    return f"worst mean {difference.mean(dim=1).max():.3f}, largest {difference.max():.0f}"


# ---------------------------------------------------------------------------------------------------------------- train


def train(seconds: float) -> None:
    from sitfast import encode
    from sitfast.data.__main__ import main as bench

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sd_vae().save_pretrained(root / "vae")
        photographs(root / "images", kilobytes=110 if GPU else 5, width=500, height=375, num=4096 if GPU else 64)
        common = [
            "--config", "configs/b2.yaml", f"data.path={root / 'images'}", f"vae.id={root / 'vae'}", f"data.image_size={SIZE}",
            f"data.num_workers={min(14, os.cpu_count() or 1)}",
        ]  # fmt: skip
        if not GPU:
            common += ["data.batch_size=8", "train.precision=fp32", "model.preset=null", "model.patch_size=2"]
            common += ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "data.prefetch=1"]
        measure = ["--bench", "--seconds", "3", "--steps", "40" if GPU else "2"]
        latents_of = ["data.source=latents", f"data.path={root / 'latents'}", "data.num_workers=2"]
        cases: dict[str, Callable[[], Any]] = {
            "JPEG, Pillow": lambda: bench([*common, *measure]),
            "JPEG, DALI": lambda: bench([*common, "data.decoder=dali", "data.num_workers=4", *measure]),
            "encode": lambda: encode.main([*common, "--out", str(root / "latents")]),
            "latents": lambda: bench([*common, *latents_of, *measure]),
        }
        for case, run in cases.items():
            if left(seconds):
                print(f"--- {case}", flush=True)
                attempt(case, lambda r=run: str(r()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("vae", "latents", "dali", "train"))
    parser.add_argument("--seconds", type=float, default=100, help="start nothing after this long")
    args = parser.parse_args()
    {"vae": vae, "latents": latents, "dali": dali, "train": train}[args.what](args.seconds)


if __name__ == "__main__":
    main()
