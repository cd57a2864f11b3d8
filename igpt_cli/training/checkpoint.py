"""Checkpoints of a run: written in the background, whole or not at all, and read again on any number of ranks.

    RUN/checkpoints/step-<n>/   a model directory (config.json, model.safetensors, palette.npz), and
                    state/      the optimizer, by torch.distributed.checkpoint: read by `--resume` alone
                    raw.safetensors    with a moving average, which model.safetensors is then: the weights themselves
    RUN/checkpoints/best        text file with the name of the best by validation: by its loss, or by its accuracy

The weights are read from safetensors, never from state/. A folder gets its name when everything is in it, so one that
has the name is complete.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from igpt_cli.errors import ElsewhereError, FormatError, IgptError, InputError, OutputError
from igpt_cli.files import reason, replacing
from igpt_cli.images.restricted import RestrictedUnpickler
from igpt_cli.model_dir import CONFIG, PALETTE, WEIGHTS, read_config, read_weights, task_of, write_config, write_weights
from igpt_cli.tokens.open_or_tokenize import EMBEDDED
from igpt_cli.training.distributed import Ranks, broadcast_buffers
from igpt_cli.training.optim import EMA
from igpt_cli.workspace import BEST, CHECKPOINTS, name_in

STATE, RAW = "state", "raw.safetensors"


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, while training continues.

    Every rank has one and calls it at the same steps.

    Args:
        run: the run's folder, with its palette. What a killed process left unfinished there is put in order.
        keep: how many of the last checkpoints stay; the best stays besides.
    """

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.run, self.ranks, self.keep = run, ranks, keep
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        #: The step of the last complete checkpoint.
        self.last: int | None = ranks.broadcast_from_rank0(self._put_in_order)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        config: dict[str, Any],
        average: EMA | None = None,
    ) -> None:
        """Copy the state as it is now, then write it in the background.

        Args:
            config: its config.json; config["progress"]["best"] says which checkpoint is the best.
            average: whose weights the checkpoint's model has in place of the last ones.

        Raises:
            OutputError: the checkpoint before this one could not be written.
        """
        self.wait()
        broadcast_buffers(model, self.ranks)
        weights = {WEIGHTS: _whole(model)}
        if average:
            with average.in_place():
                weights = {WEIGHTS: _whole(model), RAW: weights[WEIGHTS]}
        state = _copied(get_optimizer_state_dict(model, optimizers)["state"])
        self._pending = self._writer.submit(self._write, step, weights, state, config)

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

    def _write(self, step: int, weights: dict, state: dict, config: dict) -> None:
        name = f"step-{step}"
        folder, part = self.run / CHECKPOINTS / name, self.run / CHECKPOINTS / f".{name}.partial"
        needed, group = _bytes(weights) + _bytes(state), self.ranks.checkpoint_group
        try:
            if step == self.last:  # resumed from, and validated since: its weights and state are on disk
                self.ranks.broadcast_from_rank0(lambda: write_config(folder, config), group)
                self.ranks.broadcast_from_rank0(lambda: self._publish(folder, config), group)
                return
            self.ranks.broadcast_from_rank0(lambda: self._check_room(needed), group)
            save_state(part / STATE, state, self.ranks)
            # All ranks wait for rank 0 here: when one knows that it is saved and leaves, torchrun may end the others.
            self.ranks.broadcast_from_rank0(lambda: self._complete(part, folder, weights, config), group)
            self.last = step
        except ElsewhereError:
            raise
        except Exception as e:  # whatever a file system or another rank may raise
            if not self.ranks.first:
                raise ElsewhereError(f"cannot save step {step}: {e}") from e
            shutil.rmtree(part, ignore_errors=True)
            free = shutil.disk_usage(self.run).free
            raise OutputError(
                f"cannot save step {step} in {self.run}: {_reason(e)}; {_gb(needed)} are needed, {_gb(free)} are free; "
                f"make room; {resume_hint(self.run)}"
            ) from e

    def _check_room(self, needed: int) -> None:
        if shutil.disk_usage(self.run).free < needed:
            raise OSError(errno.ENOSPC, "the disk is too full")

    def _complete(self, part: Path, folder: Path, weights: dict, config: dict) -> None:
        """Put the model next to the state, and give the folder its name."""
        for name, tensors in weights.items():
            write_weights(part, tensors, name=name)
        shutil.copyfile(self.run / PALETTE, part / PALETTE)
        write_config(part, config)
        part.rename(folder)
        self._publish(folder, config)

    def _publish(self, folder: Path, config: dict) -> None:
        """Let the run's own weights be these, name the best, and remove what is no longer kept."""
        publish_weights(self.run, folder)
        best = (config.get("progress") or {}).get("best") or {}
        if "step" in best and (self.run / CHECKPOINTS / f"step-{best['step']}").is_dir():
            with replacing(self.run / CHECKPOINTS / BEST) as new:
                new.write_text(f"step-{best['step']}\n", encoding="utf-8")
        kept = {f"step-{s}" for s in checkpoints(self.run)[-self.keep :]} | {best_checkpoint(self.run)}
        for step in checkpoints(self.run):
            if (name := f"step-{step}") not in kept:
                # One that has its name is complete, even if the process is killed while it removes it.
                gone = (self.run / CHECKPOINTS / name).rename(self.run / CHECKPOINTS / f".{name}.partial")
                shutil.rmtree(gone)

    def _put_in_order(self) -> int | None:
        """After a process that was killed: remove its unfinished files, and publish its last checkpoint."""
        (self.run / CHECKPOINTS).mkdir(exist_ok=True)
        for left in [*self.run.glob(".*.part*"), *(self.run / CHECKPOINTS).glob(".*.part*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        steps = checkpoints(self.run)
        if steps:
            folder = self.run / CHECKPOINTS / f"step-{steps[-1]}"
            self._publish(folder, read_config(folder))
        return steps[-1] if steps else None


def publish_weights(run: Path, folder: Path) -> None:
    """Let the run's own weights be those of its checkpoint `folder`."""
    with replacing(run / WEIGHTS) as new:
        try:
            os.link(folder / WEIGHTS, new)
        except OSError:  # a file system without links
            shutil.copyfile(folder / WEIGHTS, new)


def checkpoints(run: Path) -> list[int]:
    """The steps of the run's complete checkpoints, in rising order."""
    found = (re.fullmatch(r"step-(0|[1-9][0-9]*)", p.name) for p in (run / CHECKPOINTS).glob("step-*") if p.is_dir())
    return sorted(int(m[1]) for m in found if m)


def best_checkpoint(run: Path) -> str | None:
    """The name of the best checkpoint by validation, such as "step-500"."""
    try:
        return name_in(run / CHECKPOINTS / BEST)
    except (OSError, InputError):
        return None


def last_checkpoint(run: Path) -> Path:
    """The folder of the run's last checkpoint, from which it can be resumed.

    Raises:
        InputError: there is none, or it has no training state.
    """
    steps = checkpoints(run)
    if steps:
        folder = run / CHECKPOINTS / f"step-{steps[-1]}"
        if (folder / STATE).is_dir():
            return folder
        raise InputError(f"{folder} has weights but no training state ({STATE}/); {_without(folder)}")
    if (run / STATE).is_dir():
        raise InputError(f"{run} is a checkpoint of a run; resume the run: {command_of(run)} --resume RUN")
    has = "weights but no training state" if (run / WEIGHTS).exists() else "no checkpoint"
    raise InputError(
        f"{run} has {has} (nothing in {run / CHECKPOINTS} to resume from), so it cannot be resumed; start a new run"
    )


def command_of(run: Path) -> str:
    """The command that made a run and resumes it."""
    try:
        config = read_config(run)
    except IgptError:
        return "igpt pretrain"
    return f"igpt {task_of(config)}"


def recorded_tokens(run: Path, config: dict[str, Any]) -> str:
    """What a run was trained on: a token file or images, as named when it began, here or as seen from the run.

    Raises:
        InputError: in neither place.
    """
    data = config.get("data") or {}
    named = data.get("path") or ""
    if named and (named == EMBEDDED or Path(named).exists()):
        return named
    if data.get("from_run") and (place := run.resolve() / data["from_run"]).exists():
        return os.path.normpath(place)
    what = f"its data, {named}, are not here" if named else "it does not say on which data"
    raise InputError(f"{run}: {what}; name the token file or images T: {command_of(run)} T --resume {run}")


def resume_hint(run: Path) -> str:
    """What is safe after a failure, and how to resume: the end of an error's message."""
    if steps := checkpoints(run):
        return f"the checkpoint of step {steps[-1]} is kept; resume with: {command_of(run)} --resume {run}"
    return "there is no earlier checkpoint; start again, with --force to overwrite it"


def _without(folder: Path) -> str:
    """How to resume where a checkpoint is broken."""
    before = [s for s in checkpoints(folder.parent.parent) if f"step-{s}" != folder.name]
    return f"remove {folder} to resume from step {before[-1]}" if before else "there is no other checkpoint: start anew"


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ranks: Ranks,
    average: EMA | None = None,
) -> dict[str, Any]:
    """Put a checkpoint into a model, its optimizers and its average, however many ranks wrote it.

    Nothing in the folder can run code: weights are safetensors, the state is read by `load_state`.

    Returns:
        The checkpoint's config.json; "progress" says where the run was.

    Raises:
        FormatError: a file is missing, broken, or does not fit.
    """
    config = load_weights(folder, model, ranks)
    if average:
        average.restart()
        load_weights(folder, model, ranks, RAW)
    fresh: dict[str, Any] = get_optimizer_state_dict(model, optimizers)
    try:
        load_state(folder / STATE, cast(dict[str, Any], fresh["state"]), ranks)
    except Exception as e:  # a broken file shows in many ways
        if not ranks.first:
            raise ElsewhereError(f"{folder / STATE} cannot be read: {e}") from e
        why = str(e) if isinstance(e, FormatError) else f"{type(e).__name__}: {e}"
        raise FormatError(f"{folder / STATE} cannot be read ({why}); {_without(folder)}") from e
    set_optimizer_state_dict(model, optimizers, fresh)
    return config


def load_weights(folder: Path, model: nn.Module, ranks: Ranks, name: str = WEIGHTS) -> dict[str, Any]:
    """Put the weights of a checkpoint into a model, replicated or sharded; its config.json.

    Raises:
        FormatError: a file is missing, broken, or does not fit.
    """
    weights: dict[str, Any] = {}  # rank 0 reads them, and sends each rank its part

    def read() -> dict[str, Any]:
        try:
            config = read_config(folder)
            if not isinstance(config.get("progress"), dict):
                raise FormatError(f"{folder / CONFIG} does not say where the run was: the key 'progress' is missing")
            weights.update(read_weights(folder, model, name))
            return config
        except InputError as e:
            raise FormatError(f"{e}; {_without(folder)}") from e

    config, alone = ranks.broadcast_from_rank0(read), ranks.world_size == 1
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=not alone))
    return config


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is now, on the CPU of rank 0; sharded weights are gathered."""
    return _copied(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))


def _copied(state: Any) -> dict[str, Any]:
    """The same tensors on the CPU, which training does not touch; sharded ones stay sharded."""
    return {
        k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else _copied(v) if isinstance(v, dict) else v
        for k, v in state.items()
    }


def _reason(e: Exception) -> str:
    """Without the errno number, and with the file."""
    if not isinstance(e, OSError):
        return str(e)
    return f"{e.filename}: {reason(e)}" if e.filename else reason(e)


def _bytes(state: dict[str, Any]) -> int:
    """What a state takes on disk, over all ranks."""
    return sum(v.numel() * v.element_size() if isinstance(v, Tensor) else _bytes(v) for v in state.values())


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.2f} MB"


_INDEX = ".metadata"
_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def _layout(name: str) -> torch.layout:
    """Stands for torch.serialization._get_layout; optimizers have dense tensors alone."""
    if name != "torch.strided":
        raise FormatError(f"it holds a tensor of layout {name!r}")
    return torch.strided


#: All that torch's index of tensors asks for.
_NAMES = {
    **{
        (index_types.__name__, name): getattr(index_types, name)
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    },
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): _layout,
    ("torch", "Size"): torch.Size,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    # Where the folder was when it was written; it is not used.
    **{
        (module, name): lambda *parts: None
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}


class _IndexUnpickler(RestrictedUnpickler):
    """Reads torch's index of a checkpoint."""

    what = "optimizer's state"
    names = _NAMES


