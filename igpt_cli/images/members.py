"""The files of an archive, and tar headers, read without trust."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from posixpath import dirname, join, normpath
from typing import BinaryIO

from igpt_cli.images.records import brief, count

BLOCK = 512
#: Bytes of the longest name or attributes that are read.
LONGEST_HEADER = 2**20
#: Zeros after the end mark fill a record, at most this many bytes; an unfinished download has more.
LARGEST_RECORD = 2**21
#: An archive that unpacks to more than these bytes and this multiple of its size is refused.
BOMB_BYTES, BOMB_RATIO = 2**30, 1000

FILES, FOLDER, SPARSE, LINKS = b"\0 0 7".split(b" "), b"5", b"S", b"1 2".split(b" ")
#: Types without data, whatever their stated size: links, devices, folders, pipes.
EMPTY = b"1 2 3 4 5 6".split(b" ")
LONG_NAME, LONG_LINK, PAX = b"L", b"K", b"x X g".split(b" ")


class BrokenArchive(Exception):
    """An archive that is damaged or absurd; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive: where its bytes begin (tar: in the uncompressed stream), and their number."""

    name: str
    offset: int
    size: int


@dataclass
class Listing:
    """The files of an archive in stored order, its links {name: target in the archive}, and remarks as in `Source`."""

    members: list[Member] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tar_listing(stream: BinaryIO, compressed: int | None = None) -> Listing:
    """The files of a tar archive of the POSIX, GNU or older form. Devices, pipes and folders are ignored.

    Args:
        stream: the uncompressed archive at its beginning.
        compressed: bytes of the compressed file, if it is one.

    Raises:
        BrokenArchive: a header is damaged, or states a negative or absurd size.
    """
    listing, offset, sparse, name, link = Listing(), 0, 0, b"", b""
    attributes: dict[bytes, bytes] = {}
    always: dict[bytes, bytes] = {}
    while head := stream.read(BLOCK):
        if head == bytes(BLOCK):
            if _another_follows(stream):
                listing.doubts.append("another archive follows the end of the first; it is not read (GNU tar's -i)")
            elif compressed is None and (rest := stream.seek(0, 2) - offset) > LARGEST_RECORD:
                listing.doubts.append(f"{rest / 1e6:,.1f} MB after its end mark are not read: is it fully downloaded?")
            break
        if len(head) < BLOCK:
            raise _cut_off(listing, "a header")
        if not is_tar_header(head):
            raise BrokenArchive(f"the header at byte {offset:,} is damaged")
        kind, size = head[156:157], _number(head[124:136], offset)
        offset += BLOCK
        if kind in (LONG_NAME, LONG_LINK, *PAX):
            if size > LONGEST_HEADER:
                raise BrokenArchive(f"the header at byte {offset:,} states a name of {size:,} bytes")
            data = stream.read(_padded(size))[:size]
            if len(data) < size:
                raise _cut_off(listing, "a header")
            offset += _padded(size)
            if kind == LONG_NAME:
                name = data.split(b"\0")[0]
            elif kind == LONG_LINK:
                link = data.split(b"\0")[0]
            else:
                (always if kind == b"g" else attributes).update(_pax(data, offset))
            continue
        stated = always | attributes
        size = _decimal(stated[b"size"], offset) if b"size" in stated and kind not in EMPTY else size
        path = _text(stated.get(b"path") or name or _short_name(head)).removeprefix("./")
        target = _text(stated.get(b"linkpath") or link or head[157:257].split(b"\0")[0])
        more = kind == SPARSE and head[482]
        while more:
            block, offset = stream.read(BLOCK), offset + BLOCK
            if len(block) < BLOCK:
                raise _cut_off(listing, "a header")
            more = block[504]
        if kind == SPARSE or any(key.startswith(b"GNU.sparse") for key in attributes):
            sparse += 1
        elif kind in FILES and not path.endswith("/"):
            listing.members.append(Member(slashes(path), offset, size))
        elif kind in LINKS:
            listing.links[slashes(path)] = target if kind == b"1" else join(dirname(path), target)
        if kind not in EMPTY and size:
            begin, offset = offset, offset + _padded(size)
            if compressed is not None and offset > max(BOMB_BYTES, BOMB_RATIO * compressed):
                raise BrokenArchive(f"{compressed:,} bytes unpack to more than {offset:,}; refused as a bomb")
            stream.seek(offset - 1)
            if not stream.read(1):
                listing.members = [m for m in listing.members if m.offset < begin]
                raise _cut_off(listing, path)
        name, link, attributes = b"", b"", {}
    else:
        if name or link or attributes:
            raise _cut_off(listing, "a header")
        listing.doubts.append("the archive has no end mark: it may have been cut off, and files at its end be missing")
    if sparse:
        listing.doubts.append(f"{count(sparse, 'sparse file')} of the archive cannot be read, and passed over")
    return listing


def _cut_off(listing: Listing, inside: str) -> BrokenArchive:
    return BrokenArchive(f"it ends inside {inside}, after {count(len(listing.members), 'whole file')}")


def is_tar_header(block: bytes) -> bool:
    """Whether 512 bytes are a tar header: they hold their own checksum."""
    if len(block) < BLOCK or not block[0]:
        return False
    stated = block[148:156].strip(b" \0")
    if not stated or stated.strip(b"01234567"):
        return False
    rest = block[:148] + block[156:]
    signed = sum(rest) - 256 * sum(b > 127 for b in rest) if max(rest) > 127 else sum(rest)
    return int(stated, 8) in (sum(rest) + 8 * 32, signed + 8 * 32)


def slashes(name: str) -> str:
    """A name with "/" between folders, where some tools for Windows write "\\\\"."""
    return name.replace("\\", "/")


def follow_links(listing: Listing) -> Listing:
    """Add the files that links within the archive lead to, under the links' names; ignore other links.

    Raises:
        BrokenArchive: the links multiply.
    """
    if not listing.links:
        return listing
    targets = {normpath(slashes(name)): normpath(slashes(target)) for name, target in listing.links.items()}
    files = {normpath(m.name): m for m in listing.members}
    real = {name: _real(name, targets) for name in targets}
    made = {name: replace(files[to], name=name) for name, to in real.items() if to in files}
    folders = {name: to for name, to in real.items() if to not in files and to is not None}
    linked, rounds, before = len(made), 0, -1
    while rounds < 4 and len(made) > before:  # linked folders may hold links
        rounds, before, there = rounds + 1, len(made), files | made
        names = sorted(there)
        for name, to in folders.items():
            if not f"{name}/".startswith(f"{to}/"):
                renamed = {name + b[len(to) :]: b for b in _below(names, to)}
                made |= {n: replace(there[b], name=n) for n, b in renamed.items() if n not in files}
            if len(made) > 1000 + 20 * len(files):
                raise BrokenArchive(f"its {count(len(targets), 'link')} lead to more than {len(made):,} files")
    dead = sorted(name for name, to in real.items() if to not in files and not _below(sorted(files), to or "\0"))
    linked_folders = [f"{name} is a link to {to}" for name, to in sorted(folders.items()) if name not in dead]
    notes = [f"the same images are there under several names: {brief(linked_folders, 3)}"] if linked_folders else []
    notes += [f"{count(linked, 'file')} of the archive are links to others in it"] if linked else []
    doubts = [f"{count(len(dead), 'link')} to nothing in the archive passed over: {brief(dead)}"] if dead else []
    members = sorted([*listing.members, *made.values()], key=lambda m: m.offset)
    return Listing(members, {}, [*listing.doubts, *doubts], [*listing.notes, *notes])


def _below(names: Sequence[str], folder: str) -> list[str]:
    """The names in a folder, from sorted names."""
    first = bisect_left(names, f"{folder}/")
    return list(names[first : bisect_left(names, f"{folder}0")])  # "0" comes after "/"


def _real(path: str, targets: dict[str, str]) -> str | None:
    """The path with the links in every part followed; None if they are circular."""
    for _ in range(40):
        parts = path.split("/")
        heads = ("/".join(parts[:i]) for i in range(1, len(parts) + 1))
        if (head := next((h for h in heads if h in targets), None)) is None:
            return path
        path = normpath(targets[head] + path[len(head) :])
    return None


def _another_follows(stream: BinaryIO) -> bool:
    """Whether a header follows in the 10 kB after the end mark, which are otherwise zeros."""
    return any(is_tar_header(stream.read(BLOCK)) for _ in range(20))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(text: bytes, offset: int) -> int:
    """A size in octal digits, or in binary if it is large."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.split(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise BrokenArchive(f"the header at byte {offset:,} states the size {digits!r}")
    return int(digits or b"0", 8)


def _decimal(text: bytes, offset: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise BrokenArchive(f"the header before byte {offset:,} states the size {text[:20]!r}")
    return int(text)


def _pax(data: bytes, offset: int) -> dict[bytes, bytes]:
    """POSIX attributes: lines "length key=value", with the length of the line."""
    pairs, at = {}, 0
    while at < len(data) and data[at]:
        length, _, _ = data[at : at + 20].partition(b" ")
        line = data[at : at + int(length)] if length.isdigit() else b""
        key, is_pair, value = line[len(length) + 1 :].partition(b"=")
        if not is_pair or not line.endswith(b"\n"):
            raise BrokenArchive(f"the attributes before byte {offset:,} are damaged")
        pairs[key] = value[:-1]
        at += len(line)
    return pairs


def _short_name(head: bytes) -> bytes:
    name = head[:100].split(b"\0")[0]
    if head[257:263] == b"ustar\0" and head[345]:
        name = head[345:500].split(b"\0")[0] + b"/" + name
    return name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
