"""Hold out training images as a split "test"; check labels before decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.images.records import Record, Source, brief


class HeldOutSource(Source):
    """A source with part of "train" as the split "test": the same part of each class, drawn by seed."""

    def __init__(self, source: Source, part: float, seed: int = 0):
        """
        Raises:
            InputError: `part` is not between 0 and 1, there is a split "test" or no "train", or too few images.
        """
        if not 0 < part < 1:
            raise InputError(f"--test-part is {part}; it is a part of the training images, such as 0.2")
        if "test" in source.counts:
            n = source.counts["test"]
            raise InputError(f"{source.description} has a split test of {n:,} images; leave out --test-part")
        if "train" not in source.counts:
            raise InputError(
                f"{source.description} has no split train to hold out from; its splits: {', '.join(source.counts)}"
            )
        labels = labels_of(source)["train"]
        self._source, self._test = source, frozenset(_part_of_each(labels, part, seed).tolist())
        if not self._test:
            raise InputError(f"{source.description} has too few images of each class to hold {part:g} of them out")
        self.kind = source.kind
        n = len(self._test)
        counts = {**source.counts, "train": source.counts["train"] - n, "test": n}
        note = f"test: {n:,} of {len(labels):,} training images are held out, {part:g} of each class, seed {seed}"
        super().__init__(source.description, source.classes, counts, [*source.notes, note], source.doubts)
        self.selection = {**source.selection, "test_part": part, "test_seed": seed}

    def records(self) -> Iterator[Record]:
        place = -1
        for r in self._source.records():
            place += r.split == "train"
            is_test = r.split == "train" and place in self._test
            yield Record(r.name, "test", r.label, r.data) if is_test else r


def labels_of(source: Source) -> dict[str, np.ndarray]:
    """{split: (N,) int64, -1 = none}, the labels of all images in order, without decoding."""
    labels: dict[str, list[int]] = {split: [] for split in source.counts}
    for record in source.records():
        labels[record.split].append(record.label)
    return {split: np.array(numbers, np.int64) for split, numbers in labels.items()}


def require_labelled(source: Source, splits: Sequence[str]) -> None:
    """Check that the splits ("train", perhaps "test") exist and have labels; two classes or more, none in "test" alone.

    Raises:
        InputError: they do not; the message names the source and what to do.
    """
    if missing := [s for s in splits if s not in source.counts]:
        hint = "; --test-part 0.2 holds out a fifth of each class" if missing == ["test"] else ""
        raise InputError(
            f"{source.description} has no split {missing[0]!r}; its splits: {', '.join(source.counts)}{hint}"
        )
    classes = {split: Counter(labels[labels >= 0].tolist()) for split, labels in labels_of(source).items()}
    for split in splits:
        if not classes[split]:
            problem = f"{source.description}: no image of the split {split!r} has a label"
            raise InputError(f"{problem}; classes are learnt from images in class folders")
    if len(classes["train"]) < 2:
        only = source.classes[next(iter(classes["train"]))]
        problem = f"{source.description}: the training images are all of one class, {only}"
        raise InputError(f"{problem}; at least two are needed")
    if unknown := sorted(set(classes.get("test", ())) - set(classes["train"])):
        names = brief([source.classes[i] for i in unknown])
        raise InputError(f"{source.description}: the test images have classes that the training images lack: {names}")


def _part_of_each(labels: np.ndarray, part: float, seed: int) -> np.ndarray:
    """The rows to hold out: of each class `part`, rounded, at least one and never all."""
    rows = []
    for label in np.unique(labels):
        mine = np.random.default_rng([seed, len(labels), int(label) + 1]).permutation(np.flatnonzero(labels == label))
        rows.append(mine[: min(max(1, round(part * len(mine))), len(mine) - 1)])
    return np.sort(np.concatenate(rows))
