"""A run from its first step to its last, of any task, and what it leaves on disk however it ends.

`pretrain`, `finetune` and `train` start a run; `resume` continues any.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from igpt_cli.device import choose_device
from igpt_cli.errors import IgptError, InputError, Interrupted, MismatchError, OutputError
from igpt_cli.files import reason
from igpt_cli.model_dir import (
    CONFIG,
    METRICS,
    PALETTE,
    WEIGHTS,
    MetricsWriter,
    ModelDir,
    new_config,
    read_config,
    task_of,
    write_config,
)
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.checkpoint import CheckpointWriter, checkpoints, command_of, last_checkpoint, load_checkpoint
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.finetune import Finetuning
from igpt_cli.training.loop import Callbacks, Loop, Progress
from igpt_cli.training.pretrain import Pretraining
from igpt_cli.training.settings import (
    Execution,
    FinetuneSettings,
    PretrainSettings,
    TrainSettings,
    architecture,
    check,
    from_config,
    to_config,
    training_in,
)
from igpt_cli.training.supervised import Supervised, few_patches, recorded_teacher
from igpt_cli.training.task import ALONE, Task
from igpt_cli.workspace import CHECKPOINTS, resolve_run

TASKS: dict[str, type[Task]] = {task.name: task for task in (Pretraining, Finetuning, Supervised)}
SEARCH = "search"


@dataclass(frozen=True)
class RunResult:
    """What a run gave. Losses in nats (of pixels: per token), accuracies in percent; None where a task has none.

    status: "done", "early stop", or why it ended before its end. val_loss is the last; where classes are learned it and
    val_accuracy are those of the best checkpoint, whose weights the run has. accuracy and its 95% Wilson interval are
    of the n_test test images, classified once, when training had ended of itself. accuracy_class and
    accuracy_distillation are those of each head alone, for a model that has two.
    """

    run: Path
    status: str
    steps: int
    images_seen: int
    tokens_seen: int
    train_loss: float | None
    val_loss: float | None
    best: dict[str, float] | None
    seconds: float
    val_accuracy: float | None = None
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    accuracy_class: float | None = None
    accuracy_distillation: float | None = None
    n_test: int | None = None


def pretrain(
    tokens: TokenFile,
    out: Path | str,
    settings: PretrainSettings | None = None,
    execution: Execution | None = None,
    *,
    init: ModelDir | None = None,
    device: str = "auto",
    ranks: Ranks = ALONE,
    **launch: Any,
) -> RunResult:
    """Pretrain a model on a token file and write the run `out`: `start` of `pretrain.Pretraining.new`."""
    return start(Pretraining.new(tokens, settings, execution, init=init, device=device, ranks=ranks), out, **launch)


def finetune(
    run: ModelDir,
    tokens: TokenFile,
    out: Path | str,
    settings: FinetuneSettings | None = None,
    execution: Execution | None = None,
    *,
    device: str = "auto",
    ranks: Ranks = ALONE,
    **launch: Any,
) -> RunResult:
    """Fine-tune a model on the labelled images of a token file: `start` of `finetune.Finetuning.new`."""
    return start(Finetuning.new(run, tokens, settings, execution, device=device, ranks=ranks), out, **launch)


def train(
    model: str | ModelDir,
    tokens: TokenFile,
    out: Path | str,
    settings: TrainSettings | None = None,
    execution: Execution | None = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    teacher: ModelDir | None = None,
    device: str = "auto",
    ranks: Ranks = ALONE,
    **launch: Any,
) -> RunResult:
    """Train a model of RGB images on labelled images: `start` of `supervised.Supervised.new`."""
    how: dict[str, Any] = {"sizes": sizes, "teacher": teacher, "device": device, "ranks": ranks}
    return start(Supervised.new(model, tokens, settings, execution, **how), out, **launch)


def start(
    task: Task,
    out: Path | str,
    *,
    force: bool = False,
    command: str | None = None,
    data_path: str | None = None,
    **callbacks: Any,
) -> RunResult:
    """Train a task and write the run `out`; under torchrun every rank calls this.

    Args:
        out: the run's folder; made, and refused if it is there already, unless `force`.
        command: what to record as the command that made the run.
        data_path: what to record as the data, where the task's tokens are in a temporary file made of it.
        callbacks: on_start, on_record, on_event: see `loop.Callbacks`.

    Raises:
        OutputError: before any training; or a checkpoint could not be written, and those before it are as they were.
        NonFiniteError: the gradient became NaN or infinite; the last good weights are in `out`.
        Interrupted: SIGINT, SIGTERM or SIGUSR1; a checkpoint of the last step is in `out`.
    """
    out, ranks, call = Path(out), task.ranks, Callbacks(**callbacks)
    if note := few_patches(task.description):
        call.on_event(note)
    config = _config(task, command, data_path)
    ranks.broadcast_from_rank0(lambda: make_run(out, force, task.tokens, config))

    def short(task: Task) -> RunResult:
        folder, config = out / SEARCH, _config(task, command, data_path)
        ranks.broadcast_from_rank0(lambda: make_run(folder, True, task.tokens, config))
        try:
            return _run(task, folder, config, None, Callbacks())
        finally:
            ranks.broadcast_from_rank0(lambda: shutil.rmtree(folder, ignore_errors=True))

    task = task.prepared(short, call.on_event)
    return _run(task, out, {**_config(task, command, data_path), "data": config["data"]}, None, call)


def resume(
    tokens: TokenFile,
    run: Path | str,
    requested: dict[str, Any] | None = None,
    *,
    task: str | None = None,
    teacher: ModelDir | None = None,
    device: str = "auto",
    ranks: Ranks = ALONE,
    **callbacks: Any,
) -> RunResult:
    """Continue a run from its last checkpoint, as if it had never stopped; a model it started from is not needed.

    Args:
        tokens: the token file that the run started with.
        run: the run's folder, or "latest".
        requested: settings by name. Those of `Execution` take effect; the others must be what they were.
        task: which task the run must be of; None takes any.
        teacher: the run's own, if it has moved; default the one that config.json names.

    For the other arguments see `start`.

    Raises:
        InputError: there is no checkpoint, or the run is of another task.
        MismatchError: the tokens, the palette or a setting differ from the run's; all are named.
        OutputError, NonFiniteError, Interrupted: as for `start`.
    """
    call = Callbacks(**callbacks)
    run, chosen, requested = resolve_run(run), choose_device(device), requested or {}
    config = ranks.broadcast_from_rank0(lambda: read_config(run))
    kind = TASKS[task_of(config)]
    if task not in (None, kind.name):
        raise InputError(f"{run} is not a run of igpt {task}; resume it with: {command_of(run)} --resume {run}")
    folder = ranks.broadcast_from_rank0(lambda: last_checkpoint(run))
    was = training_in(config, run / CONFIG) | (architecture(config["model"]) if kind is Pretraining else {})
    settings = from_config(kind.resolved_type, was, run / CONFIG)
    check(settings)
    execution = from_config(Execution, config.get("execution") or {}, run / CONFIG)
    changed = {k: v for k, v in requested.items() if hasattr(execution, k)}
    differ = [
        f"{k} was {getattr(settings, k)} and is now {v}"
        for k, v in requested.items()
        if k not in changed and v != getattr(settings, k)
    ]
    differ += [*differing_data(config, tokens), *kind.differences(config, tokens)]
    teacher, other = recorded_teacher(config, teacher)
    if differ := differ + other:
        raise MismatchError(
            f"{run} continues as it started, but {'; '.join(differ)}; resume it with the settings and the token file "
            f"that it had ({config['data']['path']}), or start a new run"
            + (f" with --config {run / CONFIG}" if kind is Pretraining else "")
        )
    if "micro_batch" in changed or "accumulate" in changed:
        execution = replace(execution, micro_batch=None, accumulate=None)
    execution = replace(execution, **{"time_limit": None, **changed})  # a time limit is each process's own
    check(execution)
    more = {"teacher": teacher} if teacher else {}
    continued = kind.resumed(tokens, config, settings, execution, chosen, ranks, **more)
    config = {**config, "execution": asdict(execution), "machine": continued.machine, "result": {"status": "running"}}
    return _run(continued, run, config, folder, call)


def _config(task: Task, command: str | None, data_path: str | None) -> dict[str, Any]:
    """The run's config.json at its start."""
    return new_config(
        task.description,
        task=task.name,
        training={**to_config(task.settings), "n_parameters": task.n_parameters()},
        execution=asdict(task.execution),
        data={**data_of(task.tokens, data_path), **task.data_config()},
        **task.config,
        machine=task.machine,
        **({"command": command} if command else {}),
        result={"status": "running"},
    )


