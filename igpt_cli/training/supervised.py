"""Supervised training: a model by name and labelled images in, a model with a class head out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from igpt_cli.device import choose_device
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.model_dir import CONFIG, WEIGHTS, ModelDir, load_model, new_config, read_config
from igpt_cli.models.registry import build_model, count_parameters
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.begin import DROP_PATH, few_patches, with_fresh_weights, with_trained_weights
from igpt_cli.training.checkpoint import FINETUNED_FROM, command_of, is_supervised, last_checkpoint
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
from igpt_cli.training.rgb import Supervised
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
from igpt_cli.training.supervision import Supervision, check_supervision, find_recipe, resolve_supervision
from igpt_cli.training.teacher import Teacher, check_teacher
from igpt_cli.training.tuning import LabelledData, default_part, labelled
from igpt_cli.workspace import resolve_run

TEACHER = "teacher"


@dataclass(frozen=True)
class TrainResult:
    """What supervised training gave. Accuracies in percent, losses in nats.

    status: "done", "early stop", or why it ended before its end. val_loss and val_accuracy are those of the best
    checkpoint, whose weights the run has. accuracy and its 95% Wilson interval are of the n_test test images,
    classified once, when training had ended of itself; None before that, and without a labelled split "test".
    accuracy_class and accuracy_distillation are those of each head alone, for a model that has two.
    """

    run: Path
    status: str
    steps: int
    images_seen: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    accuracy: float | None
    interval: tuple[float, float] | None
    accuracy_class: float | None
    accuracy_distillation: float | None
    n_test: int | None
    best: dict[str, float] | None
    seconds: float


def train(
    model: str | ModelDir,
    tokens: TokenFile,
    out: Path | str,
    supervision: Supervision | None = None,
    execution: Execution | None = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    teacher: ModelDir | None = None,
    device: str = "auto",
    ranks: Ranks = ALONE,
    force: bool = False,
    command: str | None = None,
    data_path: str | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a model of RGB images to classify the labelled images of a token file, and write the run `out`.

    The images are those that the file kept (`tokenize --keep-rgb`), or the colours of its tokens. The weights of the
    best validation accuracy are the run's, and are tested.

    Args:
        model: a preset's name, which is built for the images' resolution; or a trained model of RGB images, whose
            weights it begins with, and whose normalisation of colours it keeps. A class head that does not tell just
            these classes apart, in this order, makes room for a fresh one.
        tokens: an open token file with labels.
        out: the run's folder; made, and refused if it is there already, unless `force`.
        supervision: what is learned.
        sizes: put over those of a preset, such as {"shift": False} for a Swin.
        teacher: a trained model with the same classes, for `supervision.distill`; an RGB model or a fine-tuned iGPT.

    For the other arguments see `pretrain.pretrain`.

    Raises:
        InputError, MismatchError, OutputError: before any training.
        OutputError, NonFiniteError, Interrupted: as `pretrain.pretrain`.
    """
    told, out, chosen = Told(on_start, on_record, on_event), Path(out), choose_device(device)
    asked, execution = supervision or Supervision(), execution or Execution()
    check_execution(execution)
    find_recipe(asked.recipe)
    check_supervision(asked)
    if (asked.distill == "none") != (teacher is None):
        raise InputError(
            f"distill is {asked.distill!r} and "
            + ("there is no teacher; name one" if teacher is None else "there is a teacher; say soft or hard")
        )
    if teacher is not None:
        check_teacher(teacher, tokens.resolution, tokens.classes)
    begun = (
        with_trained_weights(model, tokens, sizes, bool(teacher))
        if isinstance(model, ModelDir)
        else with_fresh_weights(model, tokens, sizes, asked)
    )
    description, trained = begun.description, begun.weights is not None
    if (few := few_patches(description)) and on_event:
        on_event(few)
    asked, data = _resolved(tokens, with_an_end(asked, execution, chosen), description, chosen, ranks, trained)
    if asked.drop_path is not None:
        description[DROP_PATH] = asked.drop_path
    config = new_config(
        description,
        training={**_for_config(asked), "n_parameters": _count(description)},
        execution=asdict(execution),
        data=data_of(
            tokens,
            data_path,
            labels_sha256=labels_sha256(tokens),
            classes=tokens.classes,
            images="tokens" if tokens.split("train").rgb is None else "rgb",
            n_train=len(data.rows),
            n_val=len(data.val.rows),
            n_test=len(data.test.rows) if data.test else 0,
            left_out=data.left_out,
            tokens_per_step=asked.batch_size * tokens.resolution**2,
        ),
        preparation=begun.preparation,
        result={"status": "running"},
    )
    if begun.origin:
        config[FINETUNED_FROM] = begun.origin
    if teacher is not None:
        config[TEACHER] = {
            "path": teacher.run,
            "name": teacher.name,
            "sha256": file_sha256(teacher.path / WEIGHTS),
        }
    if command:
        config["command"] = command
    asks = Teacher(_on(teacher, chosen)) if teacher is not None else None
    setup = Supervised(
        tokens, data, asked, execution, description, chosen, ranks, begun.weights, asks, begun.preparation
    )
    ranks.from_first(lambda: make_run(out, force, tokens, {**config, "machine": setup.machine}))
    return carry_out(setup, out, config, None, told, partial(_result, out, setup))


