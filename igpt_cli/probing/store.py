"""Stored features of a model's layers: streamed, resumable, reused by later probes.

>>> features = extract_features(load_model("latest"), open_tokens("data/tokens-32.h5"), "features.h5", layers=[12])
>>> features.read("train", 12).shape
(50000, 512)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.device import choose_precision
from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.files import sha256_of
from igpt_cli.model_dir import ModelDir, check_fit
from igpt_cli.model_input import inputs_of, places
from igpt_cli.probing.feature_file import Features, FeatureSplit, open_features, sha256_of_labels, sha256_of_rows
from igpt_cli.probing.feature_writer import FeatureWriter, NewSplit, differences, identity, unfinished
from igpt_cli.probing.features import (
    MASK_PROB,
    POOLS,
    Frozen,
    Masking,
    batches,
    feature_shapes,
    images_at_once,
    model_device,
)
from igpt_cli.probing.layers import Layer, check_layers
from igpt_cli.statistics import evenly_spaced
from igpt_cli.tokens.checks import blocks_of
from igpt_cli.tokens.store import TokenFile, TokenSplit

__all__ = ["BERT_MASKS", "FeatureSplit", "Features", "extract_features", "open_features", "unfinished"]

#: Masks of each image of a split that is predicted (section 4.6); the training split has one.
BERT_MASKS = 5
#: For `igpt features` and for `igpt probe --features`, which overwrites nothing.
WAY_OUT = "choose another file, or overwrite it with igpt features --force"


def extract_features(
    run: ModelDir,
    tokens: TokenFile,
    path: str | os.PathLike,
    layers: Sequence[Layer] | None = None,
    splits: Sequence[str] | None = None,
    *,
    pool: str = "mean",
    rows: Mapping[str, np.ndarray] | None = None,
    limit: int | None = None,
    bert_masks: int | Mapping[str, int] | None = None,
    precision: str = "float32",
    batch_size: int | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    source: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Write the features of each image at each layer; one forward pass serves all layers.

    A file that holds these features already (the same weights, palette, tokens, labels, pool, precision and masks, and
    at least these layers, splits and rows) is returned at once (`Features.reused`). Unfinished features are in the
    folder `<path>.part`, where an interrupted run leaves them for `resume`.

    Args:
        tokens: a token file with the model's palette and resolution; for a model of RGB images of any palette, and
            images that it stores are used in place of its tokens.
        layers: which of 0..n_layers, None for all of them; or sites within blocks such as "20.mlp", too (see `layers`).
        splits: which; None for those in which an image has a label, or for all where no image has one.
        pool: "mean" over positions as in the paper, over "quadrants", "max", the "last" position, or "none".
        rows: {split: (n,) rows to use}; `limit`: at most so many images of each other split, evenly spaced.
        bert_masks: of a BERT model: masks of each image, M for each split and 1 for "train"; 0: whole images; or
            {split: M}. Default 5.
        precision: "float32", "bfloat16" or "auto"; means over positions are float32 either way.
        batch_size: images at a time; None for as many as suit the device. It changes no result but by rounding.
        seed: of BERT's masks, which depend on (seed, row, draw) alone.
        resume: continue an interrupted run of the same arguments, if there is one.
        force: replace an existing file, and what an interrupted run left.
        source: what the file records as the source of the tokens; default the path of the token file.
        progress: called with (forward passes of an image done, to do), those of the interrupted run not counted.

    Raises:
        InputError, MismatchError: no such layer, split or row, other palette or resolution, an unknown pool, features
            that do not fit in memory, or, with `resume`, an interrupted run of other features.
        OutputError: `path` holds other features, which are named, or cannot be written, or the disk is too small.
        NonFiniteError: a feature is NaN or infinite.
        IgptError: the model's weights changed meanwhile; nothing is written.
    """
    path = Path(path)
    check_fit(run, tokens)
    layers = check_layers(run, layers)
    if pool not in POOLS:
        raise InputError(f"pool is {pool!r}, expected one of {', '.join(POOLS)}")
    device = model_device(run.model)
    precision = choose_precision(precision, device)
    names = _splits(tokens, splits)
    masking = _masking(run, names, bert_masks, seed)
    new = {
        name: _new_split(run, tokens.split(name), _rows(tokens.split(name), rows, limit), masking[name])
        for name in names
    }
    guard = Frozen(run.model, run.run)
    attrs = {
        "model_name": run.name,
        "model": json.dumps(run.config["model"], sort_keys=True),
        "checkpoint_sha256": guard.sha256,
        "palette_sha256": tokens.palette.sha256,
        "preparation": json.dumps(run.config.get("preparation", {}), sort_keys=True),
        "pool": pool,
        "precision": precision,
        "n_layers": int(run.model.n_layers),  # type: ignore[arg-type]
        "resolution": tokens.resolution,
        "run": run.run,
        "tokens": tokens.title if source is None else source,
        "device": str(device),
    }
    if path.is_file() and not force and (found := _reused(path, identity(attrs, new, layers), new)):
        return found
    one, decode = inputs_of(run, tokens.split(names[0]))
    shapes = feature_shapes(run.model, one, layers, pool, precision, decode)
    size = images_at_once(batch_size, places(run, tokens.resolution), shapes, device)
    writer = FeatureWriter(path, attrs, tokens.classes, new, shapes, resume=resume, force=force)
    try:
        _write(writer, run, tokens, size, precision, pool, masking, progress or (lambda done, total: None))
    except BaseException:
        writer.leave()
        raise
    try:
        guard.check()
    except BaseException:
        writer.discard()
        raise
    writer.finish()
    return open_features(path)


