"""Open untrusted HDF5 files: nothing may reach other files or fill the memory.

HDF5 can refer to other files (soft and external links, external storage, virtual datasets) and declare terabytes that
are not stored. Keras read such files and leaked local ones (CVE-2026-1669). Here every link is checked before it is
followed, and every dataset before it is read.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from igpt_cli.errors import FormatError
from igpt_cli.files import require_file
from igpt_cli.hdf5_probe import probe

#: Nesting of groups, objects and attributes in the whole file, and dimensions: far above what our own files hold.
MAX_DEPTH = 8
MAX_MEMBERS = 10_000
MAX_NDIM = 8
#: A dataset may declare more than `MAX_UNSTORED` bytes only if at least a thousandth of them is stored.
MAX_UNSTORED = 4 * 2**30
MAX_EXPANSION = 1000
MAX_ATTRIBUTE = 2**24
#: Chunked datasets up to this many bytes are read as a trial; larger ones are memory-mapped or refused.
MAX_PROBED = 2**24
# Numbers, booleans and strings of fixed length, which take no more memory than their declared size.
_PLAIN_KINDS = "iufbS"


@contextmanager
def open_hdf5(path: str | os.PathLike, what: str = "a token file") -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, after a check that everything in it lies in the file itself.

    Args:
        path: the file, recognised by its content.
        what: the expected kind of file, for the messages.

    Raises:
        InputError: there is no such file, or it cannot be read.
        FormatError: it is another kind of file, unfinished, truncated or damaged, or holds a soft or external link,
            external storage, a virtual dataset, objects, variable-length strings, or far less than it declares.
    """
    path = Path(path)
    if path.name.endswith(".part") or ".part." in path.name:
        raise FormatError(f"{path} is unfinished: a command was interrupted while it wrote it; run the command again")
    path = require_file(path, what)
    if not h5py.is_hdf5(path):
        raise FormatError(f"{path} is {kind_of(path)}; {what} (HDF5) was expected there")
    probe(path, lambda: _read_structure(path))
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as e:
        raise FormatError(_cannot_open(path, str(e))) from e
    with file:
        try:
            _check(file, path)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as e:
            raise FormatError(_damaged(path, e)) from e
        try:
            yield file
        except (OSError, RuntimeError) as e:
            # HDF5's own message while the caller reads; other errors are about another file.
            if str(e).startswith(("Can't ", "Unable to ")):
                raise FormatError(_damaged(path, e)) from e
            raise


def _read_structure(path: Path) -> None:
    """Read all that a reader may need: links, attributes, and the chunks of datasets."""
    with h5py.File(path, "r", locking="best-effort") as file:
        _check(file, path)
        todo: list[h5py.Group] = [file]
        seen = set()
        while todo:
            for thing in [group := todo.pop(), *group.values()]:
                dict(thing.attrs)
                if isinstance(thing, h5py.Dataset):
                    thing.id.get_offset()
                    if thing.chunks and thing.nbytes <= MAX_PROBED:
                        thing[()]
                elif thing is not group and (place := h5py.h5o.get_info(thing.id).addr) not in seen:
                    seen.add(place)  # hard links may lead in a circle
                    todo.append(thing)


def _cannot_open(path: Path, message: str) -> str:
    if cut := re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", message):
        sizes = f"{int(cut[1]):,} bytes are there, {int(cut[2]):,} were written"
        return f"{path} is cut off: {sizes}; copy or download it again, or make it anew"
    if "lock" in message:
        hint = "on a file system that cannot lock, set HDF5_USE_FILE_LOCKING=FALSE"
        return f"{path} is locked: another process is writing it; {hint}"
    return f"{path} cannot be opened: its HDF5 structure is damaged ({_first_words(message)}); make it anew"


def _damaged(path: Path, e: Exception) -> str:
    return f"{path} is damaged: {_first_words(str(e))}; copy or download it again, or make it anew"


def _first_words(message: str) -> str:
    return message.strip("'\" ").split("\n")[0][:160]


