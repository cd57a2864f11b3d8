"""Fine-tuning: a pretrained model and labelled images in, a model with a class head out (section 2.3)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from igpt_cli.device import choose_device
from igpt_cli.errors import InputError, Interrupted, MismatchError, NonFiniteError
from igpt_cli.model_dir import CONFIG, WEIGHTS, ModelDir, check_fit, new_config, read_config
from igpt_cli.model_input import takes_rgb
from igpt_cli.planning.cost import parameters
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.checkpoint import FINETUNED_FROM, command_of, is_supervised, last_checkpoint
from igpt_cli.training.classify import Classifying, best_accuracy
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.loop import Progress, Record
from igpt_cli.training.recipe import (
    Execution,
    check_execution,
    differing,
    for_config,
    settings_of,
    training_in,
    with_an_end,
)
from igpt_cli.training.run import (
    ALONE,
    Told,
    carry_out,
    data_of,
    differing_data,
    file_sha256,
    labels_sha256,
    make_run,
    resumed_execution,
)
from igpt_cli.training.tuning import LabelledData, Tuning, check_tuning, default_part, labelled, resolve_tuning
from igpt_cli.workspace import resolve_run

#: The part of a run for which each learning rate of a search is tried.
SEARCH_PART = 0.1
SEARCH = "search"


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning gave. Accuracies in percent, losses in nats.

    status: "done", "early stop", or why it ended before its end. val_loss and val_accuracy are those of the best
    checkpoint, which `best` has with its step, and whose weights the run has. accuracy and its 95% Wilson interval are
    of the n_test test images, classified once, when training had ended of itself; None before that, and without a
    labelled split "test".
    """

    run: Path
    status: str
    steps: int
    tokens_seen: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    accuracy: float | None
    interval: tuple[float, float] | None
    n_test: int | None
    best: dict[str, float] | None
    seconds: float


def finetune(
    run: ModelDir,
    tokens: TokenFile,
    out: Path | str,
    tuning: Tuning | None = None,
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
) -> FinetuneResult:
    """Fine-tune a model on the labelled images of a token file, and write the run `out`.

    A linear head without bias, zeros at first, reads the mean over positions of the final norm's output; the loss is
    gen_weight * L_GEN + clf_weight * L_CLF. The weights of the best validation accuracy are the run's, and are tested.

    Args:
        run: the pretrained model; it is not changed. A class head that it has already is replaced.
        tokens: an open token file with the model's palette and resolution, and labels.
        out: the run's folder; made, and refused if it is there already, unless `force`.
        tuning: what is learned.

    For the other arguments see `pretrain.pretrain`.

    Raises:
        InputError, MismatchError, OutputError: before any training.
        OutputError, NonFiniteError, Interrupted: as `pretrain.pretrain`.
    """
    told, out, chosen = Told(on_start, on_record, on_event), Path(out), choose_device(device)
    tuning, execution = tuning or Tuning(), execution or Execution()
    check_execution(execution)
    check_pretrained(run)
    check_fit(run, tokens)
    tuning, data = _resolved(run, tokens, with_an_end(tuning, execution, chosen), chosen, ranks)
    backbone = {k: v for k, v in run.config["model"].items() if k not in ("n_classes", "head_layer")}
    description = {**backbone, "n_classes": len(tokens.classes), "head_layer": tuning.head_layer}
    weights = None
    if not tuning.from_scratch:
        weights = {k: v.cpu() for k, v in run.model.state_dict().items() if not k.startswith("wclf.")}
    config = new_config(
        description,
        training={**for_config(tuning), "n_parameters": parameters(description)},
        execution=asdict(execution),
        data=data_of(
            tokens,
            data_path,
            labels_sha256=labels_sha256(tokens),
            classes=tokens.classes,
            n_train=len(data.rows),
            n_val=len(data.val.rows),
            n_test=len(data.test.rows) if data.test else 0,
            left_out=data.left_out,
            tokens_per_step=tuning.batch_size * tokens.resolution**2,
        ),
        result={"status": "running"},
    )
    config[FINETUNED_FROM] = {"path": run.run, "sha256": file_sha256(run.path / WEIGHTS)}
    if command:
        config["command"] = command
    made = partial(Classifying, tokens, data, description=description, device=chosen, ranks=ranks, weights=weights)
    setup = made(recipe=tuning, execution=execution)
    ranks.from_first(lambda: make_run(out, force, tokens, {**config, "machine": setup.machine}))
    if tuning.lr_search:
        tuning, config[SEARCH] = _search(made, tuning, execution, out, config, told)
        config["training"]["learning_rate"] = tuning.learning_rate
        setup = made(recipe=tuning, execution=execution)
    return carry_out(setup, out, config, None, told, partial(_result, out, setup))


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
) -> FinetuneResult:
    """Go on with fine-tuning from its last checkpoint, as if it had never stopped; the pretrained model is not needed.

    Arguments and errors as for `pretrain.resume`.
    """
    told, run, chosen, given = Told(on_start, on_record, on_event), resolve_run(run), choose_device(device), given or {}
    config = ranks.from_first(lambda: read_config(run))
    if FINETUNED_FROM not in config or is_supervised(config):
        raise InputError(f"{run} is not being fine-tuned; go on with: {command_of(run)} --resume {run}")
    folder = ranks.from_first(lambda: last_checkpoint(run))
    tuning = settings_of(Tuning, training_in(config, run / CONFIG), run / CONFIG)
    check_tuning(tuning, config["model"]["n_layer"])
    execution = settings_of(Execution, config.get("execution") or {}, run / CONFIG)
    changed = {k: v for k, v in given.items() if hasattr(execution, k)}
    differ = differing(tuning, {k: v for k, v in given.items() if k not in changed})
    differ += differing_data(config, tokens)
    if config["data"]["labels_sha256"] != labels_sha256(tokens):
        differ.append(f"the labels are others now ({tokens.path})")
    if differ:
        raise MismatchError(
            f"{run} goes on as it was begun, but {'; '.join(differ)}; resume it with the settings and the token file "
            f"that it had ({config['data']['path']}), or start a new run"
        )
    execution = resumed_execution(execution, changed)
    n = config["data"]
    data = labelled(tokens, replace(tuning, val_images=n["n_val"], test_images=n["n_test"] or None))
    setup = Classifying(tokens, data, tuning, execution, config["model"], chosen, ranks)
    config = {**config, "execution": asdict(execution), "machine": setup.machine, "result": {"status": "running"}}
    return carry_out(setup, run, config, folder, told, partial(_result, run, setup))


