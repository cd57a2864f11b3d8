"""The documentation is true: pages are up to date, links lead somewhere, commands parse, code runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from igpt_cli.cli.reference import REMAKE, commands, module_map, reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "data" / "README.md"]
NAMES = [p.relative_to(ROOT).as_posix() for p in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of code in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_command_page_is_up_to_date():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), f"docs/cli.md is not what the commands say; make it anew: {REMAKE}"


def test_the_command_page_does_not_depend_on_the_terminal(monkeypatch):
    before = reference()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERMINAL_WIDTH", "40")
    assert reference() == before


# Links.


@cache
def anchors(page: Path) -> set[str]:
    """What #... may name in a page: its headings, as GitHub spells them."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL).splitlines()
    titles = [re.sub(r"^#+\s+", "", line) for line in lines if re.match(r"#+\s", line)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(f"{link}: there is no {target}")
        elif anchor and anchor not in anchors(target):
            found.append(f"{link}: {target.name} has no heading #{anchor}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# A b\n[x](b.md) [y](#a-b) [z](#c) `[w](q.md)` [v](https://example.org)\n", encoding="utf-8")
    assert [found.split(":")[0] for found in broken_links(page)] == ["b.md", "#c"]


# Commands.


@cache
def known() -> dict:
    return commands()


def command_lines(page: Path) -> list[str]:
    """Every line of shell that calls igpt: in code blocks, or in backticks."""
    text = page.read_text(encoding="utf-8")
    fenced = [line for block in blocks(page, "(?:sh|console)") for line in lines(block)]
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = [line.strip() for line in text.splitlines() if re.match(r"    igpt (?!.*OPTIONS)", line)]
    inline = [span for span in re.findall(r"`([^`\n]+)`", text) if re.match(r"igpt [a-z]", span)]
    return fenced + indented + inline


def lines(block: str) -> list[str]:
    """Shell lines, those that end with a backslash joined."""
    return [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines() if "igpt" in line]


def calls(line: str) -> list[list[str]]:
    """The arguments of every call of igpt in a line: alone, in a pipe, after && or in "$(...)"."""
    line = re.sub(r'"?\$\(([^()]*)\)"?', r"RUN ; \1 ; ", line) if "$(" in line else line
    found = []
    for part in re.split(r"[;|]|&&|-exec", _without_quotes(line)):
        words = shlex.split(re.sub(r"\s[12]?>{1,2}\s*\S+", "", part), comments=True)
        if words and words[0].removeprefix(".venv/bin/") == "igpt":
            found.append([w for w in words[1:] if w != "..."])
    return found


def _without_quotes(line: str) -> str:
    """Quoted text, which may hold any sign, as one word."""
    return re.sub(r"'[^']*'", "TEXT", line)


def problem(args: list[str]) -> str | None:
    """What is wrong with `igpt ARGS`; None where the command exists and so do its options."""
    name = "igpt"
    while args and f"{name} {args[0]}" in known():
        name, args = f"{name} {args[0]}", args[1:]
    command = known()[name]
    options = {o: p for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    options |= {"--help": None, "-h": None, "--debug": None}
    words, i = [], 0
    while i < len(args):
        word, _, value = args[i].partition("=")
        i += 1
        if word == "--":
            words += args[i:]
            break
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        if word not in options:
            return f"{name} has no option {word}"
        takes = options[word] is not None and not options[word].is_flag
        if takes and not value:
            if i == len(args):
                return f"{name} {word} lacks its value"
            i += 1
    arguments = [p for p in command.params if not p.opts[0].startswith("-")]
    if hasattr(command, "commands") and words and words != ["COMMAND"]:
        return f"there is no command {name} {words[0]}"
    most = 1000 if any(p.nargs == -1 for p in arguments) else len(arguments)
    if len(words) > most and not hasattr(command, "commands"):
        return f"{name} takes {most} arguments, not {' '.join(words)}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page):
    found = [(line, problem(args)) for line in command_lines(page) for args in calls(line)]
    assert [f"{line}: {wrong}" for line, wrong in found if wrong] == []


def test_the_pages_show_commands():
    assert sum(len(calls(line)) for page in PAGES for line in command_lines(page)) > 80


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("igpt pallete fit", "there is no command igpt pallete"),
        ("igpt palette fitt", "there is no command igpt palette fitt"),
        ("igpt probe --layr 20", "igpt probe has no option --layr"),
        ("find . | igpt tokenize - --colour 3", "igpt tokenize has no option --colour"),
        ('igpt probe "$(igpt pretrain t.h5 --nope)" --layer 20', "igpt pretrain has no option --nope"),
        ("igpt palette convert a b c", "igpt palette convert takes 2 arguments, not a b c"),
        ("igpt probe --layer", "igpt probe --layer lacks its value"),
        ("igpt models   # 24 layers | --nope", None),
        ("igpt probe a b --layer=20 --no-floors -q", None),
        ("igpt palette show -- --odd > list.txt", None),
        ("igpt palette show p.npz 2>> said.txt q.npz", "igpt palette show takes 1 arguments, not p.npz q.npz"),
    ],
)
def test_wrong_commands_are_found(line, wrong):
    assert [problem(args) for args in calls(line)][-1] == wrong