def _check(file: h5py.File, path: Path) -> None:
    """Follow every hard link once, and check every dataset and attribute without reading it."""
    seen, todo, members = set(), [(file["/"], 0)], 0
    while todo:
        group, depth = todo.pop()
        members += len(group) + _check_attributes(group, path)
        if members > MAX_MEMBERS:
            raise FormatError(f"{path} is refused: it holds more than {MAX_MEMBERS:,} objects")
        if depth > MAX_DEPTH:
            raise FormatError(f"{path} is refused: its groups are nested more than {MAX_DEPTH} deep")
        for name in group:
            where = f"{group.name.rstrip('/')}/{name}"
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
                raise FormatError(f"{path} is refused: {where} is {kind}, which may lead out of the file")
            member = group[name]
            info = h5py.h5o.get_info(member.id)
            if info.addr in seen:  # a second name for the same object, or a circle
                continue
            seen.add(info.addr)
            if isinstance(member, h5py.Group):
                todo.append((member, depth + 1))
            elif isinstance(member, h5py.Dataset):
                _check_dataset(member, path, where)
                members += _check_attributes(member, path)
            else:
                raise FormatError(f"{path} is refused: {where} is neither a group nor a dataset")


def _check_dataset(dataset: h5py.Dataset, path: Path, where: str) -> None:
    # The layout comes first: reading a virtual dataset's shape may open other files.
    plan = dataset.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        raise FormatError(f"{path} is refused: {where} is a virtual dataset, which reads other files")
    if plan.get_external_count():
        raise FormatError(f"{path} is refused: {where} keeps its data in external storage, which reads other files")
    kind = dataset.dtype.kind
    if kind not in _PLAIN_KINDS:
        what = "strings of variable length" if h5py.check_string_dtype(dataset.dtype) else f"dtype {dataset.dtype}"
        raise FormatError(f"{path} is refused: {where} holds {what}; numbers or strings of fixed length are needed")
    if dataset.shape is None or dataset.ndim > MAX_NDIM:
        raise FormatError(f"{path} is refused: {where} has no shape, or more than {MAX_NDIM} dimensions")
    declared = math.prod(dataset.shape) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    if declared > MAX_UNSTORED and declared > MAX_EXPANSION * stored:
        raise FormatError(f"{path} is refused: {where} declares {declared:,} bytes, and {stored:,} are stored")


def _check_attributes(thing: h5py.Group | h5py.Dataset, path: Path) -> int:
    """The number of attributes, after a check that none can fill the memory."""
    count = len(thing.attrs)
    if count > MAX_MEMBERS:
        raise FormatError(f"{path} is refused: {thing.name} has {count:,} attributes")
    for name in thing.attrs:
        attribute = thing.attrs.get_id(name)
        many_objects = attribute.dtype.kind not in _PLAIN_KINDS and math.prod(attribute.shape or ()) > 1
        if many_objects or attribute.get_storage_size() > MAX_ATTRIBUTE:
            raise FormatError(f"{path} is refused: the attribute {name!r} of {thing.name} is not a plain value")
    return count


_SIGNATURES = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF", "a PDF document"),
    *((bytes([0x80, protocol]), "a Python pickle") for protocol in (2, 3, 4, 5)),
)


def kind_of(path: str | os.PathLike) -> str:
    """What kind of file this looks like, from its first bytes: "a PNG image", "a text file", "an empty file"."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if kind := next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None):
        return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file"
    if not head.strip(b"\x00"):
        return "a file of zero bytes, as a failed copy leaves"
    try:
        text = (head if len(head) < 512 else head[:-4]).decode("utf-8")
    except UnicodeDecodeError:
        text = "\x00"
    if "\x00" in text:
        return "a file of an unknown kind"
    return "a JSON file" if text.lstrip()[:1] in ("{", "[") else "a text file"


def _kind_of_zip(path: str | os.PathLike) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "a zip archive that is cut off or damaged"
    return "a NumPy archive (.npz)" if names and all(n.endswith(".npy") for n in names) else "a zip archive"
