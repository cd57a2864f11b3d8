"""What all igpt bench commands do around a measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from igpt_cli.cli.output import Voice, present


def begin(
    models: list[str] | None, device: str, out: Path | None, force: bool, voice: Voice
) -> tuple[list[str], dict[str, Any]]:
    """Before anything is measured: which models, and the machine."""
    from igpt_cli.bench.machine import machine
    from igpt_cli.device import choose_device
    from igpt_cli.files import check_output
    from igpt_cli.models.registry import find_preset

    if out is not None:
        check_output(out, force)
    names = models or []
    if not names:
        names = ["igpt-tiny"] if choose_device(device).type == "cpu" else ["igpt-s", "igpt-m", "igpt-l"]
        voice.default("models", ", ".join(names))
    for name in names:
        find_preset(name)
    on = machine(device)
    voice.say(f"on {on['device_name']}, torch {on['versions']['torch']}")
    return names, on


def sizes(n_layer: int | None, n_head: int | None, n_embd: int | None) -> dict[str, int]:
    """Those that are given."""
    return {k: v for k, v in (("n_layer", n_layer), ("n_head", n_head), ("n_embd", n_embd)) if v is not None}


def measured(names: list[str], bench: Callable[..., list], settings: dict[str, Any], unit: str, voice: Voice) -> list:
    """The rows of all models; of several, one that fails is told of and left out."""
    from igpt_cli.errors import IgptError

    rows: list = []
    for name in names:
        try:
            with voice.progress(name, unit) as progress:
                rows += bench(name, **settings, progress=progress, on_event=voice.say)
        except IgptError as e:
            if len(names) == 1:
                raise
            voice.say(f"{name}: {e}")  # the others count all the same
    return rows


def finish(
    timed: dict[str, list],
    on: dict[str, Any],
    tables: dict[str, Callable[[list], str]],
    out: Path | None,
    json: bool,
    voice: Voice,
) -> None:
    """Write and print what was measured, by the names that it has in the document; a failure if nothing was."""
    from dataclasses import asdict

    from igpt_cli.cli.training import command_typed
    from igpt_cli.documents import write_json

    document = {"command": command_typed(), **on}
    document |= {name: [asdict(row) for row in rows] for name, rows in timed.items()}
    if out is not None:
        write_json(document, out)
    present(document, "\n\n".join(tables[name](rows) for name, rows in timed.items()), json)
    if all(row.failed for rows in timed.values() for row in rows):
        voice.say("nothing could be measured")
        raise typer.Exit(1)
