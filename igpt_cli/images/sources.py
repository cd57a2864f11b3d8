"""From what a user names to the images in it: `open_source`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from igpt_cli.errors import InputError
from igpt_cli.images.archives import ArchiveSource, Tar, Zip, open_archive, stem_of
from igpt_cli.images.arrays import is_npz, npy_source, npz_source
from igpt_cli.images.datasets import Folder, dataset_source
from igpt_cli.images.decode import BadImageError, header
from igpt_cli.images.embedded import EmbeddedSource
from igpt_cli.images.folders import folder_source, kinds, list_source, walk
from igpt_cli.images.joined import JoinedSource
from igpt_cli.images.parquet import ParquetSource
from igpt_cli.images.records import Record, Source, few, is_image_name

__all__ = ["Record", "Source", "open_source", "paths_from"]

EMBEDDED = "embedded"

#: Files in a folder without images that are opened as if they had been named one by one.
SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".parquet", ".npy", ".npz")


def open_source(paths: Sequence[str | os.PathLike]) -> Source:
    """Open images for reading. What lies at each path is recognised by its content.

    Args:
        paths: folders, image files, tar and zip archives, Parquet files, CIFAR or STL-10 as published, NumPy arrays;
            several of them become one source. None at all, or "embedded", is the embedded set.

    Raises:
        InputError: a path is missing (all missing ones are named), cannot be read, or holds no images.

    >>> source = open_source(["photos/"])
    >>> source.counts, source.classes
    ({'train': 80, 'test': 20}, ['cat', 'dog'])
    """
    names = [os.fspath(p) for p in paths] or [EMBEDDED]
    missing = [n for n in names if n != EMBEDDED and not os.path.exists(n)]
    if missing:
        count = f" ({len(missing):,} of {len(names):,} paths)" if len(names) > 1 else ""
        raise InputError(f"no such file or folder: {few(missing)}{count}")
    images = [n for n in names if n != EMBEDDED and not os.path.isdir(n) and is_image_name(os.path.basename(n))]
    others = [n for n in names if n not in set(images)] if len(images) < len(names) else []
    if not others:
        return list_source([Path(n) for n in images])
    if not images and EMBEDDED not in others and not any(os.path.isdir(n) for n in others):
        return _files([Path(n) for n in others], [os.path.basename(n) for n in others], few(others, 3))
    sources = [list_source([Path(n) for n in images])] if images else []
    titles = ["files"] if images else []
    for name in others:
        if name == EMBEDDED:
            sources.append(EmbeddedSource())
        elif os.path.isdir(name):
            sources.append(_folder(Path(name)))
        else:
            sources.append(_files([Path(name)], [os.path.basename(name)], name))
        titles.append(stem_of(os.path.basename(os.path.normpath(name))))
    return sources[0] if len(sources) == 1 else JoinedSource(sources, titles)


def _folder(root: Path) -> Source:
    """The source in a folder: images, or a published data set, or archives and arrays lying there."""
    images, others = walk(root)
    if images:
        return folder_source(root, images, _suffixes(others))
    for folder in (root, *sorted({root / o.partition("/")[0] for o in others if o.count("/") == 1})):
        if (found := dataset_source(Folder(folder), str(root))) is not None:
            return found
    if shards := [o for o in others if o.lower().endswith(SHARDS)]:
        return _files([root / s for s in shards], shards, str(root))
    held = kinds(_suffixes(others)) or "no files"
    raise InputError(f"the folder {root} holds no images; it holds {held}. Images are told by suffixes such as .jpg")


def _files(paths: list[Path], titles: list[str], description: str) -> Source:
    """The source in one file or several that are not all images by their names."""
    opened = [_archive(p) for p in paths]
    if len(paths) > 1 and all(_head(p, 4) == b"PAR1" for p in paths):
        return ParquetSource(description, paths, titles)
    if len(paths) == 1:
        return _file(paths[0], titles[0], opened[0])
    of_images = [a for a in opened if a is not None and not is_npz(a) and dataset_source(a, str(a.path)) is None]
    if len(of_images) == len(paths):
        return ArchiveSource(description, of_images, titles)
    sources = [_file(p, t, a) for p, t, a in zip(paths, titles, opened, strict=True)]
    return JoinedSource(sources, [stem_of(t) for t in titles])


def _archive(path: Path) -> Tar | Zip | None:
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; name a file or a folder, or '-' for paths on stdin")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: no permission")
    return open_archive(path)


def _file(path: Path, title: str, archive: Tar | Zip | None) -> Source:
    """The source in one file."""
    if is_npz(archive):
        return npz_source(archive)
    if archive is not None:
        return dataset_source(archive, str(path)) or ArchiveSource(str(path), [archive], [title])
    head = _head(path, 16)
    if head.startswith(b"\x93NUMPY"):
        return npy_source(path, title)
    if head.startswith(b"PAR1"):
        return ParquetSource(str(path), [path], [title])
    if is_image_name(path.name) or _looks_like_an_image(path):
        return list_source([path])
    raise InputError(f"{path} holds no images: it is {_kind(path, head)}")


def _looks_like_an_image(path: Path) -> bool:
    try:
        header(path)
    except BadImageError:
        return False
    return True


def _kind(path: Path, head: bytes) -> str:
    """In words, what a file that is no source of images is."""
    if not head:
        return "empty"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, such as a token file"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "compressed with zstd; unpack it with `zstd -d` first"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return "a compressed file, but not a compressed tar archive"
    if head.startswith((b"Rar!", b"7z\xbc\xaf")):
        return "a rar or 7z archive; repack it as tar or zip"
    if head.startswith(b"\x80"):
        return "a Python pickle; name the folder in which a published CIFAR lies"
    if _is_text(head):
        return "a text file; for a list of paths use: igpt ... - < " + path.name
    return "of no kind that is known (folders, images, tar, zip, Parquet, CIFAR, STL-10, .npy, .npz)"


def _is_text(head: bytes) -> bool:
    return all(b in b"\t\n\r" or 32 <= b < 127 for b in head)


def _head(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _suffixes(names: Sequence[str]) -> Counter[str]:
    return Counter(os.path.splitext(n)[1].lower() for n in names)


def paths_from(stream: BinaryIO, null: bool = False) -> list[Path]:
    """The paths in a byte stream, one a line, or each ended by NUL with `null`. Empty lines do not count.

    Raises:
        InputError: there is no path in it.
    """
    entries = stream.read().split(b"\0" if null else b"\n")
    paths = [Path(os.fsdecode(e if null else e.rstrip(b"\r"))) for e in entries if e.strip()]
    if not paths:
        raise InputError("no paths on stdin; give some, one a line: find photos -name '*.jpg' | igpt ... -")
    if not null and any("\0" in os.fspath(p) for p in paths):
        raise InputError("the paths on stdin are separated by NUL; read them with -0")
    return paths
