"""Time features of every layer against the deepest alone.

What is timed is what `igpt features` does but for the disk: batches of random tokens to the device, the model,
features back to the CPU's memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from igpt_cli.bench.machine import is_memory_short, wait_for
from igpt_cli.device import choose_device, choose_precision
from igpt_cli.errors import InputError
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.planning.cost import parameters
from igpt_cli.probing.features import batches, feature_shapes, images_at_once

#: A timing is of as many batches as take about this long, in seconds, but at least two.
TIMING_SECONDS = 2.0


@dataclass(frozen=True)
class FeatureSpeed:
    """What features of some layers of one model measured; None where they could not be.

    Attributes:
        layers: "24" for the deepest alone, "0-24" for all.
        batch_size, images: at a time, and in a timing.
        seconds, fastest, slowest: median and range over `repeats` timings.
        memory: peak bytes of a GPU's memory, weights included; None elsewhere.
        ratio: time of this row by that of the deepest layer alone, the median over pairs of timings; None in its row.
        failed: why nothing was measured.
    """

    model: str
    layers: str
    n_layer: int
    n_embd: int
    n_head: int
    resolution: int
    parameters: int
    batch_size: int
    precision: str
    device: str
    repeats: int
    images: int | None = None
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    images_per_second: float | None = None
    memory: int | None = None
    ratio: float | None = None
    failed: str | None = None


def bench_features(
    model: str = "igpt-tiny",
    *,
    resolution: int = 32,
    n_vocab: int = 512,
    sizes: dict[str, int] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> list[FeatureSpeed]:
    """Time features of the deepest layer alone and of all layers, in turn: two rows.

    Args:
        sizes: n_layer, n_head, n_embd in place of the preset's.
        batch_size: images at a time; None for as many as `igpt features` takes.
        progress: called with (timings done, timings in all).
        on_event: called with a sentence when something could not be measured.

    Raises:
        InputError: an unknown name, or numbers out of range.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}, expected at least 1")
    chosen = choose_device(device)
    precision = choose_precision(precision, chosen)
    config = model_config(model, resolution=resolution, n_vocab=n_vocab, **(sizes or {}))
    with torch.random.fork_rng(devices=[]), chosen:
        torch.manual_seed(0)
        network: Any = build_model(config).eval()
    deepest, every = [network.n_layers], list(range(network.n_layers + 1))
    tokens = np.random.default_rng(0).integers(n_vocab, size=(1, resolution**2)).astype(np.uint16)
    shapes = feature_shapes(network, tokens, every, "mean", precision, None)
    row = FeatureSpeed(
        model=model,
        layers=str(network.n_layers),
        **{k: config[k] for k in ("n_layer", "n_embd", "n_head", "resolution")},
        parameters=parameters(config),
        batch_size=images_at_once(batch_size, resolution**2, shapes, chosen),
        precision=precision,
        device=str(chosen),
        repeats=repeats,
    )
    rows = [row, replace(row, layers=f"0-{network.n_layers}")]
    try:
        return _measure(network, rows, [deepest, every], tokens, chosen, progress or (lambda done, total: None))
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not is_memory_short(e):
            raise
        failed = f"out of memory with {row.batch_size} images at a time"
        (on_event or (lambda text: None))(f"{model}: {failed}")
        return [replace(r, failed=failed) for r in rows]


def _measure(network, rows, layers, tokens: np.ndarray, device: torch.device, progress) -> list[FeatureSpeed]:
    """Both in turn, since a machine's speed drifts."""
    size, precision, repeats = rows[0].batch_size, rows[0].precision, rows[0].repeats

    def timing(wanted: list[int], images: int) -> float:
        wait_for(device)
        started = time.perf_counter()
        for _ in batches(network, tokens, np.zeros(images, np.int64), wanted, size, precision=precision):
            pass
        return time.perf_counter() - started

    memory: list[int | None] = []
    for wanted in layers:  # warms up, too
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timing(wanted, 2 * size)
        memory.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
    images = size * max(2, min(50, round(TIMING_SECONDS / timing(layers[0], size))))
    taken: list[list[float]] = [[], []]
    for done in range(2 * repeats):
        taken[done % 2].append(timing(layers[done % 2], images))
        progress(done + 1, 2 * repeats)
    ratio = statistics.median(every / deepest for deepest, every in zip(*taken, strict=True))
    return [
        replace(
            row,
            images=images,
            seconds=round(statistics.median(times), 4),
            fastest=round(min(times), 4),
            slowest=round(max(times), 4),
            images_per_second=round(images / statistics.median(times), 2),
            memory=used,
            ratio=round(ratio, 3) if row is rows[1] else None,
        )
        for row, times, used in zip(rows, taken, memory, strict=True)
    ]
