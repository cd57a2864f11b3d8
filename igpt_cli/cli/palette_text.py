"""Text output of igpt palette."""

from __future__ import annotations

import sys
from typing import Any

from igpt_cli.cli.output import result, table


def psnr(document: dict[str, Any]) -> str:
    """The PSNR of a described palette, in words."""
    return "nothing lost" if document["mean_squared_error"] == 0 else f"PSNR {document['psnr']:.2f} dB"


def error(document: dict[str, Any]) -> str:
    """The mean squared error of a described palette for a pixel, and for a channel, of which the PSNR is."""
    summed = document["mean_squared_error"]
    return f"{summed:.2f} per pixel (R + G + B, 0..255), {summed / 3:.2f} per channel"


def print_colours(document: dict[str, Any]) -> None:
    """A table of the colours, with patches of colour on a terminal."""
    rows = [(c["index"], c["hex"], *_count_and_share(c)) for c in document["colours"]]
    header = ("token", "colour", "count", "share %")
    if not sys.stdout.isatty():
        result(table(rows, header))
        return
    from rich.console import Console
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    for name in ("token", "", "colour", "count", "share %"):
        view.add_column(name, justify="left" if name in ("", "colour") else "right")
    for index, colour, count, share in rows:
        view.add_row(str(index), f"[on {colour}]      [/]", colour, f"{count:,}" if count != "-" else "-", str(share))
    Console().print(view)


def _count_and_share(colour: dict[str, Any]) -> tuple[Any, str]:
    return ("-", "-") if colour["count"] is None else (colour["count"], f"{colour['share']:7.3f}")


def facts(document: dict[str, Any]) -> list[tuple[str, object]]:
    """What is known of a palette as a whole, by name."""
    meta = document["meta"]
    told: list[tuple[str, object]] = [
        ("colours", f"{document['n_vocab']:,}"),
        ("sha256", document["sha256"]),
        ("order", {"luminance": "by luminance", "imported": "as imported"}.get(document["order"], document["order"])),
    ]
    if document["pixels"] is not None:
        images = f" of {document['images']:,} images" if isinstance(document["images"], int) else ""
        told.append(("fitted on", f"{document['pixels']:,} pixels{images}"))
        told.append(("dead colours", _listed(document["dead"])))
        told.append(("rare colours", _listed(document["rare"])))
    if document["mean_squared_error"] is not None:
        told.append(("mean squared error", error(document)))
        told.append(("PSNR", psnr(document).removeprefix("PSNR ")))
    told.append(("origin", origin(meta)))
    told += [(name, meta[name]) for name in ("seed", "tool_version") if name in meta]
    return told


def origin(meta: dict[str, Any]) -> str:
    """Where a palette comes from, and in which range its colours were there."""
    found = meta.get("imported")
    if not isinstance(found, dict):
        sources = [s["source"] for s in meta.get("sources", ()) if isinstance(s, dict) and "source" in s]
        return f"fitted by igpt on {', '.join(map(str, sources))}" if sources else "not known"
    recognised = found.get("recognised")
    how = "" if recognised is None else " (recognised)" if recognised else " (as asked)"
    return f"imported from {found.get('from')}, where colours are in {found.get('scale')}{how}"


def _listed(indices: list[int], most: int = 12) -> str:
    if not indices:
        return "none"
    more = f" and {len(indices) - most:,} more" if len(indices) > most else ""
    return f"{len(indices):,}: tokens {', '.join(map(str, indices[:most]))}{more}"
