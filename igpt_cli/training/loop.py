"""The training loop: one for pretraining and fine-tuning, on one device or many.

Nothing in a step waits for the device. Losses and gradient norms stay there, and every second or so the ranks meet:
what was gathered is written, and it is agreed whether to validate, to save, to stop. Every random choice is a function
of (seed, step), so a run that is stopped and resumed is the run that never stopped.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from igpt_cli.device import autocast
from igpt_cli.errors import NonFiniteError, OutputError
from igpt_cli.files import reason
from igpt_cli.model_dir import METRICS, MetricsWriter
from igpt_cli.training.checkpoint import CheckpointWriter, way_on
from igpt_cli.training.distributed import Ranks, share_buffers, share_gradients
from igpt_cli.training.ema import EMA
from igpt_cli.training.optim import clip_gradient, schedule, set_learning_rate
from igpt_cli.training.recipe import Execution, Learning, save_interval
from igpt_cli.training.signals import StopSignals

#: Seconds from one meeting of the ranks to the next.
MEET_EVERY = 1.0

#: What one rank computes a step from, as the objective takes it: (tokens,), (tokens, mask), ...; made on the CPU, or on
#: the device that it is for.
Batch = tuple[Tensor, ...]
#: What a validation found, by name; "val_loss" is always there.
Found = dict[str, float]
#: A record of metrics.jsonl: of a step, or of a validation.
Record = dict[str, Any]


@dataclass
class Progress:
    """Where a run is; every checkpoint has it.

    seconds: spent so far, validation and checkpoints included, by all processes that worked on the run in turn.
    warm_seconds: `seconds` when the warm-up ended; None before.
    train_loss: a moving average; val_loss: the last, at step `validated`.
    best: the step of the best validation and what it found: {"step", "val_loss", ...}.
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


def lowest_loss(found: Found) -> tuple[float, ...]:
    """How good a validation is, the more the better: by its loss."""
    return (-found["val_loss"],)


@dataclass
class Job:
    """All that the loop needs: what to train, on what, how, and whom to tell.

    objective: called with a Batch, gives the loss of each image, (B,), or (B, K) with figures beside it, whose names
        are `told`; `model` is the plain model inside it.
    batch: step -> this rank's Batch.
    validate: called with a function that tells whether to give up; gives what it found, or None when it gave up.
    score: how good that is; the checkpoint of the largest is the best.
    patience: validations without a better one after which the run ends; None goes on.
    average: of the weights; it is validated and saved in place of the last ones.
    micro_batch: images at a time. images_per_epoch: over all ranks. flops_per_step: over all ranks, too.
    peak_flops: of all ranks' devices together; None where it is not known.
    metrics: where records go, on rank 0.
    config: the run's config.json.
    """

    objective: nn.Module
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    batch: Callable[[int], Batch]
    validate: Callable[[Callable[[], bool]], Found | None]
    recipe: Learning
    execution: Execution
    precision: str
    device: torch.device
    micro_batch: int
    eval_every: int
    images_per_epoch: int
    tokens_per_image: int
    flops_per_step: float
    peak_flops: float | None
    ranks: Ranks
    metrics: MetricsWriter | None
    checkpoints: CheckpointWriter
    config: dict[str, Any]
    told: tuple[str, ...] = ()
    score: Callable[[Found], tuple[float, ...]] = lowest_loss
    patience: int | None = None
    average: EMA | None = None
    on_record: Callable[[Record], None] = lambda record: None
    on_event: Callable[[str], None] = lambda text: None
    started: float = field(default_factory=time.monotonic)


def train(job: Job, progress: Progress) -> str:
    """Train until the recipe or the execution says so. `progress` goes on from where it is and is kept up to date.

    Returns:
        "done", "early stop", "time limit", or "interrupted". A checkpoint of the last step is on disk.

    Raises:
        NonFiniteError: the gradient became NaN or infinite; a checkpoint of the step before is on disk.
        OutputError: a checkpoint could not be written.
    """
    with StopSignals() as signals, _Ahead(job.batch, pinned=job.device.type == "cuda") as ahead:
        with torch.random.fork_rng(devices=[]):
            return _Loop(job, progress, signals, ahead).run()


