"""Verify a token file and list every problem."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np

from igpt_cli.errors import FormatError
from igpt_cli.hdf5 import open_hdf5
from igpt_cli.tokens import checks, schema

T = TypeVar("T")
_COLUMNS = (schema.TOKENS, schema.LABELS, schema.NAMES, schema.RGB, schema.INDEX)


def verify(path: str | os.PathLike) -> list[str]:
    """Every problem of a token file, one sentence each; none if it is sound.

    Structure, attributes, shapes and dtypes, the palette's hash, the range of labels and tokens, and the SHA-256 of
    every dataset that has one.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    found = _Problems()
    try:
        with open_hdf5(path) as h5:
            _verify(h5, path, found)
    except FormatError as e:
        found.append(str(e))
    return found


class _Problems(list):
    def attempt(self, check: Callable[..., T], *args) -> T | None:
        """What the check returns, or None when it found a problem, which is noted."""
        try:
            return check(*args)
        except FormatError as e:
            self.append(str(e))
            return None


def _verify(h5: h5py.File, path: Path, found: _Problems) -> None:
    attrs = checks.attributes(h5)
    found += checks.attribute_problems(attrs, path)
    resolution, n_vocab = attrs.get("resolution"), attrs.get("n_vocab")
    if not isinstance(resolution, int) or not isinstance(n_vocab, int):
        return
    if isinstance(attrs.get("palette_sha256"), str):
        found.attempt(checks.stored_palette, h5, path, attrs)
    classes = found.attempt(checks.stored_classes, h5, path)
    for name in found.attempt(checks.split_names, h5, path) or []:
        group = h5[name]
        tokens = found.attempt(checks.mapped_tokens, group, path, resolution)
        if tokens is None:
            continue
        found.attempt(checks.check_tokens, tokens, n_vocab, f"{path}: {group.name}/tokens")
        if classes is not None:
            found.attempt(checks.stored_labels, group, path, len(tokens), len(classes))
        found.attempt(checks.require_names, group, path, len(tokens))
        found.attempt(checks.mapped_rgb, group, path, len(tokens), resolution)
        for column in _COLUMNS:
            if isinstance(group.get(column), h5py.Dataset):
                found.attempt(_check_sum, group[column], path)


def _check_sum(data: h5py.Dataset, path: Path) -> None:
    stated = data.attrs.get("sha256")
    if stated is None or data.ndim == 0:
        return
    digest = hashlib.sha256()
    step = max(1, checks.BLOCK_BYTES * len(data) // max(1, data.nbytes))
    for start in range(0, len(data), step):
        digest.update(np.ascontiguousarray(data[start : start + step]).tobytes())
    if digest.hexdigest() != stated:
        raise FormatError(
            f"{path}: {data.name} was changed after it was written: its SHA-256 is {digest.hexdigest()[:12]}..., its "
            f"attribute says {str(stated)[:12]}..."
        )
