"""The colours for igpt palette fit and count; text output of igpt palette."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from igpt_cli.cli.output import BadImages, Voice, result, table
from igpt_cli.cli.resolve import images_or_default
from igpt_cli.errors import InputError

if TYPE_CHECKING:
    from igpt_cli.palette.histogram import ColourCounts


def counts_of(
    sources: list[str] | None, null: bool, column: str | None, preprocess: tuple, how: dict[str, Any], voice: Voice
) -> tuple[ColourCounts, int]:
    """The colours of what was named: counts are read and merged, images are counted; and how many cannot be read."""
    from igpt_cli.images.transforms import Preprocess
    from igpt_cli.palette.count import count_colours, selected_split
    from igpt_cli.palette.formats import names_in
    from igpt_cli.palette.histogram import is_counts, read_counts

    bad = BadImages(voice)
    files = [s for s in sources or [] if is_counts(s)]
    images = [s for s in sources or [] if s not in files]
    if palettes := [s for s in images if "centers" in names_in(s)]:
        raise InputError(f"{palettes[0]} is a palette; images or colour counts are needed to fit one")
    total = read_counts(files)
    if images or not files:
        source = images_or_default(images, null, voice, column, how["strict"])
        for note in source.notes:
            voice.say(note)
        if how["split"] is None and len(source.counts) > 1:
            voice.default("split", selected_split(source, None))
        with voice.progress("counting colours") as progress:
            total.merge(count_colours(source, Preprocess(*preprocess), **how, progress=progress, on_bad=bad))
    return total, bad.n


def say_left_out(voice: Voice, bad: int) -> None:
    """How many images could not be read."""
    if bad:
        voice.say(f"{bad:,} images could not be read and were excluded; --strict stops at one")


def psnr(document: dict[str, Any]) -> str:
    """The PSNR of a described palette, in words."""
    return "nothing lost" if document["mean_squared_error"] == 0 else f"PSNR {document['psnr']:.2f} dB"


def error(document: dict[str, Any]) -> str:
    """The mean squared error of a described palette for a pixel, and for a channel, of which the PSNR is."""
    summed = document["mean_squared_error"]
    return f"{summed:.2f} per pixel (R + G + B, 0..255), {summed / 3:.2f} per channel"


def print_colours(document: dict[str, Any]) -> None:
    """A table of the colours, with patches of colour on a terminal."""
    shares = [("-", "-") if c["count"] is None else (c["count"], f"{c['share']:7.3f}") for c in document["colours"]]
    rows = [(c["index"], c["hex"], *share) for c, share in zip(document["colours"], shares)]
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


def facts(document: dict[str, Any]) -> list[tuple[str, object]]:
    """What is known of a palette as a whole, by name."""
    meta = document["meta"]
    known: list[tuple[str, object]] = [
        ("colours", f"{document['n_vocab']:,}"),
        ("sha256", document["sha256"]),
        ("order", {"luminance": "by luminance", "imported": "as imported"}.get(document["order"], document["order"])),
    ]
    if document["pixels"] is not None:
        images = f" of {document['images']:,} images" if isinstance(document["images"], int) else ""
        known.append(("fitted on", f"{document['pixels']:,} pixels{images}"))
        known.append(("dead colours", _listed(document["dead"])))
        known.append(("rare colours", _listed(document["rare"])))
    if document["mean_squared_error"] is not None:
        known.append(("mean squared error", error(document)))
        known.append(("PSNR", psnr(document).removeprefix("PSNR ")))
    known.append(("origin", origin(meta)))
    known += [(name, meta[name]) for name in ("seed", "tool_version") if name in meta]
    return known


def origin(meta: dict[str, Any]) -> str:
    """Where a palette comes from, and in which range its colours were there."""
    found = meta.get("imported")
    if not isinstance(found, dict):
        sources = [s["source"] for s in meta.get("sources", ()) if isinstance(s, dict) and "source" in s]
        return f"fitted by igpt on {', '.join(map(str, sources))}" if sources else "not known"
    recognised = found.get("recognised")
    how = "" if recognised is None else " (recognised)" if recognised else " (as requested)"
    return f"imported from {found.get('from')}, where colours are in {found.get('scale')}{how}"


def _listed(indices: list[int], most: int = 12) -> str:
    if not indices:
        return "none"
    more = f" and {len(indices) - most:,} more" if len(indices) > most else ""
    return f"{len(indices):,}: tokens {', '.join(map(str, indices[:most]))}{more}"
