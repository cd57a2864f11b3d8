"""A linear classifier, and the statistics that standardise features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from igpt_cli.errors import InputError

#: Rows that are converted to float64 at a time.
ROWS = 8192
#: From so many feature values on, several threads are worth their coordination: where they wait for each other in every
#: one of thousands of tiny steps, small problems take ten times as long.
MANY_VALUES = 5_000_000


@dataclass(frozen=True)
class Linear:
    """Fitted multinomial logistic regression on features less `mean` and over `std`.

    Attributes:
        weight, bias: (K, D) and (K,) float64.
        mean, std: (D,) float64, of the rows it was fitted on; std is 1 for constant features and without standardising,
            where `mean` is what was subtracted to compute, which may be 0.
        classes: (K,) labels in rising order; column k of `log_proba` is about classes[k].
        C: inverse strength of the L2 penalty, inf without one.
        loss: what was minimised, in nats a row: mean log loss + penalty / (C N).
        converged: the solver's own test was met before it ran out of iterations.
        n_iter: iterations (L-BFGS), or steps (SGD).
        rate: the learning rate, of a solver that has one.
    """

    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    classes: np.ndarray
    C: float
    loss: float
    converged: bool
    n_iter: int
    rate: float | None = None

    @property
    def setting(self) -> float:
        """The value of the grid that this was fitted with: the learning rate, where there is one, else C."""
        return self.C if self.rate is None else self.rate

    def log_proba(self, x: Any) -> np.ndarray:
        """Log probabilities of the classes for features x (M, D): (M, K) float64."""
        weight = self.weight / self.std
        bias = self.bias - weight @ self.mean
        logits = np.empty((len(x), len(bias)))
        for a in range(0, len(x), ROWS):
            logits[a : a + ROWS] = np.asarray(x[a : a + ROWS], np.float64) @ weight.T + bias
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def predict(self, x: Any) -> np.ndarray:
        """The likeliest label of each row of x (M, D): (M,)."""
        return self.classes[self.log_proba(x).argmax(axis=1)]


@dataclass(frozen=True)
class Problem:
    """Features with labels as class numbers: x (N, D) anything with slices, index (N,) into classes (K,)."""

    x: Any
    index: np.ndarray
    classes: np.ndarray
    name: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, D, K)."""
        return (*self.x.shape, len(self.classes))


def check_problem(x: Any, y: Any, name: str) -> Problem:
    """A problem whose parts match.

    Raises:
        InputError: x is not a table, another number of labels than rows, or fewer than two classes.
    """
    y = np.asarray(y)
    if len(x.shape) != 2 or not all(x.shape):
        raise InputError(f"{name}: features have the shape {tuple(x.shape)}, expected (rows, features), none empty")
    if y.shape != x.shape[:1]:
        raise InputError(f"{name}: {x.shape[0]} rows of features, but labels of the shape {y.shape}; one a row")
    classes, index = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"{name}: all {len(y)} rows are of the class {classes[0]}; a classifier needs two or more")
    return Problem(x, index, classes, name)


def with_float64(device: str | torch.device) -> torch.device:
    """The device, or the CPU instead of one that lacks float64 (mps)."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)


def rows(x: Any, start: int, stop: int, device: torch.device | str = "cpu", dtype=torch.float64) -> torch.Tensor:
    """Rows of an array, an HDF5 dataset or a tensor as a tensor of their own."""
    part = x[start:stop]
    if isinstance(part, torch.Tensor):
        return part.to(device, dtype)
    # A copy, for arrays may be read-only; it crosses to the device in its own type, which is the smaller one.
    return torch.from_numpy(np.array(part)).to(device).to(dtype)


def moments(x: Any, name: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column of x (N, D) in one pass: two (D,) float64 tensors.

    Parts are merged as Chan, Golub and LeVeque do (1979), so that a mean far from zero costs no digits. A column whose
    deviation is within the rounding of its sum is constant; its standard deviation is given as 1.

    Raises:
        InputError: a value is NaN or infinite; the problem is named.
    """
    n_rows, n_columns = x.shape
    mean = torch.zeros(n_columns, dtype=torch.float64, device=device)
    squares = torch.zeros_like(mean)  # sum of squared distances from the mean
    for a in range(0, n_rows, ROWS):
        part = rows(x, a, a + ROWS, device)
        here = part.mean(0)
        squares += (part - here).square().sum(0) + (here - mean).square() * (a * len(part) / (a + len(part)))
        mean += (here - mean) * (len(part) / (a + len(part)))
    if not (mean.isfinite() & squares.isfinite()).all():
        bad = int((~(mean.isfinite() & squares.isfinite())).nonzero()[0])
        raise InputError(f"{name}: feature {bad} is NaN or infinite in some row; such features cannot be probed")
    std = (squares / n_rows).sqrt()
    epsilon = torch.finfo(torch.float64).eps
    std[std <= n_rows * epsilon * mean.abs()] = 1
    std[std == 0] = 1
    return mean, std
