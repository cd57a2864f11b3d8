"""The pages' examples run as they are written, every page is in the menu, every command on the front page."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import DOCS, ROOT, blocks, command_lines, run_block

from igpt_cli.cli.app import COMMANDS
from igpt_cli.cli.reference import commands


def shell_lines(page: str) -> list[str]:
    """The lines of a page's sh blocks, those that end with a backslash joined."""
    text = "".join(blocks(DOCS / f"{page}.md", "sh"))
    return [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def run_each(igpt, lines: list[str]) -> None:
    """Run lines that call igpt and nothing else, in this process, where images are prepared by one process."""
    for line in lines:
        program, *args = shlex.split(line, comments=True)
        assert program == "igpt", line
        name = " ".join(args[: 2 if f"igpt {' '.join(args[:2])}" in commands() else 1])
        if any("--workers" in p.opts for p in commands()[f"igpt {name}"].params):
            args += ["-j", "1"]
        done = igpt(*args)
        assert done.code == 0, f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_the_pages_on_palettes_tokens_and_pretraining_run_in_one_folder(igpt, workspace):
    for page in ("palette", "tokens", "pretraining"):
        lines = shell_lines(page)
        assert len(lines) >= 5
        run_each(igpt, lines)
    written = {p.name for p in workspace.iterdir()}
    assert written >= {"palette.npz", "swatch.png", "two.npz", "back.npz", "photos.h5", "whole.h5", "surprise.png"}
    from igpt_cli.tokens.store import open_tokens

    parts, whole, back = (open_tokens(workspace / f"{n}.h5").split("train") for n in ("whole", "photos", "back"))
    assert (parts.tokens[:] == whole.tokens[:]).all(), "merged shards are what one run gives"
    assert (back.tokens[:] == whole.tokens[:]).all(), "and so is what was exported and imported"


def test_the_page_on_notebooks_runs(workspace, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("agg")
    cells = blocks(DOCS / "howto-notebooks.md", "python")
    names: dict = {"__name__": "notebook"}
    for cell in cells:
        exec(compile(cell, "howto-notebooks.md", "exec"), names)
    assert capsys.readouterr().out == "(2, 32, 32) True\n[0, 12]\n"


def test_the_page_on_imagenet_plans(igpt):
    run_each(igpt, shell_lines("howto-imagenet"))


@pytest.mark.slow
def test_the_page_on_few_labels_runs(igpt, workspace):
    import json

    run_each(igpt, shell_lines("howto-few-labels"))
    found = json.loads((workspace / "few.json").read_text(encoding="utf-8"))
    assert [f["labels_per_class"] for f in found["few_labels"]] == [4, 16]


#: The blocks of the page on pipelines, by the program that they need besides igpt.
PIPES = blocks(DOCS / "howto-pipelines.md", "sh")


@pytest.mark.slow
def test_the_page_on_pipelines_runs(workspace):
    """In a shell, in order; blocks whose program is missing are left out, and what they write is made otherwise."""
    ran = 0
    for block in PIPES:
        if any(re.search(rf"\b{tool} ", block) and not shutil.which(tool) for tool in ("jq", "parallel")):
            continue
        run_block(block, workspace)
        ran += 1
    if ran < len(PIPES):
        pytest.skip(f"{len(PIPES) - ran} of {len(PIPES)} blocks need jq or GNU parallel")
    assert {p.name for p in workspace.iterdir()} >= {"test.h5", "photos.h5", "probe.json", "seed-1.json", "palette.npz"}


# The site.


def menu() -> dict[str, list[str]]:
    """What docs/conf.py says, read without Sphinx."""
    tree = ast.parse((DOCS / "conf.py").read_text(encoding="utf-8"))
    value = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "MENU")
    return eval(compile(ast.Expression(value), "conf.py", "eval"), {})


def test_every_page_is_in_the_menu_once():
    listed = [page for pages in menu().values() for page in pages]
    pages = [p.stem for p in DOCS.glob("*.md") if p.stem != "index"]
    assert sorted(listed) == sorted([*pages, "../data/README"])


def test_every_command_is_on_the_front_page():
    shown = {args.split()[1] for args in command_lines(DOCS / "index.md")}
    assert [name for name in COMMANDS if name not in shown] == []


def test_pages_use_console_for_what_is_not_run():
    """A line of a console block begins with $, as a person types it."""
    for page in DOCS.glob("*.md"):
        for block in blocks(page, "console"):
            assert all(line.startswith("$ ") for line in block.splitlines()), page.name


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path):
    pytest.importorskip("furo", reason="the extra docs is not installed")
    pytest.importorskip("myst_parser", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", ".", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert outside(tmp_path / "site") == []
    assert "quantize" in (tmp_path / "site" / "docs" / "api" / "palette.html").read_text(encoding="utf-8")


def outside(site: Path) -> list[str]:
    """What pages and style sheets of a site load from elsewhere: scripts, styles, fonts, images, frames."""
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]+src=[\"']((?:https?:)?//[^\"']+)"
        r"|<link(?![^>]+rel=[\"'](?:canonical|search|index|next|prev))[^>]+href=[\"']((?:https?:)?//[^\"']+)"
        r"|url\([\"']?((?:https?:)?//[^)]+)|@import[^;]*((?:https?:)?//[^;]+)"
    )
    found = []
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for groups in loads.findall(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)}: {next(filter(None, groups))}")
    return found


def test_what_a_page_loads_from_elsewhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="https://x.org/a.css"><a href="https://y.org">', "utf-8"
    )
    (tmp_path / "b.css").write_text("@font-face { src: url(//z.org/f.woff2) } a { b: url(c.png) }", "utf-8")
    assert outside(tmp_path) == ["a.html: https://x.org/a.css", "b.css: //z.org/f.woff2"]
