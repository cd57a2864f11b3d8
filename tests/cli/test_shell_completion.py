"""igpt completion: what is offered for a word, and the scripts in real shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igpt_cli.cli.app import COMMANDS
from igpt_cli.cli.reference import commands
from igpt_cli.cli.shell_completion import complete, words_of
from igpt_cli.models.registry import all_presets
from igpt_cli.shell_completion import MARK, SHELLS, install, is_installed, places, script

PROGRAM = Path(sys.executable).parent / "igpt"


@pytest.fixture
def runs(workspace) -> Path:
    """A workspace with two runs, the newest of which is "second one"; what has no config.json is no run."""
    for name in ("first", "second one"):
        (workspace / "runs" / name).mkdir(parents=True)
        (workspace / "runs" / name / "config.json").touch()
    (workspace / "runs" / "other").mkdir()
    (workspace / "runs" / "latest").write_text("second one\n", encoding="utf-8")
    (workspace / "photos.tar").touch()
    return workspace


def offered(*words: str) -> list[str]:
    return [value for value, _ in complete(list(words))[0]]


# What is offered.


def test_commands_are_offered_in_the_order_of_the_help():
    assert offered("") == list(COMMANDS)
    assert offered("tok") == ["tokenize", "tokens"]
    assert offered("palette", "") == ["fit", "count", "show", "convert"]
    assert offered("palette", "fit", "x", "y", "pale") == []
    assert offered("nonsense", "") == []
    assert offered("--version", "") == []


@pytest.mark.parametrize("name", commands())
def test_every_option_and_every_choice_is_offered(name):
    """Of each command: all its options after a dash, and all words of metavars such as none|soft|hard."""
    words = name.split()[1:]
    options = [p for p in commands()[name].params if p.opts[0].startswith("-")]
    assert {max(p.opts, key=len) for p in options} <= {*offered(*words, "-")}
    for p in options:
        if re.fullmatch(r"[a-z0-9-]+(\|[a-z0-9-]+)+", p.metavar or ""):
            assert offered(*words, max(p.opts, key=len), "") == p.metavar.split("|")


def test_an_option_is_offered_once_unless_it_can_be_repeated():
    assert "--seed" in offered("sample", "--s")
    assert "--seed" not in offered("sample", "--seed", "3", "--s")
    assert "--beside" in offered("probe", "--beside", "x", "--b")
    assert offered("probe", "--", "--lay") == []


def test_splits_are_offered_wherever_one_can_be_named():
    for words in (["palette", "fit"], ["tokenize"], ["tokens", "show"], ["evaluate"], ["features"], ["attention"]):
        assert offered(*words, "--split", "") == ["train", "val", "test"], words


def test_models_are_offered_where_they_are_taken(workspace):
    tokens = [n for n, p in all_presets().items() if p.of_tokens]
    images = [n for n, p in all_presets().items() if not p.of_tokens]
    assert offered("pretrain", "-m", "") == offered("pretrain", "--model", "") == offered("plan", "") == tokens
    assert offered("train", "") == images
    assert offered("train", "vit-ti") == [n for n in images if n.startswith("vit-ti")]
    assert offered("models", "") == tokens + images
    assert offered("ablate", "pos") == ["positions"]
    assert offered("pretrain", "--model=igpt-t") == ["--model=igpt-tiny"]


def test_runs_are_offered_where_they_are_taken(runs):
    here = ["runs/first", "runs/second one", "latest"]
    for words in (["probe"], ["evaluate"], ["compare", "runs/first"], ["export", "timm"], ["train", "--teacher"]):
        assert offered(*words, "") == [*here, "builtin:igpt-photos", "builtin:igpt-tiny"], words
    assert offered("pretrain", "--resume", "") == here  # those that ship with igpt cannot be trained on
    assert offered("probe", "runs/s") == ["runs/second one"]
    assert offered("train", "runs/") == ["runs/first", "runs/second one"]


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["tokenize", ""], True),
        (["probe", "runs/first", ""], True),
        (["tokenize", "-p", ""], True),
        (["pretrain", "--config", ""], True),
        (["probe", "elsewhere/"], True),
        (["pretrain", "--steps", ""], False),
        (["sample", "--top-p", ""], False),
        (["pretrain", "--budget", ""], False),
        (["evaluate", "--split", ""], False),
        (["train", "--recipe", ""], False),
        (["features", "--bert-masks", ""], False),
        (["complete", "--mask-image", ""], True),
        (["pal"], False),
    ],
    ids=str,
)
def test_files_are_offered_where_they_are_taken(words, files):
    assert complete(words)[1] is files


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("igpt ", [""]),
        ("igpt", [""]),
        ("igpt pro", ["pro"]),
        ("igpt probe 'my run", ["probe", "my run"]),
        ("igpt probe my\\ run", ["probe", "my run"]),
        ("igpt probe my\\ ", ["probe", "my "]),
        ("igpt probe a ", ["probe", "a", ""]),
        (".venv/bin/igpt   probe", ["probe"]),
    ],
)
def test_a_line_becomes_words(line, words):
    assert words_of(line) == words


def test_bash_gets_what_follows_its_word_break(igpt, workspace):
    done = igpt("completion", "candidates", "--line", "igpt probe builtin:ig", "--breaks", ":=")
    assert done.stdout == "files\nigpt-photos\tships with igpt\nigpt-tiny\tships with igpt\n"
    done = igpt("completion", "candidates", "--line", "igpt probe --solver=k", "--breaks", ":=")
    assert done.stdout == "words\nknn\t\n"


def test_completion_loads_no_heavy_library(workspace):
    code = (
        "import sys\nfrom igpt_cli.__main__ import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'h5py', 'rich') if m in sys.modules])"
    )
    for words in (["train", "vit-ti-3"], ["probe", "builtin:igpt-t"], ["plan", "--gpu", "h200"]):
        command = [sys.executable, "-c", code, "completion", "candidates", "--", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 3, done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


# Installing.


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder."""
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    (tmp_path / "my home").mkdir()
    return tmp_path / "my home"


