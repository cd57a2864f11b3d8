"""Images in tar and zip archives, never extracted.

An archive is listed once, then read from front to back. No path is opened or written because an archive says so, and
only links to other files of the archive are followed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from igpt_cli.errors import InputError
from igpt_cli.images.annotations import LARGEST_LIST, annotated_notes, is_annotations, stated_classes
from igpt_cli.images.choice import LABELS, key, mask_doubts, one_of_each_sample
from igpt_cli.images.folders import kinds, passed_over
from igpt_cli.images.layout import assemble, classes_of_files, layout_of, split_from_file_name
from igpt_cli.images.members import BrokenArchive, Listing, Member, follow_links, is_tar_header, slashes, tar_listing
from igpt_cli.images.records import (
    ARCHIVES,
    LARGEST_IMAGE,
    Record,
    Refused,
    Source,
    aside_doubts,
    brief,
    count,
    has_image_suffix,
    is_image_name,
    set_aside,
    unique,
)

#: Exceptions that reading a broken archive may raise.
BROKEN = (
    *(BrokenArchive, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError, struct.error),
    *(ValueError, NotImplementedError, OverflowError, RuntimeError),
)

#: The flag of a zip member whose name is UTF-8.
UTF8 = 0x800
#: Bytes of the largest `.cls` or `.json` file that is read.
LARGEST_MARK = 2**20

OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


class Tar:
    """A tar archive, compressed or not. `members` are its regular files in stored order."""

    kind = "tar"
    members: list[Member]

    def __init__(self, path: Path):
        self.path = path
        with reading(path), self._stream() as stream:
            compressed = path.stat().st_size if _opener(path) else None
            self.listing = follow_links(tar_listing(stream, compressed))
        self.members = self.listing.members

    def read(self, members: Sequence[Member], limit: int = LARGEST_IMAGE) -> Iterator[bytes]:
        """The bytes of some of the members; fastest in stored order."""
        with reading(self.path), self._stream() as stream:
            before, data = -1, b""
            for member in members:
                if member.size > limit:
                    yield too_large(member.size)
                    continue
                if member.offset != before:  # files that are links to each other lie at the same place
                    stream.seek(member.offset)
                    before, data = member.offset, stream.read(member.size)
                if len(data) < member.size:
                    raise EOFError("it ends in the middle of a file")
                yield data

    @contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        """A stream at the member's first byte; it does not end with the member."""
        with reading(self.path), self._stream() as stream:
            stream.seek(member.offset)
            yield stream

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        opener = _opener(self.path)
        with open(self.path, "rb") as file:
            # A large buffer makes the many short forward seeks free.
            with io.BufferedReader(opener(file) if opener else file, 2**20) as stream:
                yield stream


def _opener(path: Path) -> Callable[..., Any] | None:
    """The function that opens a compressed file; None for another one."""
    head = first_bytes(path, 8)
    return next((o for magic, o in OPENERS.items() if head.startswith(magic)), None)


