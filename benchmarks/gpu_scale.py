"""How training scales over the GPUs of a host: python -m benchmarks.gpu_scale [--seconds 240] [--output FILE]

Trains SiT-XL/2 (bf16, compiled blocks, clipping, two averages) on random latents, as `sitfast.train` would, and prints, as
it comes and once more at the end, what each way of training reaches:

    images/s, and its share of the number of GPUs times what one GPU does in the same run
    milliseconds a step: in all; of the host, until everything is queued; of the GPU idle; of communication, and the part of
    it that no computation covers (from a trace of rank 0, of which only these figures are kept)
    a save with optimizer and two averages: how long training stood still, how long writing took, a step while it wrote;
    how long the same process took from there to the trainer and to its first step (files in the page cache, code compiled)

Every job (a number of ranks and a strategy) has processes of its own. One that fails or hangs is ended, the end of its log
printed, and what it still had to do is tried once more; the others do not notice. While a job works, the processes of the
next one start Python and wait; while one GPU compiles the first job, the last GPU compiles the blocks as `fsdp` has them.
`ddp-graph` is the same step as a CUDA graph, with what the ranks reduce (`train.cuda_graph=true`).

Without a GPU the model is tiny, the ranks are two processes, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import getpass
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sitfast.data
from benchmarks.harness import RandomLatents
from sitfast import config, parallel
from sitfast.trainer import Trainer

GPU = torch.cuda.is_available()
START = time.monotonic()
WARM_UP, STEPS, TRACED = (14, 15, 2) if GPU else (2, 2, 1)  # DistributedDataParallel waits for the GPU in its first ten
READY_S, PART_S, SAVE_S = 130, 45, 120  # how long a job may take to its first steps, and for each part
SIZE = 32 if GPU else 8
MODEL = ["model.preset=SiT-XL/2"]
if not GPU:
    MODEL += ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "train.precision=fp32"]
# The parts of a job, in order; those after the bar only with --variants.
PARTS = {"ddp": "ddp | ddp-25MiB", "fsdp": "fsdp-kept fsdp save | fsdp-unfetched", "ddp graph": "ddp-graph"}


@dataclasses.dataclass
class Job:
    """Some parts that the same processes can do one after another; `first_gpu` is that of rank 0."""

    strategy: str
    ranks: int
    parts: list[str]
    first_gpu: int = 0
    attempt: int = 1

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.strategy.replace(' ', '-')}-{self.first_gpu}-{self.attempt}"


# ---- in a rank -------------------------------------------------------------------------------------------------------


def settings(job: Job, batch: int, folder: Path) -> list[str]:
    fixed = ["data.source=folder", "data.path=random", f"data.image_size={SIZE}", "data.flip=false", "vae.id=null"]
    fixed += ["data.num_workers=0", "ema.decays=[0.9999, 0.999]", "optim.clip_norm=1.0", "train.steps=100000"]
    fixed += ["log.tensorboard=false", "log.every=100000", f"data.batch_size={batch * job.ranks}", "checkpoint.keep=1"]
    fixed += [f"output_dir={folder / job.name}", "parallel.timeout_s=90"]
    strategy, _, graph = job.strategy.partition(" ")
    fixed += [f"parallel.strategy={strategy}", *(["train.cuda_graph=true"] if graph and GPU else [])]
    return [*fixed, *MODEL]


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


Intervals = list[tuple[float, float]]


def union(intervals: Intervals) -> Intervals:
    """The same times, sorted and disjoint."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap(a: Intervals, b: Intervals) -> float:
    """How long two lists of disjoint intervals run at once."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return total


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


def gpu_times(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Milliseconds a step, from the events of a trace (times in µs): communication, of it uncovered, and nothing at all."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = [(e["name"].lower(), e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
    travels = union([(start, end) for name, start, end in spans if "nccl" in name])
    computes = union([(start, end) for name, start, end in spans if "nccl" not in name])
    busy = union(travels + computes)
    idle = busy[-1][1] - busy[0][0] - length(busy) if busy else 0.0
    parts = {"communication_ms": length(travels), "exposed_ms": length(travels) - overlap(travels, computes)}
    return {name: value / steps / 1e3 for name, value in {**parts, "idle_ms": idle}.items()}


def step(trainer: Trainer) -> None:
    trainer.train_step()
    trainer.world.most(0)  # as the loop does


def measure_speed(trainer: Trainer, folder: Path) -> dict[str, float]:
    """What the module says of a step."""
    for _ in range(2):
        step(trainer)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    trainer.world.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        step(trainer)
    synchronize()
    trainer.world.barrier()
    seconds = (time.perf_counter() - start) / STEPS
    result = {"images_per_s": trainer.cfg.data.batch_size / seconds, "step_ms": 1e3 * seconds}
    host = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        step(trainer)
        host.append(1e3 * (time.perf_counter() - start))
    result["host_ms"] = statistics.median(host)
    if GPU:
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result |= trace(trainer, folder / f"trace-{os.environ['RANK']}.json")
    return result


def trace(trainer: Trainer, file: Path) -> dict[str, float]:
    synchronize()
    trainer.world.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(TRACED):
            step(trainer)
        synchronize()
    if not trainer.world.is_main:
        return {}
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    file.unlink()
    return gpu_times(events, TRACED)


def measure_save(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Save twice (the second is what a run sees most), training on meanwhile, then go on from there."""
    written = 0.0
    for key in ("first_stalled_s", "stalled_s"):
        if written > SAVE_S / 4:  # a slow disk: once must do
            break
        synchronize()
        trainer.world.barrier()
        start = time.perf_counter()
        trainer._save()
        stalled = time.perf_counter() - start
        synchronize()
        begun, count = time.perf_counter(), 0
        while trainer.world.most(int(count < STEPS and trainer.saver.done() is None and not trainer.saver.failed)):
            trainer.train_step()
            count += 1
        synchronize()
        during = 1e3 * (time.perf_counter() - begun) / max(1, count)
        trainer.saver.wait()
        written = trainer.world.most(int(1e3 * (time.perf_counter() - start))) / 1e3
        yield {key: trainer.world.most(int(1e6 * stalled)) / 1e6, "written_s": written, "step_while_writing_ms": during}
    synchronize()
    trainer.world.barrier()
    start = time.perf_counter()
    again = Trainer(trainer.cfg, trainer.world)
    synchronize()
    result = {"resumed_s": time.perf_counter() - start}
    assert 0 < again.step <= trainer.step
    step(again)
    synchronize()
    yield result | {"to_first_step_s": time.perf_counter() - start}
    again.close()


