"""Import token files from OpenAI's arrays; the opposite of `export`.

Shapes: N images, T = R * R tokens of an image, C classes. The arrays are memory-mapped, read in blocks (ImageNet's trX
has 1.3 million rows), and never unpickled.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import check_output, require_file
from igpt_cli.hdf5 import kind_of
from igpt_cli.palette.formats import ARRAY_ERRORS
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.checks import blocks_of, check_tokens
from igpt_cli.tokens.export import PREFIXES
from igpt_cli.tokens.store import TokenFile, open_tokens
from igpt_cli.tokens.writer import TokenWriter, check_space

#: {split: (X, Y or None)}
Arrays = Mapping[str, tuple[Path, Path | None]]


def import_openai(
    arrays: Arrays,
    palette: Palette,
    out: str | os.PathLike,
    *,
    classes: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TokenFile:
    """Write a token file from arrays of tokens and labels.

    Args:
        arrays: {split: (X, Y or None)}. X.npy is (N, R * R) whole numbers in [0, V), of any type. Y.npy is (N, C)
            one-hot, of any type, a row of zeros being an image without a label; or (N,) whole numbers in -1..C-1.
        palette: the palette of the tokens.
        classes: C names; default "0", "1", ...
        force: replace an existing file.
        progress: called with (rows done, rows in all).

    Returns:
        The file, opened.

    Raises:
        InputError, FormatError: an array is missing, of another shape or type, or holds values out of range; the
            message names the file and the row.
        OutputError: `out` exists, or cannot be written.
    """
    check_output(Path(out), force)
    tokens = {split: _tokens(x) for split, (x, _) in arrays.items()}
    resolution = _resolution({arrays[split][0]: rows.shape[1] for split, rows in tokens.items()})
    labels, n_classes = _all_labels(arrays, {split: len(rows) for split, rows in tokens.items()}, len(classes))
    source = ", ".join(str(path) for pair in arrays.values() for path in pair if path)
    done, total = 0, sum(map(len, tokens.values()))
    with TokenWriter(
        out,
        palette,
        resolution,
        classes=classes or [str(c) for c in range(n_classes)],
        preprocess={"imported": "npy", "resolution": resolution},
        source=source,
        force=force,
    ) as writer:
        check_space(writer.out, 2 * total * (2 * resolution**2 + 100))
        for split, rows in tokens.items():
            at = 0
            for block in blocks_of(rows):
                check_tokens(block, palette.n_vocab, str(arrays[split][0]), first=at)
                end = at + len(block)
                names = [f"{split}/{i:06d}" for i in range(at, end)]
                writer.append(split, block, labels[split][at:end], names)
                at = end
                if progress:
                    progress(done + at, total)
            done += at
    return open_tokens(writer.out, check_range=False)


def find_arrays(name: str | os.PathLike) -> dict[str, tuple[Path, Path | None]]:
    """The files that begin with `name`, by split: "out/photos" finds out/photos_trX.npy, out/photos_trY.npy, ...

    Raises:
        InputError: there are none, or a Y without its X.
    """
    name = Path(name)
    arrays: dict[str, tuple[Path, Path | None]] = {}
    for split, prefix in PREFIXES.items():
        x, y = (name.with_name(f"{name.name}_{prefix}{kind}.npy") for kind in "XY")
        if x.exists():
            arrays[split] = (x, y if y.exists() else None)
        elif y.exists():
            raise InputError(f"{y} is there and {x.name} is not; labels without tokens make no token file")
    if not arrays:
        raise InputError(
            f"there is neither a file {name} nor {name.name}_trX.npy, {name.name}_vaX.npy or {name.name}_teX.npy in "
            f"{name.parent}; name X.npy and Y.npy, or the beginning of the names of all"
        )
    return arrays


def split_from_name(path: str | os.PathLike) -> str | None:
    """The split in a file's name: "test" for imagenet_teX.npy; None without one.

    >>> split_from_name("imagenet_teX.npy"), split_from_name("X.npy")
    ('test', None)
    """
    match = re.search(r"(?:^|_)(tr|va|te)X\.npy$", Path(path).name)
    return next(s for s, prefix in PREFIXES.items() if prefix == match[1]) if match else None


def named_arrays(sources: Sequence[Path], split: str | None = None) -> dict[str, tuple[Path, Path | None]]:
    """{split: (X, Y or None)} from the arrays that a user names: X.npy, X.npy and Y.npy, or as for `find_arrays`.

    Args:
        split: the split of X.npy, or the only one to import.

    Raises:
        InputError: more than two files, nothing of that name or split, or an X whose name has no split.
    """
    if len(sources) > 2:
        several = "several are named by the beginning of their names, as openai/imagenet"
        raise InputError(f"{len(sources)} files were given; one split is X.npy and Y.npy, and {several}")
    x, y = sources[0], sources[1] if len(sources) == 2 else None
    if y is None and not x.is_file() and x.suffix != ".npy":
        arrays = find_arrays(x)
        if split is not None and split not in arrays:
            raise InputError(f"{x} has no arrays of {split!r}; there are those of {', '.join(arrays)}")
        return arrays if split is None else {split: arrays[split]}
    split = split or split_from_name(x)
    if split is None:
        raise InputError(f"which split {x} is cannot be told from its name; say it with --split train|val|test")
    return {split: (x, y)}


def palette_beside(x: Path) -> Path:
    """The palette in the folder of the tokens `x`, by OpenAI's name. Raises InputError: there is none."""
    path = x.with_name("kmeans_centers.npy")
    if not path.exists():
        hint = "give the one that the tokens were made with, --palette P"
        raise InputError(f"no palette was given and none is at {path}; {hint}")
    return path


