"""The site, by Sphinx: `sphinx-build -W -c docs . build/site`, with the extra `docs` installed.

The pages are those of this folder as they are; the library's are made from its docstrings.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from igpt_cli import __version__

os.environ.setdefault("OMP_NUM_THREADS", "1")  # docstrings are read from modules, which load torch

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api"

#: The menu: every page of docs/ stands in it once (a test looks), by the name of its file.
MENU = {
    "Begin": ["tutorial", "shell", "../data/README", "glossary"],
    "How to": [
        *("howto-cifar10", "howto-imagenet", "howto-few-labels", "howto-openai", "scaling", "howto-pipelines"),
        "howto-notebooks",
    ],
    "Commands": [
        *("cli", "palette", "tokens", "pretraining", "sampling", "probing", "compare", "ablations", "report"),
        *("training-supervised", "checkpoints", "benchmarks"),
    ],
    "Models": ["models-shipped", "models-vit", "models-deit", "models-swin", "models-resnet", "models-attention"],
    "Library": ["python", "api", "formats"],
    "Project": ["architecture", "contributing", "changelog"],
}

project, author, version = "igpt", "the authors of igpt", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Pages link to each other as they do in a source tree, so the source tree is the source.
root_doc = "docs/index"
include_patterns = ["docs/**", "data/README.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "igpt_cli"]

myst_heading_anchors = 4  # as GitHub makes them

add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
suppress_warnings = ["ref.python"]  # fields of the same name in several classes

html_theme = "furo"
html_title = "igpt"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", add_menu)
    app.connect("autodoc-process-docstring", to_rst, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", keep_prose, priority=900)  # after it
    app.connect("build-finished", write_front_door)


def rooms() -> dict[str, list[str]]:
    """{room: its modules, dotted}, by name; the command line is another matter (docs/cli.md)."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "igpt_cli").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1].startswith("__") or parts[1] == "cli":
            continue
        found.setdefault(parts[1], []).append(".".join(parts))
    return found


def write_api_pages(app: Any) -> None:
    """A page for each room; git ignores them."""
    API.mkdir(exist_ok=True)
    for path in API.iterdir():
        path.unlink()
    for room, modules in rooms().items():
        parts = [f"{room}\n{'=' * len(room)}"]
        for m in modules:
            title = m.removeprefix("igpt_cli.")
            heading = f"{title}\n{'-' * len(title)}\n\n" if len(modules) > 1 else ""
            parts.append(f"{heading}.. automodule:: {m}")
        (API / f"{room}.rst").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def add_menu(app: Any, name: str, source: list[str]) -> None:
    """The menu behind the front page, and the rooms behind the page on the library: nothing of them is shown there."""
    if name == root_doc:
        there = {title: [p for p in pages if (ROOT / "docs" / f"{p}.md").exists()] for title, pages in MENU.items()}
        source[0] += "".join(_toctree(title, [f"{p}.md" for p in pages]) for title, pages in there.items())
    elif name == "docs/api":
        source[0] += _toctree("", [f"api/{room}" for room in rooms()], hidden=False)


def _toctree(title: str, pages: list[str], hidden: bool = True) -> str:
    options = ([":hidden:"] if hidden else []) + ([f":caption: {title}"] if title else []) + [":maxdepth: 1"]
    return "\n\n" + "\n".join(["```{toctree}", *options, "", *pages, "```"]) + "\n"


#: Docstrings as they were before napoleon, by the name of what they are of.
_PROSE: dict[str, list[str]] = {}


def to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings, which are plain text with `code`, as reStructuredText; doctests stay as they are."""
    out: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        of_lines = paragraph.split("\n")
        if paragraph.lstrip().startswith(">>>"):
            out += of_lines
        elif any(re.search(r"\S {3,}\S", line) or line.strip().startswith("|") for line in of_lines):
            indent = re.match(" *", of_lines[0])[0]  # columns, a table: as they stand
            out += [f"{indent}::", "", *(f"    {line}" for line in of_lines)]
        elif re.match(r"[\w, ]+: \S", paragraph) and re.search(r"\n +\S|\n[\w, ]+: ", paragraph):
            of_lines = [re.sub(r"^([\w, ]+): ", r"- `\1`: ", line) for line in of_lines]
            out += [_escaped(re.sub(r"^(?! *- )\s*", "  ", line)) for line in of_lines]
        else:
            out += map(_escaped, of_lines)
        out.append("")
    lines[:] = out
    _PROSE[name] = out


def keep_prose(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What is said of a constant or a field, where napoleon takes words before a colon for its type."""
    if what in ("data", "attribute"):
        lines[:] = _PROSE[name]


def _escaped(line: str) -> str:
    """A line of prose: code in double backticks, signs that would be markup escaped."""
    parts = re.split(r"(`+[^`]*`+)", line)
    for i, part in enumerate(parts):
        parts[i] = f"``{part.strip('`')}``" if i % 2 else re.sub(r"([*|\\])|(?<=\w)_(?=[\W_]|$)", r"\\\g<0>", part)
    return "".join(parts)


def write_front_door(app: Any, error: Exception | None) -> None:
    """The top of the site leads to its front page."""
    if error is None and app.builder.name == "html":
        page = '<!doctype html><meta charset="utf-8"><title>igpt</title>'
        page += '<meta http-equiv="refresh" content="0; url=docs/index.html"><a href="docs/index.html">igpt</a>\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")
