"""Masks of missing pixels, (R, R) bool: rows, a box, or a mask image.

An autoregressive model can go on from a kept prefix of the raster order only (`raster_prefix`); a BERT model completes
any mask.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from igpt_cli.errors import InputError
from igpt_cli.files import require_file
from igpt_cli.images.decode import BadImageError, load_rgb
from igpt_cli.images.transforms import crop_box


def keep_rows(resolution: int, part: float) -> np.ndarray:
    """The first part of the rows is kept, the rest is missing: (R, R) bool.

    Args:
        resolution: R in pixels.
        part: in [0, 1); the rows kept are part * R, rounded, halves up. 0 keeps nothing: the whole image is drawn.

    Raises:
        InputError: outside [0, 1), or so close to an end that no row, or every row, would be kept.
    """
    if not 0 <= part < 1:
        every = "; at 1 every pixel is kept and nothing is missing" if part == 1 else ""
        raise InputError(f"the part of the rows to keep is {part:g}, outside 0 <= part < 1{every}")
    rows = math.floor(part * resolution + 0.5)
    if rows == resolution:
        highest = (resolution - 1) / resolution
        raise InputError(
            f"{part:g} of {resolution} rows rounds to all of them: nothing is missing; keep at most {highest:g}"
        )
    if part and not rows:
        raise InputError(f"{part:g} of {resolution} rows rounds to none: nothing is kept; say 0, or {1 / resolution:g}")
    mask = np.ones((resolution, resolution), bool)
    mask[:rows] = False
    return mask


def box(resolution: int, text: str) -> np.ndarray:
    """A rectangle is missing: (R, R) bool.

    Args:
        resolution: R in pixels.
        text: "X,Y,W,H", whole numbers in pixels of the model's resolution: the column and the row of the upper left
            corner, counted from 0, the width and the height.

    Raises:
        InputError: malformed, empty, or not within the image.

    >>> box(4, "0,3,2,1").astype(int).tolist()
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    """
    R = resolution
    try:
        x, y, w, h = (int(number) for number in text.split(","))
    except ValueError:
        raise InputError(
            f"{text!r} is no box; give X,Y,W,H: column, row, width and height as whole numbers, such as "
            f"{R // 4},{R // 4},{R // 2},{R // 2}"
        ) from None
    if w < 1 or h < 1:
        raise InputError(f"the box {text} is {w} x {h} pixels: nothing is missing; width and height are at least 1")
    if x < 0 or y < 0 or x + w > R or y + h > R:
        raise InputError(
            f"the box {text} covers columns {x}..{x + w - 1} and rows {y}..{y + h - 1}; "
            f"the model's images are {R} x {R} pixels, 0..{R - 1}"
        )
    mask = np.zeros((R, R), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def mask_image(path: str | os.PathLike, resolution: int) -> np.ndarray:
    """A picture says what is missing: white or transparent pixels are, black ones are kept: (R, R) bool.

    So do Stable Diffusion's tools (white) and OpenAI's image editing (transparent). Any size, mode and file type that
    `images.decode` reads will do. A mask of R x R pixels is taken as it is; of any other the square in the middle, as
    of the images to complete, so that a mask painted over a photograph lies where it was painted. A pixel of the
    result is missing where its part of the mask is at least half white, on average.

    Args:
        path: the picture.
        resolution: R in pixels.

    Raises:
        InputError: it is not there, cannot be read, or nothing in it is missing.
    """
    path = require_file(Path(path), "a mask image")
    try:
        grey = load_rgb(path).convert("L")
    except BadImageError as e:
        raise InputError(f"{path}, given as a mask image, cannot be read: {e.reason}") from e
    square = crop_box((0, 0, grey.width, grey.height), None)
    mask = np.asarray(grey.resize((resolution, resolution), Image.Resampling.BOX, square)) >= 128
    if not mask.any():
        lightest = grey.getextrema()[1]
        raise InputError(
            f"{path} leaves nothing missing: no pixel of its {resolution} x {resolution} form is white (the lightest "
            f"of the picture is {lightest} of 255); white or transparent = missing, black = kept"
        )
    return mask


def raster_prefix(mask: np.ndarray) -> int | None:
    """How many pixels are kept before the first missing one, if all after it are missing, else None.

    Args:
        mask: (R, R) bool, True = missing.

    Returns:
        0 where everything is missing, R * R where nothing is.
    """
    missing = mask.reshape(-1)
    kept = len(missing) - int(missing.sum())
    return kept if missing[kept:].all() else None
