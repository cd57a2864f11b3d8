"""An ablation as a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igpt_cli.ablations.figures import picture
from igpt_cli.ablations.window_cost import LAYERS
from igpt_cli.files import replacing
from igpt_cli.report.compare_page import markdown, table

TABLE, PICTURE = "table.md", "picture.png"


def write_page(document: Mapping[str, Any], out: Path) -> None:
    """Write `table.md` and `picture.png` from what `runner.ablate` returns into the folder of an ablation."""
    with replacing(out / TABLE) as part:
        part.write_text(page(document), encoding="utf-8", errors="backslashreplace")
    picture(document, out / PICTURE)


def page(document: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    header, rows = cells(document)
    lines = [
        f"# {markdown(document['question'])}",
        "",
        f"The ablation {markdown(document['name'])}: {markdown(document['paper'])}, {markdown(document['table'])}.",
        "",
        *table(header, rows, left=header[:1]),
        "",
        "What our numbers say:",
        "",
        *(f"- {markdown(line)}" for line in document["findings"]),
        "",
        "What differs:",
        "",
        *(f"- {markdown(line)}" for line in document["differs"]),
        "",
        f"![{markdown(document['question'])}]({PICTURE})",
        "",
    ]
    return "\n".join(lines)


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table: header, and a row for each run, layer or size of the image."""
    return _cost_cells(document["cost"]) if "cost" in document else _accuracy_cells(document)


def _accuracy_cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = document["rows"]
    columns = paper_columns(rows)
    with_layers = any(row.get("layer") is not None for row in rows)
    header = ["", "test %", "95%", *(["layer"] if with_layers else []), *(f"paper: {c}" for c in columns)]
    out = []
    for row in rows:
        layer = "" if row.get("layer") is None else f"{row['layer']} of {row['n_layers']}"
        found = row["accuracy"]
        out.append(
            [
                row["label"],
                "" if found is None else f"{found:.1f}",
                "" if found is None else "{:.1f}-{:.1f}".format(*row["interval"]),
                *([layer] if with_layers else []),
                *(_published(row["paper"].get(c)) for c in columns),
            ]
        )
    return header, out


def paper_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the paper has numbers of, in the order of the rows."""
    return list(dict.fromkeys(column for row in rows for column in row["paper"]))


def _published(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.1f}"


def _cost_cells(cost: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["image", "patches"]
    header += ["M multiply-adds, eq. 1", "eq. 2", "ratio"]
    header += [f"ms, {label}" for label in LAYERS.values()] + ["ratio"]
    out = []
    for row in cost:
        work, seconds = row["multiply_adds"], row["seconds"]
        known = seconds["global"] and seconds["windows"]
        out.append(
            [
                f"{row['resolution']}x{row['resolution']}",
                f"{row['patches']:,}",
                *(f"{work[kind] / 1e6:,.1f}" for kind in ("global", "windows")),
                f"{work['global'] / work['windows']:.1f}",
                *("no memory" if seconds[key] is None else f"{1000 * seconds[key]:.2f}" for key in LAYERS),
                f"{seconds['global'] / seconds['windows']:.1f}" if known else "",
            ]
        )
    return header, out
