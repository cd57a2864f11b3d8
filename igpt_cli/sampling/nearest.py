"""The training images nearest to samples, to show memorisation.

The distance of two images is the root mean squared difference of their 3 * R * R numbers in 0..255. It is exact: in
d = |s|^2 + |t|^2 - 2 s.t with 128 subtracted from every number, no sum of 1,024 products exceeds 2^24, up to which
float32 holds every whole number. Products are float32, 1,024 numbers at a time, and added in float64, so the order of
additions and the number of threads change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from igpt_cli.errors import InputError, MismatchError
from igpt_cli.images.parallel import cores
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.store import TokenSplit

#: Numbers of an image whose products can be added in float32 without rounding.
EXACT = 1024
#: Bytes of decoded training images that a thread holds at a time, and samples compared at a time.
BLOCK_BYTES, SAMPLES = 2 << 20, 512


@dataclass(frozen=True)
class Nearest:
    """The k nearest training images of each of n samples, nearest first; among equally near ones the lower row.

    rows: (n, k) int64 of the split. distances: (n, k) float64, root mean squared difference in 0..255. images:
    (n, k, R, R, 3) uint8, the training images as their tokens show them.
    """

    rows: np.ndarray
    distances: np.ndarray
    images: np.ndarray

    @property
    def copies(self) -> np.ndarray:
        """(n,) bool: which samples are copies of a training image, every pixel the same."""
        return self.distances[:, 0] == 0

    def to_dict(self, split: TokenSplit) -> list[list[dict[str, Any]]]:
        """For each sample, row, name and distance of the images nearest to it in the split."""
        return [
            [{"row": int(r), "name": split.names[r], "distance": round(float(d), 3)} for r, d in zip(rows, distances)]
            for rows, distances in zip(self.rows, self.distances)
        ]


def nearest(
    tokens: np.ndarray,
    palette: Palette,
    split: TokenSplit,
    k: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Nearest:
    """Find the k training images nearest to each sample.

    Args:
        tokens: (n, T) integers in [0, V), the samples, in the colours of `palette`.
        split: the training images, of any palette; all of them where there are fewer than k.
        progress: called with (training images done, training images in all).

    Raises:
        MismatchError: other resolutions.
        InputError: no samples, no training images, k below 1, or a token outside the palette.
    """
    n, N, R = len(tokens), len(split), split.file.resolution
    if np.ndim(tokens) != 2 or not n or not N or k < 1:
        raise InputError(
            f"samples {np.shape(tokens)}, {N} images of {split.name} and k = {k}: at least 1 of each is needed"
        )
    if tokens.shape[1] != R * R:
        raise MismatchError(
            f"a sample has {tokens.shape[1]:,} pixels, an image of {split.file.path} has {R} x {R} = {R * R:,}; "
            f"compare with a token file of the model's resolution"
        )
    samples = palette.dequantize(tokens).reshape(n, -1)
    groups = [samples[start : start + SAMPLES] for start in range(0, n, SAMPLES)]
    found = []
    for i, group in enumerate(groups):
        part = (lambda done, i=i: progress((done + i * N) // len(groups), N)) if progress else None
        found.append(_nearest_of(group, split, min(k, N), part))
    rows, squares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    images = split.decode(rows.reshape(-1)).reshape(*rows.shape, R, R, 3)
    return Nearest(rows, np.sqrt(squares / samples.shape[1]), images)


def _nearest_of(
    samples: np.ndarray, split: TokenSplit, k: int, progress: Callable[[int], None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, k) int64 and squared distances (n, k) int64 of the k nearest to samples (n, D) uint8."""
    N, D = len(split), samples.shape[1]
    shifted = samples.astype(np.float32) - 128
    colours = split.file.palette.rgb.astype(np.float32) - 128
    squares, step = squared(shifted)[:, None], max(k, BLOCK_BYTES // (4 * D))

    def of_block(start: int) -> np.ndarray:
        """The k least keys (n, k) of a block; a key is distance and row as one whole number, so that the least is the
        nearest, and of equally near ones the lowest row."""
        block = colours[split.tokens[start : start + step]].reshape(-1, D)
        products = np.zeros((len(samples), len(block)))
        for at in range(0, D, EXACT):
            products += shifted[:, at : at + EXACT] @ block[:, at : at + EXACT].T
        keys = (squares + squared(block) - 2 * products).astype(np.int64) * N + np.arange(start, start + len(block))
        return np.partition(keys, k - 1, axis=1)[:, :k] if k < len(block) else keys

    best = np.empty((len(samples), 0), np.int64)
    pool = ThreadPoolExecutor(cores())
    try:
        # The blocks are small: one thread each is quicker than every thread on each.
        with threadpool_limits(1):
            for start, keys in zip(range(0, N, step), pool.map(of_block, range(0, N, step))):
                best = np.sort(np.concatenate([best, keys], axis=1), axis=1)[:, :k]
                if progress:
                    progress(min(start + step, N))
    finally:
        pool.shutdown(cancel_futures=True)
    return best % N, best // N


def squared(images: np.ndarray) -> np.ndarray:
    """The sum of squares of each row of (n, D) float32 whole numbers in -128..127, exactly: (n,) float64."""
    parts = [images[:, at : at + EXACT] for at in range(0, images.shape[1], EXACT)]
    return np.stack([np.einsum("nd,nd->n", part, part) for part in parts]).sum(axis=0, dtype=np.float64)
