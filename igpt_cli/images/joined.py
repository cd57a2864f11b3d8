"""Several sources as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from igpt_cli.images.records import Record, Source, class_order, few, unique


class JoinedSource(Source):
    """Sources one after the other. Their titles stand before the images' names; classes of the same name are one."""

    kind = "several"

    def __init__(self, sources: Sequence[Source], titles: Sequence[str]):
        counts: Counter[str] = Counter()
        for source in sources:
            counts.update(source.counts)
        same = all(s.classes == sources[0].classes for s in sources)
        classes = sources[0].classes if same else class_order(c for s in sources for c in s.classes)
        notes = [f"{s.description}: {note}" for s in sources for note in s.notes]
        super().__init__(few([s.description for s in sources], 3), classes, dict(counts), notes)
        self._sources, self._titles = list(sources), unique(t.replace("/", "-") for t in titles)

    def records(self) -> Iterator[Record]:
        index = {name: i for i, name in enumerate(self.classes)}
        for source, title in zip(self._sources, self._titles, strict=True):
            labels = {i: index[name] for i, name in enumerate(source.classes)} | {-1: -1}
            for r in source.records():
                yield Record(f"{title}/{r.name}", r.split, labels[r.label], r.data)
