"""Pictures of a comparison: accuracy by compute, and by relative depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_cli.report.compare import ComparedModel, Comparison
from igpt_cli.report.figures import COLOURS, DASHES, GREY, fitting, legend, new_figure, save

FORMS, DEPTH = "osD^", "depth of the layer: 0 first block's input, 1 final norm"
#: Points within which a name must fit.
NAME = 130


def compute_figure(found: Comparison, path: Path | str) -> None:
    """Test accuracy against FLOPs of one image: the probe with its interval, and a class head as a hollow point."""
    rows = found.models
    figure, axes = new_figure(width=8.2, height=4.4)
    axes.set_xscale("log")
    for row, colour, form in zip(rows, *_looks(len(rows), FORMS)):
        x = row.flops_per_image / 1e9
        low, high = row.interval
        axes.vlines(x, low, high, color=colour, alpha=0.35, linewidth=3)
        axes.plot(x, row.accuracy, form, color=colour, markersize=6)
        if row.head:
            axes.vlines(x, *sorted((row.accuracy, row.head["accuracy"])), color=colour, linewidth=0.8)
            axes.plot(x, row.head["accuracy"], form, color=colour, markerfacecolor="white")
    axes.axhline(found.chance, color=GREY, linewidth=1.1, linestyle="--")
    flops = [row.flops_per_image / 1e9 for row in rows]
    axes.set_xlim(min(flops) / 1.5, max(flops) * 1.5)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="GFLOPs for one image, forward", ylabel="test accuracy (%)", title=found.images_used)
    _plain_ticks(axes)
    _key(figure, rows, found.chance)
    save(figure, Path(path))


def _looks(n: int, forms: Sequence[str]) -> tuple[list[str], list[str]]:
    """The colours of n models, and what distinguishes those of one colour."""
    return [COLOURS[i % len(COLOURS)] for i in range(n)], [forms[i // len(COLOURS) % len(forms)] for i in range(n)]


def _plain_ticks(axes) -> None:
    """Plain numbers on a logarithmic axis, however little of it is seen."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    few = high / low < 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _key(figure, rows: Sequence[ComparedModel], chance: float) -> None:
    """The models by colour and form, then what is what."""
    from matplotlib.lines import Line2D

    handles = []
    for row, colour, form in zip(rows, *_looks(len(rows), FORMS)):
        name = fitting(f"{row.name}, {row.accuracy:.1f}%", 8, NAME)
        handles.append(Line2D([], [], marker=form, linestyle="", color=colour, label=name))
    handles.append(Line2D([], [], color=GREY, alpha=0.35, linewidth=3, label="95% interval of the probe"))
    if any(row.head for row in rows):
        handles.append(Line2D([], [], marker="o", markerfacecolor="white", color=GREY, label="its own class head"))
    handles.append(Line2D([], [], color=GREY, linestyle="--", label=f"commonest class, {chance:.1f}%"))
    legend(figure, handles, loc="outside right upper")


def depth_figure(found: Comparison, path: Path | str) -> None:
    """Probe accuracy of every layer of every model against the layer's depth, from 0 (the first block's input) to 1
    (the final norm), with 95% intervals; the chosen layer is marked."""
    figure, axes = new_figure(width=8.2, height=4.0)
    for row, colour, dashes in zip(found.models, *_looks(len(found.models), DASHES)):
        depths = [layer["layer"] / row.n_layers for layer in row.layers]
        low, high = zip(*(layer["interval"] for layer in row.layers))
        axes.fill_between(depths, low, high, color=colour, alpha=0.1, linewidth=0)
        label = fitting(f"{row.name}, {row.accuracy:.1f}%", 8, NAME)
        curve = [layer["accuracy"] for layer in row.layers]
        axes.plot(depths, curve, "o", linestyle=dashes, color=colour, markersize=2.5, linewidth=1.5, label=label)
        axes.plot(row.relative_depth, row.accuracy, "o", color=colour, markersize=7, markeredgecolor="white")
    axes.axhline(found.chance, color=GREY, linewidth=1.1, linestyle="--", label=f"commonest class, {found.chance:.1f}%")
    axes.set(xlabel=DEPTH, ylabel="test accuracy (%)", xlim=(-0.02, 1.02), title=found.images_used)
    axes.set_ylim(bottom=0)
    axes.plot([], [], "o", color=GREY, markersize=7, markeredgecolor="white", label="layer chosen on held-out images")
    legend(figure, loc="outside right upper")
    save(figure, Path(path))