def _run(task: Task, out: Path, config: dict[str, Any], folder: Path | None, callbacks: Callbacks) -> RunResult:
    """Train from the start, or from the checkpoint `folder`; whatever ends it, config.json says why."""
    progress = Progress()
    try:
        return _trained(task, out, config, folder, callbacks, progress)
    except BaseException:
        if task.ranks.first and folder is None and progress.step == 0 and not checkpoints(out):
            unmake_run(out)
        raise


def _trained(
    task: Task, out: Path, config: dict[str, Any], folder: Path | None, callbacks: Callbacks, progress: Progress
) -> RunResult:
    ranks = task.ranks
    objective, shared = task.build()
    config["machine"] = task.machine
    model = objective.model
    optimizers, ema = task.optimizers(model), task.ema(model)
    if folder:
        was = load_checkpoint(folder, model, optimizers, ranks, ema)["progress"]
        for f in fields(Progress):
            if was.get(f.name) is not None:
                setattr(progress, f.name, was[f.name])
    callbacks.on_start({**config, "progress": asdict(progress)})
    metrics = MetricsWriter(out, after=progress.step if folder else None) if ranks.first else None
    writer = CheckpointWriter(out, ranks, task.execution.keep)
    status, gave = "failed", {}
    try:
        loop = Loop(task, shared, model, optimizers, progress, writer, metrics, ema, config, callbacks)
        status = loop.run()
        if status in ("done", "early stop"):
            gave = task.finish(objective, shared, out)
    except KeyboardInterrupt:
        saved, status = status != "failed", "interrupted"
        raise Interrupted(_interrupted(out, progress.step, saved)) from None
    except IgptError as e:
        status = f"failed: {e}"
        raise
    finally:
        writer.close()
        done = _result(task, out, status, progress, gave)
        if metrics:
            # Where the disk is full, this fails as well; then the first error is the one to show.
            with suppress(OSError, OutputError) if status.startswith("failed") else nullcontext():
                metrics.close()
                result = {k: v for k, v in asdict(done).items() if k in task.results}
                write_config(out, {**config, "result": {**result, "run": out.name}})
    if status == "interrupted":
        raise Interrupted(_interrupted(out, progress.step, saved=True))
    return done


