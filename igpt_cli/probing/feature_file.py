"""The features file (docs/formats.md): check once, then memory-map.

>>> features = open_features("data/features-igpt-s.h5")
>>> features.layers[-1], features.read("train", 12).shape
(24, (50000, 512))
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import sha256_of
from igpt_cli.hdf5 import open_hdf5
from igpt_cli.probing.layers import SITES, Layer, in_order, place
from igpt_cli.tokens import schema
from igpt_cli.tokens.checks import (
    attributes,
    dataset,
    decoded,
    mapped,
    require_names,
    split_names,
    stored_classes,
    stored_labels,
)

FORMAT, FORMAT_VERSION = "igpt-features", 1
LABELS, NAMES, CLASSES, ROWS = schema.LABELS, schema.NAMES, schema.CLASSES, "rows"
LAYER = "layer-"
FEATURE_DTYPE, ROW_DTYPE = "<f4", "<i8"

#: Root attributes that are text.
_TEXTS = (
    *("model_name", "model", "checkpoint_sha256", "palette_sha256", "preparation", "pool", "precision"),
    *("run", "tokens", "device", "tool_version", "created"),
)
#: What makes the features of one file those of another: root attributes, and attributes of a split.
IDENTITY = ("checkpoint_sha256", "model", "palette_sha256", "preparation", "pool", "precision")
SPLIT_IDENTITY = ("tokens_sha256", "rgb_sha256", "rows_sha256", "labels_sha256", "masks", "mask_prob", "seed")


class FeatureSplit:
    """One split of a features file; N images.

    Attributes:
        labels: (N,) int32, an index into the file's classes, -1 = none.
        rows: (N,) int64, the images' rows in the split of the token file.
        n_masks: M, masks of each image; 0 where the model saw whole images.
        attrs: tokens_sha256, rows_sha256, labels_sha256, masks, and with masks mask_prob and seed.
        places: (N,) where these images stand in the file; None for all in order.
    """

    def __init__(
        self,
        file: Features,
        name: str,
        labels: np.ndarray,
        rows: np.ndarray,
        attrs: dict[str, Any],
        layers: dict[Layer, np.ndarray],
        places: np.ndarray | None = None,
    ):
        self.file, self.name = file, name
        self.labels, self.rows, self.attrs, self.places = labels, rows, attrs, places
        self.n_masks = int(attrs["masks"])
        self._layers = layers  # of all images in the file: {layer: (N, D), with masks (M, N, D)}, memory-mapped

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def names(self) -> list[str]:
        """The N names of the images, read when first asked for."""
        with open_hdf5(self.file.path, "a features file") as h5:
            names = decoded(h5[self.name][NAMES][:])
        return names if self.places is None else [names[i] for i in self.places]

    @property
    def widths(self) -> dict[Layer, int]:
        """{layer: D}."""
        return {layer: int(values.shape[-1]) for layer, values in self._layers.items()}

    def masked(self, layer: Layer) -> np.ndarray:
        """The features under each mask: (M, N, D) float32, M = 1 for whole images. Raises InputError for a missing
        layer.

        All images of the file are memory-mapped and read-only; some of them (`only`) are read.
        """
        if layer not in self._layers:
            raise InputError(f"{self.file.path} has no layer {layer}; its layers: {format_layers(self.file.layers)}")
        values = self._layers[layer] if self.n_masks else self._layers[layer][None]
        return values if self.places is None else values[:, self.places]

    def only(self, rows: np.ndarray) -> FeatureSplit | None:
        """The same split with the images at these rows of the token file alone, in this order; None if one lacks."""
        if not len(self.rows):
            return None
        order = np.argsort(self.rows, kind="stable")
        at = order[np.minimum(np.searchsorted(self.rows, rows, sorter=order), len(order) - 1)]
        if not np.array_equal(self.rows[at], rows):
            return None
        places = at if self.places is None else self.places[at]
        labels = self.labels[at]
        attrs = {**self.attrs, "rows_sha256": sha256_of_rows(rows), "labels_sha256": sha256_of_labels(labels)}
        return FeatureSplit(self.file, self.name, labels, self.rows[at], attrs, self._layers, places)


class Features:
    """An open features file; see `open_features`.

    Attributes: path, attrs (root attributes), classes (C names), n_layers (L), layers (those stored, rising),
    resolution (R), splits ({name: FeatureSplit}), reused (`extract_features` found the file and computed nothing).
    """

    def __init__(self, path: Path, attrs: dict[str, Any], classes: list[str], layers: list[Layer]):
        self.path, self.attrs, self.classes, self.layers = path, attrs, classes, layers
        self.n_layers, self.resolution = int(attrs["n_layers"]), int(attrs["resolution"])
        self.splits: dict[str, FeatureSplit] = {}
        self.reused = False

    def __reduce__(self):
        return _reopened, (self.path, {name: s.rows for name, s in self.splits.items() if s.places is not None})

    def split(self, name: str) -> FeatureSplit:
        """The split of that name. Raises InputError with the splits there are."""
        if name not in self.splits:
            raise InputError(f"{self.path} has no split {name!r}; its splits: {', '.join(self.splits)}")
        return self.splits[name]

    def masked(self, split: str, layer: Layer) -> np.ndarray:
        """The features of a split under each mask, (M, N, D) float32; see `FeatureSplit.masked`. With pool "none" a
        row is (T, D).
        """
        return self.split(split).masked(layer)

    def read(self, split: str, layer: Layer, mask: int = 0) -> np.ndarray:
        """The features of a split at a layer under one mask: (N, D) float32. Raises InputError if one of them is
        missing.
        """
        values = self.masked(split, layer)
        if not 0 <= mask < len(values):
            raise InputError(f"{self.path} has no mask {mask} of the split {split!r}; it has {len(values)}, from 0")
        return values[mask]

    def labels(self, split: str) -> np.ndarray:
        """(N,) int32, -1 = none."""
        return self.split(split).labels

    def names(self, split: str) -> list[str]:
        """The N names of the images."""
        return self.split(split).names

    def rows(self, split: str) -> np.ndarray:
        """(N,) int64: the images' rows in the split of the token file."""
        return self.split(split).rows

    def n_masks(self, split: str) -> int:
        """M, masks of each image; 0 where the model saw whole images."""
        return self.split(split).n_masks

    def describe(self) -> dict[str, Any]:
        """What the file holds, as `igpt features --json` prints it."""
        splits = {
            name: {"images": len(s), "labelled": int(np.sum(s.labels >= 0)), "masks": s.n_masks, "attrs": s.attrs}
            for name, s in self.splits.items()
        }
        widths = next(iter(self.splits.values())).widths
        return {
            "path": str(self.path),
            "attrs": {k: v for k, v in self.attrs.items() if k not in ("model", "preparation")},
            "model": json.loads(self.attrs["model"]),
            "preparation": json.loads(self.attrs["preparation"]),
            "layers": self.layers,
            "widths": [widths[layer] for layer in self.layers],
            "classes": self.classes,
            "splits": splits,
        }