def _write(
    writer: FeatureWriter,
    run: ModelDir,
    tokens: TokenFile,
    batch_size: int,
    precision: str,
    pool: str,
    masking: dict[str, Masking | None],
    progress: Callable[[int, int], None],
) -> None:
    """Compute what is not done yet."""
    passes = {name: max(1, split.masks) for name, split in writer.splits.items()}
    done, total = 0, sum(passes[name] * (len(s.rows) - writer.done[name]) for name, s in writer.splits.items())
    for name, split in writer.splits.items():
        seen, decode = inputs_of(run, tokens.split(name))
        for at, draw, found in batches(
            run.model,
            seen,
            split.rows,
            list(writer.shapes),
            batch_size,
            pool=pool,
            precision=precision,
            masking=masking[name],
            decode=decode,
            first=writer.done[name],
        ):
            writer.write(name, at, draw, found)
            if draw == passes[name] - 1:
                writer.mark(name, at.stop)
            done += at.stop - at.start
            progress(done, total)


def _reused(path: Path, requested: dict[str, Any], new: Mapping[str, NewSplit]) -> Features:
    """The existing file with the requested images. Raises OutputError, naming what differs, if it holds other
    features.
    """
    try:
        found = open_features(path)
    except FormatError as e:
        raise OutputError(f"{path} exists already ({e}); {WAY_OUT}") from e
    lacking = []
    for name, split in new.items():
        if name not in found.splits or np.array_equal(found.splits[name].rows, split.rows):
            continue
        there = found.splits[name]
        if (only := there.only(split.rows)) is not None:
            found.splits[name] = only
            continue
        missing = int(np.sum(~np.isin(split.rows, there.rows)))
        lacking.append(f"{missing:,} of the {len(split.rows):,} images of {name} are missing")
        requested["splits"][name] |= {k: there.attrs[k] for k in ("rows_sha256", "labels_sha256")}
    if wrong := differences(identity(found.attrs, found.splits, found.layers), requested) + lacking:
        raise OutputError(f"{path} exists already and holds other features: {'; '.join(wrong)}; {WAY_OUT}")
    found.reused = True
    return found


def _splits(tokens: TokenFile, asked: Sequence[str] | None) -> list[str]:
    """The splits in the order of the file."""
    if asked is None:
        labelled = [name for name, split in tokens.splits.items() if np.any(np.asarray(split.labels) >= 0)]
        return [name for name in labelled or tokens.splits if len(tokens.splits[name])] or list(tokens.splits)
    for name in asked:
        tokens.split(name)
    if not asked:
        raise InputError(f"no split was asked for; the splits of {tokens.path}: {', '.join(tokens.splits)}")
    return [name for name in tokens.splits if name in asked]


def _rows(split: TokenSplit, asked: Mapping[str, np.ndarray] | None, limit: int | None) -> np.ndarray:
    """(n,) int64: the rows named, or all, or `limit` of them, evenly spaced since splits are often sorted by class."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    n = len(split)
    if asked is not None and split.name in asked:
        rows = np.asarray(asked[split.name], np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < n:
            raise InputError(f"rows {rows.min()}..{rows.max()} of {split.name} asked for; it has rows 0..{n - 1}")
    else:
        rows = evenly_spaced(n, limit)
    if not len(rows):
        raise InputError(f"{split.file.path}: the split {split.name!r} has no images to take features of")
    return rows


def _masking(
    run: ModelDir, splits: Sequence[str], asked: int | Mapping[str, int] | None, seed: int
) -> dict[str, Masking | None]:
    """{split: how its images are masked, or None for whole images}."""
    bert = run.config["model"].get("objective") == "bert"
    if asked is None:
        asked = BERT_MASKS if bert else 0
    if isinstance(asked, int):
        if asked > 0 and not bert:
            raise InputError(f"bert_masks is {asked}, and {run.run} is no BERT model: it sees whole images")
        asked = {name: min(asked, 1) if name == "train" else asked for name in splits}
    for name, masks in asked.items():
        if masks < 0:
            raise InputError(f"bert_masks is {masks}; it must be 0 (whole images) or more")
        if masks and not bert:
            raise InputError(f"bert_masks is {masks} for {name}, and {run.run} is no BERT model: it sees whole images")
    prob = run.config.get("training", {}).get("mask_prob", MASK_PROB)
    return {name: Masking(n, prob, seed) if (n := asked.get(name, 0)) else None for name in splits}


def _new_split(run: ModelDir, split: TokenSplit, rows: np.ndarray, masking: Masking | None) -> NewSplit:
    labels = np.asarray(split.labels)[rows]
    names = split.names
    attrs: dict[str, Any] = {
        "tokens_sha256": split.sha256 or _digest(split.tokens),
        "rows_sha256": sha256_of_rows(rows),
        "labels_sha256": sha256_of_labels(labels),
        "masks": masking.n_masks if masking else 0,
    }
    if inputs_of(run, split)[0] is split.rgb:
        attrs["rgb_sha256"] = split.rgb_sha256 or _digest(split.rgb)
    if masking:
        attrs |= {"mask_prob": float(masking.prob), "seed": masking.seed}
    return NewSplit(labels, rows, [names[r] for r in rows], attrs["masks"], attrs)


def _digest(values: np.ndarray) -> str:
    """SHA-256 of an array, read block by block."""
    return sha256_of(*(np.ascontiguousarray(block).data for block in blocks_of(values)))
