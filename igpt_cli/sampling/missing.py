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
    """Keep the first `part` of the rows, rounded half up: (R, R) bool, true for the rest.

    Raises:
        InputError: `part` is outside [0, 1), or rounds to all rows, or above 0 to none.
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
    """A rectangle "X,Y,W,H" is missing: (R, R) bool. Column and row of its upper left corner count from 0.

    >>> box(4, "0,3,2,1").astype(int).tolist()
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]

    Raises:
        InputError: malformed, empty, or not within the image.
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
    """Read a mask from a picture, white or transparent = missing, black = kept: (R, R) bool.

    Stable Diffusion's tools use white, OpenAI's image editing transparency. Masks of other sizes than R x R are cropped
    to the central square, as images are. A pixel is missing where its part of the mask is at least half white.

    Raises:
        InputError: the picture is not there, cannot be read, or has nothing missing.
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
    """How many pixels of the mask (R, R) are kept before the first missing one if no later pixel is kept, else None."""
    missing = mask.reshape(-1)
    kept = len(missing) - int(missing.sum())
    return kept if missing[kept:].all() else None
