"""Images in a folder, and images given as a list of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from igpt_cli.errors import InputError
from igpt_cli.files import reason
from igpt_cli.images.layout import Layout, layout_of
from igpt_cli.images.records import SPLITS, Record, Source, few, is_image_name, unique


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
    ):
        super().__init__(description, layout.classes, layout.counts, notes)
        self.kind = kind
        self._root, self._files, self._names, self._layout = root, files, names, layout

    def records(self) -> Iterator[Record]:
        layout = self._layout
        rows = zip(self._files, self._names, layout.split.tolist(), layout.label.tolist(), strict=True)
        for file, name, split, label in rows:
            data = self._root / file if self._root else Path(file)
            yield Record(name, layout.splits[split], label, data)


def folder_source(root: Path, names: list[str], others: Counter[str] | None = None) -> Source:
    """The images of a folder; `names` are theirs relative to it, sorted, as `walk` gives them."""
    notes = []
    if skipped := sum((others or {}).values()):
        notes.append(f"{skipped:,} files that are no images were passed over ({kinds(others)})")
    return FileSource("folder", str(root), names, names, layout_of(names, enter=3), root, notes)


def list_source(files: Sequence[Path]) -> Source:
    """Images given file by file. What all paths have in common counts for nothing, except a last folder that is
    called like a split."""
    absolute = [os.path.abspath(f).replace(os.sep, "/") for f in files]
    common = os.path.commonpath([os.path.dirname(a) for a in absolute])
    if os.path.basename(common).lower() in SPLITS:
        common = os.path.dirname(common)
    layout = layout_of([os.path.relpath(a, common).replace(os.sep, "/") for a in absolute], enter=10**9)
    names = unique(f.as_posix() for f in files)
    return FileSource("files", few(list(files), 3), list(files), names, layout)


def walk(root: Path) -> tuple[list[str], list[str]]:
    """All files below a folder, links followed: (images, other files), as sorted names relative to it with "/".

    Hidden files and the leftovers of macOS and Windows are in neither.

    Raises:
        InputError: a folder cannot be read.
    """
    images: list[str] = []
    others: list[str] = []
    seen = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link back to a folder above
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.name.startswith(".") or entry.name in ("__MACOSX", "Thumbs.db", "desktop.ini"):
                        continue
                    if entry.is_dir():
                        waiting.append(name + "/")
                    else:
                        (images if is_image_name(entry.name) else others).append(name)
        except OSError as e:
            raise InputError(f"cannot read the folder {root / folder}: {reason(e)}") from e
    return sorted(images), sorted(others)


def kinds(others: Counter[str] | None) -> str:
    """The commonest suffixes with counts: "12 .txt files, 1 .csv file, 3 files without a suffix"."""
    files = [(suffix, f"{n:,}", "file" if n == 1 else "files") for suffix, n in (others or Counter()).most_common(4)]
    return ", ".join(f"{n} {suffix} {file}" if suffix else f"{n} {file} without a suffix" for suffix, n, file in files)
