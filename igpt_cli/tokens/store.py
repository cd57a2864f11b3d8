"""Opening a token file: everything is checked once, then the tokens are memory-mapped and no handle stays open.

    >>> file = open_tokens("data/tokens-32.h5")
    >>> train = file.split("train")
    >>> train.tokens[:2].shape, train.decode([0, 1]).shape
    ((2, 1024), (2, 32, 32, 3))

A `TokenFile` can be handed to another process: it is opened again there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import sha256_of
from igpt_cli.hdf5 import open_hdf5
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens import schema

#: Rows are looked through in blocks of about this many bytes.
BLOCK_BYTES = 2**24


class TokenSplit:
    """One split of a token file; N rows of T = R * R tokens.

    Attributes:
        name: "train", "val", "test", ...
        tokens: (N, T) uint16 in [0, n_vocab), memory-mapped and read-only, in raster order.
        labels: (N,) int32, an index into the file's classes, -1 = none.
        rgb: (N, R, R, 3) uint8, memory-mapped, or None where the images were not kept.
        attrs: attributes of the split: `skipped`, the number of images that could not be read.
        sha256: hexadecimal digest of the tokens as the file states it, "" where it states none.
    """

    def __init__(self, file: TokenFile, name: str, tokens, labels, rgb, attrs: dict, sha256: str):
        self.file, self.name = file, name
        self.tokens, self.labels, self.rgb = tokens, labels, rgb
        self.attrs, self.sha256 = attrs, sha256

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self):
        return _reopen_split, (self.file, self.name)

    @cached_property
    def names(self) -> list[str]:
        """The N names of the images, read when first asked for."""
        with open_hdf5(self.file.path) as file:
            return decoded(file[self.name][schema.NAMES][:])

    def decode(self, rows) -> np.ndarray:
        """The quantized images of some rows (an integer, a slice, or a sequence of them): (n, R, R, 3) uint8."""
        tokens = np.atleast_2d(self.tokens[rows])
        side = self.file.resolution
        return self.file.palette.dequantize(tokens.reshape(len(tokens), side, side))

    def class_counts(self) -> np.ndarray:
        """(C,) int64: the number of images of each class; those without a label are not counted."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.file.classes))


class TokenFile:
    """An open token file; see `open_tokens`.

    Attributes:
        path, resolution (R), n_vocab (V), palette, classes (list of C names), preprocess (how images became R x R),
        attrs (all root attributes), splits ({name: TokenSplit}, in the order train, val, test, others).
    """

    def __init__(self, path: Path, attrs: dict, preprocess: dict, palette: Palette, classes: list[str]):
        self.path, self.attrs, self.preprocess = path, attrs, preprocess
        self.resolution, self.n_vocab = int(attrs["resolution"]), int(attrs["n_vocab"])
        self.palette, self.classes = palette, classes
        self.splits: dict[str, TokenSplit] = {}

    def __reduce__(self):
        return open_tokens, (self.path, False)

    def split(self, name: str) -> TokenSplit:
        """The split of that name.

        Raises:
            InputError: there is none; the splits there are get named.
        """
        if name not in self.splits:
            raise InputError(f"{self.path} has no split {name!r}; its splits: {', '.join(self.splits)}")
        return self.splits[name]


def open_tokens(path: str | os.PathLike, check_range: bool = True) -> TokenFile:
    """Open a token file and check it: format, version, shapes, dtypes, palette hash, labels, range of the tokens.

    Args:
        check_range: look at every token (about a second for a gigabyte).

    Raises:
        InputError: there is no such file.
        FormatError: it is another kind of file, damaged, or something in it is not as docs/formats.md says.
    """
    path = Path(path)
    with open_hdf5(path) as h5:
        attrs = _root_attributes(h5, path)
        palette = _palette(h5, path, attrs)
        classes = _classes(h5, path)
        file = TokenFile(path, attrs, _json_object(path, attrs["preprocess"]), palette, classes)
        for name in schema.in_split_order(n for n in h5 if isinstance(h5[n], h5py.Group)):
            file.splits[name] = _open_split(h5[name], file, name, check_range)
    if not file.splits:
        raise FormatError(f"{path} holds no split: there is no group such as /train in it")
    return file


def decoded(names: np.ndarray) -> list[str]:
    """Fixed-length UTF-8 strings as text."""
    return [n.decode("utf-8", "replace") for n in names.tolist()]


