"""From what a user names to the images in it: `open_source`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from igpt_cli.errors import InputError
from igpt_cli.images.archives import ArchiveSource, open_archive
from igpt_cli.images.arrays import EmbeddedSource
from igpt_cli.images.folders import folder_source, kinds, list_source, walk
from igpt_cli.images.records import Record, Source, few, is_image_name

__all__ = ["Record", "Source", "open_source", "paths_from"]


def open_source(paths: Sequence[str | os.PathLike], resolution: int = 32) -> Source:
    """Open images for reading; what lies at each path is recognised by its content.

    Args:
        paths: folders, image files, archives, ...; none, or "embedded", is the embedded set.
        resolution: side in pixels at which the embedded images are drawn; nothing else depends on it.

    Raises:
        InputError: a path is missing (all missing ones are named), unreadable, or holds no images.
    """
    names = [os.fspath(p) for p in paths]
    if not names or names == ["embedded"]:
        return EmbeddedSource(resolution)
    if missing := [n for n in names if not os.path.exists(n)]:
        what = "does not exist" if len(missing) == 1 else f"do not exist ({len(missing):,} of {len(names):,} paths)"
        raise InputError(f"{few(missing)} {what}; give folders, image files, archives or arrays")
    if len(names) == 1 and os.path.isdir(names[0]):
        return _folder(Path(names[0]))
    if all(is_image_name(os.path.basename(n)) for n in names):
        return list_source([Path(n) for n in names])
    archives = [open_archive(Path(n)) for n in names]
    if all(archives):
        return ArchiveSource(few(names, 3), archives, [os.path.basename(n) for n in names])
    raise InputError(f"{few(names)}: not a kind of images that is known")


def _folder(root: Path) -> Source:
    images, others = walk(root)
    suffixes = Counter(os.path.splitext(o)[1].lower() for o in others)
    if images:
        return folder_source(root, images, suffixes)
    raise InputError(f"no images in the folder {root}; it holds {kinds(suffixes) or 'no files'}")


def paths_from(stream: BinaryIO, null: bool = False) -> list[Path]:
    """The paths in a byte stream, one a line, or each ended by NUL with `null`. Empty lines do not count."""
    entries = stream.read().split(b"\0" if null else b"\n")
    return [Path(os.fsdecode(e if null else e.rstrip(b"\r"))) for e in entries if e.strip()]
