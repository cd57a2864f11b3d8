"""Several sources, one after the other, as one source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from igpt_cli.images.layout import alike, classes_of_files
from igpt_cli.images.records import Record, Source, brief, class_order, unique


class ConcatenatedSource(Source):
    """Concatenated sources. Image names begin with the source's title; classes of the same name are one class."""

    kind = "several"

    def __init__(self, sources: Sequence[Source], titles: Sequence[str]):
        """`titles` name the sources. They are the classes of sources without labels whose titles differ, such as "cat"
        and "dog"."""
        counts: Counter[str] = Counter()
        for source in sources:
            counts.update(source.counts)
        self._classes = [list(s.classes) for s in sources]
        notes = [f"{s.description}: {n}" for s in sources for n in s.notes]
        doubts = [f"{s.description}: {n}" for s in sources for n in s.doubts]
        files = any(s.kind == "files" for s in sources)  # whose title is a word of ours
        named = classes_of_files(titles) if not files and not any(self._classes) else None
        if named:
            self._classes = [[name] if name else [] for name in named]
            shown = brief(sorted(filter(None, named)))
            doubts.append(f"classes are the names of the files, as nothing else names any: {shown}")
        self._labelled = bool(named)
        self._same, more = alike((str(i), c) for i, classes in enumerate(self._classes) for c in classes)
        if any(classes != self._classes[0] for classes in self._classes):
            classes = class_order(self._same.values())
            doubts += more
        else:
            classes, self._same = self._classes[0], {c: c for c in self._classes[0]}
        super().__init__(brief([s.description for s in sources], 3), classes, dict(counts), notes, doubts)
        self._sources, self._titles = list(sources), unique(t.replace("/", "-") for t in titles)

    def records(self) -> Iterator[Record]:
        index = {name: i for i, name in enumerate(self.classes)}
        for source, title, classes in zip(self._sources, self._titles, self._classes, strict=True):
            labels = {i: index[self._same[name]] for i, name in enumerate(classes)}
            for r in source.records():
                label = 0 if self._labelled and classes else r.label
                yield Record(f"{title}/{r.name}", r.split, labels.get(label, -1), r.data)
