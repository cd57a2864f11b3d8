"""Checkpoints of a run: written in the background, whole or not at all, and read again on any number of ranks.

    RUN/checkpoints/step-<n>/   a model directory (config.json, model.safetensors, palette.npz), and
                    state/      the optimizer, by torch.distributed.checkpoint: read by `--resume` alone
    RUN/checkpoints/best        text file with the name of the one with the lowest validation loss

The weights are read from safetensors, never from state/. A folder gets its name when everything is in it, so one that
has the name is complete.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.files import replacing
from igpt_cli.model_dir import PALETTE, WEIGHTS, read_config, read_weights, write_config, write_weights
from igpt_cli.training.distributed import Ranks
from igpt_cli.workspace import BEST, CHECKPOINTS

STATE = "state"


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, while training goes on.

    Every rank has one and calls it at the same steps.

    Args:
        run: the run's folder, with its palette.
        keep: how many of the last checkpoints stay; the best stays besides.
    """

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.run, self.ranks, self.keep = run, ranks, keep
        self.last: int | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        if ranks.first:
            (run / CHECKPOINTS).mkdir(exist_ok=True)
            for left in (run / CHECKPOINTS).glob(".step-*.partial"):  # by a process that was killed
                shutil.rmtree(left)
        ranks.from_first(lambda: None)

    def save(
        self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], config: dict[str, Any], best: bool
    ) -> None:
        """Copy the state as it is now, then write it in the background.

        Args:
            config: what its config.json shall say.
            best: whether this is the best so far.

        Raises:
            OutputError: the checkpoint before this one could not be written.
        """
        self.wait()
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        state = _copied(get_optimizer_state_dict(model, optimizers)["state"])
        self._pending = self._writer.submit(self._write, step, _copied(weights), state, config, best)

    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` then says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
            OutputError: it could not be written; the checkpoints before it are as they were.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Let the background thread end; what is being written is finished first."""
        self._writer.shutdown()

    def _write(self, step: int, weights: dict, state: dict, config: dict, best: bool) -> None:
        name = f"step-{step}"
        folder, part = self.run / CHECKPOINTS / name, self.run / CHECKPOINTS / f".{name}.partial"
        needed = _bytes(weights) + _bytes(state)
        try:
            if self.ranks.first and shutil.disk_usage(self.run).free < needed:
                raise OSError(errno.ENOSPC, "the disk is too full")
            _quietly(
                dcp.save,
                state,
                checkpoint_id=part / STATE,
                process_group=self.ranks.checkpoint_group,
                no_dist=self.ranks.world_size == 1,
            )
            if self.ranks.first:
                write_weights(part, weights)
                shutil.copyfile(self.run / PALETTE, part / PALETTE)
                write_config(part, config)
                if folder.exists():  # of a run that was begun anew from an earlier step
                    shutil.rmtree(folder)
                part.rename(folder)
                self._publish(folder, best)
        except Exception as e:  # whatever a file system or another rank may raise
            shutil.rmtree(part, ignore_errors=True)
            kept = checkpoints(self.run)
            safe = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no earlier checkpoint"
            free = shutil.disk_usage(self.run).free
            raise OutputError(
                f"cannot save step {step} in {self.run}: {e}; {_gb(needed)} are needed, {_gb(free)} are free; {safe}; "
                f"make room and go on with `igpt pretrain --resume {self.run}`"
            ) from e
        self.last = step

    def _publish(self, folder: Path, best: bool) -> None:
        """Let the run's own weights be these, name the best, and remove what is no longer kept."""
        with replacing(self.run / WEIGHTS) as new:
            try:
                os.link(folder / WEIGHTS, new)
            except OSError:  # a file system without links
                shutil.copyfile(folder / WEIGHTS, new)
        if best:
            with replacing(self.run / CHECKPOINTS / BEST) as new:
                new.write_text(folder.name + "\n", encoding="utf-8")
        kept = {f"step-{s}" for s in checkpoints(self.run)[-self.keep :]} | {best_checkpoint(self.run)}
        for step in checkpoints(self.run):
            if f"step-{step}" not in kept:
                shutil.rmtree(self.run / CHECKPOINTS / f"step-{step}")


def checkpoints(run: Path) -> list[int]:
    """The steps of the run's complete checkpoints, in rising order."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in (run / CHECKPOINTS).glob("step-*") if p.is_dir())
    return sorted(int(m[1]) for m in found if m)


def best_checkpoint(run: Path) -> str | None:
    """The name of the checkpoint with the lowest validation loss, such as "step-500"."""
    try:
        return (run / CHECKPOINTS / BEST).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def last_checkpoint(run: Path) -> Path:
    """The folder of the run's last checkpoint, from which it can be resumed.

    Raises:
        InputError: there is none.
    """
    steps = checkpoints(run)
    if steps and (folder := run / CHECKPOINTS / f"step-{steps[-1]}") and (folder / STATE).is_dir():
        return folder
    has = "weights but no training state" if (run / WEIGHTS).exists() else "no checkpoint"
    raise InputError(
        f"{run} has {has} (nothing in {run / CHECKPOINTS} to go on from), so it cannot be resumed; start a new run"
    )


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], ranks: Ranks
) -> dict[str, Any]:
    """Put a checkpoint into a model and its optimizers, however many ranks wrote it.

    Only for folders that one's own runs wrote: the optimizer's state comes with a pickled index.

    Returns:
        The checkpoint's config.json; "progress" tells where the run was.

    Raises:
        InputError, FormatError: a file is missing, broken, or does not fit.
    """
    weights: dict[str, Tensor] = {}  # rank 0 reads them, and sends each rank its part
    ranks.from_first(lambda: weights.update(read_weights(folder, model)))
    alone = ranks.world_size == 1
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=not alone))
    fresh = get_optimizer_state_dict(model, optimizers)
    try:
        _quietly(
            dcp.load,
            fresh["state"],
            checkpoint_id=folder / STATE,
            process_group=ranks.checkpoint_group,
            no_dist=alone,
        )
    except Exception as e:  # a broken file shows in many ways
        raise FormatError(
            f"{folder / STATE} cannot be read ({type(e).__name__}: {e}); remove {folder} to go on from the checkpoint "
            "before it"
        ) from e
    set_optimizer_state_dict(model, optimizers, fresh)
    return ranks.from_first(lambda: read_config(folder))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors on the CPU, which training does not touch; sharded ones stay sharded."""
    return {
        k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else _copied(v) if isinstance(v, dict) else v
        for k, v in state.items()
    }


def _bytes(state: dict[str, Any]) -> int:
    """What a state takes on disk, over all ranks."""
    return sum(v.numel() * v.element_size() if isinstance(v, Tensor) else _bytes(v) for v in state.values())


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.2f} MB"


def _quietly(function, *args, **kwargs):
    """Call torch.distributed.checkpoint without its remarks on how it was called."""
    import warnings

    log = logging.getLogger("torch.distributed.checkpoint")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    finally:
        log.setLevel(level)
