"""Time sampling: igpt's decoder and transformers' `generate` with the same weights.

The weights are random, which changes nothing in the work: every pixel is drawn from all colours, at temperature 1.
"""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from igpt_cli.bench.machine import is_memory_short, wait_for
from igpt_cli.bench.timing import Timed, in_turn
from igpt_cli.bench.transformers_peer import SAMPLERS, build_sampler, generate, require_transformers
from igpt_cli.device import choose_device, choose_precision
from igpt_cli.errors import InputError
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.planning.cost import parameters
from igpt_cli.sampling.decoder import Decoder
from igpt_cli.sampling.draw import SamplingParams


@dataclass(frozen=True)
class SamplingSpeed:
    """What one implementation of one model measured. A step draws one pixel of every image; None = not measured.

    Attributes:
        implementation: "igpt" or one of `SAMPLERS`.
        n_layer, ..., parameters: the shapes; parameters are igpt's, also for another's row.
        pixels: the first of each image. Later pixels take longer, so rows of other `pixels` cannot be compared.
        precision: of igpt's matrices, keys and values; transformers computes everything in it.
        ms_per_step, fastest_ms, slowest_ms: median and range over `repeats` drawings, each divided by its steps.
        images_per_second: at the median; None where only a part of each image was drawn.
        first_seconds: from the loaded model to the first images: memory for the cache, on a GPU also CUDA graphs.
        memory: peak bytes of a GPU's memory, weights included; None elsewhere.
        ratio: this row's time of a step by igpt's; None in igpt's own row.
        failed: why nothing was measured.
    """

    model: str
    implementation: str
    n_layer: int
    n_embd: int
    n_head: int
    resolution: int
    parameters: int
    batch_size: int
    pixels: int
    precision: str
    device: str
    repeats: int
    ms_per_step: float | None = None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    images_per_second: float | None = None
    first_seconds: float | None = None
    memory: int | None = None
    ratio: float | None = None
    failed: str | None = None


