"""Merge token files: shards of one source, or one source after another."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from igpt_cli.documents import differing
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.images.records import brief, in_split_order
from igpt_cli.tokens.shards import Shard
from igpt_cli.tokens.store import TokenFile, TokenSplit, open_tokens
from igpt_cli.tokens.writer import TokenWriter, check_space

#: Rows copied at a time.
BLOCK = 4096


def merge(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write one token file with the rows of several.

    Shards of one source (`tokenize(shard=...)`) give the file of one run, bit for bit but for the time in `created`.
    Other files are concatenated in the order given.

    Args:
        paths: token files, all shards of a source or none.
        out: the file to write.
        force: replace an existing file.
        progress: called with (rows done, rows in all).

    Raises:
        MismatchError: palette, resolution, preparation or classes differ; the message names both files and values.
        InputError: a shard is missing or given twice.
        OutputError: `out` exists or cannot be written.
    """
    if not paths:
        raise InputError("no token files to merge were given")
    files = [open_tokens(p) for p in paths]
    _check_alike(files)
    sharded = _check_shards(files)
    sources = list(dict.fromkeys(f.attrs["source"] for f in files))
    names = in_split_order({name for f in files for name in f.splits})
    splits = {name: [f.splits[name] for f in files if name in f.splits] for name in names}
    keep_rgb = _has_rgb(splits)
    with TokenWriter(
        out,
        files[0].palette,
        files[0].resolution,
        classes=files[0].classes,
        preprocess=files[0].preprocess,
        source="; ".join(sources),
        selection=files[0].selection if all(f.selection == files[0].selection for f in files) else {},
        keep_rgb=keep_rgb,
        force=force,
    ) as writer:
        check_space(writer.out, 2 * sum(f.path.stat().st_size for f in files))
        writer.skipped = dict(sum((Counter(f.skipped) for f in files), Counter()))
        done, total = 0, sum(len(part) for parts in splits.values() for part in parts)
        for name, parts in splits.items():
            for rows in _in_order(parts, sharded):
                writer.append(name, *_gathered(parts, rows, keep_rgb))
                done += len(rows)
                if progress:
                    progress(done, total)
    return writer.out


def _check_alike(files: list[TokenFile]) -> None:
    first = files[0]
    for other in files[1:]:
        for what, a, b in (
            ("resolution", first.resolution, other.resolution),
            ("palette", _palette_of(first), _palette_of(other)),
            ("preparation", first.preprocess, other.preprocess),
            ("classes", first.classes, other.classes),
        ):
            if a != b:
                a, b = differing(a, b)
                raise MismatchError(f"{first.path} and {other.path} cannot be merged: the {what} is {a} and {b}")


def _palette_of(file: TokenFile) -> str:
    return f"{file.palette.sha256[:12]} ({file.n_vocab} colours)"


def _check_shards(files: list[TokenFile]) -> bool:
    """Whether these are the shards of one source, checked to be complete."""
    seen_paths: dict[Path, Path] = {}
    for file in files:
        if (same := file.path.resolve()) in seen_paths:
            raise InputError(f"{file.path} is given twice")
        seen_paths[same] = file.path
    shards = {f.path: f.attrs.get("shard") for f in files}
    if not any(shards.values()):
        return False
    if whole := [p for p, s in shards.items() if s is None]:
        raise MismatchError(f"shards cannot be merged with files that are none: {brief(whole)}")
    parsed = {path: Shard.parse(str(s)) for path, s in shards.items()}
    first = files[0]
    if other := next((f for f in files if f.selection != first.selection), None):
        a, b = differing(first.selection, other.selection)
        raise MismatchError(f"{first.path} and {other.path} are no shards of one run: the one has {a}, the other {b}")
    by_number: dict[int, Path] = {}
    for file in files:
        shard = parsed[file.path]
        if shard.n != parsed[first.path].n or file.attrs["source"] != first.attrs["source"]:
            raise MismatchError(
                f"{first.path} is shard {parsed[first.path]} of {first.attrs['source']}, {file.path} is shard {shard} "
                f"of {file.attrs['source']}; merge the shards of one run"
            )
        if shard.i in by_number:
            raise InputError(f"shard {shard} is given twice: {by_number[shard.i]} and {file.path}")
        by_number[shard.i] = file.path
    n = parsed[first.path].n
    if missing := [f"{i}/{n}" for i in range(n) if i not in by_number]:
        raise InputError(f"of {n} shards {len(missing)} are missing: {brief(missing)}")
    return True


def _has_rgb(splits: dict[str, list[TokenSplit]]) -> bool:
    parts = [part for parts in splits.values() for part in parts]
    without = [part.file.path for part in parts if part.rgb is None]
    if without and len(without) < len(parts):
        with_rgb = next(part.file.path for part in parts if part.rgb is not None)
        raise MismatchError(f"{with_rgb} keeps the images (--keep-rgb) and {without[0]} does not; make them alike")
    return not without


def _in_order(parts: list[TokenSplit], sharded: bool) -> Iterator[np.ndarray]:
    """Blocks (n, 2) of the next parts and their rows."""
    of_part = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    of_row = np.concatenate([np.arange(len(p)) for p in parts])
    if sharded:
        # Stable: keeps the order of an image's views.
        order = np.argsort(np.concatenate([p.index for p in parts]), kind="stable")
        of_part, of_row = of_part[order], of_row[order]
    for start in range(0, len(of_row), BLOCK):
        yield np.stack([of_part[start : start + BLOCK], of_row[start : start + BLOCK]], axis=1)


def _gathered(parts: list[TokenSplit], rows: np.ndarray, keep_rgb: bool) -> tuple:
    """tokens, labels, names and rgb of these rows."""
    n, (first, *_) = len(rows), parts
    tokens = np.empty((n, first.tokens.shape[1]), first.tokens.dtype)
    labels = np.empty(n, first.labels.dtype)
    rgb = np.empty((n, *first.rgb.shape[1:]), np.uint8) if keep_rgb else None
    names = [parts[p].names[r] for p, r in rows.tolist()]
    for p in np.unique(rows[:, 0]):
        here = rows[:, 0] == p
        tokens[here] = parts[p].tokens[rows[here, 1]]
        labels[here] = parts[p].labels[rows[here, 1]]
        if rgb is not None:
            rgb[here] = parts[p].rgb[rows[here, 1]]
    return tokens, labels, names, rgb
