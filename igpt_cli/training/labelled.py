"""Learning from labels: which labelled images are used, and what fine-tuning and supervised training share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn, optim

from igpt_cli.errors import InputError
from igpt_cli.files import sha256_of
from igpt_cli.statistics import in_turn
from igpt_cli.tokens.store import TokenFile, TokenSplit
from igpt_cli.training.checkpoint import best_checkpoint, load_weights, publish_weights
from igpt_cli.training.loop import Metrics
from igpt_cli.training.settings import MANY_IMAGES, LabelledSettings
from igpt_cli.training.task import Images, Subset, Task
from igpt_cli.workspace import CHECKPOINTS

#: Steps from one validation to the next at least, however few images an epoch has.
MIN_STEPS = 10


class LabelledTask(Task):
    """What fine-tuning and supervised training share: labels, a class head, and accuracy as what is validated."""

    settings: Any
    results = (*Task.results, "val_accuracy", "accuracy", "interval", "n_test")
    #: Whether the test images are classified at the end.
    tests = True

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.patience = self.settings.patience or None
        self.eval_every = self.execution.eval_every or max(MIN_STEPS, self.loader.steps_per_epoch)

    def classify(
        self, objective: nn.Module, subset: Subset, give_up: Callable[[], bool] = lambda: False
    ) -> Tensor | None:
        """(K,) float64, sums over the images of a subset, which the ranks share: losses, and how many are right.

        Args:
            objective: in evaluation mode.
            give_up: called before each batch; if it returns true, None is returned.
        """
        raise NotImplementedError

    def tested(self, sums: Tensor, n: int) -> dict[str, Any]:
        """The test results, from what `classify` gives for n images."""
        raise NotImplementedError

    def optimizers(self, model: nn.Module, **rates: Any) -> list[optim.Optimizer]:
        """What updates a model's weights, with rates of their own for lower layers and for class heads."""
        s = self.settings
        return super().optimizers(model, layer_decay=s.layer_decay, head_rate=s.head_learning_rate, **rates)

    def finish(self, objective: Any, shared: nn.Module, run: Path) -> dict[str, Any]:
        """Take the best checkpoint's weights, make them the run's own, and classify the test images, once."""
        folder = run / CHECKPOINTS / self.ranks.broadcast_from_rank0(lambda: str(best_checkpoint(run)))
        load_weights(folder, objective.model, self.ranks)
        self.ranks.broadcast_from_rank0(lambda: publish_weights(run, folder))
        test = self.images.test
        if test is None or not self.tests:
            return {}
        shared.eval()
        sums = self.classify(shared, test)
        return {} if sums is None else {**self.tested(sums, len(test.rows)), "n_test": len(test.rows)}

    def data_config(self) -> dict[str, Any]:
        """Counts, classes and a hash of the labels."""
        images = self.images
        return {
            "labels_sha256": labels_sha256(self.tokens),
            "classes": self.tokens.classes,
            **super().data_config(),
            "n_test": len(images.test.rows) if images.test else 0,
            "left_out": images.unlabelled,
        }

    @classmethod
    def differences(cls, config: dict[str, Any], tokens: TokenFile) -> list[str]:
        """Other labels."""
        same = config["data"]["labels_sha256"] == labels_sha256(tokens)
        return [] if same else [f"the labels are others now ({tokens.path})"]


def best_accuracy(metrics: Metrics) -> tuple[float, ...]:
    """How good a validation is: by its accuracy; ties go to the lower loss of the classes."""
    loss = metrics["val_clf_loss"] if "val_clf_loss" in metrics else metrics["val_loss"]
    return metrics["val_accuracy"], -loss


def labels_sha256(tokens: TokenFile) -> str:
    """SHA-256 of all labels, by split."""
    parts = ((name.encode(), split.labels.astype("<i4").tobytes()) for name, split in tokens.splits.items())
    return sha256_of(*(chunk for part in parts for chunk in part))


def resumed_images(tokens: TokenFile, settings: Any, config: dict[str, Any]) -> Images:
    """The images of a run that is resumed: as many as config.json counts."""
    data = config["data"]
    return labelled(tokens, replace(settings, val_images=data["n_val"], test_images=data["n_test"] or None))


def labelled(tokens: TokenFile, settings: LabelledSettings) -> Images:
    """The labelled images that are trained on, held out and tested on.

    They are a function of the labels, the seed and the settings alone. A labelled split "val" is held out where there
    is one; or else a part of each class of the training images, a tenth of `labels_per_class` where that is given, so
    that no other label is looked at.

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
    val = _subset(tokens, "val", settings.val_images, settings.seed)
    if val is None:
        rows, held = _held_out(tokens, labels, rows, settings.val_part or default_part(labels), settings)
        val = _balanced(split, labels, held, settings.val_images, settings.seed)
    elif settings.labels_per_class:
        rows = np.concatenate([mine for _, mine in _by_class(tokens, labels, rows, settings)])
    test = _subset(tokens, "test", settings.test_images, settings.seed)
    for subset in filter(None, (val, test)):
        if unknown := sorted(set(subset.labels) - set(classes)):
            names = ", ".join(tokens.classes[i] for i in unknown[:5])
            raise InputError(
                f"{tokens.path}: the split {subset.split.name!r} has classes that the training images lack: {names}"
            )
    unlabelled = {
        name: int((s.labels < 0).sum()) for name, s in tokens.splits.items() if name in ("train", "val", "test")
    }
    return Images(np.sort(rows), val, test, labels, {name: n for name, n in unlabelled.items() if n})


def default_part(labels: np.ndarray) -> float:
    """The part of the training images that is held out: a tenth, or of a million 4% (section 3.1)."""
    return 0.04 if (labels >= 0).sum() >= MANY_IMAGES else 0.1


def _subset(tokens: TokenFile, name: str, most: int | None, seed: int) -> Subset | None:
    """The labelled images of a split; None where there are none."""
    if name not in tokens.splits:
        return None
    split = tokens.split(name)
    labels = np.asarray(split.labels, np.int64)
    rows = np.flatnonzero(labels >= 0)
    return _balanced(split, labels, rows, most, seed) if len(rows) else None


def _balanced(split: TokenSplit, labels: np.ndarray, rows: np.ndarray, most: int | None, seed: int) -> Subset:
    """At most that many of the rows, balanced over the classes."""
    if most is not None and most < len(rows):
        rows = in_turn(labels, rows, seed)[:most]
    rows = np.sort(rows)
    return Subset(split, rows, labels[rows])


def _by_class(
    tokens: TokenFile, labels: np.ndarray, rows: np.ndarray, settings: LabelledSettings
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (class, its rows in the order in which they are drawn), `labels_per_class` of each."""
    order, limit = in_turn(labels, rows, settings.seed), settings.labels_per_class
    for label in np.unique(labels[rows]):
        mine = order[labels[order] == label]
        if limit and len(mine) < limit:
            raise InputError(
                f"{tokens.path}: class {tokens.classes[label]} has {len(mine)} labelled training images, fewer than "
                f"labels_per_class {limit}; use at most that many"
            )
        yield label, mine[:limit]


def _held_out(
    tokens: TokenFile, labels: np.ndarray, rows: np.ndarray, part: float, settings: LabelledSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out): of each class the first, and then evenly, the part that is held out.

    So both are nested, too: a class of n images has the first ceil(part * n) held-out ones of a larger n.
    """
    train, held = [], []
    for label, mine in _by_class(tokens, labels, rows, settings):
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
