"""The training loop: one for all tasks, on one device or many.

Nothing in a step waits for the device. Losses and gradient norms stay there, and about once a second the ranks sync:
records are written, and the ranks agree whether to validate, to save, to stop. Every random choice is a function of
(seed, step), so a run that is stopped and resumed equals one that never stopped (bit for bit on a CPU).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from igpt_cli.device import autocast
from igpt_cli.errors import NonFiniteError, OutputError
from igpt_cli.files import reason
from igpt_cli.model_dir import METRICS, MetricsWriter
from igpt_cli.planning.gpus import peak_flops
from igpt_cli.training.checkpoint import CheckpointWriter, resume_hint
from igpt_cli.training.distributed import Ranks, StopSignals, broadcast_buffers, sync_gradients
from igpt_cli.training.optim import EMA, clip_gradient, schedule, set_learning_rate
from igpt_cli.training.settings import Resolved, save_interval

if TYPE_CHECKING:
    from igpt_cli.training.task import Task

#: Seconds from one agreement of the ranks to the next.
SYNC_INTERVAL = 1.0

#: What one rank computes a step from, as the objective takes it: (tokens,), (tokens, mask), ...; made on the CPU, or on
#: the device that it is for.
Batch = tuple[Tensor, ...]
#: What a validation measured, by name; "val_loss" is always there.
Metrics = dict[str, float]
#: A record of metrics.jsonl: of a step, or of a validation.
Record = dict[str, Any]


@dataclass
class Progress:
    """Where a run is; every checkpoint has it.

    seconds: spent so far, validation and checkpoints included, by all processes that worked on the run in turn.
    warm_seconds: `seconds` when the warm-up ended; None before.
    train_loss: a moving average; val_loss: the last, at step `validated`.
    best: the step of the best validation and its metrics: {"step", "val_loss", ...}.
    stale: validations since then.
    """

    step: int = 0
    seconds: float = 0.0
    warm_seconds: float | None = None
    validated: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    best: dict[str, float] | None = None
    stale: int = 0


@dataclass(frozen=True)
class Callbacks:
    """What a run calls meanwhile.

    on_start: once, with the resolved settings (the run's config.json).
    on_record: with each record of metrics.jsonl, to which `fraction` (of the run, 0..1) is added.
    on_event: with a sentence now and then, such as that the validation loss rose.
    started: when the command started, on the clock of `time.monotonic`.
    """

    on_start: Callable[[dict[str, Any]], object] = lambda config: None
    on_record: Callable[[Record], object] = lambda record: None
    on_event: Callable[[str], object] = lambda text: None
    started: float = field(default_factory=time.monotonic)


def lowest_loss(metrics: Metrics) -> tuple[float, ...]:
    """How good a validation is, the more the better: by its loss."""
    return (-metrics["val_loss"],)


class Prefetcher:
    """Makes the batch of the next step in the background while this one is used."""

    def __init__(self, make: Callable[[int], Batch], pinned: bool):
        self._make, self._pinned = make, pinned
        self._worker = ThreadPoolExecutor(1, "batches")
        self._next: dict[int, Future] = {}

    def _prepare(self, step: int) -> Batch:
        batch = self._make(step)
        return tuple(t if t.is_cuda else t.pin_memory() for t in batch) if self._pinned else batch

    def take(self, step: int) -> Batch:
        """The batch of a step."""
        batch = self._next.pop(step, None) or self._worker.submit(self._prepare, step)
        self._next = {step + 1: self._worker.submit(self._prepare, step + 1)}
        return batch.result()

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)


class TrainStep:
    """One update of the weights from one global batch: what `igpt bench train` times is what training runs.

    Args:
        objective: called with a Batch, gives the loss of each image, (B,), or (B, K) with other metrics after it;
            `model` is the plain model inside it.
        batch: step -> this rank's Batch.
        micro_batch: images at a time.
        n_metrics: K - 1.
        ema: updated with each step.
    """

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        batch: Callable[[int], Batch],
        settings: Resolved,
        *,
        micro_batch: int,
        precision: str,
        device: torch.device,
        ranks: Ranks,
        n_metrics: int = 0,
        ema: EMA | None = None,
    ):
        self.objective, self.model, self.optimizers, self.settings = objective, model, optimizers, settings
        self.micro_batch, self.precision, self.device, self.ranks = micro_batch, precision, device, ranks
        self.n_metrics, self.ema = n_metrics, ema
        self.batches = Prefetcher(batch, pinned=device.type == "cuda")
        # A gradient that is not finite must change nothing. Fused optimizers, AdamW and SGD, look at this flag on the
        # device; Muon and a sharded model's SGD have no such flag, so with them every step waits for the device.
        self.bad = torch.zeros((), device=device)
        self.waits = not all(o.defaults.get("fused") for o in optimizers)

    def __call__(self, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """Update the weights; the loss and the other metrics of this rank's images, (K,), and the gradient's norm.

        Args:
            step: counted from 0; with the seed it decides the batch and every random number.
            rate: the learning rate.
        """
        settings = self.settings
        set_learning_rate(self.optimizers, rate)
        batch = [t.to(self.device, non_blocking=True) for t in self.batches.take(step)]
        torch.manual_seed(((settings.seed * 1_000_003 + step) * 1_000_003 + self.ranks.rank) % 2**63)
        parts = list(zip(*(t.split(self.micro_batch) for t in batch)))
        metrics = torch.zeros(1 + self.n_metrics, device=self.device)
        for i, part in enumerate(parts):
            sync_gradients(self.objective, i == len(parts) - 1)
            with autocast(self.precision, self.device):
                of_images = self.objective(*part)  # (B,) or (B, K)
                of_part = of_images.view(len(of_images), -1).sum(0) / settings.batch_size
            (of_part[0] * self.ranks.world_size).backward()  # gradients are averaged over ranks, but add up here
            metrics += of_part.detach()
        norm = clip_gradient(self.model, settings.clip)
        self.bad = torch.maximum(self.bad, (~torch.isfinite(norm)).float())
        for optimizer in self.optimizers:
            if not self.waits:
                optimizer.grad_scale, optimizer.found_inf = None, self.bad  # type: ignore[attr-defined]
            if not self.waits or not self.bad.item():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(step + 1)
        return metrics, norm

    def close(self) -> None:
        """End the background thread."""
        self.batches.close()


class Loop:
    """Trains a task until its settings or its execution say so, validates and saves.

    Args:
        objective: as all ranks train it; `model` is the plain model inside it.
        progress: continued from where it is, and kept up to date.
        metrics: where records go, on rank 0.
        config: the run's config.json.
    """

    def __init__(
        self,
        task: Task,
        objective: nn.Module,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        progress: Progress,
        checkpoints: CheckpointWriter,
        metrics: MetricsWriter | None = None,
        ema: EMA | None = None,
        config: dict[str, Any] | None = None,
        callbacks: Callbacks | None = None,
    ):
        self.task, self.objective, self.model, self.optimizers = task, objective, model, list(optimizers)
        self.settings, self.execution, self.ranks, self.device = task.settings, task.execution, task.ranks, task.device
        self.progress, self.checkpoints, self.metrics, self.ema = progress, checkpoints, metrics, ema
        self.config, self.callbacks = config or {}, callbacks or Callbacks()
        self.signals = StopSignals()
        self.step = progress.step
        self.clock = time.monotonic() - progress.seconds
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []  # step, learning rate, (K,) loss ..., gradient norm
        self.since = self.saved_at = time.monotonic()  # of the last sync, of the last checkpoint
        self.saved = (progress.step, progress.validated) if progress.step else None  # of the last checkpoint
        self.closing = 0.0  # seconds that the last validation took, its checkpoint included
        self.steps_per_second = 0.0
        self.save_steps, self.save_seconds = save_interval(task.execution.save_every)
        self.flops_per_step = task.settings.batch_size * task.flops_per_image()
        peak = peak_flops(torch.cuda.get_device_name(task.device)) if task.device.type == "cuda" else None
        self.peak_flops = peak and peak * task.ranks.world_size
        how: dict[str, Any] = {"precision": task.precision, "device": task.device, "ranks": task.ranks, "ema": ema}
        self.train_step = TrainStep(
            objective, model, self.optimizers, task.batch, task.settings,
            micro_batch=task.memory.micro_batch, n_metrics=len(task.metrics), **how,
        )  # fmt: skip

    def run(self) -> str:
        """Step and sync until there is a reason to stop; then validate and save.

        Returns:
            "done", "early stop", "time limit", or "interrupted". A checkpoint of the last step is on disk.

        Raises:
            NonFiniteError: the gradient became NaN or infinite; a checkpoint of the step before is on disk.
            OutputError: a checkpoint could not be written.
        """
        try:
            with self.signals, torch.random.fork_rng(devices=[]):
                return self._run()
        finally:
            self.train_step.close()

    def _run(self) -> str:
        self.objective.train()
        next_sync = self.step + 1
        reason = "done" if self.used() >= 1 else self._early_stop()
        if not reason and self.step and self.step % self.task.eval_every == 0 and self.progress.validated != self.step:
            # A signal came before it last time.
            reason = "interrupted" if self.validate() is None else self._early_stop()
            self.save()
        while reason is None:
            self.take_step()
            if self.step >= next_sync or self.train_step.waits:
                self._flush_metrics()
                reason = self._sync()
                next_sync = self.step + self._steps_to_sync()
        if reason != "interrupted" and self.progress.validated != self.step:
            reason = reason if self.validate() is not None else "interrupted"
        self.save()
        self.checkpoints.wait()
        return reason

    def take_step(self) -> None:
        """One update of the weights, by the learning rate's schedule."""
        settings = self.settings
        decayed = self.fraction() if settings.cosine_decay else 0.0
        rate = settings.learning_rate * schedule(self.step, settings.warmup_steps, decayed)
        metrics, norm = self.train_step(self.step, rate)
        self.step += 1
        self.pending.append((self.step, rate, metrics, norm))

    def _flush_metrics(self) -> None:
        """Wait for the device, and write a record for every step since the last sync."""
        summed = self.ranks.all_reduce_sum(torch.stack([metrics for _, _, metrics, _ in self.pending])).tolist()
        norms = torch.stack([norm for *_, norm in self.pending]).tolist()
        spent = time.monotonic() - self.since
        self.steps_per_second = len(self.pending) / spent
        tokens_per_step = self.settings.batch_size * self.task.n_ctx
        mfu = self.steps_per_second * self.flops_per_step / self.peak_flops if self.peak_flops else None
        memory = _memory(self.device)
        for i, ((step, rate, _, _), (loss, *others), norm) in enumerate(zip(self.pending, summed, norms)):
            if not math.isfinite(norm):
                self._fail(step, rate, loss, norm)
            record = {
                "step": step,
                "epoch": self._epoch(step),
                "tokens": step * tokens_per_step,
                "loss": _short(loss),
                **{name: _short(value) for name, value in zip(self.task.metrics, others)},
                "lr": rate,
                "grad_norm": _short(norm),
                "seconds": round(self.since - self.clock + spent * (i + 1) / len(self.pending), 3),
                "tokens_per_second": round(self.steps_per_second * tokens_per_step, 1),
                "mfu": mfu and round(mfu, 4),
                "memory": memory,
            }
            was = self.progress.train_loss
            self.progress.train_loss = loss if was is None else 0.95 * was + 0.05 * loss
            self._record(record)
        self.pending.clear()

    def _sync(self) -> str | None:
        """Agree with the other ranks on what to do now, and do it; a reason to stop, or None."""
        first, now, limit = self.ranks.first, time.monotonic(), self.execution.time_limit
        received, failed, seconds, save, time_up, self.steps_per_second = self.ranks.all_reduce_max(
            [
                bool(self.signals.received),
                self.checkpoints.failed(),
                now - self.clock if first else 0.0,
                bool(first and self.save_seconds and now - self.saved_at >= self.save_seconds),
                bool(first and limit and now - self.callbacks.started + self.closing >= limit),
                self.steps_per_second if first else 0.0,
            ]
        )
        self.progress.step, self.progress.seconds = self.step, seconds
        if self.progress.warm_seconds is None and self.step >= self.settings.warmup_steps:
            self.progress.warm_seconds = seconds
        if failed:
            self.checkpoints.wait()  # raises
        done = self.used() >= 1
        if not (received or time_up or done) and self.step % self.task.eval_every == 0:
            received = self.validate() is None
        stop = self._early_stop()
        due = save or (self.save_steps and self.step % self.save_steps == 0)
        if due and not (received or time_up or done or stop):
            self.save()
        self.since = time.monotonic()
        return "interrupted" if received else "done" if done else stop or ("time limit" if time_up else None)

    def _steps_to_sync(self) -> int:
        """How many steps until the ranks sync again: about a second's, and none beyond what is due at a step."""
        settings, every = self.settings, self.task.eval_every
        steps = [max(1, int(SYNC_INTERVAL * self.steps_per_second)), every - self.step % every]
        if settings.steps:
            steps.append(settings.steps - self.step)
        if self.save_steps:
            steps.append(self.save_steps - self.step % self.save_steps)
        if settings.budget or self.execution.time_limit:  # short ones are not overrun by much
            left = min(t for t in (settings.budget, self.execution.time_limit) if t)
            steps.append(int(0.05 * left * self.steps_per_second))
        return max(1, min(steps))

    def _early_stop(self) -> str | None:
        """A reason to stop: the validations have not become better for too long."""
        return "early stop" if self.task.patience and self.progress.stale >= self.task.patience else None

    def validate(self) -> Metrics | None:
        """The metrics of the held-out images; None when a stop signal came meanwhile."""
        progress, started = self.progress, time.monotonic()
        self.objective.eval()
        with self.ema.in_place() if self.ema else nullcontext():
            broadcast_buffers(self.model, self.ranks)
            metrics = self.task.validate(
                self.objective, lambda: bool(self.ranks.all_reduce_max([bool(self.signals.received)])[0])
            )
        self.objective.train()
        if metrics is None:
            return None
        loss, before, best = metrics["val_loss"], progress.val_loss, progress.best
        progress.step, progress.validated, progress.val_loss = self.step, self.step, loss
        took = time.monotonic() - started
        shown = {k: _short(v) for k, v in metrics.items()}
        self._record({"step": self.step, "epoch": self._epoch(self.step), **shown, "val_seconds": round(took, 3)})
        if self.task.patience is None and best is not None and loss > max(before or loss, best["val_loss"]):
            self.callbacks.on_event(
                f"the held-out loss rose from {before:.4f} to {loss:.4f}: the model may be over-fitting; the best, "
                f"{best['val_loss']:.4f} at step {best['step']:,}, stays in checkpoints/best"
            )
        if best is None or self.task.score(metrics) > self.task.score(best):
            progress.best, progress.stale = {"step": self.step, **metrics}, 0
            self.save()
        else:
            progress.stale += 1
        self.closing = time.monotonic() - started
        return metrics

    def save(self) -> None:
        """Start to write a checkpoint of this step, unless there is one."""
        now = (self.step, self.progress.validated)
        if now != self.saved:
            config = {**self.config, "progress": asdict(self.progress)}
            self.checkpoints.save(self.step, self.model, self.optimizers, config, self.ema)
            self.saved, self.saved_at = now, time.monotonic()

    def _fail(self, step: int, rate: float, loss: float, norm: float) -> None:
        """The gradient of `step` was not finite: keep what was before it, and say so."""
        self.step = self.progress.step = step - 1
        self.save()
        self.checkpoints.wait()
        clip = self.settings.clip
        raise NonFiniteError(
            f"the gradient became {norm} at step {step} (loss {loss:.4g}, learning rate {rate:.3g}"
            + (f", clipped to {clip:g}" if clip else ", not clipped")
            + f"); the weights of step {self.step} are kept; start again with a lower --lr, or with --clip 1"
        )

    def _record(self, record: Record) -> None:
        """Write a record, and show it."""
        if self.metrics:
            try:
                self.metrics.write(record)
            except OSError as e:
                run = self.checkpoints.run
                self.checkpoints.wait()  # so that the last one counts
                raise OutputError(f"cannot write {run / METRICS}: {reason(e)}; make room; {resume_hint(run)}") from e
        used = min(1.0, self.used(self.step, time.monotonic() - self.clock))
        self.callbacks.on_record({**record, "fraction": used})

    def _epoch(self, step: int) -> float:
        return round(step * self.settings.batch_size / len(self.task.loader), 4)

    def fraction(self) -> float:
        """How much of the cosine is done: of the limit nearest its end, counted from the end of the warm-up."""
        settings, parts = self.settings, [0.0]
        if settings.steps and settings.steps > settings.warmup_steps:
            parts.append((self.step - settings.warmup_steps) / (settings.steps - settings.warmup_steps))
        warm = self.progress.warm_seconds or 0.0
        if settings.budget and settings.budget > warm:
            parts.append((self.progress.seconds - warm) / (settings.budget - warm))
        return max(parts)

    def used(self, step: int | None = None, seconds: float | None = None) -> float:
        """The part of steps, or of the time budget, that is used; by default so far."""
        step = self.progress.step if step is None else step
        seconds = self.progress.seconds if seconds is None else seconds
        limits = ((step, self.settings.steps), (seconds, self.settings.budget))
        return max(done / limit for done, limit in limits if limit)


def _short(value: float) -> float:
    """Nine digits distinguish all float32 values."""
    return float(f"{value:.9g}")


def _memory(device: torch.device) -> int:
    """Bytes at most in use so far: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
