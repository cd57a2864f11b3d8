"""The folder of a comparison: Markdown page and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Sequence
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
    rows, left = [_cells(row) for row in found.models], ("run", "model", "input", "training")
    machine = f"{found.device_name} ({found.device})" if found.device_name else f"the device {found.device}"
    lines = [
        "# Comparison",
        "",
        f"Protocol {found.protocol} on {markdown(found.tokens)}: {found.n_train:,} training and "
        f"{found.n_test:,} test images of {found.n_classes:,} classes, the same for all models, seed "
        f"{found.seed}. The commonest class: {found.chance:.1f}%.",
        "",
        *table([heading for heading, _ in rows[0]], [[cell for _, cell in row] for row in rows], left),
        "",
        f"FLOPs are of one image going forward, a multiply-add counting two. Speed is that of {markdown(machine)} in "
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


def _cells(row: ComparedModel) -> list[tuple[str, str]]:
    """A model's row, each cell with its heading."""
    head, training, seconds = row.head, row.training, row.training.seconds
    trained = [training.kind, training.recipe, training.augment]
    trained.append(training.teacher and f"teacher {training.teacher}")
    device = f" on {training.device}" if training.device else ""
    return [
        ("run", row.name),
        ("model", row.model),
        ("input", f"{row.input}, {row.resolution}x{row.resolution}"),
        ("probe %", f"{row.accuracy:.1f}"),
        ("95%", _interval(row.interval)),
        ("best layer", f"{row.layer} of {row.n_layers} ({row.relative_depth:.2f})"),
        ("width", f"{row.n_features:,}"),
        ("own head %", "" if head is None else f"{head['accuracy']:.1f}"),
        ("95%", "" if head is None else _interval(head["interval"])),
        ("parameters", f"{row.parameters:,}"),
        ("GFLOPs/image", f"{row.flops_per_image / 1e9:,.2f}"),
        ("images/s", f"{row.images_per_second:,.1f}"),
        ("memory MB", "" if row.memory is None else f"{row.memory / 1e6:,.0f}"),
        ("training", ", ".join(part for part in trained if part)),
        ("steps", _number(training.steps)),
        ("images seen", _number(training.images_seen)),
        ("epochs", "" if training.epochs is None else f"{training.epochs:g}"),
        ("time", "" if seconds is None else f"{seconds:,.0f} s{device}"),
    ]


def _interval(bounds: Sequence[float]) -> str:
    return "{:.1f}-{:.1f}".format(*bounds)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]], left: Container[str]) -> list[str]:
    """The lines of a table in Markdown; columns of the headings in `left` are aligned to the left."""
    header = list(header)
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "|".join(":---" if name in left else "---:" for name in header) + "|", *lines[1:]]


def markdown(text: object) -> str:
    """Text as Markdown shows it and nothing else, on one line, also in a cell of a table.

    >>> markdown("a|b_*c*")
    'a\\\\|b\\\\_\\\\*c\\\\*'
    """
    one_line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    escaped = re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", one_line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
