"""Pretraining: tokens in, a run out (section 3)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from igpt_cli.device import choose_device
from igpt_cli.errors import IgptError, Interrupted, MismatchError, OutputError
from igpt_cli.files import reason
from igpt_cli.model_dir import CONFIG, METRICS, PALETTE, WEIGHTS, MetricsWriter, new_config, read_config, write_config
from igpt_cli.models.cost import flops_per_token
from igpt_cli.models.gpus import peak_flops
from igpt_cli.models.registry import build_model, count_parameters, model_config
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.checkpoint import CheckpointWriter, last_checkpoint, load_checkpoint
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.loop import Job, Progress, Record, train
from igpt_cli.training.optim import make_optimizers
from igpt_cli.training.recipe import (
    Execution,
    Recipe,
    check_execution,
    differing,
    for_config,
    recipe_of,
    with_an_end,
)
from igpt_cli.training.setup import Setup, resolve
from igpt_cli.workspace import CHECKPOINTS, resolve_run

ALONE = Ranks()


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave: losses in nats per token, `seconds` in all, `status` "done" or why it ended early."""

    run: Path
    status: str
    steps: int
    tokens_seen: int
    train_loss: float | None
    val_loss: float | None
    best: dict[str, float] | None
    seconds: float


def pretrain(
    tokens: TokenFile,
    out: Path | str,
    recipe: Recipe | None = None,
    execution: Execution | None = None,
    *,
    device: str = "auto",
    ranks: Ranks = ALONE,
    force: bool = False,
    command: str | None = None,
    data_path: str | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> PretrainResult:
    """Pretrain a model on a token file's split "train" and write the run `out`.

    Args:
        tokens: an open token file; its resolution and palette become the model's.
        out: the run's folder; made, and refused if it is there already, unless `force`.
        recipe: what is learned; what is None comes from the preset.
        execution: how the machine does it.
        device: see `device.choose_device`.
        ranks: this process's place among those of torchrun, from `distributed.joined`; each calls this function.
        command: what to record as the command that made the run.
        data_path: what to record as the data, where `tokens` is a temporary file made of it.
        on_start: called once with the resolved settings (the run's config.json).
        on_record: called with each record of metrics.jsonl, to which `fraction` (of the run, 0..1) is added.
        on_event: called with a sentence now and then, such as that the validation loss rose.

    Raises:
        InputError, MismatchError, OutputError: before any training.
        OutputError: a checkpoint could not be written; those before it are as they were.
        NonFiniteError: the gradient became NaN or infinite; the last good weights are in `out`.
        Interrupted: SIGINT, SIGTERM or SIGUSR1; a checkpoint of the last step is in `out`.
    """
    started, out, chosen = time.monotonic(), Path(out), choose_device(device)
    recipe, execution = recipe or Recipe(), execution or Execution()
    check_execution(execution)
    recipe, data = resolve(tokens, with_an_end(recipe, execution, chosen), chosen)
    description = model_config(
        recipe.model,
        resolution=tokens.resolution,
        n_vocab=tokens.n_vocab,
        objective=recipe.objective,
        **recipe.sizes,
    )
    config = new_config(
        description,
        training={**for_config(recipe), "n_parameters": _count(description)},
        execution=asdict(execution),
        data={
            "path": data_path or str(tokens.path),
            "source": tokens.attrs.get("source", ""),
            "tokens_sha256": tokens.split("train").sha256,
            "palette_sha256": tokens.palette.sha256,
            "n_train": len(data.rows),
            "n_val": len(data.val),
            "tokens_per_step": recipe.batch_size * tokens.resolution**2,
        },
        result={"status": "running"},
    )
    if command:
        config["command"] = command
    setup = Setup(tokens, data, recipe, execution, description, chosen, ranks)
    ranks.from_first(lambda: _make_run(out, force, tokens, {**config, "machine": setup.machine}))
    config["machine"] = setup.machine
    return _run(setup, out, config, None, started, on_start, on_record, on_event)


def resume(
    tokens: TokenFile,
    run: Path | str,
    given: dict[str, Any] | None = None,
    *,
    device: str = "auto",
    ranks: Ranks = ALONE,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> PretrainResult:
    """Go on with a run from its last checkpoint, as if it had never stopped.

    Args:
        tokens: the token file that the run was begun with.
        run: the run's folder, or "latest".
        given: settings asked for now, by name. Those of `Execution` take effect; those of `Recipe` must be what
            they were.

    The other arguments, and what is raised, as for `pretrain`.

    Raises:
        MismatchError: the tokens, the palette or a setting of the recipe differ from the run's; all are named.
    """
    started, run, chosen, given = time.monotonic(), resolve_run(run), choose_device(device), given or {}
    config = ranks.from_first(lambda: read_config(run))
    folder = ranks.from_first(lambda: last_checkpoint(run))
    recipe, execution = recipe_of(config, run / CONFIG)
    changed = {k: v for k, v in given.items() if hasattr(execution, k)}
    differ = differing(recipe, {k: v for k, v in given.items() if k not in changed})
    differ += _differing_data(config, tokens)
    if differ:
        raise MismatchError(
            f"{run} goes on as it was begun, but {'; '.join(differ)}; resume it with the settings and the token file "
            f"that it had ({config['data']['path']}), or start a new run with --config {run / CONFIG}"
        )
    if "micro_batch" in changed or "accumulate" in changed:
        execution = replace(execution, micro_batch=None, accumulate=None)
    execution = replace(execution, **{"time_limit": None, **changed})
    check_execution(execution)
    recipe, data = resolve(tokens, replace(recipe, val_images=config["data"]["n_val"]), chosen)
    setup = Setup(tokens, data, recipe, execution, config["model"], chosen, ranks)
    config = {**config, "execution": asdict(execution), "machine": setup.machine, "result": {"status": "running"}}
    return _run(setup, run, config, folder, started, on_start, on_record, on_event)


def _run(setup: Setup, out: Path, config, folder: Path | None, started: float, on_start, on_record, on_event):
    """Train from the start, or from the checkpoint `folder`; whatever ends it, `out` says why."""
    recipe, ranks, device = setup.recipe, setup.ranks, setup.device
    objective, shared = setup.build()
    config["machine"] = setup.machine
    optimizers = make_optimizers(
        objective.model, recipe.optimizer, recipe.learning_rate, recipe.betas, recipe.weight_decay
    )
    progress = Progress()
    if folder:
        progress = Progress(**load_checkpoint(folder, objective.model, optimizers, ranks)["progress"])
    if on_start:
        on_start({**config, "progress": asdict(progress)})
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    metrics = MetricsWriter(out, after=progress.step if folder else None) if ranks.first else None
    checkpoints = CheckpointWriter(out, ranks, setup.execution.keep)
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
        flops_per_step=recipe.batch_size * setup.n_ctx * flops_per_token(setup.description),
        peak_flops=peak and peak * ranks.world_size,
        ranks=ranks,
        metrics=metrics,
        checkpoints=checkpoints,
        config=config,
        on_record=on_record or (lambda record: None),
        on_event=on_event or (lambda text: None),
        started=started,
    )
    status = "failed"
    try:
        status = train(job, progress)
    except KeyboardInterrupt:
        status = "interrupted"
        raise Interrupted(_interrupted(out, progress.step, saved=False)) from None
    except IgptError as e:
        status = f"failed: {e}"
        raise
    finally:
        checkpoints.close()
        result = PretrainResult(
            run=out,
            status=status,
            steps=progress.step,
            tokens_seen=progress.step * recipe.batch_size * setup.n_ctx,
            train_loss=progress.train_loss,
            val_loss=progress.val_loss,
            best=progress.best,
            seconds=round(progress.seconds, 3),
        )
        if metrics:
            # Where the disk is full, this fails as well; then the first error is the one to show.
            with suppress(OSError, OutputError) if status.startswith("failed") else nullcontext():
                metrics.close()
                write_config(out, {**config, "result": {**asdict(result), "run": out.name}})
    if status == "interrupted":
        raise Interrupted(_interrupted(out, progress.step, saved=True))
    return result


def _interrupted(out: Path, step: int, saved: bool) -> str:
    if saved:
        return f"interrupted after step {step:,}, which is saved; go on with: igpt pretrain --resume {out}"
    return f"interrupted at step {step:,} without saving it; earlier checkpoints are in {out / CHECKPOINTS}"


def _count(description: dict[str, Any]) -> int:
    with torch.device("meta"):
        return count_parameters(build_model(description))


def _differing_data(config: dict[str, Any], tokens: TokenFile) -> list[str]:
    """What differs between the tokens that a run was begun with and these: each with both values."""
    data, model = config["data"], config["model"]
    now = {
        "the resolution": (model["resolution"], tokens.resolution),
        "the number of colours": (model["n_vocab"], tokens.n_vocab),
        "the palette": (data["palette_sha256"][:12], tokens.palette.sha256[:12]),
        "the split 'train'": (data["tokens_sha256"][:12], tokens.split("train").sha256[:12]),
    }
    return [f"{k} was {was} and is now {new} ({tokens.path})" for k, (was, new) in now.items() if was != new]


def _make_run(out: Path, force: bool, tokens: TokenFile, config: dict[str, Any]) -> None:
    """The run's folder with palette and config.json; with `force`, a run that is there gives way, but nothing else."""
    if out.exists() and not force:
        way = f"go on with --resume {out}, " if (out / CONFIG).exists() else ""
        raise OutputError(f"{out} exists already; {way}choose another --out, or overwrite it with --force")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG).exists())):
        raise OutputError(f"{out} is not a run (it has no {CONFIG}), so --force does not overwrite it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, METRICS, CONFIG):
            (out / name).unlink(missing_ok=True)
        if (out / CHECKPOINTS).is_dir():
            shutil.rmtree(out / CHECKPOINTS)
    except OSError as e:
        raise OutputError(f"cannot make the folder {out}: {reason(e)}") from e
    tokens.palette.save(out / PALETTE, force=True)
    write_config(out, config)
