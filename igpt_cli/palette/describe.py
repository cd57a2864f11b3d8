"""Describe a palette in numbers and as a picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from igpt_cli.palette.palette import Palette, psnr_of

#: A colour is rare if its share of the pixels is less than `RARE` / V.
RARE = 0.05

SIDE, GAP, MARGIN = 28, 2, 24  # pixels
PAPER, INK = (250, 250, 248), (60, 60, 60)


def describe(palette: Palette) -> dict[str, Any]:
    """Everything about a palette, for JSON.

    Returns:
        `n_vocab`, `sha256`, `order`, `pixels`, `images`, `mean_squared_error` (per pixel, summed over R, G, B in
        0..255), `psnr` (dB), `dead` and `rare` (indices of colours without pixels, or with few), `colours` (objects
        with `index`, `rgb`, `hex`, `count`, `share` in percent) and `meta`. Unknown values are None.
    """
    known = bool(palette.counts.any())
    pixels = int(palette.counts.sum())
    error = palette.meta.get("mean_squared_error")
    error = float(error) if isinstance(error, (int, float)) and math.isfinite(error) and error >= 0 else None
    colours = [
        {
            "index": i,
            "rgb": [round(float(c), 3) for c in center],
            "hex": "#{:02x}{:02x}{:02x}".format(*shown),
            "count": int(count) if known else None,
            "share": 100 * int(count) / pixels if known else None,
        }
        for i, (center, shown, count) in enumerate(zip(palette.centers, palette.rgb, palette.counts, strict=True))
    ]
    dead, rare = palette.counts == 0, palette.counts < RARE * pixels / palette.n_vocab
    return {
        "n_vocab": palette.n_vocab,
        "sha256": palette.sha256,
        "order": palette.meta["order"],
        "pixels": pixels if known else None,
        "images": palette.meta.get("images"),
        "mean_squared_error": error,
        "psnr": psnr_of(error) if error else None,
        "dead": np.flatnonzero(dead).tolist() if known else None,
        "rare": np.flatnonzero(rare & ~dead).tolist() if known else None,
        "colours": colours,
        "meta": palette.meta,
    }


def swatch(palette: Palette) -> Image.Image:
    """Draw a palette: its colours by index, row by row, and if known a strip with each one's share of the fitted
    pixels."""
    columns = min(max(2, 2 ** round(math.log2(2 * palette.n_vocab) / 2)), palette.n_vocab)
    rows = -(-palette.n_vocab // columns)
    width = max(columns * (SIDE + GAP) - GAP, 320)
    known = bool(palette.counts.any())
    top, strip = MARGIN + 28, 56 if known else 0
    height = top + rows * (SIDE + GAP) - GAP + (strip + 48 if known else 0) + MARGIN
    picture = Image.new("RGB", (width + 2 * MARGIN, height), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    draw.text((MARGIN, MARGIN - 6), _title(palette), INK, font)
    for i, colour in enumerate(palette.rgb.tolist()):
        x, y = MARGIN + i % columns * (SIDE + GAP), top + i // columns * (SIDE + GAP)
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), tuple(colour))
    if known:
        y = top + rows * (SIDE + GAP) - GAP + 16
        draw.text((MARGIN, y), "share of the pixels", INK, font)
        ends = np.cumsum(palette.counts) / palette.counts.sum() * width
        shown = palette.rgb[np.searchsorted(ends, np.arange(width) + 0.5)]  # the colour in the middle of each column
        picture.paste(Image.fromarray(np.repeat(shown[None], strip, axis=0)), (MARGIN, y + 28))
    return picture


def _title(palette: Palette) -> str:
    title = f"{palette.n_vocab:,} colours"
    if (error := describe(palette)["mean_squared_error"]) is not None:
        title += f"   PSNR {psnr_of(error):.1f} dB"
    return f"{title}   sha256 {palette.sha256[:12]}"
