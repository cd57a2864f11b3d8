"""Images in NumPy arrays, read image by image and never unpickled.

A `.npy` file holds images uint8: colour (N, H, W, 3), grey (N, H, W) or (N, H, W, 1), or rows of three planes
(N, 3 * S * S) as in CIFAR and downsampled ImageNet. A `.npz` file holds `images` and optional `labels` (N,); several
splits as `train_images` and `train_labels`, `x_test` and `y_test`, ...; and class names as `classes`. Arrays without
names, from `np.savez(file, X, y)`, are recognised by their shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np

from igpt_cli.errors import FormatError
from igpt_cli.images.archives import BROKEN, Zip
from igpt_cli.images.layout import split_from_file_name
from igpt_cli.images.records import LARGEST_IMAGE, MOST_RATIO, SPLITS, Record, Source, in_order

IMAGE_KEYS = ("images", "image", "imgs", "x", "data")
LABEL_KEYS = ("labels", "label", "y", "targets", "target")
CLASS_KEYS = ("classes", "class_names", "label_names")

#: Opens a stream at the beginning of an array file.
Opener = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class Stored:
    """One array in a file, of which only the header has been read."""

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
        self,
        kind: str,
        description: str,
        splits: dict[str, tuple[Stored, Stored | None]],
        classes: list[str],
        doubts: Sequence[str] = (),
        numbered: bool = False,
    ):
        """`splits`: {split: (images, labels or None)}; `numbered`: labels are the published class numbers, such as
        1..1000 in downsampled ImageNet."""
        self.kind = kind
        self._splits = splits
        self._labels = {s: _labels(labels, images.shape[0]) for s, (images, labels) in splits.items()}
        if numbered and not classes:
            first, classes = published_classes(np.concatenate(list(self._labels.values())))
            self._labels = {s: np.where(labels < 0, labels, labels - first) for s, labels in self._labels.items()}
        top = max((int(v.max(initial=-1)) for v in self._labels.values()), default=-1)
        if classes and top >= len(classes):
            raise FormatError(f"{description}: label {top} is used, and there are {len(classes)} class names")
        classes = classes or [str(c) for c in range(top + 1)]
        rows = {i.shape for i, _ in splits.values() if len(i.shape) == 2 and not numbered}
        notes = [f"rows of {shape[1]:,} values are read as {_row_form(shape)}" for shape in rows]
        counts = {s: images.shape[0] for s, (images, _) in splits.items()}
        super().__init__(description, classes, counts, notes, doubts)

    def records(self) -> Iterator[Record]:
        for split in self.counts:
            images = self._splits[split][0]
            blocks = images.blocks(math.prod(images.shape[1:]), images.shape[0])
            for i, (block, label) in enumerate(zip(blocks, self._labels[split].tolist(), strict=True)):
                yield Record(f"{split}/{i:06d}", split, label, _pixels(np.frombuffer(block, np.uint8), images.shape))


def published_classes(labels: np.ndarray) -> tuple[int, list[str]]:
    """(the first number, names) of the classes of downsampled ImageNet: the numbers 1 to 1000 as text.

    >>> first, names = published_classes(np.array([77, 935]))
    >>> first, names[0], names[-1]
    (1, '1', '1000')
    """
    first = 0 if (labels == 0).any() else 1
    return first, [str(i) for i in range(first, max(1000 + first, int(labels.max(initial=0)) + 1))]


def _form(shape: tuple[int, ...]) -> str:
    """How images (N, ...) are stored: "colour", "grey" or "planes"; "" where none has the shape."""
    if len(shape) == 4:
        return {3: "colour", 1: "grey"}.get(shape[3], "")
    if len(shape) == 3:
        return "" if shape[2] == 3 else "grey"
    if len(shape) == 2 and shape[1] >= 64:
        side = math.isqrt(shape[1] // 3)
        if 3 * side * side == shape[1]:
            return "planes"
        return "grey" if math.isqrt(shape[1]) ** 2 == shape[1] else ""
    return ""


def _row_form(shape: tuple[int, ...]) -> str:
    planes = _form(shape) == "planes"
    side = math.isqrt(shape[1] // 3 if planes else shape[1])
    return f"{'three planes' if planes else 'a grey image'} of {side} x {side}"


def _pixels(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One image (H, W, 3) of an array of this shape."""
    form = _form(shape)
    if form == "colour":
        return values.reshape(shape[1:])
    if form == "planes":
        return from_planes(values)
    height, width = shape[1:3] if len(shape) > 2 else (math.isqrt(shape[1]),) * 2
    return np.repeat(values.reshape(height, width, 1), 3, axis=2)


