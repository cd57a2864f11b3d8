"""From what the user names to its images: `open_source`."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from igpt_cli.errors import InputError
from igpt_cli.images.archives import OPENERS, ArchiveSource, Tar, Zip, first_bytes, open_archive, stem_of
from igpt_cli.images.arrays import is_npz, npy_source, npz_source
from igpt_cli.images.concatenated import ConcatenatedSource
from igpt_cli.images.datasets import Folder, dataset_source
from igpt_cli.images.decode import BadImageError, header
from igpt_cli.images.embedded import EmbeddedSource
from igpt_cli.images.folders import folder_source, kinds, list_source, passed_over, walk
from igpt_cli.images.instead import what_instead
from igpt_cli.images.mat import is_mat, svhn_source
from igpt_cli.images.parquet import ParquetSource, is_table
from igpt_cli.images.records import ARCHIVES, PACKED, Record, Source, brief, count, is_image_name

__all__ = ["Record", "Source", "open_source", "paths_from"]

EMBEDDED = "embedded"

#: Byte order marks of UTF-8 and UTF-16.
BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

#: Suffixes of the files that are opened in a folder without images.
SHARDS = tuple(suffix for suffix in (*ARCHIVES, ".mat") if suffix not in PACKED)


def open_source(paths: Sequence[str | os.PathLike], column: str | None = None) -> Source:
    """Open images for reading. Each path is recognised by its content.

    Args:
        paths: folders, image files, tar and zip archives, Parquet files, CIFAR, STL-10, SVHN or downsampled ImageNet
            as published, NumPy arrays; several of them become one source. No path, or "embedded", is the embedded set.
        column: the column of Parquet files, or the suffix in WebDataset samples, of the images to read if there are
            several; None for the likeliest.

    Raises:
        InputError: paths are missing (all are named), cannot be read, or hold no images, or have no such `column`.

    >>> source = open_source(["photos/"])
    >>> source.counts, source.classes
    ({'train': 80, 'test': 20}, ['cat', 'dog'])
    """
    source = _opened([os.fspath(p) for p in paths] or [EMBEDDED], column)
    if column is not None:
        if source.kind not in (*("tar", "zip", "parquet"), ConcatenatedSource.kind):
            raise InputError(
                f"--column is for Parquet files and WebDataset shards; {source.description} is {source.kind}"
            )
        source.selection["column"] = column
    return source


def _opened(names: list[str], column: str | None) -> Source:
    missing = [n for n in names if n != EMBEDDED and not os.path.exists(n)]
    if missing:
        count = f" ({len(missing):,} of {len(names):,} paths)" if len(names) > 1 else ""
        odd = any(re.search(r"""[\t,;"'#]|^\s|\s$""", n) for n in missing)
        hint = "; a line of a list is one path, without quotes, comments and further columns" if odd else ""
        raise InputError(f"no such file or folder: {brief(missing)}{count}{hint}")
    images = [n for n in names if n != EMBEDDED and not os.path.isdir(n) and is_image_name(os.path.basename(n))]
    are_images = set(images)
    others = [n for n in names if n not in are_images] if len(images) < len(names) else []
    if not others:
        return list_source([Path(n) for n in images])
    if not images and EMBEDDED not in others and not any(os.path.isdir(n) for n in others):
        return _files([Path(n) for n in others], [os.path.basename(n) for n in others], brief(others, 3), column)
    sources = [list_source([Path(n) for n in images])] if images else []
    titles = ["files"] if images else []
    for name in others:
        if name == EMBEDDED:
            sources.append(EmbeddedSource())
        elif os.path.isdir(name):
            sources.append(_folder(Path(name), column))
        else:
            sources.append(_files([Path(name)], [os.path.basename(name)], name, column))
        titles.append(stem_of(os.path.basename(os.path.normpath(name))))
    return sources[0] if len(sources) == 1 else ConcatenatedSource(sources, titles)


def _folder(root: Path, column: str | None) -> Source:
    """The source in a folder: images, a published data set, or archives and arrays."""
    walked = walk(root)
    if walked.images:
        return folder_source(root, walked)
    others = walked.others
    folders = [root, *sorted({root / o.partition("/")[0] for o in others if o.count("/") == 1})]
    published = [s for f in folders if (s := dataset_source(Folder(f), str(root))) is not None]
    shards = [o for o in others if o.lower().endswith(SHARDS)] if not published else []
    if published:
        source, *rest = published
        source.add(walked.notes, walked.doubts)
        if rest:
            left = brief([f"{s.kind} with {count(len(s), 'image')}" for s in rest])
            source.add(doubts=[f"the folder holds other data sets, too, which are not read: {left}"])
    elif shards:
        source = _files([root / s for s in shards], shards, str(root), column)
        notes, _ = passed_over([o for o in others if o not in set(shards)])
        source.add([*walked.notes, *notes], walked.doubts)
    else:
        packed = any(o.lower().endswith(PACKED) for o in others)
        hint = "Unpack the archives first" if packed else "Images have suffixes such as .jpg"
        raise InputError(f"the folder {root} holds no images; it holds {kinds(others)}. {hint}")
    return source


