"""What the layers know: the charts of probes in a report, a chart for all that can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from igpt_cli.probing.layers import place
from igpt_cli.probing.probe import UNTRAINED
from igpt_cli.report.page_charts import chart_figure
from igpt_cli.report.page_html import Cell, details, number, table, text, word
from igpt_cli.report.page_run import Account
from igpt_cli.report.svg import Level, Line, line_chart

#: A run with its number, which is its colour.
Group = Sequence[tuple[int, Account]]


def probe_groups(accounts: Iterable[Account]) -> list[Group]:
    """Runs by what their probes have in common: only those of one protocol on the same images can be compared."""
    groups: dict[tuple, list[tuple[int, Account]]] = {}
    for i, account in enumerate(accounts):
        if account.probe is not None:
            keys = ("protocol", "images_sha256", "n_train", "n_test", "seed")
            groups.setdefault(tuple(account.probe.get(key) for key in keys), []).append((i, account))
    return list(groups.values())


def layer_chart(group: Group, name: str) -> str:
    """Accuracy of every layer with its 95% interval, the same networks untrained, and floors and class heads as lines.

    Models of different depth have the part of the depth as their axis: 0 the first block's input, 1 the final norm.
    """
    probes: list[dict[str, Any]] = [account.probe or {} for _, account in group]
    first, same_depth = probes[0], len({probe["n_layers"] for probe in probes}) == 1
    lines = [line for i, account in group for line in _lines(i, account, same_depth, several=len(group) > 1)]
    levels, heads = _floors(group), _heads(group)
    chart = line_chart(
        lines,
        levels + heads,
        x_label="layer" if same_depth else "depth of the layer: 0 first block's input, 1 final norm",
        y_label="test accuracy (%)",
        label=f"Test accuracy of linear probes by layer: {', '.join(account.name for _, account in group)}; the "
        "numbers are in the table below",
        from_zero=True,
        whole_x=same_depth,
    )
    shaded = f"95% Wilson intervals of {first['n_test']:,} test images"
    if any("seeds" in probe for probe in probes):
        shaded += "; where there were several seeds, a deviation on each side of their mean"
    caption = (
        f"Accuracy of a linear classifier on each layer's features: protocol {first['protocol']}, "
        f"{first.get('n_train', 0):,} training and {first['n_test']:,} test images of {first.get('n_classes', 0):,} "
        f"classes ({first.get('tokens')}). Shaded: {shaded}. The layer named in the key was chosen on a held-out part "
        f"of the training images. Lines across: floors, which need no trained network"
        f"{', and class heads' if heads else ''}."
    )
    rows = [row for _, account in group for row in _rows(account, several=len(group) > 1)]
    header = ["network", "layer", "test %", "from", "to", "held-out %", "chosen"]
    return chart_figure(chart, caption, details("Every layer", table(name, "Probe of every layer", header, rows, True)))


def _lines(i: int, account: Account, same_depth: bool, several: bool) -> list[Line]:
    """The curves of a run: its layers, places within its blocks, and the same network untrained."""
    probe: dict[str, Any] = account.probe or {}
    scale = 1 if same_depth else probe["n_layers"]
    lines = []
    for site, rows in by_site(probe["layers"]).items():
        name = f"{account.name}, {site} within blocks" if site else account.name
        line = _line(name, rows, scale)
        if site:
            lines.append(replace(line, series=i, dash=2 + (site == "mlp")))
        else:
            key = f"{name}, {probe['accuracy']:.1f}% at layer {probe['layer']}"
            lines.append(replace(line, name=key, series=i, dots=True))
    if rows := _untrained(account):
        line = _line(_untrained_name(account, several), by_site(rows).get("", rows), scale)
        # Of several runs these would only cover each other; the table has their intervals.
        lines.append(replace(line, series=i, dash=1, band=()) if several else replace(line, series=None, dash=1))
    return lines


def _line(name: str, rows: Sequence[dict[str, Any]], scale: float) -> Line:
    points, says, band = [], [], []
    for row in rows:
        value, low, high = spread(row)
        within = "deviation of the seeds" if "accuracy_mean" in row else "95%"
        points.append((place(row["layer"])[0] / scale, value))
        says.append(f"{name}, layer {row['layer']}: {value:.1f}% ({within}: {low:.1f} to {high:.1f})")
        band.append((low, high))
    return Line(name, points, says, band)


def _floors(group: Group) -> list[Level]:
    """What needs no trained network. It is the same for all, unless they see the images in different colours."""
    floors: dict[str, dict[float, str]] = {}
    for _, account in group:
        probe: dict[str, Any] = account.probe or {}
        reached = {"commonest class": probe["chance"]}
        reached |= {key: spread(row)[0] for key, row in (probe.get("floors") or {}).items() if key != UNTRAINED}
        for key, accuracy in reached.items():
            floors.setdefault(key, {}).setdefault(accuracy, account.name)
    return [
        Level(f"{key}{f' as {name} sees them' if len(values) > 1 else ''}, {accuracy:.1f}%", accuracy)
        for key, values in floors.items()
        for accuracy, name in values.items()
    ]


def _heads(group: Group) -> list[Level]:
    """What class heads reached on the same images, each once, in the colour of the first run that names it."""
    levels: dict[str, Level] = {}
    for i, account in group:
        for head in (account.probe or {}).get("heads") or []:
            told = f"{head['kind']} class head of {Path(head['run']).name}, {head['accuracy']:.1f}%"
            levels.setdefault(told, Level(told, head["accuracy"], series=i))
    return list(levels.values())


def _rows(account: Account, several: bool) -> list[list[Cell]]:
    """The curves of a run in numbers."""
    probe: dict[str, Any] = account.probe or {}
    named = [(account.name, row, row["layer"] == probe["layer"]) for row in probe["layers"]]
    named += [(_untrained_name(account, several), row, False) for row in _untrained(account)]
    return [
        [
            word(name),
            layer_cell(row["layer"]),
            *(number(value, ".1f") for value in (*spread(row), row.get("val_accuracy"))),
            word("yes" if chosen else None),
        ]
        for name, row, chosen in named
    ]


def _untrained(account: Account) -> list[dict[str, Any]]:
    floors = (account.probe or {}).get("floors") or {}
    return (floors.get(UNTRAINED) or {}).get("layers") or []


def _untrained_name(account: Account, several: bool) -> str:
    return f"{account.name}, untrained" if several else UNTRAINED


def spread(row: dict[str, Any]) -> tuple[float, float, float]:
    """An accuracy with its interval; of several seeds their mean, with a deviation on each side."""
    if "accuracy_mean" in row:
        mean, deviation = row["accuracy_mean"], row["accuracy_deviation"]
        return mean, mean - deviation, mean + deviation
    low, high = row["interval"]
    return row["accuracy"], low, high


def by_site(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{"": rows of whole layers, "attention" or "mlp": rows of places within blocks}."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        out.setdefault(place(row["layer"])[1], []).append(row)
    return out


def layer_cell(layer: int | str) -> Cell:
    """A layer, or a place within a block, which comes behind the block's input.

    >>> layer_cell("3.mlp")
    Cell(html='3.mlp', key=3.5)
    """
    block, site = place(layer)
    return Cell(text(layer), block + {"": 0.0, "attention": 0.25, "mlp": 0.5}.get(site, 0.75))
