"""Select a subset of a source by label, before decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from igpt_cli.images.records import Record, Source, in_order
from igpt_cli.statistics import evenly_spaced

#: The label of an image that cannot be read; its row must not be selected.
UNREADABLE = -2

#: Called with a split's name and its labels (N,) int64, -1 = none, or `UNREADABLE`; returns the rows to use. When more
#: images turn out unreadable it should replace these rows only.
Select = Callable[[str, np.ndarray], np.ndarray]


def evenly(splits: Sequence[str] | None, most: int | None) -> Select:
    """Select at most `most` evenly spaced images of each of these splits (None: all splits), and one of each other.

    The next image that is not selected replaces an unreadable one.
    """

    def select(name: str, labels: np.ndarray) -> np.ndarray:
        rows = evenly_spaced(len(labels), most if not splits or name in splits else 1)
        readable = labels != UNREADABLE
        spare = np.setdiff1d(np.flatnonzero(readable), rows)
        selected = list(rows[readable[rows]])
        for row in rows[~readable[rows]][: len(spare)]:
            at = min(np.searchsorted(spare, row), len(spare) - 1)
            selected.append(spare[at])
            spare = np.delete(spare, at)
        return np.sort(np.array(selected, np.int64))

    return select


class SubsetSource(Source):
    """The images of a source that `select` names, in their order. The source is read once to learn its labels."""

    def __init__(self, source: Source, select: Select):
        self._source, self._select, self.kind = source, select, source.kind
        super().__init__(source.description, source.classes, self._select_rows(()), source.notes, source.doubts)
        self.selection = source.selection

    def replace(self, unreadable: Collection[str]) -> bool:
        """Select again without the images of these names; return whether others replace them."""
        before = self._rows
        self.counts = in_order(self._select_rows(unreadable))
        return any(self._rows[split] - before[split] for split in before)

    def _select_rows(self, unreadable: Collection[str]) -> dict[str, int]:
        labels: dict[str, list[int]] = {split: [] for split in self._source.counts}
        for record in self._source.records():
            labels[record.split].append(UNREADABLE if record.name in unreadable else record.label)
        rows = {split: self._select(split, np.array(n, np.int64)) for split, n in labels.items()}
        self._rows = {split: frozenset(map(int, indices)) for split, indices in rows.items()}
        return {split: len(indices) for split, indices in self._rows.items()}

    def records(self) -> Iterator[Record]:
        seen: Counter[str] = Counter()
        for record in self._source.records():
            row = seen[record.split]
            seen[record.split] += 1
            if row in self._rows[record.split]:
                yield record
