"""CIFAR, STL-10, MNIST and downsampled ImageNet as published.

CIFAR-10   data_batch_1..5, test_batch, batches.meta            Python pickles
           data_batch_1..5.bin, test_batch.bin, batches.meta.txt    one byte of label, 3072 of pixels
CIFAR-100  train, test, meta                                    Python pickles; fine labels are taken
           train.bin, test.bin, fine_label_names.txt            coarse label, fine label, 3072 of pixels
ImageNet   train_data_batch_1..10, val_data     Python pickles: `data` (N, 3 * S * S), S 8 to 64, `labels` 1..1000
MNIST      train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, ...    or each with .gz
STL-10     train_X.bin, train_y.bin, test_X.bin, ..., unlabeled_X.bin, class_names.txt   27648 bytes of pixels
"""

from __future__ import annotations

import gzip
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.archives import Member, reading
from igpt_cli.images.arrays import from_planes, is_downsampled, published_classes
from igpt_cli.images.layout import split_from_file_name
from igpt_cli.images.records import MOST_RATIO, SPLITS, Record, Refused, Source, brief
from igpt_cli.images.restricted import load_pickle

#: A CIFAR image: three planes of 32 rows of 32 pixels.
CIFAR_BYTES = 3 * 32 * 32
#: An STL-10 image: three planes of 96 columns of 96 pixels.
STL_BYTES = 3 * 96 * 96
#: Names of image files in MNIST's form; EMNIST's have a prefix.
IDX_IMAGES = r"(?:.*[-_])?(train|t10k|test)-images[-.]idx3-ubyte(?:\.gz)?"


class Files(Protocol):
    """The files of a folder or an archive."""

    path: Path
    members: list[Member]

    def read(self, members: list[Member]) -> Iterator[bytes]: ...
    def open(self, member: Member) -> AbstractContextManager[BinaryIO]: ...


class Folder:
    """The files directly in a folder, or only one of them (in MNIST's form, with its labels), as `Files`."""

    def __init__(self, path: Path, only: str | None = None):
        self.path = path
        files = sorted(path.iterdir()) if only is None else [path / n for n in dict.fromkeys((only, _labels_of(only)))]
        self.members = [Member(p.name, 0, p.stat().st_size) for p in files if p.is_file()]

    def read(self, members: list[Member]) -> Iterator[bytes]:
        for member in members:
            yield (self.path / member.name).read_bytes()

    @contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        with open(self.path / member.name, "rb") as stream:
            yield stream


@dataclass(frozen=True)
class Part:
    """One file of images: its split, their number, and a function that reads (pixels (H, W, 3) uint8, label)."""

    split: str
    count: int
    images: Callable[[], Iterable[tuple[np.ndarray, int]]]


class DatasetSource(Source):
    """A published data set, with images and classes in the published order."""

    def __init__(self, kind: str, description: str, classes: list[str], parts: list[Part], doubts: Sequence[str] = ()):
        counts: Counter[str] = Counter()
        for part in parts:
            counts[part.split] += part.count
        super().__init__(description, classes, counts, doubts=doubts)
        self.kind, self._parts = kind, parts

    def records(self) -> Iterator[Record]:
        for split in self.counts:
            parts = (p for p in self._parts if p.split == split)
            images = (image for part in parts for image in part.images())
            for i, (pixels, label) in enumerate(images):
                if label >= (n := len(self.classes)):
                    raise FormatError(
                        f"{self.description}: image {i} of {split} has label {label}; there are {n} classes"
                    )
                folder = f"{self.classes[label]}/" if label >= 0 else ""
                yield Record(f"{split}/{folder}{i:06d}", split, label, pixels)


def dataset_source(files: Files, description: str) -> Source | None:
    """The published data set among the files, or None."""
    by_name = {m.name.rpartition("/")[2]: m for m in files.members}
    if "batches.meta" in by_name and _batches(by_name, ""):
        return _cifar_pickles("cifar10", files, description, by_name, "batches.meta", b"label_names", b"labels")
    if {"train", "test", "meta"} <= set(by_name) and _mentions(files, by_name["meta"], b"fine_label_names"):
        return _cifar_pickles("cifar100", files, description, by_name, "meta", b"fine_label_names", b"fine_labels")
    if "batches.meta.txt" in by_name and _batches(by_name, ".bin"):
        return _cifar_binary("cifar10", files, description, by_name, "batches.meta.txt", label_bytes=1)
    if "fine_label_names.txt" in by_name and {"train.bin", "test.bin"} & set(by_name):
        return _cifar_binary("cifar100", files, description, by_name, "fine_label_names.txt", label_bytes=2)
    if len(lonely := [n for n in by_name if re.fullmatch(r"data_batch_\d+(\.bin)?", n)]) > 1:
        meta = "batches.meta.txt" if lonely[0].endswith(".bin") else "batches.meta"
        raise InputError(
            f"{description} holds CIFAR's {brief(lonely)}, and {meta}, which names the classes, is missing"
        )
    if pairs := {n: m[1] for n in sorted(by_name) if (m := re.fullmatch(IDX_IMAGES, n))}:
        return _mnist(files, description, by_name, pairs)
    if {"train_X.bin", "test_X.bin", "unlabeled_X.bin"} & set(by_name):
        return _stl(files, description, by_name)
    if batches := sorted((n for n in by_name if is_downsampled(n)), key=lambda n: (len(n), n)):
        return _downsampled(files, description, by_name, batches)
    return None


