"""Checks of the model contract (docs/architecture.md): layers, classes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


def quadrants(n: Tensor) -> Tensor:
    """(B, T, D) -> (B, 4 D): the mean over each quarter of the square image, as Coates and Ng pool patches.

    Raises:
        ValueError: T is not a square.
    """
    B, T, D = n.shape
    side = math.isqrt(T)
    if side**2 != T:
        raise ValueError(f"pool is 'quadrants', and {T} positions are not a square image; take mean")
    return adaptive_avg_pool2d(n.transpose(1, 2).reshape(B, D, side, side), 2).flatten(1)


#: (B, T, D) -> (B, D) or (B, 4 D), or unchanged for "none".
POOLS = {
    "mean": lambda n: n.mean(dim=1),
    "quadrants": quadrants,
    "max": lambda n: n.amax(dim=1),
    "last": lambda n: n[:, -1],
    "none": lambda n: n,
}


def check_features(layers: Iterable[int], n_layers: int, pool: str, last: bool = False) -> list[int]:
    """The layers asked for, in rising order.

    Args:
        last: whether the model has a position that "last" would take: the last pixel, or a class token.

    Raises:
        ValueError: a layer outside 0..n_layers, an unknown pool, or "last" where there is none.
    """
    wanted = sorted(set(layers))
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= n_layers:
        raise ValueError(f"layers {wanted} asked for, this model has the layers 0 to {n_layers}")
    if pool == "last" and not last:
        raise ValueError("pool is 'last', the class token, and this model has none; take mean or max")
    if pool not in POOLS:
        known = [name for name in POOLS if last or name != "last"]
        raise ValueError(f"pool is {pool!r}, expected one of {', '.join(known)}")
    return wanted


def check_attention(layers: Iterable[int], n_layers: int) -> list[int]:
    """The blocks whose attention is asked for, in rising order.

    Raises:
        ValueError: one outside 0..n_layers - 1.
    """
    wanted = sorted(set(layers))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < n_layers:
        raise ValueError(f"layers {wanted} asked for; attention is in the layers 0 to {n_layers - 1}")
    return wanted


def check_classes(n_classes: int | None) -> None:
    """
    Raises:
        ValueError: neither None nor a whole number of at least 2.
    """
    if n_classes is not None and (isinstance(n_classes, bool) or not isinstance(n_classes, int) or n_classes < 2):
        raise ValueError(f"n_classes is {n_classes!r}, expected a whole number of at least 2")
