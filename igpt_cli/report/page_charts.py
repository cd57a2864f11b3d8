"""The charts of a report but that of the layers: loss and accuracy by step, the colours of a palette."""

from __future__ import annotations

import math
from collections.abc import Sequence

from igpt_cli.palette.describe import describe
from igpt_cli.palette.palette import Palette
from igpt_cli.report.losses import by_kind, curve, uniform_guess
from igpt_cli.report.page_html import details, number, table, text, word
from igpt_cli.report.page_run import Account
from igpt_cli.report.svg import Level, Line, line_chart

#: A curve of more points is thinned: each is then the mean of as many steps.
MOST_POINTS = 160
#: A palette of more colours is drawn as its commonest ones.
MOST_COLOURS = 1024
UNTRAINED = "untrained network"


def loss_charts(accounts: Sequence[Account]) -> list[str]:
    """A figure for each kind of loss, and one of held-out accuracy where runs have it; each run has its colour."""
    figures = [_loss_chart(kind, [(i, accounts[i]) for i in members]) for kind, members in by_kind(accounts).items()]
    return [figure for figure in [*figures, _accuracy_chart(list(enumerate(accounts)))] if figure]


def _loss_chart(kind: str, accounts: Sequence[tuple[int, Account]]) -> str:
    lines, rows = [], []
    for i, account in accounts:
        train, held_out = curve(account, "loss"), curve(account, "val_loss")
        if thin := thinned(train):
            span = "" if len(train) <= MOST_POINTS else f", mean of {-(-len(train) // MOST_POINTS):,} steps"
            says = [f"{account.name}, step {x:,.0f}: training loss {y:.3f}{span}" for x, y in thin]
            lines.append(Line(f"{account.name}, training", thin, says, series=i))
        if held_out:
            says = [f"{account.name}, step {x:,.0f}: held-out loss {y:.4f}" for x, y in held_out]
            name = f"{account.name}, held out, last {held_out[-1][1]:.3f}"
            lines.append(Line(name, held_out, says, series=i, dots=True, joined=False))
            rows += [[word(account.name), number(x, ",.0f"), number(y, ".4f")] for x, y in held_out]
    if not lines:
        return ""
    n = uniform_guess(kind, accounts[0][1])
    levels = [Level(f"uniform guess, ln {n:,} = {math.log(n):.3f}", math.log(n))] if n else []
    label = f"Loss by step ({kind}) of {', '.join(a.name for _, a in accounts)}; the numbers are in the table below"
    chart = line_chart(lines, levels, x_label="step", y_label=f"loss ({kind})", label=label, whole_x=True)
    name = "loss-" + kind.split()[0].strip(",")
    below = details("Held-out losses", table(name, f"Held-out loss ({kind})", ["run", "step", "loss"], rows, True))
    return chart_figure(chart, f"Loss by step: {kind}.", below if rows else "")


def _accuracy_chart(accounts: Sequence[tuple[int, Account]]) -> str:
    lines, rows = [], []
    for i, account in accounts:
        if points := curve(account, "val_accuracy"):
            says = [f"{account.name}, step {x:,.0f}: held-out accuracy {y:.2f}%" for x, y in points]
            lines.append(Line(f"{account.name}, last {points[-1][1]:.1f}%", points, says, series=i, dots=True))
            rows += [[word(account.name), number(x, ",.0f"), number(y, ".2f")] for x, y in points]
    if not lines:
        return ""
    label = "Accuracy of class heads on held-out images by step; the numbers are in the table below"
    chart = line_chart(
        lines, x_label="step", y_label="held-out accuracy (%)", label=label, from_zero=True, whole_x=True
    )
    numbers = table("head-accuracy", "Held-out accuracy of class heads", ["run", "step", "accuracy %"], rows, True)
    return chart_figure(
        chart, "Accuracy of the runs' own class heads on held-out images.", details("The numbers", numbers)
    )


def chart_figure(chart: str, caption: str, below: str = "") -> str:
    """A chart with its caption, and what it shows in numbers."""
    return (
        f'<figure class="plot">{chart}<p class="tip" role="status" hidden></p>'
        f"<figcaption>{text(caption)}</figcaption>{below}</figure>"
    )


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Means of so many neighbouring points that at most `most` are left; x is that of the last of them.

    >>> thinned([(1, 4.0), (2, 2.0), (3, 1.0)], most=2)
    [(2, 3.0), (3, 1.0)]
    """
    size = -(-len(points) // most) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


# Colours.


def palette_chart(palette: Palette) -> str:
    """The colours by number, and below a strip in which each has the width of its share of the pixels."""
    told = describe(palette)
    colours = told["colours"]
    if len(colours) > MOST_COLOURS:
        colours = sorted(colours, key=lambda c: -(c["count"] or 0))[:MOST_COLOURS]
    known = told["pixels"] is not None
    columns = max(8, 2 ** round(math.log2(2 * len(colours)) / 2))
    side = 720 / columns
    rows = -(-len(colours) // columns)
    height = rows * side + (14 + 40 if known else 0)
    parts = []
    for i, colour in enumerate(colours):
        share = f", {colour['share']:.2f}% of the pixels" if known else ""
        title = f"<title>colour {colour['index']}: {colour['hex']}{share}</title>"
        at = f'x="{i % columns * side:g}" y="{i // columns * side:g}" width="{side - 1:g}" height="{side - 1:g}"'
        parts.append(f'<rect {at} fill="{colour["hex"]}">{title}</rect>')
    if known:
        left = 0.0
        for colour in colours:
            width = 7.2 * colour["share"]
            title = f"<title>colour {colour['index']}: {colour['share']:.2f}% of the pixels</title>"
            place = f'x="{left:.2f}" y="{rows * side + 14:g}" width="{width:.2f}" height="40"'
            parts.append(f'<rect {place} fill="{colour["hex"]}">{title}</rect>')
            left += width
    label = f"{len(colours):,} colours, one square each"
    label += ", and a strip in which each is as wide as its share of the pixels" if known else ""
    box = f'viewBox="0 0 720 {height:g}" role="img" aria-label="{label}"'
    return f'<svg class="colours" {box}>{"".join(parts)}</svg>'
