"""Images in tar and zip archives: read where they lie, never extracted.

An archive is looked through once for names, then read from front to back. The names inside are only ever names: no
path is opened or written because an archive says so, and links are passed over.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from igpt_cli.errors import InputError
from igpt_cli.images.folders import kinds
from igpt_cli.images.layout import assemble, layout_of, split_from_file_name
from igpt_cli.images.records import LARGEST_IMAGE, Record, Refused, Source, class_order, is_image_name, unique

#: What a broken archive may raise while it is read.
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError)

OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive: where its bytes begin (tar: in the uncompressed stream), and how many there are."""

    name: str
    offset: int
    size: int


class Tar:
    """A tar archive, compressed or not. `members` are its regular files in the order in which they are stored."""

    kind = "tar"
    members: list[Member]

    def __init__(self, path: Path):
        self.path = path
        with reading(path), self._stream() as stream:
            plain = _plain_members(stream)
        if plain is None:
            with reading(path), self._stream() as stream:
                plain = list(_members(stream))
        self.members = plain

    def read(self, members: Sequence[Member], limit: int = LARGEST_IMAGE) -> Iterator[bytes]:
        """The bytes of some of the members; quickest in the order in which they are stored."""
        with reading(self.path), self._stream() as stream:
            for member in members:
                if member.size > limit:
                    yield too_large(member.size)
                    continue
                stream.seek(member.offset)
                data = stream.read(member.size)
                if len(data) < member.size:
                    raise EOFError("it ends in the middle of a file")
                yield data

    @contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        """A stream that begins with the member's bytes (and goes on behind them)."""
        with reading(self.path), self._stream() as stream:
            stream.seek(member.offset)
            yield stream

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        with open(self.path, "rb") as file:
            head = file.read(8)
            file.seek(0)
            opener = next((o for magic, o in OPENERS.items() if head.startswith(magic)), None)
            # A large buffer makes the many short forward seeks free.
            with io.BufferedReader(opener(file) if opener else file, 2**20) as stream:
                yield stream


def _members(stream: BinaryIO) -> Iterator[Member]:
    """The regular files of any tar archive."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for info in tar:
            if info.isreg() and not info.issparse():
                yield Member(info.name.removeprefix("./"), info.offset_data, info.size)
            tar.members = []  # type: ignore[attr-defined]  # or tarfile would keep them all


def _plain_members(stream: BinaryIO) -> list[Member] | None:
    """The same for an archive of plain files and folders with short names, about five times as fast as tarfile.

    None at the first header that is anything else (links, long names, sparse files, damage): tarfile knows them all.
    """
    members: list[Member] = []
    offset = 0
    while len(head := stream.read(512)) == 512:
        if head == bytes(512):
            return members
        try:
            size = int(head[124:136].strip(b" \0"), 8)
            checksum = int(head[148:156].strip(b" \0"), 8)
        except ValueError:
            return None
        kind, name = head[156:157], head[:100].rstrip(b"\0")
        if kind not in (b"0", b"5") or checksum != sum(head) - sum(head[148:156]) + 8 * 32 or b"\0" in name:
            return None
        if head[257:263] == b"ustar\0" and head[345]:
            name = head[345:500].rstrip(b"\0") + b"/" + name
        if kind == b"0":
            members.append(Member(name.decode("utf-8", "surrogateescape").removeprefix("./"), offset + 512, size))
        offset += 512 + -(-size // 512) * 512
        stream.seek(offset)
    return None


class Zip:
    """A zip archive. `members` are its files in the order of its directory; `offset` is the place in it."""

    kind = "zip"

    def __init__(self, path: Path):
        self.path = path
        with reading(path), zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        self._infos = infos
        self.members = [Member(f.filename, i, f.file_size) for i, f in enumerate(infos) if not f.is_dir()]

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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a broken archive raises into one message."""
    try:
        yield
    except BROKEN as e:
        raise InputError(f"{path} is a broken or truncated archive: {e}") from e


def too_large(size: int) -> Refused:
    return Refused(f"it is said to hold {size / 2**20:,.0f} MB; more than {LARGEST_IMAGE // 2**20} MB is refused")


