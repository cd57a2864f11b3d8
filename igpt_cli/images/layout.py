"""Splits and classes from paths: `class/x.jpg`, `split/class/x.jpg`, or no folders."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from igpt_cli.images.choice import ABOUT
from igpt_cli.images.records import SPLITS, brief, class_order, count, in_order

#: Words in folder names that name a split: "training_set" and "test_set", "seg_train" and "seg_pred".
WORDS = SPLITS | {
    **dict.fromkeys(("trainset", "trainingset"), "train"),
    **dict.fromkeys(("valset", "validset", "validationset", "dev", "devset", "eval", "evaluation"), "val"),
    **dict.fromkeys(("testset", "testingset", "holdout"), "test"),
    **dict.fromkeys(("pred", "prediction", "predictions"), "pred"),
}

#: Folders that name no class where they hold a whole split.
GENERIC = re.compile(r"(jpe?g|png)?[ _-]?(images?|imgs?|pictures)|jpe?gs?|pngs?", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """Splits and labels of N images: `split` (N,) int16 indexes `splits`, `label` (N,) int32 indexes `classes`, -1 =
    none. `doubts` and `notes` are those of a `Source`."""

    splits: list[str]
    split: np.ndarray
    classes: list[str]
    label: np.ndarray
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        return in_order({s: int(np.count_nonzero(self.split == i)) for i, s in enumerate(self.splits)})


@dataclass(frozen=True)
class _Reading:
    """For each folder, its split, the part of its name that names it ("" if none does), and the other parts."""

    splits: list[str]
    named: list[str]
    rest: list[list[str]]
    doubts: list[str]


def layout_of(
    names: Sequence[str],
    split: str | Sequence[str] = "train",
    enter: int = 2,
    annotated: Mapping[str, str] | None = None,
) -> Layout:
    """Read splits and classes from the folders in the images' names.

    The top folders are splits if each is named like one (train, val, valid, validation, test, ...), or "train" and
    another split are among them; else they are classes. Deeper folders are ignored. Splits named by words
    ("training_set", "test_set") or below the classes ("cat/train") are guesses, reported as doubts.

    Args:
        names: relative names, with "/" or "\\\\" between folders.
        split: the split of all images, or of each, if the folders name none.
        enter: a sole top folder that is not named like a split is ignored while each name has at least this many
            parts (2: whatever the folder holds; 3: only if it holds folders).
        annotated: {name: class} from annotation lists; it takes precedence over the folder.
    """
    index: dict[str, int] = {}
    where = [index.setdefault(name.replace("\\", "/").rpartition("/")[0], len(index)) for name in names]
    sizes = Counter(w for w, name in zip(where, names, strict=True) if not (annotated and name in annotated))
    folders = _enter([[p for p in folder.split("/") if p not in ("", ".", "..")] for folder in index], enter - 1)
    read = _top_splits(folders, sizes) or _worded_splits(folders) or _splits_below(folders)
    if read is not None:
        splits = [read.splits[w] for w in where]
    else:
        splits = [split] * len(where) if isinstance(split, str) else list(split)
        n = len(folders)
        read = _Reading(["train"] * n, [""] * n, folders, _look_like_splits(folders))
    folders, doubts = _without_wrappers(read, sizes)
    doubts = [*read.doubts, *doubts, *_about_images(folders)]
    class_of = [f[0] if f else None for f in folders]
    labels = [class_of[w] for w in where]
    if annotated:
        labels = [annotated.get(n, c) for n, c in zip(names, labels, strict=True)]
    layout = assemble(splits, labels)
    return replace(layout, doubts=(*doubts, *layout.doubts))


def assemble(splits: Sequence[str], class_names: Sequence[str | None], all_numbers: bool = False) -> Layout:
    """The layout of images with known split and class name (None: no label).

    With `all_numbers`, whole numbers as class names are the labels themselves: all up to the largest are classes.
    """
    sizes = Counter(splits)
    order = list(in_order(sizes))
    split_index = {s: i for i, s in enumerate(order)}
    pairs = Counter(zip(splits, class_names, strict=True))
    same, doubts = alike((s, c) for s, c in pairs if c is not None)
    classes = class_order(same.values())
    if all_numbers and classes and all(c.isdecimal() and c.isascii() for c in classes) and int(classes[-1]) < 1_000_000:
        same = {c: str(int(name)) for c, name in same.items()}
        classes = [str(i) for i in range(int(classes[-1]) + 1)]
    numbers = {c: i for i, c in enumerate(classes)}
    label_index: dict[str | None, int] = {c: numbers[name] for c, name in same.items()}
    label_index[None] = -1
    bare = {s: n for s in order if (n := pairs[s, None])} if classes else {}
    notes = [f"{n:,} of {count(sizes[s], 'image')} of {s} have no label" for s, n in bare.items()]
    return Layout(
        order,
        np.fromiter((split_index[s] for s in splits), np.int16, len(splits)),
        classes,
        np.fromiter((label_index[c] for c in class_names), np.int32, len(class_names)),
        tuple(doubts),
        tuple(notes),
    )


def alike(pairs: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Merge class names that differ only in Unicode form (to NFC), or only in case or blanks if no split (or source)
    has two of them: "Cat" in train, "cat" in test.

    Args:
        pairs: (split, class name).

    Returns:
        {name: class}, and doubts.
    """
    names: dict[str, str] = {}
    places: dict[str, dict[str, set[str]]] = {}  # {what is alike: {name: its splits}}
    forms: dict[str, set[str]] = {}
    for split, name in sorted(set(pairs), key=lambda p: (p[0] != "train", p)):
        names[name] = nfc = unicodedata.normalize("NFC", name)
        forms.setdefault(nfc, set()).add(name)
        places.setdefault(" ".join(nfc.casefold().split()), {}).setdefault(nfc, set()).add(split)
    several = {name: len(f) for name, f in forms.items() if len(f) > 1}
    doubts = [f"{n} classes whose names differ only in Unicode form are taken as one: {c}" for c, n in several.items()]
    merged: dict[str, str] = {}
    for group in (g for g in places.values() if len(g) > 1):
        shown = ", ".join(map(repr, group))
        if sum(map(len, group.values())) == len(set().union(*group.values())):
            merged |= dict.fromkeys(group, next(iter(group)))
            doubts.append(f"classes whose names differ only in case or blanks are taken as one: {shown}")
        else:
            doubts.append(f"classes whose names differ only in case or blanks are different ones: {shown}")
    return {name: merged.get(nfc, nfc) for name, nfc in names.items()}, doubts


