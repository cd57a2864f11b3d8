"""Pictures of samples, completions and nearest training images.

Every pixel of an image becomes a square of `zoom` x `zoom`; nothing is smoothed. R is the side of an image, n the
number of images, k that of the completions or neighbours of each.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import MAX_TEXT_CHUNK

from igpt_cli import __version__
from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import replacing, require_file
from igpt_cli.images.pictures import save_picture

#: Pixels on the screen: between images, between the parts of a row, and the height of a line of text.
GAP, SPACE, LINE = 2, 12, 18
#: Screen pixels in a row that a grid, or the pictures of a table laid out as a grid, are to have.
GRID_WIDTH, TABLE_WIDTH = 640, 1000
PAPER, INK, FAINT, ALARM = (255, 255, 255), "#1b1b1b", "#757575", "#c81e1e"
#: What is missing is shown as a checker of these two, one field a pixel: no image has it, and it is not the paper.
CHECKER = (238, 238, 238), (200, 200, 200)
FONT_SIZE = 12
#: Characters; what Pillow unpacks of a text in a PNG, 1 MiB.
LONGEST_TEXT = MAX_TEXT_CHUNK


def grid(images: np.ndarray, columns: int | None = None, zoom: int | None = None) -> Image.Image:
    """Arrange images (n, R, R, 3) uint8 side by side, row after row. `columns` and `zoom` (screen pixels per pixel) fit
    the number of images by default. Raises InputError for other shapes and dtypes.
    """
    n, side = require_images(images).shape[:2]
    zoom = zoom or default_zoom(n, side)
    return Image.fromarray(tiled(enlarged(images, zoom), columns or default_columns(n), PAPER))


def completions(
    inputs: np.ndarray,
    missing: np.ndarray,
    outputs: np.ndarray,
    originals: np.ndarray | None = None,
    zoom: int | None = None,
) -> Image.Image:
    """Show one row per image: the input with a checker at missing pixels, k completions, the original.

    Many rows continue in further columns.

    Args:
        inputs, originals: (n, R, R, 3) uint8; originals may be unknown.
        missing: (n, R, R) bool.
        outputs: (n, k, R, R, 3) uint8.

    Raises:
        InputError: other shapes or dtypes.
    """
    n, R = require_images(inputs, "inputs").shape[:2]
    k = outputs.shape[1] if np.ndim(outputs) == 5 else 0
    _require(missing, "missing", (n, R, R), bool)
    _require(outputs, "outputs", (n, max(k, 1), R, R, 3), np.uint8)
    if originals is not None:
        _require(originals, "originals", (n, R, R, 3), np.uint8)
    zoom = zoom or default_zoom(n * (k + 2), R, TABLE_WIDTH)
    parts = [("input", enlarged(with_missing(inputs, missing), zoom)[:, None])]
    parts.append(("completion" if k == 1 else "completions", enlarged(outputs, zoom)))
    if originals is not None:
        parts.append(("original", enlarged(originals, zoom)[:, None]))
    return _rows(parts)


def with_nearest(
    samples: np.ndarray,
    nearest: np.ndarray,
    distances: np.ndarray,
    names: Sequence[Sequence[str]] | None = None,
    zoom: int | None = None,
) -> Image.Image:
    """Show one row per sample: the sample and its k nearest training images with their distances; copies are framed in
    red.

    Args:
        samples, nearest: (n, R, R, 3) and (n, k, R, R, 3) uint8.
        distances: (n, k), root mean squared difference, 0..255; 0 is a copy.
        names: (n, k) texts below the distances, cut at the image's width.

    Raises:
        InputError: other shapes or dtypes.
    """
    n, R = require_images(samples, "samples").shape[:2]
    k = nearest.shape[1] if np.ndim(nearest) == 5 else 0
    _require(nearest, "nearest", (n, max(k, 1), R, R, 3), np.uint8)
    if np.shape(distances) != (n, k) or (names is not None and [len(row) for row in names] != [k] * n):
        raise InputError(f"distances and names are to be ({n}, {k}), one for each of the nearest images")
    zoom = zoom or default_zoom(n * (k + 1), R, TABLE_WIDTH)
    copies = np.asarray(distances) == 0
    notes = [[_distance_text(distance) for distance in row] for row in np.asarray(distances).tolist()]
    captions = [notes] if names is None else [notes, names]
    parts = [
        ("sample", enlarged(samples, zoom)[:, None]),
        ("nearest training images, RMS distance", enlarged(nearest, zoom)),
    ]
    return _rows(parts, captions, copies)


def _distance_text(distance: float) -> str:
    return "copy" if distance == 0 else f"{distance:.1f}" if distance >= 0.05 else f"{distance:.1g}"


def _rows(
    parts: Sequence[tuple[str, np.ndarray]],
    captions: Sequence[Sequence[Sequence[str]]] = (),
    alarms: np.ndarray | None = None,
) -> Image.Image:
    """A table of pictures, one row per image.

    Args:
        parts: (title, (n, columns, h, w, 3) uint8) from left to right.
        captions: lines of text below each picture of the last part, (n, columns) each.
        alarms: (n, columns) bool, pictures of the last part to frame, their first caption in red.
    """
    font = ImageFont.load_default(FONT_SIZE)
    n, _, height, width, _ = parts[0][1].shape
    lefts, group = [], 0  # where the parts begin in a row, and how wide it is
    for title, pictures in parts:
        lefts.append(group)
        group += max(pictures.shape[1] * (width + GAP) - GAP, math.ceil(font.getlength(title))) + SPACE
    step = height + GAP + (LINE * len(captions) + GAP if captions else 0)
    groups = next(g for g in range(1, n + 1) if g == n or 1.5 * g * group >= -(-n // g) * step)
    rows = -(-n // groups)
    size = (groups * (group + 2 * SPACE) - SPACE, LINE + rows * step + SPACE)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for i in range(n):
        left, y = SPACE + i // rows * (group + 2 * SPACE), LINE + SPACE // 2 + i % rows * step
        for (title, pictures), at in zip(parts, lefts, strict=True):
            if i % rows == 0:
                draw.text((left + at, SPACE // 3), title, FAINT, font)
            for j, pixels in enumerate(pictures[i]):
                picture.paste(Image.fromarray(pixels), (left + at + j * (width + GAP), y))
        for j in range(parts[-1][1].shape[1] if captions else 0):
            x, alarm = left + lefts[-1] + j * (width + GAP), alarms is not None and alarms[i, j]
            if alarm:
                draw.rectangle((x - 1, y - 1, x + width, y + height), None, ALARM, 3)
            for line, texts in enumerate(captions):
                note = Image.new("RGB", (width - 4, LINE), PAPER)  # cuts what is too long
                ImageDraw.Draw(note).text((0, 2), texts[i][j], ALARM if alarm and not line else INK, font)
                picture.paste(note, (x + 1, y + height + 1 + line * LINE))
    return picture


def captioned(picture: Image.Image, text: str, left: int = GAP) -> Image.Image:
    """The picture, and below it a text, `left` from its edges, on as many lines as it takes, broken between words."""
    font, lines = ImageFont.load_default(FONT_SIZE), [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > picture.width - 2 * left:
            lines.append(word)
        else:
            lines[-1] = longer
    under = Image.new("RGB", (picture.width, picture.height + LINE * len(lines)), PAPER)
    under.paste(picture, (0, 0))
    for i, line in enumerate(lines):
        ImageDraw.Draw(under).text((left, picture.height + LINE * i), line, FAINT, font)
    return under


def write_picture(picture: Image.Image, path: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Write a .png or .svg picture with the settings that made it, replacing what is there.

    PNG text chunks: `Software` has the version of igpt, `igpt` the settings as ASCII JSON of at most 1 MiB.

    Raises:
        InputError: settings that are too long. OutputError: the file cannot be written.
    """
    save_picture(picture, Path(path), {"Software": f"igpt {__version__}", "igpt": settings_text(settings)})


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings in a PNG or GIF that igpt wrote.

    Raises:
        InputError: there is no such file.
        FormatError: it is another kind of file, is damaged, or holds no settings.
    """
    path = require_file(Path(path), "a picture")
    try:
        with warnings.catch_warnings(), Image.open(path, formats=("PNG", "GIF")) as picture:
            warnings.simplefilter("ignore")
            text = picture.info.get("igpt") or picture.info.get("comment") or ""
    except Exception as e:  # whatever the decoder stumbles over
        raise FormatError(f"{path} cannot be read as a PNG or GIF: {e}") from e
    try:
        settings = json.loads(text) if len(text) <= LONGEST_TEXT else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise FormatError(f"{path} has no settings of igpt in it")
    return settings


def settings_text(settings: dict[str, Any]) -> str:
    """Settings as JSON of one line. Raises InputError above 1 MiB, which no reader would take."""
    text = json.dumps(settings)
    if len(text) > LONGEST_TEXT:
        raise InputError(f"{len(text):,} characters of settings are too many for a file; at most {LONGEST_TEXT:,}")
    return text


def write_npz(
    path: str | os.PathLike, tokens: np.ndarray, images: np.ndarray, settings: dict[str, Any], **more: np.ndarray
) -> None:
    """Write samples as arrays `tokens` (uint16), `images`, `settings` (JSON text), and `more` by name.

    Args:
        tokens: (n, T) or (n, k, T) integers in 0..65,535.
        images: (n, R, R, 3) or (n, k, R, R, 3) uint8.
        more: of completions `originals` (n, R, R, 3) uint8 and `missing` (n, R, R) bool.

    Raises:
        InputError: tokens and images do not match. OutputError: the file cannot be written.
    """
    side = np.shape(images)[-2] if np.ndim(images) > 3 else 0
    _require(images, "images", (*np.shape(tokens)[:-1], side, side, 3), np.uint8)
    if np.shape(tokens)[-1] != side * side or tokens.min() < 0 or tokens.max() >= 1 << 16:
        raise InputError(
            f"tokens are to be (..., {side * side}) in 0..65535, as images are {np.shape(images)}, not "
            f"{np.shape(tokens)} in {tokens.min()}..{tokens.max()}"
        )
    arrays = {"tokens": tokens.astype(np.uint16), "images": images, "settings": np.array(settings_text(settings))}
    with replacing(Path(path)) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays, **more)  # type: ignore[arg-type]


def with_missing(images: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Images (n, R, R, 3) uint8 with the checker where (n, R, R) bool says missing."""
    return np.where(missing[..., None], np.array(CHECKER, np.uint8)[checker(missing.shape[1])], images)


