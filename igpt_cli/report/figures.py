"""The pictures: loss by step, accuracy by layer, original beside quantized images. All in one quiet style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.files import replacing

BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#6b7280"
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "svg.hashsalt": "igpt",
}


def _new(width: float = 6.4, height: float = 3.6):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(figsize=(width, height))


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    try:
        with replacing(path) as part, plt.rc_context(STYLE):
            figure.savefig(part)
    finally:
        plt.close(figure)


def loss_curve(records: Sequence[dict[str, Any]], path: Path | str, n_vocab: int, title: str = "") -> None:
    """Training loss by step, smoothed over the last steps, with every validation loss and the uniform guess ln V.

    Args:
        records: those of metrics.jsonl: `step` with `loss` or `val_loss`, nats per token.
        path: a .png, .svg or .pdf file.
        n_vocab: palette size V.
    """
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    figure, axes = _new()
    axes.axhline(math.log(n_vocab), color=GREY, linewidth=1, linestyle=":", label=f"uniform, ln {n_vocab}")
    if train:
        steps, loss = np.array(train).T
        axes.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(loss, max(1, len(loss) // 40)), color=BLUE, linewidth=1.6, label="training")
    if val:
        axes.plot(*np.array(val).T, "o", color=ORANGE, markersize=5, label=f"held out, last {val[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend(frameon=False)
    _save(figure, Path(path))


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def layer_curve(
    curves: dict[str, Sequence[dict[str, Any]]], floors: dict[str, float], path: Path | str, title: str = ""
) -> None:
    """Probe accuracy by layer with its 95% interval, and floors as lines.

    Args:
        curves: {label: rows with layer, accuracy and interval in percent}; the first is drawn strongest.
        floors: {label: accuracy in percent}.
        path: a .png, .svg or .pdf file.
    """
    figure, axes = _new(width=8.2)
    for (label, rows), colour in zip(curves.items(), (BLUE, ORANGE, GREY, "#7c3aed")):
        layers = [r["layer"] for r in rows]
        low, high = zip(*(r["interval"] for r in rows))
        axes.fill_between(layers, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(layers, [r["accuracy"] for r in rows], "o-", color=colour, markersize=3, linewidth=1.5, label=label)
    for (label, accuracy), dashes in zip(floors.items(), ("--", ":", "-.")):
        axes.axhline(accuracy, color=GREY, linewidth=1.1, linestyle=dashes, label=f"{label}, {accuracy:.1f}%")
    axes.set(xlabel="layer", ylabel="test accuracy (%)", title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, Path(path))


def probe_figure(found: dict[str, Any], path: Path | str) -> None:
    """The layer curve of one probe result (what `probing.probe.probe` returns)."""
    floors = found.get("floors", {})
    curves = {found["model"]: found["layers"]}
    if "untrained network" in floors:
        curves["untrained network"] = floors["untrained network"]["layers"]
    lines = {"most frequent class": found["chance"]}
    if "raw pixels" in floors:
        lines["raw pixels"] = floors["raw pixels"]["accuracy"]
    title = f"Linear probe: {found['n_train']:,} training, {found['n_test']:,} test images"
    layer_curve(curves, lines, path, title)


def position_map(values: np.ndarray, path: Path | str, title: str = "") -> None:
    """The mean loss at each position of the image as a heat map; places without a value are grey.

    The colours end at the 99th percentile, or else the first pixel, which nothing helps to predict, would take most
    of them; where that hides something, the colour bar ends in an arrow with the highest value beside it.

    Args:
        values: (R, R) nats per token, NaN where there is none.
        path: a .png, .svg or .pdf file.
    """
    from matplotlib import colormaps

    known = values[np.isfinite(values)]
    low, top, high = (known.min(), np.percentile(known, 99), known.max()) if len(known) else (0.0, 1.0, 1.0)
    cut = high > low + 1.2 * (top - low)
    figure, axes = _new(width=5.2, height=4.3)
    tints = colormaps["viridis"].with_extremes(bad="#d1d5db")
    shown = axes.imshow(
        np.ma.masked_invalid(values), tints, vmin=low, vmax=top if cut else high, interpolation="nearest"
    )
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="column", ylabel="row", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(shown, ax=axes, label="nats per token", extend="max" if cut else "neither")
    bar.outline.set_visible(False)
    if cut:
        bar.ax.set_title(f"up to {high:.1f}", fontsize=8)
    _save(figure, Path(path))