# The library.


def test_the_python_page_runs(tmp_path, monkeypatch, capsys):
    """Every block in its order; what a comment behind print(...) says is what is printed."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(DOCS / "python.md", "python"))
    assert code.count("\n") > 60
    exec(compile(code, "docs/python.md", "exec"), {"__name__": "docs"})
    printed = capsys.readouterr().out
    for said in (
        "nowhere.npz does not exist; a palette was expected there\n",
        "folder {'train': 3022, 'test': 790} ['activities',",
        "{'train': 3022, 'test': 790} 0\n",
        "(3022, 1024) uint16\n",
        "done 2 ",
        "\n4.1588",
        "(16, 16) (32, 32)\n",
        "\nTrue\n",
    ):
        assert said in printed, said
    assert {p.name for p in tmp_path.iterdir()} == {
        *("emoji", "palette.npz", "tokens.h5", "mine.h5", "runs", "probe.json", "layers.png", "distance.png"),
        *("samples.png", "completed.png", "theirs"),
    }


# The contract of the files.


def test_the_format_page_names_everything_that_is_written(tmp_path, toy_tokens):
    """Keys of JSON, arrays, datasets, attributes and tensors, as they come out today."""
    import h5py
    import numpy as np
    from safetensors import safe_open

    from igpt_cli.model_dir import load_model, read_metrics
    from igpt_cli.palette.histogram import ColourCounts
    from igpt_cli.probing.probe import probe
    from igpt_cli.tokens.store import open_tokens
    from igpt_cli.training.run import pretrain
    from igpt_cli.training.settings import PretrainSettings

    tokens = open_tokens(toy_tokens())
    pretrain(tokens, tmp_path / "run", PretrainSettings(steps=1, batch_size=2), device="cpu", command="igpt pretrain")
    run = load_model(tmp_path / "run")
    found = probe(run, tokens, [0, 1])
    ColourCounts().save(tmp_path / "counts.npz")
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    names = {*run.config, *run.config["model"], *run.config["training"], *run.config["data"], *run.config["result"]}
    names |= {key for record in read_metrics(run.path) for key in record}
    names |= {*found, *found["layers"][0], *found["floors"], *found["floors"]["raw pixels"]}
    with h5py.File(tokens.path) as h5:
        names |= {*h5.attrs, *h5["train/tokens"].attrs, *(f"/<split>/{column}" for column in h5["train"])}
    for path in (run.path / "palette.npz", tmp_path / "counts.npz"):
        with np.load(path) as arrays:
            names |= {*arrays.files, *json.loads(str(arrays["meta"]))}
    with safe_open(run.path / "model.safetensors", "np") as weights:
        names |= {re.sub(r"^h\.\d+\.", "h.<l>.", tensor) for tensor in weights.keys()}  # noqa: SIM118
    names |= {p.name for p in run.path.iterdir()}
    missing = sorted(n for n in names if not re.search(rf"(?<![\w.]){re.escape(n)}(?![\w])", page))
    assert not missing, f"docs/formats.md does not name {', '.join(missing)}"


def test_the_architecture_page_maps_every_module():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert module_map() in page, "run python -m igpt_cli.cli.reference modules, and put it into docs/architecture.md"


# The tutorial.


def run_block(block: str, folder: Path) -> None:
    """Run a block of shell in a folder, with the `igpt` of this Python on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path):
    """Every command, in the shell, in an empty folder; what the page says they write is there."""
    for block in blocks(DOCS / "tutorial.md", "sh"):
        run_block(block, tmp_path)
    named = re.findall(r"^igpt .* (?:-o|--figure) (\S+)", "\n".join(blocks(DOCS / "tutorial.md", "sh")), re.MULTILINE)
    written = [*named, "data/palette.npz", "data/tokens-32.h5", "runs/latest", "runs/igpt-tiny-1/metrics.jsonl"]
    assert [name for name in written if not (tmp_path / name).exists()] == []


@pytest.mark.slow
def test_the_tutorial_shows_what_is_printed(workspace, igpt):
    """The lines that do not depend on the machine, against the commands."""
    shown = "\n".join(blocks(DOCS / "tutorial.md", "text"))
    info, palette = igpt("data", "info"), igpt("palette", "fit")
    tokens = igpt("tokenize", "--workers", "1")
    for printed in (info.stdout, palette.stderr.split(" mean squared error")[0], tokens.stdout):
        lines = [line for line in printed.splitlines() if line and not re.match(r"[2-8] ", line)]
        assert [line for line in lines if line not in shown] == []
    assert "next: igpt tokenize" in palette.stderr
    assert re.search(r"14,376 images \(train 11,504, test 2,872 rows of 1,024 tokens, 10 classes\)", tokens.stderr)
