"""How a task fits a device's memory: micro-batch, activation checkpointing, sharding; and its blocks compiled.

All of it is put around a model from outside: no key of its state dict changes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_cli.device import autocast, free_memory
from igpt_cli.errors import IgptError, InputError
from igpt_cli.planning.plan import lay_out
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.objectives import Objective
from igpt_cli.training.settings import Execution

#: The part of the free memory that is planned with; the rest is for fragments and temporary tensors.
SAFE = 0.85
#: Bytes that are taken to be free where the system does not say.
UNKNOWN = 8 * 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Images at a time on each rank, whether activations are recomputed, and "none" or "full" sharding."""

    micro_batch: int
    recompute: bool
    shard: str


def plan_memory(
    model: dict[str, Any], batch_size: int, optimizer: str, execution: Execution, precision: str, device, ranks: Ranks
) -> MemoryPlan:
    """What fits this device by the model's cost, where `execution` leaves it open; the same on every rank.

    The order of what is tried is that of `planning.plan.lay_out`, so that a run does what `igpt plan` says.

    Args:
        model: as config.json has it.
        batch_size: images in a step, over all ranks.

    Raises:
        InputError: the batch does not divide as requested, or the model does not fit in any way; the numbers are named.
    """
    part = ranks.shard(batch_size)
    free = int(SAFE * ranks.broadcast_from_rank0(lambda: free_memory(device) or UNKNOWN))
    requested = _requested(execution, part.stop - part.start, ranks)
    open_to: dict[str, Any] = {"shard": execution.shard, "recompute": execution.recompute, "optimizer": optimizer}
    layout = lay_out(model, free, batch_size, ranks.world_size, precision=precision, micro_batch=requested, **open_to)
    if not layout.fits and requested is None:
        state = layout.total_bytes - layout.activations_bytes
        raise InputError(
            f"{model.get('name', 'the model')} does not fit: its weights, gradients and optimizer take "
            f"{state / 1e9:.1f} GB on each of {ranks.world_size} ranks, one image {layout.activations_bytes / 1e9:.1f} "
            f"GB, and {free / 1e9:.1f} GB can be used; see `igpt plan`, use more ranks with --shard full, or name a "
            "--micro-batch to try it all the same"
        )
    return MemoryPlan(layout.micro_batch, layout.recompute, layout.shard)


def _requested(execution: Execution, per_rank: int, ranks: Ranks) -> int | None:
    """The micro-batch that was requested, directly or by accumulation; None leaves it open."""
    name = "accumulate" if execution.accumulate else "micro_batch"
    by = getattr(execution, name)
    if by is None:
        return None
    if name == "micro_batch":
        by = min(by, per_rank)
    if per_rank % by:
        good = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        raise InputError(
            f"{name} {by} does not divide the {per_rank} images of each of {ranks.world_size} ranks; use one of "
            f"{', '.join(map(str, good))}"
        )
    return per_rank // by if name == "accumulate" else by


def measure_memory(
    make: Callable[[], nn.Module], example: Callable[[int], tuple[Tensor, ...]], batch_size, execution, device, ranks
) -> MemoryPlan:
    """As `plan_memory`, for a model of any kind: by what autograd keeps of an image.

    It is replicated unless sharding is requested, and keeps its activations unless recomputation is requested.

    Args:
        make: makes the objective; called on the meta device, where nothing is computed.
        example: makes a batch of so many images for it.
    """
    part = ranks.shard(batch_size)
    per_rank = part.stop - part.start
    recompute, shard = (
        bool(execution.recompute),
        "full" if execution.shard == "full" and ranks.world_size > 1 else "none",
    )
    requested = _requested(execution, per_rank, ranks)
    if requested is not None:
        return MemoryPlan(requested, recompute, shard)
    with torch.device("meta"):
        objective = make()
        each = kept_bytes(objective, example(2)) / 2
    state = 16 * sum(p.numel() for p in objective.parameters()) / (ranks.world_size if shard == "full" else 1)
    free = SAFE * ranks.broadcast_from_rank0(lambda: free_memory(device) or UNKNOWN) - state
    fits = [d for d in range(1, per_rank + 1) if per_rank % d == 0 and d * each <= free]
    return MemoryPlan(max(fits, default=1), recompute, shard)


