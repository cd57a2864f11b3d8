"""Open a token file: check once, then memory-map.

    >>> file = open_tokens("data/tokens-32.h5")
    >>> train = file.split("train")
    >>> train.tokens[:2].shape, train.decode([0, 1]).shape
    ((2, 1024), (2, 32, 32, 3))

A `TokenFile` can be pickled: another process opens it again.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from igpt_cli.errors import FormatError, InputError
from igpt_cli.hdf5 import open_hdf5
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens import schema
from igpt_cli.tokens.checks import (
    attribute_problems,
    attributes,
    check_tokens,
    dataset,
    decoded,
    mapped_rgb,
    mapped_tokens,
    require_names,
    split_names,
    stored_classes,
    stored_labels,
    stored_palette,
)


class TokenSplit:
    """One split of a token file; N rows of T = R * R tokens.

    Attributes:
        name: "train", "val", "test", ...
        tokens: (N, T) uint16 in [0, n_vocab), memory-mapped and read-only, in raster order.
        labels: (N,) int32, an index into the file's classes, -1 = none.
        rgb: (N, R, R, 3) uint8, memory-mapped, or None if the images are not stored.
        sha256, rgb_sha256: hexadecimal digests of the tokens and the images that the file states, or "".
    """

    def __init__(self, file: TokenFile, name: str, tokens, labels, rgb, sha256: str, rgb_sha256: str = ""):
        self.file, self.name = file, name
        self.tokens, self.labels, self.rgb = tokens, labels, rgb
        self.sha256, self.rgb_sha256 = sha256, rgb_sha256

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self):
        return _reopen_split, (self.file, self.name)

    @cached_property
    def names(self) -> list[str]:
        """The N names of the images, read on first use."""
        with open_hdf5(self.file.path) as file:
            return decoded(file[self.name][schema.NAMES][:])

    @cached_property
    def index(self) -> np.ndarray | None:
        """(N,) int64: in a shard, each row's index in its split of the source; None in a whole file."""
        with open_hdf5(self.file.path) as file:
            group = file[self.name]
            if schema.INDEX not in group:
                return None
            return dataset(group, self.file.path, schema.INDEX, (len(self),), schema.INDEX_DTYPE)[:]

    def decode(self, rows) -> np.ndarray:
        """The quantized images of some rows (an integer, a slice, or a sequence of them): (n, R, R, 3) uint8."""
        tokens = np.atleast_2d(self.tokens[rows])
        side = self.file.resolution
        return self.file.palette.dequantize(tokens.reshape(len(tokens), side, side))

    def images(self, rows) -> np.ndarray:
        """The images of some rows as stored, or else quantized: (n, R, R, 3) uint8."""
        return self.decode(rows) if self.rgb is None else self.rgb[rows]

    def class_counts(self) -> np.ndarray:
        """(C,) int64: the number of images of each class; those without a label are not counted."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.file.classes))


class TokenFile:
    """An open token file; see `open_tokens`.

    Attributes:
        path, title (its name in messages: the path, or the images of a temporary file),
        resolution (R), n_vocab (V), palette, classes (list of C names), preprocess (how images became R x R),
        attrs (all root attributes), splits ({name: TokenSplit}, in the order train, val, test, others).
    """

    def __init__(self, path: Path, attrs: dict, preprocess: dict, palette: Palette, classes: list[str]):
        self.path, self.attrs, self.preprocess = path, attrs, preprocess
        self.title = str(path)
        self.resolution, self.n_vocab = int(attrs["resolution"]), int(attrs["n_vocab"])
        self.palette, self.classes = palette, classes
        self.splits: dict[str, TokenSplit] = {}

    def __reduce__(self):
        return open_tokens, (self.path, False)

    @property
    def selection(self) -> dict[str, str | int | float]:
        """The requested options that selected and split the images (`Source.selection`)."""
        return {k: self.attrs[k] for k in schema.SELECTION if k in self.attrs}

    @property
    def skipped(self) -> dict[str, int]:
        """{split: number of unreadable, excluded images}."""
        try:
            noted = json.loads(self.attrs.get("skipped", "{}"))
            return {str(split): int(n) for split, n in noted.items()}
        except (ValueError, TypeError, AttributeError) as e:
            raise FormatError(f"{self.path}: the attribute skipped is not a JSON object of numbers") from e

    def split(self, name: str) -> TokenSplit:
        """The split of that name. Raises InputError: there is none; the message lists the splits."""
        if name not in self.splits:
            raise InputError(f"{self.title} has no split {name!r}; its splits: {', '.join(self.splits)}")
        return self.splits[name]


def open_tokens(path: str | os.PathLike, check_range: bool = True) -> TokenFile:
    """Open a token file and check it: format, version, shapes, dtypes, palette hash, labels, range of the tokens.

    Args:
        check_range: check every token (about a second for a gigabyte).

    Raises:
        InputError: there is no such file.
        FormatError: it is another kind of file, damaged, or something in it is not as docs/formats.md says.
    """
    path = Path(path)
    with open_hdf5(path) as h5:
        attrs = attributes(h5)
        for problem in attribute_problems(attrs, path):
            raise FormatError(problem)
        palette, classes = stored_palette(h5, path, attrs), stored_classes(h5, path)
        file = TokenFile(path, attrs, json.loads(attrs["preprocess"]), palette, classes)
        for name in split_names(h5, path):
            file.splits[name] = _open_split(h5[name], file, name, check_range)
    return file


def _reopen_split(file: TokenFile, name: str) -> TokenSplit:
    return file.split(name)


def _open_split(group: h5py.Group, file: TokenFile, name: str, check_range: bool) -> TokenSplit:
    path = file.path
    tokens = mapped_tokens(group, path, file.resolution)
    labels = stored_labels(group, path, len(tokens), len(file.classes))
    require_names(group, path, len(tokens))
    rgb = mapped_rgb(group, path, len(tokens), file.resolution)
    if check_range:
        check_tokens(tokens, file.n_vocab, f"{path}: {group.name}/tokens")
    stated = [group[c].attrs.get("sha256") if c in group else "" for c in (schema.TOKENS, schema.RGB)]
    digests = [digest if isinstance(digest, str) else "" for digest in stated]
    return TokenSplit(file, name, tokens, labels, rgb, *digests)
