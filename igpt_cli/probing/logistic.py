"""Multinomial logistic regression with L2, for many problems and strengths.

"lbfgs" is solved to convergence by our own L-BFGS in torch on every device. scikit-learn is its test: to the same
losses on correlated features it takes 50 times as long (5,000 images of CIFAR-10 as 8x8 pixels, one thread), where rows
are few, as long; at its default tolerance it stops up to 1% above the least loss, 0.3 points from the accuracy there.

The objective is scikit-learn's: C * (sum of log losses) + 1/2 |W|^2, biases not penalised, on standardised or raw
features. With two classes scikit-learn penalises 1/2 |v|^2 of one row v, the same classifier as two rows -v/2 and v/2,
which is how it is given here. (Two free rows with the penalty 1/2 |W|^2 would be the solution for 2 C.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from igpt_cli.errors import InputError
from igpt_cli.probing import batched
from igpt_cli.probing.linear import MANY_VALUES, Linear, Problem, check_problem, moments, with_float64
from igpt_cli.probing.sgd import fit_sgd

SOLVERS = ("lbfgs", "sgd")
ENGINES = ("torch", "scikit-learn")
#: Of scikit-learn: the largest entry of the mean loss's gradient, which leaves less than 1e-5 of the loss where classes
#: are separable and C is 100, where its own default, 1e-4, leaves a third.
SKLEARN_TOLERANCE = 1e-7
#: Iterations at most; torch's are fewer, see `batched`.
MAX_ITER = {"torch": 1000, "scikit-learn": 20_000}


def logistic(
    problems: Sequence[tuple[Any, Any]],
    grid: Sequence[float] | Sequence[Sequence[float]],
    *,
    solver: str = "lbfgs",
    device: str | torch.device = "cpu",
    seed: int = 0,
    standardise: bool = True,
    progress: Callable[[int, int], None] | None = None,
    engine: str = "torch",
    max_iter: int | None = None,
    tolerance: float = SKLEARN_TOLERANCE,
    names: Sequence[str] | None = None,
    **sgd_settings: Any,
) -> list[list[Linear]]:
    """Fit every problem with every value of the grid.

    Args:
        problems: (x (N, D) float32, y (N,) integer labels) each; x may be a view or an HDF5 dataset, of which slices
            are read when its turn comes. Problems of one shape are solved together.
        grid: values of C for all problems, or one list for each problem. For "sgd": learning rates.
        solver: "lbfgs", to convergence; "sgd" for features that do not fit into memory (see `sgd.fit_sgd`).
        seed: of the order of rows, for "sgd".
        standardise: by mean and standard deviation of the rows fitted on; if not, features are used as they are.
        progress: called with (regressions finished, all of them).
        engine: for "lbfgs": "torch" (`batched.solve`), or "scikit-learn", which computes on the CPU.
        max_iter: iterations of L-BFGS at most, default `MAX_ITER`; a fit that reaches them has `converged` False.
        tolerance: of scikit-learn, the largest entry of the gradient of the mean loss.
        names: of the problems in messages, default "problem 3".
        sgd_settings: epochs, batch_size, ... as in `sgd.fit_sgd`.

    Returns:
        For each problem a `Linear` for each value, in the order given.

    Raises:
        InputError: an unknown solver; C not above zero; labels and rows that do not match; fewer than two classes; NaN
            or infinite features. The problem is named.
    """
    if solver not in SOLVERS or engine not in ENGINES:
        raise InputError(
            f"solver {solver!r} with engine {engine!r}: solvers are {', '.join(SOLVERS)}, engines {', '.join(ENGINES)}"
        )
    checked = [check_problem(x, y, names[i] if names else f"problem {i}") for i, (x, y) in enumerate(problems)]
    grids = _grids(grid, len(checked), "C" if solver == "lbfgs" else "the learning rate")
    device = with_float64(device)
    max_iter = max_iter or MAX_ITER[engine]
    groups: dict[tuple, list[int]] = {}  # what is solved at once
    for i, problem in enumerate(checked):
        together = solver == "lbfgs" and engine == "torch"
        groups.setdefault((*problem.shape, len(grids[i])) if together else (i,), []).append(i)
    out: list[list[Linear]] = [[] for _ in checked]
    total, before = sum(map(len, grids)), 0
    for members in groups.values():
        some, values = [checked[i] for i in members], [grids[i] for i in members]
        step = progress and (lambda done, _, before=before: progress(before + done, total))  # type: ignore[misc]
        if solver == "sgd":
            more = {"seed": seed, "standardise": standardise, "progress": step, **sgd_settings}
            solved = [fit_sgd(some[0], values[0], device, **more)]
        elif engine == "torch":
            solved = batched.solve(some, values, device, standardise=standardise, max_iter=max_iter, progress=step)
        else:
            solved = [_scikit_learn(some[0], values[0], standardise, max_iter, tolerance, step)]
        for i, fits in zip(members, solved):
            out[i] = fits
        before += sum(map(len, values))
    return out


def _grids(grid: Sequence, n: int, what: str) -> list[list[float]]:
    own = len(grid) > 0 and isinstance(grid[0], Sequence)
    grids = [[float(value) for value in values] for values in (grid if own else [grid] * n)]
    if len(grids) != n:
        raise InputError(f"{len(grids)} lists of values for {n} problems; give one list for all, or one for each")
    for value in (value for values in grids for value in values or [math.nan]):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{what} is {value}; the values to try are numbers above zero, one or more")
    return grids


def _scikit_learn(
    problem: Problem,
    grid: Sequence[float],
    standardise: bool,
    max_iter: int,
    tolerance: float,
    progress: Callable | None,
) -> list[Linear]:
    """Fits along rising C, each starting from the one before, in float64."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, std = (part.numpy() for part in moments(problem.x, problem.name))
    if not standardise:
        mean, std = np.zeros_like(mean), np.ones_like(std)
    x = (np.asarray(problem.x[:], np.float64) - mean) / std
    n = len(x)
    classifier = LogisticRegression(max_iter=max_iter, tol=tolerance, warm_start=True)
    solved: dict[float, Linear] = {}
    with threadpool_limits(1 if x.size < MANY_VALUES else None):
        for C in sorted(set(grid)):
            classifier.set_params(C=C)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                classifier.fit(x, problem.index)
            log_loss = -classifier.predict_log_proba(x)[np.arange(n), problem.index].mean()
            weight, bias = classifier.coef_.copy(), classifier.intercept_.copy()
            loss = log_loss + np.square(weight).sum() / (2 * C * n)
            if len(problem.classes) == 2:
                weight, bias = np.concatenate((-weight, weight)) / 2, np.concatenate((-bias, bias)) / 2
            converged = not any(w.category is ConvergenceWarning for w in caught)
            n_iter = int(classifier.n_iter_[0])
            solved[C] = Linear(weight, bias, mean, std, problem.classes, C, float(loss), converged, n_iter)
            if progress:
                progress(len(solved), len(grid))
    return [solved[C] for C in grid]
