"""Damaged HDF5 files neither hang nor crash the command; sound ones open as fast as before."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from training_runs import write_tokens

from igpt_cli import hdf5_probe
from igpt_cli.errors import FormatError
from igpt_cli.hdf5 import open_hdf5
from igpt_cli.hdf5_probe import probe
from igpt_cli.tokens.store import open_tokens


@pytest.fixture
def quick(monkeypatch):
    """One second of computing is enough to see that it does not end."""
    monkeypatch.setattr(hdf5_probe, "CPU_SECONDS", 1)


def heaps(content: bytes) -> list[int]:
    """Where local heaps lie."""
    places, at = [], content.find(b"HEAP")
    while at >= 0:
        places.append(at)
        at = content.find(b"HEAP", at + 1)
    return places


def test_a_heap_whose_free_list_is_a_circle_does_not_hang(tmp_path, quick):
    """As in a file of which a block was zeroed: the first free place of a heap says that it is followed by itself."""
    path = write_tokens(tmp_path / "t.h5")
    content = path.read_bytes()
    damaged = 0
    for at in heaps(content):
        _, free, data = np.frombuffer(content, "<u8", 3, at + 8)
        if free < 2**32:
            block = bytearray(content)
            block[int(data + free) : int(data + free) + 8] = int(free).to_bytes(8, "little")
            path.write_bytes(block)
            began = time.monotonic()
            with pytest.raises(FormatError, match="t.h5 is damaged"):
                open_tokens(path)
            assert time.monotonic() - began < 10
            damaged += 1
    assert damaged


def test_a_zeroed_heap_does_not_hang(tmp_path, quick):
    path = write_tokens(tmp_path / "t.h5")
    content = path.read_bytes()
    for at in heaps(content):
        _, _, data = np.frombuffer(content, "<u8", 3, at + 8)
        block = bytearray(content)
        block[int(data) : int(data) + 88] = bytes(88)
        path.write_bytes(block)
        with pytest.raises(FormatError, match="t.h5"):
            open_tokens(path)


def test_a_crash_stays_in_the_child(tmp_path):
    path = tmp_path / "x"
    path.touch()
    with pytest.raises(FormatError, match=r"x is damaged: HDF5 crashes on it \(SIGSEGV\); copy or download it again"):
        probe(path, lambda: os.kill(os.getpid(), signal.SIGSEGV))


def test_memory_in_the_child_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.touch()
    seen = tmp_path / "seen"

    def read():
        try:
            np.ones(2**30, np.uint8)
        except MemoryError:
            seen.touch()

    probe(path, read)
    assert seen.exists() or not Path("/proc/self/statm").exists()


def test_what_the_child_raises_is_met_by_the_parent(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["soft"] = h5py.SoftLink("/other")
    with pytest.raises(FormatError, match="is a soft link"), open_hdf5(path):
        pass


def test_a_file_is_probed_once_until_it_changes(tmp_path, monkeypatch):
    path, forks, fork = write_tokens(tmp_path / "t.h5"), [], os.fork
    monkeypatch.setattr(hdf5_probe.os, "fork", lambda: forks.append(None) or fork())
    for _ in range(3):
        open_tokens(path)
    assert len(forks) == 1
    os.utime(path, ns=(1, 1))
    open_tokens(path)
    assert len(forks) == 2
