"""Parquet files with images and labels, as they are published on the Hugging Face hub. Needs pyarrow."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.choice import column_of
from igpt_cli.images.decode import BadImageError, header
from igpt_cli.images.layout import alike, split_from_file_name
from igpt_cli.images.records import LARGEST_IMAGE, Record, Refused, Source, class_order, unique

#: Names of label columns, the best first; CIFAR-100 has fine and coarse labels.
LABELS = ("label", "labels", "fine_label", "class", "cls", "target", "y")

#: Rows read at a time.
BATCH = 64


class ParquetSource(Source):
    """The images of one Parquet file or several; the files' names tell the splits ("test-00000-of-00001.parquet")."""

    kind = "parquet"

    def __init__(self, description: str, paths: Sequence[Path], titles: Sequence[str], column: str | None = None):
        """`column` is the one of the images; None for the likeliest."""
        self._parquet = _pyarrow()
        self._paths = list(paths)
        self._splits = [split_from_file_name(t) for t in titles]
        self._stems = unique(t.removesuffix(".parquet") for t in titles)
        self._image, self._label = "", None
        counts: dict[str, int] = {}
        classes: list[str] = []
        doubts: list[str] = []
        self._same: dict[str, str] = {}
        for i, (path, split) in enumerate(zip(self._paths, self._splits, strict=True)):
            file = self._open(path)
            image, label, names, guessed = self._columns(path, file.schema_arrow, column)
            doubts += [d for d in guessed if not i]
            if i and (image, label, names) != (self._image, self._label, classes):
                raise FormatError(f"{path} has other columns or classes than {self._paths[0]}; give them one by one")
            self._image, self._label, classes = image, label, names
            counts[split] = counts.get(split, 0) + file.metadata.num_rows
        if not sum(counts.values()):
            raise InputError(f"{description} holds no images: it has no rows")
        self._named = bool(classes)  # the file itself says what its numbers mean
        if not classes:
            classes, more = self._labels_in_use()
            doubts += more
        notes = [] if self._label else [f"no labels: no column is called {', '.join(LABELS[:-1])} or {LABELS[-1]}"]
        super().__init__(description, classes, counts, notes, doubts)

    def records(self) -> Iterator[Record]:
        index = {name: i for i, name in enumerate(self.classes)}
        columns = [c for c in (self._image, self._label) if c]
        for split in self.counts:
            for path, own, stem in zip(self._paths, self._splits, self._stems, strict=True):
                if own == split:
                    for row, cells in enumerate(self._rows(path, columns)):
                        data, name = _image_cell(cells[0])
                        label = self._index(path, cells[1], index) if self._label else -1
                        tail = f"-{PurePosixPath(name).name}" if name else ""
                        yield Record(f"{stem}/{row:06d}{tail}", split, label, data)

    def _open(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path)
        except (ValueError, OSError) as e:  # pyarrow's errors are children of these
            raise InputError(f"{path} is a broken Parquet file: {_first_line(e)}") from e

    def _rows(self, path: Path, columns: list[str]) -> Iterator[tuple]:
        try:
            for batch in self._open(path).iter_batches(BATCH, columns=columns):
                cells = [batch.column(batch.schema.get_field_index(c)).to_pylist() for c in columns]
                yield from zip(*cells, strict=True)
        except (ValueError, OSError) as e:
            raise InputError(f"{path} is a broken Parquet file: {_first_line(e)}") from e

    def _labels_in_use(self) -> tuple[list[str], list[str]]:
        """Class names where the file names none, the different values of the label column, and doubts of them."""
        if not self._label:
            return [], []
        pairs = {
            (split, cell[0])
            for path, split in zip(self._paths, self._splits, strict=True)
            for cell in self._rows(path, [self._label])
            if cell[0] is not None and cell[0] != -1
        }
        values = {v for _, v in pairs}
        if values and all(isinstance(v, int) for v in values) and 0 <= min(values) <= max(values) < 2**20:
            return [str(i) for i in range(max(values) + 1)], []
        self._same, doubts = alike((split, str(v)) for split, v in pairs)
        return class_order(self._same.values()), doubts

    def _columns(self, path: Path, schema: Any, column: str | None) -> tuple[str, str | None, list[str], list[str]]:
        """The image column, the label column or None, the class names that the file states, and what was guessed."""
        likely, label, names = _columns(path, schema)
        if len(likely) > 1 and column is None:
            likely = [c for c in likely if self._holds_images(path, c)] or likely
        image, doubts = column_of(path, schema.names, likely, column)
        return image, None if label == image else label, names, doubts

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

    def _index(self, path: Path, value: Any, index: dict[str, int]) -> int:
        if value is None or value == -1:
            return -1
        if isinstance(value, int) and self._named:
            if 0 <= value < len(self.classes):
                return value
            raise FormatError(f"{path}: label {value} is used, and there are {len(self.classes)} class names")
        return index[self._same.get(str(value), str(value))]


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "reading Parquet files needs pyarrow; install it with: pip install 'igpt-cli[parquet]'"
        ) from None
    return pyarrow.parquet


def _columns(path: Path, schema: Any) -> tuple[list[str], str | None, list[str]]:
    """The columns that may hold images, the label column or None, and the class names that the file states."""
    import pyarrow as pa

    features = _features(schema)
    images = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image" and n in schema.names]
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            images.append(field.name)
    images += [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    stated = {n: f.get("names") for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    stated = {n: v for n, v in stated.items() if n in schema.names}
    label = next((n for n in LABELS if n in stated), None) or next(iter(stated), None)
    label = label or next((n for n in LABELS if n in schema.names), None)
    if label:
        kind = schema.field(label).type
        if pa.types.is_dictionary(kind):  # a category of pandas
            kind = kind.value_type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise FormatError(f"{path}: the column {label!r} holds {kind}; labels are whole numbers or names")
    names = stated.get(label) if label else None
    return list(dict.fromkeys(images)), label, [str(n) for n in names] if isinstance(names, list) else []


def _features(schema: Any) -> dict[str, Any]:
    """What the Hugging Face hub writes about the columns."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _image_cell(cell: Any) -> tuple[bytes, str]:
    """Encoded bytes and the file name, if there is one."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if not isinstance(data, bytes):
        data = Refused("the row holds no bytes" + (", only a path, which is not followed" if name else ""))
    elif len(data) > LARGEST_IMAGE:
        data = Refused(f"it holds {len(data) / 2**20:,.0f} MB; more than {LARGEST_IMAGE // 2**20} MB is refused")
    return data, name if isinstance(name, str) else ""


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