class _Reader(dcp.FileSystemReader):
    """Reads tensors by an index that was checked."""

    def __init__(self, folder: Path, index: index_types.Metadata):
        super().__init__(folder)
        self.index = index

    def read_metadata(self) -> index_types.Metadata:  # type: ignore[override]
        return self.index


class _Planner(dcp.DefaultLoadPlanner):
    """Takes tensors alone; torch unpickles everything else without restriction."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise FormatError(f"its entry {read_item.dest_index.fqn} is no tensor")


def save_state(folder: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Write the optimizer's state; every rank calls it."""
    _by_dcp(dcp.save, state, checkpoint_id=folder, process_group=ranks.checkpoint_group, no_dist=ranks.world_size == 1)


def load_state(folder: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Read the optimizer's state into the tensors of `state`, however many ranks wrote it; every rank calls it.

    Raises:
        FormatError: what lies in the folder is no such state. Broken files show in other exceptions as well.
    """
    group = ranks.checkpoint_group
    index = ranks.broadcast_from_rank0(lambda: read_index(folder), group)
    reader, alone = _Reader(folder, index), ranks.world_size == 1
    _by_dcp(dcp.load, state, storage_reader=reader, planner=_Planner(), process_group=group, no_dist=alone)


def read_index(folder: Path) -> index_types.Metadata:
    """torch's index of what lies in `folder`: tensors, in files of the folder.

    Raises:
        FormatError: it is broken, asks for other types, or leads elsewhere.
    """
    try:
        index = _IndexUnpickler(io.BytesIO((folder / _INDEX).read_bytes())).load()
    except (FormatError, OSError):
        raise
    except Exception as e:  # a broken pickle may raise anything
        raise FormatError(f"its index {_INDEX} is broken or cut off: {type(e).__name__}: {e}") from e
    if not isinstance(index, index_types.Metadata):
        raise FormatError(f"its index {_INDEX} holds a {type(index).__name__}")
    stored, entries = getattr(index, "storage_data", None), getattr(index, "state_dict_metadata", None)
    if not isinstance(stored, dict) or not isinstance(entries, dict):
        raise FormatError(f"its index {_INDEX} lists no tensors")
    for name, entry in entries.items():
        if not isinstance(entry, index_types.TensorStorageMetadata):
            raise FormatError(f"its entry {name} is no tensor")
    for info in stored.values():
        path = getattr(info, "relative_path", None)
        if not isinstance(path, str) or not re.fullmatch(r"__\d+_\d+\.distcp", path):
            raise FormatError(f"its index {_INDEX} names the file {path!r}, which is none of a checkpoint's")
    index.storage_meta = index_types.StorageMeta()
    return index


def _by_dcp(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call torch.distributed.checkpoint without its remarks; a failure comes as the failing rank's own exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it writes tracebacks to the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*args, **kwargs)
    except CheckpointException as e:  # no Exception, and tracebacks are its text
        cause, _ = e.failures[min(e.failures)]
        raise cause from e
    finally:
        logging.disable(disabled)