class _Ahead:
    """Makes the batch of the next step in the background while this one is used."""

    def __init__(self, make: Callable[[int], Batch], pinned: bool):
        self._make, self._pinned = make, pinned
        self._worker = ThreadPoolExecutor(1, "batches")
        self._next: dict[int, Future] = {}

    def _prepare(self, step: int) -> Batch:
        batch = self._make(step)
        return tuple(t if t.is_cuda else t.pin_memory() for t in batch) if self._pinned else batch

    def take(self, step: int) -> Batch:
        batch = self._next.pop(step, None) or self._worker.submit(self._prepare, step)
        self._next = {step + 1: self._worker.submit(self._prepare, step + 1)}
        return batch.result()

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *exc: object) -> None:
        self._worker.shutdown(cancel_futures=True)


class _Loop:
    """What `train` remembers from step to step."""

    def __init__(self, job: Job, progress: Progress, signals: StopSignals, ahead: _Ahead):
        self.job, self.progress, self.signals, self.ahead = job, progress, signals, ahead
        self.step = progress.step
        self.clock = time.monotonic() - progress.seconds
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []  # step, learning rate, (K,) loss ..., gradient norm
        self.since = self.saved_at = time.monotonic()  # of the last meeting, of the last checkpoint
        self.saved = (progress.step, progress.validated) if progress.step else None  # of the last checkpoint
        self.closing = 0.0  # seconds that the last validation took, its checkpoint included
        self.steps_per_second = 0.0
        self.save_steps, self.save_seconds = save_interval(job.execution.save_every)
        # A gradient that is not finite must change nothing. Fused optimizers, AdamW and SGD, look at this flag on the
        # device; Muon and a sharded model's SGD have no such flag, so with them every step waits for the device.
        self.bad = torch.zeros((), device=job.device)
        self.guarded = all(o.defaults.get("fused") for o in job.optimizers)

    def run(self) -> str:
        """Step and meet until there is a reason to stop; then validate and save."""
        self.job.objective.train()
        meeting = self.step + 1
        reason = "done" if self.is_finished(self.job.recipe, self.progress) else self.early_stop()
        if not reason and self.step and self.step % self.job.eval_every == 0 and self.progress.validated != self.step:
            # A signal came before it last time.
            reason = "interrupted" if self.validate() is None else self.early_stop()
            self.save()
        while reason is None:
            self.take_step()
            if self.step >= meeting or not self.guarded:
                self.write_down()
                reason = self.look_around()
                meeting = self.step + self.steps_to_meeting()
        if reason != "interrupted" and self.progress.validated != self.step:
            reason = reason if self.validate() is not None else "interrupted"
        self.save()
        self.job.checkpoints.wait()
        return reason

    def take_step(self) -> None:
        """One update of the weights from one global batch."""
        job, recipe = self.job, self.job.recipe
        fall = self.fraction() if recipe.falls else 0.0
        rate = recipe.learning_rate * schedule(self.step, recipe.warmup_steps, fall)
        set_learning_rate(job.optimizers, rate)
        batch = [t.to(job.device, non_blocking=True) for t in self.ahead.take(self.step)]
        torch.manual_seed(((recipe.seed * 1_000_003 + self.step) * 1_000_003 + job.ranks.rank) % 2**63)
        parts = list(zip(*(t.split(job.micro_batch) for t in batch)))
        figures = torch.zeros(1 + len(job.told), device=job.device)
        for i, part in enumerate(parts):
            share_gradients(job.objective, i == len(parts) - 1)
            with autocast(job.precision, job.device):
                of_images = job.objective(*part)  # (B,) or (B, K)
                of_part = of_images.view(len(of_images), -1).sum(0) / recipe.batch_size
            (of_part[0] * job.ranks.world_size).backward()  # the ranks' gradients are averaged; their sum is wanted
            figures += of_part.detach()
        norm = clip_gradient(job.model, recipe.clip)
        self.bad = torch.maximum(self.bad, (~torch.isfinite(norm)).float())
        self.step += 1
        self.pending.append((self.step, rate, figures, norm))
        for optimizer in job.optimizers:
            if self.guarded:
                optimizer.grad_scale, optimizer.found_inf = None, self.bad  # type: ignore[attr-defined]
            if self.guarded or not self.bad.item():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if job.average:
            job.average.update(self.step)

    def write_down(self) -> None:
        """Wait for the device, and write a record for every step since the last meeting."""
        job = self.job
        told = job.ranks.total(torch.stack([figures for _, _, figures, _ in self.pending])).tolist()
        norms = torch.stack([norm for *_, norm in self.pending]).tolist()
        spent = time.monotonic() - self.since
        self.steps_per_second = len(self.pending) / spent
        tokens_per_step = job.recipe.batch_size * job.tokens_per_image
        mfu = self.steps_per_second * job.flops_per_step / job.peak_flops if job.peak_flops else None
        memory = _memory(job.device)
        for i, ((step, rate, _, _), (loss, *beside), norm) in enumerate(zip(self.pending, told, norms)):
            if not math.isfinite(norm):
                self.fail(step, rate, loss, norm)
            record = {
                "step": step,
                "epoch": round(step * job.recipe.batch_size / job.images_per_epoch, 4),
                "tokens": step * tokens_per_step,
                "loss": _short(loss),
                **{name: _short(value) for name, value in zip(job.told, beside)},
                "lr": rate,
                "grad_norm": _short(norm),
                "seconds": round(self.since - self.clock + spent * (i + 1) / len(self.pending), 3),
                "tokens_per_second": round(self.steps_per_second * tokens_per_step, 1),
                "mfu": mfu and round(mfu, 4),
                "memory": memory,
            }
            was = self.progress.train_loss
            self.progress.train_loss = loss if was is None else 0.95 * was + 0.05 * loss
            self.tell(record)
        self.pending.clear()

    def look_around(self) -> str | None:
        """Agree with the other ranks on what to do now, and do it; a reason to stop, or None."""
        job, first, now = self.job, self.job.ranks.first, time.monotonic()
        limit = job.execution.time_limit
        received, failed, seconds, save, time_up, self.steps_per_second = job.ranks.largest(
            [
                bool(self.signals.received),
                job.checkpoints.failed(),
                now - self.clock if first else 0.0,
                bool(first and self.save_seconds and now - self.saved_at >= self.save_seconds),
                bool(first and limit and now - job.started + self.closing >= limit),
                self.steps_per_second if first else 0.0,
            ]
        )
        self.progress.step, self.progress.seconds = self.step, seconds
        if self.progress.warm_seconds is None and self.step >= job.recipe.warmup_steps:
            self.progress.warm_seconds = seconds
        if failed:
            job.checkpoints.wait()  # raises
        done = self.is_finished(job.recipe, self.progress)
        if not (received or time_up or done) and self.step % job.eval_every == 0:
            received = self.validate() is None
        stop = self.early_stop()
        due = save or (self.save_steps and self.step % self.save_steps == 0)
        if due and not (received or time_up or done or stop):
            self.save()
        self.since = time.monotonic()
        return "interrupted" if received else "done" if done else stop or ("time limit" if time_up else None)

    def steps_to_meeting(self) -> int:
        """How many steps until the ranks meet again: about a second's, and none beyond an appointment."""
        recipe, execution = self.job.recipe, self.job.execution
        steps = [max(1, int(MEET_EVERY * self.steps_per_second)), self.job.eval_every - self.step % self.job.eval_every]
        if recipe.steps:
            steps.append(recipe.steps - self.step)
        if self.save_steps:
            steps.append(self.save_steps - self.step % self.save_steps)
        if recipe.budget or execution.time_limit:  # short ones are not overrun by much
            left = min(t for t in (recipe.budget, execution.time_limit) if t)
            steps.append(int(0.05 * left * self.steps_per_second))
        return max(1, min(steps))

    def early_stop(self) -> str | None:
        """A reason to stop: the validations have not become better for too long."""
        patience = self.job.patience
        return "early stop" if patience and self.progress.stale >= patience else None

    def validate(self) -> Found | None:
        """What the validation found; None when a stop signal came meanwhile."""
        job, progress, begun = self.job, self.progress, time.monotonic()
        job.objective.eval()
        with job.average.in_place() if job.average else nullcontext():
            share_buffers(job.model, job.ranks)
            found = job.validate(lambda: bool(job.ranks.largest([bool(self.signals.received)])[0]))
        job.objective.train()
        if found is None:
            return None
        loss, before, best = found["val_loss"], progress.val_loss, progress.best
        progress.step, progress.validated, progress.val_loss = self.step, self.step, loss
        took = time.monotonic() - begun
        epoch = round(self.step * job.recipe.batch_size / job.images_per_epoch, 4)
        shown = {k: _short(v) for k, v in found.items()}
        self.tell({"step": self.step, "epoch": epoch, **shown, "val_seconds": round(took, 3)})
        if job.patience is None and best is not None and loss > max(before, best["val_loss"]):
            job.on_event(
                f"the held-out loss rose from {before:.4f} to {loss:.4f}: the model may be over-fitting; the best, "
                f"{best['val_loss']:.4f} at step {best['step']:,}, stays in checkpoints/best"
            )
        if best is None or job.score(found) > job.score(best):
            progress.best, progress.stale = {"step": self.step, **found}, 0
            self.save()
        else:
            progress.stale += 1
        self.closing = time.monotonic() - begun
        return found

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless there is one."""
        job, now = self.job, (self.step, self.progress.validated)
        if now != self.saved:
            config = {**job.config, "progress": asdict(self.progress)}
            job.checkpoints.save(self.step, job.model, job.optimizers, config, job.average)
            self.saved, self.saved_at = now, time.monotonic()

    def fail(self, step: int, rate: float, loss: float, norm: float) -> None:
        """The gradient of `step` was not finite: keep what was before it, and say so."""
        job, self.step = self.job, step - 1
        self.progress.step = self.step
        self.save()
        job.checkpoints.wait()
        raise NonFiniteError(
            f"the gradient became {norm} at step {step} (loss {loss:.4g}, learning rate {rate:.3g}"
            + (f", clipped to {job.recipe.clip:g}" if job.recipe.clip else ", not clipped")
            + f"); the weights of step {self.step} are kept; start again with a lower --lr, or with --clip 1"
        )

    def tell(self, record: Record) -> None:
        """Write a record, and show it."""
        if self.job.metrics:
            try:
                self.job.metrics.write(record)
            except OSError as e:
                run = self.job.checkpoints.run
                self.job.checkpoints.wait()  # so that the last one counts
                raise OutputError(f"cannot write {run / METRICS}: {reason(e)}; make room; {way_on(run)}") from e
        self.job.on_record({**record, "fraction": self.used(self.step, time.monotonic() - self.clock)})

    def fraction(self) -> float:
        """How much of the cosine is done: of the budget nearest its end, counted from the end of the warm-up."""
        recipe, parts = self.job.recipe, [0.0]
        if recipe.steps and recipe.steps > recipe.warmup_steps:
            parts.append((self.step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps))
        warm = self.progress.warm_seconds or 0.0
        if recipe.budget and recipe.budget > warm:
            parts.append((self.progress.seconds - warm) / (recipe.budget - warm))
        return max(parts)

    def used(self, step: int, seconds: float) -> float:
        """How much of the run is done, 0..1."""
        return min(1.0, _used(self.job.recipe, step, seconds))

    @staticmethod
    def is_finished(recipe: Learning, progress: Progress) -> bool:
        return _used(recipe, progress.step, progress.seconds) >= 1


def _used(recipe: Learning, step: int, seconds: float) -> float:
    """The part of steps, or of the time budget, that is used."""
    used = [step / recipe.steps] if recipe.steps else []
    return max(used + ([seconds / recipe.budget] if recipe.budget else []))


def _short(value: float) -> float:
    """Nine digits tell every float32 from every other."""
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
