"""The charts of a report: loss and accuracy by step, probe accuracy by layer, the colours of a palette."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from igpt_cli.palette.describe import describe
from igpt_cli.palette.palette import Palette
from igpt_cli.report.page_html import Cell, details, number, table, text, word
from igpt_cli.report.page_run import Account
from igpt_cli.report.svg import Level, Line, line_chart

#: A curve of more points is thinned: each is then the mean of as many steps.
MOST_POINTS = 160
#: A palette of more colours is drawn as its commonest ones.
MOST_COLOURS = 1024
UNTRAINED = "untrained network"


def loss_kind(account: Account) -> str:
    """What a run's loss is of; only those of one kind can stand in one chart."""
    model, config = account.config["model"], account.config
    if model.get("backend") != "igpt":
        return "classes, nats per image"
    if model.get("n_classes") is not None or "finetuned_from" in config:
        return "pixels and classes, weighted"
    return "masked pixels, nats per token" if model.get("objective") == "bert" else "next pixel, nats per token"


def loss_charts(accounts: Sequence[Account]) -> list[str]:
    """A figure for each kind of loss, and one of held-out accuracy where runs have it; each run has its colour."""
    kinds = sorted({loss_kind(a) for a in accounts if a.metrics}, reverse=True)
    figures = [_loss_chart(kind, [(i, a) for i, a in enumerate(accounts) if loss_kind(a) == kind]) for kind in kinds]
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
    first = accounts[0][1].config["model"]
    n = first.get("n_classes" if kind.startswith("classes") else "n_vocab")
    levels = (
        [Level(f"uniform guess, ln {n:,} = {math.log(n):.3f}", math.log(n))] if n and "weighted" not in kind else []
    )
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


def curve(account: Account, key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have it, as far as they are numbers."""
    found = [(r.get("step"), r.get(key)) for r in account.metrics]
    return [(float(x), float(y)) for x, y in found if _finite(x) and _finite(y)]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Means of so many neighbouring points that at most `most` are left; x is that of the last of them.

    >>> thinned([(1, 4.0), (2, 2.0), (3, 1.0)], most=2)
    [(2, 3.0), (3, 1.0)]
    """
    size = -(-len(points) // most) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


# Layers.


def probe_groups(accounts: Iterable[Account]) -> list[list[tuple[int, Account]]]:
    """Runs by what their probes have in common: only those of one protocol on the same images can be compared."""
    groups: dict[tuple, list[tuple[int, Account]]] = {}
    for i, account in enumerate(accounts):
        if account.probe is not None:
            keys = ("protocol", "images_sha256", "n_train", "n_test", "seed")
            groups.setdefault(tuple(account.probe.get(key) for key in keys), []).append((i, account))
    return list(groups.values())


def layer_chart(group: Sequence[tuple[int, Account]], name: str) -> str:
    """Accuracy of every layer with its 95% interval, the same networks untrained, and floors and class heads as lines.

    Models of different depth have the part of the depth as their axis: 0 the first block's input, 1 the final norm.
    """
    found = {account.name: account.probe or {} for _, account in group}
    depths = {probe["n_layers"] for probe in found.values()}
    lines: list[Line] = []
    rows: list[list[Cell]] = []
    several = len(group) > 1
    floors: dict[str, dict[float, str]] = {}
    heads: dict[str, Level] = {}
    for i, account in group:
        probe: dict[str, Any] = account.probe or {}
        scale = 1 if len(depths) == 1 else probe["n_layers"]
        chosen = f"{account.name}, {probe['accuracy']:.1f}% at layer {probe['layer']}"
        lines.append(_layer_line(account.name, chosen, probe["layers"], scale, series=i, dots=True))
        rows += _layer_rows(account.name, probe["layers"], probe["layer"])
        reached = probe.get("floors") or {}
        if sweep := (reached.get(UNTRAINED) or {}).get("layers"):
            plain = f"{account.name}, untrained" if several else UNTRAINED
            line = _layer_line(plain, plain, sweep, scale, series=i if several else None, dash=1)
            lines.append(replace(line, band=()) if several else line)
            rows += _layer_rows(plain, sweep, None)
        across = {key: row["accuracy"] for key, row in reached.items() if key != UNTRAINED}
        for key, accuracy in {"commonest class": probe["chance"], **across}.items():
            floors.setdefault(key, {}).setdefault(accuracy, account.name)
        for head in probe.get("heads") or []:
            told = f"{head['kind']} class head of {Path(head['run']).name}, {head['accuracy']:.1f}%"
            heads.setdefault(told, Level(told, head["accuracy"], series=i))
    # A floor is the same for all, unless they see the images in different colours.
    levels = [
        Level(f"{key}{f' as {name} sees them' if len(values) > 1 else ''}, {accuracy:.1f}%", accuracy)
        for key, values in floors.items()
        for accuracy, name in values.items()
    ] + list(heads.values())
    first: dict[str, Any] = group[0][1].probe or {}
    x_label = "layer" if len(depths) == 1 else "depth of the layer: 0 first block's input, 1 final norm"
    label = f"Test accuracy of linear probes by layer: {', '.join(found)}; the numbers are in the table below"
    chart = line_chart(
        lines,
        levels,
        x_label=x_label,
        y_label="test accuracy (%)",
        label=label,
        from_zero=True,
        whole_x=len(depths) == 1,
    )
    caption = (
        f"Accuracy of a linear classifier on each layer's features: protocol {first['protocol']}, "
        f"{first.get('n_train', 0):,} training and {first['n_test']:,} test images of {first.get('n_classes', 0):,} "
        f"classes ({first.get('tokens')}). Shaded: 95% Wilson intervals of {first['n_test']:,} test images. The layer "
        f"named in the key was chosen on a held-out part of the training images. Lines across: floors, which need no "
        f"trained network{', and class heads' if heads else ''}."
    )
    header = ["network", "layer", "test %", "from", "to", "held-out %", "chosen"]
    return chart_figure(chart, caption, details("Every layer", table(name, "Probe of every layer", header, rows, True)))


def _layer_line(name: str, key: str, rows: Sequence[dict[str, Any]], scale: float, **style: Any) -> Line:
    says = [f"{name}, layer {r['layer']}: {r['accuracy']:.1f}% ({_interval(r['interval'])})" for r in rows]
    points = [(r["layer"] / scale, r["accuracy"]) for r in rows]
    return Line(key, points, says, band=[tuple(r["interval"]) for r in rows], **style)


def _layer_rows(name: str, rows: Sequence[dict[str, Any]], chosen: int | None) -> list[list[Cell]]:
    return [
        [
            word(name),
            number(row["layer"]),
            *(number(value, ".1f") for value in (row["accuracy"], *row["interval"], row.get("val_accuracy"))),
            word("yes" if row["layer"] == chosen else None),
        ]
        for row in rows
    ]


def _interval(pair: Sequence[float]) -> str:
    return f"95%: {pair[0]:.1f} to {pair[1]:.1f}"


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
