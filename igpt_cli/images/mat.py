"""SVHN's cropped digits: `train_32x32.mat`, `test_32x32.mat`, `extra_32x32.mat`.

This module reads the arrays of numbers in a MATLAB file of version 5, because SciPy's reader crashes the process on
damaged files. It ignores cells, structures and objects.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_cli.errors import FormatError
from igpt_cli.images.layout import split_from_file_name
from igpt_cli.images.records import LARGEST_IMAGE, MOST_RATIO, Record, Source

HEADER, MATRIX, COMPRESSED = 128, 14, 15
#: Element types by their codes.
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
#: Bytes that hold an array's flags, shape and name.
HEAD = 4096


class DamagedError(Exception):
    """A file that is no MATLAB file, or is damaged; the message says what is wrong."""


@dataclass(frozen=True)
class Array:
    """An array of numbers in a file: the place of its element, and where its values begin in it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    place: int
    size: int
    compressed: bool
    values_at: int


class MatSource(Source):
    """Images `X` (H, W, 3, N) uint8 and labels `y` (N, 1) of a MATLAB file; SVHN's label 10 is the digit 0."""

    kind = "mat"

    def __init__(self, path: Path, split: str):
        self._path = path
        self._arrays = _checked(path, lambda: arrays(path))
        images = self._arrays.get("X")
        if images is None or len(images.shape) != 4 or images.shape[2] != 3 or images.dtype != np.uint8:
            content = ", ".join(f"{n} {a.shape} {a.dtype}" for n, a in self._arrays.items()) or "no arrays"
            raise FormatError(
                f"{path} holds {content}; as in SVHN, images are `X` (H, W, 3, N) uint8, labels `y` (N, 1)"
            )
        n = images.shape[3]
        if not math.prod(images.shape) or math.prod(images.shape[:3]) > LARGEST_IMAGE:
            raise FormatError(f"{path} holds `X` of shape {images.shape}: no images, or absurdly large ones")
        labels = self._values("y").reshape(-1) if "y" in self._arrays else np.full(n, -1)
        if len(labels) != n or not np.isfinite(labels).all() or (labels % 1 != 0).any():
            raise FormatError(f"{path}: `y` has {len(labels):,} values; {n:,} whole numbers are expected")
        if labels.min() < -1 or labels.max() >= 2**20:
            raise FormatError(f"{path} holds labels from {labels.min()} to {labels.max()}; 0 and more are expected")
        svhn = labels.min() >= 1 and labels.max() == 10
        labels = labels.astype(np.int64) % 10 if svhn else labels.astype(np.int64)
        self._labels = labels.tolist()
        classes = [str(i) for i in range(10 if svhn else int(labels.max()) + 1)]
        super().__init__(str(path), classes, {split: n}, ["SVHN's label 10 is the digit 0"] if svhn else [])

    def records(self) -> Iterator[Record]:
        (split,) = self.counts
        images = self._values("X")
        for i, label in enumerate(self._labels):
            yield Record(f"{split}/{i:06d}", split, label, np.ascontiguousarray(images[..., i]))

    def _values(self, name: str) -> np.ndarray:
        return _checked(self._path, lambda: values(self._path, self._arrays[name]))


def svhn_source(path: Path, title: str) -> Source:
    """The images of one MATLAB file; its name may name the split."""
    extra = re.search(r"(^|[^a-z])extra([^a-z]|$)", title.lower())
    return MatSource(path, "extra" if extra else split_from_file_name(title))


def is_mat(head: bytes) -> bool:
    return head.startswith(b"MATLAB 5.0 MAT-")


def arrays(path: Path) -> dict[str, Array]:
    """The arrays of numbers in a MATLAB file by name, without reading their values.

    Raises:
        DamagedError: the file is damaged, or longer than it states.
    """
    named: dict[str, Array] = {}
    end = path.stat().st_size
    with open(path, "rb") as file:
        order = _order(file.read(HEADER))
        place = HEADER
        while place + 8 <= end:
            file.seek(place)
            kind, size = struct.unpack(f"{order}II", file.read(8))
            place += 8
            if place + size > end:
                raise DamagedError("it ends in the middle of an array")
            head, compressed = file.read(min(size, HEAD)), kind == COMPRESSED
            if compressed:
                head = zlib.decompressobj().decompress(head, HEAD)
                kind, _ = struct.unpack(f"{order}II", head[:8])
                head = head[8:]
            if kind == MATRIX and (described := _described(head, order)):
                name, shape, dtype, values_at = described
                if math.prod(shape) * dtype.itemsize > size * (MOST_RATIO if compressed else 1):
                    raise DamagedError(f"the array {name} of shape {shape} does not fit into its {size:,} bytes")
                named[name] = Array(shape, dtype, place, size, compressed, values_at + 8 * compressed)
            place += size
    return named


def values(path: Path, array: Array) -> np.ndarray:
    """The values of an array, in column-major order as stored."""
    count = math.prod(array.shape) * array.dtype.itemsize
    with open(path, "rb") as file:
        file.seek(array.place)
        data = file.read(array.size)
    if array.compressed:
        data = zlib.decompressobj().decompress(data, array.values_at + count)
    data = data[array.values_at : array.values_at + count]
    if len(data) < count:
        raise DamagedError(f"an array of shape {array.shape} is truncated")
    return np.frombuffer(data, array.dtype).reshape(array.shape, order="F")


def _described(head: bytes, order: str) -> tuple[str, tuple[int, ...], np.dtype, int] | None:
    """Name, shape, type of the stored numbers and where they begin; None if it is no array of numbers."""
    at, parts = 0, []
    for _ in range(3):  # flags, shape, name
        _, begin, size, at = _element(head, at, order)
        parts.append(head[begin : begin + size])
    kind, begin, size, _ = _element(head, at, order)
    shape = struct.unpack(f"{order}{len(parts[1]) // 4}i", parts[1][: len(parts[1]) // 4 * 4])
    flags = struct.unpack(f"{order}I", parts[0][:4])[0]
    if flags & 0xFF not in range(6, 16) or flags & 0x800 or kind not in TYPES:
        return None
    dtype = np.dtype(order + TYPES[kind])
    if not 1 < len(shape) < 9 or min(shape) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise DamagedError(f"an array of shape {shape} has {size:,} bytes of {dtype}")
    return parts[2].decode("latin-1"), shape, dtype, begin


def _element(data: bytes, at: int, order: str) -> tuple[int, int, int, int]:
    """(type, start, size, start of the next): 8 bytes of header, or 4 of a small element."""
    (kind,) = struct.unpack_from(f"{order}I", data, at)
    if kind >> 16:
        return kind & 0xFFFF, at + 4, kind >> 16, at + 8
    (size,) = struct.unpack_from(f"{order}I", data, at + 4)
    return kind, at + 8, size, at + 8 + -(-size // 8) * 8


def _order(header: bytes) -> str:
    """The byte order, as `struct` writes it."""
    mark = header[126:128]
    if mark not in (b"IM", b"MI"):
        raise DamagedError("its header is damaged")
    return "<" if mark == b"IM" else ">"


def _checked(path: Path, read):
    """The result of `read`; its errors become one message."""
    try:
        return read()
    except (DamagedError, struct.error, zlib.error, OSError) as e:
        raise FormatError(f"{path} is a broken MATLAB file: {e}") from e
