"""Logistic regression by SGD, for features larger than memory.

As the paper's probe on ImageNet (section 3.4: momentum 0.9, learning rates 30, 10, 3, ..., cosine), but all learning
rates are trained side by side on the same batches, as DINOv2's are. The best is for the held-out part to choose.

Shapes: N rows, D features, K classes, R learning rates, n rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from igpt_cli.errors import InputError
from igpt_cli.probing.linear import ROWS, Linear, Problem, moments, rows

#: For features of unit length, as the paper's; else divided by the mean square of their length, D if standardised.
RATES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
#: Rows read at once: they lie together on disk, and are shuffled with those of many other places.
BLOCK = 256


@torch.no_grad()
def fit_sgd(
    problem: Problem,
    rates: Sequence[float],
    device: torch.device,
    *,
    epochs: float = 100,
    steps: int | None = None,
    batch_size: int = 256,
    momentum: float = 0.9,
    standardise: bool = True,
    memory: int = 1 << 30,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Linear]:
    """Minimise the mean log loss, without a penalty (C = inf), with each of the learning rates.

    Rates decay to zero along half a cosine. A rate that ends with a loss above that of equal probabilities has
    diverged; it gives zero weights and an infinite loss.

    Args:
        rates: learning rates for features of unit length; divided here by D, or the mean square of their length.
        epochs: passes over the rows; or `steps` updates.
        batch_size: rows of an update.
        standardise: by mean and standard deviation of all rows, which costs one more pass over them.
        memory: bytes of features held at once. If all rows fit they are read once and shuffled freely; otherwise blocks
            of 256 rows from random places are shuffled together, as many as fit.
        seed: decides the order of the rows, with `memory` where not all fit.
        progress: called with (learning rates' worth of rows done, number of rates).

    Returns:
        A `Linear` for each rate; `converged` is False if it diverged.

    Raises:
        InputError: NaN or infinite features; settings out of range.
    """
    N, D, K = problem.shape
    R = len(rates)
    batch_size = min(batch_size, N)
    if steps is not None:
        epochs = steps * batch_size / N
    if not (epochs > 0 and batch_size > 0 and 0 <= momentum < 1):
        raise InputError(
            f"epochs {epochs:g}, batch size {batch_size}, momentum {momentum:g}: the first two are above zero, "
            f"momentum is at least 0 and less than 1"
        )
    mean, std = moments(problem.x, problem.name, device)
    squared_length: float = D
    if not standardise:
        parts = (rows(problem.x, a, a + ROWS, device) for a in range(0, N, ROWS))
        squared_length = sum(float(part.square().sum()) for part in parts) / N or 1.0
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    stream = _Stream(problem, mean, std, device, batch_size, memory, seed)
    w, b = torch.zeros(D, R, K, device=device), torch.zeros(R, K, device=device)
    w_speed, b_speed = torch.zeros_like(w), torch.zeros_like(b)
    rate = torch.tensor(rates, device=device)[:, None] / squared_length
    seen, n_iter = 0, 0
    for x, index in stream.forever():
        _, g_w, g_b = loss_and_gradient(x, index, w, b)
        now = 0.5 * (1 + math.cos(math.pi * seen / (epochs * N))) * rate
        # The few rows that are left over at the end of a pass count as what they are, a part of a batch.
        share = len(x) / batch_size
        w_speed.mul_(momentum).add_(g_w, alpha=share)
        b_speed.mul_(momentum).add_(g_b, alpha=share)
        w -= now * w_speed
        b -= now * b_speed
        seen, n_iter = seen + len(x), n_iter + 1
        if progress:
            progress(min(R, int(R * seen / (epochs * N))), R)
        if seen >= epochs * N or n_iter == steps:
            break
    loss = torch.zeros(R, dtype=torch.float64, device=device)
    for x, index in stream.batches(epoch=None):
        loss += loss_and_gradient(x, index, w, b)[0].double() * len(x) / N
    ends_well = (loss <= math.log(K)).tolist()  # not so if it is NaN
    weight, bias, shift, scale = (part.double().cpu().numpy() for part in (w, b, mean, std))
    return [
        Linear(
            np.ascontiguousarray(weight[:, r].T) if well else np.zeros((K, D)),
            bias[r] if well else np.zeros(K),
            shift,
            scale,
            problem.classes,
            math.inf,
            float(loss[r]) if well else math.inf,
            well,
            n_iter,
            float(rates[r]),
        )
        for r, well in enumerate(ends_well)
    ]


def loss_and_gradient(
    x: torch.Tensor, index: torch.Tensor, w: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean log loss (R,) of x (n, D) with classes index (n,), and its gradients in w (D, R, K) and b (R, K)."""
    n, (D, R, K) = len(x), w.shape
    truth = index[:, None, None].expand(n, R, 1)
    log_p = ((x @ w.view(D, R * K)).view(n, R, K) + b).log_softmax(-1)
    loss = -log_p.gather(-1, truth).mean((0, 2))
    rest = log_p.exp().scatter_add_(-1, truth, log_p.new_full((1, 1, 1), -1).expand_as(truth)) / n
    return loss, (x.mT @ rest.view(n, R * K)).view(D, R, K), rest.sum(0)


class _Stream:
    """Standardised batches in an order that is a function of (seed, pass)."""

    def __init__(self, problem, mean, std, device, batch_size, memory, seed):
        self.problem, self.mean, self.std, self.device = problem, mean, std, device
        self.batch_size, self.seed = batch_size, seed
        self.index = torch.from_numpy(problem.index.astype(np.int64)).to(device)
        N, D, _ = problem.shape
        self.blocks = max(1, -(-batch_size // BLOCK), memory // (4 * D * BLOCK))  # held at once
        self.n_blocks = -(-N // BLOCK)
        self.held = self._read(range(self.n_blocks)) if self.n_blocks <= self.blocks else None

    def forever(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch = 0
        while True:
            yield from self.batches(epoch)
            epoch += 1

    def batches(self, epoch: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """x (n, D) float32 and classes (n,) of all rows once; in the file's order for None."""
        order = np.arange(self.n_blocks)
        if epoch is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        for part, a in enumerate(range(0, self.n_blocks, self.blocks)):
            x, index = self.held or self._read(order[a : a + self.blocks])
            if epoch is not None:
                shuffled = np.random.default_rng([self.seed, epoch, part]).permutation(len(x))
                taken = torch.from_numpy(shuffled).to(self.device)
            for i in range(0, len(x), self.batch_size):
                chosen = slice(i, i + self.batch_size) if epoch is None else taken[i : i + self.batch_size]
                yield x[chosen], index[chosen]

    def _read(self, blocks) -> tuple[torch.Tensor, torch.Tensor]:
        def standard(block: int) -> torch.Tensor:
            part = rows(self.problem.x, block * BLOCK, (block + 1) * BLOCK, self.device)
            return ((part - self.mean) / self.std).float()

        index = [self.index[block * BLOCK : (block + 1) * BLOCK] for block in blocks]
        return torch.cat([standard(block) for block in blocks]), torch.cat(index)
