"""Checks of the parts of a token file, for opening and verifying.

Each function raises a FormatError that begins with the path and names the place in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from igpt_cli.documents import short
from igpt_cli.errors import FormatError
from igpt_cli.files import sha256_of
from igpt_cli.images.records import in_split_order
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens import schema

#: Bytes of a block of rows, about.
BLOCK_BYTES = 2**24


def attributes(thing: h5py.Group) -> dict:
    """The attributes, as plain Python values where they are scalars."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in thing.attrs.items()}


def attribute_problems(attrs: dict, path: Path) -> list[str]:
    """The problems of the root attributes, one sentence each; only one if it is another kind of file."""
    if attrs.get("format") != schema.FORMAT:
        stated = f"its format is {attrs['format']!r}" if "format" in attrs else "it has no attribute 'format'"
        return [f"{path} is an HDF5 file, but not a token file: {stated}, {schema.FORMAT!r} is needed"]
    version = attrs.get("format_version")
    if version != schema.FORMAT_VERSION:
        newer = isinstance(version, int) and version > schema.FORMAT_VERSION
        todo = "upgrade igpt-cli to read it" if newer else "make it anew with `igpt tokenize`"
        return [f"{path} has format_version {version}, this program reads version {schema.FORMAT_VERSION}; {todo}"]
    problems = []
    for name, least, most in (("resolution", 1, schema.MAX_RESOLUTION), ("n_vocab", 2, schema.MAX_VOCAB)):
        value = attrs.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            problems.append(f"{path}: the attribute {name} is {value!r}, a whole number {least}..{most} is needed")
    not_text = [name for name in schema.TEXT_ATTRIBUTES if not isinstance(attrs.get(name), str)]
    problems += [f"{path}: the attribute {name} is missing or not text" for name in not_text]
    problems += [
        f"{path}: the attribute {name} is {short(attrs[name])}, {kind.words} is needed"
        for name, kind in schema.SELECTION.items()
        if name in attrs and not kind.holds(attrs[name])
    ]
    if isinstance(text := attrs.get("preprocess"), str) and not _is_json_object(text):
        problems.append(f"{path}: the attribute preprocess is not a JSON object: {text[:60]!r}")
    return problems


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def split_names(h5: h5py.File, path: Path) -> list[str]:
    """The splits, in `in_split_order`."""
    names = in_split_order(n for n in h5 if isinstance(h5[n], h5py.Group))
    if not names:
        raise FormatError(f"{path} holds no split: there is no group such as /train in it")
    return names


def dataset(group: h5py.Group, path: Path, name: str, shape: tuple, dtype: str) -> h5py.Dataset:
    """A dataset of that shape (None: any length) and dtype ("S": UTF-8 of fixed length)."""
    where = f"{group.name.rstrip('/')}/{name}"
    if not isinstance(group.get(name), h5py.Dataset):
        raise FormatError(f"{path} holds no dataset {where}")
    data = group[name]
    fits = len(shape) == data.ndim and all(w in (None, h) for w, h in zip(shape, data.shape, strict=True))
    kind_fits = data.dtype.kind == "S" if dtype == "S" else data.dtype == np.dtype(dtype)
    if not fits or not kind_fits:
        needed = "(" + ", ".join("N" if n is None else str(n) for n in shape) + (",)" if len(shape) == 1 else ")")
        kind = "fixed-length utf-8" if dtype == "S" else np.dtype(dtype).name
        raise FormatError(f"{path}: {where} is {data.shape} {data.dtype.name}, {needed} {kind} is needed")
    return data


def stored_palette(h5: h5py.File, path: Path, attrs: dict) -> Palette:
    """/palette, whose hash the attribute palette_sha256 states."""
    centers = dataset(h5, path, schema.PALETTE, (attrs["n_vocab"], 3), schema.PALETTE_DTYPE)[:]
    digest = sha256_of(np.ascontiguousarray(centers).tobytes())
    if digest != attrs["palette_sha256"]:
        stated = f"the attribute palette_sha256 says {attrs['palette_sha256'][:12]}..."
        raise FormatError(f"{path}: /palette was changed: its SHA-256 is {digest[:12]}..., {stated}")
    try:
        return Palette(centers, None, {"source": str(path)})
    except FormatError as e:
        raise FormatError(f"{path}: /palette: {e}") from e


def stored_classes(h5: h5py.File, path: Path) -> list[str]:
    """The class names; none without /classes."""
    if schema.CLASSES not in h5:
        return []
    return decoded(dataset(h5, path, schema.CLASSES, (None,), "S")[:])


def mapped_tokens(group: h5py.Group, path: Path, resolution: int) -> np.ndarray:
    """(N, R * R) uint16, memory-mapped."""
    return mapped(dataset(group, path, schema.TOKENS, (None, resolution**2), schema.TOKEN_DTYPE), path)


def mapped_rgb(group: h5py.Group, path: Path, n: int, resolution: int) -> np.ndarray | None:
    """(N, R, R, 3) uint8, memory-mapped, or None."""
    if schema.RGB not in group:
        return None
    return mapped(dataset(group, path, schema.RGB, (n, resolution, resolution, 3), "u1"), path)


def stored_labels(group: h5py.Group, path: Path, n: int, n_classes: int) -> np.ndarray:
    """(N,) int32 in -1..C-1."""
    labels = dataset(group, path, schema.LABELS, (n,), schema.LABEL_DTYPE)[:]
    if n and (labels.min() < -1 or labels.max() >= n_classes):
        bad = int(labels.min() if labels.min() < -1 else labels.max())
        allowed = f"with {n_classes} classes labels are -1..{n_classes - 1}"
        raise FormatError(f"{path}: {group.name}/labels holds {bad}; {allowed}")
    return labels


def require_names(group: h5py.Group, path: Path, n: int) -> h5py.Dataset:
    """/<split>/names, not read yet."""
    return dataset(group, path, schema.NAMES, (n,), "S")


def check_tokens(tokens: np.ndarray, n_vocab: int, where: str, first: int = 0) -> None:
    """Check that tokens are in [0, n_vocab); the error names the first row with another, counted from `first`."""
    row = first
    for block in blocks_of(tokens):
        if block.max() >= n_vocab or block.min() < 0:
            bad = int(np.argmax(((block >= n_vocab) | (block < 0)).any(axis=1)))
            worst = int(block[bad].max() if block[bad].max() >= n_vocab else block[bad].min())
            allowed = f"the palette has {n_vocab} colours, so tokens are 0..{n_vocab - 1}"
            raise FormatError(f"{where} holds the token {worst} in row {row + bad}; {allowed}")
        row += len(block)


def blocks_of(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of an array (N, ...) in blocks of about 16 MiB."""
    step = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def decoded(names: np.ndarray) -> list[str]:
    """UTF-8 of fixed length as text."""
    return [n.decode("utf-8", "replace") for n in names.tolist()]


def mapped(data: h5py.Dataset, path: Path) -> np.ndarray:
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
