"""Weighted k-means over every pixel: `fit_palette`.

Coarse to fine: scikit-learn's greedy k-means++ draws the first centres among cubes of colours, then Lloyd's iterations
run over ever smaller cubes and at last over the distinct colours. The result does not depend on threads, the order of
merged counts, or the machine: coordinates and weights are whole numbers, so every sum is exact in any order, and
`lookup`'s exact table gives the nearest centre.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from igpt_cli import __version__
from igpt_cli.errors import InputError
from igpt_cli.images.records import count
from igpt_cli.palette.histogram import ColourCounts
from igpt_cli.palette.lookup import cells_of, nearest_table
from igpt_cli.palette.palette import MAX_COLOURS, SORTED, Palette, luminance_order

#: (bits per channel of the cubes, the most iterations over them).
SCHEDULE = ((4, 20), (5, 20), (6, 30), (7, 30), (8, 4))
#: Cubes per cluster that a level needs to be used.
CUBES_PER_CLUSTER = 4


@dataclass(frozen=True)
class Level:
    """The pixels in cubes of 2**(8 - bits) values per axis.

    Attributes:
        bits: per channel.
        cubes: (n,) int64, the occupied cubes: r << 2 * bits | g << bits | b, ascending.
        weights: (n,) float64 whole numbers, pixels in each.
        sums: (3, n) float64 whole numbers, the sums of their red, green and blue.
        cells: their cells in the table of nearest centres.
    """

    bits: int
    cubes: np.ndarray
    weights: np.ndarray
    sums: np.ndarray
    cells: np.ndarray

    @property
    def corners(self) -> np.ndarray:
        """(n, 3) float64 whole numbers: each cube's position, in cubes."""
        last = (1 << self.bits) - 1
        axes = [self.cubes >> 2 * self.bits, self.cubes >> self.bits & last, self.cubes & last]
        return np.stack(axes, 1).astype(float)

    @property
    def means(self) -> np.ndarray:
        """(n, 3) float64: the mean colour of each cube's pixels."""
        return (self.sums / self.weights).T


def fit_palette(
    counts: ColourCounts, clusters: int = 512, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Palette:
    """Fit a palette of `clusters` colours by k-means over all counted pixels.

    Args:
        counts: the pixels.
        clusters: V, 2..65,536.
        seed: of the first centres; the same seed gives the same palette, bit for bit.
        progress: called with (iterations done, iterations at most).

    Returns:
        A palette sorted by luminance, in which each colour has at least one pixel. Its meta has `seed`,
        `pixels`, `images`, `distinct_colours`, `mean_squared_error` (per pixel, summed over R, G, B), `sources`.

    Raises:
        InputError: fewer distinct colours than clusters, or `clusters` out of range.
    """
    if not 2 <= clusters <= MAX_COLOURS:
        raise InputError(f"{clusters:,} clusters cannot be; choose --clusters from 2 to {MAX_COLOURS:,}")
    colours, weights = counts.colours.astype(np.int64), counts.weights
    full = level_of(colours, weights, 8)
    if len(full.cubes) < clusters:
        n = len(full.cubes)
        hint = f"choose --clusters {n} or less, or more images" if n > 1 else "a palette has 2 at least"
        colour = count(n, "distinct colour")
        raise InputError(f"the images have {colour}, fewer than the {clusters:,} clusters requested; {hint}")
    least = CUBES_PER_CLUSTER * clusters
    levels = [(level_of(colours, weights, bits) if bits < 8 else full, most) for bits, most in SCHEDULE]
    levels = [(level, most) for level, most in levels if level is full or len(level.cubes) >= least]
    centers = first_centers(levels[0][0], clusters, seed)
    done, total = 0, sum(most for _, most in levels)
    for level, most in levels:
        for i in range(most):
            before, centers = centers, lloyd_step(level, centers)
            if progress:
                progress(done + i + 1, total)
            if np.array_equal(before, centers):
                break
        done += most
    if progress:
        progress(total, total)
    return _palette(full, centers, counts, seed)


def level_of(colours: np.ndarray, weights: np.ndarray, bits: int) -> Level:
    """Gather colours (n, 3) int64 in ascending order, with counts (n,), in cubes."""
    red, green, blue = colours.T >> (8 - bits)
    cubes = red << 2 * bits | green << bits | blue
    if bits == 8:
        return Level(8, cubes, weights.astype(np.float64), colours.T * weights.astype(np.float64), cells_of(cubes, 8))
    n = 1 << 3 * bits
    occupied = np.flatnonzero(np.bincount(cubes, minlength=n))
    sums = [np.bincount(cubes, channel * weights, n)[occupied] for channel in colours.T]
    return Level(bits, occupied, np.bincount(cubes, weights, n)[occupied], np.stack(sums), cells_of(occupied, bits))


def first_centers(level: Level, clusters: int, seed: int) -> np.ndarray:
    """(V, 3) float32: the mean colours of cubes that scikit-learn's greedy k-means++ draws."""
    from sklearn.cluster import kmeans_plusplus

    # On the cubes' corners, not their means: whole numbers, so that no rounding differs between machines.
    _, drawn = kmeans_plusplus(level.corners, clusters, sample_weight=level.weights, random_state=seed)
    return level.means[drawn].astype(np.float32)


def lloyd_step(level: Level, centers: np.ndarray) -> np.ndarray:
    """Move each centre to the mean of its nearest cubes' pixels: (V, 3) float32 -> (V, 3) float32.

    A centre without pixels moves to one of the cubes with the largest squared error.
    """
    labels = _labels(level, centers)
    weights = np.bincount(labels, level.weights, len(centers))
    sums = np.stack([np.bincount(labels, channel, len(centers)) for channel in level.sums], axis=1)
    moved = np.divide(sums, weights[:, None], out=centers.astype(np.float64), where=weights[:, None] > 0)
    return _revived(level, labels, moved.astype(np.float32), weights)


def _labels(level: Level, centers: np.ndarray) -> np.ndarray:
    """(n,) uint16: the centre nearest to the middle of each cube."""
    return nearest_table(centers, level.bits, level.cells).reshape(-1)[level.cubes]


def _squared_errors(level: Level, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(n,) float64: squared distance of each cube's mean colour from its centre, times its pixels."""
    return ((level.means - centers.astype(np.float64)[labels]) ** 2).sum(axis=1) * level.weights


def _revived(level: Level, labels: np.ndarray, centers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The centres, with those without pixels moved to the largest errors."""
    dead = np.flatnonzero(weights == 0)
    if len(dead):
        worst = np.argsort(-_squared_errors(level, labels, centers), kind="stable")[: len(dead)]
        centers[dead] = level.means[worst]
    return centers


def _palette(full: Level, centers: np.ndarray, counts: ColourCounts, seed: int) -> Palette:
    """The palette of the sorted centres, each with at least one pixel."""
    while True:
        centers = centers[luminance_order(centers)]
        labels = _labels(full, centers)
        weights = np.bincount(labels, full.weights, len(centers))
        if weights.all():
            break
        # Each round moves a centre to a colour without one, so the error decreases and the loop ends.
        centers = _revived(full, labels, centers, weights)
    error = float(_squared_errors(full, labels, centers).sum() / full.weights.sum())
    meta = {
        "order": SORTED,
        "seed": seed,
        "pixels": counts.pixels,
        "images": counts.images,
        "distinct_colours": len(full.cubes),
        "mean_squared_error": error,
        "sources": counts.sources,
        "tool_version": __version__,
    }
    return Palette(centers, weights.astype(np.int64), meta)