def prepare(trainer: Trainer, part: str) -> None:
    """Let the trainer work as a part wants it."""
    if part == "ddp-25MiB":
        trainer.network = trainer.copy.network if trainer.copy else trainer.model
        gc.collect()  # two wrappers at once would both reduce
        parallel._BUCKET_MIB = 25
        trainer.network = parallel.data_parallel(trainer.model, trainer.world, trainer.copy)
        for _ in range(WARM_UP):
            step(trainer)
    if part in ("fsdp", "fsdp-kept", "fsdp-unfetched"):
        for module, reshard in parallel._reshard_policy(trainer.model, part != "fsdp-kept"):
            module.set_reshard_after_forward(reshard, recurse=False)
            if part == "fsdp-unfetched":
                module.set_modules_to_forward_prefetch([])


def worker(job: Job, args: argparse.Namespace) -> None:
    sys.stdin.readline()  # all is imported; the GPUs are ours after this
    start = time.perf_counter()
    sitfast.data.build_source = lambda _: RandomLatents(SIZE, args.batch)
    cfg = config.load(None, [*settings(job, args.batch, args.folder), *args.overrides])
    with parallel.start(cfg) as world:

        def say(event: str, **values: Any) -> None:
            if world.is_main:
                with (args.folder / f"{job.name}.jsonl").open("a") as file:
                    file.write(json.dumps({"event": event, **values}) + "\n")

        trainer = Trainer(cfg, world)
        synchronize()
        built = time.perf_counter()
        for _ in range(WARM_UP):
            step(trainer)
        loss = torch.stack(trainer.window).mean().item()
        name = torch.cuda.get_device_name() if GPU else "CPU"
        say("ready", set_up_s=built - start, compile_s=time.perf_counter() - built, loss=loss, device=name)
        if job.parts and world.is_main:
            sys.stdin.readline()
        world.barrier()
        for part in job.parts:
            say("begin", part=part)
            prepare(trainer, part)
            if part != "save":
                say("end", part=part, result=measure_speed(trainer, args.folder))
                continue
            result: dict[str, float] = {}
            for more in measure_save(trainer):
                result |= more
                say("so far", part=part, result=result)
            say("end", part=part, result=result)
        trainer.close()


# ---- the one that starts them ----------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


