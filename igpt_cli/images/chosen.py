"""Some of the images of a source, chosen before any is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from igpt_cli.images.records import Record, Source, in_order
from igpt_cli.statistics import evenly_spaced

#: The label of an image that could not be read, of which no row is to be chosen.
UNREADABLE = -2

#: Called with a split's name and its labels (N,) int64, -1 = none, or `UNREADABLE`; returns the rows to use. With more
#: images unreadable it should return the same rows but for these.
Choose = Callable[[str, np.ndarray], np.ndarray]


def evenly(splits: Sequence[str] | None, most: int | None) -> Choose:
    """At most so many images of each of these splits (None: of all), evenly spaced; of others one, to name them.

    Each unreadable one is replaced by the next that is not chosen.
    """

    def choose(name: str, labels: np.ndarray) -> np.ndarray:
        rows = evenly_spaced(len(labels), most if not splits or name in splits else 1)
        readable = labels != UNREADABLE
        spare = np.setdiff1d(np.flatnonzero(readable), rows)
        chosen = list(rows[readable[rows]])
        for row in rows[~readable[rows]][: len(spare)]:
            at = min(np.searchsorted(spare, row), len(spare) - 1)
            chosen.append(spare[at])
            spare = np.delete(spare, at)
        return np.sort(np.array(chosen, np.int64))

    return choose


class ChosenSource(Source):
    """The images of a source that `choose` names, in their order. The source is read once to learn its labels."""

    def __init__(self, source: Source, choose: Choose):
        self._source, self._choose, self.kind = source, choose, source.kind
        super().__init__(source.description, source.classes, self._draw(()), source.notes, source.doubts)
        self.selection = source.selection

    def replace(self, unreadable: Collection[str]) -> bool:
        """Choose again without the images of these names; whether others came in."""
        before = self._rows
        self.counts = in_order(self._draw(unreadable))
        return any(self._rows[split] - before[split] for split in before)

    def _draw(self, unreadable: Collection[str]) -> dict[str, int]:
        labels: dict[str, list[int]] = {split: [] for split in self._source.counts}
        for record in self._source.records():
            labels[record.split].append(UNREADABLE if record.name in unreadable else record.label)
        rows = {split: self._choose(split, np.array(n, np.int64)) for split, n in labels.items()}
        self._rows = {split: frozenset(map(int, chosen)) for split, chosen in rows.items()}
        return {split: len(chosen) for split, chosen in self._rows.items()}

    def records(self) -> Iterator[Record]:
        """Each image that is wanted, once."""
        seen: Counter[str] = Counter()
        for record in self._source.records():
            row = seen[record.split]
            seen[record.split] += 1
            if row in self._rows[record.split]:
                yield record
