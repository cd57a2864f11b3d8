"""Figures of accuracy by layer and by loss, and the style of all."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.files import replacing
from igpt_cli.probing.layers import place
from igpt_cli.probing.probe import UNTRAINED, CheckpointProbe
from igpt_cli.probing.token_cosine import TokenCosine

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#047857", "#6b7280"
#: Of one model after the other, and of those whose colour comes again.
COLOURS = (BLUE, ORANGE, GREEN, "#7c3aed", "#be123c", "#0e7490", "#a16207", "#4b5563")
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {
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


def new_figure(width: float = 6.4, height: float = 3.6, **layout: Any):
    """A figure of so many inches in the style of all, and its axes; `layout` as for matplotlib's `subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(figsize=(width, height), **layout)


def legend(owner, handles: Sequence[Any] | None = None, **where: Any) -> None:
    """The legend of a figure or of axes; its texts are not formulas, whatever a name holds."""
    given = {} if handles is None else {"handles": handles}
    for text in owner.legend(**given, fontsize=8, frameon=False, **where).get_texts():
        text.set_parse_math(False)


def save(figure, path: Path) -> None:
    """Write a figure (.png, .svg or .pdf by the name), whole or not at all, and close it."""
    from matplotlib import pyplot as plt

    try:
        with replacing(path) as part, plt.rc_context(STYLE):
            figure.savefig(part)
    finally:
        plt.close(figure)


def layer_curve(
    curves: Mapping[str, Sequence[dict[str, Any]]],
    baselines: dict[str, float],
    path: Path | str,
    title: str = "",
    few: Sequence[dict[str, Any]] = (),
    heads: dict[str, float] | None = None,
) -> None:
    """Probe accuracy by layer with its 95% interval, baselines as lines; to the right, accuracy by number of labels.

    Of several seeds it is their mean, with a band of one standard deviation on each side.

    Args:
        curves: {label: rows with layer, accuracy and interval in percent, and of several seeds accuracy_mean and
            accuracy_deviation}; the first is drawn strongest.
        baselines: {label: accuracy in percent}.
        few: rows of `probing.protocol.few_labels`: labels_per_class, accuracy, deviation, repeats.
        heads: {label: accuracy in percent} of class heads, such as a fine-tuned model's.
    """
    if few:
        figure, (axes, right) = new_figure(width=10.4, ncols=2, sharey=True, width_ratios=(5, 2))
        _few_labels(right, few)
    else:
        figure, axes = new_figure(width=8.2)
    for (label, rows), colour in zip(curves.items(), (BLUE, ORANGE, GREY, "#7c3aed", "#be185d")):
        layers = [place(row["layer"])[0] for row in rows]
        means, low, high = np.transpose([spread(row) for row in rows])
        if len(rows) == 1:  # a point has no area
            axes.vlines(layers, low, high, color=colour, alpha=0.4)
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(layers, means, "o-", color=colour, markersize=3, linewidth=1.5, label=label)
    for (label, accuracy), dashes in zip((heads or {}).items(), ("-", "--", ":", "-.")):
        axes.axhline(accuracy, color=GREEN, linewidth=1.3, linestyle=dashes, label=f"{label}, {accuracy:.1f}%")
    for (label, accuracy), dots in zip(baselines.items(), ("--", ":", "-.", (0, (1, 4)), (0, (8, 3)))):
        axes.axhline(accuracy, color=GREY, linewidth=1.1, linestyle=dots, label=f"{label}, {accuracy:.1f}%")
    axes.set(xlabel="layer", ylabel="test accuracy (%)")
    axes.set_title(title, parse_math=False)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    legend(figure, loc="outside right upper")
    save(figure, Path(path))


def _few_labels(axes, few: Sequence[dict[str, Any]]) -> None:
    """Mean and standard deviation over subsets against the number of labels, and each subset as a dot."""
    xs, numbers = range(len(few)), [row["labels_per_class"] for row in few]
    for x, row in zip(xs, few):
        found = [one["accuracy"] for one in row["repeats"]]
        axes.plot([x + 0.15] * len(found), found, "o", color=BLUE, alpha=0.35, markersize=4, markeredgewidth=0)
    means, stds = [row["accuracy"] for row in few], [row["deviation"] or 0 for row in few]
    axes.errorbar(xs, means, stds, fmt="o-", color=BLUE, markersize=4, linewidth=1.5, capsize=3)
    axes.set(xlabel="labels of each class", title="few labels", xlim=(-0.5, len(few) - 0.5))
    axes.set_xticks(xs, [f"{n:,}" for n in numbers])


def probe_figure(found: dict[str, Any], path: Path | str) -> None:
    """The layer curve of one probe result (what `probing.probe.probe` returns), and few labels where it has them."""
    floors = found.get("floors", {})
    networks = {found["model"]: found["layers"]}
    if UNTRAINED in floors:
        networks[UNTRAINED] = floors[UNTRAINED]["layers"]
    curves = {
        f"{network}, {SITES[site]}" if site else network: rows
        for network, layers in networks.items()
        for site, rows in by_site(layers).items()
    }
    heads = {f"{head['kind']}: {Path(head['run']).name}": head["accuracy"] for head in found.get("heads", [])}
    lines = {"most frequent class": found["chance"]}
    flat = {name: row for name, row in floors.items() if name != UNTRAINED}
    lines |= {name: row.get("accuracy_mean", row["accuracy"]) for name, row in flat.items()}
    title = f"{found['n_train']:,} training, {found['n_test']:,} test images ({found['protocol']})"
    title = f"{fitting(Path(str(found['tokens'])).name, 10.8, 140)}: {title}"
    if "seeds" in found:
        title += f"\nmean and standard deviation of {len(found['seeds'])} seeds"
    layer_curve(curves, lines, path, title, found.get("few_labels", ()), heads)