def open_features(path: str | os.PathLike) -> Features:
    """Open a features file and check format, version, shapes, types, labels; the features are not read.

    Raises:
        InputError: there is no such file. FormatError: it is not as docs/formats.md says.
    """
    path = Path(path)
    with open_hdf5(path, "a features file") as h5:
        attrs = attributes(h5)
        for problem in _problems(attrs, path):
            raise FormatError(problem)
        names = split_names(h5, path)
        layers = _stored_layers(h5[names[0]], path, attrs["n_layers"])
        file = Features(path, attrs, stored_classes(h5, path), layers)
        for name in names:
            file.splits[name] = _open_split(h5[name], file, name)
    return file


def sha256_of_rows(rows: np.ndarray) -> str:
    """Of rows (N,) as little-endian int64."""
    return sha256_of(np.ascontiguousarray(rows, ROW_DTYPE).data)


def sha256_of_labels(labels: np.ndarray) -> str:
    """Of labels (N,) as little-endian int32."""
    return sha256_of(np.ascontiguousarray(labels, schema.LABEL_DTYPE).data)


def _reopened(path: Path, rows: dict[str, np.ndarray]) -> Features:
    file = open_features(path)
    for name, wanted in rows.items():
        only = file.split(name).only(wanted)
        if only is None:
            raise FormatError(f"{path} was changed: the split {name!r} has no longer the images it had")
        file.splits[name] = only
    return file


