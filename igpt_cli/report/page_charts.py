"""Charts of a report: loss and accuracy by step, palette colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from igpt_cli.report.html import Table
from igpt_cli.report.losses import by_kind, curve, uniform_guess
from igpt_cli.report.page_run import Account
from igpt_cli.report.svg import Chart, Level, Line

#: A curve of more points is thinned: each is then the mean of as many steps.
MOST_POINTS = 160
#: A palette of more colours is drawn as its commonest ones.
MOST_COLOURS = 1024


@dataclass(frozen=True)
class Plot:
    """A chart with its caption, and what it shows in numbers: a table that opens, with a summary."""

    chart: Chart
    caption: str
    summary: str
    table: Table


def loss_plots(accounts: Sequence[Account]) -> Iterator[Plot]:
    """A plot for each kind of loss; each run has its colour."""
    for kind, members in by_kind(accounts).items():
        lines, rows = [], []
        for i in members:
            name, train, held_out = accounts[i].name, curve(accounts[i], "loss"), curve(accounts[i], "val_loss")
            if thin := thinned(train):
                span = "" if len(train) <= MOST_POINTS else f", mean of {-(-len(train) // MOST_POINTS):,} steps"
                says = [f"{name}, step {x:,.0f}: training loss {y:.3f}{span}" for x, y in thin]
                lines.append(Line(f"{name}, training", thin, says, series=i))
            if held_out:
                says = [f"{name}, step {x:,.0f}: held-out loss {y:.4f}" for x, y in held_out]
                last = f"{name}, held out, last {held_out[-1][1]:.3f}"
                lines.append(Line(last, held_out, says, series=i, dots=True, joined=False))
                rows += [(name, x, y) for x, y in held_out]
        if not lines:
            continue
        n, names = uniform_guess(kind, accounts[members[0]]), ", ".join(accounts[i].name for i in members)
        levels = [Level(f"uniform guess, ln {n:,} = {math.log(n):.3f}", math.log(n))] if n else []
        label = f"Loss by step ({kind}) of {names}; the numbers are in the table below"
        chart = Chart(lines, levels, "step", f"loss ({kind})", label, whole_x=True)
        name = "loss-" + kind.split()[0].strip(",")
        table = Table(name, f"Held-out loss ({kind})", "run|step:,.0f|loss:.4f", rows)
        yield Plot(chart, f"Loss by step: {kind}.", "Held-out losses", table)


def accuracy_plot(accounts: Sequence[Account]) -> Iterator[Plot]:
    """Held-out accuracy of class heads, where runs have it."""
    lines, rows = [], []
    for i, account in enumerate(accounts):
        if points := curve(account, "val_accuracy"):
            says = [f"{account.name}, step {x:,.0f}: held-out accuracy {y:.2f}%" for x, y in points]
            lines.append(Line(f"{account.name}, last {points[-1][1]:.1f}%", points, says, series=i, dots=True))
            rows += [(account.name, x, y) for x, y in points]
    if lines:
        label = "Accuracy of class heads on held-out images by step; the numbers are in the table below"
        chart = Chart(lines, (), "step", "held-out accuracy (%)", label, from_zero=True, whole_x=True)
        header = "run|step:,.0f|accuracy %:.2f"
        table = Table("head-accuracy", "Held-out accuracy of class heads", header, rows)
        yield Plot(chart, "Accuracy of the runs' own class heads on held-out images.", "The numbers", table)


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Means of so many neighbouring points that at most `most` are left; x is that of the last of them.

    >>> thinned([(1, 4.0), (2, 2.0), (3, 1.0)], most=2)
    [(2, 3.0), (3, 1.0)]
    """
    size = -(-len(points) // most) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def swatches(palette: dict[str, Any]) -> dict[str, Any]:
    """How a palette is drawn: the colours by number, and below a strip in which each has the width of its share.

    Args:
        palette: what `palette.describe.describe` returns.

    Returns:
        places: (x, y, width, height, colour, what it says on hovering); width and height of all; label; caption.
    """
    colours, known = palette["colours"], palette["pixels"] is not None
    if len(colours) > MOST_COLOURS:
        colours = sorted(colours, key=lambda c: -(c["count"] or 0))[:MOST_COLOURS]
    columns = max(8, 2 ** round(math.log2(2 * len(colours)) / 2))
    side, left, places = 720 / columns, 0.0, []
    below = -(-len(colours) // columns) * side
    size, strip = f"{side - 1:g}", []
    for i, c in enumerate(colours):
        share = f"{c['share']:.2f}% of the pixels" if known else ""
        says = f"colour {c['index']}: {c['hex']}{share and ', '}{share}"
        places.append((f"{i % columns * side:g}", f"{i // columns * side:g}", size, size, c["hex"], says))
        if known:
            width = 7.2 * c["share"]
            says = f"colour {c['index']}: {share}"
            strip.append((f"{left:.2f}", f"{below + 14:g}", f"{width:.2f}", "40", c["hex"], says))
            left += width
    label, caption = f"{len(colours):,} colours, one square each", "Every colour by its number, row after row"
    if known:
        label += ", and a strip in which each is as wide as its share of the pixels"
        caption += "; below, each as wide as its share of the pixels."
    else:
        caption += "; its use is not known."
    height = f"{below + 54 * known:g}"
    return {"places": places + strip, "width": 720, "height": height, "label": label, "caption": caption}
