"""Progress of a training run: settings, loss, tokens/s and time left."""

from __future__ import annotations

import math
import time
from typing import Any

from igpt_cli.cli.output import Voice, duration, printable


class TrainingDisplay:
    """Shows a training run as it proceeds: what was resolved, then loss, tokens/s and time left."""

    def __init__(self, voice: Voice, label: str = "pretraining"):
        self.voice, self.label = voice, label
        self.uniform = 0.0
        #: The step that the run went on from; None before `start`.
        self.first_step: int | None = None
        self._said = self._begun = time.monotonic()
        self._from = 0.0
        self._bar: Any = None
        self._loss: float | None = None

    def start(self, config: dict[str, Any]) -> None:
        """Say what was resolved; `config` is the run's config.json with its progress."""
        model, training, data, machine = (config[k] for k in ("model", "training", "data", "machine"))
        of_pixels = model["backend"] == "igpt"  # others are of RGB images, and learn classes
        self.uniform = math.log(model["n_vocab"] if of_pixels else model["n_classes"])
        self.first_step, self._begun = config["progress"]["step"], time.monotonic()
        on = machine["device_name"] or machine["device"]
        if machine["ranks"] > 1:
            on = f"{machine['ranks']} ranks on {on}, {'sharded' if machine['shard'] == 'full' else 'replicated'}"
        self.voice.say(
            f"{model['name']}: {training['n_parameters']:,} parameters, "
            + (f"{model['n_layer']} layers, width {model['n_embd']}, " if of_pixels else "")
            + f"{model['resolution']}x{model['resolution']} pixels"
            + (f", {model['n_vocab']} colours; objective {model['objective']}" if of_pixels else "")
            + f"; {on}, {machine['precision']}"
            + (", compiled" if machine["compile"] else "")
            + (", activations recomputed" if machine["recompute"] else "")
        )
        parts = f", {machine['accumulate']} times {machine['micro_batch']}" if machine["accumulate"] > 1 else ""
        ends = [
            training["steps"] and f"{training['steps']:,} steps",
            training["budget"] and f"{training['budget']:,.0f} s",
        ]
        self.voice.say(
            f"{data['n_train']:,} training and {data['n_val']:,} held-out images; {training['batch_size']} images"
            f"{parts} x {model['resolution'] ** 2:,} = {data['tokens_per_step']:,} tokens a step; "
            f"{training['optimizer']}, learning rate {training['learning_rate']:g} after {training['warmup_steps']:,} "
            f"steps of warm-up; ends after {' or '.join(e for e in ends if e)}"
        )
        self.voice.say(
            f"validates every {machine['eval_every']:,} steps, saves every {config['execution']['save_every']}"
            + (" steps" if str(config["execution"]["save_every"]).isdecimal() else "")
        )
        if self.first_step:
            self.voice.say(f"resuming from step {self.first_step:,}")
        if self.voice.terminal and not self.voice.quiet:
            self._open_bar()

    def event(self, text: str) -> None:
        """A sentence about the run."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False)
        else:
            self.voice.say(text)

    def record(self, record: dict[str, Any]) -> None:
        """Called with every record of metrics.jsonl and the `fraction` of the run that is done."""
        if "val_loss" in record:
            right = f"accuracy {record['val_accuracy']:.2f}%, " if "val_accuracy" in record else ""
            self.event(f"step {record['step']:,}: held-out {right}loss {record['val_loss']:.4f}")
            return
        loss, done, now = record["loss"], record["fraction"], time.monotonic()
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        if record["step"] == (self.first_step or 0) + 1:
            self._from = done
        left = (now - self._begun) * (1 - done) / (done - self._from) if done > self._from else 0.0
        rate = f"{record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"]:
            rate += f", MFU {100 * record['mfu']:.0f}%"
        if self._bar is not None:
            status = f"step {record['step']:,}  loss {self._loss:.3f}  {rate}"
            self._bar.update(self._task, completed=done, status=status, left=f"{duration(left)} left" if left else "")
            if done >= 1:
                self._close_bar()
        elif not self.voice.quiet and (record["step"] == 1 or now - self._said >= 10):
            self._said = now
            status = f", {duration(left)} left" if left else ""
            self.voice.say(f"{self.label}: step {record['step']:,}, loss {self._loss:.3f}, {rate}{status}")

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn(self.label),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[status]}"),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=1.0, status="", left="")
        self._bar.start()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close_bar()
