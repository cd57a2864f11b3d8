"""Swin's windows: partition, mask of shifted ones, relative positions (Liu et al. 2021, section 3.2).

Shapes: B batch, H x W a grid of patches, D width, M side of a window, n = M * M, W' windows of a grid, A heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to(x: Tensor, side: int) -> Tensor:
    """(B, H, W, D) with zeros on the right and below, so that `side` divides both H and W."""
    H, W = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -W % side, 0, -H % side)) if H % side or W % side else x


def partition(x: Tensor, M: int) -> Tensor:
    """(B, H, W, D) -> (B, W', n, D): windows in raster order, and in each its positions in raster order."""
    B, H, W, D = x.shape
    return x.view(B, H // M, M, W // M, M, D).transpose(2, 3).reshape(B, -1, M * M, D)


def unpartition(windows: Tensor, H: int, W: int) -> Tensor:
    """What `partition` undoes: (B, W', n, D) -> (B, H, W, D)."""
    B, _, n, D = windows.shape
    M = round(n**0.5)
    return windows.view(B, H // M, W // M, M, M, D).transpose(2, 3).reshape(B, H, W, D)


def between_places(p: Tensor, H: int, W: int, M: int, shift: int) -> Tensor:
    """From attention within windows to attention between all places of a grid, 0 where they share no window.

    Args:
        p: (B, W', A, n, n), the windows those of the grid padded by `pad_to` and then rolled by -shift.
        H, W: of the grid before.

    Returns:
        (B, A, H * W, H * W), query before key, in raster order.
    """
    B, _, A, _, _ = p.shape
    place = pad_to((torch.arange(H * W, device=p.device) + 1).view(1, H, W, 1), M) - 1  # -1 where it is padding
    place = partition(place.roll((-shift, -shift), dims=(1, 2)), M)[0, :, :, 0]  # (W', n)
    out = p.new_zeros(B, A, H * W + 1, H * W + 1)  # the last is what padding gives and takes
    out[:, :, place[:, :, None], place[:, None, :]] = p.transpose(1, 2)
    return out[:, :, :-1, :-1]


def shift_mask(H: int, W: int, M: int, shift: int, device: torch.device | None = None) -> Tensor:
    """What is added to the scores of a grid that was rolled by `shift`: (W', n, n), 0 or -100.

    After the roll the last window of a row or column holds patches from both ends of the image. Each axis falls into
    the parts [0, H - M), [H - M, H - shift), [H - shift, H); only what is of one part in both attends to each other
    (section 3.2, figure 4).
    """

    def parts(side: int) -> Tensor:
        place = torch.arange(side, device=device)
        return (place >= side - M).int() + (place >= side - shift).int()

    part = 3 * parts(H)[:, None] + parts(W)  # (H, W), one of nine
    part = partition(part[None, :, :, None], M)[0, :, :, 0]  # (W', n)
    return -100.0 * (part[:, None, :] != part[:, :, None])


def relative_positions(M: int) -> Tensor:
    """(n, n) int64: the row of the bias table for query i and key j.

    It is (dy + M - 1) * (2 M - 1) + dx + M - 1 with (dy, dx) the place of i less that of j in their window.
    """
    y, x = torch.meshgrid(torch.arange(M), torch.arange(M), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + M - 1) * (2 * M - 1) + x[:, None] - x + M - 1


def resize_bias_table(table: Tensor, M: int) -> Tensor:
    """A table of relative position biases for windows of another side (section 3.2), by bicubic interpolation.

    Args:
        table: ((2 M' - 1)^2, A) for windows of M' x M'.
        M: the new side.

    Returns:
        ((2 M - 1)^2, A); the table itself where M is M'.

    Raises:
        ValueError: the table is not that of square windows.
    """
    rows, A = table.shape
    side = round(rows**0.5)
    if side**2 != rows or side % 2 == 0:
        raise ValueError(f"a bias table of {rows} rows is not that of a square window: (2 M - 1)^2 are expected")
    if side == 2 * M - 1:
        return table
    grid = table.T.reshape(1, A, side, side).float()
    grid = F.interpolate(grid, size=(2 * M - 1, 2 * M - 1), mode="bicubic", align_corners=False)
    return grid.reshape(A, -1).T.contiguous().to(table.dtype)
