"""Inspect a source: splits, classes, sizes, unreadable images."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from igpt_cli.images.decode import BadImageError, header, load_rgb
from igpt_cli.images.records import Progress, Source

#: Images whose headers are read for their sizes, without a check.
SAMPLE = 256

LOSSY = "JPEG changes pixels: figures on these images are not quite comparable with published CIFAR figures"


@dataclass
class SourceReport:
    """The result of `inspect`.

    Attributes:
        kind, description, notes, splits: of the source; `splits` is {split: images}.
        classes: {class name: {split: images}}; "(none)" counts images without a label.
        sizes, types: {"WxH": images} and {"JPEG": images} as stored, the commonest first; "pixels" are arrays.
        looked_at: number of images whose size and type were read.
        checked: whether every image was decoded.
        bad: [{"name", "reason"}] of the unreadable images among those read.
    """

    kind: str
    description: str
    notes: list[str]
    splits: dict[str, int]
    classes: dict[str, dict[str, int]]
    sizes: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    looked_at: int = 0
    checked: bool = False
    bad: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(source: Source, check: bool = False, progress: Progress | None = None) -> SourceReport:
    """Count the images of a source by class, and read the sizes of the first ones; with `check`, decode every image."""
    labels: dict[int, Counter[str]] = {}
    sizes: Counter[str] = Counter()
    types: Counter[str] = Counter()
    report = SourceReport(source.kind, source.description, list(source.notes), source.counts, {}, checked=check)
    for done, record in enumerate(source.records(), 1):
        labels.setdefault(record.label, Counter())[record.split] += 1
        if check or report.looked_at < SAMPLE:
            report.looked_at += 1
            try:
                kind, (width, height) = header(record.data)
                sizes[f"{width}x{height}"] += 1
                types[kind] += 1
                if check and not isinstance(record.data, np.ndarray):
                    load_rgb(record.data)
            except BadImageError as e:
                report.bad.append({"name": record.name, "reason": e.reason})
        if progress:
            progress(done, len(source))
    names = dict(enumerate(source.classes)) | {-1: "(none)"}
    order = [*range(len(source.classes)), *([-1] if source.classes and -1 in labels else [])]
    report.classes = {names[i]: {s: labels.get(i, Counter())[s] for s in source.counts} for i in order}
    report.sizes, report.types = dict(sizes.most_common()), dict(types.most_common())
    if types["JPEG"] and "cifar" in source.description.lower():
        report.notes.append(LOSSY)
    return report
