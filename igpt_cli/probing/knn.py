"""Weighted nearest neighbours by cosine similarity, as in DINO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from igpt_cli.errors import InputError
from igpt_cli.probing.linear import ROWS, check_problem, moments, rows, with_float64

NEIGHBOURS = 20
TEMPERATURE = 0.07
#: Bytes of similarities at a time.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Votes:
    """What the neighbours of M rows say: shares (M, K) float64, each row adds up to 1, of classes (K,)."""

    shares: np.ndarray
    classes: np.ndarray
    protocol: str

    def predict(self) -> np.ndarray:
        """The class with most weight of each row, (M,); the first of equal ones."""
        return self.classes[self.shares.argmax(axis=1)]


def knn_protocol(k: int = NEIGHBOURS, temperature: float = TEMPERATURE, standardise: bool = True) -> str:
    """The name of the protocol with these settings.

    >>> knn_protocol(), knn_protocol(10, 0.1, standardise=False)
    ('igpt-knn-v1-k20-t0.07', 'igpt-knn-v1-k10-t0.1-raw')
    """
    return f"igpt-knn-v1-k{k}-t{temperature:g}" + ("" if standardise else "-raw")


@torch.no_grad()
def knn(
    x_train: Any,
    y_train: Any,
    x: Any,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    standardise: bool = True,
    device: str | torch.device = "cpu",
    name: str = "neighbours",
    progress: Callable[[int, int], None] | None = None,
) -> Votes:
    """Let the k most similar training rows vote, each with the weight exp(cosine similarity / temperature).

    Of equally similar training rows the earlier ones are neighbours. Similarities are float32, those of a row of zeros
    0.

    Args:
        x_train, y_train: (N, D) features with (N,) labels; x: (M, D). Arrays or HDF5 datasets.
        k: neighbours that vote; all N if there are fewer.
        standardise: by mean and standard deviation of the training rows; features of a network share a large mean.
        name: of these features in messages.
        progress: called with (rows done, M).

    Raises:
        InputError: k or temperature not above zero, widths that differ, fewer than two classes, NaN or infinity.
    """
    problem = check_problem(x_train, y_train, name)
    N, D, K = problem.shape
    if not (k >= 1 and temperature > 0):
        raise InputError(f"{k} neighbours at temperature {temperature:g}; both must be above zero")
    if len(x.shape) != 2 or x.shape[1] != D:
        raise InputError(f"{name}: training features have {D} columns, but those to classify the shape {x.shape}")
    device = with_float64(device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        mean, std = moments(problem.x, name, device)
        moments(x, name, device)  # for what cannot be compared
        shift, scale = (mean, std) if standardise else (torch.zeros_like(mean), torch.ones_like(std))

        def unit(features: Any, start: int, stop: int) -> torch.Tensor:
            return torch.nn.functional.normalize((rows(features, start, stop, device) - shift) / scale, dim=1).float()

        train = torch.cat([unit(problem.x, a, a + ROWS) for a in range(0, N, ROWS)])
        truth = torch.nn.functional.one_hot(torch.from_numpy(problem.index.astype(np.int64)).to(device), K).float()
        shares = np.empty((len(x), K))
        part = max(1, CHUNK_BYTES // (4 * N))
        for a in range(0, len(x), part):
            alike = unit(x, a, a + part) @ train.T  # (m, N)
            # Relative to the nearest, so that a low temperature does not overflow.
            weight = ((alike - alike.amax(1, keepdim=True)) / temperature).exp()
            votes = (weight.where(_of_nearest(alike, min(k, N)), 0) @ truth).double()
            shares[a : a + part] = (votes / votes.sum(1, keepdim=True)).cpu().numpy()
            if progress:
                progress(min(a + part, len(x)), len(x))
    finally:
        torch.set_float32_matmul_precision(precision)
    return Votes(shares, problem.classes, knn_protocol(k, temperature, standardise))


def _of_nearest(alike: torch.Tensor, k: int) -> torch.Tensor:
    """Whether each column is among the k largest of its row, (m, N) bool; the first of equal ones."""
    least = alike.topk(k, dim=1).values[:, -1:]
    above, equal = alike > least, alike == least
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))
