"""Splits and classes from where images lie: `class/x.jpg`, `split/class/x.jpg`, or no folders at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igpt_cli.images.records import SPLITS, class_order, in_order


@dataclass(frozen=True)
class Layout:
    """Split and label of each of N images: `splits` names the splits, `split` (N,) int8 points into them,
    `label` (N,) int32 points into `classes`, -1 = none."""

    splits: list[str]
    split: np.ndarray
    classes: list[str]
    label: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        return in_order({s: int(np.count_nonzero(self.split == i)) for i, s in enumerate(self.splits)})


def layout_of(names: Sequence[str], split: str | Sequence[str] = "train", enter: int = 2) -> Layout:
    """Read splits and classes from the folders in the images' names.

    The top folders are splits when each of them is called like one (train, val, valid, validation, test, ...), or
    when "train" is among them beside another split; else they are classes. Deeper folders do not count.

    Args:
        names: relative names with "/" between folders.
        split: where the folders name no splits, the split of all images, or of each.
        enter: a sole top folder, unless it is called like a split, is passed through as long as each name has at
            least this many parts (2: whatever the folder holds; 3: only where it holds folders).
    """
    index: dict[str, int] = {}  # the folders, of which there are few where there are many images
    where = [index.setdefault(name.rpartition("/")[0], len(index)) for name in names]
    folders = [[p for p in folder.split("/") if p not in ("", ".", "..")] for folder in index]
    folders = _enter(folders, enter - 1)
    tops = {f[0].lower() for f in folders if f}
    named = {SPLITS[t] for t in tops if t in SPLITS}
    if tops and (tops <= set(SPLITS) or ("train" in named and len(named) > 1)):
        split_of = [SPLITS.get(f[0].lower(), f[0].lower()) if f else "train" for f in folders]
        splits = [split_of[w] for w in where]
        folders = [f[1:] for f in folders]
    else:
        splits = [split] * len(where) if isinstance(split, str) else list(split)
    class_of = [f[0] if f else None for f in folders]
    return assemble(splits, [class_of[w] for w in where])


def assemble(splits: Sequence[str], class_names: Sequence[str | None], classes: Sequence[str] | None = None) -> Layout:
    """The layout of images whose split and class name (None: no label) are known."""
    found = Counter(splits)
    order = list(in_order(found))
    split_index = {s: i for i, s in enumerate(order)}
    classes = class_order(c for c in set(class_names) if c is not None) if classes is None else list(classes)
    label_index: dict[str | None, int] = {c: i for i, c in enumerate(classes)}
    label_index[None] = -1
    return Layout(
        order,
        np.fromiter((split_index[s] for s in splits), np.int16, len(splits)),
        classes,
        np.fromiter((label_index[c] for c in class_names), np.int32, len(class_names)),
    )


def split_from_file_name(name: str) -> str:
    """The split that a shard's name speaks of: "imagenet-val-000001.tar" -> "val"; "train" where it names none."""
    for part in name.split("/"):
        words = [SPLITS[w] for w in re.split(r"[^a-z]+", part.lower()) if w in SPLITS]
        if words:
            return words[0]
    return "train"


def _enter(folders: list[list[str]], enter: int) -> list[list[str]]:
    """Pass through folders that hold everything and are not called like a split, while all are `enter` deep."""
    depth = 0
    while folders:
        top = folders[0][depth] if len(folders[0]) > depth else ""
        if top.lower() in SPLITS or any(len(f) - depth < enter or f[depth] != top for f in folders):
            break
        depth += 1
    return [f[depth:] for f in folders]
