"""Describe a token file, as text and JSON."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from igpt_cli.hdf5 import open_hdf5
from igpt_cli.tokens.checks import attributes, blocks_of
from igpt_cli.tokens.store import TokenFile, open_tokens

#: Number of the most used colours that are listed.
MOST_USED = 8


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Describe a token file: tree, attributes, class counts and use of the palette.

    Returns:
        `path`; `attrs` (with preprocess as an object); `tree`: [{name, shape, dtype, bytes}]; `splits`: {name: {rows,
        skipped, classes: {name: count}, unlabelled}}; `palette`: {colours, used, most_used: [{token, rgb, share}]},
        share in percent of all pixels.
    """
    file = open_tokens(path)
    with open_hdf5(path) as h5:
        tree: list[dict] = []
        h5.visititems(lambda name, thing: tree.append(_entry(name, thing)) if hasattr(thing, "shape") else None)
        attrs = attributes(h5)
    return {
        "path": str(path),
        "attrs": {**attrs, "preprocess": file.preprocess},
        "tree": tree,
        "splits": {name: _split(file, name) for name in file.splits},
        "palette": _palette_use(file),
    }


def palette_use(file: TokenFile) -> np.ndarray:
    """(V,) int64: how many pixels of the file each colour stands for."""
    use = np.zeros(file.n_vocab, np.int64)
    for split in file.splits.values():
        for block in blocks_of(split.tokens):
            use += np.bincount(block.ravel(), minlength=file.n_vocab)
    return use


def _entry(name: str, data) -> dict[str, Any]:
    dtype = f"utf-8[{data.dtype.itemsize}]" if data.dtype.kind == "S" else data.dtype.name
    return {"name": f"/{name}", "shape": list(data.shape), "dtype": dtype, "bytes": int(data.nbytes)}


def _split(file: TokenFile, name: str) -> dict[str, Any]:
    split = file.splits[name]
    return {
        "rows": len(split),
        "skipped": file.skipped.get(name, 0),
        "classes": dict(zip(file.classes, split.class_counts().tolist(), strict=True)),
        "unlabelled": int(np.sum(split.labels < 0)),
    }


def _palette_use(file: TokenFile) -> dict[str, Any]:
    use = palette_use(file)
    total = max(1, int(use.sum()))
    top = np.argsort(-use, kind="stable")[:MOST_USED]
    return {
        "colours": file.n_vocab,
        "used": int(np.count_nonzero(use)),
        "most_used": [
            {"token": int(t), "rgb": file.palette.rgb[t].tolist(), "share": round(100 * int(use[t]) / total, 3)}
            for t in top
            if use[t]
        ],
    }