def format_layers(layers: Sequence[Layer]) -> str:
    """
    >>> format_layers([0, 1, 2, 3, 7, 9, 10, "2.mlp", "3.mlp", "4.mlp"])
    '0-3, 7, 9, 10, 2-4.mlp'
    """
    runs: list[tuple[str, list[int]]] = []
    for number, site in sorted(map(place, layers), key=lambda one: (one[1], one[0])):
        if runs and runs[-1][0] == site and number == runs[-1][1][-1] + 1:
            runs[-1][1].append(number)
        else:
            runs.append((site, [number]))
    said = [(site and f".{site}", run) for site, run in runs]
    return ", ".join(
        f"{run[0]}-{run[-1]}{dot}" if len(run) > 2 else ", ".join(f"{n}{dot}" for n in run) for dot, run in said
    )


def _problems(attrs: dict[str, Any], path: Path) -> list[str]:
    """What is wrong with the root attributes, one sentence each."""
    if attrs.get("format") != FORMAT:
        found = f"its format is {attrs['format']!r}" if "format" in attrs else "it has no attribute 'format'"
        return [f"{path} is an HDF5 file, but not a features file: {found}, {FORMAT!r} is needed"]
    version = attrs.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        todo = "upgrade igpt-cli to read it" if newer else "make it anew with `igpt features`"
        return [f"{path} has format_version {version}, this program reads version {FORMAT_VERSION}; {todo}"]
    problems = [
        f"{path}: the attribute {name} is missing or not text"
        for name in _TEXTS
        if not isinstance(attrs.get(name), str)
    ]
    for name in ("n_layers", "resolution"):
        value = attrs.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{path}: the attribute {name} is {value!r}, a whole number from 1 is needed")
    for name in ("model", "preparation"):
        if isinstance(text := attrs.get(name), str) and not _is_object(text):
            problems.append(f"{path}: the attribute {name} is not a JSON object: {text[:60]!r}")
    return problems


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _stored_layers(group: h5py.Group, path: Path, n_layers: int) -> list[Layer]:
    """The layers of a split, rising."""
    known: dict[str, Layer] = {str(n): n for n in range(n_layers + 1)}
    known |= {name: name for n in range(n_layers) for site in SITES for name in [f"{n}.{site}"]}
    names = [name.removeprefix(LAYER) for name in group if name.startswith(LAYER)]
    if not names or any(name not in known for name in names):
        stored = ", ".join(LAYER + name for name in sorted(names)[:5]) or "none"
        raise FormatError(f"{path}: {group.name} holds the layers {stored}; {LAYER}0 to {LAYER}{n_layers} can be there")
    return in_order(known[name] for name in names)


def _open_split(group: h5py.Group, file: Features, name: str) -> FeatureSplit:
    path, attrs = file.path, attributes(group)
    masks = attrs.get("masks")
    if not isinstance(masks, int) or isinstance(masks, bool) or masks < 0:
        raise FormatError(f"{path}: the attribute masks of {group.name} is {masks!r}, a whole number from 0 is needed")
    for key in ("tokens_sha256", "rows_sha256", "labels_sha256"):
        if not isinstance(attrs.get(key), str):
            raise FormatError(f"{path}: the attribute {key} of {group.name} is missing or not text")
    if _stored_layers(group, path, file.n_layers) != file.layers:
        raise FormatError(f"{path}: {group.name} has other layers than the splits before it; make the file anew")
    rows = dataset(group, path, ROWS, (None,), ROW_DTYPE)[:]
    labels = stored_labels(group, path, len(rows), len(file.classes))
    require_names(group, path, len(rows))
    head = (masks, len(rows)) if masks else (len(rows),)
    tail = (None, None) if file.attrs["pool"] == "none" else (None,)
    layers = {
        layer: mapped(dataset(group, path, f"{LAYER}{layer}", (*head, *tail), FEATURE_DTYPE), path)
        for layer in file.layers
    }
    return FeatureSplit(file, name, labels, rows, attrs, layers)