def split_from_file_name(name: str) -> str:
    """The split in a shard's name: "imagenet-val-000001.tar" -> "val"; "train" if it names none."""
    return _split_in_file_name(name) or "train"


def _split_in_file_name(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[w] for w in words if w in SPLITS), None)


def classes_of_files(stems: Sequence[str]) -> list[str | None] | None:
    """The classes that name archives or arrays, such as "train/cat.tar" and "train/dog.tar"; None for shards.

    Names that differ only in their numbers are shards, unless they are WordNet's ("n01440764"). A file named like a
    split ("val.tar") names no class.
    """
    last = [s.rpartition("/")[2] for s in stems]
    names = [None if _split_in_file_name(name) else name for name in last]
    classes = {n for n in names if n is not None}
    wordnet = all(re.fullmatch(r"n\d{8}", n) for n in classes)
    bare = {re.sub(r"\d+", "", n) for n in classes}
    return names if len(classes) > 1 and (wordnet or len(bare) == len(classes)) else None


def _split_named(folder: str) -> str | None:
    return SPLITS.get(folder.strip().casefold())


def _split_word(folder: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that a word of a folder's name names, and the other words: "seg_train" -> ("train", ("seg",))."""
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", folder)]
    found = {WORDS[w] for w in words if w in WORDS}
    return (found.pop(), tuple(w for w in words if w not in WORDS)) if len(found) == 1 else None


def _top_splits(folders: list[list[str]], sizes: Mapping[int, int]) -> _Reading | None:
    """The top folders as splits, if all are named so, or "train" and another."""
    tops = {f[0] for f in folders if f}
    named = {s for t in tops if (s := _split_named(t))}
    others = sorted(t for t in tops if not _split_named(t))
    if not tops or (others and not ("train" in named and len(named) > 1)):
        return None
    doubts = []
    if others:
        doubts.append(f"folders next to those of the splits are read as splits of their own: {brief(others)}")
    if n := sum(sizes[i] for i, f in enumerate(folders) if not f):
        doubts.append(f"{count(n, 'image')} next to the folders of the splits: read as train, without a label")
    splits = [_split_named(f[0]) or f[0].strip().lower() if f else "train" for f in folders]
    return _Reading(splits, [f[0] if f else "" for f in folders], [f[1:] for f in folders], doubts)


def _worded_splits(folders: list[list[str]]) -> _Reading | None:
    """The top folders as splits, if words name them: "training_set" and "test_set"."""
    read = _in_words({f[0] for f in folders if f})
    if read is None or not all(folders):
        return None
    pairs = ", ".join(f"{name} as {split}" for name, split in sorted(read.items()))
    doubt = f"splits by words in the folders' names: {pairs}"
    return _Reading([read[f[0]] for f in folders], [f[0] for f in folders], [f[1:] for f in folders], [doubt])


def _splits_below(folders: list[list[str]]) -> _Reading | None:
    """The folders in the classes' as splits: "cat/train", "cat/test"."""
    if not folders or any(len(f) < 2 for f in folders):
        return None
    below = {f[1] for f in folders}
    exact = {b: s for b in below if (s := _split_named(b))}
    read = exact if len(exact) == len(below) and len(set(exact.values())) > 1 else _in_words(below)
    if read is None:
        return None
    doubt = f"splits by the folders in those of the classes: {', '.join(sorted(below))}"
    rest = [[f[0], *f[2:]] for f in folders]
    return _Reading([read[f[1]] for f in folders], [f[1] for f in folders], rest, [doubt])


def _in_words(names: set[str]) -> dict[str, str] | None:
    """{name: split}, if each name has another split's word, one is train, and the other words are the same."""
    read = {n: w for n in names if (w := _split_word(n))}
    splits = {split for split, _ in read.values()}
    alone = len(read) == len(names) == len(splits) and len({rest for _, rest in read.values()}) == 1
    return {n: split for n, (split, _) in read.items()} if alone and len(splits) > 1 and "train" in splits else None


def _without_wrappers(read: _Reading, sizes: Mapping[int, int]) -> tuple[list[list[str]], list[str]]:
    """The parts without folders that hold a whole split and are no class: "test/images", "test_set/test_set"."""
    rest, doubts = [list(f) for f in read.rest], []
    classes = {f[0] for s, f in zip(read.splits, read.rest) if s == "train" and f}
    for split in dict.fromkeys(read.splits):
        mine = [i for i, s in enumerate(read.splits) if s == split]
        names = {split, *(read.named[i].casefold() for i in mine)}
        passed = []
        while len(tops := {rest[i][0] for i in mine if rest[i]}) == 1:
            (top,) = tops
            no_class = GENERIC.fullmatch(top) and (top not in classes or classes == {top})
            if top.casefold() not in names and not no_class:
                break
            passed.append(top)
            for i in mine:
                rest[i] = rest[i][1:]
        n = sum(sizes[i] for i in mine if not rest[i])
        if passed and n:
            folder = "/".join(passed)
            doubts.append(f"{count(n, 'image')} of {split} without a label: the folder {folder} is read as no class")
    return rest, doubts


def _about_images(folders: list[list[str]]) -> list[str]:
    """A doubt about classes named like images and what is about them: "images" and "masks"."""
    tops = sorted({f[0] for f in folders if f})
    about = [t for t in tops if set(re.findall("[a-z]+", t.lower())) & ABOUT]
    if not about or not all(t in about or GENERIC.fullmatch(t) for t in tops):
        return []
    return [f"folders sound like images and what is about them, and are read as classes: {brief(tops)}"]


def _look_like_splits(folders: list[list[str]]) -> list[str]:
    """A doubt about folders that are named like splits and read as classes, or ignored."""
    tops = {f[0] for f in folders if f}
    words = {t for t in tops if _split_word(t)}
    odd = {t for t in tops if _split_named(t)} | (words if len(words) > 1 and 2 * len(words) >= len(tops) else set())
    odd |= {f"{f[0]}/{f[1]}" for f in folders if len(f) > 1 and _split_named(f[1])}
    return [f"folders are called like splits, and were not read as splits: {brief(sorted(odd))}"] if odd else []


def _enter(folders: list[list[str]], enter: int) -> list[list[str]]:
    """Drop top folders that hold everything and are not named like a split, while all are `enter` deep."""
    depth = 0
    while folders:
        top = folders[0][depth] if len(folders[0]) > depth else ""
        if _split_named(top) or any(len(f) - depth < enter or f[depth] != top for f in folders):
            break
        depth += 1
    return [f[depth:] for f in folders]
