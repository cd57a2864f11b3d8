"""A run from its first step to its last, and what it leaves on disk however it ends, in pretraining and fine-tuning."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from igpt_cli.errors import IgptError, Interrupted, OutputError
from igpt_cli.files import reason, sha256_of
from igpt_cli.model_dir import CONFIG, METRICS, PALETTE, WEIGHTS, MetricsWriter, write_config
from igpt_cli.planning.gpus import peak_flops
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.checkpoint import CheckpointWriter, checkpoints, command_of, load_checkpoint
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.loop import Job, Progress, Record, train
from igpt_cli.training.recipe import Execution, check_execution
from igpt_cli.training.setup import Setup
from igpt_cli.workspace import CHECKPOINTS

ALONE = Ranks()


@dataclass(frozen=True)
class Told:
    """Whom a run tells what.

    on_start: called once with the resolved settings (the run's config.json).
    on_record: called with each record of metrics.jsonl, to which `fraction` (of the run, 0..1) is added.
    on_event: called with a sentence now and then.
    started: when the command began, on the clock of `time.monotonic`.
    """

    on_start: Callable[[dict[str, Any]], None] | None = None
    on_record: Callable[[Record], None] | None = None
    on_event: Callable[[str], None] | None = None
    started: float = field(default_factory=monotonic)


def carry_out(
    setup: Setup,
    out: Path,
    config: dict[str, Any],
    folder: Path | None,
    told: Told,
    result: Callable[[str, Progress, dict[str, Any]], Any],
) -> Any:
    """Train from the start, or from the checkpoint `folder`; whatever ends it, `out` says why.

    Args:
        config: the run's config.json so far.
        result: from the status, the progress and what `setup.finish` gave, the dataclass that is returned and stands,
            but for `run`, under "result" in config.json.

    Raises:
        OutputError, NonFiniteError: see `loop.train`.
        Interrupted: a stop signal; a checkpoint of the last step is in `out`.
    """
    progress = Progress()
    try:
        return _carry_out(setup, out, config, folder, told, result, progress)
    except BaseException:
        if setup.ranks.first and folder is None and progress.step == 0 and not checkpoints(out):
            unmake_run(out)
        raise


def _carry_out(setup, out, config, folder, told, result, progress) -> Any:
    recipe, ranks, device = setup.recipe, setup.ranks, setup.device
    objective, shared = setup.build()
    config["machine"] = setup.machine
    optimizers, average = setup.optimizers(objective.model), setup.average(objective.model)
    if folder:
        was = load_checkpoint(folder, objective.model, optimizers, ranks, average)["progress"]
        progress = Progress(**{f.name: was[f.name] for f in fields(Progress) if was.get(f.name) is not None})
    if told.on_start:
        told.on_start({**config, "progress": asdict(progress)})
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    metrics = MetricsWriter(out, after=progress.step if folder else None) if ranks.first else None
    writer = CheckpointWriter(out, ranks, setup.execution.keep)
    job = Job(
        objective=shared,
        model=objective.model,
        optimizers=optimizers,
        batch=setup.batch,
        validate=lambda give_up: setup.validate(shared, give_up),
        recipe=recipe,
        execution=setup.execution,
        precision=setup.precision,
        device=device,
        micro_batch=setup.fit.micro_batch,
        eval_every=setup.eval_every,
        images_per_epoch=len(setup.loader),
        tokens_per_image=setup.n_ctx,
        flops_per_step=recipe.batch_size * setup.flops_per_image(),
        peak_flops=peak and peak * ranks.world_size,
        ranks=ranks,
        metrics=metrics,
        checkpoints=writer,
        config=config,
        told=setup.told,
        score=setup.score,
        patience=setup.patience,
        average=average,
        on_record=told.on_record or (lambda record: None),
        on_event=told.on_event or (lambda text: None),
        started=told.started,
    )
    status, found = "failed", {}
    try:
        status = train(job, progress)
        if status in ("done", "early stop"):
            found = setup.finish(objective, shared, out)
    except KeyboardInterrupt:
        saved, status = status != "failed", "interrupted"
        raise Interrupted(_interrupted(out, progress.step, saved)) from None
    except IgptError as e:
        status = f"failed: {e}"
        raise
    finally:
        writer.close()
        done = result(status, progress, found)
        if metrics:
            # Where the disk is full, this fails as well; then the first error is the one to show.
            with suppress(OSError, OutputError) if status.startswith("failed") else nullcontext():
                metrics.close()
                write_config(out, {**config, "result": {**asdict(done), "run": out.name}})
    if status == "interrupted":
        raise Interrupted(_interrupted(out, progress.step, saved=True))
    return done


def _interrupted(out: Path, step: int, saved: bool) -> str:
    if saved:
        return f"interrupted after step {step:,}, which is saved; go on with: {command_of(out)} --resume {out}"
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
    way = f"go on with --resume {out}, " if (out / CONFIG).exists() else ""
    return f"{out} exists already; {way}choose another --out, or overwrite it with --force"


def unmake_run(out: Path) -> None:
    """Remove a run that failed before its first step; whatever else lies in the folder stays."""
    for name in (WEIGHTS, METRICS, CONFIG, PALETTE):
        (out / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    with suppress(OSError):
        out.rmdir()


def data_of(tokens: TokenFile, path: str | None, **more: Any) -> dict[str, Any]:
    """The part "data" of a run's config.json; `path` where the token file is a temporary one."""
    return {
        "path": path or tokens.title,
        "source": tokens.attrs.get("source", ""),
        **tokens.selection,
        "tokens_sha256": tokens.split("train").sha256,
        "palette_sha256": tokens.palette.sha256,
        **more,
    }


def labels_sha256(tokens: TokenFile) -> str:
    """Of all labels, by split."""
    parts = ((name.encode(), split.labels.astype("<i4").tobytes()) for name, split in tokens.splits.items())
    return sha256_of(*(chunk for part in parts for chunk in part))


def file_sha256(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return sha256_of(*iter(lambda: file.read(2**20), b""))


def differing_data(config: dict[str, Any], tokens: TokenFile) -> list[str]:
    """What differs between the tokens that a run was begun with and these: each with both values."""
    data, model = config["data"], config["model"]
    now = {
        "the resolution": (model["resolution"], tokens.resolution),
        "the number of colours": (model.get("n_vocab", tokens.n_vocab), tokens.n_vocab),
        "the palette": (data["palette_sha256"][:12], tokens.palette.sha256[:12]),
        "the split 'train'": (data["tokens_sha256"][:12], tokens.split("train").sha256[:12]),
    }
    return [f"{k} was {was} and is now {new} ({tokens.path})" for k, (was, new) in now.items() if was != new]


def resumed_execution(execution: Execution, changed: dict[str, Any]) -> Execution:
    """How a run goes on: as it was begun, but for what is asked for now; a time limit is each process's own."""
    if "micro_batch" in changed or "accumulate" in changed:
        execution = replace(execution, micro_batch=None, accumulate=None)
    execution = replace(execution, **{"time_limit": None, **changed})
    check_execution(execution)
    return execution
