"""The training loop. One batch takes one road:

    data → vae → interpolant → model → loss → clip · AdamW · EMA → checkpoint

`Trainer.train_step` is that line. Everything a step draws is a function of (seed, sample index), so the whole state of a run
is its weights, moments, averages and the number of steps done: what is in a checkpoint continues bit for bit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitfast import checkpoint, config, data, growing, matching, memory, metrics, parallel, startup
from sitfast.config import Config
from sitfast.data.ahead import Ahead
from sitfast.data.buckets import Bucket, Buckets
from sitfast.data.genes import Genes
from sitfast.data.latents import Latents
from sitfast.data.loader import Loader, fixed_batches
from sitfast.data.sampler import held_out
from sitfast.errors import SitfastError
from sitfast.evaluate import validation_loss
from sitfast.graph import WARM_UP, WARM_UP_OF_RANKS, Recorded
from sitfast.images import replacing, save_grid
from sitfast.interpolant import Interpolant
from sitfast.kernels import use_reference
from sitfast.kernels.interpolate import interpolate
from sitfast.layers import Mlp
from sitfast.loss import interpolant_loss
from sitfast.model import build_model, forward_macs, load_state
from sitfast.optim import Update, learning_rate
from sitfast.parallel import World
from sitfast.precision import AUTOCAST, WorkingCopy, wants_copy
from sitfast.profiling import Window, annotate
from sitfast.resize import fit
from sitfast.sample import generate, labels_for, prompts_for
from sitfast.text import DROPPED, Frozen, Text, build_text, text_shape
from sitfast.vae import build_vae

ELSEWHERE = "a signal to another rank"
_SAVE_FAILED = 2  # what a rank says, instead of 1 for a signal, when its last checkpoint could not be written


class Trainer:
    """A run in its folder: built from a config, resumed from the newest valid checkpoint if there is one.

    Of a run in stages it is one of them, by its number from 0 (see `growing`); `cfg` is then the config of that stage.

    Raises SitfastError before the first step for anything in the config, the data or the folder that cannot work.
    """

    def __init__(self, cfg: Config, world: World, stage: int = 0) -> None:
        growing.each(cfg, lambda one: config.check_world(one, world.size))
        self.whole, self.stages = cfg, growing.stages(cfg)
        self.number, self.stage = stage, self.stages[stage]
        cfg = self.stage.cfg
        self.cfg, self.world, self.device = cfg, world, world.device
        if world.device.type == "cpu" and cfg.train.precision == "tf32":
            raise SitfastError("train.precision=tf32 needs a GPU, and this run is on the CPU; use train.precision=fp32")
        self.run_dir = Path(cfg.output_dir)
        self._claim_folder()

        source = data.build_source(cfg.data)
        world.agree("data", matching.fingerprint(source))
        matching.check_source(cfg, source)
        train_rows, val_rows = held_out(source.num_rows, cfg.data.val_samples)

        torch.set_float32_matmul_precision("highest" if cfg.train.precision == "fp32" else "high")
        self.vae = build_vae(cfg.vae, device=self.device, seed=cfg.seed)
        if cfg.data.source != "genes":
            growing.each(self.whole, lambda one: matching.check_sizes(one, self.vae))
        if isinstance(source, Latents):
            source.check_vae(self.vae)
        self.text = build_text(cfg.text, self.device)
        if isinstance(self.text, Frozen) and cfg.text.cache:
            matching.serve_states(cfg, source, self.text)
        self.interpolant = Interpolant.from_config(cfg.path, cfg.seed)
        self.panel = source.panel.state() if isinstance(source, Genes) else None
        self.model_kwargs = {
            **({"text": text_shape(cfg.text)} if self.text else {}),
            **({"genes": True} if self.panel else {}),
            "input_size": source.image_size // self.vae.downsample,
            "in_channels": self.vae.latent_channels(source.channels),
            **cfg.model.model_dump(exclude={"init_from"}, exclude_none=True),
        }
        if cfg.model.rope and cfg.model.rope_grid is None:
            self.model_kwargs["rope_grid"] = matching.grid(self.stages[0].cfg, self.vae.downsample)
        with torch.device("meta"):
            self.model = build_model(**self.model_kwargs)
        cfg = self._plan_memory()
        self._build_model()
        if cfg.model.init_from:
            weights = checkpoint.find_weights(cfg.model.init_from)
            if not self.panel:
                weights = fit(weights, self.model.config)
            load_state(self.model, weights, source=cfg.model.init_from)
        prob, dtype = cfg.model.class_dropout_prob, AUTOCAST[cfg.train.precision]
        self.empty = self.text([""]) if self.text else None
        self.null = (self.empty or cfg.model.num_classes) if prob > 0 else None
        null = DROPPED if self.text else cfg.model.num_classes
        self.draw = {"drop": prob, "null": null, "dtype": dtype}  # what a step asks of `interpolate`
        self.buckets = Buckets(cfg.data, cfg.seed)
        self.macs = forward_macs(self.model)
        pixels = (self.model.patch_size * self.vae.downsample) ** 2  # of a token
        tokens = {b: b.height * b.width // pixels if self.buckets.several else None for b in self.buckets.kinds}
        self.work = {b: b.images * forward_macs(self.model, count) for b, count in tokens.items()}

        self.update = Update(
            self.model,
            optim=cfg.optim,
            ema=cfg.ema,
            total_steps=cfg.train.steps,
            precision=cfg.train.precision,
            first_step=self.stage.first,
            all_reduce_max=world.maximum if world.size > 1 else None,
            rank=world.rank,
            seed=cfg.seed,
            copies=self.copy.parameters if self.copy else None,
        )
        self.saver = checkpoint.Saver(
            self.run_dir, keep=cfg.checkpoint.keep, world=world, background=cfg.checkpoint.background
        )
        self.step, self.window = 0, []
        start = self._resume()
        self.samples = self.stage.consumed + self.buckets.samples(self.stage.first, self.step)
        if self.device.type == "cuda":
            self.saver.reserve(**self._tensors())
        if self.copy:
            self.copy.renew()
        warm_up = WARM_UP if world.size == 1 else WARM_UP_OF_RANKS
        self.recorded = None
        if self._records():
            shapes = [self._shape(bucket) for bucket in self.buckets.kinds] if len(set(self.buckets.kinds)) > 1 else []
            made = [*self.model.parameters(), *(self.copy.network.parameters() if self.copy else ())]
            self.recorded = Recorded(self._compute, self.device, warm_up=warm_up, shapes=shapes, parameters=made)
        with self.recorded.aside() if self.recorded else nullcontext():
            self.network = parallel.data_parallel(self.model, world, self.copy)
        self.loader = Loader(
            source,
            train_rows,
            data=cfg.data,
            seed=cfg.seed,
            consumed=self.samples,
            step=self.step,
            buckets=self.buckets,
            accumulate=cfg.train.accumulate,
            rank=world.rank,
            world_size=world.size,
            device=self.device,
            quarantine=self.run_dir / "quarantine.txt",
            tokenizer=self.text.tokenizer if self.text else None,
        )
        self.cut_captions = 0
        self.encoded = Ahead(self._next_batch, self.vae, self.device, text=self.text)
        self.source, self.val_rows = source, val_rows[world.rank :: world.size]
        self.profile = Window(cfg.profile, self.run_dir, rank=world.rank, network=self.network)
        self.peak = metrics.peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        self.logger = metrics.Logger(
            self.run_dir,
            cfg.log,
            config=cfg.model_dump(mode="json"),
            total_steps=self.stage.last,
            is_main=world.is_main,
            resume_step=self.step if start else None,
        )
        self.logger.startup(startup.table(self, len(train_rows), start=start or "from the beginning"))
        self._begin_window()

    # ---------------------------------------------------------------------------------------------------- one step

    def train_step(self) -> Tensor:
        """One update of the weights; returns the gradient norm (a device tensor: nothing waits for it)."""
        total, bucket = torch.zeros((), device=self.device), self.buckets[self.step]
        for micro in range(self.cfg.train.accumulate):
            batch = next(self.encoded)
            inputs = batch.x, batch.index, batch.y, *(batch.text or ())
            if self.recorded:
                total += self.recorded(micro == 0, *inputs)
            else:
                total += self._compute(*inputs, last=micro == self.cfg.train.accumulate - 1)
        with annotate("clip_optimizer_ema"):
            grad_norm = self.update.step(self.step, total)
            if not (self.recorded and self.recorded.active):
                self.update.zero_grad()
        self.window.append(total)
        self.step += 1
        self.samples += bucket.images
        self._macs += self.work[bucket]
        return grad_norm

    def _compute(self, x: Tensor, index: Tensor, y: Tensor, *text: Tensor, last: bool = True) -> Tensor:
        """Gradients of one micro-batch, added to those that are there; returns its share of the step's loss.

        `text` is the parts of a `Text` where the model reads captions. Under data parallelism the `last` one of a step
        reduces the gradients over the ranks.
        """
        accumulate = self.cfg.train.accumulate
        with annotate("interpolate"):
            xt, t, target, labels = interpolate(self.interpolant, x, index, labels=y, **self.draw)
            condition = Text(*text).replaced(labels == DROPPED, self.empty) if self.empty else labels
        with parallel.no_reduction(self.network, skip=not last):
            with annotate("forward"):
                with self.autocast():
                    out = self.network(xt, t, condition)
                loss = interpolant_loss(out, target, t, interpolant=self.interpolant).mean() / accumulate
            with annotate("backward"):
                self.update.scale_loss(loss).backward()
                if self.copy and accumulate > 1 and not (last and self.world.size > 1):
                    self.copy.collect()
        return loss.detach()

    def implementation(self) -> AbstractContextManager[None]:
        """Around everything that computes: `train.kernels=reference` wants plain PyTorch."""
        return use_reference() if self.cfg.train.kernels == "reference" else nullcontext()

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.cfg.train.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _next_batch(self) -> data.Batch:
        self.world.at(self.step, "reading data")
        batch = next(self.loader)
        if batch.cut and not self.cut_captions:
            self.logger.warn(
                f"a caption is longer than text.length={self.cfg.text.length} tokens and was cut: {batch.cut[0]!r}; the log"
                " counts such captions of this rank"
            )
        self.cut_captions += len(batch.cut)
        self.world.at(self.step, "training")
        return batch

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> str | None:
        """Train until `train.steps` (of the stage), or until a signal; returns the name of the signal that ended it."""
        cfg, stop, saved = self.cfg, parallel.StopRequest(), self.step
        if self.step >= self.stage.last:
            more = "add a stage" if self.whole.stages else "raise train.steps"
            self.logger.note(f"all {self.step} steps are done; {more} to go on, or choose another output_dir")
        self._begin_window()
        choice = ExitStack()
        choice.enter_context(self.implementation())
        try:
            while self.step < self.stage.last:
                self.profile.step(self.step)
                grad_norm = self.train_step()
                self.logger.advance(self.step)
                if self._due(cfg.log.every):
                    self._log(grad_norm)
                vote = self.world.most(_SAVE_FAILED if self.saver.failed else int(stop.signal is not None))
                if vote == _SAVE_FAILED:
                    self.saver.wait()  # raises, on all ranks
                asked = vote > 0
                if self._due(cfg.log.val_every):
                    self._validate()
                if self._due(cfg.sample.every) and not asked:
                    self._sample()
                if self._due(cfg.checkpoint.every) or asked:
                    self._save()
                    saved = self.step
                self._tell(self.saver.done())
                if asked and self.step < self.stages[-1].last:
                    self._tell(self.saver.wait())
                    name = stop.signal or ELSEWHERE
                    self.logger.note(f"stopped by {name} after step {self.step}; the same command continues from there")
                    return name
            if saved < self.step:
                self._save()
            self._tell(self.saver.wait())
            return None
        except torch.OutOfMemoryError as error:
            self.world.failing()
            raise self._out_of_memory(error) from error
        except Exception:
            self.world.failing()
            raise
        finally:
            choice.close()
            stop.close()
            self.close()

    def close(self) -> None:
        self.profile.close()
        self.loader.close()
        self.logger.close()
        if self.world.size > 1:
            self.recorded = None  # NCCL cannot be left before the recordings of its work are gone

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.stage.last)

    def _log(self, grad_norm: Tensor) -> None:
        """The only regular place where the host waits for the device."""
        self.update.check(self.step)
        losses = self.world.mean(torch.stack(self.window))
        record: dict[str, Any] = {
            "step": self.step,
            "loss": losses.mean().item(),
            "grad_norm": grad_norm.item(),
            "lr": learning_rate(self.step - self.stage.first - 1, self.cfg.optim, self.cfg.train.steps),
        }
        elapsed = time.perf_counter() - self._started - self._paused
        record["images_per_s"] = (self.samples - self._first_sample) / elapsed
        record["mfu"] = 6 * self._macs / (elapsed * self.peak * self.world.size) if self.peak else None
        record["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        record["data_wait"] = self.encoded.take_waited() / elapsed
        record["eta_s"] = (self.stage.last - self.step) * elapsed / (self.step - self._first)
        record["samples"] = self.samples
        if self.whole.stages:
            record["stage"] = self.number + 1
        record["skipped"] = self.update.skipped.item()
        record["unreadable"] = self.loader.unreadable
        record["cut_captions"] = self.cut_captions if self.text else None
        self.logger.step(record)
        self.window = []
        self._begin_window()

    def _begin_window(self) -> None:
        self.encoded.take_waited()
        self._started, self._first, self._paused = time.perf_counter(), self.step, 0.0
        self._first_sample, self._macs = self.samples, 0

    @contextmanager
    def _pause(self, name: str) -> Iterator[None]:
        """Time inside, once the queued steps are done, does not count as training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.world.at(self.step - 1, name)
        try:
            with annotate(name):
                yield
        finally:
            self._paused += time.perf_counter() - start
            self.world.at(self.step - 1, "training")

    # -------------------------------------------------------------------------------------------- now and then

    def _validate(self) -> None:
        batches = fixed_batches(self.source, self.val_rows, batch_size=self.cfg.sample.batch_size, device=self.device)
        with self._pause("validate"), parallel.gathered(self.model, self.cfg.parallel), self.autocast():
            bins = validation_loss(
                self.model,
                batches,
                vae=self.vae,
                interpolant=self.interpolant,
                text=self.text,
                bins=self.cfg.log.val_bins,
                world=self.world,
            )
        values = {"val_loss": bins.mean().item()} | {f"val_loss_bin_{i}": v for i, v in enumerate(bins.tolist())}
        self.logger.scalars(self.step, values)

    def _sample(self) -> None:
        """A grid from the averaged weights, at the same noise and labels or prompts every time."""
        if not self.world.is_main and self.mesh is None:
            return
        settings = self.cfg.sample
        if self.text:
            labels = prompts_for(settings.num, settings.prompts or ())
        else:
            labels = labels_for(settings.num, settings.classes, self.cfg.model.num_classes)
        try:
            with (
                self._pause("sample"),
                self.update.ema.applied(self.model),
                parallel.gathered(self.model, self.cfg.parallel),
                self.autocast(),
            ):
                if not self.world.is_main:
                    return
                images = generate(
                    self.model,
                    self.vae,
                    self.interpolant,
                    labels,
                    settings=settings,
                    null=self.null,
                    seed=self.cfg.seed,
                    text=self.text,
                )
            path = save_grid(images, self.run_dir / "samples" / f"step-{self.step}.png")
        except SitfastError as error:  # an early model can defeat an integrator; that is no reason to end the training
            self.logger.warn(f"no sample grid at step {self.step}: {error}")
        else:
            self.logger.image(self.step, "samples", path)

    def _save(self) -> None:
        """Begin to write a checkpoint: training waits until the tensors are copied, not until they are on the disk."""
        self.update.check(self.step)
        window = self.world.mean(torch.stack(self.window)).tolist() if self.window else []
        with self._pause("checkpoint"):
            note = self.saver.save(
                self.step,
                **self._tensors(),
                state={
                    "samples": self.samples,
                    "window": window,
                    "model": self.model_kwargs,
                    "class_names": self.source.class_names,
                    "genes": self.panel,
                },
                config_yaml=config.dump(self.cfg),
            )
        self._tell(note)

    def _tensors(self) -> dict[str, Any]:
        """All that a checkpoint holds of this run, sharded as it is; views, not copies."""
        emas = {decay: self.update.ema.state(i) for i, decay in enumerate(self.cfg.ema.decays)}
        return {"model": self.model.state_dict(), "emas": emas, "optimizer": self.update.state()}

    def _tell(self, note: str | None) -> None:
        if note is not None:
            self.logger.note(note)

    # ------------------------------------------------------------------------------------------------------ set-up

    def _claim_folder(self) -> None:
        """Make the run folder ours: new, or holding the same run."""
        path = self.run_dir / "config.yaml"
        changed = config.differences(config.load(path), self.whole) if path.exists() else []
        self.world.barrier()  # all have read before anyone writes
        if changed:
            raise SitfastError(
                f"output_dir={self.run_dir} holds another run ({'; '.join(changed)});"
                " choose another output_dir, or remove that folder"
            )
        if self.world.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(self.run_dir)
            with replacing(path) as temporary:
                temporary.write_text(config.dump(self.whole), encoding="utf-8")
        self.world.barrier()

    def _resume(self) -> str:
        """Continue from the newest valid checkpoint, if the folder has one; from that of the stage before, grown."""
        path = None
        if self.world.is_main:
            path = checkpoint.latest(
                self.run_dir, warn=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True)
            )
        path = self.world.share(path)
        self.step = found = 0 if path is None else checkpoint.read_state(path)["step"]
        if found < self.stage.first:
            raise SitfastError(
                f"stage {self.number + 1} begins with the checkpoint of step {self.stage.first}, and the newest valid one in"
                f" {self.run_dir} is that of step {found}; start again, and the stage before goes on from there"
            )
        if path is None:
            return ""
        if self.number and found == self.stage.first:
            return growing.grow(path, **self._tensors(), sizes=self.model.config, world=self.world)
        if checkpoint.read_state(path).get("genes") != self.panel:
            raise SitfastError(
                f"data.path={self.cfg.data.path} has other genes, or other values, than {path} was trained on; give it the"
                " file it had, or choose another output_dir"
            )
        state = checkpoint.restore(path, **self._tensors(), world=self.world)
        self.window = list(torch.tensor(state["window"], device=self.device))
        return f"resumed after step {self.step}"

    def _plan_memory(self) -> Config:
        """The config, with as many micro-batches as the memory needs where that is asked for."""
        cfg, size = self.cfg, self.world.size
        self.memory = memory.capacity(self.device)
        if cfg.train.auto_accumulate:
            count = self.world.most(memory.fitting_accumulate(cfg, self.model, size, self.memory))
            cfg = self.cfg = memory.with_changes(cfg, train={"accumulate": count})
        self.predicted = memory.predict(cfg, self.model, size)
        return cfg

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> SitfastError:
        total = self.memory or 0
        how = memory.remedies(self.cfg, self.model, self.world.size, total) if total else "use smaller micro-batches"
        said = str(error).partition(". ")[0]
        return SitfastError(
            f"out of GPU memory in step {self.step + 1} ({said}): {self.predicted}, the GPU has {total / 2**30:.1f} GiB; {how}"
        )

    def _build_model(self) -> None:
        """Checkpoint, compile and shard the blocks while the model is a mere description, then give it its weights."""
        cfg = self.cfg
        for module in self.model.modules():
            if isinstance(module, Mlp):
                module.save = cfg.train.mlp_save
        self.compiled = cfg.train.compile if cfg.train.compile is not None else self.device.type == "cuda"
        self.copy = WorkingCopy(self.model) if wants_copy(cfg) else None
        for model in (self.model, self.copy.network) if self.copy else (self.model,):
            parallel.prepare_blocks(
                model.blocks,
                activation_checkpoint=cfg.parallel.activation_checkpoint,
                compiled=self.compiled,
                sizes=max(1, len(cfg.data.resolutions)),
            )
        self.mesh = parallel.device_mesh(cfg.parallel, self.world)
        if self.mesh is not None:
            dtype, reshard = AUTOCAST[cfg.train.precision], cfg.parallel.reshard_after_forward
            parallel.shard(self.model, self.mesh, reshard_after_forward=reshard, dtype=dtype)
        torch.manual_seed(cfg.seed)  # the initial weights; nothing else draws from the global generator
        parallel.materialize(self.model, self.device)
        if self.copy:
            self.copy.network.to_empty(device=self.device)

    def _records(self) -> bool:
        """Whether steps become CUDA graphs: `train.cuda_graph`, by default on one GPU without sharding."""
        asked, whole = self.cfg.train.cuda_graph, self.device.type == "cuda" and self.mesh is None
        if asked and not (whole and (self.world.size == 1 or self.cfg.train.accumulate == 1)):
            raise SitfastError(
                "train.cuda_graph=true needs GPUs without sharding, and of several ranks train.accumulate=1; this run has"
                f" {self.world.size} ranks on {self.device.type}, parallel.strategy={self.cfg.parallel.strategy} and"
                f" train.accumulate={self.cfg.train.accumulate}; leave it null"
            )
        if asked and self.world.size > 1 and len(set(self.cfg.data.resolutions)) > 1:
            raise SitfastError(
                f"train.cuda_graph=true of {self.world.size} ranks takes batches of one size, and data.resolutions has"
                f" {len(set(self.cfg.data.resolutions))}; leave it null"
            )
        return whole and self.world.size == 1 if asked is None else asked

    def _shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """Of x in a micro-batch of this rank, [B, C, H, W]."""
        images, shrink = bucket.images // self.world.size // self.cfg.train.accumulate, self.vae.downsample
        return images, self.model_kwargs["in_channels"], bucket.height // shrink, bucket.width // shrink