def check_pretrained(run: ModelDir) -> None:
    """
    Raises:
        InputError: a model of RGB images, which `igpt train` fine-tunes.
    """
    if takes_rgb(run):
        raise InputError(
            f"{run.run} is {run.name}, a model of RGB images, which has no loss on pixels; fine-tune it with: "
            f"igpt train {run.run}"
        )


def _resolved(run: ModelDir, tokens: TokenFile, tuning: Tuning, device, ranks: Ranks) -> tuple[Tuning, LabelledData]:
    """The whole tuning, and its images; how many are looked at depends on the device, too."""
    check_tuning(tuning, run.config["model"]["n_layer"])
    data = labelled(tokens, tuning)
    tuning = resolve_tuning(tuning, run.config, len(data.rows), device, ranks.world_size)
    if data.val.split.name == "train" and tuning.val_part is None:
        tuning = replace(tuning, val_part=default_part(data.labels))
    return tuning, labelled(tokens, tuning)


def _search(
    made: Callable[..., Classifying],
    tuning: Tuning,
    execution: Execution,
    out: Path,
    config: dict[str, Any],
    told: Told,
) -> tuple[Tuning, list[dict[str, Any]]]:
    """The tuning with the learning rate of the best held-out accuracy after a tenth of the run, and what each gave.

    The test images are not looked at, and the short runs leave nothing on disk.
    """
    if told.on_event:
        rates = ", ".join(f"{rate:g}" for rate in tuning.lr_search or ())
        told.on_event(f"trying the learning rates {rates}, each for a tenth of the run")
    rows = [_tried(rate, made, tuning, execution, out, config, told) for rate in tuning.lr_search or ()]
    good = [row for row in rows if row["val_accuracy"] is not None]
    if not good:
        raise NonFiniteError(f"every learning rate tried is too large: {', '.join(f'{r:g}' for r in tuning.lr_search)}")
    best = max(good, key=best_accuracy)["learning_rate"]
    if told.on_event:
        told.on_event(f"learning rate {best:g} is taken")
    return replace(tuning, learning_rate=best), rows


def _tried(
    rate: float,
    made: Callable[..., Classifying],
    tuning: Tuning,
    execution: Execution,
    out: Path,
    config: dict[str, Any],
    told: Told,
) -> dict[str, Any]:
    """What a learning rate gives in a short run, validated at its end: steps, val_accuracy, val_clf_loss."""
    say, folder = told.on_event or (lambda text: None), out / SEARCH
    steps = tuning.steps and max(1, round(SEARCH_PART * tuning.steps))
    short = replace(
        tuning,
        learning_rate=rate,
        steps=steps,
        budget=tuning.budget and SEARCH_PART * tuning.budget,
        warmup_steps=min(tuning.warmup_steps, max(1, steps // 10)) if steps else tuning.warmup_steps,
        patience=0,
    )
    quiet = replace(execution, eval_every=10**9, save_every=10**9, keep=1, time_limit=None)
    setup = made(recipe=short, execution=quiet, tests=False)
    config = {**config, "training": {**config["training"], **for_config(short)}, "machine": setup.machine}
    row: dict[str, Any] = {"learning_rate": rate, "steps": None, "val_accuracy": None, "val_clf_loss": None}
    setup.ranks.from_first(lambda: make_run(folder, True, setup.tokens, config))
    try:
        done = carry_out(setup, folder, config, None, Told(), partial(_result, folder, setup))
        row |= {"steps": done.steps, **{k: done.best[k] for k in ("val_accuracy", "val_clf_loss")}}
        say(f"learning rate {rate:g}: held-out accuracy {row['val_accuracy']:.2f}% after {done.steps:,} steps")
    except NonFiniteError:
        say(f"learning rate {rate:g} is too large: the gradient became infinite")
    except Interrupted:
        raise Interrupted(
            f"interrupted while learning rates were tried, of which {out} keeps nothing; begin again, with --force"
        ) from None
    finally:
        setup.ranks.from_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    return row


def _result(run: Path, setup: Classifying, status: str, progress: Progress, found: dict[str, Any]) -> FinetuneResult:
    best = progress.best or {}
    return FinetuneResult(
        run=run,
        status=status,
        steps=progress.step,
        tokens_seen=progress.step * setup.recipe.batch_size * setup.n_ctx,
        train_loss=progress.train_loss,
        val_loss=best.get("val_loss"),
        val_accuracy=best.get("val_accuracy"),
        accuracy=found.get("accuracy"),
        interval=found.get("interval"),
        n_test=found.get("n_test"),
        best=progress.best,
        seconds=round(progress.seconds, 3),
    )
