"""Tables of igpt bench: one a measurement, one row an implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from igpt_cli.cli.output import table

if TYPE_CHECKING:
    from igpt_cli.bench.benchmarked import TrainingSpeed
    from igpt_cli.bench.probe import FeatureSpeed
    from igpt_cli.bench.sample import SamplingSpeed
    from igpt_cli.bench.solvers import SolverSpeed


def training_table(rows: list[TrainingSpeed]) -> str:
    """One row a model and implementation; the last column is how many times as fast igpt is."""
    header = ["model", "implementation", "precision", "batch", "ms/step", "range", "tokens/s", "MFU %", "GB", "igpt is"]
    return table([[row.model, row.implementation, row.precision, _batch(row), *_cells(row)] for row in rows], header)


def _batch(row: TrainingSpeed) -> str:
    """Images in a step: 128, or 2 x 64 where they are computed 64 at a time."""
    parts = row.batch_size // row.micro_batch
    return f"{row.batch_size}" if parts == 1 else f"{parts} x {row.micro_batch}"


def _cells(row: TrainingSpeed) -> list[str]:
    if row.ms_per_step is None:
        return [row.failed or "-", "", "", "", "", ""]
    return [
        f"{row.ms_per_step:,.1f}",
        f"{row.fastest_ms:,.1f}-{row.slowest_ms:,.1f}",
        f"{row.tokens_per_second:,.0f}",
        "-" if row.mfu is None else f"{100 * row.mfu:.1f}",
        "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}x as fast",
    ]


def sampling_table(rows: list[SamplingSpeed]) -> str:
    """One row a model and implementation, as above."""
    header = [
        "model",
        "implementation",
        "precision",
        "batch",
        "pixels",
        "ms/step",
        "range",
        "images/s",
        "first s",
        "GB",
    ]
    return table([[*_named(row), *_drawn(row)] for row in rows], [*header, "igpt is"])


def _named(row: SamplingSpeed) -> list[str]:
    return [row.model, row.implementation, row.precision, f"{row.batch_size}", f"{row.pixels:,}"]


def _drawn(row: SamplingSpeed) -> list[str]:
    if row.ms_per_step is None:
        return [row.failed or "-", "", "", "", "", ""]
    return [
        f"{row.ms_per_step:,.2f}",
        f"{row.fastest_ms:,.2f}-{row.slowest_ms:,.2f}",
        "-" if row.images_per_second is None else f"{row.images_per_second:,.3g}",
        f"{row.first_seconds:,.1f}",
        "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}x as fast",
    ]


def feature_table(rows: list[FeatureSpeed]) -> str:
    """Two rows a model: the deepest layer alone, and all."""
    header = ["model", "layers", "precision", "batch", "images", "s", "range", "images/s", "GB", "ratio"]
    return table([[row.model, row.layers, row.precision, row.batch_size, *_extracted(row)] for row in rows], header)


def _extracted(row: FeatureSpeed) -> list[str]:
    if row.seconds is None:
        return [row.failed or "-", "", "", "", "", ""]
    return [
        f"{row.images:,}",
        f"{row.seconds:,.2f}",
        f"{row.fastest:,.2f}-{row.slowest:,.2f}",
        f"{row.images_per_second:,.1f}",
        "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
    ]


def solver_table(rows: list[SolverSpeed]) -> str:
    """igpt with all layers and values of C, then scikit-learn with one of each."""
    header = ["solver", "layers x C", "features", "classes", "s", "steps", "above", "GB", "igpt is"]
    return table([[row.solver, *_problems(row), *_solved(row)] for row in rows], header)


def _problems(row: SolverSpeed) -> list[str]:
    return [f"{row.n_problems} x {len(row.strengths)}", f"{row.n_rows:,} x {row.n_features:,}", f"{row.n_classes}"]


def _solved(row: SolverSpeed) -> list[str]:
    if row.seconds is None:
        return [row.failed or "-", "", "", "", ""]
    return [
        f"{row.seconds:,.2f}",
        f"{row.iterations:,}" + ("" if row.converged else " (short)"),
        "-" if row.above is None else f"{100 * row.above:.2g}%",
        "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}x as fast",
    ]