def by_site(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{"": rows of whole layers, "attention" or "mlp": rows of places within blocks}."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        out.setdefault(place(row["layer"])[1], []).append(row)
    return out


def spread(row: dict[str, Any]) -> tuple[float, float, float]:
    """An accuracy with its interval; of several seeds their mean, with one standard deviation on each side."""
    if "accuracy_mean" in row:
        mean, std = row["accuracy_mean"], row["accuracy_deviation"]
        return mean, mean - std, mean + std
    return row["accuracy"], *row["interval"]


#: What a curve of values within blocks is called.
SITES = {"attention": "attention", "mlp": "MLP"}
#: Up to so many classes have their names and percentages in a confusion matrix.
MANY_CLASSES = 20


def confusion_figure(found: dict[str, Any], path: Path | str) -> None:
    """The confusion matrix of a probe result with `details`: for each true class, the percentages predicted."""
    counts = np.array(found["details"]["confusion"], float)
    names = found["details"]["classes"]
    names = [names[k] if k < len(names) else str(k) for k in range(len(counts))]
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(counts) <= MANY_CLASSES
    side = 2.2 + 0.42 * len(counts) if few else 7.0
    figure, axes = new_figure(width=side + 0.9, height=side)
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if few:
        for (row, column), value in np.ndenumerate(percent):
            colour = "white" if value > 55 else "#111827"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        shortened = [fitting(name, 9, 80) for name in names]
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, shortened)) > 3 else {}
        axes.set_xticks(range(len(names)), shortened, parse_math=False, **turned)
        axes.set_yticks(range(len(names)), shortened, parse_math=False)
        axes.tick_params(length=0)
    axes.set(xlabel="predicted", ylabel="true class")
    heading = f"{found['model']} layer {found['layer']}: {found['accuracy']:.1f}% of {found['n_test']:,} test images"
    width, images = 72 * side, fitting(Path(str(found["tokens"])).name, 10.8, 72 * side - 12)
    below = wrapped(f"{images}, {found['n_train']:,} training images ({found['protocol']})", 10.8, width)
    axes.set_title("\n".join([fitting(heading, 10.8, width), *below]), parse_math=False)
    bar = figure.colorbar(shown, label="% of the true class", shrink=0.8)
    bar.outline.set_visible(False)
    save(figure, Path(path))


def loss_against_accuracy(rows: Sequence[CheckpointProbe], path: Path | str, title: str = "") -> None:
    """Probe accuracy against held-out loss, a point for each checkpoint, joined in the order of steps (figure 3).

    Args:
        rows: of `probing.probe.probe_checkpoints`; those without val_loss are skipped.
    """
    known = [r for r in rows if r.val_loss is not None]
    figure, axes = new_figure()
    losses, accuracies = [r.val_loss for r in known], [r.accuracy for r in known]
    errors = np.abs(np.array([r.interval for r in known]).reshape(-1, 2).T - accuracies)
    axes.errorbar(losses, accuracies, errors, fmt="o-", color=BLUE, ecolor=GREY, elinewidth=0.8, markersize=4)
    for row in known:
        top = (row.val_loss, row.interval[1])
        axes.annotate(f"{row.step:,}", top, (-2, 3), textcoords="offset points", fontsize=7, rotation=45)
    axes.invert_xaxis()  # training goes to the right
    axes.set(xlabel="held-out loss (nats per token); at the points: steps", ylabel="test accuracy (%)", title=title)
    save(figure, Path(path))


def cosine_curve(found: TokenCosine, path: Path | str) -> None:
    """How alike class and distillation token of a model are, by layer: what `probing.token_cosine` found."""
    figure, axes = new_figure()
    axes.plot(range(len(found.cosines)), found.cosines, "o-", color=BLUE, markersize=4)
    axes.set(xlabel="layer", ylabel="cosine of class and distillation token")
    title = f"{found.model}: its two tokens, mean over {found.n_images:,} images ({found.split})"
    axes.set_title(fitting(title, 10.8, 400), parse_math=False)
    axes.set_ylim(min(0.0, *found.cosines), 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    save(figure, Path(path))


def sheet(width: int, height: int):
    """A figure of so many dots, and axes all over it in which a unit is a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        dpi = plt.rcParams["figure.dpi"]
        figure = plt.figure(figsize=(width / dpi, height / dpi), layout="none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
    return figure, axes


def wrapped(text: str, size: float, width: float) -> list[str]:
    """The text on lines of at most `width` points, broken between words."""
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _wide(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _wide(text: str, size: float) -> float:
    """How wide a line is, in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    style = FontProperties(size=size)
    return TextToPath().get_text_width_height_descent(text, style, ismath=False)[0] / 0.98  # dots round glyphs up


def fitting(text: str, size: float, width: float) -> str:
    """The text on one line of `width` points, shortened in the middle where it is too long; odd characters escaped."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    has = get_font(findfont(FontProperties(size=size))).get_char_index
    text = "".join(c if c.isprintable() and has(ord(c)) else c.encode("unicode_escape").decode() for c in text)

    def shortened(keep: int) -> str:
        return text[: -(-keep // 2)] + "…" + text[len(text) - keep // 2 :]

    if _wide(text, size) <= width:
        return text
    return shortened(bisect_right(range(1, len(text)), width, key=lambda keep: _wide(shortened(keep), size)))
