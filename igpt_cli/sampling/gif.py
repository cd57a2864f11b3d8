"""An animated GIF of the raster being filled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from igpt_cli.errors import InputError
from igpt_cli.files import replacing
from igpt_cli.palette.fit import fit_palette
from igpt_cli.palette.histogram import ColourCounts
from igpt_cli.sampling.pictures import (
    CHECKER,
    PAPER,
    checker,
    default_columns,
    default_zoom,
    enlarged,
    require_images,
    settings_text,
    tiled,
)

#: A GIF has 256 colours at most; the last one stands for "as it was in the frame before".
COLOURS, UNCHANGED = 255, 255
MOST_FRAMES = 64
#: Milliseconds. Browsers slow down what is faster than `FASTEST`.
FIRST, LAST, FASTEST = 500, 2000, 20


def raster_gif(
    images: np.ndarray,
    order: np.ndarray,
    path: str | os.PathLike,
    settings: dict[str, Any],
    seconds: float = 3.0,
    columns: int | None = None,
    zoom: int | None = None,
) -> None:
    """Write an endless GIF of a grid of images being filled, pixel by pixel or round by round.

    Up to 64 steps get a frame each; of the R * R steps of a raster a frame has one row. All frames have one palette
    without dithering: up to 255 colours as they are, otherwise the nearest of 252 fitted to these images (about 40 to
    45 dB).

    Args:
        images: (n, R, R, 3) uint8.
        order: (n, R * R) integers, the step at which each pixel appears, from 1; 0 = given.
        settings: stored in the file's comment as JSON; see `pictures.read_settings`.
        seconds: how long the filling takes.
        columns, zoom: as for `pictures.grid`.

    Raises:
        InputError: other shapes or dtypes. OutputError: the file cannot be written.
    """
    n, R = require_images(images).shape[:2]
    if np.shape(order) != (n, R * R) or order.dtype.kind not in "iu" or order.min() < 0:
        raise InputError(f"order is to be ({n}, {R * R}) whole numbers from 0, the step of each pixel")
    comment = settings_text(settings).encode()
    columns, zoom = columns or default_columns(n), zoom or default_zoom(n, R)
    colours, shown, (paper, *greys) = gif_colours(images)
    steps, empty = order.reshape(n, R, R), np.array(greys, np.uint8)[checker(R)]
    frames, before = [], None
    for step in frame_steps(order, R):
        now = tiled(enlarged(np.where(steps <= step, shown, empty)[..., None], zoom)[..., 0], columns, paper)
        frame = Image.fromarray(now if before is None else np.where(now == before, np.uint8(UNCHANGED), now))
        frame.putpalette(colours.tobytes())  # which makes it mode P
        frames.append(frame)
        before = now
    each = max(FASTEST, round(100 * seconds / max(1, len(frames) - 1)) * 10)  # GIF counts in hundredths
    durations = [FIRST, *[each] * (len(frames) - 2), LAST][-len(frames) :]
    with replacing(Path(path)) as part:
        frames[0].save(
            part,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            disposal=1,
            transparency=UNCHANGED,
            optimize=False,
            comment=comment,
        )


def frame_steps(order: np.ndarray, resolution: int) -> np.ndarray:
    """The steps after which there is a frame, from 0 = what is given to the last; 65 at most.

    >>> frame_steps(np.arange(1, 37), 6)[:3], frame_steps(np.arange(1, 1025), 32)[:3]
    (array([0, 1, 2]), array([ 0, 32, 64]))
    """
    steps = np.unique(order[order > 0])
    every = max(1, -(-len(steps) // MOST_FRAMES))
    if 2 * every >= resolution:
        every = -(-every // resolution) * resolution  # whole rows
    return np.unique(np.concatenate([[0], steps[every - 1 :: every], steps[-1:]]))


def gif_colours(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The colours of a GIF, and images (n, R, R, 3) uint8 in them.

    Returns:
        (256, 3) uint8, the last unused; (n, R, R) uint8 indices; and the indices of the paper and the two greys of the
        checker, or of what is nearest to them where the images need all colours.
    """
    pixels = images.reshape(-1, 3)
    found, where = np.unique(pixels, axis=0, return_inverse=True)
    extra = np.array([PAPER, *CHECKER], np.uint8)
    if len(found) > COLOURS:
        counts = ColourCounts()
        counts.add(pixels)
        colours = np.concatenate([fit_palette(counts, COLOURS - len(extra)).rgb, extra])
    else:
        colours = np.concatenate([found, extra])[:COLOURS]
    nearest = [int(np.square(colours.astype(int) - colour).sum(axis=1).argmin()) for colour in (*found, *extra)]
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    shown = np.array(nearest, np.uint8)[where.reshape(images.shape[:3])]
    return table, shown, nearest[len(found) :]
