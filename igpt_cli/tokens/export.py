"""Export token files to OpenAI's arrays, {name}_{trX,trY,vaX,vaY,teX,teY}.npy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.files import check_output, replacing
from igpt_cli.tokens.checks import blocks_of
from igpt_cli.tokens.store import TokenFile, TokenSplit

#: OpenAI's names of the splits.
PREFIXES = {"train": "tr", "val": "va", "test": "te"}


def export_openai(
    file: TokenFile, name: str | os.PathLike, *, force: bool = False, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Path], list[str]]:
    """Write X, (N, R * R) int32, and Y, (N, C) float32 one-hot, for each of train, val and test.

    Args:
        name: path and beginning of the file names: "out/photos" gives out/photos_trX.npy, ...
        force: replace existing files.
        progress: called with (rows done, rows in all).

    Returns:
        The files written, and what OpenAI's code needs and they lack, one sentence each.

    Raises:
        InputError: the file has no split train, val or test.
        OutputError: one of the files exists, or cannot be written.
    """
    name = Path(name)
    splits = {prefix: file.splits[s] for s, prefix in PREFIXES.items() if s in file.splits}
    if not splits:
        raise InputError(f"{file.path} has no split train, val or test; its splits: {', '.join(file.splits)}")
    parts = [(prefix, kind) for prefix in splits for kind in ("X", "Y") if kind == "X" or file.classes]
    paths = {part: check_output(name.with_name(f"{name.name}_{part[0]}{part[1]}.npy"), force) for part in parts}
    done, total = 0, sum(len(split) for split in splits.values())
    for (prefix, kind), path in paths.items():
        split = splits[prefix]
        width, dtype = (file.resolution**2, np.int32) if kind == "X" else (len(file.classes), np.float32)
        with replacing(path) as part:
            written = np.lib.format.open_memmap(part, "w+", dtype, (len(split), width))
            at = 0
            for block in blocks_of(split.tokens) if kind == "X" else _one_hot(split):
                written[at : at + len(block)] = block
                at += len(block)
                if progress and kind == "X":
                    progress(done + at, total)
            written.flush()
            del written
        done += len(split) if kind == "X" else 0
    return list(paths.values()), _lacking(file, name.name)


def _one_hot(split: TokenSplit) -> Iterator[np.ndarray]:
    """(n, C) float32 blocks; an image without a label is a row of zeros."""
    classes = np.arange(len(split.file.classes))
    for labels in blocks_of(split.labels):
        yield (labels[:, None] == classes).astype(np.float32)


def _lacking(file: TokenFile, name: str) -> list[str]:
    lacking = [
        f"no split {split}, so no {name}_{prefix}X.npy and {name}_{prefix}Y.npy"
        for split, prefix in PREFIXES.items()
        if split not in file.splits
    ]
    if not file.classes:
        lacking.append("no classes, so no Y files")
    for split in PREFIXES if file.classes else ():
        if split in file.splits and (none := int(np.sum(file.splits[split].labels < 0))):
            lacking.append(f"{none:,} images of {split} have no label: their rows of Y are zero")
    if left := [s for s in file.splits if s not in PREFIXES]:
        lacking.append(f"the splits {', '.join(left)} have no place in that form and were left out")
    return lacking
