"""Logistic regression on features, and how sure its accuracy is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igpt_cli.probing.linear import Linear
from igpt_cli.probing.logistic import logistic

#: The values of C (inverse L2 strength) that are tried, smallest first.
C_GRID = tuple(float(f"{c:.0e}") for c in 10.0 ** np.arange(-4, 3))


@dataclass(frozen=True)
class LinearProbe:
    """A probe's outcome. Accuracies in percent; `interval` is the 95% Wilson interval of the test accuracy."""

    accuracy: float
    interval: tuple[float, float]
    val_accuracy: float
    val_loss: float
    C: float
    at_edge: bool
    converged: bool


def linear_probe(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    *,
    val_part: float = 0.1,
    grid: Sequence[float] = C_GRID,
    seed: int = 0,
    max_iter: int = 1000,
) -> LinearProbe:
    """Multinomial logistic regression with L2 by L-BFGS (scikit-learn), C chosen without the test split.

    Features are standardised with training statistics. C is chosen by accuracy on a held-out part of the training
    rows (ties: lower loss there), the classifier refitted on all of them, and the test rows are used once.

    Args:
        x_train, x_test: (N, D) float features.
        y_train, y_test: (N,) int labels.
        val_part: part of the training rows held out to choose C, drawn by `seed`, by class where each has two rows.

    Raises:
        ValueError: fewer than two classes, or too few rows to hold some out.
    """
    fit_rows, val_rows = hold_out(y_train, val_part, seed)
    x_val, y_val = x_train[val_rows], y_train[val_rows]
    best: tuple[float, float, float] | None = None  # (accuracy, -loss, C)
    for fitted in _fit(x_train[fit_rows], y_train[fit_rows], sorted(grid), max_iter):
        log_p = fitted.log_proba(x_val)
        truth = np.searchsorted(fitted.classes, y_val)
        accuracy = float(np.mean(log_p.argmax(1) == truth))
        score = (accuracy, float(np.mean(log_p[np.arange(len(truth)), truth])), fitted.C)
        if best is None or score[:2] > best[:2]:
            best = score
    assert best is not None
    val_accuracy, val_log_p, chosen = best
    (refitted,) = _fit(x_train, y_train, [chosen], max_iter)
    correct = int(np.sum(refitted.predict(x_test) == y_test))
    return LinearProbe(
        accuracy=100 * correct / len(y_test),
        interval=wilson(correct, len(y_test)),
        val_accuracy=100 * val_accuracy,
        val_loss=-val_log_p,
        C=chosen,
        at_edge=len(grid) > 1 and chosen in (min(grid), max(grid)),
        converged=refitted.converged,
    )


def _fit(x: np.ndarray, y: np.ndarray, grid: Sequence[float], max_iter: int) -> list[Linear]:
    return logistic([(x, y)], grid, engine="scikit-learn", max_iter=max_iter)[0]


def hold_out(labels: np.ndarray, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices to fit on and to choose on; stratified by class where every class has at least two rows.

    Raises:
        ValueError: fewer than two classes, or fewer than two rows to hold out.
    """
    from sklearn.model_selection import train_test_split

    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least two classes, the labels hold {len(classes)}")
    n_val = max(round(part * len(labels)), len(classes))
    if n_val > len(labels) // 2:
        raise ValueError(f"{len(labels)} labelled images of {len(classes)} classes are too few to hold some out")
    stratify = labels if counts.min() >= 2 else None
    fit, val = train_test_split(np.arange(len(labels)), test_size=n_val, random_state=seed, stratify=stratify)
    return np.sort(fit), np.sort(val)


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, in percent; z = 1.96 gives 95%.

    >>> [round(end, 1) for end in wilson(45, 50)]
    [78.6, 95.7]
    """
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)
