"""A contact sheet of a split: tokens as colours, and the originals if stored."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from igpt_cli.palette.palette import psnr_of
from igpt_cli.tokens.store import TokenSplit

#: Pixels: least side of an image, between images, around the sheet.
SIDE, GAP, MARGIN = 96, 4, 16
BACKGROUND, INK, FAINT = "#ffffff", "#1b1b1b", "#757575"


def sample_rows(split: TokenSplit, n: int, seed: int = 0) -> np.ndarray:
    """At most n random rows of a split, sorted by label."""
    rows = np.random.default_rng(seed).permutation(len(split))[:n]
    return rows[np.lexsort((rows, split.labels[rows]))]


def contact_sheet(split: TokenSplit, n: int = 32, seed: int = 0) -> Image.Image:
    """Draw n random images as quantized, each with its class; stored originals at their left, and the PSNR of all."""
    rows = sample_rows(split, n, seed)
    pictures = split.decode(rows)  # (n, R, R, 3)
    near = ""
    if split.rgb is not None:
        error = 3 * float(np.square(split.rgb[rows].astype(np.float64) - pictures).mean())
        near = f", PSNR {psnr_of(error):.1f} dB" if error else ", nothing lost"
        pictures = np.concatenate([split.rgb[rows], pictures], axis=2)  # (n, R, 2R, 3)
    zoom = max(1, -(-SIDE // pictures.shape[1]))
    height, width = pictures.shape[1] * zoom, pictures.shape[2] * zoom
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    columns = min(len(rows), 4 if split.rgb is not None else 8)
    lines = -(-len(rows) // columns)
    caption, title = 20, 44
    cell_w, cell_h = width + 3 * GAP, height + caption + 2 * GAP
    size = (max(2 * MARGIN + columns * cell_w - 3 * GAP, 420), title + MARGIN + lines * cell_h)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 8), f"{split.file.path.name}: {len(rows)} of {len(split):,} images of {split.name}", INK, font)
    side = split.file.resolution
    what = f"{'original and quantized' if split.rgb is not None else 'quantized'}, {side} x {side}"
    draw.text((MARGIN, 27), f"{what}, {split.file.n_vocab} colours{near}", FAINT, small)
    for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        x, y = MARGIN + i % columns * cell_w, title + GAP + i // columns * cell_h
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 2), _fitting(draw, class_or_name(split, int(row)), small, width), INK, small)
    return sheet


def class_or_name(split: TokenSplit, row: int) -> str:
    """The class of an image, or its name without folders."""
    label = int(split.labels[row])
    return split.file.classes[label] if label >= 0 else split.names[row].rsplit("/", 1)[-1]


def caption_of(split: TokenSplit, row: int) -> str:
    """The class of an image, if it has one, and its name without folders."""
    name, label = split.names[row].rsplit("/", 1)[-1] or f"row {row}", int(split.labels[row])
    return f"{split.file.classes[label]}: {name}" if label >= 0 else name


def _fitting(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    text = " ".join(text.split())  # a line break cannot be measured
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."