def checker(side: int) -> np.ndarray:
    """(side, side) of 0 and 1, in turn: which of the two greys of the checker a pixel shows."""
    return np.indices((side, side)).sum(axis=0) % 2


def enlarged(images: np.ndarray, zoom: int) -> np.ndarray:
    """(..., R, R, channels) -> (..., R * zoom, R * zoom, channels), each pixel repeated."""
    return images.repeat(zoom, axis=-3).repeat(zoom, axis=-2)


def tiled(cells: np.ndarray, columns: int, fill: int | tuple[int, int, int]) -> np.ndarray:
    """Cells (n, h, w, ...) of equal size on one canvas (H, W, ...), `GAP` between and around them."""
    n, height, width = cells.shape[:3]
    rows = -(-n // columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, *cells.shape[3:])
    canvas = np.empty(shape, cells.dtype)
    canvas[:] = fill
    for i, cell in enumerate(cells):
        y, x = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        canvas[y : y + height, x : x + width] = cell
    return canvas


def default_columns(n: int) -> int:
    """Of the numbers from the square root of n to that of 3 n, the one that leaves the fewest places empty.

    >>> [default_columns(n) for n in (1, 2, 3, 4, 8, 10, 16, 17, 100)]
    [1, 2, 3, 2, 4, 5, 4, 6, 10]
    """
    return min(range(math.isqrt(n - 1) + 1, math.isqrt(3 * n) + 1), key=lambda columns: (-n % columns, columns))


def default_zoom(n: int, resolution: int, width: int = GRID_WIDTH) -> int:
    """The zoom that makes n images about `width` wide together, each 64 to 128, or less where they are thousands.

    >>> [default_zoom(n, 32) for n in (1, 16, 36, 100, 1000, 5000)], [default_zoom(16, R) for R in (32, 48, 64)]
    ([4, 4, 3, 2, 2, 1], [4, 3, 2])
    """
    columns = math.sqrt(n)
    side = min(128.0, max(64.0, width / columns), 2048 / columns)
    return max(1, round(side / resolution))


def require_images(images: np.ndarray, what: str = "images") -> np.ndarray:
    """`images` if they are (n, R, R, 3) uint8 with n and R at least 1; otherwise raises InputError with their shape."""
    n, side = (max(1, length) for length in [*np.shape(images), 1, 1][:2])
    _require(images, what, (n, side, side, 3), np.uint8)
    return images


def _require(array: np.ndarray, what: str, shape: tuple[int, ...], dtype: type) -> None:
    if np.shape(array) != shape or array.dtype != dtype:
        raise InputError(
            f"{what} are to be {np.dtype(dtype)} {shape}, not {getattr(array, 'dtype', type(array).__name__)} "
            f"{np.shape(array)}"
        )
