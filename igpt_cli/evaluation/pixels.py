"""Nats per token on any split, with baselines on the same tokens.

Shapes: N images, T = R * R tokens of an image, V palette size.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_cli.device import autocast, choose_precision
from igpt_cli.errors import InputError, NonFiniteError
from igpt_cli.evaluation.baselines import Baselines
from igpt_cli.evaluation.classes import head_accuracy
from igpt_cli.files import replacing
from igpt_cli.model_dir import ModelDir, check_fit, check_predicts_pixels
from igpt_cli.statistics import evenly_spaced
from igpt_cli.tokens.loader import MASK_PROB, fixed_mask
from igpt_cli.tokens.store import TokenFile, TokenSplit
from igpt_cli.training.objectives import TOKENS_AT_ONCE, Objective

#: The splits that are evaluated when none is named: the first of them that is there.
SPLITS = ("test", "val")
PER_IMAGE = ("row", "name", "label", "nats_per_token")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns. Losses are in nats per token: the mean over images of each image's mean over its scored
    tokens, all of them ("ar") or the masked ones ("bert").

    Attributes:
        n_images, n_tokens: images evaluated, and scored tokens in them.
        standard_error: of nats_per_token as a mean over images; None for one image.
        uniform, unigram, bigram: the baselines on the same tokens (see `Baselines`); bigram None if V > 4096.
        baselines_fitted_on: the split on which the baselines were counted.
        seen_in_training: the model was trained on this very split.
        mask_prob, seed: of the masks; None for "ar".
        seconds: of everything; tokens_per_second: T N by the time of the model alone.
        rows: (N,) int64, the rows of the split that were evaluated.
        per_image: (N,) float64, nats per token of each image.
        by_position: (R, R) float64, mean loss at each position; NaN where no image was scored.
        accuracy, ..., n_labelled: of a fine-tuned model's class head, see `classes.head_accuracy`.
    """

    run: str
    model: str
    tokens: str
    split: str
    n_images: int
    n_tokens: int
    objective: str
    nats_per_token: float
    standard_error: float | None
    uniform: float
    unigram: float
    bigram: float | None
    baselines_fitted_on: str
    seen_in_training: bool
    mask_prob: float | None
    seed: int | None
    precision: str
    device: str
    seconds: float
    tokens_per_second: float
    rows: np.ndarray
    per_image: np.ndarray
    by_position: np.ndarray
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    top_5_accuracy: float | None = None
    log_loss: float | None = None
    n_labelled: int | None = None

    @property
    def bits_per_token(self) -> float:
        """nats_per_token / ln 2."""
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_subpixel(self) -> float:
        """A third of bits_per_token: per red, green or blue value of the quantised image.

        Not comparable with the bits/dim of models of 8-bit images: quantizing to V colours has thrown bits away.
        """
        return self.bits_per_token / 3

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as `igpt evaluate --json` prints it; losses to six decimals."""
        arrays = ("rows", "per_image", "by_position")
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        found |= {"bits_per_token": self.bits_per_token, "bits_per_subpixel": self.bits_per_subpixel}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()}


def evaluate(
    run: ModelDir,
    tokens: TokenFile,
    split: str | None = None,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
    mask_prob: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The loss of a model on the images of a split, with uniform, unigram and bigram on the same tokens.

    A BERT model is scored on the pixels that a mask hides. The mask of an image depends on its row and on `seed` alone.

    Args:
        split: which split; None for `default_split`.
        limit: at most so many images, evenly spaced over the split.
        batch_size: images at a time; default 16,384 tokens' worth. It changes no result but by rounding.
        precision: "float32", "bfloat16" or "auto".
        mask_prob: for BERT, the probability that a pixel is hidden; default the run's own, or 0.15.
        progress: called with (images done, images in all).

    Raises:
        InputError, MismatchError: no such split, no images, other palette or resolution, a value out of range.
        NonFiniteError: the loss of an image is NaN or infinite.
        MemoryError: a batch does not fit on the device.
    """
    started = time.monotonic()
    check_predicts_pixels(run)
    check_fit(run, tokens)
    part = tokens.split(split or default_split(tokens))
    objective = run.config["model"].get("objective", "ar")
    T, device = tokens.resolution**2, next(run.model.parameters()).device
    precision = choose_precision(precision, device)
    prob = masking(run, mask_prob, T)
    rows = _rows(part, limit)
    batch_size = images_at_once(batch_size, T)
    fitted_on = "train" if "train" in tokens.splits else part.name
    baselines = Baselines(tokens.split(fitted_on).tokens, tokens.resolution, tokens.n_vocab)

    model = Objective(run.model.eval())
    sums: dict[str, np.ndarray] = {name: np.zeros(len(rows)) for name in ("model", "unigram", "bigram")}
    scored, at_position, count_at_position = np.zeros(len(rows)), np.zeros(T), np.zeros(T)
    model_seconds = 0.0
    for start in range(0, len(rows), batch_size):
        at = slice(start, start + batch_size)
        batch = np.asarray(part.tokens[rows[at]], np.int64)  # (B, T)
        mask = None if prob is None else evaluation_masks(rows[at], T, prob, seed)
        began = time.monotonic()
        losses = pixel_losses(model, batch, mask, precision, device)  # (B, T) float64
        model_seconds += time.monotonic() - began
        counts = np.ones(batch.shape) if mask is None else mask.astype(np.float64)
        scored[at] = counts.sum(1)
        sums["model"][at] = (losses * counts).sum(1)
        for name, values in baselines.losses(batch).items():
            sums[name][at] = (values * counts).sum(1)
        at_position += (losses * counts).sum(0)
        count_at_position += counts.sum(0)
        if progress:
            progress(min(start + batch_size, len(rows)), len(rows))

    per_image = sums["model"] / scored
    check_finite(per_image, rows, run, precision, f" of {part.name}")
    of_head = head_accuracy(run, part, rows, batch_size=batch_size, precision=precision) or {}
    with np.errstate(invalid="ignore"):
        by_position = (at_position / count_at_position).reshape(tokens.resolution, -1)
    return Evaluation(
        run=run.run,
        model=run.name,
        tokens=tokens.title,
        split=part.name,
        n_images=len(rows),
        n_tokens=int(scored.sum()),
        objective=objective,
        nats_per_token=float(per_image.mean()),
        standard_error=float(per_image.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else None,
        uniform=math.log(tokens.n_vocab),
        unigram=float((sums["unigram"] / scored).mean()),
        bigram=float((sums["bigram"] / scored).mean()) if baselines.bigram is not None else None,
        baselines_fitted_on=fitted_on,
        seen_in_training=bool(part.sha256) and part.sha256 == run.config.get("data", {}).get("tokens_sha256"),
        mask_prob=prob,
        seed=None if prob is None else seed,
        precision=precision,
        device=str(device),
        seconds=time.monotonic() - started,
        tokens_per_second=len(rows) * T / max(model_seconds, 1e-9),
        rows=rows,
        per_image=per_image,
        by_position=by_position,
        **of_head,
    )


def default_split(tokens: TokenFile) -> str:
    """ "test", else "val", else the only split of the file. Raises InputError if there are several others."""
    for name in (*SPLITS, *(tokens.splits if len(tokens.splits) == 1 else ())):
        if name in tokens.splits:
            return name
    raise InputError(
        f"{tokens.path} has no split 'test' or 'val'; say which to evaluate with --split: {', '.join(tokens.splits)}"
    )


def evaluation_masks(rows: np.ndarray, n_ctx: int, prob: float, seed: int = 0) -> np.ndarray:
    """The pixels of each image that BERT must predict: (B, T) bool, at least one an image.

    As `tokens.loader.fixed_mask` for rows (B,) of a split; an image whose mask hides nothing gets its next draw, so
    `prob` must be at least 1 / n_ctx.
    """
    mask, draw = fixed_mask(rows, n_ctx, prob, seed), 0
    while (empty := ~mask.any(1)).any():
        draw += 1
        mask[empty] = fixed_mask(rows[empty], n_ctx, prob, seed, draw)
    return mask


def write_per_image(found: Evaluation, split: TokenSplit, path: Path | str) -> None:
    """Write row, name, label (-1 = none) and nats_per_token of each image: JSON lines if `path` ends so, else CSV."""
    path = Path(path)
    names, labels = split.names, np.asarray(split.labels)
    lines = ((int(r), names[r], int(labels[r]), round(float(x), 6)) for r, x in zip(found.rows, found.per_image))
    is_json = path.suffix.lower() == ".jsonl"
    # Names are bytes of any kind: CSV gets them as they are, JSON as \udc80..\udcff.
    errors = "backslashreplace" if is_json else "surrogateescape"
    with replacing(path) as part, open(part, "w", encoding="utf-8", errors=errors, newline="") as file:
        if is_json:
            file.writelines(json.dumps(dict(zip(PER_IMAGE, x)), ensure_ascii=False) + "\n" for x in lines)
        else:
            csv.writer(file, lineterminator="\n").writerows([PER_IMAGE, *lines])


@torch.inference_mode()
def pixel_losses(model: Objective, tokens: np.ndarray, mask: np.ndarray | None, precision: str, device) -> np.ndarray:
    """The model's loss at every position, masked or not: (B, T) float64.

    tokens: (B, T) int64; mask: (B, T) bool, the pixels hidden from BERT, None for AR. Raises MemoryError if the batch
    does not fit on the device.
    """
    hidden = None if mask is None else torch.from_numpy(mask).to(device)
    try:
        with autocast(precision, device):
            losses = model.token_losses(torch.from_numpy(tokens).to(device), hidden)
        return losses.cpu().numpy().astype(np.float64)
    except torch.OutOfMemoryError as e:
        raise MemoryError(f"{len(tokens)} images at a time do not fit on {device}; give a lower --batch-size") from e


def masking(run: ModelDir, asked: float | None, n_ctx: int) -> float | None:
    """The probability with which a BERT model's pixels are hidden: the option, that of its training, or 0.15; None for
    AR.

    Raises:
        InputError: given for an autoregressive model, or out of range.
    """
    if run.config["model"].get("objective", "ar") != "bert":
        if asked is not None:
            raise InputError(f"--mask-prob is for BERT models; {run.run} is autoregressive and is asked for all pixels")
        return None
    prob = run.config.get("training", {}).get("mask_prob", MASK_PROB) if asked is None else asked
    if not 1 / n_ctx <= prob <= 1:
        raise InputError(
            f"mask_prob is {prob}; it must be at most 1, and with {n_ctx:,} pixels at least {1 / n_ctx:.3g}, one pixel"
        )
    return prob


def images_at_once(asked: int | None, n_ctx: int) -> int:
    """The requested batch size, or as many images as have 16,384 tokens. Raises InputError below 1."""
    if asked is not None and asked < 1:
        raise InputError(f"the batch size is {asked}; it must be at least 1")
    return asked or max(1, TOKENS_AT_ONCE // n_ctx)


def check_finite(per_image: np.ndarray, rows: np.ndarray, run: ModelDir, precision: str, of: str = "") -> None:
    """Raises NonFiniteError, naming the first of `rows` whose loss is NaN or infinite; `of` follows its number: " of
    test".
    """
    if not np.isfinite(per_image).all():
        bad = int(np.flatnonzero(~np.isfinite(per_image))[0])
        raise NonFiniteError(
            f"the loss of row {rows[bad]}{of} is {per_image[bad]}: the weights of {run.run} overflow in "
            f"{precision}" + ("; try --precision float32" if precision != "float32" else "")
        )


def _rows(split: TokenSplit, limit: int | None) -> np.ndarray:
    """(n,) int64: all rows, or `limit` of them."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    if not len(split):
        raise InputError(f"{split.file.path}: the split {split.name!r} is empty; there is nothing to evaluate")
    return evenly_spaced(len(split), limit)