def open_archive(path: Path) -> Tar | Zip | None:
    """The archive at `path`, recognised by its content; None when it is something else."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Zip(path)
    if head.startswith(tuple(OPENERS)):
        return Tar(path) if is_compressed_tar(path) else None
    return Tar(path) if is_tar_header(head) else None


def is_tar_header(block: bytes) -> bool:
    """Whether the 512 bytes begin a tar archive: the "ustar" mark, or a right checksum in the older form."""
    if len(block) < 512 or not block[0]:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def is_compressed_tar(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(0)
        opener = next(o for magic, o in OPENERS.items() if head.startswith(magic))
        try:
            return is_tar_header(opener(file).read(512))
        except BROKEN as e:
            raise InputError(f"{path} is broken or truncated: {e}") from e


class ArchiveSource(Source):
    """The images in one archive or several, in the order in which they are stored.

    Labels come from folders, or from `.cls` files of the same name as in WebDataset shards. Where there are several
    archives, their names stand before the images' names; where no folder names a split, the archive's name may.
    """

    def __init__(self, description: str, archives: Sequence[Tar | Zip], titles: Sequence[str]):
        """`titles` are the archives' names relative to what was opened, such as "train/shard-000.tar"."""
        self.kind = archives[0].kind
        self._archives = archives
        self._members = [[m for m in a.members if is_image_name(m.name)] for a in archives]
        names = [m.name for members in self._members for m in members]
        shard = [i for i, members in enumerate(self._members) for _ in members]
        if not names:
            found = Counter(PurePosixPath(m.name).suffix for a in archives for m in a.members)
            raise InputError(f"{description} holds no images; it holds {kinds(found) or 'no files'}")
        splits = [split_from_file_name(t) for t in titles]
        layout = layout_of(names, [splits[i] for i in shard])
        if (marks := self._class_marks()) is not None:
            split_names = [layout.splits[s] for s in layout.split]
            layout = assemble(split_names, marks, _all_numbers(marks))
        stems = unique(stem_of(t) for t in titles)
        if len(archives) > 1:
            names = [f"{stems[i]}/{name}" for i, name in zip(shard, names, strict=True)]
        self._names = unique(names)
        self._layout = layout
        super().__init__(description, layout.classes, layout.counts)

    def _class_marks(self) -> list[str | None] | None:
        """The text of each image's `.cls` file, None for an image without; None when there are no such files."""
        marks: list[str | None] = []
        for archive, images in zip(self._archives, self._members, strict=True):
            files = [m for m in archive.members if m.name.endswith(".cls")]
            texts = archive.read(files, limit=1024)
            by_key = {_key(m.name): t.decode("utf-8", "replace").strip() for m, t in zip(files, texts, strict=True)}
            marks += [by_key.get(_key(m.name)) or None for m in images]
        return marks if any(m is not None for m in marks) else None

    def records(self) -> Iterator[Record]:
        layout = self._layout
        meta = zip(self._names, layout.split.tolist(), layout.label.tolist(), strict=True)
        for archive, members in zip(self._archives, self._members, strict=True):
            for data in archive.read(members):
                name, split, label = next(meta)
                yield Record(name, layout.splits[split], label, data)


def _key(name: str) -> str:
    """What belongs together in a WebDataset shard: the name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"


def stem_of(title: str) -> str:
    """A file's name without what says that it is an archive or an array."""
    for suffix in (".gz", ".bz2", ".xz", ".tgz", ".tar", ".zip", ".parquet", ".npy", ".npz"):
        title = title.removesuffix(suffix)
    return title


def _all_numbers(marks: Sequence[str | None]) -> list[str]:
    """Class names of `.cls` marks. Where they are numbers they are the labels themselves, so none is left out."""
    classes = class_order(m for m in set(marks) if m is not None)
    if all(c.isdecimal() and c.isascii() for c in classes) and int(classes[-1]) < 1_000_000:
        return [str(i) for i in range(int(classes[-1]) + 1)]
    return classes
