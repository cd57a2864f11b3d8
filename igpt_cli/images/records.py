"""What every image source yields: records, class names, counts by split."""

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
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
ORDER = ("train", "val", "test")

#: Suffixes of image files; HEIC is one so that such a photo is reported as unreadable, not ignored.
IMAGE_SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"),
        *(".pbm", ".pnm", ".tga", ".ico", ".pcx", ".sgi", ".jp2", ".j2k", ".jpx", ".avif", ".avifs", ".heic", ".heif"),
    ]
)

#: System folders in lower case: thumbnails, waste bins, snapshots, lost files.
SYSTEM_FOLDERS = frozenset(
    [
        *("__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found"),
        *(f"found.{i:03}" for i in range(10)),
        *("$extend", "$winreagent", "~snapshot", "_gsdata_", "thevolumesettingsfolder"),
        *("@__thumb", "@appstore", "@database", "@download", "@sharebin", "@sharesnap", "@synodrive", "@synoresource"),
        *("@transcode", "@img_bkp_cache", "@quarantine", "@spool"),
        *("network trash folder", "temporary items"),
    ]
)

#: Archives that cannot be read here, and how the parts of one end.
PACKED = (".rar", ".7z", ".zst", ".lz4", ".001", ".z01")

#: Files that may hold images of their own.
ARCHIVES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".zip"),
    *(".parquet", ".arrow", ".feather", ".npy", ".npz"),
    *PACKED,
)

#: Bytes of the largest encoded image that is read.
LARGEST_IMAGE = 512 * 2**20
#: zlib's largest compression ratio, about: a file that states more is damaged.
MOST_RATIO = 1100


class Refused(bytes):
    """Takes the place of the bytes of an image that its source cannot read or refuses; `reason` says why."""

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
    """A set of images, which `records` reads from the beginning each time.

    Attributes:
        kind: "folder", "files", "tar", "zip", "parquet", "cifar10", ...
        description: the source as the user named it, for provenance.
        classes: class names; a label is an index into them. Empty without labels.
        counts: {split: number of images}, in the order train, val, test, then others sorted.
        doubts: guesses and excluded images, one sentence each; `--strict` refuses them.
        notes: the doubts, and other remarks.
        selection: the options that selected and split the images, as token files and config.json record them:
            `column`, `test_part`, `test_seed`, each only if requested.
    """

    kind: str = ""

    def __init__(
        self,
        description: str,
        classes: Sequence[str],
        counts: dict[str, int],
        notes: Sequence[str] = (),
        doubts: Sequence[str] = (),
    ):
        self.description = description
        self.classes = list(classes)
        self.counts = in_order(counts)
        self.doubts: list[str] = []
        self.notes: list[str] = []
        self.selection: dict[str, str | int | float] = {}
        self.add(notes, doubts)

    def add(self, notes: Sequence[str] = (), doubts: Sequence[str] = ()) -> None:
        """Add remarks."""
        self.doubts = list(dict.fromkeys([*self.doubts, *doubts]))
        self.notes = list(dict.fromkeys([*self.doubts, *self.notes, *notes]))

    def __len__(self) -> int:
        return sum(self.counts.values())

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Each image once, in the same order every time, in memory that does not grow with their number."""


def in_split_order(names: Iterable[str]) -> list[str]:
    """Split names in the order train, val, test, then the others sorted."""
    return sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))


def in_order(counts: dict[str, int]) -> dict[str, int]:
    """Counts by split in `in_split_order`, without empty splits."""
    return {s: int(counts[s]) for s in in_split_order(counts) if counts[s]}


def is_image_name(name: str) -> bool:
    """Whether a file's name is an image's: it has such a suffix, is not hidden and in no system folder."""
    return has_image_suffix(name) and set_aside(name) is None


def has_image_suffix(name: str) -> bool:
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_SUFFIXES


def set_aside(name: str) -> str | None:
    """Why a file is excluded by its name: its system folder, or "hidden"; None if it is not.

    >>> set_aside("cat/@eaDir/1.jpg/THUMB.jpg"), set_aside("cat/._1.jpg"), set_aside("cat/1.jpg")
    ('@eaDir', 'hidden', None)
    """
    for part in name.split("/"):
        if part.lower() in SYSTEM_FOLDERS:
            return part
        if part.startswith(".") and part not in (".", ".."):
            return "hidden"
    return None


def aside_doubts(names: Iterable[str]) -> list[str]:
    """Remarks on files with image suffixes that `set_aside` excludes, but for those that macOS adds to archives
    (`__MACOSX`, `._1.jpg`), which are no images."""
    found: Counter[str] = Counter()
    for name in names:
        if has_image_suffix(name) and not name.rpartition("/")[2].startswith("._"):
            found[set_aside(name) or ""] += 1
    system = sorted(set(found) - {"", "hidden", "__MACOSX"})
    doubts = [f"{count(found['hidden'], 'hidden image')} passed over (names that begin with a dot)"]
    doubts += [f"{count(sum(found[s] for s in system), 'image')} in system folders passed over ({brief(system)})"]
    return [d for d in doubts if not d.startswith("0 ")]


def count(n: int, thing: str) -> str:
    """The number and the noun: "1 image", "1,200 images"."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def unique(names: Iterable[str]) -> list[str]:
    """The names, made unique by appending "#2", "#3", ... to repeated ones."""
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
    """Unique class names, sorted; by value if all are whole numbers."""
    found = set(names)
    numbers = all(n.isdecimal() and n.isascii() for n in found)
    return sorted(found, key=lambda n: (int(n), n) if numbers else n)


def brief(things: Sequence[object], most: int = 5) -> str:
    """The first `most` things as text, and the number of the others: "a, b, c and 7 more"."""
    shown = ", ".join(str(t) for t in things[:most])
    return shown if len(things) <= most else f"{shown} and {len(things) - most:,} more"
