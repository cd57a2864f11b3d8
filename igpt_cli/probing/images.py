"""The labelled images of a probe, balanced by class, of the splits "train" and "test"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.files import sha256_of
from igpt_cli.images.subset import UNREADABLE, Select
from igpt_cli.probing.baselines import colour_histogram, reduced
from igpt_cli.probing.protocol import Labels
from igpt_cli.statistics import in_turn
from igpt_cli.tokens.store import TokenFile

#: Images used of the training and test splits when nothing is said and the device is a CPU.
CPU_IMAGES = (500, 300)
#: Pixels of images that are read at a time for the baselines.
PIXELS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Images:
    """The images of a probe: rows of the splits "train" and "test", the same number of each class as far as it goes.

    `as_kept`: the model sees the images that the file kept; if not, the colours of its tokens.
    """

    tokens: TokenFile
    rows: dict[str, np.ndarray]
    labels: Labels
    as_kept: bool = False

    @property
    def sha256(self) -> str:
        """Of the names and classes of the images, whatever their size and palette."""
        digest = []
        for split, labels in (("train", self.labels.train), ("test", self.labels.test)):
            names = self.tokens.split(split).names
            digest += [[split, names[row], self.tokens.classes[label]] for row, label in zip(self.rows[split], labels)]
        return sha256_of(json.dumps(digest).encode())

    def histogram(self, split: str) -> np.ndarray:
        """(n, V) float32: `baselines.colour_histogram`."""
        tokens = self.tokens.split(split).tokens
        parts = [colour_histogram(tokens[rows], self.tokens.n_vocab) for rows in self._parts(split)]
        return np.concatenate(parts)

    def rgb(self, split: str) -> np.ndarray:
        """(n, R', R', 3) uint8: the images as the model sees them; those of more than 64 pixels a side in 32 x 32."""
        part = self.tokens.split(split)
        see = part.rgb.__getitem__ if self.as_kept and part.rgb is not None else part.decode
        return np.concatenate([reduced(see(rows)) for rows in self._parts(split)])

    def _parts(self, split: str) -> list[np.ndarray]:
        """The rows, a few at a time."""
        rows, at_once = self.rows[split], max(1, PIXELS_AT_ONCE // self.tokens.resolution**2)
        return [rows[i : i + at_once] for i in range(0, len(rows), at_once)]


class Subsets:
    """The images that each of several seeds uses, so that others need not be decoded.

    Called as `images.subset.Select` it names the images of all seeds in a source that is not decoded yet. Where a split
    has no labels one image stays, so that the error can be reported. `train_images` and `test_images` limit each seed,
    balanced over the classes.
    """

    def __init__(self, train_images: int | None, test_images: int | None, seeds: Sequence[int] = (0,)):
        self.limits, self.seeds = {"train": train_images, "test": test_images}, list(seeds)
        self._drawn: dict[str, list[np.ndarray]] = {}  # rows of each seed in the source, where it was asked

    def __call__(self, split: str, labels: np.ndarray) -> np.ndarray:
        if split not in self.limits:
            return np.empty(0, np.int64)
        self._drawn[split] = [_labelled_rows(labels, self.limits[split], seed) for seed in self.seeds]
        rows = np.unique(np.concatenate(self._drawn[split]))
        return rows if len(rows) else np.flatnonzero(labels != UNREADABLE)[:1]

    def images(self, tokens: TokenFile, seed: int, as_kept: bool = False) -> Images:
        """The images of one seed, in the token file, or in one made of the selected images.

        Raises:
            InputError: as `choose_images`; or the token file was not made of the selected images.
        """
        if len(self.seeds) == 1 or not self._drawn:
            return choose_images(tokens, self.limits["train"], self.limits["test"], seed, as_kept)
        rows = {}
        for split, drawn in self._drawn.items():
            chosen = np.unique(np.concatenate(drawn))
            if len(chosen) != len(tokens.split(split)):
                raise InputError(
                    f"the split {split!r} has {len(tokens.split(split)):,} images, not the {len(chosen):,} that the "
                    f"seeds drew; make a token file first (igpt tokenize)"
                )
            rows[split] = np.searchsorted(chosen, drawn[self.seeds.index(seed)])
        return _images(tokens, rows, as_kept)


def balanced(train_images: int | None, test_images: int | None, seed: int) -> Select:
    """The images that `choose_images` will choose, to be named before any is decoded."""
    return Subsets(train_images, test_images, [seed])


def choose_images(
    tokens: TokenFile, train_images: int | None, test_images: int | None, seed: int, as_kept: bool = False
) -> Images:
    """The labelled images of the splits "train" and "test", at most so many of them.

    Raises:
        InputError: a split or labels are missing, or too few for a probe.
    """
    limits = {"train": train_images, "test": test_images}
    rows = {k: _labelled_rows(np.asarray(tokens.split(k).labels), limit, seed) for k, limit in limits.items()}
    return _images(tokens, rows, as_kept)


def _images(tokens: TokenFile, rows: dict[str, np.ndarray], as_kept: bool) -> Images:
    labels = {}
    for name in ("train", "test"):
        if not len(rows[name]):
            raise InputError(f"{tokens.path}: no image of the split {name!r} has a label; a probe needs class folders")
        labels[name] = np.asarray(tokens.split(name).labels)[rows[name]].astype(np.int64)
    _check_labels(labels, tokens)
    return Images(tokens, rows, Labels(labels["train"], labels["test"]), as_kept)


def _labelled_rows(labels: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """(n,) rising: the rows with a label, at most `limit`, balanced over the classes.

    Unreadable rows take part in the order, so that each is replaced and the others stay.
    """
    rows = np.flatnonzero(labels >= 0)
    if limit is None or limit >= len(rows):
        return rows
    order = in_turn(labels, np.flatnonzero((labels >= 0) | (labels == UNREADABLE)), seed)
    return np.sort(order[labels[order] >= 0][:limit])


def _check_labels(y: dict[str, np.ndarray], tokens: TokenFile) -> None:
    unknown = sorted(set(np.unique(y["test"])) - set(np.unique(y["train"])))
    if unknown:
        names = ", ".join(tokens.classes[i] if i < len(tokens.classes) else str(i) for i in unknown[:5])
        raise InputError(f"{tokens.path}: the test images used have classes that the training images lack: {names}")
    if len(np.unique(y["train"])) < 2:
        raise InputError(f"{tokens.path}: the training images are all of one class; a probe needs at least two")
    n, classes = len(y["train"]), len(np.unique(y["train"]))
    if n < 4 * classes:
        raise InputError(
            f"{tokens.path}: {n} training images of {classes} classes are too few to probe; at least {4 * classes} "
            f"are needed (four a class)"
        )
