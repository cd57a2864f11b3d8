"""The images of a probe: labelled, of the splits "train" and "test", as many of each class as far as it goes."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.files import sha256_of
from igpt_cli.images.chosen import Choose
from igpt_cli.probing.floors import colour_histogram, reduced
from igpt_cli.probing.protocol import Labels
from igpt_cli.statistics import in_turn
from igpt_cli.tokens.store import TokenFile, TokenSplit

#: Images used of the training and test splits when nothing is said and the device is a CPU.
CPU_IMAGES = (500, 300)
#: Pixels of images that are read at a time for the floors.
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
        """(n, V) float32: `floors.colour_histogram`."""
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


def balanced(train_images: int | None, test_images: int | None, seed: int) -> Choose:
    """The images that `choose_images` will choose, to be named before any is decoded.

    Where a split has no labels one image stays, so that what is wrong can be told.
    """
    limits = {"train": train_images, "test": test_images}

    def choose(split: str, labels: np.ndarray) -> np.ndarray:
        if split not in limits:
            return np.empty(0, np.int64)
        found = _labelled_rows(labels, limits[split], seed)
        return found if len(found) else np.arange(min(1, len(labels)))

    return choose


def choose_images(
    tokens: TokenFile, train_images: int | None, test_images: int | None, seed: int, as_kept: bool = False
) -> Images:
    """The labelled images of the splits "train" and "test", or as many of them as asked for.

    Raises:
        InputError: a split or labels are missing, or too few for a probe.
    """
    rows, labels = {}, {}
    for split, limit in (("train", train_images), ("test", test_images)):
        rows[split], labels[split] = _labelled(tokens.split(split), limit, seed)
    _check_labels(labels, tokens)
    return Images(tokens, rows, Labels(labels["train"], labels["test"]), as_kept)


def _labelled(split: TokenSplit, limit: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels (n,) of a split's labelled images, at most `limit`, balanced over the classes."""
    labels = np.asarray(split.labels)
    rows = _labelled_rows(labels, limit, seed)
    if not len(rows):
        raise InputError(
            f"{split.file.path}: no image of the split {split.name!r} has a label; a probe needs class folders"
        )
    return rows, labels[rows].astype(np.int64)


def _labelled_rows(labels: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """(n,) rising: the rows with a label, at most `limit`, balanced over the classes."""
    rows = np.flatnonzero(labels >= 0)
    return rows if limit is None or limit >= len(rows) else np.sort(in_turn(labels, rows, seed)[:limit])


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
