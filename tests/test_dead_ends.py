"""What is missing around a command is said in a message of its own: a compiler, stdin, an encoding, the token file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ROOT, TOY, stop_at, write_tokens

from igpt_cli.errors import Interrupted
from igpt_cli.model_dir import read_config
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.run import _from_run, pretrain
from igpt_cli.training.settings import Execution, PretrainSettings


def igpt_process(*args, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    command = [sys.executable, "-m", "igpt_cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, env=env, timeout=120, **more)


def test_no_compiler(workspace, igpt, monkeypatch):
    write_tokens(workspace / "t.h5")
    monkeypatch.setenv("PATH", str(workspace))
    monkeypatch.delenv("CXX", raising=False)
    done = igpt("pretrain", "t.h5", "--steps", 2, "--compile", *TOY)
    assert done.code == 1
    assert "error: no C++ compiler (" in done.stderr
    assert "or train with --no-compile" in done.stderr
    assert list(Path("runs").iterdir()) == []


def test_a_closed_stdin(workspace):
    done = igpt_process("data", "info", "-", preexec_fn=lambda: os.close(0))
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: '-' reads paths from stdin, which is closed")


@pytest.mark.parametrize("name", ["t\u00fc.h5", "t\udcff.h5"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_stdout_cannot_encode(workspace, name, encoding):
    write_tokens(workspace / name)
    for args in (["tokens", "info", name], ["tokens", "info", "absent-" + name]):
        done = igpt_process(*args, env={"PYTHONIOENCODING": encoding})
        assert b"internal" not in done.stderr
        assert done.returncode == ("absent-" in args[-1])


@pytest.fixture
def stopped_in_a(workspace, monkeypatch):
    """A/runs/a was stopped after step 2; now the current folder is B."""
    for name in ("A/data", "B"):
        Path(name).mkdir(parents=True)
    monkeypatch.chdir(workspace / "A")
    write_tokens(Path("data/t.h5"))
    recipe = PretrainSettings(n_layer=1, n_embd=8, steps=4, batch_size=6)
    with pytest.raises(Interrupted):
        pretrain(
            open_tokens("data/t.h5"),
            "runs/a",
            recipe,
            Execution(precision="float32"),
            device="cpu",
            on_record=stop_at(2),
        )
    monkeypatch.chdir(workspace / "B")
    return workspace


def test_a_run_is_resumed_from_another_folder(stopped_in_a, igpt):
    done = igpt("pretrain", "--resume", "../A/runs/a", "--device", "cpu")
    assert done.code == 0, done.stderr
    assert read_config(Path("../A/runs/a"))["result"]["status"] == "done"


def test_a_run_that_was_moved_with_its_tokens_finds_them(stopped_in_a, igpt):
    Path("../A").rename("moved")
    done = igpt("pretrain", "--resume", "moved/runs/a", "--device", "cpu")
    assert done.code == 0, done.stderr


def test_a_run_records_no_path_of_the_machine(stopped_in_a):
    data = read_config(Path("../A/runs/a"))["data"]
    assert (data["path"], data["from_run"]) == ("data/t.h5", "../../data/t.h5")
    for file in Path("../A/runs/a").rglob("*.json*"):
        assert str(stopped_in_a) not in file.read_text()
    assert _from_run(Path("/elsewhere/run"), __file__) is None  # the way would lead through the root


def test_where_the_tokens_are_gone_the_message_says_what_to_type(stopped_in_a, igpt):
    Path("../A/data/t.h5").rename("elsewhere.h5")
    done = igpt("pretrain", "--resume", "../A/runs/a", "--device", "cpu")
    assert done.code == 1
    assert "its data, data/t.h5, are not here; name the token file or images T: igpt pretrain T --resume" in done.stderr
    assert igpt("pretrain", "elsewhere.h5", "--resume", "../A/runs/a", "--device", "cpu").code == 0
