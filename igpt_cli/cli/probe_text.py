"""Text output of igpt probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_cli.cli.output import Voice, bars, table

if TYPE_CHECKING:
    from igpt_cli.probing.dense import DenseResult
    from igpt_cli.probing.probe import CheckpointProbe


def probe_table(found: dict[str, Any]) -> str:
    """Layers (the chosen one marked), class heads and baselines in 80 columns; then seeds and few labels."""
    rows = _rows(found)
    several, knn = "seeds" in found, "knn" in found
    tried = "rate" if "learning_rate" in found["layers"][0] else "C"
    heads = ["layer", "mean %", "deviation"] if several else ["layer", "accuracy %", "95%", "held out %", tried]
    heads += ["kNN %"] if knn else []
    cells = []
    for name, r in rows:
        value = r.get("C", r.get("learning_rate"))
        cells.append([name, _percent(r.get("accuracy_mean", r["accuracy"]))])
        if several:
            cells[-1].append(_percent(r.get("accuracy_deviation")))
        else:
            cells[-1] += [_interval(r), _percent(r["val_accuracy"]), "" if value is None else f"{value:g}"]
        if knn:
            near = r.get("knn", {})
            cells[-1].append(_percent(near.get("accuracy_mean", near.get("accuracy"))))
    room = 33 - 7 * knn + 12 * several - max(len(name) for name, _ in rows)
    drawn = bars([r.get("accuracy_mean", r["accuracy"]) for _, r in rows], 100.0, min(24, room))
    text = table([[*c, b] for c, b in zip(cells, drawn)], [*heads, ""])
    if several:
        text += "\n\n" + _seeds_table(found, tried)
    if "few_labels" in found:
        cells = [
            [
                r["labels_per_class"],
                r["n_train"],
                _percent(r["accuracy"]),
                _percent(r["deviation"]),
                ", ".join(str(x["layer"]) for x in r["repeats"]),
            ]
            for r in found["few_labels"]
        ]
        text += "\n\n" + table(cells, ["labels of a class", "labels", "accuracy %", "deviation", "layers chosen"])
    return text


def _rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What stands in the first table: layers, those together, class heads, baselines."""
    chosen = {one["layer"] for one in found.get("seeds", [found])}
    rows = [(str(r["layer"]) + (" *" if r["layer"] in chosen else ""), r) for r in found["layers"]]
    if "concat" in found:
        among = found["concat"]["layers"]
        rows.append((f"{among[0]}-{among[-1]} together", found["concat"]))
    for head in found.get("heads", []):
        rows.append((f"{head['kind']}, {Path(head['run']).name}"[:30], head))
    for name, row in found.get("floors", {}).items():
        rows.append((f"untrained, layer {row['layer']}" if "layer" in row else name, row))
    return rows


def _seeds_table(found: dict[str, Any], tried: str) -> str:
    """A row a seed at the layer that it chose, then mean and deviation."""
    knn = "knn" in found
    cells = []
    for one in found["seeds"]:
        value = one.get("C", one.get("learning_rate"))
        cells.append([one["seed"], one["layer"], _percent(one["accuracy"]), _interval(one)])
        cells[-1] += [_percent(one["val_accuracy"]), "" if value is None else f"{value:g}"]
        cells[-1] += [_percent(one["knn"]["accuracy"]), one["knn"]["layer"]] if knn else []
    for key in ("mean", "deviation"):
        cells.append([key, "", _percent(found[f"accuracy_{key}"]), "", "", ""])
        cells[-1] += [_percent(found["knn"][f"accuracy_{key}"]), ""] if knn else []
    heads = ["seed", "layer", "accuracy %", "95%", "held out %", tried]
    return table(cells, heads + (["kNN %", "kNN layer"] if knn else []))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['interval'][0]:.1f}-{row['interval'][1]:.1f}"


def explain(found: dict[str, Any], shipped: dict[str, Any] | None, voice: Voice) -> None:
    """On stderr: the headline, class heads, and what is to be borne in mind."""
    low, high = found["interval"]
    voice.say(
        f"{found['model']} layer {found['layer']}: {found['accuracy']:.1f}% of {found['n_test']:,} test images "
        f"(95%: {low:.1f} to {high:.1f}; the commonest class: {found['chance']:.1f}%), "
        f"trained on {found['n_train']:,} labels"
    )
    if "seeds" in found:
        said = ", ".join(f"{one['accuracy']:.1f}%" for one in found["seeds"])
        voice.say(
            f"that is seed {found['seed']}; {len(found['seeds'])} seeds: mean {found['accuracy_mean']:.1f}%, deviation "
            f"{found['accuracy_deviation']:.1f} ({said})"
        )
    if "knn" in found:
        near = found["knn"]
        voice.say(
            f"nearest neighbours: layer {near['layer']}, {near['accuracy']:.1f}% (95%: {near['interval'][0]:.1f} to "
            f"{near['interval'][1]:.1f})"
        )
    for head in found.get("heads", []):
        low, high = head["interval"]
        labels = "" if head["labels_per_class"] is None else f" with {head['labels_per_class']:,} labels of a class"
        voice.say(
            f"{head['run']}, {head['kind']}{labels}: {head['accuracy']:.1f}% of {head['n_test']:,} test images by its "
            f"own class head (95%: {low:.1f} to {high:.1f})"
        )
    if any(r["at_edge"] and r["layer"] == found["layer"] for r in found["layers"]):
        voice.say(f"note: what was chosen for layer {found['layer']} is at the edge of the values tried")
    if not all(r["converged"] for r in found["layers"]):
        voice.say("note: L-BFGS did not converge at some layer within 1,000 iterations")
    if shipped:
        voice.say(
            f"for comparison, builtin:igpt-tiny, trained for hours, reaches {shipped['accuracy']:.1f}% at layer "
            f"{shipped['layer']} with {shipped['n_train']:,} training and {shipped['n_test']:,} test images"
        )


def checkpoint_table(rows: Sequence[CheckpointProbe]) -> str:
    """Loss beside accuracy, one row a checkpoint."""
    cells = [
        [
            r.step,
            "-" if r.val_loss is None else f"{r.val_loss:.4f}",
            r.layer,
            f"{r.accuracy:.1f}",
            f"{r.interval[0]:.1f}-{r.interval[1]:.1f}",
        ]
        for r in rows
    ]
    return table(cells, ["step", "held-out loss", "layer", "accuracy %", "95%"])


def explain_dense(found: DenseResult, voice: Voice) -> None:
    """On stderr: the headline of `igpt probe --dense`."""
    baseline = found.commonest
    voice.say(
        f"{found.model} layer {found.layer}: mean IoU {found.mean_iou:.1f}%, {found.pixel_accuracy:.1f}% "
        f"of the pixels of {found.n_test:,} test images (always the commonest class: {baseline['mean_iou']:.1f}%, "
        f"{baseline['pixel_accuracy']:.1f}%), trained on {found.n_train:,} images"
    )


def dense_table(found: DenseResult) -> str:
    """One row a layer; the chosen layer is marked."""
    drawn = bars([row.mean_iou for row in found.layers], 100.0)
    cells = [
        [
            str(row.layer) + (" *" if row.layer == found.layer else ""),
            f"{row.mean_iou:.1f}",
            f"{row.pixel_accuracy:.1f}",
            f"{row.val_mean_iou:.1f}",
            f"{row.grid}x{row.grid}",
            bar,
        ]
        for row, bar in zip(found.layers, drawn, strict=True)
    ]
    return table(cells, ["layer", "mean IoU %", "pixels %", "held out IoU %", "grid", ""])
