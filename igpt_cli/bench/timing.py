"""Time several implementations of one model in turn."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch


class Timed:
    """One implementation of a model; `row` is its result so far."""

    def __init__(self, row: Any, config: dict[str, Any], device: torch.device):
        self.row, self.config, self.device = row, config, device
        self.timings: list[float] = []  # seconds a step

    def milliseconds(self, digits: int) -> dict[str, float]:
        """Median and range of the timings, by the fields of the row."""
        found = {"ms_per_step": statistics.median(self.timings)}
        found |= {"fastest_ms": min(self.timings), "slowest_ms": max(self.timings)}
        return {name: round(1000 * seconds, digits) for name, seconds in found.items()}

    def forget(self) -> None:
        """Refer to nothing large any more."""

    def release(self) -> None:
        """Give its memory back."""
        self.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def in_turn(models: Sequence[Any], prepare: Callable, timings: int, progress: Callable | None, prepared: bool) -> list:
    """Time models in turn on a CPU, whose speed may drift; elsewhere one after the other, alone in the memory.

    Args:
        models: `Timed`, with `take_timing` and `measured`; the first is ours.
        prepare: called with each model before its timings; `prepared`: `progress` counts these, too.

    Returns:
        The row of each; those of others with `ratio`, their time by ours.
    """
    done, total = count(1), (timings + prepared) * len(models)
    step = (lambda: progress(next(done), total)) if progress else (lambda: None)
    try:
        for group in [models] if models[0].device.type == "cpu" else [[model] for model in models]:
            for model in group:
                prepare(model)
                if prepared:
                    step()
            for _ in range(timings):
                for model in group:
                    if model.row.failed is None:
                        model.take_timing()
                    step()
            for model in group:
                model.release()
    finally:
        for model in models:
            model.release()
    ours, *others = (model.measured() for model in models)
    ratios = (ours.ms_per_step and o.ms_per_step and round(o.ms_per_step / ours.ms_per_step, 3) for o in others)
    return [ours, *(replace(o, ratio=ratio) for o, ratio in zip(others, ratios))]