def _files(paths: list[Path], titles: list[str], description: str, column: str | None) -> Source:
    """The source in one file or several that are not all named like images."""
    opened = [_archive(p) for p in paths]
    if len(paths) > 1 and all(is_table(first_bytes(p, 8)) for p in paths):
        return ParquetSource(description, paths, titles, column)
    if len(paths) == 1:
        return _file(paths[0], titles[0], opened[0], column)
    of_images = [a for a in opened if a is not None and not is_npz(a) and dataset_source(a, str(a.path)) is None]
    if len(of_images) == len(paths):
        return ArchiveSource(description, of_images, titles, column)
    sources = [_file(p, t, a, column) for p, t, a in zip(paths, titles, opened, strict=True)]
    return ConcatenatedSource(sources, [stem_of(t) for t in titles])


def _archive(path: Path) -> Tar | Zip | None:
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; name a file or a folder, or '-' for paths on stdin")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: no permission")
    return open_archive(path)


def _file(path: Path, title: str, archive: Tar | Zip | None, column: str | None) -> Source:
    """The source in one file."""
    if is_npz(archive):
        return npz_source(archive)
    if archive is not None:
        return dataset_source(archive, str(path)) or ArchiveSource(str(path), [archive], [title], column)
    head = first_bytes(path, 16)
    if head.startswith(b"\x93NUMPY"):
        return npy_source(path, title)
    if is_table(head):
        return ParquetSource(str(path), [path], [title], column)
    if is_mat(head):
        return svhn_source(path, title)
    if head.startswith((b"\x80", b"\0\0\x08\3", *OPENERS)) and (
        published := dataset_source(Folder(path.parent, path.name), str(path))
    ):
        return published
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
    """The kind of a file that is no source of images, for the message."""
    if "idx1-ubyte" in path.name:
        return "labels in MNIST's form; name the images, or the folder"
    if not head:
        return "empty"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, such as a token file"
    if head.startswith((b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")):
        tool = "zstd" if head[0] == 0x28 else "lz4"
        return f"compressed with {tool}; unpack it with `{tool} -d` first"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return "a compressed file, but not a compressed tar archive"
    if head.startswith((b"Rar!", b"7z\xbc\xaf")):
        return "a rar or 7z archive; repack it as tar or zip"
    if head.startswith(b"\x80"):
        return "a Python pickle; name the folder in which a published CIFAR lies"
    if head.startswith(b"MATLAB 7.3"):
        return "a MATLAB file of version 7.3; save it with -v7"
    if not (instead := what_instead(path)).startswith("not an image"):
        return instead
    if head.startswith(BOMS) or all(b in b"\t\n\r" or 32 <= b < 127 for b in head):
        return "a text file; for a list of paths use: igpt ... - < " + path.name
    return "of no kind that is known (folders, images, tar, zip, Parquet, Arrow, CIFAR, MNIST, STL-10, .npy, .npz)"


def paths_from(stream: BinaryIO, null: bool = False) -> list[Path]:
    """The paths in a byte stream, one a line, or each ended by NUL with `null`; empty lines are ignored.

    A byte order mark is removed; UTF-16, which Windows writes, is decoded.

    Raises:
        InputError: there is no path in it.
    """
    text = _plain_text(stream.read())
    entries = text.split(b"\0" if null else b"\n")
    paths = [Path(os.fsdecode(e if null else e.rstrip(b"\r"))) for e in entries if e.strip()]
    if not paths:
        raise InputError("no paths on stdin; give some, one a line: find photos -name '*.jpg' | igpt ... -")
    if null and b"\0" not in text and len(text.split(b"\n")) > 2:
        raise InputError("the paths on stdin are separated by lines, not by NUL; leave out -0")
    if not null and any("\0" in os.fspath(p) for p in paths):
        raise InputError("the paths on stdin are separated by NUL; read them with -0")
    return paths


def _plain_text(data: bytes) -> bytes:
    """The list without a byte order mark; UTF-16 is converted to the file system's encoding."""
    if data.startswith(codecs.BOM_UTF8):
        return data.removeprefix(codecs.BOM_UTF8)
    coding = "utf-16" if data.startswith(BOMS[1:]) else ""
    if not coding and b"\n\0" in data and data.count(0) * 3 > len(data):
        coding = "utf-16-le" if data[1] == 0 else "utf-16-be"
    if not coding:
        return data
    try:
        return os.fsencode(data.decode(coding))
    except UnicodeError as e:
        raise InputError(f"the paths on stdin begin as UTF-16 and are broken: {e}; write them as UTF-8") from e