def from_planes(row: np.ndarray) -> np.ndarray:
    """(3 * S * S,) -> (S, S, 3)"""
    side = math.isqrt(len(row) // 3)
    return np.ascontiguousarray(row.reshape(3, side, side).transpose(1, 2, 0))


def npy_source(path: Path, title: str) -> Source:
    """The images of one `.npy` file; its name may name the split."""
    images = _checked(_stored(str(path), lambda: path.open("rb"), path.stat().st_size))
    return ArraySource("npy", str(path), {split_from_file_name(title): (images, None)}, [])


def npz_source(archive: Zip) -> Source:
    """The images of one `.npz` file."""
    path = archive.path
    here = split_from_file_name(path.name)
    images: dict[str, Stored] = {}
    labels: dict[str, Stored] = {}
    classes, keys = [], []
    arrays: list[Stored] = []  # without a name
    for member in archive.members:
        key = member.name.removesuffix(".npy")
        keys.append(key)
        words = re.split(r"[_\-./\d]+", key.lower())
        split = next((SPLITS[w] for w in words if w in SPLITS), here)
        most = min(member.size, MOST_RATIO * path.stat().st_size)
        stored = lambda m=member, k=key, most=most: _stored(f"{path}[{k!r}]", lambda: archive.open(m), most)  # noqa: E731
        if key.lower() in CLASS_KEYS:
            classes = _class_names(stored())
        elif re.fullmatch(r"arr_\d+", key):
            arrays.append(stored())
        elif any(w in IMAGE_KEYS for w in words):
            if split in images:
                raise FormatError(f"{path} holds several arrays of images of {split}; it holds {', '.join(keys)}")
            images[split] = _checked(stored())
        elif any(w in LABEL_KEYS for w in words):
            labels[split] = stored()
    doubts = []
    if not images and arrays:
        images, labels = _by_shape(path, arrays, here)
        doubts = [f"arrays without names are read by their shapes as {', '.join(images)}"] if len(images) > 1 else []
    if not images:
        raise FormatError(
            f"{path} holds no images that can be told by their names; it holds {', '.join(keys) or 'nothing'}. "
            "Call them `images` and `labels`, or `train_images`, `train_labels`, `test_images`, ..."
        )
    if unused := sorted(set(labels) - set(images)):
        doubts.append(f"{path}: labels without images are not used: {', '.join(unused)}")
    pairs = {s: (images[s], labels.get(s)) for s in in_order(dict.fromkeys(images, 1))}
    return ArraySource("npz", str(path), pairs, classes, doubts, is_downsampled(path.stem))


def is_downsampled(stem: str) -> bool:
    """Whether a file is named like a part of downsampled ImageNet: train_data_batch_1..10, val_data."""
    return re.fullmatch(r"(train_data_batch_\d+|val_data)", stem) is not None


def _by_shape(path: Path, arrays: Sequence[Stored], split: str) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Images and labels by split, from unnamed arrays: X, y; or X, y of train and of test, in any order."""
    images = [a for a in arrays if len(a.shape) > 2 or (len(a.shape) == 2 and a.shape[1] > 1)]
    labels = [a for a in arrays if not any(a is i for i in images)]
    if len(images) not in (1, 2) or len(labels) not in (0, len(images)):
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise FormatError(
            f"{path} holds arrays without names, of shapes {shapes}: expected are images and labels, or those of train "
            f"and of test; give them names: numpy.savez(file, train_images=..., train_labels=..., test_images=...)"
        )
    splits = [split] if len(images) == 1 else ["train", "test"]
    return dict(zip(splits, map(_checked, images))), dict(zip(splits, labels))


def is_npz(archive: object) -> TypeGuard[Zip]:
    """Whether an opened archive is a zip of nothing but `.npy` files."""
    return isinstance(archive, Zip) and bool(archive.members) and all(m.name.endswith(".npy") for m in archive.members)


def _stored(title: str, opener: Opener, available: int) -> Stored:
    """The array in a file of at most `available` bytes."""
    with opener() as stream:
        shape, dtype = _header(stream, title)
    if math.prod(shape) * dtype.itemsize > available:
        raise FormatError(f"{title} is truncated: it holds less than its {shape} values")
    return Stored(title, opener, shape, dtype)


def _header(stream: BinaryIO, title: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array at the stream's position, which moves to the first value."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
    except Exception as e:  # NumPy parses the header as Python, and a broken one may raise anything
        raise FormatError(f"{title} is a broken NumPy file: {(str(e).splitlines() or [type(e).__name__])[0]}") from e
    if min(shape, default=0) < 0:
        raise FormatError(f"{title} is a broken NumPy file: its shape is {shape}")
    if dtype.hasobject:
        raise FormatError(f"{title} holds Python objects, which are never loaded; save whole numbers (uint8)")
    if columns_first and len(shape) > 1:
        raise FormatError(f"{title} is stored column by column; save it after numpy.ascontiguousarray")
    return shape, dtype


def _checked(stored: Stored) -> Stored:
    """The array, after a check that it holds images."""
    shape, dtype, title = stored.shape, stored.dtype, stored.title
    hints = {1: "labels go with their images: numpy.savez(file, images=..., labels=...)", 3: "a single one is x[None]"}
    hint = hints.get(len(shape), "")
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        hint = "move the channels to the end with transpose(0, 2, 3, 1)"
    elif len(shape) == 4 and shape[3] == 4:
        hint = "save x[..., :3], or lay alpha over white first"
    elif _form(shape):
        hint = "scale to 0..255 and save as uint8"
    if not _form(shape) or dtype != np.uint8:
        problem = f"{title} has shape {shape} and type {dtype}; images are (N, H, W, 3) uint8, or grey (N, H, W)"
        raise FormatError(f"{problem}: {hint}" if hint else problem)
    if not math.prod(shape):
        raise FormatError(f"{title} has shape {shape}: it holds no images")
    if math.prod(shape[1:]) > LARGEST_IMAGE:
        raise FormatError(f"{title} has shape {shape}; more than {LARGEST_IMAGE // 2**20} MB an image is refused")
    return stored


def _labels(stored: Stored | None, count: int) -> np.ndarray:
    """(count,) int64; all -1 without labels."""
    if stored is None:
        return np.full(count, -1)
    labels = stored.values() if math.prod(stored.shape) == count and stored.dtype.kind in "iufb" else None
    if labels is None or (labels % 1 != 0).any():
        hint = ": save numpy.argmax(labels, 1)" if len(stored.shape) == 2 else ""
        if stored.dtype.kind in "US":
            hint = ": save `classes, labels = numpy.unique(labels, return_inverse=True)`"
        raise FormatError(
            f"{stored.title} has shape {stored.shape} and type {stored.dtype}; labels are ({count:,},) whole "
            f"numbers{hint}"
        )
    labels = labels.reshape(-1).astype(np.int64)
    if labels.min() < -1 or labels.max() >= 2**20:
        raise FormatError(f"{stored.title} holds labels from {labels.min()} to {labels.max()}; 0..C-1 or -1 is needed")
    return labels


def _class_names(stored: Stored) -> list[str]:
    if len(stored.shape) != 1 or stored.dtype.kind not in "US" or stored.shape[0] * stored.dtype.itemsize > 2**26:
        raise FormatError(f"{stored.title} has shape {stored.shape} and type {stored.dtype}; class names are text (C,)")
    return [str(c) for c in stored.values().astype(str)]