@pytest.mark.parametrize("shell", SHELLS)
def test_install_twice(shell, home, igpt, monkeypatch):
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    at = places(shell)
    assert not is_installed(shell)
    if at.startup:
        at.startup.write_text("alias ll='ls -l'", encoding="utf-8")  # without a line break at its end
    done = igpt("completion", "install")
    assert (done.code, done.stdout) == (0, f"{at.script}\n")
    assert is_installed(shell)
    at.script.write_text(f"{MARK}, an old one\n", encoding="utf-8")
    assert igpt("completion", "install", "--shell", shell, "-q").stderr == ""
    assert at.script.read_text(encoding="utf-8") == script(shell) == igpt("completion", "show").stdout
    if at.startup:
        first, *ours = at.startup.read_text(encoding="utf-8").splitlines()
        assert first == "alias ll='ls -l'"
        assert len(ours) == 1
        at.startup.write_text(first + "\n", encoding="utf-8")
        assert not is_installed(shell)


def test_a_file_of_others_is_not_overwritten(home, igpt):
    at = places("fish").script
    at.parent.mkdir(parents=True)
    at.write_text("mine\n", encoding="utf-8")
    done = igpt("completion", "install", "--shell", "fish")
    assert (done.code, done.stdout) == (1, "")
    assert "exists already" in done.stderr
    assert at.read_text(encoding="utf-8") == "mine\n"
    assert igpt("completion", "install", "--shell", "fish", "--force").code == 0
    assert at.read_text(encoding="utf-8") == script("fish")


def test_a_linked_startup_file_stays_a_link(home):
    kept = home / "dotfiles"
    kept.touch()
    (home / ".bashrc").symlink_to(kept)
    install("bash")
    assert (home / ".bashrc").is_symlink()
    assert "completion.bash" in kept.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("shell", "args"), [("/bin/dash", []), ("", []), ("/bin/bash", ["--shell", "csh"])], ids=["dash", "none", "csh"]
)
def test_an_unknown_shell(shell, args, home, igpt, monkeypatch):
    monkeypatch.setenv("SHELL", shell)
    for command in ("install", "show"):
        done = igpt("completion", command, *args)
        assert (done.code, done.stdout) == (1, "")
        assert "bash, zsh" in done.stderr
    assert list(home.iterdir()) == []


