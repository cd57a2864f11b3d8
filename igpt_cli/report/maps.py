"""Heat maps of losses, by position and by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.evaluation.pixel_map import PixelMap, passes, write_pixel_map
from igpt_cli.report.figures import GREY, STYLE, fitting, new_figure, save, sheet
from igpt_cli.tokens.sheet import caption_of
from igpt_cli.tokens.store import TokenSplit

#: Of a sheet of heat maps, in dots: around it, between pairs, within a pair; the text above all and below each.
MARGIN, BETWEEN, WITHIN, HEAD, FOOT = 24, 28, 6, 68, 52
#: Up to so many images: the columns at most, and about which side a picture has in dots.
SHEETS = ((1, 1, 480), (8, 2, 192), (32, 4, 128), (64, 6, 128))
MOST_IMAGES = SHEETS[-1][0]


def position_map(values: np.ndarray, path: Path | str, title: str = "") -> None:
    """The mean loss at each position of the image as a heat map; places without a value are grey.

    The colours end at the 99th percentile, or else the first pixel, which nothing helps to predict, would take most
    of them; where that hides something, the colour bar ends in an arrow labelled with the highest value.

    Args:
        values: (R, R) nats per token, NaN where there is none.
    """
    figure, axes = new_figure(width=5.2, height=4.3)
    colours, above = _heat(values)
    shown = axes.imshow(np.ma.masked_invalid(values), **colours)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="column", ylabel="row")
    axes.set_title(fitting(title, 9.5, 250), fontsize=9.5, loc="left", parse_math=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    _heat_bar(figure, shown, above, ax=axes)
    save(figure, Path(path))


def _heat(values: np.ndarray, low: float | None = None) -> tuple[dict[str, Any], float | None]:
    """How `imshow` colours losses, from `low` or the lowest; and the highest loss, where the colours end below it."""
    from matplotlib import colormaps

    known = values[np.isfinite(values)]
    least, top, high = (known.min(), np.percentile(known, 99), known.max()) if known.size else (0.0, 1.0, 1.0)
    low = least if low is None else low
    cut = high > low + 1.2 * (top - low)
    tints = colormaps["viridis"].with_extremes(bad="#d1d5db")
    return {"cmap": tints, "vmin": low, "vmax": top if cut else high, "interpolation": "nearest"}, high if cut else None


def _heat_bar(figure, shown, above: float | None, **where) -> None:
    bar = figure.colorbar(shown, label="nats per pixel", extend="neither" if above is None else "max", **where)
    bar.outline.set_visible(False)
    if above is not None:
        bar.ax.set_title(f"up to {above:.1f}", fontsize=8)


def write_map(mapped: PixelMap, split: TokenSplit, path: Path, title: str = "") -> None:
    """Write per-pixel losses as arrays (.npz, see `write_pixel_map`) or as a picture (see `pixel_map_figure`)."""
    nats, rows = mapped.nats, mapped.rows
    if path.suffix.lower() == ".npz":
        write_pixel_map(nats, split, rows, path)
        return
    note = "each pixel predicted from those before it, row by row"
    if mapped.mask_prob is not None:
        k = passes(mapped.mask_prob)
        note = f"each pixel predicted once, with {f'1/{k} of the' if k > 1 else 'the whole'} image hidden"
    pixel_map_figure(nats, split.images(rows), [caption_of(split, row) for row in rows], path, title, note)


def pixel_map_figure(
    nats: np.ndarray, images: np.ndarray, captions: Sequence[str], path: Path | str, title: str = "", note: str = ""
) -> None:
    """Images, each with the heat map of the loss of its pixels, in the same colours for all.

    The colours begin at 0 and end as in `position_map`. Below a pair stand its caption, shortened where it is too
    long, and its mean.

    Args:
        nats: (n, R, R) nats per pixel, n at most 64.
        images: (n, R, R, 3) uint8.
        captions: n texts.
        title, note: a line each above the images.

    Raises:
        InputError: no images, or more than 64.
    """
    from matplotlib import pyplot as plt

    n, R = nats.shape[:2]
    if not 1 <= n <= MOST_IMAGES:
        raise InputError(f"{n:,} images; a sheet of heat maps holds 1 to {MOST_IMAGES}")
    most, side = next((columns, side) for images, columns, side in SHEETS if n <= images)
    lines = -(-n // most)
    columns = -(-n // lines)
    # Every pixel of an image has the same number of dots.
    side = R * max(1, round(side / R))
    pair, line = 2 * side + WITHIN, side + FOOT
    wide = columns * (pair + BETWEEN) - BETWEEN
    W, H = MARGIN + wide + BETWEEN + 130, HEAD + lines * line + MARGIN // 2
    figure, axes = sheet(W, H)
    dot = 72 / figure.dpi  # in points
    text = {"parse_math": False, "verticalalignment": "baseline"}
    axes.text(MARGIN, 30, fitting(title, 10.5, wide * dot), fontsize=10.5, **text)
    axes.text(MARGIN, 54, fitting(note, 8, (wide - 40) * dot), fontsize=8, color=GREY, **text)
    colours, above = _heat(nats, low=0.0)
    for i in range(n):
        x, y = MARGIN + i % columns * (pair + BETWEEN), HEAD + i // columns * line
        axes.imshow(images[i], extent=(x, x + side, y + side, y), interpolation="nearest", aspect="auto")
        place = (x + side + WITHIN, x + pair, y + side, y)
        shown = axes.imshow(nats[i], extent=place, aspect="auto", **colours)
        axes.text(x, y + side + 19, fitting(captions[i], 8, pair * dot), fontsize=8, **text)
        axes.text(x, y + side + 38, f"mean {nats[i].mean():.2f} nats", fontsize=8, color=GREY, **text)
    axes.set(xlim=(0, W), ylim=(H, 0))
    tall = min(lines * line - FOOT, 480)
    where = ((MARGIN + wide + BETWEEN + 10) / W, 1 - (HEAD + tall) / H, 18 / W, tall / H)
    with plt.rc_context(STYLE):
        _heat_bar(figure, shown, above, cax=figure.add_axes(where))
    save(figure, Path(path))
