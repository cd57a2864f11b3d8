"""Accuracy of a model's class head on any split.

Shapes: N labelled images, B of them in a batch, C classes of the model, M masked forms of an image (BERT), 1 otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from igpt_cli.device import autocast, choose_precision
from igpt_cli.errors import InputError, MismatchError, NonFiniteError
from igpt_cli.images.records import brief
from igpt_cli.model_dir import ModelDir, check_fit, classes_of
from igpt_cli.model_input import inputs_of, places
from igpt_cli.statistics import vote, wilson
from igpt_cli.tokens.loader import MASK_PROB, fixed_mask
from igpt_cli.tokens.store import TokenFile, TokenSplit
from igpt_cli.training.objectives import has_two_heads

#: From so many classes on, accuracy counts the five likeliest besides.
TOP_5_CLASSES = 100
#: Which head of a model with two is asked; "both": the mean of their logits.
HEADS = ("both", "class", "distillation")
#: Tokens, or places of RGB images, that are computed at a time when no batch size is given.
TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True)
class HeadResult:
    """What `evaluate_head` returns; accuracies in percent.

    Attributes:
        n_images, n_classes: labelled images evaluated, classes of the model.
        accuracy, interval: with its 95% Wilson interval.
        top_5_accuracy: from 100 classes on; else None.
        log_loss: nats per image, the mean of -log p of the true class.
        chance: the share of the commonest class among these images.
        matched: how classes were matched: "by name"; where the model's have no names "by order", for numbers "by order
            of value" or "by order of text".
        other_order_accuracy: in the other of these two orders, where both were compared; else None.
        seen_in_training: the model was trained on this very split.
        head: one of `HEADS` for a model with two; None for one.
        bert_masks: masks of an image, whose predictions vote; None for other models.
        seconds: of everything; images_per_second: by the time of the model alone.
    """

    run: str
    model: str
    tokens: str
    split: str
    n_images: int
    n_classes: int
    accuracy: float
    interval: tuple[float, float]
    top_5_accuracy: float | None
    log_loss: float
    chance: float
    matched: str
    other_order_accuracy: float | None
    seen_in_training: bool
    head: str | None
    bert_masks: int | None
    precision: str
    device: str
    batch_size: int
    seconds: float
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as `igpt evaluate --json` prints it."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def has_head(run: ModelDir) -> bool:
    """Whether a model tells classes apart: it has a class head, and if it is an iGPT, one that was trained (not 0)."""
    if not run.config["model"].get("n_classes"):
        return False
    head: Any = getattr(run.model, "wclf", None)
    return head is None or bool(head.weight.any())


def match_classes(run: ModelDir, classes: Sequence[str], labels: np.ndarray) -> tuple[np.ndarray, str]:
    """Match the data's classes to the model's, by name, or where the model's have no names and there are as many, by
    order.

    Args:
        labels: (N,) indices into `classes`, of the images that count.

    Returns:
        (C',) int64, the model's number of each class of the data, -1 where no label is of it; and "by name" or "by
        order".

    Raises:
        MismatchError: the model does not know a class that has images.
    """
    known, n = classes_of(run.config), run.config["model"]["n_classes"]
    if known is None:
        if len(classes) != n:
            raise MismatchError(
                f"{run.run} tells {n:,} classes apart and does not name them; the images have {len(classes):,}, so "
                f"they cannot be matched; give images of just its classes, or ask what its layers know: igpt probe"
            )
        return np.arange(n), "by order"
    number = {name: i for i, name in enumerate(known)}
    used = np.unique(labels)
    missing = [classes[k] for k in used if classes[k] not in number]
    if missing:
        raise MismatchError(
            f"{run.run} has learnt the classes {brief(known)}, and the images are of {brief(missing)}, which it does "
            f"not know; name folders as its classes, leave the others out, or ask what its layers know: igpt probe"
        )
    numbers = np.full(len(classes), -1, np.int64)
    numbers[used] = [number[classes[k]] for k in used]
    return numbers, "by name"


def text_order(classes: Sequence[str]) -> np.ndarray | None:
    """The place of each class where they are sorted as text, which torchvision does; None where that is the same.

    >>> text_order(["0", "1", "2", "10"])
    array([0, 1, 3, 2])
    """
    ordered = sorted(classes)
    if ordered == list(classes) or not all(c.isdecimal() for c in classes):
        return None
    places = {name: i for i, name in enumerate(ordered)}
    return np.array([places[name] for name in classes])


def evaluate_head(
    run: ModelDir,
    tokens: TokenFile,
    split: str,
    *,
    rows: np.ndarray | None = None,
    head: str = "both",
    class_order: str | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> HeadResult:
    """Classify the labelled images of a split by a model's own class head.

    BERT sees each image under as many masks as when it was tested, drawn by the seed of its run; they vote, and its
    probabilities are the mean over them.

    Args:
        rows: (n,) rows of the split; default all. Those without a label do not count.
        head: for a model with two heads, one of `HEADS`.
        class_order: where the model does not name its classes and the images' are numbers: "value" (0, 1, 2, 10) or
            "text" (0, 1, 10, 2, as torchvision sorts folders); None for the one that fits the images better.
        batch_size: images at a time; it changes no result but by rounding.
        progress: called with (images done, N).

    Raises:
        InputError: no class head, no such head, or no labelled images.
        MismatchError: another palette or resolution, or classes that the model does not know.
        NonFiniteError: the scores of an image are NaN or infinite.
        MemoryError: a batch does not fit on the device.
    """
    started = time.monotonic()
    if not has_head(run):
        raise InputError(
            f"{run.run} has no class head, or one that was never trained; ask what its layers know: igpt probe"
        )
    two = has_two_heads(run.model)
    if head not in HEADS:
        raise InputError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
    if head != "both" and not two:
        raise InputError(f"{run.run} has one class head; head {head!r} is for a model with a distillation head")
    check_fit(run, tokens)
    part = tokens.split(split)
    rows = np.arange(len(part)) if rows is None else rows
    labels = np.asarray(part.labels, np.int64)[rows]
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    if not len(rows):
        raise InputError(f"{tokens.path}: no image of the split {split!r} has a label, so there is nothing to compare")
    numbers, matched = match_classes(run, tokens.classes, labels)
    truths = {matched: numbers[labels]}
    if matched == "by order" and (as_text := text_order(tokens.classes)) is not None:
        truths = {"by order of value": numbers[labels], "by order of text": as_text[labels]}
        truths = {k: v for k, v in truths.items() if class_order is None or k.endswith(class_order)}
    elif class_order is not None:
        raise InputError("--class-order is for classes that are numbers, and a model that does not name its own")
    device = next(run.model.parameters()).device
    precision = choose_precision(precision, device)
    batch_size = batch_size or max(1, TOKENS_AT_ONCE // places(run, tokens.resolution))
    masks, seed = _masks(run), run.config.get("training", {}).get("seed", 0)
    C = int(run.config["model"]["n_classes"])
    model_seconds = 0.0
    scores = {how: np.zeros(3) for how in truths}  # correct, among the five likeliest, log loss
    for start in range(0, len(rows), batch_size):
        at = slice(start, start + batch_size)
        began = time.monotonic()
        p = _probabilities(run, part, rows[at], masks, head, precision, device)  # (M, B, C)
        model_seconds += time.monotonic() - began
        _check_finite(p, rows[at], run, precision)
        voted, together = vote(p.argmax(2), rows[at], seed), p.mean(0)
        likeliest = np.argsort(-together, axis=1, kind="stable")[:, :5]
        for how, truth in truths.items():
            true = together[np.arange(len(together)), truth[at]]
            scores[how] += (
                (voted == truth[at]).sum(),
                (likeliest == truth[at, None]).any(1).sum(),
                -np.log(np.maximum(true, np.finfo(np.float64).tiny)).sum(),
            )
        if progress:
            progress(min(start + batch_size, len(rows)), len(rows))
    n = len(rows)
    matched = min(scores, key=lambda how: scores[how][2])
    correct, among_five, loss = int(scores[matched][0]), int(scores[matched][1]), float(scores[matched][2])
    other = [100 * float(s[0]) / n for how, s in scores.items() if how != matched]
    return HeadResult(
        run=run.run,
        model=run.name,
        tokens=tokens.title,
        split=split,
        n_images=n,
        n_classes=C,
        accuracy=100 * correct / n,
        interval=wilson(correct, n),
        top_5_accuracy=100 * among_five / n if C >= TOP_5_CLASSES else None,
        log_loss=loss / n,
        chance=100 * float(np.bincount(labels).max() / n),
        matched=matched,
        other_order_accuracy=other[0] if other else None,
        seen_in_training=bool(part.sha256) and part.sha256 == run.config.get("data", {}).get("tokens_sha256"),
        head=head if two else None,
        bert_masks=masks or None,
        precision=precision,
        device=str(device),
        batch_size=batch_size,
        seconds=time.monotonic() - started,
        images_per_second=n / max(model_seconds, 1e-9),
    )


def head_accuracy(
    run: ModelDir, split: TokenSplit, rows: np.ndarray, *, batch_size: int, precision: str = "float32"
) -> dict[str, Any] | None:
    """accuracy, interval, top_5_accuracy, log_loss and n_labelled of `evaluate_head`, to report with the loss of
    pixels.

    None without a trained class head, without labels, and where the classes are others than those that it has learnt.
    """
    if not has_head(run) or not (np.asarray(split.labels)[rows] >= 0).any():
        return None
    try:
        found = evaluate_head(run, split.file, split.name, rows=rows, batch_size=batch_size, precision=precision)
    except MismatchError:
        return None
    fields = ("accuracy", "interval", "top_5_accuracy", "log_loss")
    return {**{k: getattr(found, k) for k in fields}, "n_labelled": found.n_images}


def _masks(run: ModelDir) -> int:
    """M of a BERT model: as many as when it was tested; 0 where images are whole."""
    bert = run.config["model"].get("objective") == "bert"
    return run.config.get("training", {}).get("bert_masks") or 0 if bert else 0


@torch.inference_mode()
def _probabilities(
    run: ModelDir,
    split: TokenSplit,
    rows: np.ndarray,
    masks: int,
    head: str,
    precision: str,
    device: torch.device,
) -> np.ndarray:
    """(M, B, C) float64."""
    model: Any = run.model.eval()
    values, decode = inputs_of(run, split)
    of_tokens = hasattr(model, "hidden_and_classes")
    training = run.config.get("training", {})
    found = []
    try:
        x = decode(np.asarray(values[rows])).to(device)
        for draw in range(masks or 1):
            mask = None
            if masks:
                prob, seed = training.get("mask_prob") or MASK_PROB, training.get("seed", 0)
                mask = torch.from_numpy(fixed_mask(rows, x.shape[1], prob, seed, draw)).to(device)
            with autocast(precision, device):
                if of_tokens:
                    logits = model.hidden_and_classes(x, mask)[1]
                else:
                    logits = model(x) if head == "both" else model.heads(x)[HEADS.index(head) - 1]
            found.append(logits.double().softmax(-1).cpu())
    except torch.OutOfMemoryError as e:
        raise MemoryError(f"{len(rows)} images at a time do not fit on {device}; give a lower --batch-size") from e
    return torch.stack(found).numpy()


def _check_finite(p: np.ndarray, rows: np.ndarray, run: ModelDir, precision: str) -> None:
    if not np.isfinite(p).all():
        bad = rows[np.flatnonzero(~np.isfinite(p).all((0, 2)))[0]]
        raise NonFiniteError(
            f"the scores of row {bad} hold NaN or infinity: the weights of {run.run} overflow in {precision}"
        )
