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

#: Folders that systems keep for themselves (in lower case): thumbnails, waste bins, snapshots, lost files.
SYSTEM_FOLDERS = frozenset(
    [
        "__macosx",
        "__pycache__",
        "@eadir",
        "#recycle",
        "#snapshot",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "$recycle.bin",
        "recycler",
        "recycled",
        "system volume information",
        "lost+found",
        *(f"found.{i:03}" for i in range(10)),
        *("$extend", "$winreagent", "~snapshot", "_gsdata_", "thevolumesettingsfolder"),
        *("@__thumb", "@appstore", "@database", "@download", "@sharebin", "@sharesnap", "@synodrive", "@synoresource"),
        *("@transcode", "@img_bkp_cache", "@quarantine", "@spool"),
        "network trash folder",
        "temporary items",
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

#: A single encoded image larger than this is refused unread.
LARGEST_IMAGE = 512 * 2**20

#: zlib makes data at most about so many times smaller: a file that states more is damaged.
MOST_RATIO = 1100


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
        doubts: what was guessed, and which images were dropped, one sentence each; `--strict` refuses them.
        notes: the doubts, and other remarks.
        selection: the options that chose and divided the images, as token files and config.json record them:
            `column`, `test_part`, `test_seed`, each only where it was given.
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


def in_order(counts: dict[str, int]) -> dict[str, int]:
    """Counts by split, in the order train, val, test, then others sorted; empty splits left away."""
    splits = [s for s in ORDER if s in counts] + sorted(set(counts) - set(ORDER))
    return {s: int(counts[s]) for s in splits if counts[s]}


def is_image_name(name: str) -> bool:
    """Whether a file with this name is taken for an image: by its suffix, and neither hidden nor a system's own."""
    return has_image_suffix(name) and set_aside(name) is None


def has_image_suffix(name: str) -> bool:
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_SUFFIXES


def set_aside(name: str) -> str | None:
    """Why a file with this name is no image of the user's: its system folder, or "hidden"; None where it may be one.

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
    """Remarks on those of the names that would be images' if `set_aside` did not pass them over.

    What macOS adds to archives (`__MACOSX`, `._1.jpg`) is called like images, and holds none: it is not counted.
    """
    found: Counter[str] = Counter()
    for name in names:
        if has_image_suffix(name) and not name.rpartition("/")[2].startswith("._"):
            found[set_aside(name) or ""] += 1
    system = sorted(set(found) - {"", "hidden", "__MACOSX"})
    doubts = [f"{count(found['hidden'], 'hidden image')} passed over (names that begin with a dot)"]
    doubts += [f"{count(sum(found[s] for s in system), 'image')} in system folders passed over ({few(system)})"]
    return [d for d in doubts if not d.startswith("0 ")]


def count(n: int, thing: str) -> str:
    """
    >>> count(1, "image"), count(1200, "image")
    ('1 image', '1,200 images')
    """
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


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
