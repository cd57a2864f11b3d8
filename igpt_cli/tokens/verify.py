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
    """List every problem of a token file, one sentence each: structure, attributes, shapes and dtypes, the palette's
    hash, the range of labels and tokens, and the SHA-256 of every dataset that has one.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    problems = _Problems()
    try:
        with open_hdf5(path) as h5:
            _verify(h5, path, problems)
    except FormatError as e:
        problems.append(str(e))
    return problems


class _Problems(list):
    def attempt(self, check: Callable[..., T], *args) -> T | None:
        """The result of the check, or None after noting the problem that it raised."""
        try:
            return check(*args)
        except FormatError as e:
            self.append(str(e))
            return None


def _verify(h5: h5py.File, path: Path, problems: _Problems) -> None:
    attrs = checks.attributes(h5)
    problems += checks.attribute_problems(attrs, path)
    resolution, n_vocab = attrs.get("resolution"), attrs.get("n_vocab")
    if not isinstance(resolution, int) or not isinstance(n_vocab, int):
        return
    if isinstance(attrs.get("palette_sha256"), str):
        problems.attempt(checks.stored_palette, h5, path, attrs)
    classes = problems.attempt(checks.stored_classes, h5, path)
    for name in problems.attempt(checks.split_names, h5, path) or []:
        group = h5[name]
        tokens = problems.attempt(checks.mapped_tokens, group, path, resolution)
        if tokens is None:
            continue
        problems.attempt(checks.check_tokens, tokens, n_vocab, f"{path}: {group.name}/tokens")
        if classes is not None:
            problems.attempt(checks.stored_labels, group, path, len(tokens), len(classes))
        problems.attempt(checks.require_names, group, path, len(tokens))
        problems.attempt(checks.mapped_rgb, group, path, len(tokens), resolution)
        for column in _COLUMNS:
            if isinstance(group.get(column), h5py.Dataset):
                problems.attempt(_check_sum, group[column], path)


def _check_sum(data: h5py.Dataset, path: Path) -> None:
    stated = data.attrs.get("sha256")
    if stated is None or data.ndim == 0:
        return
    digest = hashlib.sha256()
    step = max(1, checks.BLOCK_BYTES * len(data) // max(1, data.nbytes))
    for start in range(0, len(data), step):
        digest.update(np.ascontiguousarray(data[start : start + step]).tobytes())
    if digest.hexdigest() != stated:
        now = f"its SHA-256 is {digest.hexdigest()[:12]}..., its attribute says {str(stated)[:12]}..."
        raise FormatError(f"{path}: {data.name} was changed after it was written: {now}")