class Running:
    """The processes of a job. They import everything, then wait for `go`."""

    def __init__(self, job: Job, args: argparse.Namespace, folder: Path) -> None:
        self.job, self.reports = job, folder / f"{job.name}.jsonl"
        self.logs = [folder / f"{job.name}-rank{rank}.log" for rank in range(job.ranks)]
        self._read, self.state, self.part, self.since = 0, "setting up", "", time.monotonic()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.gpu_scale", "--batch", str(args.batch), "--folder", str(folder)]
        command += ["--job", json.dumps(dataclasses.asdict(job)), *args.overrides]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": rank, "LOCAL_RANK": job.first_gpu + rank, "WORLD_SIZE": job.ranks, "MASTER_PORT": port}
            env = {**os.environ, **caches(), "LOCAL_WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1"}
            env |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} | {k: str(v) for k, v in place.items()}
            with log.open("wb") as file:  # a session of its own, so that what it starts can be ended with it
                started = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=env, start_new_session=True
                )
            self.processes.append(started)

    def go(self) -> None:
        self.since = time.monotonic()
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has failed; its log says how
                process.stdin.write(b"\n")
                process.stdin.flush()

    def news(self) -> list[dict[str, Any]]:
        """What it has reported since the last call."""
        lines = self.reports.read_text().splitlines(keepends=True) if self.reports.exists() else []
        lines = [line for line in lines if line.endswith("\n")]
        fresh, self._read = [json.loads(line) for line in lines[self._read :]], len(lines)
        for event in fresh:
            self.since = time.monotonic()
            self.state = event["event"]
            self.part = event.get("part", "")
        return fresh

    def fault(self) -> str | None:
        """Why it will not go on, if so."""
        codes = [process.poll() for process in self.processes]
        if any(codes):
            return f"exit status {', '.join(str(code) for code in codes)}"
        limit = READY_S if not self.part else SAVE_S if self.part == "save" else PART_S
        late = time.monotonic() - self.since > limit
        return f"nothing new in {limit} s" if late and not all(code == 0 for code in codes) else None

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def tail(self) -> str:
        texts = []
        for log in self.logs:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip(" ^~")]
            texts += [f"    {log.name}: {line[:200]}" for line in lines[-12:]]
        return "\n".join(texts)


def caches() -> dict[str, str]:
    """Inductor keeps Triton's kernels by device; here all ranks and jobs share those of the first."""
    user = "".join("_" if c in '\\/:*?"<>|' else c for c in getpass.getuser())
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{user}"
    return {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or f"{inductor}/triton/0"}


