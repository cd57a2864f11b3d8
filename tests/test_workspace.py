"""Where things lie when nobody says where, and writing whole files or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from igpt_cli.errors import InputError, OutputError
from igpt_cli.files import check_output, replacing, require_file
from igpt_cli.workspace import default_tokens, latest_run, new_run, resolve_run, set_latest


def test_the_default_token_file_is_the_only_one(workspace):
    with pytest.raises(InputError, match="run `igpt tokenize` first"):
        default_tokens()
    Path("data").mkdir()
    Path("data/tokens-32.h5").touch()
    Path("data/tokens-32.shard-0-of-2.h5").touch()  # a part is not the whole
    assert default_tokens() == Path("data/tokens-32.h5")
    Path("data/tokens-48.h5").touch()
    with pytest.raises(InputError, match=r"several in data/: data/tokens-32.h5, data/tokens-48.h5; name one of them"):
        default_tokens()


def test_runs_are_numbered_and_the_newest_is_remembered(workspace):
    with new_run("igpt-s") as run:
        assert run == Path("runs/igpt-s-1")
    for name in ("igpt-s-1", "igpt-s-9", "igpt-s-x", "other-12"):
        Path("runs", name).mkdir(parents=True)
    with new_run("igpt-s") as run, new_run("igpt-s") as second:
        assert (run, second) == (Path("runs/igpt-s-10"), Path("runs/igpt-s-11"))
        (second / "config.json").touch()
    assert (run.exists(), second.exists()) == (False, True)  # an empty one is removed
    with pytest.raises(InputError, match="no run given and runs/latest names none"):
        latest_run()
    set_latest(Path("runs/igpt-s-9"))
    assert latest_run() == resolve_run("latest") == resolve_run("runs/latest") == Path("runs/igpt-s-9")
    set_latest(Path("elsewhere"))  # not in the workspace's runs/
    assert latest_run() == Path("runs/igpt-s-9")
    Path("runs/latest").write_text("../../etc\n")
    with pytest.raises(InputError, match="runs/latest names '../../etc', and there is no folder runs/etc"):
        latest_run()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]
    with replacing(path) as part:
        assert part.suffix == ".txt"
        part.write_text("new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "new")]


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"cannot write .*a.txt: No space left on device"), replacing(path) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "there.npz").touch()
    with pytest.raises(
        OutputError, match=r"there.npz exists already; choose another --out, or overwrite it with --force"
    ):
        check_output(tmp_path / "there.npz")
    assert check_output(tmp_path / "there.npz", force=True) == tmp_path / "there.npz"
    with pytest.raises(OutputError, match=r"there.npz is not a folder; choose another --out"):
        check_output(tmp_path / "there.npz" / "x.npz")
    with pytest.raises(InputError, match="is a folder; a palette was expected there"):
        require_file(tmp_path, "a palette")
