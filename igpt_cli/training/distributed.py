"""One process or many: torchrun starts them, torch.distributed joins them, DDP or FSDP2 shares the work.

There is no launcher, scheduler or transport of ours. A rank is one process with one device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from igpt_cli.errors import ElsewhereError, InputError, Interrupted, LostRankError

Made = TypeVar("Made")
#: How long a rank waits for the others: a lost rank is noticed, and a slow checkpoint is not taken for one.
TIMEOUT = timedelta(minutes=10)
CHECKPOINT_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process's place among all of them. Alone, it is rank 0 of 1 and nothing is communicated."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    #: Checkpoints are written in the background, so their messages must not mix with the training's.
    checkpoint_group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which speaks and writes."""
        return self.rank == 0

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's maximum over all ranks; every rank calls it with as many values."""
        if self.world_size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a tensor that each has."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, make: Callable[[], Made], group: Any = None) -> Made:
        """What rank 0 makes, on every rank; if it fails there, every rank fails.

        Args:
            group: whose messages it is; default the training's.

        Raises:
            ElsewhereError: on the other ranks, where rank 0 raised an error, which rank 0 shows.
        """
        if self.world_size == 1:
            return make()
        box: list[Any] = [None, None]
        failed: Exception | None = None
        if self.first:
            try:
                box[0] = make()
            except Exception as e:
                failed, box[1] = e, str(e)
        dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
        if failed is not None:
            raise failed
        if box[1] is not None:
            raise ElsewhereError(box[1])
        return box[0]

    def share(self, batch_size: int) -> slice:
        """This rank's part of a global batch.

        Raises:
            InputError: the batch does not divide among the ranks.
        """
        if batch_size % self.world_size:
            below = batch_size // self.world_size * self.world_size
            raise InputError(
                f"a batch of {batch_size} images does not divide among {self.world_size} ranks; "
                f"use --batch-size {below + self.world_size}" + (f" or {below}" if below else "")
            )
        each = batch_size // self.world_size
        return slice(self.rank * each, (self.rank + 1) * each)


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str = "auto") -> Iterator[tuple[Ranks, str]]:
    """Join the ranks that torchrun started, and leave them at the end.

    Args:
        device: as for `choose_device`.

    Yields:
        This process's Ranks, and the name of its device: "cuda" becomes "cuda:<local rank>".

    Raises:
        InputError: a device that cannot be shared out, such as "cuda:1" or "mps".
        LostRankError: another rank is gone.
    """
    if not under_torchrun():
        yield Ranks(), device
        return
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"under torchrun each rank has a device of its own; use --device cuda or cpu, not {device}")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = device != "cpu" and torch.cuda.is_available()
    if gpus:
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {rank} is process {local_rank} on this machine, which has {torch.cuda.device_count()} GPUs; "
                f"start at most so many with --nproc-per-node"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    else:
        device = "cpu" if device == "auto" else device
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    try:
        group = dist.new_group(backend="gloo", timeout=CHECKPOINT_TIMEOUT)
        try:
            yield Ranks(rank, local_rank, dist.get_world_size(), group), device
        except Interrupted:
            # Leave together: torchrun kills the ranks that are still at work soon after one has ended with an error.
            dist.barrier(group)
            raise
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            time.sleep(2)  # torchrun takes the rank that ends first for the cause, and that is the other one
            first_line = str(e).partition("\n")[0]
            raise LostRankError(
                f"the connection to another rank broke; what that rank or torchrun says is the cause ({first_line})"
            ) from e
        raise
    finally:
        dist.destroy_process_group()
        time.sleep(0.1)  # gloo's threads let go of their tensors; one that still does when Python ends, aborts it


def distribute(objective: Any, ranks: Ranks, device: torch.device, shard: str) -> nn.Module:
    """The objective that all ranks train together: replicated (DDP), sharded in place (FSDP2), or as it is when alone.

    Args:
        shard: "none" or "full".
    """
    if shard == "full":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (ranks.world_size,))
        for block in objective.model.blocks:
            fully_shard(block, mesh=mesh)
            if hasattr(block, "normed"):
                register_fsdp_forward_method(block, "normed")  # what a class head may read
        return fully_shard(objective, mesh=mesh)
    if ranks.world_size == 1:
        return objective
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Rank 0's buffers on every rank: BatchNorm's running means and variances, which each rank gathers on its own.

    DDP does so before each forward pass; sharded models need it before these are used or saved.
    """
    if ranks.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def share_gradients(objective: nn.Module, on: bool) -> None:
    """Whether the next backward pass averages replicated gradients: only a step's last one has to.

    Sharded gradients are shared out after every backward pass, or else each rank would have to keep them whole.
    """
    if isinstance(objective, nn.parallel.DistributedDataParallel):
        objective.require_backward_grad_sync = on
