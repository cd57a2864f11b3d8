"""A comparison as a page: Markdown with a table, notes and the pictures; and the folder of all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from igpt_cli.files import check_folder, replacing_folder
from igpt_cli.report.compare import ComparedModel, Comparison
from igpt_cli.report.compare_figures import compute_figure, depth_figure

DOCUMENT, PAGE, COMPUTE, DEPTH = "compare.json", "compare.md", "accuracy-by-compute.png", "accuracy-by-depth.png"


def write_comparison(found: Comparison, out: Path | str, force: bool = False) -> Path:
    """Write the folder `out` with compare.json, compare.md and both pictures: it is there complete, or not at all.

    Args:
        found: what `compare.compare` returns.
        force: replace a comparison that is there.

    Raises:
        OutputError: something is there already, or the place cannot be written.
    """
    out = check_folder(out, DOCUMENT, force)
    with replacing_folder(out) as part:
        (part / DOCUMENT).write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        (part / PAGE).write_text(page(found), encoding="utf-8", errors="backslashreplace")
        compute_figure(found, part / COMPUTE)
        depth_figure(found, part / DEPTH)
    return out


def page(found: Comparison) -> str:
    """The page in Markdown; whatever a name holds is shown as it is."""
    header = [
        *("run", "model", "input", "probe %", "95%", "best layer", "width", "own head %", "95%", "parameters"),
        *("GFLOPs/image", "images/s", "memory MB", "training", "steps", "images seen", "epochs", "time"),
    ]
    left = {"run", "model", "input", "training"}
    lines = [
        "# Comparison",
        "",
        f"Protocol {found.protocol} on {markdown(found.tokens)}: {found.n_train:,} training and "
        f"{found.n_test:,} test images of {found.n_classes:,} classes, the same for all models, seed "
        f"{found.seed}. The commonest class: {found.chance:.1f}%.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "|".join(":---" if name in left else "---:" for name in header) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in found.models),
        "",
        f"FLOPs are of one image going forward, a multiply-add counting two. Speed is that of {_machine(found)} in "
        f"{found.precision}, in batches, images prepared already. Memory is the most used meanwhile, of the GPU or "
        f"of the whole process.",
        *([""] + [f"- {markdown(note)}" for note in found.notes] if found.notes else []),
        "",
        f"![Test accuracy against FLOPs for each image]({COMPUTE})",
        "",
        f"![Test accuracy of every layer against its depth]({DEPTH})",
        "",
    ]
    return "\n".join(lines)


def _cells(row: ComparedModel) -> list[str]:
    head, training = row.head, row.training
    low, high = row.interval
    return [
        markdown(row.name),
        markdown(row.model),
        f"{row.input}, {row.resolution}x{row.resolution}",
        f"{row.accuracy:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row.layer} of {row.n_layers} ({row.relative_depth:.2f})",
        f"{row.n_features:,}",
        "" if head is None else f"{head['accuracy']:.1f}",
        "" if head is None else "{:.1f}-{:.1f}".format(*head["interval"]),
        f"{row.parameters:,}",
        f"{row.flops_per_image / 1e9:,.2f}",
        f"{row.images_per_second:,.1f}",
        "" if row.memory is None else f"{row.memory / 1e6:,.0f}",
        markdown(", ".join(v for v in (training.kind, training.recipe, training.augment) if v))
        + (f", teacher {markdown(training.teacher)}" if training.teacher else ""),
        _number(training.steps),
        _number(training.images_seen),
        "" if training.epochs is None else f"{training.epochs:g}",
        ""
        if training.seconds is None
        else f"{training.seconds:,.0f} s" + (f" on {markdown(training.device)}" if training.device else ""),
    ]


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _machine(found: Comparison) -> str:
    named = found.device_name
    return markdown(f"{named} ({found.device})" if named else f"the device {found.device}")


def markdown(text: object) -> str:
    """Text as Markdown shows it and nothing else, on one line, also in a cell of a table.

    >>> markdown("a|b_*c*")
    'a\\\\|b\\\\_\\\\*c\\\\*'
    """
    one_line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    escaped = re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", one_line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