class Session:
    """Runs jobs one after another until the time is over; keeps and writes the results."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.deadline = time.monotonic() + args.seconds
        self.started: list[Running] = []
        self.results: dict[str, dict[str, float]] = {}
        self.errors: dict[str, str] = {}
        self.device = "no device"

    def start(self, job: Job) -> Running:
        self.started.append(Running(job, self.args, self.folder))
        return self.started[-1]

    def close(self) -> None:
        for running in self.started:
            running.stop()

    def run(self, jobs: list[Job], beside: Job | None) -> None:
        """`beside` compiles at the same time as the first job, which measures nothing before it has ended."""
        helper = self.start(beside) if beside else None
        following = self.start(jobs[0])
        if helper:
            helper.go()
        while jobs:
            running, job = following, jobs.pop(0)
            running.go()
            following = self.start(jobs[0]) if jobs else following
            left = self.follow(running, helper)
            if helper:
                helper.stop()
            helper = None
            if time.monotonic() > self.deadline:
                for other in [Job("", job.ranks, left), *jobs]:
                    for part in other.parts:
                        self.fail(f"{other.ranks} × {part}", "not measured: the time is over")
                return
            if left and job.attempt == 1 and running.part:  # what failed was a part, not the set-up
                jobs.insert(0, dataclasses.replace(job, parts=left, attempt=2))
                if following is not running:
                    following.stop()
                following = self.start(jobs[0])

    def follow(self, running: Running, helper: Running | None) -> list[str]:
        """Wait for a job to end, printing what it reports; the parts that it has not begun."""
        job, left, waiting = running.job, list(running.job.parts), True
        while True:
            ended = running.ended  # before the last look at its reports
            for event in running.news():
                self.report(job, event)
                if event["event"] == "begin":
                    left.remove(event["part"])
            if ended and not any(process.returncode for process in running.processes):
                return left
            fault = running.fault()
            if fault is None and time.monotonic() > self.deadline:
                fault = "the time is over"
            if fault is not None:
                time.sleep(1)  # the other ranks may have something to say
                running.stop()
                doing = f"{job.ranks} × {running.part or job.strategy}"
                self.fail(doing, f"{running.state}: {fault}\n{running.tail()}")
                return left
            if running.state == "ready" and waiting and (helper is None or helper.ended or self.late(running)):
                if helper:
                    said = "compiled" if helper.news() else f"failed\n{helper.tail()}"
                    say(f"{helper.job.ranks} × {helper.job.strategy} beside it: {said}")
                    helper.stop()
                running.go()
                waiting = False
            time.sleep(0.1)

    def late(self, running: Running) -> bool:
        return time.monotonic() - running.since > 25

    def report(self, job: Job, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self.device = event["device"]
            times = f"set up in {event['set_up_s']:.1f} s, {WARM_UP} steps and compiling in {event['compile_s']:.1f} s"
            say(f"{job.ranks} × {job.strategy}: {times}, their mean loss {event['loss']:.5f}")
        elif "result" in event:
            name = f"{job.ranks} × {event['part']}"
            self.results[name] = event["result"]
            if event["event"] == "end":
                say(self.line(name))
            self.write()

    def fail(self, name: str, text: str) -> None:
        self.errors[name] = text
        say(f"{name} FAILED, {text}")
        self.write()

    def write(self) -> None:
        if self.args.output:
            about = {"device": self.device, "torch": torch.__version__, "images_a_gpu": self.args.batch}
            about["overrides"] = self.args.overrides
            whole = {**about, "results": self.results, "errors": self.errors}
            self.args.output.write_text(json.dumps(whole, indent=2) + "\n")

    def line(self, name: str) -> str:
        r = self.results[name]
        if "images_per_s" not in r:
            first = r["first_stalled_s"]
            text = (
                f"{name:<18} training stood still for {r.get('stalled_s', first):.2f} s (the first time {first:.2f}),"
            )
            text += f" written in {r['written_s']:.1f} s, a step meanwhile {r['step_while_writing_ms']:.1f} ms"
            if "resumed_s" in r:
                text += f"; resumed in {r['resumed_s']:.1f} s, first step done after {r['to_first_step_s']:.1f} s"
            return text
        text = f"{name:<18} {r['images_per_s']:8.1f} images/s"
        if base := self.results.get("1 × ddp"):
            text += f" {r['images_per_s'] / (int(name.split()[0]) * base['images_per_s']):6.1%} of linear"
        text += f"  step {r['step_ms']:6.1f} ms: host {r['host_ms']:6.1f}"
        if "idle_ms" in r:
            text += f", GPU idle {r['idle_ms']:5.1f}, communication {r['communication_ms']:5.1f}"
            text += f" of it exposed {r['exposed_ms']:5.1f}"
        return text + (f"  {r['memory_gib']:5.1f} GiB" if "memory_gib" in r else "")


def plan(ranks: int, only: list[str] | None, variants: bool) -> list[Job]:
    """One GPU without sharding, then all of them by each strategy."""
    jobs = [Job("ddp", 1, ["ddp"])] if ranks > 1 else []
    for strategy, text in PARTS.items():
        usual, _, more = text.partition("|")
        parts = [*usual.split(), *(more.split() if variants else [])]
        jobs.append(Job(strategy, ranks, [part for part in parts if only is None or part in only]))
    return [job for job in jobs if job.parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128 if GPU else 4, help="images a GPU")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if GPU else 2, help="default: all GPUs")
    parser.add_argument("--only", type=lambda text: text.split(","), help="of ddp, fsdp-kept, fsdp, save, ddp-graph")
    parser.add_argument("--variants", action="store_true", help="also buckets of 25 MiB, and fsdp without prefetching")
    parser.add_argument("--seconds", type=float, default=240, help="end after this long with what there is by then")
    parser.add_argument("--output", type=Path, help="a JSON file for the results, written anew after each")
    parser.add_argument("--folder", type=Path, help="for checkpoints and logs; default: a temporary one, removed")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_args()
    if args.job:
        return worker(Job(**args.job), args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = args.folder or Path(tempfile.mkdtemp(prefix="gpu-scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    session, jobs = Session(args, folder), plan(args.ranks, args.only, args.variants)
    sharded = any(job.strategy.startswith("fsdp") for job in jobs)
    beside = Job("fsdp", 1, [], first_gpu=args.ranks - 1) if args.ranks > 1 and sharded else None
    try:
        session.run(jobs, beside)
    finally:
        session.close()
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    model = "SiT-XL/2" if GPU else "a tiny SiT"
    told = ", ".join([f"{args.batch} images a GPU", session.device, f"torch {torch.__version__}", *args.overrides])
    print(f"\n{model}, {told}")
    for name in session.results:
        print(session.line(name))
    for name, text in session.errors.items():
        print(f"{name:<18} FAILED, {text.partition(chr(10))[0]}")
    sys.exit(1 if session.errors else 0)


if __name__ == "__main__":
    main()
