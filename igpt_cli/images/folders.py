"""Images in a folder, or in a list of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from igpt_cli.errors import InputError
from igpt_cli.files import reason
from igpt_cli.images.annotations import LARGEST_LIST, annotated_notes, is_annotations, stated_classes
from igpt_cli.images.choice import mask_doubts
from igpt_cli.images.layout import Layout, layout_of
from igpt_cli.images.records import (
    ARCHIVES,
    SPLITS,
    Record,
    Source,
    aside_doubts,
    brief,
    count,
    has_image_suffix,
    set_aside,
    unique,
)

#: A folder that is reached by more links than this is refused: such links multiply without end.
MOST_WAYS = 100
#: Files that are counted in excluded folders, about.
MOST_LOOKED_AT = 100_000


class FileSource(Source):
    """Files on disk, each with a name; splits and labels from the layout."""

    def __init__(
        self,
        kind: str,
        description: str,
        files: Sequence[Path | str],
        names: Sequence[str],
        layout: Layout,
        root: Path | None = None,
        notes: Sequence[str] = (),
        doubts: Sequence[str] = (),
    ):
        super().__init__(description, layout.classes, layout.counts, [*layout.notes, *notes], [*layout.doubts, *doubts])
        self.kind = kind
        self._root, self._files, self._names, self._layout = root, files, names, layout

    def records(self) -> Iterator[Record]:
        layout = self._layout
        rows = zip(self._files, self._names, layout.split.tolist(), layout.label.tolist(), strict=True)
        for file, name, split, label in rows:
            data = self._root / file if self._root else Path(file)
            yield Record(name, layout.splits[split], label, data)


@dataclass
class Walked:
    """The files in a folder: sorted relative names of `images` and `others`, with "/"; remarks as in `Source`."""

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def folder_source(root: Path, walked: Walked) -> Source:
    """The images of a folder."""
    texts = {n: _text(root / n) for n in walked.others if is_annotations(n) and (root / n).is_file()}
    annotated = stated_classes(walked.images, texts)
    layout = layout_of(walked.images, enter=3, annotated=annotated)
    others, doubts = passed_over(walked.others)
    notes = [*walked.notes, *annotated_notes(annotated, texts), *others]
    doubts = [*walked.doubts, *doubts, *mask_doubts(walked.images)]
    return FileSource("folder", str(root), walked.images, walked.images, layout, root, notes, doubts)


def _text(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_LIST)
    except OSError as e:
        raise InputError(f"cannot read {path}: {reason(e)}") from e


def passed_over(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remarks on files that are not images: (notes, and doubts about archives, which may hold images)."""
    notes, doubts = [], []
    if packed := [n for n in names if n.lower().endswith(ARCHIVES)]:
        doubts.append(f"{count(len(packed), 'archive')} next to the images not opened: {brief(packed)}")
    if rest := [n for n in names if not n.lower().endswith(ARCHIVES)]:
        notes.append(f"{len(rest):,} files that are no images were passed over ({kinds(rest)})")
    return notes, doubts


def list_source(files: Sequence[Path]) -> Source:
    """Images listed file by file. The common path is ignored, except a last folder named like a split. Images in system
    folders are excluded, unless all are."""
    absolute = [os.path.abspath(f).replace(os.sep, "/") for f in files]
    common = os.path.commonpath([os.path.dirname(a) for a in absolute])
    if os.path.basename(common).lower() in SPLITS:
        common = os.path.dirname(common)
    places = [a[len(common) :].lstrip("/") for a in absolute]
    retained = [i for i, p in enumerate(places) if set_aside(os.path.dirname(p)) is None] or range(len(places))
    layout = layout_of([places[i] for i in retained], enter=10**9)
    names = unique(files[i].as_posix() for i in retained)
    doubts = aside_doubts(places) if len(names) < len(files) else []
    if again := [n for n, times in Counter(absolute).items() if times > 1]:
        doubts.append(f"{count(len(again), 'file')} given more than once, and read as often: {brief(again, 2)}")
    return FileSource("files", brief(list(files), 3), [files[i] for i in retained], names, layout, doubts=doubts)


def walk(root: Path) -> Walked:
    """All files below a folder, without hidden files and system folders.

    Links are followed, but for a link back to a folder above; a linked folder appears under each of its names.

    Raises:
        InputError: a folder cannot be read, or too many links lead to it.
    """
    walked = Walked()
    aside: list[str] = []
    dead: list[str] = []
    links: list[tuple[str, tuple[int, int]]] = []
    places: dict[tuple[int, int], list[str]] = {}
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        try:
            if (own := _identity(root / folder)) in above:
                continue
            places.setdefault(own, []).append(folder.rstrip("/"))
            if len(places[own]) > MOST_WAYS:
                raise InputError(f"more than {MOST_WAYS} links lead to the folder {root / folder}; remove some")
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    is_folder = _is_folder(entry)
                    if set_aside(entry.name):
                        aside += _images_below(root, name) if is_folder else [name]
                    elif is_folder:
                        waiting.append((name + "/", (*above, own)))
                        if entry.is_symlink():
                            links.append((name, _identity(root / name)))
                    elif has_image_suffix(entry.name):
                        walked.images.append(name)
                    elif is_folder is None or (entry.is_symlink() and not os.path.exists(root / name)):
                        dead.append(name)
                    elif entry.name.lower() not in ("thumbs.db", "desktop.ini"):
                        walked.others.append(name)
        except OSError as e:
            raise InputError(f"cannot read the folder {root / folder}: {reason(e)}") from e
    walked.images.sort()
    walked.others.sort()
    walked.doubts += aside_doubts(aside)
    if dead:
        walked.doubts.append(f"{count(len(dead), 'link')} to nothing passed over: {brief(sorted(dead))}")
    walked.notes += _linked(sorted(links), places)
    return walked


def _linked(links: list[tuple[str, tuple[int, int]]], places: dict[tuple[int, int], list[str]]) -> list[str]:
    """Remarks on links to folders whose images also appear under another name."""
    twice = [(n, sorted(p for p in places[own] if p != n)) for n, own in links if n in places.get(own, [])]
    said = [f"{name} is a link to {brief(others, 1)}" for name, others in twice if others]
    return [f"the same images are there under several names: {brief(said, 3)}"] if said else []


def _is_folder(entry: os.DirEntry) -> bool | None:
    """Whether it is a folder; None for a link that cannot be followed."""
    try:
        return entry.is_dir()
    except OSError:
        return None


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _images_below(root: Path, name: str) -> list[str]:
    """The readable files in an excluded folder, at most about `MOST_LOOKED_AT`."""
    below: list[str] = []
    for _, _, files in os.walk(root / name):
        below += [f"{name}/{f}" for f in files]
        if len(below) > MOST_LOOKED_AT:
            break
    return below


def kinds(names: Sequence[str]) -> str:
    """The commonest suffixes with counts: "12 .txt files, 1 .csv file, 3 files without a suffix"; or "no files"."""
    found = Counter(os.path.splitext(n)[1].lower() for n in names).most_common(4)
    return (
        ", ".join(count(n, f"{s} file") if s else f"{count(n, 'file')} without a suffix" for s, n in found)
        or "no files"
    )
