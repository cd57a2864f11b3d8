"""Images that are arrays already: NumPy files.

A `.npy` file holds images (N, H, W, 3) uint8. A `.npz` file holds `images` and, if there are labels, `labels` (N,);
several splits as `train_images` and `train_labels`, `x_test` and `y_test`, ...; and class names as `classes`.
Both are read image by image, and never unpickled.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np

from igpt_cli.errors import FormatError
from igpt_cli.images.archives import BROKEN, Zip
from igpt_cli.images.layout import split_from_file_name
from igpt_cli.images.records import LARGEST_IMAGE, SPLITS, Record, Source, in_order

IMAGE_KEYS = ("images", "image", "imgs", "x", "data", "arr")
LABEL_KEYS = ("labels", "label", "y", "targets", "target")
CLASS_KEYS = ("classes", "class_names", "label_names")

#: Opens a stream of one array file from its beginning.
Opener = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class Stored:
    """One array in a file: its header is read, its values are not yet."""

    title: str
    opener: Opener
    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self, size: int, count: int) -> Iterator[bytes]:
        """`count` blocks of `size` bytes from the first value on."""
        with self.opener() as stream:
            _header(stream, self.title)
            for _ in range(count):
                try:
                    block = stream.read(size)
                except (*BROKEN, NotImplementedError, RuntimeError) as e:
                    raise FormatError(f"{self.title} is damaged: {e}") from e
                if len(block) < size:
                    raise FormatError(f"{self.title} is truncated: it holds less than its {self.shape} values")
                yield block

    def values(self) -> np.ndarray:
        """All values; for small arrays."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return np.frombuffer(next(self.blocks(size, 1)), self.dtype).reshape(self.shape)


class ArraySource(Source):
    """Images in NumPy arrays."""

    def __init__(
        self, kind: str, description: str, splits: dict[str, tuple[Stored, Stored | None]], classes: list[str]
    ):
        """`splits`: {split: (images, labels or None)}."""
        self.kind = kind
        self._splits = splits
        self._labels = {s: _labels(labels, images.shape[0]) for s, (images, labels) in splits.items()}
        top = max((int(v.max(initial=-1)) for v in self._labels.values()), default=-1)
        if classes and top >= len(classes):
            raise FormatError(f"{description}: label {top} is used, and there are {len(classes)} class names")
        classes = classes or [str(c) for c in range(top + 1)]
        super().__init__(description, classes, {s: images.shape[0] for s, (images, _) in splits.items()})

    def records(self) -> Iterator[Record]:
        for split in self.counts:
            images, shape = self._splits[split][0], self._splits[split][0].shape[1:]
            blocks = images.blocks(math.prod(shape), images.shape[0])
            for i, (block, label) in enumerate(zip(blocks, self._labels[split].tolist(), strict=True)):
                yield Record(f"{split}/{i:06d}", split, label, np.frombuffer(block, np.uint8).reshape(shape))


def npy_source(path: Path, title: str) -> Source:
    """The images of one `.npy` file; its name may name the split."""
    return ArraySource(
        "npy", str(path), {split_from_file_name(title): (_images(path, lambda: open(path, "rb")), None)}, []
    )


def npz_source(archive: Zip) -> Source:
    """The images of one `.npz` file."""
    path = archive.path
    images: dict[str, Stored] = {}
    labels: dict[str, Stored] = {}
    classes: list[str] = []
    keys = []
    for member in archive.members:
        key = member.name.removesuffix(".npy")
        keys.append(key)
        words = re.split(r"[_\-./\d]+", key.lower())
        split = next((SPLITS[w] for w in words if w in SPLITS), split_from_file_name(path.name))
        stored = lambda m=member, k=key: _stored(f"{path}[{k!r}]", lambda: archive.open(m))  # noqa: E731
        if key.lower() in CLASS_KEYS:
            classes = _class_names(stored())
        elif any(w in IMAGE_KEYS for w in words):
            images[split] = _checked(stored())
        elif any(w in LABEL_KEYS for w in words):
            labels[split] = stored()
    if not images:
        raise FormatError(
            f"{path} holds no images that can be told by their names; it holds {', '.join(keys) or 'nothing'}. "
            "Call them `images` and `labels`, or `train_images`, `train_labels`, `test_images`, ..."
        )
    return ArraySource(
        "npz", str(path), {s: (images[s], labels.get(s)) for s in in_order(dict.fromkeys(images, 1))}, classes
    )


def is_npz(archive: object) -> TypeGuard[Zip]:
    """Whether an opened archive is a zip of nothing but `.npy` files."""
    return isinstance(archive, Zip) and bool(archive.members) and all(m.name.endswith(".npy") for m in archive.members)


def _images(path: Path, opener: Opener) -> Stored:
    return _checked(_stored(str(path), opener))


def _stored(title: str, opener: Opener) -> Stored:
    with opener() as stream:
        shape, dtype = _header(stream, title)
    return Stored(title, opener, shape, dtype)


def _header(stream: BinaryIO, title: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array that begins here; the stream then stands at its first value."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
    except (ValueError, *BROKEN, NotImplementedError, RuntimeError, zipfile.BadZipFile) as e:
        raise FormatError(f"{title} is a broken NumPy file: {str(e).splitlines()[0]}") from e
    if dtype.hasobject:
        raise FormatError(f"{title} holds Python objects, which are never loaded; save whole numbers (uint8)")
    if columns_first and len(shape) > 1:
        raise FormatError(f"{title} is stored column by column; save it after numpy.ascontiguousarray")
    return shape, dtype


def _checked(stored: Stored) -> Stored:
    """The array, if it holds images."""
    shape, dtype, title = stored.shape, stored.dtype, stored.title
    problem = f"{title} has shape {shape} and type {dtype}; images are (N, H, W, 3) uint8"
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise FormatError(f"{problem}: move the channels to the end with transpose(0, 2, 3, 1)")
    if len(shape) == 4 and shape[3] == 3 and dtype != np.uint8:
        raise FormatError(f"{problem}: scale to 0..255 and save as uint8")
    if len(shape) == 3 and shape[2] != 3 and dtype == np.uint8:
        raise FormatError(f"{problem}: repeat grey images three times with numpy.stack([x] * 3, axis=-1)")
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise FormatError(problem)
    if not math.prod(shape):
        raise FormatError(f"{title} has shape {shape}: it holds no images")
    if math.prod(shape[1:]) > LARGEST_IMAGE:
        raise FormatError(f"{title} has shape {shape}; more than {LARGEST_IMAGE // 2**20} MB an image is refused")
    return stored


def _labels(stored: Stored | None, count: int) -> np.ndarray:
    """(count,) int64; -1 everywhere where there are no labels."""
    if stored is None:
        return np.full(count, -1)
    if stored.shape not in ((count,), (count, 1)) or stored.dtype.kind not in "iu":
        raise FormatError(
            f"{stored.title} has shape {stored.shape} and type {stored.dtype}; labels are ({count:,},) whole numbers"
        )
    labels = stored.values().reshape(-1).astype(np.int64)
    if labels.min() < -1 or labels.max() >= 2**20:
        raise FormatError(f"{stored.title} holds labels from {labels.min()} to {labels.max()}; 0..C-1 or -1 is needed")
    return labels


def _class_names(stored: Stored) -> list[str]:
    if len(stored.shape) != 1 or stored.dtype.kind not in "US" or stored.shape[0] * stored.dtype.itemsize > 2**26:
        raise FormatError(f"{stored.title} has shape {stored.shape} and type {stored.dtype}; class names are text (C,)")
    return [str(c) for c in stored.values().astype(str)]
