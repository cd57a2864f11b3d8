"""Parquet and Arrow tables of images and labels, as Hugging Face's `datasets` writes them.

Needs pyarrow.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.choice import LABELS, column_of
from igpt_cli.images.decode import BadImageError, header
from igpt_cli.images.layout import alike, classes_of_files, split_from_file_name
from igpt_cli.images.records import LARGEST_IMAGE, Record, Refused, Source, brief, class_order, unique

#: Rows read at a time.
BATCH = 64


@dataclass(frozen=True)
class _File:
    """One table: its path, split, name in the source, label column or None, and the class of all its images."""

    path: Path
    split: str
    stem: str
    label: str | None
    name: str | None = None


class ParquetSource(Source):
    """The images of Parquet or Arrow files, whose names name the splits ("test-00000-of-00001.parquet")."""

    kind = "parquet"

    def __init__(self, description: str, paths: Sequence[Path], titles: Sequence[str], column: str | None = None):
        """`column` is the image column; None for the likeliest."""
        _require_pyarrow()
        self._files: list[_File] = []
        self._image = ""
        counts: Counter[str] = Counter()
        stated: dict[Path, list[str]] = {}  # the class names in each file with labels
        doubts: list[str] = []
        self._same: dict[str, str] = {}
        stems = unique(t.removesuffix(".parquet").removesuffix(".arrow") for t in titles)
        for path, title, stem in zip(paths, titles, stems, strict=True):
            table = self._open(path)
            with _reading(path):
                likely, label, names, guessed = _columns(path, table.schema)
            if len(likely) > 1 and column is None:
                likely = [c for c in likely if self._holds_images(path, c)] or likely
            image, more = column_of(path, table.schema.names, likely, column)
            doubts += [*more, *guessed]
            label = None if label == image else label
            if (self._image or image) != image or (label and names not in (list(stated.values()) or [names])):
                raise FormatError(f"{path} has other columns or classes than {paths[0]}; give them one by one")
            self._image = image
            if label:
                stated[path] = names
            self._files.append(_File(path, split_from_file_name(title), stem, label))
            counts[self._files[-1].split] += table.num_rows
        if not sum(counts.values()):
            raise InputError(f"{description} holds no images: it has no rows")
        classes = next(iter(stated.values()), [])
        self._named = bool(classes)  # the file names the classes of its numbers
        if not classes:
            classes, more = self._labels_in_use()
            doubts += more
        of_files = None if stated else classes_of_files(stems)
        if of_files:
            self._files = [replace(f, name=name) for f, name in zip(self._files, of_files, strict=True)]
            classes = class_order(filter(None, of_files))
            doubts.append(f"classes are the names of the files, as nothing else names any: {brief(classes)}")
        bare = [f.path for f in self._files if stated and not f.label]
        notes = [f"no column of labels: {brief(bare)}"] if bare else []
        if not stated and not of_files:
            notes = [f"no labels: no column is called {', '.join(LABELS[:-1])} or {LABELS[-1]}"]
        super().__init__(description, classes, counts, notes, doubts)

    def records(self) -> Iterator[Record]:
        index = {name: i for i, name in enumerate(self.classes)}
        for split in self.counts:
            for file in (f for f in self._files if f.split == split):
                columns = [self._image, *([file.label] if file.label else [])]
                for row, (image, *label) in enumerate(self._rows(file.path, columns)):
                    data, name = _image_cell(image)
                    tail = f"-{PurePosixPath(name).name}" if name else ""
                    number = self._index(file, label[0], index) if label else index.get(file.name or "", -1)
                    yield Record(f"{file.stem}/{row:06d}{tail}", split, number, data)

    def _open(self, path: Path) -> Any:
        with _reading(path), open(path, "rb") as file:
            return _Parquet(path) if file.read(4) == b"PAR1" else _Arrow(path)

    def _rows(self, path: Path, columns: list[str]) -> Iterator[tuple]:
        table = self._open(path)
        with _reading(path):
            for batch in table.batches(columns):
                cells = [batch.column(batch.schema.get_field_index(c)).to_pylist() for c in columns]
                yield from zip(*cells, strict=True)

    def _labels_in_use(self) -> tuple[list[str], list[str]]:
        """The values of the label columns as class names, and doubts, if no file states class names."""
        pairs = {
            (file.split, value)
            for file in self._files
            if file.label
            for cell in self._rows(file.path, [file.label])
            if (value := _label(file, cell[0])) is not None
        }
        numbers = {v for _, v in pairs if isinstance(v, int)}
        if numbers and len(numbers) == len({v for _, v in pairs}) and 0 <= min(numbers) <= max(numbers) < 2**20:
            return [str(i) for i in range(max(numbers) + 1)], []
        self._same, doubts = alike((split, str(v)) for split, v in pairs)
        return class_order(self._same.values()), doubts

    def _holds_images(self, path: Path, column: str) -> bool:
        """Whether the first value of a column that is not empty is an image."""
        for row in itertools.islice(self._rows(path, [column]), BATCH):
            data = _image_cell(row[0])[0]
            if data and not isinstance(data, Refused):
                try:
                    header(data)
                except BadImageError:
                    continue
                return True
        return False

    def _index(self, file: _File, cell: Any, index: dict[str, int]) -> int:
        if (value := _label(file, cell)) is None:
            return -1
        if isinstance(value, int) and self._named:
            if 0 <= value < len(self.classes):
                return value
            raise FormatError(f"{file.path}: label {value} is used, and there are {len(self.classes)} class names")
        return index[self._same.get(str(value), str(value))]


class _Parquet:
    """A Parquet file, read page by page: a row group may be larger than the memory."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        self.schema, self.num_rows = self._file.schema_arrow, self._file.metadata.num_rows

    def batches(self, columns: list[str]) -> Iterator[Any]:
        return self._file.iter_batches(BATCH, columns=columns)


