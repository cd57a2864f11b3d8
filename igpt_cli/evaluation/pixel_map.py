"""Per-pixel loss maps of images.

Shapes: n images, T = R * R tokens of an image, V palette size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.device import choose_precision
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.evaluation.pixels import Evaluation, check_finite, images_at_once, masking, pixel_losses
from igpt_cli.files import replacing
from igpt_cli.model_dir import ModelDir, check_predicts_pixels
from igpt_cli.statistics import evenly_spaced
from igpt_cli.tokens.loader import fixed_parts
from igpt_cli.tokens.store import TokenSplit
from igpt_cli.training.objectives import Objective


def pixel_loss_map(
    run: ModelDir,
    tokens: np.ndarray,
    rows: np.ndarray | None = None,
    *,
    batch_size: int | None = None,
    precision: str = "float32",
    mask_prob: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """-log p of every pixel, in nats: (n, R, R) float64.

    An autoregressive model sees each image once; the sum over an image is its negative log-likelihood, the mean what
    `evaluate` gives for it. A BERT model sees each image `passes` times. Each pass hides another random part of the
    pixels, as large as in training, and the parts make up the image, so every pixel is predicted once. The mean over an
    image is then a pseudo-likelihood, fit to compare models or images: the predictions are not factors of one joint
    distribution.

    Args:
        tokens: (n, T) integers in [0, V).
        rows: (n,) the images' rows in their split, default 0..n-1: BERT's masks depend on the row and `seed` alone.
        batch_size: images at a time; default 16,384 tokens' worth. It changes no result but by rounding.
        precision: "float32", "bfloat16" or "auto".
        mask_prob: for BERT, the part of the pixels hidden at a time; default the run's own, or 0.15.
        progress: called with (images done, images in all).

    Raises:
        InputError, MismatchError: tokens that are no images of this model, a value out of range.
        NonFiniteError: the loss of a pixel is NaN or infinite.
        MemoryError: a batch does not fit on the device.
    """
    check_predicts_pixels(run)
    tokens = np.asarray(tokens)
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows)
    n_vocab, resolution = run.config["model"]["n_vocab"], run.config["model"]["resolution"]
    T, device = resolution**2, next(run.model.parameters()).device
    if tokens.ndim != 2 or tokens.shape[1] != T or len(rows) != len(tokens):
        raise MismatchError(
            f"{len(rows):,} images of {resolution}x{resolution} are ({len(rows):,}, {T:,}) tokens for {run.run}; "
            f"these are {tokens.shape}"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < n_vocab:
        raise InputError(f"tokens are {tokens.min()}..{tokens.max()}; those of {run.run} are 0..{n_vocab - 1}")
    precision, batch_size = choose_precision(precision, device), images_at_once(batch_size, T)
    prob = masking(run, mask_prob, T)
    n_passes = passes(prob)
    hidden_in = fixed_parts(rows, T, n_passes, seed)  # (n, T)

    model = Objective(run.model.eval())
    nats = np.empty(tokens.shape)
    # A batch holds (image, pass) pairs, so one image of a BERT model is one batch, too.
    for start in range(0, len(tokens) * n_passes, batch_size):
        stop = min(start + batch_size, len(tokens) * n_passes)
        image, at = np.divmod(np.arange(start, stop), n_passes)
        asked = hidden_in[image] == at[:, None]  # (B, T): for AR, which has one pass, every pixel
        losses = pixel_losses(model, tokens[image].astype(np.int64), None if prob is None else asked, precision, device)
        pair, pixel = asked.nonzero()
        nats[image[pair], pixel] = losses[pair, pixel]
        if progress:
            progress(stop // n_passes, len(tokens))
    check_finite(nats.mean(1), rows, run, precision)
    return nats.reshape(len(tokens), resolution, resolution)


def passes(mask_prob: float | None) -> int:
    """How often a model sees an image: once for AR (None), or so often that 1 / passes is about mask_prob.

    >>> passes(None), passes(0.15), passes(0.5), passes(1.0)
    (1, 7, 2, 1)
    """
    return 1 if mask_prob is None else max(1, round(1 / mask_prob))


@dataclass(frozen=True)
class PixelMap:
    """The loss of every pixel of some images of a split: nats (n, R, R) float64, rows (n,) int64.

    mask_prob: the part of the pixels that a BERT model saw hidden at a time; None for "ar".
    """

    nats: np.ndarray
    rows: np.ndarray
    mask_prob: float | None

    def to_dict(self) -> dict[str, Any]:
        """All but the pixels: rows, the mean of each image, and how often the model saw it."""
        means = [round(float(x), 6) for x in self.nats.mean((1, 2))]
        return {"rows": self.rows.tolist(), "nats_per_token": means, "passes": passes(self.mask_prob)}


def map_pixels(
    run: ModelDir,
    split: TokenSplit,
    found: Evaluation,
    n: int,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PixelMap:
    """The `pixel_loss_map` of at most `n` evaluated images, evenly spaced, with the settings of the evaluation."""
    rows = found.rows[evenly_spaced(found.n_images, n)]
    how: dict[str, Any] = {"batch_size": batch_size, "precision": found.precision, "seed": found.seed or 0}
    nats = pixel_loss_map(run, split.tokens[rows], rows, mask_prob=found.mask_prob, **how, progress=progress)
    return PixelMap(nats, rows, found.mask_prob)


def write_pixel_map(nats: np.ndarray, split: TokenSplit, rows: np.ndarray, path: Path | str) -> None:
    """Write what `pixel_loss_map` found of some rows of a split as NumPy arrays (.npz).

    Arrays: `nats` (n, R, R) float32, `images` (n, R, R, 3) uint8 as the tokens show them, `tokens` (n, T) uint16,
    `rows` (n,) int64, `names` (n,) text, `labels` (n,) int32, an index into `classes` (C,) text, -1 = none.
    """
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            nats=nats.astype(np.float32),
            images=split.decode(rows),
            tokens=split.tokens[rows],
            rows=np.asarray(rows, np.int64),
            names=np.array([split.names[row] for row in rows], np.str_),
            labels=np.asarray(split.labels)[rows],
            classes=np.array(split.file.classes, np.str_),
        )
