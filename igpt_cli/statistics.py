"""Small statistics of classification that several rooms need."""

from __future__ import annotations

import math

import numpy as np


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, in percent; z = 1.96 gives 95%.

    >>> [round(end, 1) for end in wilson(45, 50)]
    [78.6, 95.7]
    """
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def vote(predictions: np.ndarray, places: np.ndarray, seed: int = 0) -> np.ndarray:
    """The commonest of several predictions for each image, as the paper has BERT's five masks vote (section 4.6).

    Args:
        predictions: (M, B) integers, M predicted classes of each image.
        places: (B,) the images' rows in their split; the row and `seed` alone break ties at random.

    Returns:
        (B,) int64.

    >>> vote(np.array([[3, 1], [0, 1], [3, 2]]), np.array([0, 1]))
    array([3, 1])
    """
    winners = np.empty(predictions.shape[1], np.int64)
    for i, place in enumerate(places):
        classes, votes = np.unique(predictions[:, i], return_counts=True)
        first = classes[votes == votes.max()]
        winners[i] = first[0 if len(first) == 1 else np.random.default_rng([seed, int(place)]).integers(len(first))]
    return winners


def in_turn(labels: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """Shuffle `rows` by `seed` in rounds, one of each class: the first n are balanced and include those of a smaller n.

    Args:
        labels: (N,) the class of every row.
        rows: (n,) the rows to order.
    """
    shuffled = np.random.default_rng([seed, len(rows)]).permutation(rows)
    turn = np.empty(len(shuffled), np.int64)  # how many of the same class came before
    for label in np.unique(labels[shuffled]):
        same = labels[shuffled] == label
        turn[same] = np.arange(same.sum())
    return shuffled[np.argsort(turn, kind="stable")]


def evenly_spaced(n: int, most: int | None) -> np.ndarray:
    """At most `most` of range(n), evenly spaced, since splits are often sorted by class: (min(n, most),) int64."""
    size = n if most is None else min(most, n)
    return np.arange(size, dtype=np.int64) * n // max(size, 1)
