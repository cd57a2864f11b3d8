"""Layer charts of a report, one for all comparable probes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from igpt_cli.probing.layers import place
from igpt_cli.probing.probe import UNTRAINED
from igpt_cli.report.compare_figures import DEPTH
from igpt_cli.report.figures import by_site, spread
from igpt_cli.report.html import Table
from igpt_cli.report.page_charts import Plot
from igpt_cli.report.page_run import Account
from igpt_cli.report.svg import Chart, Level, Line

#: The number of a run, which is its colour, its name, and its probe.
Probed = tuple[int, str, dict[str, Any]]


def probe_groups(accounts: Iterable[Account]) -> list[list[Probed]]:
    """Runs by what their probes have in common: only those of one protocol on the same images can be compared."""
    groups: dict[tuple, list[Probed]] = {}
    for i, account in enumerate(accounts):
        if account.probe is not None:
            alike = tuple(map(account.probe.get, ("protocol", "images_sha256", "n_train", "n_test", "seed")))
            groups.setdefault(alike, []).append((i, account.name, account.probe))
    return list(groups.values())


def layer_plot(group: Sequence[Probed], name: str) -> Plot:
    """Accuracy of every layer with its 95% interval, untrained networks, and baselines and class heads as lines.

    Models of different depth have the part of the depth as their axis: 0 the first block's input, 1 the final norm.
    """
    probes = [probe for _, _, probe in group]
    first, same_depth = probes[0], len({probe["n_layers"] for probe in probes}) == 1
    heads = _heads(group)
    chart = Chart(
        [line for probed in group for line in _lines(*probed, same_depth, several=len(group) > 1)],
        [*_baselines(group), *heads],
        x_label="layer" if same_depth else DEPTH,
        y_label="test accuracy (%)",
        label=f"Test accuracy of linear probes by layer: {', '.join(name for _, name, _ in group)}; the numbers are in "
        "the table below",
        from_zero=True,
        whole_x=same_depth,
    )
    shaded = f"95% Wilson intervals of {first['n_test']:,} test images"
    if any("seeds" in probe for probe in probes):
        shaded += "; where there were several seeds, one standard deviation on each side of their mean"
    caption = (
        f"Accuracy of a linear classifier on each layer's features: protocol {first['protocol']}, "
        f"{first.get('n_train', 0):,} training and {first['n_test']:,} test images of {first.get('n_classes', 0):,} "
        f"classes ({first.get('tokens')}). Shaded: {shaded}. The layer named in the key was chosen on a held-out part "
        f"of the training images. Lines across: baselines, which need no trained network"
        f"{', and class heads' if heads else ''}."
    )
    rows = [
        (network, row["layer"], *spread(row), row.get("val_accuracy"), "yes" if chosen else None)
        for _, run, probe in group
        for network, row, chosen in [
            *((run, row, row["layer"] == probe["layer"]) for row in probe["layers"]),
            *((_untrained_name(run, len(group) > 1), row, False) for row in _untrained(probe)),
        ]
    ]
    header = "network|layer:layer|test %:.1f|from:.1f|to:.1f|held-out %:.1f|chosen"
    return Plot(chart, caption, "Every layer", Table(name, "Probe of every layer", header, rows))


def _lines(i: int, run: str, probe: dict[str, Any], same_depth: bool, several: bool) -> Iterator[Line]:
    """The curves of a run: its layers, places within its blocks, and the same network untrained."""
    scale = 1 if same_depth else probe["n_layers"]
    for site, rows in by_site(probe["layers"]).items():
        line = _line(f"{run}, {site} within blocks" if site else run, rows, scale)
        if site:
            yield replace(line, series=i, dash=2 + (site == "mlp"))
        else:
            key = f"{run}, {probe['accuracy']:.1f}% at layer {probe['layer']}"
            yield replace(line, name=key, series=i, dots=True)
    if rows := _untrained(probe):
        line = replace(_line(_untrained_name(run, several), by_site(rows).get("", rows), scale), dash=1)
        # Of several runs these would only cover each other; the table has their intervals.
        yield replace(line, series=i, band=()) if several else replace(line, series=None)


def _line(name: str, rows: Sequence[dict[str, Any]], scale: float) -> Line:
    points, says, band = [], [], []
    for row in rows:
        value, low, high = spread(row)
        within = "std of the seeds" if "accuracy_mean" in row else "95%"
        points.append((place(row["layer"])[0] / scale, value))
        says.append(f"{name}, layer {row['layer']}: {value:.1f}% ({within}: {low:.1f} to {high:.1f})")
        band.append((low, high))
    return Line(name, points, says, band)


def _baselines(group: Sequence[Probed]) -> list[Level]:
    """What needs no trained network. It is the same for all, unless they see the images in different colours."""
    baselines: dict[str, dict[float, str]] = {}
    for _, run, probe in group:
        reached = {"commonest class": probe["chance"]}
        reached |= {key: spread(row)[0] for key, row in (probe.get("floors") or {}).items() if key != UNTRAINED}
        for key, accuracy in reached.items():
            baselines.setdefault(key, {}).setdefault(accuracy, run)
    return [
        Level(f"{key}{f' as {run} sees them' if len(values) > 1 else ''}, {accuracy:.1f}%", accuracy)
        for key, values in baselines.items()
        for accuracy, run in values.items()
    ]


def _heads(group: Sequence[Probed]) -> list[Level]:
    """What class heads reached on the same images, each once, in the colour of the first run that names it."""
    levels: dict[str, Level] = {}
    for i, _, probe in group:
        for head in probe.get("heads") or []:
            name = f"{head['kind']} class head of {Path(head['run']).name}, {head['accuracy']:.1f}%"
            levels.setdefault(name, Level(name, head["accuracy"], series=i))
    return list(levels.values())


def _untrained(probe: dict[str, Any]) -> list[dict[str, Any]]:
    return ((probe.get("floors") or {}).get(UNTRAINED) or {}).get("layers") or []


def _untrained_name(run: str, several: bool) -> str:
    return f"{run}, untrained" if several else UNTRAINED
