"""Images and masks in ADE20K's folders: PNG files whose pixels are class numbers.

ROOT/images/training/*.jpg       ROOT/annotations/training/*.png
ROOT/images/validation/*.jpg     ROOT/annotations/validation/*.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from igpt_cli.errors import InputError
from igpt_cli.images.decode import BadImageError, load, opened
from igpt_cli.images.folders import walk
from igpt_cli.images.records import brief

IMAGES, MASKS = "images", "annotations"
#: The folder of each split.
FOLDERS = {"train": "training", "test": "validation"}
#: Pillow's modes with one number a pixel; with a colour table, it is the index into the table.
MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")
#: Class numbers are less than this.
MOST_CLASSES = 2**16


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path


def find_pairs(root: str | Path) -> dict[str, list[Pair]]:
    """The images of the splits "train" and "test", each with the mask of its name, sorted by name. Masks without an
    image are ignored.

    Raises:
        InputError: a folder is missing or holds no images, or images have no mask.
    """
    root = Path(root)
    out = {}
    for split, folder in FOLDERS.items():
        images, masks = root / IMAGES / folder, root / MASKS / folder
        for needed, what in ((images, "images"), (masks, "masks, PNG files of class numbers,")):
            if not needed.is_dir():
                raise InputError(f"{needed} is no folder; the {what} of the {split} split are expected there")
        names = walk(images).images
        there = {_stem(name): name for name in walk(masks).images if name.lower().endswith(".png")}
        if not names:
            raise InputError(f"{images} holds no images")
        if lonely := [name for name in names if _stem(name) not in there]:
            n = f"{len(lonely):,} images of {images}"
            raise InputError(f"{n} have no mask of their name in {masks}: {brief(lonely, 3)}")
        out[split] = [Pair(images / name, masks / there[_stem(name)]) for name in names]
    return out


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def load_mask(path: Path) -> np.ndarray:
    """Class numbers (H, W) int32 of a PNG file, grey of 1 to 16 bits or with a colour table.

    Raises:
        BadImageError: it cannot be read, or holds colours.
    """
    with opened(path) as image:
        if image.format != "PNG" or image.mode not in MODES:
            what = "a mask is a PNG of class numbers: grey, or with a palette"
            raise BadImageError(f"{image.format} of mode {image.mode}; {what}")
        mask = np.array(load(image)).astype(np.int32)
    if mask.min() < 0 or mask.max() >= MOST_CLASSES:
        raise BadImageError(f"it holds the number {mask.max()}; class numbers are less than {MOST_CLASSES:,}")
    return mask


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize (H, W) int32 to (side, side) by the nearest pixel."""
    return np.asarray(Image.fromarray(mask, mode="I").resize((side, side), Image.Resampling.NEAREST))
