"""Rows in plain files until their number is known.

A memory-mapped dataset has a fixed size, and the number of unreadable images is unknown; so rows are appended to plain
files and copied into the HDF5 file at the end. A note, replaced atomically, states the number of valid rows: those that
a killed process wrote later are cut off.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from igpt_cli.documents import COUNT, COUNTS, OBJECT, TEXT, TEXTS, Kind, check_fields, read_json
from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.tokens import schema

NOTE = "progress.json"
#: The fields of a note, of `Spool` and of `tokenize`.
NOTE_FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("rows", "name_bytes", "names_size", "skipped"), COUNTS),
    **dict.fromkeys(("done", "alike"), COUNT),
    "last_name": TEXT,
    "settings": OBJECT,
    "bad": Kind(
        "pairs of a name and a reason", lambda v: isinstance(v, list) and all(TEXTS.holds(p) and len(p) == 2 for p in v)
    ),
}
_LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Spool:
    """Appendable columns for each split in a folder.

    Args:
        folder: made if it does not exist, and locked: a second process gets an OutputError.
        columns: {name: (dtype, shape of a row)}; the images' names are stored, too.
        resume: continue from the note in the folder, if there is one; else the folder is emptied.

    Attributes:
        rows: {split: number of rows}.
        name_bytes: {split: length of the longest name in UTF-8}.
        note: the note that was resumed; None otherwise.
    """

    def __init__(self, folder: Path, columns: dict[str, tuple[str, tuple[int, ...]]], resume: bool = False):
        self.folder, self.columns = folder, columns
        self.rows: dict[str, int] = {}
        self.name_bytes: dict[str, int] = {}
        self._names_size: dict[str, int] = {}
        self._files: dict[tuple[str, str], IO[bytes]] = {}
        self._marked: dict | None = None
        with full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(folder)
            self.note = read_note(folder) if resume else None
            if self.note is None:
                for path in folder.iterdir():
                    if path.name != _LOCK:
                        path.unlink()
            else:
                self._restore(self.note)

    def append(self, split: str, names: Sequence[str], values: dict[str, np.ndarray]) -> None:
        """Add the rows of one batch; `values` holds every column."""
        lines = "".join(json.dumps(n) + "\n" for n in names).encode()
        with full_disk(self.folder):
            for column, (dtype, row) in self.columns.items():
                array = np.ascontiguousarray(values[column], dtype).reshape(len(names), *row)
                self._file(split, column).write(array.data)
            self._file(split, schema.NAMES).write(lines)
        self.rows[split] = self.rows.get(split, 0) + len(names)
        self._names_size[split] = self._names_size.get(split, 0) + len(lines)
        self.name_bytes[split] = max(self.name_bytes.get(split, 1), *(len(encoded(n)) for n in names))

    def mark(self, **more) -> None:
        """Mark the rows appended so far as valid, with `more` for a resumed run."""
        # One assignment, so that an interrupt leaves a whole mark.
        sizes = {"rows": self.rows, "name_bytes": self.name_bytes, "names_size": self._names_size}
        self._marked = {**{k: dict(v) for k, v in sizes.items()}, **more}

    def save_note(self) -> None:
        """Write the last mark to the note, after the rows that it counts."""
        if self._marked is None:
            return
        with full_disk(self.folder):
            for file in self._files.values():
                file.flush()
            part = self.folder / f"{NOTE}.new"
            part.write_text(json.dumps(self._marked), encoding="utf-8")
            os.replace(part, self.folder / NOTE)

    @property
    def size(self) -> int:
        """Bytes of all rows; a split's names have the length of the longest."""
        row = sum(self._row_bytes(c) for c in self.columns)
        return sum(n * (row + self.name_bytes[split]) for split, n in self.rows.items())

    def _restore(self, note: dict) -> None:
        """Cut off everything that was written after the note."""
        for split, rows in note["rows"].items():
            sizes = {c: rows * self._row_bytes(c) for c in self.columns} | {schema.NAMES: note["names_size"][split]}
            for column, size in sizes.items():
                path = self._path(split, column)
                if not path.is_file() or path.stat().st_size < size:
                    self._lock.close()
                    raise InputError(
                        f"{self.folder} cannot be resumed: {path.name} is shorter than noted; start anew with --force"
                    )
                os.truncate(path, size)
        self.rows, self.name_bytes = dict(note["rows"]), dict(note["name_bytes"])
        self._names_size, self._marked = dict(note["names_size"]), note

    def _row_bytes(self, column: str) -> int:
        dtype, row = self.columns[column]
        return np.dtype(dtype).itemsize * math.prod(row)

    def blocks(self, split: str, column: str, rows: int) -> Iterator[np.ndarray]:
        """A column of a split in blocks of at most `rows` rows; names as fixed-length bytes."""
        self._file(split, column).flush()
        if column == schema.NAMES:
            with open(self._path(split, column), encoding="utf-8") as lines:
                while names := [encoded(json.loads(line)) for _, line in zip(range(rows), lines, strict=False)]:
                    yield np.array(names, f"S{self.name_bytes[split]}")
            return
        dtype, row = self.columns[column]
        with open(self._path(split, column), "rb") as file:
            while block := file.read(rows * self._row_bytes(column)):
                yield np.frombuffer(block, dtype).reshape(-1, *row)

    def close(self) -> None:
        """Close the files and the lock; the folder stays."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk was reported already when the rows were written
                file.close()
        self._files.clear()
        self._lock.close()

    def remove(self) -> None:
        """Close, and delete the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, split: str, column: str) -> Path:
        return self.folder / f"{split}.{column}"

    def _file(self, split: str, column: str) -> IO[bytes]:
        key = (split, column)
        if key not in self._files:
            self._files[key] = open(self._path(split, column), "ab")  # noqa: SIM115
        return self._files[key]


def read_note(folder: Path) -> dict | None:
    """The note of the last `save_note` in this folder, or None."""
    if not (folder / NOTE).is_file():
        return None
    try:
        note = read_json(folder / NOTE, "the note of an interrupted run")
        check_fields(note, NOTE_FIELDS, str(folder / NOTE), ("rows", "name_bytes", "names_size"))
        splits = note["rows"].keys()
        if not splits == note["name_bytes"].keys() == note["names_size"].keys() or any(map(_odd, splits)):
            raise FormatError(f"{folder / NOTE}: rows, name_bytes and names_size do not name the same splits")
    except FormatError as e:
        raise FormatError(f"{e}; remove {folder}, or start anew with --force") from e
    return note


def _odd(split: str) -> bool:
    """Whether a name cannot be a split's."""
    return not split or split.startswith(".") or "/" in split or not split.isprintable()


def encoded(name: str) -> bytes:
    """A name as UTF-8; other bytes of a file name are written as \\udc80..\\udcff."""
    return name.encode("utf-8", "backslashreplace")


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn the system's and HDF5's errors for a full disk into an OutputError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        number = getattr(e, "errno", None)
        if number in _FULL or "No space left" in str(e) or "File too large" in str(e):
            why = os.strerror(number or errno.ENOSPC)
            raise OutputError(f"cannot write {path}: {why}; free some space and try again") from e
        raise


def locked(folder: Path):
    """An open file that holds the lock of the folder until it is closed."""
    file = open(folder / _LOCK, "w")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        busy = f"another process is writing {folder.with_suffix('')}"
        raise OutputError(f"{busy}; wait for it, or choose another --out") from None
    except (ImportError, OSError):  # not every system and file system can lock
        pass
    return file
