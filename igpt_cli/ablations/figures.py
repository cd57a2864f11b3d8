"""The picture of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igpt_cli.report.compare_figures import COLOURS
from igpt_cli.report.figures import BLUE, GREEN, GREY, ORANGE, fitting, layer_curve, new_figure, save


def picture(document: Mapping[str, Any], path: Path | str) -> None:
    """Write the .png, .svg or .pdf picture that suits an ablation, from what `runner.ablate` returns."""
    if "cost" in document:
        cost_figure(document["cost"], path)
    elif curves := _curves(document):
        heads = {row["label"]: row["accuracy"] for row in document["arms"] if row["how"] == "finetune"}
        tests = document["rows"][0]["n_test"]
        layer_curve(
            curves,
            {"commonest class": document["chance"]},
            path,
            f"Probe of every layer, {tests:,} test images",
            heads={k: v for k, v in heads.items() if v is not None},
        )
    else:
        accuracy_figure(document, path)


def _curves(document: Mapping[str, Any]) -> dict[str, Sequence[dict[str, Any]]]:
    """{label: one row a layer} of what was probed."""
    if "layers" in document:
        label = document["settings"]["run"] or document["arms"][0]["label"]
        return {Path(label).name: document["layers"]}
    return {row["label"]: row["layers"] for row in document["arms"] if "layers" in row}


def accuracy_figure(document: Mapping[str, Any], path: Path | str) -> None:
    """On the left our test accuracies with 95% intervals, on the right the paper's numbers, one line a run."""
    rows = document["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row["paper"]))
    figure, (ours, theirs) = new_figure(8.2, 1.5 + 0.3 * len(rows), ncols=2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        if row["accuracy"] is not None:
            ours.hlines(place, *row["interval"], color=BLUE, alpha=0.35, linewidth=3)
            ours.plot(row["accuracy"], place, "o", color=BLUE, markersize=6)
            ours.annotate(
                f"{row['accuracy']:.1f}",
                (row["accuracy"], place),
                (0, 5),
                textcoords="offset points",
                fontsize=7,
                ha="center",
            )
    for i, column in enumerate(columns):
        known = [(row["paper"][column], place) for place, row in enumerate(rows) if column in row["paper"]]
        x, y = zip(*known)
        theirs.plot(x, y, "osD^"[i % 4], color=(ORANGE, GREEN, COLOURS[3])[i % 3], markersize=6, label=column)
    ours.axvline(document["chance"], color=GREY, linewidth=1.1, linestyle="--")
    ours.set_yticks(range(len(rows)), [fitting(row["label"], 9, 150) for row in rows], parse_math=False)
    ours.set_ylim(len(rows) - 0.5, -0.7)
    ours.margins(x=0.1)
    tests = max((row["n_test"] or 0 for row in rows), default=0)
    ours.set(xlabel=f"test accuracy (%), {tests:,} images; dashed: commonest class", title="here, with 95% intervals")
    theirs.set(xlabel=_unit(columns), title="the paper")
    theirs.tick_params(left=False)
    figure.legend(loc="outside lower right", fontsize=8, frameon=False, ncols=max(1, len(columns)))
    save(figure, Path(path))


def _unit(columns: Sequence[str]) -> str:
    return "%, AP, mIoU" if "COCO" in columns else "accuracy (%)"


def cost_figure(cost: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """Multiply-adds by the equations, and the time measured, against the side of the image; both axes logarithmic."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    from igpt_cli.ablations.window_cost import LAYERS

    sides = [row["resolution"] for row in cost]
    figure, (work, time) = new_figure(8.6, 3.9, ncols=2)
    looks = {"global": (ORANGE, "o", "-"), "windows": (BLUE, "s", "-"), "swin": (GREEN, "D", "--")}
    for kind, equation in (("global", "equation 1"), ("windows", "equation 2")):
        colour, form, dashes = looks[kind]
        values = [row["multiply_adds"][kind] / 1e6 for row in cost]
        work.plot(sides, values, form + dashes, color=colour, markersize=4, label=f"{LAYERS[kind]}, {equation}")
    for kind, label in LAYERS.items():
        colour, form, dashes = looks[kind]
        known = [(row["resolution"], 1000 * row["seconds"][kind]) for row in cost if row["seconds"][kind]]
        if known:
            time.plot(*zip(*known), form + dashes, color=colour, markersize=4, label=label)
    for axes, title, unit in (
        (work, "by the equations", "million multiply-adds"),
        (time, "measured, forward", "milliseconds"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel=unit, title=title)
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.legend(frameon=False, fontsize=8)
        axes.tick_params(labelcolor=GREY)
    save(figure, Path(path))