def blocks_of(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of an array (N, ...) in blocks of about 16 MiB."""
    step = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _reopen_split(file: TokenFile, name: str) -> TokenSplit:
    return file.split(name)


def _root_attributes(h5: h5py.File, path: Path) -> dict:
    attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in h5.attrs.items()}
    if attrs.get("format") != schema.FORMAT:
        found = f"its format is {attrs['format']!r}" if "format" in attrs else "it has no attribute 'format'"
        raise FormatError(f"{path} is an HDF5 file, but not a token file: {found}, {schema.FORMAT!r} is needed")
    version = attrs.get("format_version")
    if version != schema.FORMAT_VERSION:
        newer = isinstance(version, int) and version > schema.FORMAT_VERSION
        todo = "upgrade igpt-cli to read it" if newer else "make it anew with `igpt tokenize`"
        raise FormatError(
            f"{path} has format_version {version}, this program reads version {schema.FORMAT_VERSION}; {todo}"
        )
    for name, least, most in (("resolution", 1, schema.MAX_RESOLUTION), ("n_vocab", 1, schema.MAX_VOCAB)):
        value = attrs.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise FormatError(f"{path}: the attribute {name} is {value!r}, a whole number {least}..{most} is needed")
    for name in schema.TEXT_ATTRIBUTES:
        if not isinstance(attrs.get(name), str):
            raise FormatError(f"{path}: the attribute {name} is missing or not text")
    return attrs


def _json_object(path: Path, text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: the attribute preprocess is not a JSON object: {text[:60]!r}")
    return value


def _dataset(group: h5py.Group, path: Path, name: str, shape: tuple, dtype: str) -> h5py.Dataset:
    """A dataset of that shape (None: any length) and dtype."""
    where = f"{group.name.rstrip('/')}/{name}"
    if not isinstance(group.get(name), h5py.Dataset):
        raise FormatError(f"{path} holds no dataset {where}")
    data = group[name]
    fits = len(shape) == data.ndim and all(w in (None, h) for w, h in zip(shape, data.shape, strict=True))
    kind_fits = data.dtype.kind == "S" if dtype == "S" else data.dtype == np.dtype(dtype)
    if not fits or not kind_fits:
        wanted = "(" + ", ".join("N" if n is None else str(n) for n in shape) + (",)" if len(shape) == 1 else ")")
        kind = "fixed-length utf-8" if dtype == "S" else np.dtype(dtype).name
        raise FormatError(f"{path}: {where} is {data.shape} {data.dtype.name}, {wanted} {kind} is needed")
    return data


def _palette(h5: h5py.File, path: Path, attrs: dict) -> Palette:
    centers = _dataset(h5, path, schema.PALETTE, (attrs["n_vocab"], 3), schema.PALETTE_DTYPE)[:]
    if not np.isfinite(centers).all() or centers.min() < 0 or centers.max() > 255:
        raise FormatError(f"{path}: /palette has values outside 0..255")
    digest = sha256_of(centers.tobytes())
    if digest != attrs["palette_sha256"]:
        raise FormatError(
            f"{path}: /palette was changed: its SHA-256 is {digest[:12]}..., the attribute palette_sha256 says "
            f"{attrs['palette_sha256'][:12]}..."
        )
    return Palette(centers, np.zeros(len(centers), np.int64), {"source": str(path)})


def _classes(h5: h5py.File, path: Path) -> list[str]:
    if schema.CLASSES not in h5:
        return []
    return decoded(_dataset(h5, path, schema.CLASSES, (None,), "S")[:])


def _open_split(group: h5py.Group, file: TokenFile, name: str, check_range: bool) -> TokenSplit:
    path, side = file.path, file.resolution
    tokens = _mapped(_dataset(group, path, schema.TOKENS, (None, side * side), schema.TOKEN_DTYPE), path)
    n = len(tokens)
    labels = _dataset(group, path, schema.LABELS, (n,), schema.LABEL_DTYPE)[:]
    _dataset(group, path, schema.NAMES, (n,), "S")
    rgb = None
    if schema.RGB in group:
        rgb = _mapped(_dataset(group, path, schema.RGB, (n, side, side, 3), "u1"), path)
    if n and (labels.min() < -1 or labels.max() >= len(file.classes)):
        bad = int(labels.min() if labels.min() < -1 else labels.max())
        raise FormatError(
            f"{path}: {group.name}/labels holds {bad}; with {len(file.classes)} classes labels are "
            f"-1..{len(file.classes) - 1}"
        )
    if check_range:
        check_tokens(tokens, file.n_vocab, f"{path}: {group.name}/tokens")
    attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in group.attrs.items()}
    digest = group[schema.TOKENS].attrs.get("sha256", "")
    return TokenSplit(file, name, tokens, labels, rgb, attrs, digest if isinstance(digest, str) else "")


def check_tokens(tokens: np.ndarray, n_vocab: int, where: str) -> None:
    """Refuse tokens that no colour of the palette stands for.

    Raises:
        FormatError: the first row with such a token, the token and the size of the palette.
    """
    row = 0
    for block in blocks_of(tokens):
        if block.max() >= n_vocab:
            bad = int(np.argmax(block.max(axis=1) >= n_vocab))
            raise FormatError(
                f"{where} holds the token {int(block[bad].max())} in row {row + bad}; the palette has {n_vocab} "
                f"colours, so tokens are 0..{n_vocab - 1}"
            )
        row += len(block)


def _mapped(data: h5py.Dataset, path: Path) -> np.ndarray:
    """The dataset as a read-only memory map of the file."""
    if data.size == 0:
        return np.empty(data.shape, data.dtype)
    offset = data.id.get_offset()
    if data.chunks is not None or offset is None:
        how = "chunked or compressed" if data.chunks is not None else "not stored in one piece"
        raise FormatError(f"{path}: {data.name} is {how}; it must be contiguous and uncompressed to be memory-mapped")
    if offset + data.nbytes > path.stat().st_size:
        raise FormatError(f"{path} is cut off: {data.name} reaches beyond its end")
    return np.memmap(path, data.dtype, "r", offset, data.shape)
