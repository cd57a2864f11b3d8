"""Multinomial logistic regressions of one shape, all at once, in torch.

Shapes: B problems, N rows, D features, r <= D of them independent, K classes, c values of C for each problem.

The values of C share a problem's features, so one product (c K, D) x (D, N) serves them all; classes come before rows,
as a product with a few columns takes a CPU up to eight times as long. Features and products are float32, sums over
parts of rows, weights, penalties and L-BFGS float64, which leaves noise of about 1e-7 in a loss.

L-BFGS works on V = (G/K + ridge)^(1/2) W, G = X'X/N, in which the second derivatives at W = 0 are the identity (up to
the shift that all classes share), whatever the features' scales and correlations, and for every C. On 5,000 x 512
features of CIFAR-10 at C = 1 that takes some 90 iterations instead of 900.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from igpt_cli.errors import InputError
from igpt_cli.probing.lbfgs import minimise
from igpt_cli.probing.linear import MANY_VALUES, ROWS, Linear, Problem, moments, rows

#: Solved when the gradient's norm in the variables V, whose square is about twice what is left to gain, is this part
#: of the square root of the loss. Measured against scikit-learn's optimum, less than 1e-6 of the loss is left then.
TOLERANCE = 3e-5
#: Losses closer than this, relatively, are told apart by their slopes.
NOISE = 1e-6
#: Bytes of logits at a time.
CHUNK_BYTES = 64 << 20
#: The eigenvectors of more independent features take longer to find than they save.
WHITEN_UP_TO = 4096
#: Of fewer rows than features: directions with less than this part of the largest variance are rounding. The penalty
#: would leave no weight there.
FLAT = 1e-10
#: Copies of the variables that L-BFGS holds: its history, and what it computes with.
COPIES = 30


class Regressions:
    """The mean loss of B * c regressions and its gradient, as `minimise` calls it.

    x: (B, N, D) float32, each column of mean 0, changed in place. index: (B, N) int64, classes 0..K-1. C: (B, c)
    float64.
    """

    def __init__(self, x: torch.Tensor, index: torch.Tensor, n_classes: int, C: torch.Tensor):
        self.x, self.index = x, index
        B, N, D = x.shape
        self.c = C.shape[1]
        # Two classes: scikit-learn penalises the difference v of the two rows, 1/2 |v|^2, where rows -v/2 and v/2 have
        # 1/2 |W|^2 = 1/4 |v|^2.
        self.ridge = (2 if n_classes == 2 else 1) / (C * N)
        self.part = max(256, CHUNK_BYTES // (4 * B * C.shape[1] * n_classes))
        self.basis: torch.Tensor | None = None
        spectrum = x.new_ones(B, D, dtype=torch.float64)
        if N < D and N <= WHITEN_UP_TO:
            spectrum, self.basis, self.x = _spanned(x)
        elif D <= WHITEN_UP_TO:
            spectrum, self.basis = _principal(x)
            for a in range(0, N, ROWS):
                x[:, a : a + ROWS] = torch.bmm(x[:, a : a + ROWS].double(), self.basis).float()
        rank = spectrum.shape[1]
        self.scale = (spectrum.clamp(min=0)[:, None] / n_classes + self.ridge[..., None]) ** -0.5  # (B, c, r)
        self.bias_scale = n_classes**0.5
        self.shape = (B, self.c, rank, n_classes)

    def start(self) -> torch.Tensor:
        """All zero: (B c, (r + 1) K) float64."""
        B, c, r, K = self.shape
        return self.x.new_zeros(B * c, (r + 1) * K, dtype=torch.float64)

    def weights(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (B, c, D, K) and biases (B, c, K) of the variables v (B c, (r + 1) K)."""
        B, c, r, K = self.shape
        v = v.view(B, c, r + 1, K)
        w = self.scale[..., None] * v[:, :, :r]
        return w if self.basis is None else self.basis[:, None] @ w, self.bias_scale * v[:, :, r]

    def solved(self, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Whether what is left to gain is nothing beside the loss: (B c,) bool."""
        return gradient.norm(dim=1) <= TOLERANCE * value.sqrt()

    def __call__(self, v: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        B, all_c, r, K = self.shape
        N = self.x.shape[1]
        # A value of C for which every problem is solved costs nothing more; problems go on while one value of C does.
        columns, place = (which % all_c).unique(return_inverse=True)
        c = len(columns)
        place += which // all_c * c
        v = v.new_zeros(B * c, (r + 1) * K).index_copy_(0, place, v).view(B, c, r + 1, K)
        scale, ridge = self.scale[:, columns], self.ridge[:, columns]
        rotated = scale[..., None] * v[:, :, :r]  # (B, c, r, K), as long as the weights, for the basis is orthonormal
        w = rotated.mT.reshape(B, c * K, r).float()
        bias = (self.bias_scale * v[:, :, r]).reshape(B, c * K, 1).float()
        loss = v.new_zeros(B, c)
        g, g_bias = v.new_zeros(B, c * K, r), v.new_zeros(B, c * K)
        for a in range(0, N, self.part):
            x = self.x[:, a : a + self.part]
            truth = self.index[:, None, None, a : a + self.part].expand(-1, c, 1, -1)
            log_p = torch.baddbmm(bias, w, x.mT).view(B, c, K, -1).log_softmax(2)
            of_truth = log_p.gather(2, truth)
            # What is left of a probability near 1 is lost in float32, so it is summed from the other classes'.
            rest = log_p.exp_().scatter_(2, truth, 0)
            wrong = rest.sum(2, keepdim=True)
            loss -= torch.where(wrong < 0.5, (-wrong).log1p(), of_truth).sum((2, 3), dtype=torch.float64)
            rest.scatter_(2, truth, -wrong)
            rest = rest.view(B, c * K, -1)  # probability less truth
            g += torch.bmm(rest, x)
            g_bias += rest.sum(2, dtype=torch.float64)
        g = g.view(B, c, K, r).mT / N + ridge[..., None, None] * rotated
        g_bias = self.bias_scale * g_bias.view(B, c, 1, K) / N
        value = loss / N + ridge / 2 * rotated.square().sum((2, 3))
        gradient = torch.cat((scale[..., None] * g, g_bias), 2)
        return value.view(-1)[place], gradient.view(B * c, -1)[place]


def _principal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal axes of x (B, N, D), N >= D: their variances (B, D) and directions (B, D, D) float64."""
    B, N, D = x.shape
    gram = x.new_zeros(B, D, D, dtype=torch.float64)
    for a in range(0, N, ROWS):
        part = x[:, a : a + ROWS]
        gram += torch.bmm(part.mT, part)
    return torch.linalg.eigh(gram / N)


def _spanned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_principal`, of fewer rows than features, with x in these axes: (B, N), (B, D, N), and (B, N, N) float32.

    Weights outside the rows' span are zero at the optimum. Directions that are rounding are zero.
    """
    B, N, D = x.shape
    gram = x.new_zeros(B, N, N, dtype=torch.float64)
    for a in range(0, D, ROWS):
        part = x[:, :, a : a + ROWS].double()
        gram += torch.bmm(part, part.mT)
    spectrum, rows_of = torch.linalg.eigh(gram / N)
    spectrum = spectrum.clamp(min=0)
    there = spectrum > FLAT * spectrum[:, -1:]
    length = (N * spectrum).sqrt() * there
    to_axes = rows_of * torch.where(there, 1 / length, 0)[:, None]
    basis = x.new_empty(B, D, N, dtype=torch.float64)
    for a in range(0, D, ROWS):
        basis[:, a : a + ROWS] = torch.bmm(x[:, :, a : a + ROWS].double().mT, to_axes)
    return spectrum, basis, (rows_of * length[:, None]).float()


def problem_bytes(n_rows: int, n_features: int, n_classes: int, n_strengths: int) -> int:
    """Bytes that one problem takes on the device: features, parts of them in float64, axes, and L-BFGS's variables."""
    rank = min(n_rows, n_features)
    axes = 24 * rank**2 + 8 * rank * n_features if rank <= WHITEN_UP_TO else 0
    rank = rank if axes else n_features
    variables = 8 * n_strengths * (rank + 1) * n_classes
    return 4 * n_features * (n_rows + 6 * min(n_rows, ROWS)) + axes + COPIES * variables


@torch.no_grad()
def solve(
    problems: Sequence[Problem],
    grids: Sequence[Sequence[float]],
    device: torch.device,
    *,
    standardise: bool = True,
    max_iter: int = 1000,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Linear]]:
    """Solve problems of one shape, with equally many values of C each, in groups that fit into memory.

    Args:
        standardise: divide features by their standard deviations; means are always subtracted, for which the
            unpenalised biases make up.
        budget: bytes that a group may take; default half of what is free on a GPU, 256 MiB elsewhere.
        progress: called with (regressions finished, all of them).

    Raises:
        InputError: a feature is NaN or infinite, or one problem alone does not fit on the GPU.
    """
    N, D, K = problems[0].shape
    c = len(grids[0])
    each = problem_bytes(N, D, K, c)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch holds unused
        if each + 8 * CHUNK_BYTES > free:
            raise InputError(
                f"{problems[0].name}: {N} rows of {D} features need {each / 1e9:.1f} GB on {device}, which has "
                f"{free / 1e9:.1f} GB free; use the solver sgd, which reads them in parts"
            )
        budget = budget or free // 2
    size = max(1, (budget or 256 << 20) // each)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 keeps three digits, too few to converge
    threads = torch.get_num_threads()
    if device.type == "cpu" and min(size, len(problems)) * N * D < MANY_VALUES:
        torch.set_num_threads(1)
    out: list[list[Linear]] = []
    try:
        for a in range(0, len(problems), size):
            step = progress and (lambda done, _, a=a: progress(a * c + done, len(problems) * c))  # type: ignore[misc]
            out += _solve_group(problems[a : a + size], grids[a : a + size], device, standardise, max_iter, step)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
    return out


def _solve_group(problems, grids, device, standardise, max_iter, progress) -> list[list[Linear]]:
    B, (N, D, K) = len(problems), problems[0].shape
    x = torch.empty(B, N, D, device=device)
    statistics = []
    for b, problem in enumerate(problems):
        mean, std = moments(problem.x, problem.name, device)
        std = std if standardise else torch.ones_like(std)
        for a in range(0, N, ROWS):
            x[b, a : a + ROWS] = (rows(problem.x, a, a + ROWS, device) - mean) / std
        statistics.append((mean.cpu().numpy(), std.cpu().numpy()))
    index = torch.from_numpy(np.stack([p.index for p in problems]).astype(np.int64)).to(device)
    C = torch.tensor([list(grid) for grid in grids], dtype=torch.float64, device=device)
    regressions = Regressions(x, index, K, C)
    minimum = minimise(
        regressions, regressions.start(), regressions.solved, max_iter=max_iter, noise=NOISE, progress=progress
    )
    weight, bias = (part.cpu().numpy() for part in regressions.weights(minimum.x))
    value, n_iter, converged = (
        part.view(B, -1).tolist() for part in (minimum.value, minimum.n_iter, minimum.converged)
    )
    return [
        [
            Linear(
                np.ascontiguousarray(weight[b, i].T),
                bias[b, i],
                *statistics[b],
                problem.classes,
                float(strength),
                value[b][i],
                converged[b][i],
                n_iter[b][i],
            )
            for i, strength in enumerate(grids[b])
        ]
        for b, problem in enumerate(problems)
    ]
