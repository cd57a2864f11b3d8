"""Exact counts of all 24-bit colours, in 128 MiB."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli import __version__
from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import check_output, replacing, require_file
from igpt_cli.palette.formats import names_in, read_arrays, read_meta
from igpt_cli.palette.lookup import CHUNK, colour_index, require_rgb

#: The number of colours; the largest counts file unpacks to 11 bytes for each, and some JSON.
COLOURS = 1 << 24


class ColourCounts:
    """The number of pixels of each of the 16.7 million colours; counts merge in any order to the same sum.

    Attributes:
        images, pixels: the numbers added.
        sources: one object for each set of images: their origin and preparation.
    """

    def __init__(self):
        self._counts = np.zeros(COLOURS, np.int64)
        self.images = 0
        self.pixels = 0
        self.sources: list[dict[str, Any]] = []

    def add(self, rgb: np.ndarray) -> None:
        """Count the pixels of (..., 3) uint8; (H, W, 3) is one image, (N, H, W, 3) are N, (n, 3) are pixels only.

        Raises:
            InputError: not uint8, or the last axis is not RGB.
        """
        pixels = require_rgb(rgb).reshape(-1, 3)
        for start in range(0, len(pixels), CHUNK):
            np.add.at(self._counts, colour_index(pixels[start : start + CHUNK]), 1)
        self.pixels += len(pixels)
        self.images += math.prod(np.shape(rgb)[:-3]) if np.ndim(rgb) > 2 else 0

    def merge(self, other: ColourCounts) -> None:
        """Add the counts of `other` to these."""
        indices = other.indices
        self._counts[indices] += other._counts[indices]
        self.pixels += other.pixels
        self.images += other.images
        self.sources += other.sources

    @property
    def indices(self) -> np.ndarray:
        """(n,) int64, ascending: r << 16 | g << 8 | b of the colours that occur."""
        return np.flatnonzero(self._counts)

    @property
    def colours(self) -> np.ndarray:
        """(n, 3) uint8: the colours that occur, in ascending order of red, green, blue."""
        index = self.indices
        return np.stack([index >> 16, (index >> 8) & 255, index & 255], axis=1).astype(np.uint8)

    @property
    def weights(self) -> np.ndarray:
        """(n,) int64: the number of pixels of each of `colours`."""
        return self._counts[self.indices]

    def save(self, path: str | os.PathLike, force: bool = False) -> Path:
        """Write an .npz file: `colours`, `weights`, and `meta` as JSON.

        Raises:
            OutputError: something is there already and `force` is not set, or the place cannot be written.
        """
        path = check_output(Path(path), force)
        meta = {"images": self.images, "pixels": self.pixels, "sources": self.sources, "tool_version": __version__}
        with replacing(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, colours=self.colours, weights=self.weights, meta=np.array(json.dumps(meta)))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> ColourCounts:
        """Read what `save` wrote.

        Raises:
            InputError: nothing is there.
            FormatError: it is another kind of file, or damaged.
        """
        path = require_file(Path(path), "a file of colour counts")
        arrays = read_arrays(path, 12 * COLOURS, what="a file of colour counts")
        if missing := {"colours", "weights", "meta"} - arrays.keys():
            raise FormatError(f"{path} lacks {', '.join(sorted(missing))}; it is not a file of colour counts")
        colours, weights, meta = arrays["colours"], arrays["weights"], read_meta(path, arrays)
        if colours.dtype != np.uint8 or colours.ndim != 2 or colours.shape[1] != 3:
            raise FormatError(f"{path}: `colours` must be (n, 3) uint8, not {colours.dtype} of shape {colours.shape}")
        if weights.dtype.kind not in "iu" or weights.shape != colours.shape[:1]:
            needed = f"({len(colours)},) whole numbers"
            raise FormatError(f"{path}: `weights` must be {needed}, not {weights.dtype} {weights.shape}")
        index = colour_index(colours)
        if (weights <= 0).any() or (np.diff(index) <= 0).any():
            raise FormatError(f"{path}: colours must be in rising order, each with a count above 0")
        counts = cls()
        counts._counts[index] = weights
        counts.pixels = int(counts._counts.sum())
        images, sources = meta.get("images"), meta.get("sources")
        fits = meta.get("pixels") == counts.pixels
        if not fits or type(images) is not int or images < 0 or not isinstance(sources, list):
            raise FormatError(f"{path}: `meta` does not fit the {counts.pixels:,} pixels counted")
        counts.images, counts.sources = images, sources
        return counts


def is_counts(path: str | os.PathLike) -> bool:
    """Whether this is a file of colour counts, by its content."""
    return {"colours", "weights"} <= names_in(path)


def read_counts(paths: Sequence[str]) -> ColourCounts:
    """The merged counts of some files; without files, none.

    Raises:
        InputError, FormatError: a file is named twice, or holds no counts.
    """
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise InputError(f"{', '.join(twice)} is named twice; its pixels would count double")
    total = ColourCounts()
    for path in paths:
        total.merge(ColourCounts.load(path))
    return total