def resume(
    tokens: TokenFile,
    run: Path | str,
    given: dict[str, Any] | None = None,
    *,
    teacher: ModelDir | None = None,
    device: str = "auto",
    ranks: Ranks = ALONE,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> TrainResult:
    """Go on with a run from its last checkpoint, as if it had never stopped; a model it began with is not needed.

    Args:
        teacher: the run's own, if it has moved; default the one that config.json names.

    The other arguments and errors as for `pretrain.resume`.
    """
    told, run, chosen, given = Told(on_start, on_record, on_event), resolve_run(run), choose_device(device), given or {}
    config = ranks.from_first(lambda: read_config(run))
    if not is_supervised(config):
        raise InputError(f"{run} is not a run of igpt train; go on with: {command_of(run)} --resume {run}")
    folder = ranks.from_first(lambda: last_checkpoint(run))
    supervision = settings_of(Supervision, training_in(config, run / CONFIG), run / CONFIG)
    check_supervision(supervision)
    execution = settings_of(Execution, config.get("execution") or {}, run / CONFIG)
    changed = {k: v for k, v in given.items() if hasattr(execution, k)}
    differ = differing(supervision, {k: v for k, v in given.items() if k not in changed})
    differ += differing_data(config, tokens)
    if config["data"]["labels_sha256"] != labels_sha256(tokens):
        differ.append(f"the labels are others now ({tokens.path})")
    if config["data"]["images"] != ("tokens" if tokens.split("train").rgb is None else "rgb"):
        differ.append(f"the images were {config['data']['images']} and are now others ({tokens.path})")
    if TEACHER in config:
        teacher = teacher or load_model(config[TEACHER]["path"])
        if file_sha256(teacher.path / WEIGHTS) != config[TEACHER]["sha256"]:
            differ.append(f"the teacher's weights are others now ({teacher.run})")
    if differ:
        raise MismatchError(
            f"{run} goes on as it was begun, but {'; '.join(differ)}; resume it with the settings and the token file "
            f"that it had ({config['data']['path']}), or start a new run"
        )
    execution = resumed_execution(execution, changed)
    n = config["data"]
    data = labelled(tokens, replace(supervision, val_images=n["n_val"], test_images=n["n_test"] or None))
    asks = Teacher(_on(teacher, chosen)) if TEACHER in config and teacher else None
    setup = Supervised(
        tokens, data, supervision, execution, config["model"], chosen, ranks, None, asks, config.get("preparation")
    )
    config = {**config, "execution": asdict(execution), "result": {"status": "running"}}
    return carry_out(setup, run, config, folder, told, partial(_result, run, setup))


def _resolved(
    tokens: TokenFile,
    asked: Supervision,
    description: dict[str, Any],
    device: torch.device,
    ranks: Ranks,
    trained: bool,
) -> tuple[Supervision, LabelledData]:
    """The whole supervision, and its images; how many are looked at depends on the device, too."""
    data = labelled(tokens, asked)
    asked = resolve_supervision(
        asked, len(data.rows), tokens.resolution, description.get(DROP_PATH), device, ranks.world_size, trained
    )
    if data.val.split.name == "train" and asked.val_part is None:
        asked = replace(asked, val_part=default_part(data.labels))
    return asked, labelled(tokens, asked)


def _for_config(supervision: Supervision) -> dict[str, Any]:
    """config.json's "training", without what is for BERT alone."""
    return {k: v for k, v in for_config(supervision).items() if k != "mask_prob"}


def _count(description: dict[str, Any]) -> int:
    with torch.device("meta"):
        return count_parameters(build_model(description))


def _on(run: ModelDir, device: torch.device) -> ModelDir:
    return replace(run, model=run.model.to(device))


def _result(run: Path, setup: Supervised, status: str, progress: Progress, found: dict[str, Any]) -> TrainResult:
    best = progress.best or {}
    return TrainResult(
        run=run,
        status=status,
        steps=progress.step,
        images_seen=progress.step * setup.recipe.batch_size,
        train_loss=progress.train_loss,
        val_loss=best.get("val_loss"),
        val_accuracy=best.get("val_accuracy"),
        accuracy=found.get("accuracy"),
        interval=found.get("interval"),
        accuracy_class=found.get("accuracy_class"),
        accuracy_distillation=found.get("accuracy_distillation"),
        n_test=found.get("n_test"),
        best=progress.best,
        seconds=round(progress.seconds, 3),
    )
