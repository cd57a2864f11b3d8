"""Variables that a launcher left behind: named where they cannot be used, and never a silent wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from training_runs import ROOT, TOY, write_tokens

from igpt_cli.errors import InputError
from igpt_cli.training import distributed
from igpt_cli.training.distributed import init_distributed, under_torchrun

COMMAND = [sys.executable, "-m", "igpt_cli", "pretrain", "t.h5", "--steps", "1", *map(str, TOY)]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"WORLD_SIZE": "4"}, r"but RANK is not set, .*MASTER_PORT is not set, .*; MASTER_ADDR is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', a whole number 1..1048576 is needed"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        (WHOLE | {"RANK": ""}, "RANK is '', a whole number 0..1 is needed"),
        (WHOLE | {"RANK": "2"}, "RANK is '2', a whole number 0..1"),
        (WHOLE | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        (WHOLE | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000', a whole number 1..65535"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set, the address of rank 0 is needed"),
    ],
)
def test_variables_that_cannot_be_used_are_named(monkeypatch, left, message):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    for use in (under_torchrun, lambda: init_distributed().__enter__()):
        with pytest.raises(InputError, match=message + ".*unset WORLD_SIZE for a process alone"):
            use()


@pytest.mark.parametrize("left", [{}, {"RANK": "3"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": ""}])
def test_one_process_is_alone_whatever_else_is_left(monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert not under_torchrun()


def test_the_command_names_them_too(workspace, monkeypatch, igpt):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = igpt("pretrain", "absent.h5")
    assert (done.code, "internal" in done.stderr) == (1, False)
    assert done.stderr.startswith("error: WORLD_SIZE is set, so this process should be one of several, but RANK is not")
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_what_it_waits_for_and_a_signal_ends_it_at_once(tmp_path, rank, number):
    write_tokens(tmp_path / "t.h5")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **WHOLE, "RANK": rank, "MASTER_PORT": f"2958{rank}"}
    process = subprocess.Popen(COMMAND, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    said = ""
    while "waiting for" not in said and process.poll() is None:
        said = process.stderr.readline()
    waits_for = "1 of 2 ranks" if rank == "0" else f"rank 0 at 127.0.0.1:2958{rank}"
    assert said.strip() == f"waiting for {waits_for} (WORLD_SIZE=2 is set; unset it for a process alone)"
    sent = time.monotonic()
    process.send_signal(number)
    process.wait(10)
    assert time.monotonic() - sent < 2
    assert process.returncode != 0
    assert not (tmp_path / "runs").exists()


def test_the_wait_ends(monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InputError, match=r"1 of 2 ranks did not start in 1 s \(WORLD_SIZE=2 is set; unset it"):
        init_distributed().__enter__()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "29579")
    with pytest.raises(InputError, match=r"rank 1 cannot meet rank 0 at 127.0.0.1:29579 \(.*WORLD_SIZE=2 is set"):
        init_distributed().__enter__()
    assert signal.getsignal(signal.SIGTERM) is handler
