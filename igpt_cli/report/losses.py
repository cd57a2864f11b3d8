"""Loss curves of one run or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.report.figures import COLOURS, DASHES, GREY, ORANGE, fitting, legend, new_figure, save

#: Points within which the name of a run must fit.
NAME = 150


@dataclass(kw_only=True)
class Recorded:
    """What a run has recorded.

    Attributes:
        name: what its curves are called.
        config: its config.json.
        metrics: the records of its metrics.jsonl, which may be none.
    """

    name: str
    config: dict[str, Any]
    metrics: Sequence[dict[str, Any]]


def loss_kind(run: Recorded) -> str:
    """What a run's loss is of; only those of one kind can stand in one chart."""
    model = run.config["model"]
    if model.get("backend") != "igpt":
        return "classes, nats per image"
    if model.get("n_classes") is not None or "finetuned_from" in run.config:
        return "pixels and classes, weighted"
    return "masked pixels, nats per token" if model.get("objective") == "bert" else "next pixel, nats per token"


def by_kind(runs: Sequence[Recorded]) -> dict[str, list[int]]:
    """{kind of loss: the places of its runs}, of the runs that recorded something."""
    kinds = sorted({loss_kind(run) for run in runs if run.metrics}, reverse=True)
    return {kind: [i for i, run in enumerate(runs) if loss_kind(run) == kind] for kind in kinds}


def uniform_guess(kind: str, run: Recorded) -> int | None:
    """Of how many colours or classes a guess is that knows nothing: its loss is the logarithm of it."""
    if "weighted" in kind:
        return None
    return run.config["model"].get("n_classes" if kind.startswith("classes") else "n_vocab")


def curve(run: Recorded, key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have it, as far as they are numbers."""
    found = [(_finite(record.get("step")), _finite(record.get(key))) for record in run.metrics]
    return [(x, y) for x, y in found if x is not None and y is not None]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def loss_curves(runs: Sequence[Recorded], path: Path | str, title: str = "") -> None:
    """Training loss by step, smoothed over the last steps, with every held-out loss and the uniform guess.

    Runs whose losses are of different things (next pixel, masked pixels, classes) are drawn side by side. A run
    alone has its held-out losses in a colour of their own; of several each has one colour.

    Args:
        runs: in the order of the legend.
        title: above all.

    Raises:
        InputError: no run recorded a loss.
    """
    panels = {
        kind: members
        for kind, members in by_kind(runs).items()
        if any(curve(runs[i], key) for i in members for key in ("loss", "val_loss"))
    }
    if not panels:
        raise InputError(f"no loss was recorded by {', '.join(run.name for run in runs)}, so there is nothing to draw")
    figure, grid = new_figure(width=0.4 + 6.0 * len(panels), ncols=len(panels), squeeze=False)
    alone = len(runs) == 1
    for axes, (kind, members) in zip(grid[0], panels.items()):
        if n := uniform_guess(kind, runs[members[0]]):
            axes.axhline(math.log(n), color=GREY, linewidth=1, linestyle=":", label=f"uniform guess, ln {n:,}")
        for i in members:
            _draw(axes, runs[i], COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], alone)
        axes.set(xlabel="step", ylabel=f"loss ({kind})")
        axes.set_xlim(left=0)
        legend(axes, loc="upper right", bbox_to_anchor=(1, 0.93))  # curves fall
    if title:
        figure.suptitle(fitting(title, 10.8, 72 * 6.0 * len(panels)), fontsize=10.8, parse_math=False)
    save(figure, Path(path))


def _draw(axes, run: Recorded, colour: str, dashes: str, alone: bool) -> None:
    """One run: every loss pale, their mean over the last steps, held-out losses as points."""
    train, held_out = curve(run, "loss"), curve(run, "val_loss")
    name = "" if alone else f"{fitting(run.name, 8, NAME)}, "
    if train:
        steps, loss = np.array(train).T
        axes.plot(steps, loss, color=colour, alpha=0.25 if alone else 0.12, linewidth=0.8)
        smooth = smoothed(loss, max(1, len(loss) // 40))
        axes.plot(steps, smooth, color=colour, linestyle=dashes, linewidth=1.6, label=f"{name}training")
    if held_out:
        own = ORANGE if alone else colour
        label = f"{name}held out, last {held_out[-1][1]:.3f}"
        form = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
        axes.plot(*np.array(held_out).T, "o", color=own, label=label, zorder=3, **form)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
