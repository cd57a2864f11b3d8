"""Time the classifiers of a probe: all layers and values of C at once, and scikit-learn.

Features are made up, as a network's are: rectified mixtures of few things, some of which tell the class, so that they
are correlated and of very different variances.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from igpt_cli.bench.machine import is_memory_short, wait_for
from igpt_cli.device import choose_device
from igpt_cli.errors import InputError
from igpt_cli.probing.linear import Linear, with_float64
from igpt_cli.probing.logistic import logistic
from igpt_cli.probing.protocol import C_GRID

#: What is made up where nothing is said: problems (layers), rows, features. On a GPU, iGPT-S on CIFAR-10.
CPU_SIZES = (5, 3000, 192)
GPU_SIZES = (25, 50_000, 512)
#: What features are mixed from.
LATENT = 64
#: The value of C that both solve.
C = 1.0
#: scikit-learn's own.
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SolverSpeed:
    """What fitting some logistic regressions measured; None where it could not be.

    Attributes:
        solver: "igpt", or "scikit-learn", to its own tolerance, on the CPU.
        n_problems, strengths: regressions are n_problems times the values of C.
        seconds: from features in the CPU's memory to classifiers there, standardising included.
        iterations: the most that a regression took.
        converged: all of them, by the solver's own test.
        above: by which part the loss of the first problem at C = 1 is above the lower one of both solvers.
        memory: peak bytes of a GPU's memory; None elsewhere.
        ratio: scikit-learn's time for a regression by igpt's for a regression; None in scikit-learn's row.
        failed: why nothing was measured.
    """

    solver: str
    n_problems: int
    strengths: tuple[float, ...]
    n_rows: int
    n_features: int
    n_classes: int
    device: str
    seconds: float | None = None
    iterations: int | None = None
    converged: bool | None = None
    above: float | None = None
    memory: int | None = None
    ratio: float | None = None
    failed: str | None = None


def bench_solvers(
    n_problems: int | None = None,
    n_rows: int | None = None,
    n_features: int | None = None,
    n_classes: int = 10,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> list[SolverSpeed]:
    """Time all regressions of a sweep over layers by igpt, and one by scikit-learn: two rows.

    Args:
        n_problems, n_rows, n_features: layers, images, width; None for `GPU_SIZES`, on a CPU `CPU_SIZES`.
        device: where igpt computes.
        progress: called with (regressions finished, all of them).
        on_event: called with a sentence when something could not be measured.

    Raises:
        InputError: numbers out of range.
    """
    chosen = with_float64(choose_device(device))
    sizes = CPU_SIZES if chosen.type == "cpu" else GPU_SIZES
    n_problems, n_rows, n_features = (
        a if given is None else given for given, a in zip((n_problems, n_rows, n_features), sizes, strict=True)
    )
    if min(n_problems, n_features) < 1 or n_classes < 2 or n_rows < 2 * n_classes:
        raise InputError(
            f"{n_problems} problems of {n_rows} rows, {n_features} features and {n_classes} classes cannot be "
            f"measured; at least 1 problem, 1 feature, 2 classes and 2 rows of each are needed"
        )
    say = on_event or (lambda text: None)
    problems = [made_up(n_rows, n_features, n_classes, seed) for seed in range(n_problems)]
    row = SolverSpeed("igpt", n_problems, C_GRID, n_rows, n_features, n_classes, str(chosen))
    one = replace(row, solver="scikit-learn", n_problems=1, strengths=(C,), device="cpu")
    if chosen.type == "cuda":
        logistic([(x[: 20 * n_classes], y[: 20 * n_classes]) for x, y in problems[:1]], [C], device=chosen)  # starts it
        torch.cuda.reset_peak_memory_stats(chosen)
    try:
        ours, row = _timed(row, problems, chosen, progress)
        found = ours[0][C_GRID.index(C)]
    except (MemoryError, RuntimeError, InputError) as e:
        if not (isinstance(e, MemoryError | InputError) or is_memory_short(e)):
            raise
        found, row = None, replace(row, failed="out of memory")
        say(f"igpt: {e}")
    if chosen.type == "cuda":
        row = replace(row, memory=torch.cuda.max_memory_allocated(chosen))
    ((theirs,),), one = _timed(one, problems[:1], torch.device("cpu"), None, "scikit-learn", max_iter=1000)
    if found is None or row.seconds is None or one.seconds is None:
        return [row, one]
    least = min(found.loss, theirs.loss)
    each = row.seconds / (n_problems * len(C_GRID))
    return [
        replace(row, above=found.loss / least - 1, ratio=round(one.seconds / each, 2)),
        replace(one, above=theirs.loss / least - 1),
    ]


def made_up(n_rows: int, n_features: int, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n_rows, n_features) float32 and labels (n_rows,); another seed: other features of the same rows."""
    rng = np.random.default_rng([n_rows, n_classes])
    y = rng.integers(n_classes, size=n_rows)
    y[: 2 * n_classes] = np.arange(2 * n_classes) % n_classes
    falling = 1 / np.sqrt(np.arange(1, LATENT + 1, dtype=np.float32))
    means = 0.2 * rng.standard_normal((n_classes, LATENT), np.float32)  # classes overlap
    latent = rng.standard_normal((n_rows, LATENT), np.float32) + means[y]
    mix = np.random.default_rng([seed, n_features]).standard_normal((LATENT, n_features), np.float32)
    return np.maximum(latent @ (falling[:, None] * mix), -1), y


def _timed(
    row: SolverSpeed,
    problems: list[tuple[np.ndarray, np.ndarray]],
    device: torch.device,
    progress: Callable[[int, int], None] | None,
    engine: str = "torch",
    **settings,
) -> tuple[list[list[Linear]], SolverSpeed]:
    started = time.perf_counter()
    found = logistic(
        problems,
        row.strengths,
        device=device,
        engine=engine,
        tolerance=DEFAULT_TOLERANCE,
        progress=progress,
        **settings,
    )
    wait_for(device)
    seconds = time.perf_counter() - started
    fits = [fit for path in found for fit in path]
    return found, replace(
        row,
        seconds=round(seconds, 4),
        iterations=max(fit.n_iter for fit in fits),
        converged=all(fit.converged for fit in fits),
    )
