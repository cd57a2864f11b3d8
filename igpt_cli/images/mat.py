"""SVHN's cropped digits as they are published: MATLAB files `train_32x32.mat`, `test_32x32.mat`, `extra_32x32.mat`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.errors import FormatError
from igpt_cli.images.layout import split_from_file_name
from igpt_cli.images.records import LARGEST_IMAGE, MOST_RATIO, Record, Source


class MatSource(Source):
    """Images `X` (H, W, 3, N) uint8 and labels `y` (N, 1) of a MATLAB file; SVHN's label 10 is the digit 0."""

    kind = "mat"

    def __init__(self, path: Path, split: str):
        self._path = path
        stated = _read(path, "whosmat")
        shapes = {name: shape for name, shape, _ in stated}
        images = shapes.get("X", ())
        if len(images) != 4 or images[2] != 3 or not math.prod(images):
            what = ", ".join(f"{n} {s}" for n, s in shapes.items()) or "nothing"
            raise FormatError(f"{path} holds {what}; as in SVHN, images are `X` (H, W, 3, N) uint8, labels `y` (N, 1)")
        if math.prod(images) > MOST_RATIO * path.stat().st_size or math.prod(images[:3]) > LARGEST_IMAGE:
            raise FormatError(f"{path} is damaged: it states images of shape {images} in {path.stat().st_size:,} bytes")
        labels = self._variable("y") if "y" in shapes else np.zeros(0)
        if "y" in shapes and (labels.size != images[3] or labels.dtype.kind not in "iuf" or (labels % 1 != 0).any()):
            raise FormatError(f"{path}: `y` has shape {labels.shape}; {images[3]:,} whole numbers are expected")
        numbers = labels.reshape(-1).astype(np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < 2**20:
            raise FormatError(f"{path} holds labels from {numbers.min()} to {numbers.max()}; 0 and more are expected")
        svhn = numbers.size and numbers.min() >= 1 and numbers.max() == 10
        numbers = numbers % 10 if svhn else numbers
        self._labels = numbers.tolist() or [-1] * images[3]
        classes = [str(i) for i in range(max(int(numbers.max(initial=-1)) + 1, 10 if numbers.size else 0))]
        notes = ["SVHN's label 10 is the digit 0"] if svhn else []
        super().__init__(str(path), classes, {split: images[3]}, notes)

    def records(self) -> Iterator[Record]:
        images = self._variable("X")
        (split,) = self.counts
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != len(self):
            raise FormatError(f"{self._path}: `X` has type {images.dtype}; images are uint8")
        for i, label in enumerate(self._labels):
            yield Record(f"{split}/{i:06d}", split, label, np.ascontiguousarray(images[..., i]))

    def _variable(self, name: str) -> np.ndarray:
        value = _read(self._path, "loadmat", variable_names=[name]).get(name)
        if not isinstance(value, np.ndarray):
            raise FormatError(f"{self._path} is a broken MATLAB file: it does not hold {name}")
        return value


def svhn_source(path: Path, title: str) -> Source:
    """The images of one MATLAB file; its name may name the split."""
    extra = re.search(r"(^|[^a-z])extra([^a-z]|$)", title.lower())
    return MatSource(path, "extra" if extra else split_from_file_name(title))


def is_mat(head: bytes) -> bool:
    return head.startswith(b"MATLAB 5.0 MAT-")


def _read(path: Path, function: str, **options: Any) -> Any:
    """A MATLAB file read by SciPy, which makes nothing but arrays of it."""
    import scipy.io

    try:
        return getattr(scipy.io, function)(path, **options)
    except Exception as e:  # a broken file may raise anything
        raise FormatError(f"{path} is a broken MATLAB file ({type(e).__name__}: {e})") from e
