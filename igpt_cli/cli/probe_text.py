"""What igpt probe prints: a row a layer, or a checkpoint, and what people are told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igpt_cli.cli.output import Voice, bars, table


def probe_table(found: dict[str, Any]) -> str:
    """One row a layer, then class heads and floors, in 80 columns; the chosen layer is marked."""
    rows = [(str(r["layer"]) + (" *" if r["layer"] == found["layer"] else ""), r) for r in found["layers"]]
    if "concat" in found:
        among = found["concat"]["layers"]
        rows.append((f"{among[0]}-{among[-1]} together", found["concat"]))
    for head in found.get("heads", []):
        rows.append((f"{head['kind']}, {Path(head['run']).name}"[:30], head))
    for name, row in found.get("floors", {}).items():
        rows.append((f"untrained, layer {row['layer']}" if "layer" in row else name, row))
    cells = [
        [
            name,
            f"{r['accuracy']:.1f}",
            f"{r['interval'][0]:.1f}-{r['interval'][1]:.1f}",
            "" if r["val_accuracy"] is None else f"{r['val_accuracy']:.1f}",
            "" if (value := r.get("C", r.get("learning_rate"))) is None else f"{value:g}",
        ]
        for name, r in rows
    ]
    drawn = bars([r["accuracy"] for _, r in rows], 100.0, min(24, 33 - max(len(name) for name, _ in rows)))
    tried = "rate" if "learning_rate" in found["layers"][0] else "C"
    text = table([[*c, b] for c, b in zip(cells, drawn)], ["layer", "accuracy %", "95%", "held out %", tried, ""])
    if "few_labels" in found:
        cells = [
            [
                r["labels_per_class"],
                r["n_train"],
                f"{r['accuracy']:.1f}",
                "" if r["deviation"] is None else f"{r['deviation']:.1f}",
                ", ".join(str(x["layer"]) for x in r["repeats"]),
            ]
            for r in found["few_labels"]
        ]
        text += "\n\n" + table(cells, ["labels of a class", "labels", "accuracy %", "deviation", "layers chosen"])
    return text


def explain(found: dict[str, Any], voice: Voice) -> None:
    """On stderr: the headline, class heads, and what is to be borne in mind."""
    low, high = found["interval"]
    voice.say(
        f"{found['model']} layer {found['layer']}: {found['accuracy']:.1f}% of {found['n_test']:,} test images "
        f"(95%: {low:.1f} to {high:.1f}; the commonest class: {found['chance']:.1f}%), "
        f"trained on {found['n_train']:,} labels"
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


def checkpoint_table(rows: list[dict[str, Any]]) -> str:
    """Loss beside accuracy, one row a checkpoint."""
    cells = [
        [
            r["step"],
            "-" if r["val_loss"] is None else f"{r['val_loss']:.4f}",
            r["layer"],
            f"{r['accuracy']:.1f}",
            f"{r['interval'][0]:.1f}-{r['interval'][1]:.1f}",
        ]
        for r in rows
    ]
    return table(cells, ["step", "held-out loss", "layer", "accuracy %", "95%"])
