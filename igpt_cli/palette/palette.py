"""The palette: V colours, and the conversion between images and tokens.

>>> from igpt_cli.palette.palette import Palette
>>> palette = Palette([[0, 0, 0], [255, 255, 255]])
>>> tokens = palette.quantize(np.array([[[250, 240, 255], [9, 8, 7]]], np.uint8))
>>> tokens.tolist(), palette.dequantize(tokens).tolist()
([[1, 0]], [[[255, 255, 255], [0, 0, 0]]])
"""

from __future__ import annotations

import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import check_output, replacing, sha256_of
from igpt_cli.palette.lookup import lookup_table, require_rgb, take

#: Weights of R, G and B in Rec. 601 luma.
LUMA = (0.299, 0.587, 0.114)
#: Tokens are uint16.
MAX_COLOURS = 1 << 16
#: `meta["order"]`: fitted palettes are sorted by luminance; imported ones have the order of their tokens.
SORTED, IMPORTED = "luminance", "imported"


class Palette:
    """V colours in a fixed order; a token is an index into them.

    Args:
        centers: (V, 3) RGB in [0, 255], rounded to float32; 2 <= V <= 65,536.
        counts: (V,) the number of fitted pixels of each colour; None or all 0 if not known.
        meta: provenance, stored as JSON. `order` is "luminance" or "imported"; default by the colours.

    Attributes:
        centers: (V, 3) float32, read-only.
        counts: (V,) int64, read-only.
        meta: dict.

    Raises:
        FormatError: another shape, range or order.
    """

    def __init__(self, centers: np.ndarray, counts: np.ndarray | None = None, meta: dict[str, Any] | None = None):
        self.centers = _checked_centers(centers)
        self.counts = _checked_counts(np.zeros(len(self.centers)) if counts is None else counts, len(self.centers))
        self.meta = dict(meta or {})
        light = is_sorted(self.centers)
        if self.meta.setdefault("order", SORTED if light else IMPORTED) == SORTED and not light:
            raise FormatError("the colours are not sorted by luminance, which the palette says of itself")

    def __len__(self) -> int:
        return len(self.centers)

    def __repr__(self) -> str:
        return f"Palette({self.n_vocab} colours, {self.sha256[:12]})"

    @property
    def n_vocab(self) -> int:
        """V, the number of colours."""
        return len(self.centers)

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the centres as little-endian float32, row by row; it identifies a palette."""
        return sha256_of(np.ascontiguousarray(self.centers, "<f4").tobytes())

    @cached_property
    def rgb(self) -> np.ndarray:
        """(V, 3) uint8: the colours, rounded half to even."""
        return np.clip(np.rint(self.centers), 0, 255).astype(np.uint8)

    def quantize(self, rgb: np.ndarray) -> np.ndarray:
        """The nearest colour of each pixel: (..., 3) uint8 -> (...) uint16 in [0, V).

        Squared distance in float64, the first index on ties, from a table of all colours that the first call builds in
        about a second and caches.

        Raises:
            InputError: not uint8, or the last axis is not RGB.
        """
        return take(lookup_table(self.centers), require_rgb(rgb))

    def dequantize(self, tokens: np.ndarray) -> np.ndarray:
        """The colour of each token: (...) whole numbers in [0, V) -> (..., 3) uint8.

        Raises:
            InputError: a token out of range, or not whole numbers.
        """
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            raise InputError(f"tokens must be whole numbers, not {tokens.dtype}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.n_vocab):
            worst = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise InputError(f"token {worst} is outside 0..{self.n_vocab - 1}: the palette has {self.n_vocab} colours")
        return self.rgb[tokens]

    def psnr(self, rgb: np.ndarray) -> float:
        """Peak signal-to-noise ratio in dB of images (..., 3) uint8 when quantized; infinite if nothing is lost."""
        lost = require_rgb(rgb).astype(np.float32) - self.dequantize(self.quantize(rgb))
        return psnr_of(3 * float(np.mean(np.square(lost), dtype=np.float64)))

    def save(self, path: str | os.PathLike, force: bool = False) -> Path:
        """Write the palette as .npz: `centers`, `counts` and `meta`.

        Raises:
            OutputError: something is there already and `force` is not set, or the place cannot be written.
        """
        path = check_output(Path(path), force)
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, centers=self.centers, counts=self.counts, meta=np.array(json.dumps(self.meta)))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike, scale: str | None = None) -> Palette:
        """Read a palette: our .npz, OpenAI's .npy, a Hugging Face preprocessor_config.json, the palette of a token
        file, or that of a model directory ("builtin:<name>" too), recognised by content.

        Args:
            path: the file or folder.
            scale: the range of the colours in a foreign file, "-1..1", "0..1" or "0..255"; by default it is recognised
                and noted in `meta["imported"]`, and an ambiguous file is refused.

        Raises:
            InputError: nothing is there.
            FormatError: it is no palette, is damaged, or its scale is ambiguous.
        """
        from igpt_cli.palette.formats import read_palette

        return read_palette(path, scale)


def even_palette(levels: int = 8) -> Palette:
    """A palette of levels ** 3 colours, evenly spaced in red, green and blue, for images without a fitted palette."""
    steps = (np.arange(levels) + 0.5) * 256 / levels - 0.5
    centers = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    return Palette(centers[luminance_order(centers)])


def luma(rgb: np.ndarray) -> np.ndarray:
    """Rec. 601 luma: (..., 3) in 0..255 -> (...) float64, added in a fixed order so that all machines agree."""
    r, g, b = np.moveaxis(np.asarray(rgb, np.float64), -1, 0)
    return (LUMA[0] * r + LUMA[1] * g) + LUMA[2] * b


def luminance_order(centers: np.ndarray) -> np.ndarray:
    """Indices that sort colours (V, 3) by luma, then red, green, blue."""
    red, green, blue = np.asarray(centers).T
    return np.lexsort((blue, green, red, luma(centers)))


def is_sorted(centers: np.ndarray) -> bool:
    """Whether colours (V, 3) are in ascending order of luma."""
    return bool(np.all(np.diff(luma(centers)) >= 0))


def psnr_of(mean_squared_error: float) -> float:
    """dB, from the mean squared error per pixel, summed over R, G and B (0..255), of which a third is a channel's.

    >>> round(psnr_of(43.54), 2) == round(10 * math.log10(255**2 / (43.54 / 3)), 2) == 36.51
    True
    """
    return 10 * math.log10(3 * 255**2 / mean_squared_error) if mean_squared_error else math.inf


def _checked_centers(centers: np.ndarray) -> np.ndarray:
    centers = np.array(centers)  # a copy, which nobody else changes
    if centers.dtype.kind not in "fiu" or centers.ndim != 2 or centers.shape[1] != 3:
        raise FormatError(f"a palette is (V, 3) numbers, not {centers.dtype} of shape {centers.shape}")
    if not 2 <= len(centers) <= MAX_COLOURS:
        raise FormatError(f"a palette has 2 to {MAX_COLOURS:,} colours, not {len(centers):,}")
    centers = centers.astype(np.float32)
    if not np.isfinite(centers).all():
        raise FormatError(f"colour {int(np.argmin(np.isfinite(centers).all(axis=1)))} is not finite")
    if centers.min() < 0 or centers.max() > 255:
        raise FormatError(f"colours from {centers.min():g} to {centers.max():g} are outside 0..255")
    centers.flags.writeable = False
    return centers


def _checked_counts(counts: np.ndarray, n_vocab: int) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.shape != (n_vocab,) or counts.dtype.kind not in "fiu" or (counts < 0).any():
        raise FormatError(f"counts must be {n_vocab} numbers from 0, not {counts.dtype} of shape {counts.shape}")
    counts = counts.astype(np.int64)
    counts.flags.writeable = False
    return counts
