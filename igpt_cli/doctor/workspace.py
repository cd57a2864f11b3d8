"""Check that a folder can hold what igpt writes: free disk, HDF5 locks, memory maps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np


def free_disk(folder: Path) -> int:
    """Bytes that can still be written there."""
    return shutil.disk_usage(folder).free


def write_trouble(folder: Path) -> str:
    """Why no file can be written, synced and renamed there; "" where it can."""
    try:
        with _scratch(folder) as scratch:
            with (scratch / "part").open("wb") as file:
                file.write(b"igpt")
                os.fsync(file.fileno())
            os.replace(scratch / "part", scratch / "whole")
    except OSError as e:
        return e.strerror or str(e)
    return ""


def lock_trouble(folder: Path) -> str:
    """Why HDF5 cannot lock a file there; "" where it can. Without locks two writers could spoil one file."""
    try:
        with _scratch(folder) as scratch:
            for mode in ("w", "r"):
                h5py.File(scratch / "locked.h5", mode, locking=True).close()
    except OSError as e:
        return _first_line(e)
    return ""


def map_trouble(folder: Path) -> str:
    """Why a dataset of an HDF5 file there cannot be mapped into memory, as token files are; "" where it can."""
    tokens = np.arange(1024, dtype=np.uint16)
    try:
        with _scratch(folder) as scratch:
            with h5py.File(scratch / "tokens.h5", "w", locking="best-effort") as h5:
                offset = h5.create_dataset("tokens", data=tokens).id.get_offset()
            mapped = np.memmap(scratch / "tokens.h5", np.uint16, "r", offset, tokens.shape)
            same = bool((mapped == tokens).all())
            del mapped  # before the file is removed
    except OSError as e:
        return _first_line(e)
    return "" if same else "what was read is not what was written"


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".igpt-doctor-", dir=folder) as made:
        yield Path(made)


def _first_line(e: OSError) -> str:
    return str(e).strip().split("\n")[0][:200]
