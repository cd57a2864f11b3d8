"""Some of the images of a source, chosen before any is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from igpt_cli.images.records import Record, Source

#: Called with a split's name and its labels (N,) int64, -1 = none; gives the rows that are wanted.
Choose = Callable[[str, np.ndarray], np.ndarray]


class ChosenSource(Source):
    """The images of a source that `choose` names, in their order. The source is read once to learn its labels."""

    def __init__(self, source: Source, choose: Choose):
        labels: dict[str, list[int]] = {split: [] for split in source.counts}
        for record in source.records():
            labels[record.split].append(record.label)
        self._source = source
        self._rows = {split: frozenset(map(int, choose(split, np.array(n, np.int64)))) for split, n in labels.items()}
        self.kind = source.kind
        counts = {split: len(rows) for split, rows in self._rows.items()}
        super().__init__(source.description, source.classes, counts, source.notes, source.doubts)

    def records(self) -> Iterator[Record]:
        """Each image that is wanted, once."""
        seen: Counter[str] = Counter()
        for record in self._source.records():
            row = seen[record.split]
            seen[record.split] += 1
            if row in self._rows[record.split]:
                yield record