class _Arrow:
    """An Arrow file or stream, as Feather and `Dataset.save_to_disk` write them."""

    def __init__(self, path: Path):
        self._path = path
        batches = self._batches()
        self.schema = next(batches)
        self.num_rows = sum(batch.num_rows for batch in batches)

    def batches(self, columns: list[str]) -> Iterator[Any]:
        batches = self._batches()
        next(batches)
        for batch in batches:
            batch.validate(full=True)  # a damaged one could crash the process
            for at in range(0, batch.num_rows, BATCH):
                yield batch.select(columns).slice(at, BATCH)

    def _batches(self) -> Iterator[Any]:
        """The schema, then each batch of rows."""
        import pyarrow as pa

        with pa.memory_map(str(self._path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                yield reader.schema
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                reader = pa.ipc.open_stream(file)
                yield reader.schema
                yield from reader


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of a broken table into one message."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as e:  # pyarrow's errors are children of these
        kind = "Arrow" if path.suffix in (".arrow", ".feather") else "Parquet"
        raise InputError(f"{path} is a broken {kind} file: {_first_line(e)}") from e


def is_table(head: bytes) -> bool:
    """Whether a file with these first bytes is Parquet or Arrow."""
    return head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"))


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        install = "pip install 'igpt-cli[parquet]'"
        raise InputError(f"reading Parquet and Arrow files needs pyarrow; install it with: {install}") from None


def _columns(path: Path, schema: Any) -> tuple[list[str], str | None, list[str], list[str]]:
    """The columns that may hold images, the label column or None, the class names in the file, and doubts."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        checks = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
        return any(check(kind) for check in checks)

    features = _features(schema)
    images = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image" and n in schema.names]
    images += [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    images += [f.name for f in schema if is_bytes(f.type)]
    stated = {n: f.get("names") for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    stated = {n: v for n, v in stated.items() if n in schema.names}
    label = next((n for n in LABELS if n in stated), None) or next((n for n in LABELS if n in schema.names), None)
    label = label or next(iter(stated), None)
    doubts = []
    if label:
        kind = schema.field(label).type
        if types.is_dictionary(kind):  # a category of pandas
            kind = kind.value_type
        numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if not (numbers or texts or is_bytes(kind)):
            doubts = [f"the column {label!r} holds {kind}, and labels are whole numbers or names: it is not used"]
            label = None
    names = stated.get(label) if label else None
    return list(dict.fromkeys(images)), label, [str(n) for n in names] if isinstance(names, list) else [], doubts


def _label(file: _File, value: Any) -> int | str | None:
    """A cell of the label column as a number or a name; None without a label. (pandas writes numbers of which some are
    missing as floating point.)"""
    if value is None or value in (-1, b"", "") or value != value:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not value.is_integer():
        raise FormatError(f"{file.path}: the column {file.label!r} holds {value}; labels are whole numbers or names")
    return value if isinstance(value, str) else int(value)


def _features(schema: Any) -> dict[str, Any]:
    """The Hugging Face hub's description of the columns."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _image_cell(cell: Any) -> tuple[bytes, str]:
    """Encoded bytes, and the file name or ""."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if not isinstance(data, bytes):
        data = Refused("the row holds no bytes" + (", only a path, which is not followed" if name else ""))
    elif len(data) > LARGEST_IMAGE:
        data = Refused(f"it holds {len(data) / 2**20:,.0f} MB; more than {LARGEST_IMAGE // 2**20} MB is refused")
    return data, name if isinstance(name, str) else ""


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
