"""Choose one of several images of a WebDataset sample or a Parquet row."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from string import ascii_letters

from igpt_cli.errors import InputError, unknown
from igpt_cli.images.members import Member
from igpt_cli.images.records import brief, count

#: Names of the image itself, the commonest first.
IMAGE = ("image", "jpg", "jpeg", "png", "img", "webp", "rgb", "photo", "picture", "images", "input", "original")
#: Names of what is about the image: masks, labels, previews, hashes.
ABOUT = frozenset(
    [
        *("mask", "masks", "seg", "segmentation", "semantic", "instance", "panoptic", "trimap", "matte", "alpha"),
        *("label", "labels", "annotation", "annotations", "target", "gt", "truth", "depth", "edge", "edges", "flow"),
        *("normal", "normals", "thumb", "thumbnail", "preview", "sketch", "heatmap", "saliency", "hint", "control"),
        *("conditioning", "cond", "parsing", "pose", "sha", "sha1", "sha256", "md5", "hash", "embedding"),
    ]
)
#: Names of label columns, the best first; CIFAR-100 has fine and coarse labels.
LABELS = ("label", "labels", "fine_label", "class", "cls", "target", "y")


def key(name: str) -> str:
    """The key of a WebDataset sample: the name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"


def rank(name: str) -> tuple[bool, int, int]:
    """Sorts names by how likely they are the image's: "jpg" before "left.png" before "seg.png"."""
    words = re.findall(r"[a-z]+\d*", name.lower())
    places = [IMAGE.index(w) for w in words if w in IMAGE]
    return bool(ABOUT & set(words)), len(words), min(places, default=len(IMAGE))


def mask_doubts(names: Sequence[str]) -> list[str]:
    """A doubt about images named like others with "mask", "seg" or the like: "1.png" and "1_mask.png"."""
    stems = {name.rpartition(".")[0] for name in names}
    masks = []
    for stem in stems:
        bare = stem.rstrip(" _.-0123456789")
        image = bare.rstrip(ascii_letters)
        if bare[len(image) :].lower() in ABOUT and image.rstrip(" _.-") in stems:
            masks.append(stem)
    if not masks:
        return []
    return [f"{count(len(masks), 'image')} called like masks of others, and read as images: {brief(sorted(masks), 2)}"]


def one_of_each_sample(
    description: str, images: Sequence[Sequence[Member]], others: Sequence[Sequence[str]], column: str | None
) -> tuple[list[list[Member]], list[str], list[str]]:
    """The images of archives, one of each WebDataset sample; doubts and notes as in `Source`.

    Archives hold samples if files of other kinds (`1.cls`, `1.json`) belong to the images, or all images come in the
    same forms (`1.jpg`, `1.seg.png`).

    Args:
        images, others: the image files of each archive, and the names of its other files.
        column: the suffix of the image to read, such as "jpg"; None for the likeliest.

    Raises:
        InputError: no image has that suffix.
    """
    forms: dict[tuple[int, str], list[str]] = defaultdict(list)
    for i, m in ((i, m) for i, members in enumerate(images) for m in members):
        forms[i, key(m.name)].append(_suffix(m.name))
    sizes = Counter(f for sample in forms.values() for f in sample)
    if column is not None:
        suffix = column.lower().lstrip(".")
        if suffix not in sizes:
            raise unknown(f"image in {description} with the suffix", column, list(sizes)[:20])
        retained = [[m for m in members if _suffix(m.name) == suffix] for members in images]
        rest = sum(map(len, images)) - sizes[suffix]
        notes = [f"--column {column}: {count(rest, 'image')} with other suffixes passed over"] if rest else []
        return retained, [], notes
    marked = any((i, key(n)) in forms for i, names in enumerate(others) for n in names)
    same = len(set(map(frozenset, forms.values()))) == 1 and len(forms) > len(sizes)
    numbered = any(part.isdigit() for f in sizes for part in f.split("."))
    if max(map(len, forms.values())) == 1 or numbered or not (marked or same):
        return [list(members) for members in images], [], []
    main = min(sizes, key=lambda f: (*rank(f), -sizes[f]))
    about = {f for f in sizes if rank(f)[0] and not rank(main)[0]}
    best = {k: min((f for f in sample if f not in about), key=rank, default=None) for k, sample in forms.items()}
    retained = [[m for m in members if best[i, key(m.name)] == _suffix(m.name)] for i, members in enumerate(images)]
    rest = sum(map(len, images)) - sum(map(len, retained))
    if not rest:
        return retained, [], []
    left = [f for f in sizes if f != main]
    doubt = (
        f"samples hold several images: {main} is taken, {count(rest, 'image')} passed over ({brief(left)}); "
        f"--column chooses another suffix"
    )
    return retained, [doubt], []


def column_of(path: object, columns: Sequence[str], likely: Sequence[str], column: str | None) -> tuple[str, list[str]]:
    """The image column of a Parquet file, and doubts.

    Args:
        columns: all columns of the file.
        likely: those that hold images, in the file's order.
        column: the requested one.

    Raises:
        InputError: there is no such column, or none of images.
    """
    if column is not None:
        if column not in likely:
            raise unknown(f"column of images in {path} called", column, likely or columns)
        return column, []
    if not likely:
        raise InputError(f"{path} has no column of images (bytes, or a struct with bytes); it has {', '.join(columns)}")
    best = min(likely, key=lambda c: (*rank(c), likely.index(c)))
    rest = [c for c in likely if c != best]
    doubt = f"several columns hold images: {best} is taken, not {brief(rest)}; --column chooses another"
    return best, [doubt] if rest else []


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()
