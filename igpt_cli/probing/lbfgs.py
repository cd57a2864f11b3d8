"""Batched L-BFGS (Liu and Nocedal 1989) for smooth convex problems of one size, in torch.

Shapes: P problems, n variables each, m pairs of history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

#: Wolfe's conditions: a step must lower the value by this part of what the slope promises ...
ENOUGH = 1e-4
#: ... and leave at most this part of the slope.
FLAT = 0.9
#: So many trial steps along one direction, and it is given up.
MAX_TRIALS = 30


@dataclass(frozen=True)
class Minimum:
    """Where `minimise` ended, after `evaluations` of all problems together.
    x (P, n), value (P,), n_iter (P,) int64, converged (P,) bool.
    """

    x: torch.Tensor
    value: torch.Tensor
    n_iter: torch.Tensor
    converged: torch.Tensor
    evaluations: int


def minimise(
    fun: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    done: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    max_iter: int = 1000,
    history: int = 10,
    noise: float = 1e-9,
    progress: Callable[[int, int], None] | None = None,
) -> Minimum:
    """Minimise P functions at once; each has its own step, history and end.

    Every round evaluates one trial point of each unfinished problem. A trial that meets the weak Wolfe conditions
    becomes an iterate; otherwise the bracket around a good step narrows (or widens) to the zero of the slope that its
    ends predict. Where values differ by rounding alone, the slope decides instead (Hager and Zhang 2005).

    Args:
        fun: (x (A, n), which (A,) int64) -> value (A,), gradient (A, n), of the unfinished problems `which`.
        x: (P, n) float64, where to start.
        done: (value (P,), gradient (P, n)) -> (P,) bool, whether a problem is solved.
        max_iter: iterates for each problem at most.
        history: pairs of steps and changes of the gradient.
        noise: values that differ by less than this part of their size count as equal.
        progress: called with (problems finished, P).

    Returns:
        Minimum; `converged` is False where max_iter was reached, or where no step along the gradient went down.
    """
    P, n = x.shape
    x = x.clone()
    which = torch.arange(P, device=x.device)  # the problems that the state below is of
    f, g = fun(x, which)
    result = Minimum(x.clone(), f.clone(), torch.zeros_like(which), done(f, g), 1)
    solved = result.converged.clone()
    active = ~solved
    n_iter, trials = torch.zeros_like(which), torch.zeros_like(which)
    steps, changes = x.new_zeros(history, P, n), x.new_zeros(history, P, n)
    rho = x.new_zeros(history, P)  # 1 / <step, change>; 0 where there is no pair
    pairs = torch.zeros_like(which)  # how many pairs were stored; the next goes to pairs % history

    def directions(some: torch.Tensor) -> torch.Tensor:
        """Minus the approximate inverse Hessian times the gradient, of some problems: two loops over the history."""
        d, alphas = -g[some], []
        slots = [(pairs[some] - 1 - j) % history for j in range(history)]
        for slot in slots:
            alpha = rho[slot, some] * (steps[slot, some] * d).sum(1)
            alphas.append(alpha)
            d -= alpha[:, None] * changes[slot, some]
        newest = rho[slots[0], some]
        scale = 1 / (newest * changes[slots[0], some].square().sum(1))
        d *= torch.where(newest > 0, scale, 1)[:, None]
        for slot, alpha in zip(reversed(slots), reversed(alphas)):
            beta = rho[slot, some] * (changes[slot, some] * d).sum(1)
            d += (alpha - beta)[:, None] * steps[slot, some]
        return d

    d = -g
    slope = (g * d).sum(1)
    t = x.new_ones(P)
    low, high = x.new_zeros(P), x.new_full((P,), torch.inf)  # the bracket, and the slopes at its ends
    slope_low, slope_high = slope.clone(), x.new_full((P,), torch.nan)
    evaluations = 1
    while left := int(active.sum()):
        if left <= len(which) // 2:  # the others need no more memory, and no more time
            _keep(result, which, x, f, n_iter, solved)
            rest = active.nonzero()[:, 0]
            which, x, f, g, d, slope, t = (part[rest] for part in (which, x, f, g, d, slope, t))
            low, high, slope_low, slope_high = (part[rest] for part in (low, high, slope_low, slope_high))
            active, solved, n_iter, trials, pairs = (part[rest] for part in (active, solved, n_iter, trials, pairs))
            steps, changes, rho = (part[:, rest] for part in (steps, changes, rho))
        trial = x + t[:, None] * d
        f_new, g_new = fun(trial, which)
        evaluations += 1
        trials += 1
        slope_new = (g_new * d).sum(1)
        falls = f_new <= f + ENOUGH * t * slope
        falls |= (f_new <= f + noise * f.abs()) & (slope_new <= (2 * ENOUGH - 1) * slope)
        is_flat = slope_new >= FLAT * slope
        taken = active & falls & is_flat

        # Iterates: those whose trial is taken.
        row = taken[:, None]
        product = ((trial - x) * (g_new - g)).sum(1)
        kept = (taken & (product > 0)).nonzero()[:, 0]
        slot = pairs[kept] % history
        steps[slot, kept], changes[slot, kept] = trial[kept] - x[kept], g_new[kept] - g[kept]
        rho[slot, kept] = 1 / product[kept]
        pairs[kept] += 1
        x, g, f = torch.where(row, trial, x), torch.where(row, g_new, g), torch.where(taken, f_new, f)
        n_iter += taken
        solved |= taken & done(f, g)
        active &= ~solved & (n_iter < max_iter)

        # Brackets: those whose trial is not.
        too_far, too_near = ~taken & ~falls, ~taken & falls
        high, slope_high = torch.where(too_far, t, high), torch.where(too_far, slope_new, slope_high)
        low, slope_low = torch.where(too_near, t, low), torch.where(too_near, slope_new, slope_low)
        t = torch.where(taken, 1.0, _next_step(low, high, slope_low, slope_high))

        # Directions given up start again from the gradient alone; those that were the gradient end.
        stuck = active & ~taken & (trials >= MAX_TRIALS)
        active &= ~(stuck & (rho == 0).all(0))
        rho = torch.where(stuck, 0, rho)
        fresh = (taken | stuck) & active
        some = fresh.nonzero()[:, 0]
        d[some] = directions(some)
        slope = torch.where(fresh, (g * d).sum(1), slope)
        t = torch.where(fresh, 1.0, t)
        low, high = torch.where(fresh, 0, low), torch.where(fresh, torch.inf, high)
        slope_low = torch.where(fresh, slope, slope_low)
        trials = torch.where(fresh, 0, trials)
        if progress:
            progress(P - int(active.sum()), P)
    _keep(result, which, x, f, n_iter, solved)
    return replace(result, evaluations=evaluations)


def _keep(result: Minimum, which, x, f, n_iter, solved) -> None:
    result.x[which], result.value[which], result.n_iter[which], result.converged[which] = x, f, n_iter, solved


def _next_step(low, high, slope_low, slope_high) -> torch.Tensor:
    """Inside the bracket where the line through the slopes at its ends is zero; beyond `low` while it has no end."""
    width = high - low
    part = slope_low / (slope_low - slope_high)
    part = torch.where(part.isfinite() & (slope_high > 0), part, 0.5).clamp(0.1, 0.9)
    return torch.where(high.isfinite(), low + part * torch.where(high.isfinite(), width, 0), 2 * low)