def first_bytes(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


class Zip:
    """A zip archive. `members` are its files in the order of its directory; `offset` is the place in it."""

    kind = "zip"

    def __init__(self, path: Path):
        self.path = path
        with reading(path), zipfile.ZipFile(path) as archive:
            self._infos = archive.infolist()
            self.listing = follow_links(self._listing(archive))
        self.members = self.listing.members

    def _listing(self, archive: zipfile.ZipFile) -> Listing:
        listing = Listing()
        odd = []
        for i, info in enumerate(self._infos):
            name = slashes(_zip_name(info))
            if not (info.flag_bits & UTF8 or name.isascii()) and name == slashes(info.filename):
                odd.append(name)
            if stat.S_ISLNK(info.external_attr >> 16) and info.file_size < 4096:
                target = self._read_one(archive, Member(name, i, info.file_size), 4096)
                listing.links[name] = posixpath.join(posixpath.dirname(name), target.decode("utf-8", "surrogateescape"))
            elif not name.endswith("/"):
                listing.members.append(Member(name, i, info.file_size))
        if odd:
            listing.doubts.append(f"{count(len(odd), 'name')} not in UTF-8 read as code page 437: {brief(odd, 2)}")
        return listing

    def read(self, members: Sequence[Member], limit: int = LARGEST_IMAGE) -> Iterator[bytes]:
        """The bytes of some of the members; `Refused` for one that is encrypted, damaged or too large."""
        with reading(self.path), zipfile.ZipFile(self.path) as archive:
            for member in members:
                yield self._read_one(archive, member, limit)

    def _read_one(self, archive: zipfile.ZipFile, member: Member, limit: int) -> bytes:
        info = self._infos[member.offset]
        if member.size > limit:
            return too_large(member.size)
        if info.flag_bits & 1:
            return Refused("it is encrypted in the archive")
        try:
            with archive.open(info) as file:
                return file.read(member.size)  # never more than the directory declares
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as e:
            return Refused(f"it is damaged in the archive ({e})")
        except NotImplementedError as e:
            return Refused(f"its compression cannot be read ({e})")

    @contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        """A stream of the member's bytes."""
        info = self._infos[member.offset]
        with reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open(info) as stream:
            yield cast(BinaryIO, stream)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name of a zip member; many tools write UTF-8 without the flag."""
    if info.flag_bits & UTF8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a broken archive raises into one message."""
    try:
        yield
    except BROKEN as e:
        raise InputError(f"{path} is a broken or truncated archive: {e}; fetch or make it again") from e


def too_large(size: int) -> Refused:
    return Refused(f"it is said to hold {size / 2**20:,.0f} MB; more than {LARGEST_IMAGE // 2**20} MB is refused")


def open_archive(path: Path) -> Tar | Zip | None:
    """The archive at `path`, recognised by its content; None for another kind of file."""
    head = first_bytes(path, 512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Zip(path)
    if head.startswith(tuple(OPENERS)):
        try:
            with cast(Any, _opener(path))(path) as file:
                head = file.read(512)
        except BROKEN as e:
            raise InputError(f"{path} is broken or truncated: {e}") from e
    return Tar(path) if is_tar_header(head) else None


class ArchiveSource(Source):
    """The images in one archive or several, in stored order.

    Labels come from `.cls` files of the same name as in WebDataset shards, from folders, from `.json` files, or
    from the archives' names. The names of several archives precede the images' names; an archive's name may name the
    split if no folder does.
    """

    def __init__(
        self, description: str, archives: Sequence[Tar | Zip], titles: Sequence[str], column: str | None = None
    ):
        """`titles` are the archives' relative names, such as "train/shard-000.tar"; `column` is the suffix of the image
        to read of WebDataset samples with several."""
        self.kind = archives[0].kind
        self._archives = archives
        images = [[m for m in a.members if is_image_name(m.name)] for a in archives]
        others = [[m.name for m in a.members if not has_image_suffix(m.name)] for a in archives]
        if not any(images):
            raise InputError(f"{description} holds no images; it holds {_held(others)}")
        self._members, doubts, notes = one_of_each_sample(description, images, others, column)
        doubted: dict[str, list[str]] = {}
        for archive, title in zip(archives, titles, strict=True):
            notes += archive.listing.notes
            for doubt in archive.listing.doubts:
                doubted.setdefault(doubt, []).append(title)
        doubts += [doubt if len(archives) == 1 else f"{brief(where, 3)}: {doubt}" for doubt, where in doubted.items()]
        doubts += aside_doubts(m.name for archive in archives for m in archive.members)
        rest = [n for names in others for n in names if not (n.lower().endswith(".cls") or set_aside(n))]
        more, packed = passed_over(rest)
        names = [m.name for members in self._members for m in members]
        doubts += mask_doubts(names)
        shard = [i for i, members in enumerate(self._members) for _ in members]
        splits = [split_from_file_name(t) for t in titles]
        annotated, lists = self._annotations(names)
        layout = layout_of(names, [splits[i] for i in shard], annotated=annotated)
        split_names = [layout.splits[s] for s in layout.split]
        marks = self._marks(".cls", _text)
        if marks is None and not layout.classes and (marks := self._marks(".json", _json_label)):
            doubts.append("classes are the labels in .json files, as nothing else names any")
        if marks is not None:
            marked = assemble(split_names, marks, all_numbers=True)
            layout = replace(marked, doubts=(*layout.doubts, *marked.doubts))
        elif not layout.classes and (classes := classes_of_files([stem_of(t) for t in titles])):
            layout = assemble(split_names, [classes[i] for i in shard])
            doubts.append(f"classes are the names of the archives, as nothing else names any: {brief(layout.classes)}")
        elif not layout.classes and (len(archives) > 1 or more):
            notes.append("no classes: the images lie in no folders, have no .cls files, and the archives name none")
        stems = unique(stem_of(t) for t in titles)
        if len(archives) > 1:
            names = [f"{stems[i]}/{name}" for i, name in zip(shard, names, strict=True)]
        self._names = unique(names)
        self._layout = layout
        notes = [*layout.notes, *notes, *annotated_notes(annotated, lists), *more]
        super().__init__(description, layout.classes, layout.counts, notes, [*layout.doubts, *doubts, *packed])

    def _annotations(self, names: Sequence[str]) -> tuple[dict[str, str], dict[str, bytes]]:
        """{image: class} from annotation lists in the archives, and the lists."""
        texts: dict[str, bytes] = {}
        for archive in self._archives:
            lists = [m for m in archive.members if is_annotations(m.name)]
            texts |= dict(zip([m.name for m in lists], archive.read(lists, LARGEST_LIST), strict=True))
        return stated_classes(names, texts), texts

    def _marks(self, suffix: str, read: Callable[[bytes], str | None]) -> list[str | None] | None:
        """What `read` returns for each image's file with this suffix; None if there is no such file or label."""
        marks: list[str | None] = []
        for archive, images in zip(self._archives, self._members, strict=True):
            files = [m for m in archive.members if m.name.lower().endswith(suffix)]
            texts = archive.read(files, limit=LARGEST_MARK)
            by_key = {key(m.name): read(text) for m, text in zip(files, texts, strict=True)}
            marks += [by_key.get(key(m.name)) for m in images]
        return marks if any(m is not None for m in marks) else None

    def records(self) -> Iterator[Record]:
        layout = self._layout
        meta = zip(self._names, layout.split.tolist(), layout.label.tolist(), strict=True)
        for archive, members in zip(self._archives, self._members, strict=True):
            for data in archive.read(members):
                name, split, label = next(meta)
                yield Record(name, layout.splits[split], label, data)


def _text(data: bytes) -> str | None:
    """The label in a `.cls` file; -1 is none."""
    return None if isinstance(data, Refused) else _label(data.decode("utf-8", "replace"))


def _json_label(data: bytes) -> str | None:
    """The whole number or name that is the label in a `.json` file."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    stated = (fields.get(name) for name in LABELS) if isinstance(fields, dict) else ()
    label = next((v for v in stated if type(v) in (int, str)), None)
    return None if label is None else _label(str(label))


def _label(text: str) -> str | None:
    return None if text.strip() in ("", "-1") else text.strip()


def _held(others: Sequence[Sequence[str]]) -> str:
    """The contents of archives without images, for the message."""
    names = [n for rest in others for n in rest]
    held = kinds(names)
    if any(n.lower().endswith(ARCHIVES) for n in names):
        return f"{held}: archives in an archive. Unpack it once into a folder (tar -xf, unzip) and give the folder"
    return held


def stem_of(title: str) -> str:
    """A file's name without the suffixes of archives and arrays."""
    for suffix in (".gz", ".bz2", ".xz", *ARCHIVES):
        title = title.removesuffix(suffix)
    return title
