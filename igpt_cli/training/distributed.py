"""One process or many: torchrun starts them, torch.distributed joins them, DDP or FSDP2 shares the work.

There is no launcher, scheduler or transport of ours. A rank is one process with one device.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from igpt_cli.errors import ElsewhereError, InputError, Interrupted, LostRankError

Made = TypeVar("Made")
#: How long a rank waits for the others: a lost rank is noticed, and a slow checkpoint is not taken for one.
TIMEOUT = timedelta(minutes=10)
CHECKPOINT_TIMEOUT = timedelta(hours=2)
#: How long it waits for them to start, and the seconds after which it says so.
JOIN_TIMEOUT, SAID_AFTER = timedelta(minutes=2), 3.0


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

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Each value's maximum over all ranks; every rank calls it with as many values."""
        if self.world_size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a tensor that each has."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast_from_rank0(self, make: Callable[[], Made], group: Any = None) -> Made:
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

    def shard(self, batch_size: int) -> slice:
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
    """Whether a launcher such as torchrun started this process as one of several.

    Raises:
        InputError: what it left in the environment cannot be used; every such variable is named.
    """
    return _launched() is not None


@dataclass(frozen=True)
class _Launched:
    """What a launcher says in the environment, checked."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    port: int


def _launched() -> _Launched | None:
    """None where this process is alone: WORLD_SIZE is 1 or not set."""
    if "WORLD_SIZE" not in os.environ:
        return None
    wrong: list[str] = []

    def number(name: str, least: int, most: int, default: str | None = None) -> int:
        text = os.environ.get(name, default)
        if text is not None and text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most:
            return int(text)
        what = "is not set" if text is None else f"is {text!r}"
        wrong.append(f"{name} {what}, a whole number {least}..{most} is needed")
        return least

    world_size = number("WORLD_SIZE", 1, 2**20)
    if not wrong and world_size == 1:
        return None
    rank = number("RANK", 0, world_size - 1)
    local_rank, port = number("LOCAL_RANK", 0, world_size - 1, "0"), number("MASTER_PORT", 1, 65535)
    if not (host := os.environ.get("MASTER_ADDR", "")):
        wrong.append("MASTER_ADDR is not set, the address of rank 0 is needed")
    if wrong:
        raise InputError(
            f"WORLD_SIZE is set, so this process should be one of several, but {'; '.join(wrong)}; start all of them "
            f"with torchrun, or unset WORLD_SIZE for a process alone"
        )
    return _Launched(rank, local_rank, world_size, host, port)


def _meet(launched: _Launched, say: Callable[[str], None]) -> dist.Store:
    """Wait until every rank is there; signals do what they do by default, and what is waited for is said in seconds.

    Raises:
        InputError: they are not all there in time, or rank 0 cannot be reached.
    """
    world, there = launched.world_size, 0
    what = f"WORLD_SIZE={world} is set; unset it for a process alone"
    # torchrun's agent has a store of its own, to which every rank connects; else rank 0 has it.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def waiting() -> None:
        if not there:
            say(f"waiting for rank 0 at {launched.host}:{launched.port} ({what})")
        elif launched.rank == 0:
            say(f"waiting for {world - there} of {world} ranks ({what})")

    timer = threading.Timer(SAID_AFTER, waiting)
    timer.daemon = True
    timer.start()
    try:
        with _default_signals():
            tcp = dist.TCPStore(
                launched.host,
                launched.port,
                is_master=launched.rank == 0 and not agent,
                timeout=JOIN_TIMEOUT,
                wait_for_workers=False,
                multi_tenant=True,
            )
            store = dist.PrefixStore(f"/igpt/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", tcp)
            there, end = store.add("here", 1), time.monotonic() + JOIN_TIMEOUT.total_seconds()
            while (there := store.add("here", 0)) < world:
                if time.monotonic() > end:
                    raise InputError(
                        f"{world - there} of {world} ranks did not start in {JOIN_TIMEOUT.seconds} s ({what})"
                    )
                time.sleep(0.05)
            return store
    except RuntimeError as e:
        first_line = str(e).partition("\n")[0]
        raise InputError(
            f"rank {launched.rank} cannot meet rank 0 at {launched.host}:{launched.port} ({first_line}); {what}"
        ) from e
    finally:
        timer.cancel()


@contextmanager
def _default_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once: torch, which waits here, lets no handler of Python's run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def init_distributed(
    device: str = "auto", say: Callable[[str], None] = lambda text: None
) -> Iterator[tuple[Ranks, str]]:
    """Join the ranks that torchrun started, and leave them at the end.

    Args:
        device: as for `choose_device`.
        say: called with a sentence where the other ranks let this one wait.

    Yields:
        This process's Ranks, and the name of its device: "cuda" becomes "cuda:<local rank>".

    Raises:
        InputError: a device that cannot be shared out, such as "cuda:1" or "mps"; variables that a launcher left and
            that cannot be used; other ranks that do not start.
        LostRankError: another rank is gone.
    """
    launched = _launched()
    if launched is None:
        yield Ranks(), device
        return
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"under torchrun each rank has a device of its own; use --device cuda or cpu, not {device}")
    rank, local_rank, store = launched.rank, launched.local_rank, _meet(launched, say)
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
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=launched.world_size, timeout=TIMEOUT)
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


def broadcast_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Rank 0's buffers on every rank: BatchNorm's running means and variances, which each rank gathers on its own.

    DDP does so before each forward pass; sharded models need it before these are used or saved.
    """
    if ranks.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def sync_gradients(objective: nn.Module, on: bool) -> None:
    """Whether the next backward pass averages replicated gradients: only a step's last one has to.

    Sharded gradients are shared out after every backward pass, or else each rank would have to keep them whole.
    """
    if isinstance(objective, nn.parallel.DistributedDataParallel):
        objective.require_backward_grad_sync = on


STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """While the block runs, a stop signal sets `received`; a second Ctrl-C interrupts at once.

    >>> with StopSignals() as signals:
    ...     while not signals.received:
    ...         step()
    """

    def __init__(self):
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
