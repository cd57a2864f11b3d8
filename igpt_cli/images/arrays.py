"""Images that are arrays already: the embedded set, and NumPy files."""

from __future__ import annotations

from collections.abc import Iterator

from igpt_cli.images.embedded import embedded_images
from igpt_cli.images.records import Record, Source


class EmbeddedSource(Source):
    """The embedded digits, drawn at one resolution."""

    kind = "embedded"

    def __init__(self, resolution: int):
        self._splits = embedded_images(resolution)
        counts = {split: len(part.images) for split, part in self._splits.items()}
        super().__init__("embedded", [str(d) for d in range(10)], counts)

    def records(self) -> Iterator[Record]:
        for split in self.counts:
            part = self._splits[split]
            for name, label, image in zip(part.names, part.labels.tolist(), part.images):
                yield Record(name, split, label, image)
