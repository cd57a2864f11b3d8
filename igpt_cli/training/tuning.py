"""What fine-tuning learns (`Tuning`), and on which labelled images (`LabelledData`); section 2.3 and 3.4."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from igpt_cli.errors import InputError, MismatchError
from igpt_cli.models.presets import PRESETS
from igpt_cli.statistics import in_turn
from igpt_cli.tokens.loader import MASK_PROB
from igpt_cli.tokens.store import TokenFile, TokenSplit
from igpt_cli.training.checkpoint import FINETUNED_FROM
from igpt_cli.training.recipe import CPU_VAL_IMAGES, MANY_IMAGES, Learning, problems_of

#: The learning rate is that of pretraining divided by this ("often 10 times smaller", section 3.4).
SMALLER = 10
#: Passes over the training images after which it ends at the latest, where nothing is said and there is a GPU.
EPOCHS = 50
#: Steps of warm-up at most: about what Adam's second moment, with beta2 = 0.95, averages over.
WARMUP = 20
#: Masks of an image whose predictions vote (section 4.6).
BERT_MASKS = 5
#: Test images that `igpt finetune` classifies on a CPU unless told otherwise.
CPU_TEST_IMAGES = 300


@dataclass(frozen=True)
class Tuning(Learning):
    """Every setting that decides what fine-tuning learns; for those of every training see `Learning`.

    `None` stands for what pretraining had: batch_size (at most the training images), optimizer, betas, weight_decay,
    clip, mask_prob. learning_rate is a tenth of pretraining's (from scratch: the same), and stays as it is after
    warmup_steps, at most 20.

    gen_weight, clf_weight: of L_GEN and L_CLF in the loss.
    head_layer: which of the layers 0..L the class head reads; None is L, the final norm.
    labels_per_class: train and validate on so many labelled images of each class; those of a smaller number are among
        those of a larger one. None takes all.
    from_scratch: fresh weights instead of the pretrained ones.
    head_learning_rate: the class head's, where it is not learning_rate; the paper has one for all.
    layer_decay: the learning rate's from one block to the one below (`optim.make_optimizers`); 1 is the paper's, none.
    patience: validations without a better one (by accuracy, then by L_CLF) after which the run ends; 0 goes on.
    bert_masks: masks of an image whose predictions vote; 0 lets the model see the whole image.
    test_images: at most so many test images, balanced over the classes; None takes all.
    lr_search: learning rates of which the best is taken, each tried for a tenth of the run.
    """

    falls: ClassVar[bool] = False

    betas: tuple[float, float] | None = None  # type: ignore[assignment]
    weight_decay: float | None = None  # type: ignore[assignment]
    mask_prob: float | None = None  # type: ignore[assignment]
    gen_weight: float = 1.0
    clf_weight: float = 1.0
    head_layer: int | None = None
    labels_per_class: int | None = None
    from_scratch: bool = False
    head_learning_rate: float | None = None
    layer_decay: float = 1.0
    patience: int = 5
    bert_masks: int | None = None
    test_images: int | None = None
    lr_search: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Part:
    """Images with labels: `rows` (n,) int64 of a split, rising, and their `labels` (n,) int64."""

    split: TokenSplit
    rows: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class LabelledData:
    """The images of a fine-tuning run. left_out: images without a label, by split.

    rows, labels: of the split "train", those to train on, and the label of every image of the split.
    """

    rows: np.ndarray
    labels: np.ndarray
    val: Part
    test: Part | None
    left_out: dict[str, int]


def pretraining_of(config: dict[str, Any]) -> dict[str, Any]:
    """How a model was pretrained, as far as fine-tuning follows it: by its config.json, its preset, or the paper."""
    model, training = config["model"], config.get("training") or {}
    preset = PRESETS.get(model.get("name", ""), PRESETS["igpt-s"])
    rate, _ = preset.learning_rate(model["objective"], model["resolution"])
    published = {
        "batch_size": preset.recipe["batch_size"],
        "learning_rate": rate,
        "optimizer": preset.recipe.get("optimizer", "adamw"),
        "betas": Learning.betas,
        "weight_decay": Learning.weight_decay,
        "clip": Learning.clip,
        "mask_prob": MASK_PROB,
    }
    said = {k: tuple(v) if k == "betas" else v for k, v in training.items() if k in published and v is not None}
    if FINETUNED_FROM in config:  # its rate is a small one already
        said.pop("learning_rate", None)
    return published | said


def resolve_tuning(
    tuning: Tuning, config: dict[str, Any], n_train: int, device: torch.device, n_ranks: int = 1
) -> Tuning:
    """Fill in what was left open.

    Args:
        config: the config.json of the pretrained model.
        n_train: labelled training images.

    Raises:
        InputError: values out of range; all are named.
        MismatchError: a batch of more images than there are.
    """
    was, model, bert = pretraining_of(config), config["model"], config["model"]["objective"] == "bert"
    if tuning.bert_masks is not None and not bert:
        raise InputError(f"bert_masks is {tuning.bert_masks}, but the model is autoregressive and sees whole images")
    was["batch_size"] = max(n_ranks, min(was["batch_size"], n_train // n_ranks * n_ranks))
    was["learning_rate"] /= 1 if tuning.from_scratch else SMALLER
    was["head_layer"], was["bert_masks"] = model["n_layer"], BERT_MASKS if bert else None
    if device.type == "cpu":
        was["val_images"] = CPU_VAL_IMAGES
    if not (tuning.steps or tuning.epochs or tuning.budget):
        was["epochs"] = EPOCHS
    tuning = replace(tuning, **{k: v for k, v in was.items() if getattr(tuning, k) is None})
    check_tuning(tuning, model["n_layer"])
    if tuning.batch_size > n_train:
        raise MismatchError(
            f"batch_size {tuning.batch_size} is more than the {n_train} labelled training images; lower --batch-size"
        )
    per_epoch = max(1, n_train // tuning.batch_size)
    if tuning.epochs is not None:
        steps = max(1, round(tuning.epochs * per_epoch))
        tuning = replace(tuning, steps=min(tuning.steps or steps, steps))
    if tuning.warmup_steps is None:
        tuning = replace(tuning, warmup_steps=min(WARMUP, max(1, tuning.steps // 10) if tuning.steps else WARMUP))
    return tuning


def check_tuning(tuning: Tuning, n_layer: int) -> None:
    """Raise InputError that names every value out of range; None passes."""
    problems = problems_of(tuning)
    for name in ("gen_weight", "clf_weight", "patience", "bert_masks"):
        value = getattr(tuning, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            problems.append(f"{name} is {value}, expected 0 or more")
    if tuning.from_scratch and tuning.layer_decay != 1:
        problems.append(f"layer_decay is {tuning.layer_decay}, and from_scratch there are no trained layers to spare")
    if tuning.labels_per_class is not None and tuning.labels_per_class < 1:
        problems.append(f"labels_per_class is {tuning.labels_per_class}, expected at least 1")
    if tuning.test_images is not None and tuning.test_images < 1:
        problems.append(f"test_images is {tuning.test_images}, expected more than 0")
    if tuning.head_layer is not None and not 0 <= tuning.head_layer <= n_layer:
        problems.append(f"head_layer is {tuning.head_layer}, expected one of 0 to {n_layer} ({n_layer} = final norm)")
    bad = [rate for rate in tuning.lr_search or () if not (rate > 0 and math.isfinite(rate))]
    problems += [f"lr_search has {rate}, expected more than 0" for rate in bad]
    if problems:
        raise InputError("; ".join(problems))


def labelled(tokens: TokenFile, tuning: Tuning | Any) -> LabelledData:
    """The labelled images that `tuning` trains on, holds out and tests on.

    They are a function of the labels, the seed and the settings alone. Where there is a labelled split "val" it is
    held out; or else a part of each class of the training images, a tenth of `labels_per_class` where that is given,
    so that no other label is looked at.

    Raises:
        InputError: labels, classes or images are missing; the split or the class is named.
    """
    split = tokens.split("train")
    labels = np.asarray(split.labels, np.int64)
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise InputError(
            f"{tokens.path}: no image of the split 'train' has a label; classes are learnt from images in class folders"
        )
    classes = np.unique(labels[rows])
    if len(classes) < 2:
        raise InputError(
            f"{tokens.path}: the training images are all of one class, {tokens.classes[classes[0]]}; at least two "
            f"are needed"
        )
    val = _part(tokens, "val", tuning.val_images, tuning.seed)
    if val is None:
        rows, held = _held_out(tokens, labels, rows, tuning.val_part or default_part(labels), tuning)
        val = _fewer(split, labels, held, tuning.val_images, tuning.seed)
    elif tuning.labels_per_class:
        rows = np.concatenate([mine for _, mine in _by_class(tokens, labels, rows, tuning)])
    test = _part(tokens, "test", tuning.test_images, tuning.seed)
    for looked_at in filter(None, (val, test)):
        if unknown := sorted(set(looked_at.labels) - set(classes)):
            names = ", ".join(tokens.classes[i] for i in unknown[:5])
            raise InputError(
                f"{tokens.path}: the split {looked_at.split.name!r} has classes that the training images lack: {names}"
            )
    left_out = {
        name: int((s.labels < 0).sum()) for name, s in tokens.splits.items() if name in ("train", "val", "test")
    }
    return LabelledData(np.sort(rows), labels, val, test, {name: n for name, n in left_out.items() if n})


def default_part(labels: np.ndarray) -> float:
    """The part of the training images that is held out: a tenth, or of a million 4% (section 3.1)."""
    return 0.04 if (labels >= 0).sum() >= MANY_IMAGES else 0.1


def _part(tokens: TokenFile, name: str, most: int | None, seed: int) -> Part | None:
    """The labelled images of a split; None where there are none."""
    if name not in tokens.splits:
        return None
    split = tokens.split(name)
    labels = np.asarray(split.labels, np.int64)
    rows = np.flatnonzero(labels >= 0)
    return _fewer(split, labels, rows, most, seed) if len(rows) else None


def _fewer(split: TokenSplit, labels: np.ndarray, rows: np.ndarray, most: int | None, seed: int) -> Part:
    """At most so many of the rows, balanced over the classes."""
    if most is not None and most < len(rows):
        rows = in_turn(labels, rows, seed)[:most]
    rows = np.sort(rows)
    return Part(split, rows, labels[rows])


def _by_class(tokens: TokenFile, labels: np.ndarray, rows: np.ndarray, tuning: Tuning):
    """Yield (class, its rows in the order in which they are drawn), `labels_per_class` of each."""
    order, wanted = in_turn(labels, rows, tuning.seed), tuning.labels_per_class
    for label in np.unique(labels[rows]):
        mine = order[labels[order] == label]
        if wanted and len(mine) < wanted:
            raise InputError(
                f"{tokens.path}: class {tokens.classes[label]} has {len(mine)} labelled training images, fewer than "
                f"labels_per_class {wanted}; use at most that many"
            )
        yield label, mine[:wanted]


def _held_out(tokens: TokenFile, labels: np.ndarray, rows: np.ndarray, part: float, tuning: Tuning):
    """(rows to train on, rows held out): of each class the first, and then evenly, the part that is held out.

    So both are nested, too: a class of n images has the first ceil(part * n) held-out ones of a larger n.
    """
    train, held = [], []
    for label, mine in _by_class(tokens, labels, rows, tuning):
        counted = np.ceil(np.round(part * np.arange(len(mine) + 1), 9))
        out = np.diff(counted) > 0
        if out.all():
            raise InputError(
                f"{tokens.path}: class {tokens.classes[label]} has {len(mine)} labelled image to train on; at least "
                f"two are needed, one of them to validate"
            )
        train.append(mine[~out])
        held.append(mine[out])
    return np.concatenate(train), np.concatenate(held)