def read_class_names(path: str | Path) -> list[str]:
    """The lines of a text file, one name a line.

    Raises:
        InputError, FormatError: it is not there, not UTF-8, empty, or has an empty line.
    """
    try:
        names = require_file(path, "a list of class names").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        expected = "UTF-8 text was expected, the name of a class on each line"
        raise FormatError(f"{path} is {kind_of(path)}; {expected}") from e
    if not names or not all(n.strip() for n in names):
        where = f"line {[bool(n.strip()) for n in names].index(False) + 1} is empty" if names else "it is empty"
        raise FormatError(f"{path}: {where}; the name of a class is expected on each line")
    return [n.strip() for n in names]


def _tokens(path: Path) -> np.ndarray:
    """X, mapped: (N, T) whole numbers."""
    array = _mapped(path, "an array of tokens (.npy)")
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise FormatError(f"{path} holds {_form(array)}; tokens are (N, R * R) whole numbers")
    if not len(array):
        raise FormatError(f"{path} holds no images: its shape is {array.shape}")
    return array


def _resolution(widths: dict[Path, int]) -> int:
    """R, the same for all."""
    for path, width in widths.items():
        if not width or math.isqrt(width) ** 2 != width:
            hint = "X is (N, R * R) and comes before Y"
            raise FormatError(f"{path} has rows of {width:,} tokens, which is no square R * R; {hint}")
    (first, width), *others = widths.items()
    for path, other in others:
        if other != width:
            raise FormatError(f"{first} has rows of {width:,} tokens and {path} of {other:,}; all must be of one size")
    return math.isqrt(width)


def _all_labels(arrays: Arrays, rows: dict[str, int], n_names: int) -> tuple[dict[str, np.ndarray], int]:
    """{split: (N,) int32, -1 = none}, and C."""
    labels, widths = {}, {}
    for split, (_, path) in arrays.items():
        labels[split], width = (np.full(rows[split], -1, np.int32), 0) if path is None else _labels(path, rows[split])
        if width:
            widths[path] = width
    if len(set(widths.values())) > 1:
        numbers = ", ".join(f"{path} has {width:,}" for path, width in widths.items())
        raise FormatError(f"the arrays of labels do not have the same number of classes: {numbers}")
    most = 1 + max(int(values.max()) for values in labels.values())
    n_classes = next(iter(widths.values()), n_names or most)
    if most > n_classes:
        raise FormatError(f"the label {most - 1} is used, and there are {n_classes:,} classes")
    if n_names and n_names != n_classes:
        columns = f"{next(iter(widths))} has {n_classes:,} columns"
        raise FormatError(f"{n_names:,} names of classes were given, and {columns}")
    return labels, n_classes


def _labels(path: Path, n: int) -> tuple[np.ndarray, int]:
    """(N,) int32 of one Y, -1 = none, and its columns (0 for whole numbers)."""
    array = _mapped(path, "an array of labels (.npy)")
    kinds = {1: "iu", 2: "biuf"}.get(array.ndim, "")
    if array.dtype.kind not in kinds or 0 in array.shape[1:]:
        raise FormatError(f"{path} holds {_form(array)}; labels are (N, C) one-hot numbers or (N,) whole numbers")
    if len(array) != n:
        raise FormatError(f"{path} has {len(array):,} rows, and X beside it {n:,}; they belong together row by row")
    if array.ndim == 1:
        if (bad := np.flatnonzero((array < -1) | (array >= 2**20))).size:
            label = f"the label {array[bad[0]]} in row {bad[0]}"
            raise FormatError(f"{path} holds {label}; labels are 0..C-1, or -1 for none")
        return array.astype(np.int32), 0
    out, at = np.full(n, -1, np.int32), 0
    for block in blocks_of(array):
        ones = block == 1
        good = (ones | (block == 0)).all(1) & (ones.sum(1) <= 1)
        if not good.all():
            row = int(np.argmin(good))
            raise FormatError(f"{path}: row {at + row} is not one-hot: {_not_one_hot(block[row])}")
        out[at : at + len(block)] = np.where(ones.any(1), ones.argmax(1), -1)
        at += len(block)
    return out, array.shape[1]


def _not_one_hot(row: np.ndarray) -> str:
    other = row[(row != 0) & (row != 1)]
    return f"it holds {other[0]}" if other.size else f"it has {int((row == 1).sum())} ones; at most one is expected"


def _mapped(path: Path, what: str) -> np.ndarray:
    """A .npy file, memory-mapped."""
    with open(require_file(path, what), "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise FormatError(f"{path} is {kind_of(path)}; {what} was expected there")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ARRAY_ERRORS as e:
        why = str(e).partition("\n")[0][:160] or type(e).__name__
        raise FormatError(f"{path} is damaged or cut off, or holds Python objects ({why})") from e


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"