def _batches(by_name: dict[str, Member], suffix: str) -> dict[str, str]:
    """{file name: split} of the CIFAR files that are there, in the published order."""
    numbered = [n for n in by_name if re.fullmatch(r"data_batch_\d+" + re.escape(suffix), n)]
    numbered.sort(key=lambda n: int(re.findall(r"\d+", n)[0]))
    found = {n: "train" for n in [*numbered, "train" + suffix] if n in by_name}
    return found | {n: "test" for n in ("test_batch" + suffix, "test" + suffix) if n in by_name}


def _mentions(files: Files, member: Member, word: bytes) -> bool:
    """Whether the first MiB holds these bytes."""
    with reading(files.path), files.open(member) as stream:
        return word in stream.read(min(member.size, 2**20))


def _pickle(files: Files, description: str, member: Member, floats: bool = False) -> dict:
    data = next(iter(files.read([member])))
    try:
        if isinstance(data, Refused):
            raise FormatError(data.reason)
        return load_pickle(data, floats)
    except FormatError as e:
        raise FormatError(f"{description}: cannot read {member.name}: {e}") from e


def _downsampled(files: Files, description: str, by_name: dict[str, Member], batches: list[str]) -> Source:
    """ImageNet of 8 to 64 pixels a side, whose class names are numbers."""

    def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
        content = _pickle(files, description, by_name[name], floats=True)
        data: Any = content.get(b"data")
        labels: Any = content.get(b"labels")
        labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
        side = math.isqrt(data.shape[1] // 3) if isinstance(data, np.ndarray) and data.ndim == 2 else 0
        if side < 8 or data.dtype != np.uint8 or data.shape[1] != 3 * side**2 or not _are_labels(labels, len(data)):
            raise FormatError(f"{description}: {name} does not hold `data` (N, 3 * S * S) uint8 and N `labels`")
        return data, np.array(labels, np.int64)

    def images(name: str) -> Iterator[tuple[np.ndarray, int]]:
        data, labels = batch(name)
        yield from zip(map(from_planes, data), (labels - first).tolist(), strict=True)

    labels = {n: batch(n)[1] for n in batches}
    first, classes = published_classes(np.concatenate(list(labels.values())))
    parts = [Part(split_from_file_name(n), len(labels[n]), partial(images, n)) for n in batches]
    return DatasetSource("imagenet-downsampled", description, classes, parts, _missing(batches))


def _are_labels(labels: Any, n: int) -> bool:
    return isinstance(labels, list) and len(labels) == n and all(type(v) is int and 0 <= v < 2**20 for v in labels)


def _cifar_pickles(kind, files, description, by_name, meta: str, names_key: bytes, labels_key: bytes) -> Source:
    def batch(name: str) -> tuple[np.ndarray, list[int]]:
        content = _pickle(files, description, by_name[name])
        data: Any = content.get(b"data")
        labels: Any = content.get(labels_key)
        is_images = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (CIFAR_BYTES,)
        if not (is_images and _are_labels(labels, len(data))):
            raise FormatError(f"{description}: {name} does not hold `data` (N, {CIFAR_BYTES}) uint8 and N labels")
        return data, labels

    def images(name: str) -> Iterator[tuple[np.ndarray, int]]:
        data, labels = batch(name)
        yield from zip(map(from_planes, data), labels, strict=True)

    classes = _pickle(files, description, by_name[meta]).get(names_key)
    if not isinstance(classes, list) or not all(isinstance(c, (bytes, str)) for c in classes):
        raise FormatError(f"{description}: {meta} does not hold the list {names_key.decode()}")
    classes = [c.decode("utf-8", "replace") if isinstance(c, bytes) else c for c in classes]
    batches = _batches(by_name, "")
    # Counted in the order in which an archive stores them; read in the published order.
    sizes = {n: len(batch(n)[0]) for n in sorted(batches, key=lambda n: by_name[n].offset)}
    parts = [Part(split, sizes[n], partial(images, n)) for n, split in batches.items()]
    return DatasetSource(kind, description, classes, parts, _missing(batches))


def _missing(batches: Iterable[str]) -> list[str]:
    """A doubt if numbered files are missing."""
    numbers = {int(re.findall(r"\d+", n)[-1]) for n in batches if re.search(r"_\d+", n)}
    gaps = sorted(set(range(1, max(numbers, default=0) + 1)) - numbers)
    return [f"training batches are missing: {', '.join(map(str, gaps))}"] if gaps else []


def _cifar_binary(kind, files, description, by_name, classes_file: str, label_bytes: int) -> Source:
    def images(member: Member, count: int) -> Iterator[tuple[np.ndarray, int]]:
        for block in _blocks(files, member, label_bytes + CIFAR_BYTES, count):
            yield from_planes(block[label_bytes:]), int(block[label_bytes - 1])

    parts, batches = [], _batches(by_name, ".bin")
    for name, split in batches.items():
        count = _count(description, by_name[name], label_bytes + CIFAR_BYTES)
        parts.append(Part(split, count, partial(images, by_name[name], count)))
    return DatasetSource(kind, description, _lines(files, by_name[classes_file]), parts, _missing(batches))


def _stl(files: Files, description: str, by_name: dict[str, Member]) -> Source:
    def images(member: Member, labels: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        blocks = _blocks(files, member, STL_BYTES, len(labels))
        for block, label in zip(blocks, labels.tolist(), strict=True):
            yield np.ascontiguousarray(block.reshape(3, 96, 96).transpose(2, 1, 0)), label

    parts = []
    for split in ("train", "test", "unlabeled"):
        if (member := by_name.get(f"{split}_X.bin")) is None:
            continue
        count = _count(description, member, STL_BYTES)
        labels = np.full(count, -1)
        if (marks := by_name.get(f"{split}_y.bin")) is not None:
            labels = np.frombuffer(next(iter(files.read([marks]))), np.uint8).astype(int) - 1
            if len(labels) != count:
                raise FormatError(f"{description}: {marks.name} holds {len(labels):,} labels for {count:,} images")
        parts.append(Part(split, count, partial(images, member, labels)))
    if "class_names.txt" not in by_name:
        raise FormatError(f"{description}: class_names.txt is missing beside {', '.join(sorted(by_name))}")
    return DatasetSource("stl10", description, _lines(files, by_name["class_names.txt"]), parts)


def _labels_of(images: str) -> str:
    """The labels' file of an image file in MNIST's form."""
    return images.replace("-images", "-labels").replace("idx3", "idx1")


def _mnist(files: Files, description: str, by_name: dict[str, Member], images: dict[str, str]) -> Source:
    """MNIST and what has its form; `images` is {file name: "train", "t10k" or "test"}."""

    @contextmanager
    def opened(name: str, dims: int) -> Iterator[tuple[list[int], BinaryIO]]:
        """Sizes, and a stream of the bytes that follow them."""
        with reading(files.path), files.open(by_name[name]) as raw:
            stream = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
            magic, *sizes = struct.unpack(f">{1 + dims}I", stream.read(4 + 4 * dims))
            most = by_name[name].size * (MOST_RATIO if name.endswith(".gz") else 1)
            if magic != 0x800 + dims or not all(sizes) or math.prod(sizes) > most:
                raise FormatError(f"{description}: {name} does not hold the bytes in {dims} dimensions that it states")
            yield sizes, cast(BinaryIO, stream)

    def pixels(name: str, labels: list[int]) -> Iterator[tuple[np.ndarray, int]]:
        with opened(name, 3) as ((_, height, width), stream):
            for label in labels:
                if len(block := stream.read(height * width)) < height * width:
                    raise EOFError(f"{name} ends too early")
                yield np.frombuffer(block, np.uint8).reshape(height, width, 1).repeat(3, 2), label
            if stream.read(1):  # which also compares the checksum of a compressed one
                raise EOFError(f"{name} holds more than it states")

    parts, doubts, most = [], [], -1
    splits = [SPLITS.get(word, "test") for word in images.values()]
    if len(set(splits)) < len(splits):
        raise InputError(
            f"{description} holds several sets in MNIST's form, {brief(list(images))}; give each its folder"
        )
    for name, split in zip(images, splits, strict=True):
        with opened(name, 3) as ((count, *_), _):
            labels = [-1] * count
        stem = _labels_of(name).removesuffix(".gz")
        if marks := next((n for n in (stem, f"{stem}.gz") if n in by_name), None):
            with opened(marks, 1) as ((n,), stream):
                labels = list(stream.read(n))
            if len(labels) != count:
                raise FormatError(f"{description}: {marks} holds {len(labels):,} labels for {count:,} images")
        else:
            doubts.append(f"{stem} is missing: the images of {split} have no labels")
        most = max(most, *labels)
        parts.append(Part(split, count, partial(pixels, name, labels)))
    return DatasetSource("mnist", description, [str(i) for i in range(most + 1)], parts, doubts)


def _count(description: str, member: Member, size: int) -> int:
    count, rest = divmod(member.size, size)
    if rest or not count:
        raise FormatError(
            f"{description}: {member.name} has {member.size:,} bytes, not a multiple of {size:,}; "
            "it is truncated or of another kind"
        )
    return count


def _blocks(files: Files, member: Member, size: int, count: int) -> Iterator[np.ndarray]:
    """The first `count` blocks of `size` bytes of a file."""
    with reading(files.path), files.open(member) as stream:
        for _ in range(count):
            if len(block := stream.read(size)) < size:
                raise EOFError(f"{member.name} ends too early")
            yield np.frombuffer(block, np.uint8)


def _lines(files: Files, member: Member) -> list[str]:
    text = next(iter(files.read([member])))
    if len(text) > 2**20 or isinstance(text, Refused):
        raise InputError(f"{files.path}: {member.name} does not hold class names")
    return [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
