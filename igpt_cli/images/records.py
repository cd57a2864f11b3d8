"""What every image source gives: records, class names, and counts by split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Called by long library functions with (done, total).
Progress = Callable[[int, int], None]

#: How folders and files name the splits, and what the splits are called here.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "unlabeled": "unlabeled",
    "unlabelled": "unlabeled",
}
ORDER = ("train", "val", "test")

#: What an image file's name ends with. HEIC is here so that such a photo is reported, not passed over in silence.
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
        ".ico",
        ".pcx",
        ".sgi",
        ".jp2",
        ".j2k",
        ".jpx",
        ".avif",
        ".avifs",
        ".heic",
        ".heif",
    ]
)

#: A single encoded image larger than this is refused unread.
LARGEST_IMAGE = 512 * 2**20


class Refused(bytes):
    """Stands for the bytes of an image that its source would not or could not read; `reason` says why."""

    reason: str

    def __new__(cls, reason: str) -> Refused:
        refused = super().__new__(cls)
        refused.reason = reason
        return refused

    def __reduce__(self):
        return Refused, (self.reason,)


@dataclass(frozen=True)
class Record:
    """One image, not yet decoded.

    Attributes:
        name: unique within the source, such as "train/cat/0001.jpg".
        split: "train", "val", "test", ...; "train" where the source has no splits.
        label: index into `Source.classes`; -1 = none.
        data: a file, encoded bytes, or pixels (H, W, 3) uint8.
    """

    name: str
    split: str
    label: int
    data: Path | bytes | np.ndarray


class Source(ABC):
    """A set of images that can be read from beginning to end as often as one likes.

    Attributes:
        kind: "folder", "files", "tar", "zip", "parquet", "cifar10", ...
        description: the source as the user named it, for provenance.
        classes: class names; a label is an index into them. Empty without labels.
        counts: {split: number of images}, in the order train, val, test, then others sorted.
        notes: remarks on what was found, one sentence each.
    """

    kind: str = ""

    def __init__(self, description: str, classes: Sequence[str], counts: dict[str, int], notes: Sequence[str] = ()):
        self.description = description
        self.classes = list(classes)
        self.counts = in_order(counts)
        self.notes = list(notes)

    def __len__(self) -> int:
        return sum(self.counts.values())

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Each image once, in the same order every time, in memory that does not grow with their number."""


def in_order(counts: dict[str, int]) -> dict[str, int]:
    """Counts by split, in the order train, val, test, then others sorted; empty splits left away."""
    splits = [s for s in ORDER if s in counts] + sorted(set(counts) - set(ORDER))
    return {s: int(counts[s]) for s in splits if counts[s]}


def is_image_name(name: str) -> bool:
    """Whether a file with this name is taken for an image: by its suffix, and not a leftover of macOS or Windows."""
    dot = name.rfind(".")
    if dot < 0 or name[dot:].lower() not in IMAGE_SUFFIXES:
        return False
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part not in (".", ".."))


def unique(names: Iterable[str]) -> list[str]:
    """The names, with "#2", "#3", ... behind those that come again; no two of the result are equal."""
    names = list(names)
    seen: Counter[str] = Counter()
    taken = set(names)
    for i, name in enumerate(names):
        seen[name] += 1
        while seen[name] > 1 and (numbered := f"{name}#{seen[name]}") in taken:
            seen[name] += 1
        if seen[name] > 1:
            names[i] = numbered
            taken.add(numbered)
    return names


def class_order(names: Iterable[str]) -> list[str]:
    """Class names once each, sorted; by value where all are whole numbers."""
    found = set(names)
    numbers = all(n.isdecimal() and n.isascii() for n in found)
    return sorted(found, key=lambda n: (int(n), n) if numbers else n)


def few(things: Sequence[object], most: int = 5) -> str:
    """The first few things as text, with how many more there are: "a, b, c and 7 more"."""
    shown = ", ".join(str(t) for t in things[:most])
    return shown if len(things) <= most else f"{shown} and {len(things) - most:,} more"