def kept_bytes(objective: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps of a batch until the backward pass, the weights aside."""
    weights = {p.untyped_storage()._cdata for p in objective.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(*batch)
    return sum(s.nbytes() for key, s in kept.items() if key not in weights)


def reduce_until_it_fits(
    objective: nn.Module,
    planned: MemoryPlan,
    example: Callable[[int], tuple[Tensor, ...]],
    precision: str,
    reserve,
    device,
    ranks,
) -> MemoryPlan:
    """On a GPU, halve the micro-batch until a forward and a backward pass really fit; elsewhere, change nothing.

    Args:
        example: makes a batch of so many images.
        reserve: bytes that the optimizer will take later.

    Raises:
        IgptError: a single image does not fit.
    """
    micro_batch = planned.micro_batch
    while (
        device.type == "cuda"
        and ranks.all_reduce_max([not _passes(objective, example, micro_batch, precision, reserve, device)])[0]
    ):
        if micro_batch == 1:
            raise IgptError(
                f"out of memory on {device} with one image at a time; use --recompute, --shard full on more GPUs, or a "
                "smaller model"
            )
        micro_batch = max(d for d in range(1, micro_batch // 2 + 1) if planned.micro_batch % d == 0)
    return MemoryPlan(micro_batch, planned.recompute, planned.shard)


def _passes(objective: nn.Module, example, n: int, precision: str, reserve: int, device) -> bool:
    running = {k: v.clone() for k, v in objective.named_buffers()}  # BatchNorm must not have seen the example
    try:
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        with torch.device(device), autocast(precision, device):
            loss = objective(*example(n)).sum()
        loss.backward()
        del held, loss
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        objective.zero_grad(set_to_none=True)
        for k, v in objective.named_buffers():
            v.copy_(running[k])
        torch.cuda.empty_cache()


class Recomputed:
    """A block's forward that keeps its input alone and computes the rest again in the backward pass.

    Args:
        random: the block draws random numbers (stochastic depth), which must be the same the second time.
    """

    def __init__(self, forward, random: bool = False):
        self.forward, self.random = forward, random

    def __call__(self, h):
        return checkpoint(self.forward, h, use_reentrant=False, preserve_rng_state=self.random)


def checkpoint_activations(model: Any, random: bool = False) -> None:
    """Let every block recompute its activations: about a third more arithmetic for a fraction of the memory."""
    for block in model.blocks:
        block.forward = Recomputed(block.forward, random)


def require_compiler(device: torch.device) -> None:
    """Whether what `torch.compile` runs on this device is there, before anything is made.

    Raises:
        InputError: there is no compiler.
    """
    language, variable, names = ("C++", "CXX", ["g++"]) if device.type == "cpu" else ("C", "CC", ["gcc", "clang", "cc"])
    if sys.platform == "darwin":
        names = ["clang++"]
    named = shlex.split(os.environ.get(variable, ""))[:1] or names
    if sys.platform != "win32" and not any(map(shutil.which, named)):
        raise InputError(
            f"no {language} compiler ({' or '.join(named)}) is here, which torch.compile needs: install it "
            f"(apt install g++, xcode-select --install), or train with --no-compile"
        )


def compile_blocks(objective: Any) -> None:
    """Compile one block and the loss, not the whole model.

    All blocks share the compiled code, so a deep model starts as fast as a shallow one; another shape is compiled anew,
    as code for any shape is slower. Call it after
    `checkpoint_activations`, whose recomputation then runs the compiled code too.
    """
    for block in objective.model.blocks:
        if isinstance(block.forward, Recomputed):
            block.forward.forward = torch.compile(block.forward.forward, dynamic=False)
        else:
            block.forward = torch.compile(
                block.forward, dynamic=False
            )  # inside the hooks of FSDP, which stay as they are
    if isinstance(objective, Objective):
        objective.head_loss = torch.compile(objective.head_loss, dynamic=False)
