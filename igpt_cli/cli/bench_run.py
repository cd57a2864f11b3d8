"""What all igpt bench commands do around a measurement, and their tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from igpt_cli.cli.output import Voice, present, table

if TYPE_CHECKING:
    from igpt_cli.bench.benchmarked import TrainingSpeed
    from igpt_cli.bench.probe import FeatureSpeed
    from igpt_cli.bench.sample import SamplingSpeed
    from igpt_cli.bench.solvers import SolverSpeed


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
    """The rows of all models; of several, one that fails is reported and excluded."""
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


def training_table(rows: list[TrainingSpeed]) -> str:
    """One row a model and implementation; the last column is how many times as fast igpt is."""
    header = ["model", "implementation", "precision", "batch", "ms/step", "range", "tokens/s", "MFU %", "GB", "igpt is"]
    cells = []
    for row in rows:
        parts = row.batch_size // row.micro_batch  # 2 x 64: computed 64 at a time
        batch = f"{row.batch_size}" if parts == 1 else f"{parts} x {row.micro_batch}"
        cells.append([row.model, row.implementation, row.precision, batch])
        if row.ms_per_step is None:
            cells[-1] += [row.failed or "-", *[""] * 5]
            continue
        cells[-1] += [f"{row.ms_per_step:,.1f}", f"{row.fastest_ms:,.1f}-{row.slowest_ms:,.1f}"]
        cells[-1] += [f"{row.tokens_per_second:,.0f}", "-" if row.mfu is None else f"{100 * row.mfu:.1f}"]
        cells[-1] += _memory_and_ratio(row)
    return table(cells, header)


def sampling_table(rows: list[SamplingSpeed]) -> str:
    """One row a model and implementation, as above."""
    header = ["model", "implementation", "precision", "batch", "pixels"]
    header += ["ms/step", "range", "images/s", "first s", "GB", "igpt is"]
    cells = []
    for row in rows:
        cells.append([row.model, row.implementation, row.precision, f"{row.batch_size}", f"{row.pixels:,}"])
        if row.ms_per_step is None:
            cells[-1] += [row.failed or "-", *[""] * 5]
            continue
        cells[-1] += [f"{row.ms_per_step:,.2f}", f"{row.fastest_ms:,.2f}-{row.slowest_ms:,.2f}"]
        cells[-1] += ["-" if row.images_per_second is None else f"{row.images_per_second:,.3g}"]
        cells[-1] += [f"{row.first_seconds:,.1f}", *_memory_and_ratio(row)]
    return table(cells, header)


def feature_table(rows: list[FeatureSpeed]) -> str:
    """Two rows a model: the deepest layer alone, and all."""
    header = ["model", "layers", "precision", "batch", "images", "s", "range", "images/s", "GB", "ratio"]
    cells: list[list[object]] = []
    for row in rows:
        cells.append([row.model, row.layers, row.precision, row.batch_size])
        if row.seconds is None:
            cells[-1] += [row.failed or "-", *[""] * 5]
            continue
        cells[-1] += [f"{row.images:,}", f"{row.seconds:,.2f}", f"{row.fastest:,.2f}-{row.slowest:,.2f}"]
        cells[-1] += [f"{row.images_per_second:,.1f}", *_memory_and_ratio(row, "")]
    return table(cells, header)


def solver_table(rows: list[SolverSpeed]) -> str:
    """igpt with all layers and values of C, then scikit-learn with one of each."""
    header = ["solver", "layers x C", "features", "classes", "s", "steps", "above", "GB", "igpt is"]
    cells = []
    for row in rows:
        cells.append([row.solver, f"{row.n_problems} x {len(row.strengths)}", f"{row.n_rows:,} x {row.n_features:,}"])
        cells[-1].append(f"{row.n_classes}")
        if row.seconds is None:
            cells[-1] += [row.failed or "-", *[""] * 4]
            continue
        cells[-1] += [f"{row.seconds:,.2f}", f"{row.iterations:,}" + ("" if row.converged else " (short)")]
        cells[-1] += ["-" if row.above is None else f"{100 * row.above:.2g}%", *_memory_and_ratio(row)]
    return table(cells, header)


def _memory_and_ratio(row: Any, unit: str = "x as fast") -> list[str]:
    """The last two columns: GB, and the ratio to the row that it is compared with."""
    memory = "-" if row.memory is None else f"{row.memory / 1e9:.2f}"
    return [memory, "" if row.ratio is None else f"{row.ratio:.2f}{unit}"]
