"""The optimizer's state in a checkpoint's folder, by torch.distributed.checkpoint: any number of ranks write and read.

torch's index of such a folder (`.metadata`) is a pickle, which it reads without restriction, as it does every entry
that the index says is no tensor. Here the index may name only the types that torch itself writes there, and every
entry is a tensor, so that a run from a stranger cannot run code.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

from igpt_cli.errors import FormatError
from igpt_cli.images.restricted import RestrictedUnpickler
from igpt_cli.training.distributed import Ranks

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
