"""A table of the nearest palette colour of every 24-bit colour.

Legend: V palette size, n cells per axis, e colours per cell and axis, S = n * e colours per axis.

The definition, which the table equals bit for bit (float64, the sum from red to blue, first index on ties):

    table[r, g, b] = argmin over v of (r - centers[v, 0])**2 + (g - centers[v, 1])**2 + (b - centers[v, 2])**2

Most of the V distances are never computed: in a cell of the colour cube, a centre whose least distance exceeds the
greatest distance of another centre is nearest to no colour. Rounding is monotonic and the bounds use the operations of
the distances, so they hold exactly, without a margin.
"""

from __future__ import annotations

import functools

import numpy as np

from igpt_cli.errors import InputError

#: Cells per axis for grids of at least 7 bits and for coarser ones; more cells leave fewer candidates in each.
CELLS, FEWER_CELLS = 32, 16
#: Colours processed at a time, so that temporary arrays stay in the processor's cache.
CHUNK = 1 << 16


def lookup_table(centers: np.ndarray) -> np.ndarray:
    """The table of `nearest_table` for centers (V, 3) RGB in [0, 255], rounded to float32: (256, 256, 256) uint16, 32
    MiB, read-only, cached for the last four palettes."""
    return _remembered_table(np.ascontiguousarray(centers, "<f4").tobytes())


@functools.lru_cache(maxsize=4)
def _remembered_table(centers: bytes) -> np.ndarray:
    table = nearest_table(np.frombuffer(centers, "<f4").reshape(-1, 3))
    table.flags.writeable = False
    return table


def require_rgb(rgb: np.ndarray) -> np.ndarray:
    """Check that `rgb` is (..., 3) uint8.

    Raises:
        InputError: it is not; other ranges are not guessed.
    """
    rgb = np.asarray(rgb)
    if rgb.dtype != np.uint8 or rgb.ndim < 1 or rgb.shape[-1] != 3:
        raise InputError(f"pixels must be uint8 RGB of shape (..., 3), not {rgb.dtype} of shape {rgb.shape}")
    return rgb


def take(table: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """table[r, g, b] of each pixel: (256, 256, 256), (..., 3) uint8 -> (...), in chunks that stay in the cache."""
    pixels = rgb.reshape(-1, 3)
    flat, out = table.reshape(-1), np.empty(len(pixels), table.dtype)
    for start in range(0, len(pixels), CHUNK):
        part = slice(start, start + CHUNK)
        flat.take(colour_index(pixels[part]), out=out[part], mode="clip")
    return out.reshape(rgb.shape[:-1])


def colour_index(rgb: np.ndarray) -> np.ndarray:
    """r << 16 | g << 8 | b of each pixel: (..., 3) uint8 -> (...) int64."""
    index = rgb[..., 0].astype(np.int64)
    for channel in (1, 2):
        index <<= 8
        index |= rgb[..., channel]
    return index


def nearest_table(centers: np.ndarray, bits: int = 8, cells: np.ndarray | None = None) -> np.ndarray:
    """The nearest centre of every colour on a grid of 2**bits values per axis, first index on ties.

    Args:
        centers: (V, 3) RGB in [0, 255], V <= 65,536; taken as float64.
        bits: 8 for every colour; with fewer, an entry is for the middle of a cube of 2**(8 - bits) values per axis.
        cells: the cells to fill, from `cells_of`; entries in others are 0. Default: all.

    Returns:
        (S, S, S) uint16 with S = 2**bits, indexed by red, green, blue (shifted right by 8 - bits).
    """
    side, n = 1 << bits, _cells_per_axis(bits)
    width = 256 // side
    values = np.arange(side) * width + (width - 1) / 2
    squares = (values - np.asarray(centers, np.float64).T[:, :, None]) ** 2  # (3, V, S)
    squares = squares.reshape(3, len(centers), n, side // n)  # (3, V, n, e)
    cells = np.arange(n**3) if cells is None else cells
    candidates, starts, counts = _candidates(squares, cells)
    by_axis = np.ascontiguousarray(squares.transpose(0, 3, 1, 2))  # (3, e, V, n): cells last, so that loops are long
    table = np.zeros((n, side // n) * 3, np.uint16)  # (n, e, n, e, n, e)
    order = np.argsort(counts, kind="stable")
    for equal in np.split(order, np.flatnonzero(np.diff(counts[order])) + 1):  # equally many candidates
        at_once = max(1, CHUNK // (side // n) ** 3)
        for start in range(0, len(equal), at_once):
            part = equal[start : start + at_once]
            r, g, b = np.unravel_index(cells[part], (n, n, n))
            ranked = candidates[starts[part] + np.arange(counts[part[0]])[:, None]]  # (candidates, cells)
            table[r, :, g, :, b, :] = _nearest_in_cells(by_axis, ranked, (r, g, b)).transpose(3, 0, 1, 2)
    return table.reshape(side, side, side)


def cells_of(entries: np.ndarray, bits: int) -> np.ndarray:
    """The cells, ascending, of entries (k,), flat indices into a `nearest_table` of `bits`."""
    n = _cells_per_axis(bits)
    r, g, b = np.unravel_index(entries, (1 << bits,) * 3)
    e = (1 << bits) // n
    return np.flatnonzero(np.bincount(np.ravel_multi_index((r // e, g // e, b // e), (n, n, n)), minlength=n**3))


def _cells_per_axis(bits: int) -> int:
    return CELLS if bits >= 7 else min(FEWER_CELLS, 1 << bits)


def _candidates(squares: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centres that can be nearest in each cell, ascending: all indices, and for each cell start and count."""
    _, n_centers, n, _ = squares.shape
    least = np.ascontiguousarray(squares.min(axis=3).transpose(0, 2, 1))  # (3, n, V)
    greatest = np.ascontiguousarray(squares.max(axis=3).transpose(0, 2, 1))
    indices: list[np.ndarray] = []
    in_cells: list[np.ndarray] = []
    at_once = max(1, CHUNK // n_centers)
    for start in range(0, len(cells), at_once):
        r, g, b = np.unravel_index(cells[start : start + at_once], (n, n, n))
        near = (least[0, r] + least[1, g]) + least[2, b]  # (cells, V)
        far = ((greatest[0, r] + greatest[1, g]) + greatest[2, b]).min(axis=1, keepdims=True)
        possible = near <= far
        indices.append(np.flatnonzero(possible) % n_centers)
        in_cells.append(np.count_nonzero(possible, axis=1))
    counts = np.concatenate(in_cells)
    return np.concatenate(indices).astype(np.uint16), np.cumsum(counts) - counts, counts


def _nearest_in_cells(by_axis: np.ndarray, ranked: np.ndarray, cell: tuple[np.ndarray, ...]) -> np.ndarray:
    """(e, e, e, cells) uint16: the nearest of each cell's candidates (candidates, cells), in ascending order."""
    e = by_axis.shape[1]
    nearest = np.empty((e, e, e, ranked.shape[1]), np.uint16)
    nearest[:] = ranked[0]
    best = None
    for candidate in ranked if len(ranked) > 1 else ():
        red, green, blue = (by_axis[axis][:, candidate, cell[axis]] for axis in range(3))  # (e, cells) each
        distance = (red[:, None] + green)[:, :, None] + blue  # (e, e, e, cells)
        if best is None:
            best = distance
        else:
            np.copyto(nearest, candidate, where=distance < best)
            np.minimum(best, distance, out=best)
    return nearest