def _result(task: Task, out: Path, status: str, progress: Progress, gave: dict[str, Any]) -> RunResult:
    images, best = progress.step * task.settings.batch_size, progress.best or {}
    learns_classes = "val_accuracy" in task.results
    return RunResult(
        run=out,
        status=status,
        steps=progress.step,
        images_seen=images,
        tokens_seen=images * task.n_ctx,
        train_loss=progress.train_loss,
        val_loss=best.get("val_loss") if learns_classes else progress.val_loss,
        best=progress.best,
        seconds=round(progress.seconds, 3),
        val_accuracy=best.get("val_accuracy"),
        **gave,
    )


def _interrupted(out: Path, step: int, saved: bool) -> str:
    if saved:
        return f"interrupted after step {step:,}, which is saved; resume with: {command_of(out)} --resume {out}"
    return f"interrupted at step {step:,} without saving it; earlier checkpoints are in {out / CHECKPOINTS}"


def make_run(out: Path, force: bool, tokens: TokenFile, config: dict[str, Any]) -> None:
    """The run's folder with palette and config.json; with `force`, a run that is there gives way, but nothing else."""
    if out.exists() and not force and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(_exists(out))
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG).exists())):
        raise OutputError(f"{out} is not a run (it has no {CONFIG}), so --force does not overwrite it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not force:
            open(out / CONFIG, "x").close()  # one process alone makes it
        for name in (WEIGHTS, METRICS):
            (out / name).unlink(missing_ok=True)
        if (out / CHECKPOINTS).is_dir():
            shutil.rmtree(out / CHECKPOINTS)
    except FileExistsError as e:
        raise OutputError(_exists(out)) from e
    except OSError as e:
        raise OutputError(f"cannot make the folder {out}: {reason(e)}") from e
    tokens.palette.save(out / PALETTE, force=True)
    if place := _from_run(out, config["data"]["path"]):
        config["data"]["from_run"] = place
    write_config(out, config)


def _from_run(out: Path, data: str) -> str | None:
    """The way from a run's folder to its data; None where it leads through the root and would describe the machine."""
    place = Path(data).absolute()
    place = place.parent.resolve() / place.name
    shared = [folder for folder in out.resolve().parents if folder.name and folder in place.parents]
    return Path(os.path.relpath(place, out.resolve())).as_posix() if shared and place.exists() else None


def _exists(out: Path) -> str:
    way = f"resume it with --resume {out}, " if (out / CONFIG).exists() else ""
    return f"{out} exists already; {way}choose another --out, or overwrite it with --force"


def unmake_run(out: Path) -> None:
    """Remove a run that failed before its first step; whatever else lies in the folder stays."""
    for name in (WEIGHTS, METRICS, CONFIG, PALETTE):
        (out / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    with suppress(OSError):
        out.rmdir()


def data_of(tokens: TokenFile, path: str | None) -> dict[str, Any]:
    """The part "data" of a run's config.json; `path` where the token file is a temporary one."""
    return {
        "path": path or tokens.title,
        "source": tokens.attrs.get("source", ""),
        **tokens.selection,
        "tokens_sha256": tokens.split("train").sha256,
        "palette_sha256": tokens.palette.sha256,
    }


def differing_data(config: dict[str, Any], tokens: TokenFile) -> list[str]:
    """What differs between the tokens that a run started with and these: each with both values."""
    data, model = config["data"], config["model"]
    now = {
        "the resolution": (model["resolution"], tokens.resolution),
        "the number of colours": (model.get("n_vocab", tokens.n_vocab), tokens.n_vocab),
        "the palette": (data["palette_sha256"][:12], tokens.palette.sha256[:12]),
        "the split 'train'": (data["tokens_sha256"][:12], tokens.split("train").sha256[:12]),
    }
    return [f"{k} was {was} and is now {new} ({tokens.path})" for k, (was, new) in now.items() if was != new]
