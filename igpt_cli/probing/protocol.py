"""The protocol of a probe: what is fitted, chosen and reported on which images.

igpt-linear-v1: features are standardised with the statistics of the rows fitted on (raw ones have the protocol
igpt-linear-v1-raw); C and the layer are chosen by accuracy (ties: by loss) on a held-out tenth of the training images;
the classifier is refitted on all of them, and the test images are classified once.

Shapes: N training and N' test images, D features, K classes, M masked forms of an image (BERT), 1 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from igpt_cli.errors import InputError
from igpt_cli.probing.knn import knn, knn_protocol
from igpt_cli.probing.layers import Layer
from igpt_cli.probing.linear import Linear
from igpt_cli.probing.logistic import logistic
from igpt_cli.probing.sgd import RATES
from igpt_cli.statistics import in_turn, vote, wilson

#: The values of C (inverse L2 strength) that are tried, smallest first.
C_GRID = tuple(float(f"{c:.0e}") for c in 10.0 ** np.arange(-4, 3))
#: How standardised features become an accuracy, by solver; a result with another name is not comparable.
PROTOCOLS = {"lbfgs": "igpt-linear-v1", "sgd": "igpt-linear-sgd-v1", "knn": knn_protocol()}
#: What is tried on the held-out part: strengths, or learning rates.
GRIDS: dict[str, Sequence[float]] = {"lbfgs": C_GRID, "sgd": RATES}
#: How a probe's features are pooled over the image: as in the paper, or over its quadrants, as those of random patches.
POOLS = ("mean", "quadrants")
VAL_PART = 0.1
#: From so many classes on, accuracy counts the five likeliest besides.
TOP_5_CLASSES = 100
#: Of few labels, folds in which C and the layer are chosen.
FOLDS = 5


@dataclass(frozen=True)
class FeatureSet:
    """Features of one kind: train (N, D) float32, and test (M, N', D) float32, whose M masked forms vote."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Labels:
    """(N,) and (N',) int64, indices of classes."""

    train: np.ndarray
    test: np.ndarray


def protocol_name(solver: str, standardise: bool = True, pool: str = "mean") -> str:
    """The name of the protocol under which a result is stored. Raises InputError for an unknown solver or pool.

    >>> protocol_name("lbfgs"), protocol_name("lbfgs", standardise=False), protocol_name("lbfgs", pool="quadrants")
    ('igpt-linear-v1', 'igpt-linear-v1-raw', 'igpt-linear-v1-quadrants')
    """
    if solver not in PROTOCOLS:
        raise InputError(f"there is no solver {solver!r}; the solvers are {', '.join(PROTOCOLS)}")
    if pool not in POOLS:
        raise InputError(f"there is no pool {pool!r} of a probe; the pools are {', '.join(POOLS)}")
    return PROTOCOLS[solver] + ("" if pool == "mean" else f"-{pool}") + ("" if standardise else "-raw")


def classify(
    sets: Sequence[FeatureSet],
    labels: Labels,
    *,
    seed: int = 0,
    solver: str = "lbfgs",
    standardise: bool = True,
    device: str | torch.device = "cpu",
    grid: Sequence[float] | None = None,
    details: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Probe each set of features by the protocol of the solver.

    Args:
        seed: of the held-out part, and of ties among votes.
        solver: "lbfgs", "sgd" or "knn".
        standardise: with the statistics of the rows fitted on; raw features have a protocol of their own.
        grid: values of C, or learning rates for "sgd", instead of the protocol's own.
        details: add the accuracy of each class and the confusion matrix.
        progress: called with (sets done, sets in all), once for choosing and once for fitting.

    Returns:
        For each set: accuracy and interval (test, percent), val_accuracy (percent), val_loss (nats), C ("sgd":
        learning_rate; "knn": neither), at_edge, converged, n_features; with 100 classes or more top_5_accuracy.

    Raises:
        InputError: an unknown solver, or features that are not finite.
    """
    protocol_name(solver)  # for one that there is not
    fit_rows, val_rows = hold_out(labels.train, VAL_PART, seed)
    if solver == "knn":
        how: dict[str, Any] = {"standardise": standardise, "device": device}
        return [_by_neighbours(s, labels, fit_rows, val_rows, how, seed, details) for s in sets]
    grid = sorted(GRIDS[solver] if grid is None else grid)
    settings: dict[str, Any] = {"solver": solver, "standardise": standardise, "device": device, "seed": seed}
    n = len(sets) * len(grid)
    y = labels.train[fit_rows]
    step = progress and (lambda done, _: progress(done, n + len(sets)))
    paths = logistic([(s.train[fit_rows], y) for s in sets], grid, **settings, progress=step)
    chosen = [_best(path, s.train[val_rows], labels.train[val_rows]) for path, s in zip(paths, sets, strict=True)]
    step = progress and (lambda done, _: progress(n + done, n + len(sets)))
    values = [[best.setting] for best, _, _ in chosen]
    finals = logistic([(s.train, labels.train) for s in sets], values, **settings, progress=step)
    return [
        {
            **score(final.log_proba, final.classes, s.test, labels.test, seed, details),
            "val_accuracy": round(100 * val_accuracy, 4),
            "val_loss": round(val_loss, 4),
            "C" if solver == "lbfgs" else "learning_rate": best.setting,
            "at_edge": len(grid) > 1 and best.setting in (grid[0], grid[-1]),
            "converged": bool(final.converged),
            "n_features": s.train.shape[1],
        }
        for s, (best, val_accuracy, val_loss), (final,) in zip(sets, chosen, finals, strict=True)
    ]


def _by_neighbours(s: FeatureSet, labels: Labels, fit_rows, val_rows, how: dict, seed: int, details: bool) -> dict:
    """Nothing is chosen but, among layers, the layer: by the held-out part, of which the others are neighbours."""
    held = knn(s.train[fit_rows], labels.train[fit_rows], s.train[val_rows], **how)
    truth = np.searchsorted(held.classes, labels.train[val_rows])
    shares = held.shares[np.arange(len(truth)), truth]

    def log_shares(x: np.ndarray) -> np.ndarray:
        votes = knn(s.train, labels.train, x, **how)
        with np.errstate(divide="ignore"):
            return np.log(votes.shares)

    return {
        **score(log_shares, np.unique(labels.train), s.test, labels.test, seed, details),
        "val_accuracy": round(100 * float(np.mean(held.shares.argmax(1) == truth)), 4),
        # A class that no neighbour has gets no share, of which the logarithm is infinite: a floor as of one in 10,000.
        "val_loss": round(-float(np.log(np.maximum(shares, 1e-4)).mean()), 4),
        "at_edge": False,
        "converged": True,
        "n_features": s.train.shape[1],
    }


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the best held-out accuracy; ties go to the lower held-out loss."""
    return max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def score(
    log_proba: Callable[[np.ndarray], np.ndarray],
    classes: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    seed: int = 0,
    details: bool = False,
) -> dict[str, Any]:
    """Accuracy in percent on images (M, N', D) with labels (N',), with its 95% Wilson interval.

    `log_proba` maps (N', D) to (N', K), column k about classes[k].
    """
    log_p = np.stack([log_proba(form) for form in x])  # (M, N', K)
    predicted = classes[vote(log_p.argmax(-1), np.arange(len(y)), seed)]
    correct = int(np.sum(predicted == y))
    out: dict[str, Any] = {
        "accuracy": round(100 * correct / len(y), 4),
        "interval": [round(end, 2) for end in wilson(correct, len(y))],
    }
    if len(classes) >= TOP_5_CLASSES:
        likeliest = classes[np.argsort(-log_p.mean(0), axis=1, kind="stable")[:, :5]]
        out["top_5_accuracy"] = round(100 * float(np.mean((likeliest == y[:, None]).any(1))), 4)
    if details:
        K = int(max(classes.max(), y.max())) + 1
        confusion = np.bincount(y * K + predicted, minlength=K * K).reshape(K, K)
        seen = confusion.sum(1)
        out["class_accuracy"] = [round(100 * confusion[k, k] / seen[k], 4) if seen[k] else None for k in range(K)]
        out["confusion"] = confusion.tolist()  # row: the true class, column: the predicted one
    return out


def nested_subsets(labels: np.ndarray, per_class: Sequence[int], repeat: int, seed: int) -> dict[int, np.ndarray]:
    """Rows with n labels of each class, for each n: sorted, drawn by (seed, repeat), each within the larger ones.

    Raises InputError if a class has fewer images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if max(per_class) > counts.min():
        raise InputError(
            f"{max(per_class)} labels of each class are asked for; class {classes[counts.argmin()]} has {counts.min()} "
            f"training images"
        )
    order = in_turn(labels, np.arange(len(labels)), seed * 10_000 + repeat)
    return {n: np.sort(order[: n * len(classes)]) for n in per_class}


def few_shot(
    layers: Mapping[Layer, FeatureSet],
    labels: Labels,
    per_class: Sequence[int],
    repeats: int,
    *,
    seed: int = 0,
    standardise: bool = True,
    device: str | torch.device = "cpu",
    grid: Sequence[float] = C_GRID,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Accuracy with few labels per class: mean and standard deviation over random subsets (section 4.5).

    C and the layer are chosen by cross-validation within the subset, in 5 folds of equal classes, or as many as a class
    has labels. All layers and folds of a subset are solved together.

    Args:
        layers: {layer: features}.
        per_class: labels of each class, at least 2 each.
        repeats: subsets for each number.

    Returns:
        For each number: labels_per_class, n_train, accuracy (mean, percent), deviation (sample standard deviation of
            the
        repeats; None for one), and `repeats`: accuracy, interval, layer, C of each.
    """
    if min(per_class) < 2:
        raise InputError(f"{min(per_class)} label of a class is too few: one to fit and one to choose C on are needed")
    subsets = [
        (n, r, rows) for r in range(repeats) for n, rows in nested_subsets(labels.train, per_class, r, seed).items()
    ]
    subsets.sort(key=lambda s: (s[0], s[1]))
    settings: dict[str, Any] = {"device": device, "seed": seed, "standardise": standardise}
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in per_class}
    for done, (n, _, rows) in enumerate(subsets, 1):
        y = labels.train[rows]
        folds = _folds(y, min(FOLDS, n))
        problems = [(s.train[rows[folds != f]], y[folds != f]) for s in layers.values() for f in range(folds.max() + 1)]
        paths = iter(logistic(problems, sorted(grid), **settings))
        best: tuple[float, float, Layer, float] | None = None
        for layer, s in layers.items():
            log_p = np.zeros((len(grid), len(rows)))  # of the true class, each row by the fold that did not see it
            right = np.zeros((len(grid), len(rows)), bool)
            for f in range(folds.max() + 1):
                out = folds == f
                for i, fitted in enumerate(next(paths)):
                    held = fitted.log_proba(s.train[rows[out]])
                    truth = np.searchsorted(fitted.classes, y[out])
                    log_p[i, out] = held[np.arange(len(truth)), truth]
                    right[i, out] = held.argmax(1) == truth
            for i, C in enumerate(sorted(grid)):
                this = (float(right[i].mean()), float(log_p[i].mean()), layer, C)
                if best is None or this[:2] > best[:2]:
                    best = this
        assert best is not None
        _, _, layer, C = best
        ((final,),) = logistic([(layers[layer].train[rows], y)], [[C]], **settings)
        found[n].append(
            {**score(final.log_proba, final.classes, layers[layer].test, labels.test, seed), "layer": layer, "C": C}
        )
        if progress:
            progress(done, len(subsets))
    return [
        {
            "labels_per_class": n,
            "n_train": n * len(np.unique(labels.train)),
            "accuracy": round(float(np.mean([x["accuracy"] for x in repeats_of])), 4),
            "deviation": round(float(np.std([x["accuracy"] for x in repeats_of], ddof=1)), 4) if repeats > 1 else None,
            "repeats": repeats_of,
        }
        for n, repeats_of in found.items()
    ]


def hold_out(labels: np.ndarray, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices to fit on and to choose on, stratified by class where every class has at least two rows.

    Raises ValueError for fewer than two classes, or too few rows.
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


def neighbours(layer: int, n_layers: int, width: int) -> list[int]:
    """`width` layers around one, moved inwards at the ends, to concatenate (section 4.4's 15360 features).

    >>> neighbours(20, 48, 5), neighbours(48, 48, 5)
    ([18, 19, 20, 21, 22], [44, 45, 46, 47, 48])
    """
    if not 1 <= width <= n_layers + 1:
        raise InputError(f"{width} layers are to be concatenated; the model has {n_layers + 1}, 0 to {n_layers}")
    first = min(max(layer - width // 2, 0), n_layers + 1 - width)
    return list(range(first, first + width))


def _best(path: Sequence[Linear], x: np.ndarray, y: np.ndarray) -> tuple[Linear, float, float]:
    """Of classifiers with rising C, the one with the best accuracy on held-out rows; ties: the lower loss there."""
    scored = []
    for fitted in path:
        log_p = fitted.log_proba(x)
        truth = np.searchsorted(fitted.classes, y)
        scored.append(
            (fitted, float(np.mean(log_p.argmax(1) == truth)), -float(log_p[np.arange(len(y)), truth].mean()))
        )
    return max(scored, key=lambda s: (s[1], -s[2]))


def _folds(labels: np.ndarray, k: int) -> np.ndarray:
    """(N,) which of k folds each row is in, every class dealt out in turn."""
    fold = np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        fold[rows] = np.arange(len(rows)) % k
    return fold
