"""One implementation of a model on one device: build, warm up, time."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from igpt_cli.bench.machine import is_memory_short, wait_for
from igpt_cli.bench.timing import Timed
from igpt_cli.bench.transformers_peer import build_peer
from igpt_cli.errors import IgptError, InputError
from igpt_cli.models.registry import build_model
from igpt_cli.planning.cost import flops_per_token
from igpt_cli.planning.gpus import peak_flops
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.loop import TrainStep
from igpt_cli.training.memory import checkpoint_activations, compile_blocks
from igpt_cli.training.objectives import Objective
from igpt_cli.training.optim import make_optimizers
from igpt_cli.training.settings import Resolved

#: PyTorch's attention kernels by name; "auto" lets it choose.
ATTENTION = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
RATE, BETAS = 1e-4, (0.9, 0.95)


@dataclass(frozen=True)
class TrainingSpeed:
    """What one implementation of one model measured. Times are of whole steps; None where it could not be measured.

    Attributes:
        implementation: "igpt" or one of `PEERS`.
        n_layer, ..., parameters: the shapes; parameters are igpt's, also for another's row.
        batch_size, micro_batch: images in a step, and at a time (what fitted).
        optimizer: None: forward and backward passes alone.
        ms_per_step, fastest_ms, slowest_ms: median and range over `repeats` timings of `steps` steps each.
        mfu: 6 FLOPs for each parameter and token, and attention, by the device's peak; None where the peak is not
            known.
        memory: peak bytes of the GPU's memory; on a CPU of the process, for the first row alone.
        first_step_seconds: the first step, compilation included.
        ratio: igpt's tokens_per_second by this row's; None in igpt's own row.
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
    micro_batch: int
    precision: str
    compile: bool
    recompute: bool
    attention: str
    optimizer: str | None
    steps: int | None = None
    repeats: int | None = None
    ms_per_step: float | None = None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory: int | None = None
    first_step_seconds: float | None = None
    ratio: float | None = None
    failed: str | None = None


