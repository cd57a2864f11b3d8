"""Where an output may be written: never over a device, a pipe or a socket; through a link; a run's folder once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from training_runs import ROOT, TOY, write_tokens

from igpt_cli.errors import OutputError
from igpt_cli.files import check_output, replacing, replacing_folder
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training import run as training_run
from igpt_cli.training.run import pretrain
from igpt_cli.training.settings import Execution, PretrainSettings
from igpt_cli.workspace import LATEST, new_run

PALETTE = Palette(np.linspace(10, 240, 8, dtype=np.float32)[:, None].repeat(3, 1))


@pytest.fixture
def special(tmp_path, monkeypatch):
    """A pipe, a socket, a device, and a link to each."""
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
        places = {"pipe": Path("pipe"), "socket": Path("socket"), "device": Path("/dev/null")}
        for kind, path in list(places.items()):
            Path(f"to-{kind}").symlink_to(path)
        yield places | {f"to-{kind}": Path(f"to-{kind}") for kind in places}


@pytest.mark.parametrize("force", [False, True])
def test_a_device_a_pipe_or_a_socket_is_never_replaced(special, force):
    for name, path in special.items():
        kind, before = name.removeprefix("to-"), path.stat().st_mode
        for write in (lambda path=path: check_output(path, force), lambda path=path: PALETTE.save(path, force)):
            with pytest.raises(OutputError, match=f"{path} is a {kind}, which a file does not replace; choose another"):
                write()
        with pytest.raises(OutputError, match=f"is a {kind}"), replacing(path) as part:
            part.write_text("x")
        assert path.stat().st_mode == before


def test_commands_do_not_replace_devices(special, igpt):
    PALETTE.save("p.npz")
    for path in special.values():
        done = igpt("palette", "convert", "p.npz", path, "--force")
        assert done.code == 1, path
        assert "choose another --out" in done.stderr or "none of" in done.stderr
    assert Path("pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "p.npz", tmp_path / "link.npz"
    link.symlink_to(Path("real") / "p.npz")  # relative, and nothing is there yet
    PALETTE.save(link)
    assert (link.is_symlink(), target.is_file()) == (True, True)
    with pytest.raises(OutputError, match="exists already"):
        PALETTE.save(link)
    second = tmp_path / "second.npz"
    second.symlink_to(link)
    PALETTE.save(second, force=True)
    assert second.is_symlink()
    assert link.is_symlink()
    assert Palette.load(target).sha256 == PALETTE.sha256
    assert sorted(p.name for p in target.parent.iterdir()) == ["p.npz"]


def test_a_link_to_a_folder_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replacing_folder(tmp_path / "link") as part:
        (part / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["new"]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="leads in a circle"):
        check_output(tmp_path / "a")


def test_every_process_gets_a_default_run_of_its_own(workspace):
    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        made = list(pool.map(lambda _: stack.enter_context(new_run("igpt-tiny")), range(24)))
        assert sorted(made, key=str) == sorted({Path(f"runs/igpt-tiny-{n}") for n in range(1, 25)}, key=str)


def test_commands_started_together_make_runs_of_their_own(workspace):
    write_tokens(workspace / "t.h5")
    command = [sys.executable, "-m", "igpt_cli", "pretrain", "t.h5", "--steps", "1", *map(str, TOY), "-q"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    assert {p.communicate(timeout=120)[0].strip() for p in started} == {f"runs/igpt-tiny-{n}" for n in (1, 2, 3)}


def test_one_of_two_processes_makes_a_named_run(workspace):
    tokens = open_tokens(write_tokens(workspace / "t.h5"))

    def make(_):
        try:
            training_run.make_run(Path("run"), False, tokens, {"format": "igpt-model", "data": {"path": "t.h5"}})
        except OutputError as e:
            assert "run exists already" in str(e)  # noqa: PT017
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(16))) == 1


def test_a_run_that_fails_before_its_first_step_leaves_nothing(workspace, igpt, monkeypatch):
    write_tokens(workspace / "t.h5")
    assert igpt("pretrain", "t.h5", "--steps", 1, *TOY, "-o", "runs/before").code == 0
    before = LATEST.read_text()

    def fails(loop):
        raise RuntimeError("no step works")

    monkeypatch.setattr(training_run.Loop, "run", fails)
    for named in ([], ["-o", "runs/named"], ["-o", "runs/named", "--force"]):
        done = igpt("pretrain", "t.h5", "--steps", 1, *TOY, *named)
        assert "no step works" in done.stderr
        assert sorted(p.name for p in Path("runs").iterdir()) == ["before", "latest"]
        assert LATEST.read_text() == before
    with pytest.raises(RuntimeError):
        pretrain(open_tokens("t.h5"), "run", PretrainSettings(n_layer=1, n_embd=8, steps=1), Execution(), device="cpu")
    assert not Path("run").exists()


def test_what_is_wrong_before_training_leaves_no_default_run(workspace, igpt):
    assert igpt("pretrain", "absent.h5", "--steps", 1).code == 1
    assert list(Path("runs").glob("*-*")) == []