# Real shells.


def needs(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not here")
    if not PROGRAM.exists():
        pytest.skip("igpt is not installed beside this Python")
    return path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}", "TERM": "xterm", **more}


#: What bash itself prepares before it calls a completion function, for a line that ends at the cursor.
BASH = r"""
set -u
source "$1"
set -- "$2"
COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'
complete -p igpt
_igpt igpt
for reply in "${COMPREPLY[@]}"; do printf '%s\n' "$reply"; done
"""


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("igpt tok", ["tokenize", "tokens"]),
        ("igpt train resnet-18-", ["resnet-18-32", "resnet-18-64"]),
        ("igpt pretrain --objective ", ["ar", "bert"]),
        ("igpt probe runs/s", [r"runs/second\ one"]),
        ("igpt probe builtin:", ["igpt-photos", "igpt-tiny"]),
        ("igpt probe --solver=l", ["lbfgs"]),
        ("igpt tokenize pho", []),
    ],
)
def test_bash(line, replies, runs, tmp_path):
    (tmp_path / "script").write_text(script("bash"), encoding="utf-8")
    command = [needs("bash"), "--norc", "-c", BASH, "bash", tmp_path / "script", line]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    spec, *found = done.stdout.splitlines()
    assert (spec, done.stderr) == ("complete -F _igpt igpt", "")
    assert found == replies


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("igpt tok", ["tokenize", "tokens"]),
        ("igpt pretrain --objective ", ["ar", "bert"]),
        ("igpt probe runs/s", ["runs/second one"]),
        ("igpt probe builtin:", ["builtin:igpt-photos", "builtin:igpt-tiny"]),
        ("igpt tokenize pho", ["photos.tar"]),
        ("igpt pretrain --steps ", []),
    ],
)
def test_fish(line, replies, runs, tmp_path):
    (tmp_path / "script").write_text(script("fish"), encoding="utf-8")
    ask = ["source $argv[1]; complete -C $argv[2]", tmp_path / "script", line]
    done = subprocess.run(
        [needs("fish"), "--no-config", "-c", *ask], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert [found.split("\t")[0] for found in done.stdout.splitlines()] == replies, done.stderr


def typed_in(shell: str, home: Path, keys: str, until: str, seconds: float = 30) -> str:
    """What a terminal shows once `keys` are typed into a shell that has started, up to the text `until`."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(shell, [shell, "-i"], environment(HOME=str(home), PS1="ready> ", COLUMNS="100"))
    try:
        shown, sent, deadline = "", False, time.monotonic() + seconds
        while time.monotonic() < deadline and until not in shown:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")
            if not sent and "ready> " in shown:
                time.sleep(0.3)  # until the line editor reads
                os.write(terminal, keys.encode())
                sent = True
        return shown
    finally:
        os.close(terminal)
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("keys", "becomes"),
    [
        ("igpt probe builtin:igpt-t\t", "builtin:igpt-tiny "),
        ("igpt probe runs/s\t", "runs/second\\ one "),
        ("igpt tokenize pho\t", "photos.tar "),
    ],
)
def test_a_tab_in_a_terminal(shell, keys, becomes, runs, home):
    """Through the installed files, as a person types it."""
    path = needs(shell)
    install(shell)
    if shell == "zsh":  # its own prompt and no questions about folders of others
        (home / ".zshrc").write_text(
            "PS1='ready> '; ZLE_RPROMPT_INDENT=0; autoload -Uz compinit && compinit -u\n"
            + (home / ".zshrc").read_text(encoding="utf-8"),
            encoding="utf-8",
        )
    else:
        (home / ".bashrc").write_text("PS1='ready> '\n" + (home / ".bashrc").read_text("utf-8"), encoding="utf-8")
    shown = typed_in(path, home, keys, becomes.removesuffix(" "))
    assert becomes.removesuffix(" ") in shown, shown