class BenchmarkedModel(Timed):
    """One implementation in training."""

    def __init__(self, row: TrainingSpeed, config: dict[str, Any], device: torch.device, say: Callable[[str], None]):
        super().__init__(row, config, device)
        self.say = say
        self.step_seconds = 0.0  # while it warmed up
        self.steps = 1  # in a timing
        self.train_step: TrainStep | None = None
        self.taken = 0

    def prepare(self, warmup: int, alone: bool) -> None:
        """Build it and take the first steps, with a smaller micro-batch while the GPU's memory is short.

        Args:
            alone: nothing else was measured in this process yet.
        """
        while self.row.failed is None and not self._starts(warmup):
            self.release()
            if self.row.micro_batch == 1:
                self.row = replace(self.row, failed="out of memory with one image at a time")
                self.say(f"{self.row.model}, {self.row.implementation}: {self.row.failed}")
                return
            smaller = max(d for d in range(1, self.row.micro_batch // 2 + 1) if self.row.batch_size % d == 0)
            self.say(
                f"{self.row.model}, {self.row.implementation}: {self.row.micro_batch} images at a time do not fit in "
                f"memory, trying {smaller}"
            )
            self.row = replace(self.row, micro_batch=smaller)
            torch.compiler.reset()  # or code would be made for any micro-batch, which is slower
        if self.device.type == "cuda":
            self.row = replace(self.row, memory=torch.cuda.max_memory_allocated(self.device))
        elif alone:
            self.row = replace(self.row, memory=_peak_of_process())

    def _starts(self, warmup: int) -> bool:
        """Whether it could be built and warmed up in the memory there is."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self._build()
            self.step_seconds = self.time(1)
            self.row = replace(self.row, first_step_seconds=round(self.step_seconds, 3))
            if warmup:
                self.step_seconds = self.time(warmup) / warmup
            return True
        except RuntimeError as e:
            if self.device.type != "cpu" and is_memory_short(e):
                return False
            if "No viable backend" in str(e) or "No available kernel" in str(e):
                raise InputError(
                    f"attention {self.row.attention!r} cannot be used on {self.device} for these shapes in "
                    f"{self.row.precision}; choose another kernel, or auto"
                ) from e
            if isinstance(e, torch._dynamo.exc.TorchDynamoException):
                raise IgptError(
                    f"torch.compile does not work here; use --no-compile. It says: {str(e).strip().splitlines()[0]}"
                ) from e
            raise

    def _build(self) -> None:
        torch.manual_seed(0)
        if self.row.implementation == "igpt":
            module, model, optimizers = self._igpt()
        else:
            module, model, optimizers = self._peer()
        self.train_step = _train_step(module, model, optimizers, self.row, self.config["n_vocab"], self.device)

    def _igpt(self) -> tuple[nn.Module, nn.Module, list[torch.optim.Optimizer]]:
        """Ours, as training has it."""
        with self.device:
            objective = Objective(build_model(self.config))
        model: Any = objective.model
        nn.init.normal_(model.wtet.weight, std=0.02)  # as it begins, 0, nothing flows back
        if self.row.recompute:
            checkpoint_activations(model)
        if self.row.compile:
            compile_blocks(objective)
        optimizers = make_optimizers(model, self.row.optimizer, RATE, BETAS) if self.row.optimizer else []
        return objective, model, optimizers

    def _peer(self) -> tuple[nn.Module, nn.Module, list[torch.optim.Optimizer]]:
        """Theirs, with the same optimizer."""
        with self.device:
            peer, attention = build_peer(self.config, self.row.implementation)
        peer.to(self.device)  # its norms are made on the CPU all the same
        self.row = replace(self.row, attention=attention)
        optimizers: list[torch.optim.Optimizer] = []
        if self.row.optimizer:
            optimizers = [torch.optim.AdamW(peer.parameters(), RATE, BETAS, weight_decay=0.0, fused=True)]
        return peer, peer, optimizers

    def time(self, steps: int) -> float:
        """Seconds that so many steps take, all waited for."""
        assert self.train_step is not None
        wait_for(self.device)
        started = time.perf_counter()
        with _kernel(self.row):
            for _ in range(steps):
                self.train_step(self.taken, RATE)
                self.taken += 1
                self.train_step.objective.zero_grad(set_to_none=True)  # without an optimizer, nothing else does
        wait_for(self.device)
        return time.perf_counter() - started

    def take_timing(self) -> None:
        """Add a timing of as many steps as belong to one."""
        self.timings.append(self.time(self.steps) / self.steps)

    def measured(self) -> TrainingSpeed:
        """The row, from the timings so far."""
        if not self.timings:
            return self.row
        median, T = statistics.median(self.timings), self.row.resolution**2
        speed = self.row.batch_size * T / median
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return replace(
            self.row,
            steps=self.steps,
            **self.milliseconds(3),
            tokens_per_second=round(speed, 1),
            mfu=peak and round(speed * flops_per_token(self.config) / peak, 4),
        )

    def forget(self) -> None:
        """Stop the step's thread and refer to nothing large any more."""
        if self.train_step:
            self.train_step.close()
        self.train_step = None


def _train_step(module: nn.Module, model: nn.Module, optimizers: list, row: TrainingSpeed, n_vocab: int, device):
    """The step that training takes, around a module that gives (B, T) int64 tokens' losses (B,)."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(n_vocab, (row.batch_size, row.resolution**2), generator=generator) for _ in range(4)]
    settings = Resolved(
        batch_size=row.batch_size, learning_rate=RATE, warmup_steps=0, optimizer="adamw", betas=BETAS, weight_decay=0.0
    )
    how: dict[str, Any] = {"micro_batch": row.micro_batch, "precision": row.precision, "device": device}
    module.train()
    return TrainStep(
        module, model, optimizers, lambda step: (batches[step % len(batches)],), settings, ranks=Ranks(), **how
    )


def _kernel(row: TrainingSpeed) -> AbstractContextManager:
    backend = ATTENTION.get(row.attention)
    return nullcontext() if backend is None else sdpa_kernel(backend)


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