def bench_sample(
    model: str = "igpt-tiny",
    *,
    resolution: int = 32,
    n_vocab: int = 512,
    sizes: dict[str, int] | None = None,
    batch_size: int = 16,
    pixels: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    repeats: int = 3,
    against: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> list[SamplingSpeed]:
    """Time the drawing of images: one row for igpt, then one for each of `against`, with the same weights.

    On a CPU, whose speed may drift, the implementations take turns. On a GPU each has the memory to itself, and its
    first drawing, in which CUDA graphs are recorded, is not among the timings.

    Args:
        sizes: n_layer, n_head, n_embd in place of the preset's.
        batch_size: images drawn at once.
        pixels: of each image; None for all.
        against: names in `SAMPLERS`.
        progress: called with (drawings done, drawings in all).
        on_event: called with a sentence when something could not be measured.

    Raises:
        InputError: an unknown name, numbers out of range, a BERT model, or transformers not installed.
    """
    chosen = choose_device(device)
    config = model_config(model, resolution=resolution, n_vocab=n_vocab, **(sizes or {}))
    pixels = resolution**2 if pixels is None else pixels
    _check(config, batch_size, pixels, repeats, against)
    row = SamplingSpeed(
        model=model,
        implementation="igpt",
        **{k: config[k] for k in ("n_layer", "n_embd", "n_head", "resolution")},
        parameters=parameters(config),
        batch_size=batch_size,
        pixels=pixels,
        precision=choose_precision(precision, chosen),
        device=str(chosen),
        repeats=repeats,
    )
    samplers: list[Sampler] = [IgptSampler(row, config, chosen)]
    for name in against:
        theirs = replace(row, implementation=name, precision=SAMPLERS[name].precision or row.precision)
        samplers.append(TransformersSampler(theirs, config, chosen))
    with torch.random.fork_rng(devices=[]):
        return _measure(samplers, progress, on_event or (lambda text: None))


def _check(config: dict[str, Any], batch_size: int, pixels: int, repeats: int, against: Sequence[str]) -> None:
    numbers = {"batch_size": batch_size, "pixels": pixels, "repeats": repeats}
    problems = [f"{k} is {v}, expected at least 1" for k, v in numbers.items() if v < 1]
    if pixels > config["resolution"] ** 2:
        problems.append(f"pixels is {pixels:,}, an image has {config['resolution'] ** 2:,}")
    problems += [
        f"against is {name!r}, expected one of {', '.join(SAMPLERS)}" for name in against if name not in SAMPLERS
    ]
    if config["objective"] != "ar":
        problems.append("a BERT model does not draw pixel by pixel, which is what is timed; expected objective ar")
    if problems:
        raise InputError("; ".join(problems))
    if against:
        require_transformers()


class Sampler(Timed):
    """One implementation that draws images."""

    def __init__(self, row: SamplingSpeed, config: dict[str, Any], device: torch.device, greedy: bool = False):
        super().__init__(row, config, device)
        self.greedy = greedy

    @abstractmethod
    def load(self) -> None:
        """Let the model, with the same weights in every implementation, be on the device."""

    def make_ready(self) -> None:
        """What is made once for any number of batches."""

    @abstractmethod
    def draw(self) -> Tensor:
        """(B, pixels) int64, on the CPU."""

    def prepare(self) -> None:
        """Load it and draw once; where nothing is recorded or compiled, that is a timing already."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self.load()
            wait_for(self.device)
            started = time.perf_counter()
            self.make_ready()
            self.take_timing()
        except RuntimeError as e:
            if self.device.type == "cpu" or not is_memory_short(e):
                raise
            self.row = replace(self.row, failed=f"out of memory with {self.row.batch_size} images at a time")
            return
        self.row = replace(self.row, first_seconds=round(time.perf_counter() - started, 3))
        if self.device.type != "cpu":
            self.timings.clear()
        if self.device.type == "cuda":
            self.row = replace(self.row, memory=torch.cuda.max_memory_allocated(self.device))

    def take_timing(self) -> None:
        """Add a timing of a whole batch."""
        wait_for(self.device)
        started = time.perf_counter()
        drawn = self.draw()
        self.timings.append((time.perf_counter() - started) / self.row.pixels)
        if drawn.shape != (self.row.batch_size, self.row.pixels):
            shapes = " pixels, not ".join(f"{n}x{t}" for n, t in (drawn.shape, (self.row.batch_size, self.row.pixels)))
            raise RuntimeError(f"{self.row.implementation} drew {shapes}")

    def measured(self) -> SamplingSpeed:
        """The row, from the timings so far."""
        if not self.timings:
            return self.row
        median, whole = statistics.median(self.timings), self.row.pixels == self.row.resolution**2
        return replace(
            self.row,
            **self.milliseconds(4),
            images_per_second=round(self.row.batch_size / (median * self.row.pixels), 4) if whole else None,
        )


class IgptSampler(Sampler):
    """The decoder of `sampling.generate`."""

    model: Any = None
    decoder: Decoder | None = None

    def load(self) -> None:
        self.model = random_model(self.config, self.device)

    def make_ready(self) -> None:
        params = SamplingParams(temperature=0 if self.greedy else 1)
        self.decoder = Decoder(self.model, self.row.batch_size, self.row.precision, params)

    def draw(self) -> Tensor:
        decoder = self.decoder
        assert decoder is not None
        decoder.uniforms.copy_(torch.rand(decoder.uniforms.shape, dtype=decoder.uniforms.dtype))
        for t in range(self.row.pixels):
            decoder.draw(t)
        return decoder.inputs[: self.row.batch_size, 1 : self.row.pixels + 1].clone().cpu()

    def forget(self) -> None:
        self.model = self.decoder = None


class TransformersSampler(Sampler):
    """transformers' `generate`."""

    model: Any = None

    def load(self) -> None:
        weights = random_model(self.config, self.device).state_dict()
        self.model = build_sampler(self.config, weights, self.row.precision, self.device)

    def draw(self) -> Tensor:
        return generate(self.model, self.row.batch_size, self.row.pixels, self.greedy)

    def forget(self) -> None:
        self.model = None


def random_model(config: dict[str, Any], device: torch.device) -> nn.Module:
    """The model of that config with random weights, the same each time on the same device."""
    torch.manual_seed(0)
    with device:
        model: Any = build_model(config)
    nn.init.normal_(model.wtet.weight, std=0.02)  # as it begins, 0, all colours would be equal
    return model.eval()


def _measure(samplers: list[Sampler], progress, say: Callable[[str], None]) -> list:
    def prepare(sampler: Sampler) -> None:
        sampler.prepare()
        if sampler.row.failed:
            say(f"{sampler.row.model}, {sampler.row.implementation}: {sampler.row.failed}")

    timed_already = samplers[0].device.type == "cpu"  # by its first drawing
    return in_turn(samplers, prepare, samplers[0].row.repeats - timed_already, progress, prepared=True)
