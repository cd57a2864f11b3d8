"""docs/cli.md: every command with its help. Run `python -m igpt_cli.cli.reference > docs/cli.md`.

With the argument `modules` it prints the module map of docs/architecture.md.

It is made from what the commands declare, not from what typer prints, so it is the same on every terminal and with
every version of typer.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from igpt_cli.cli.app import app

REMAKE = "python -m igpt_cli.cli.reference > docs/cli.md"
HEAD = f"""# Commands

Made by `{REMAKE}`; the same text is shown by `igpt COMMAND --help`.

Every command writes its result, and nothing else, to stdout; messages go to stderr. Exit codes: 0 done, 1 it
failed, 2 wrong usage, 130 interrupted. `--debug`, anywhere on the line, shows the traceback of an error; `-h` or
`--help` shows the help of a command."""


def commands() -> dict[str, Any]:
    """{"igpt palette fit": the command, ...}, groups before what is in them, in the order of the help."""
    return dict(_walk("igpt", typer.main.get_command(app)))


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    if hasattr(command, "commands"):
        for child in command.list_commands(None):
            yield from _walk(f"{name} {child}", command.get_command(None, child))


def reference() -> str:
    """The whole page, in Markdown."""
    found = commands()
    links = [f"- [{name}](#{name.replace(' ', '-')})" for name in found if name != "igpt"]
    return "\n\n".join([HEAD, "\n".join(links), *(_section(name, c) for name, c in found.items())]) + "\n"


def _section(name: str, command: Any) -> str:
    params = command.params
    arguments = [p for p in params if not p.opts[0].startswith("-")]
    options = [p for p in params if p.opts[0].startswith("-")]
    group = ["COMMAND"] if hasattr(command, "commands") else []
    usage = " ".join([name, "[OPTIONS]", *map(_argument, arguments), *group])
    parts = [f"## {name}", f"    {usage}", *_prose(command.help or "")]
    if params:
        lines = [f"- `{_argument(p)}` {_escaped(p.help)}{_default(p)}" for p in arguments]
        lines += [f"- `{_option(p)}` {_escaped(p.help)}{_default(p)}" for p in options]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _prose(text: str) -> Iterator[str]:
    """The paragraphs of a help text; examples, which a line \\b begins, as code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if not paragraph.startswith("\b"):
            yield _escaped(paragraph.strip())
            continue
        title, *lines = paragraph.strip("\b\n").split("\n")
        code = [re.sub(r" {2,}", "   # ", line.strip()) for line in lines]
        yield "\n".join([title, "", "```sh", *code, "```"])


def _escaped(text: str) -> str:
    """Markdown takes <R> for a tag."""
    return text.replace("<", r"\<")


def _argument(param: Any) -> str:
    name = re.sub(r"[\[\].]", "", param.metavar or param.name.upper())
    name += "..." if param.nargs == -1 else ""
    return name if param.required else f"[{name}]"


def _option(param: Any) -> str:
    names = ", ".join(sorted(param.opts, key=lambda o: (o.startswith("--"), o)))
    if param.secondary_opts:
        return f"{names} / {', '.join(param.secondary_opts)}"
    kind = "N" if isinstance(param.default, (int, float)) or is_number(param) else "TEXT"
    return names if param.is_flag else f"{names} {param.metavar or kind}"


def is_number(param: Any) -> bool:
    """Whether an option or argument takes a number."""
    descriptor = getattr(param, "type_descriptor", None)
    kind = getattr(descriptor, "annotation", None) or getattr(getattr(param, "type", None), "name", "")
    return kind in (int, float) or str(kind).startswith(("int", "float"))


def _default(param: Any) -> str:
    if param.required:
        return "  [required]"
    plain = isinstance(param.default, (str, int, float)) or hasattr(param.default, "__fspath__")
    shown = plain and param.show_default and (param.secondary_opts or not isinstance(param.default, bool))
    if not shown:
        return ""
    value = f"{param.default:g}" if isinstance(param.default, float) else param.default
    if param.secondary_opts:
        value = (param.opts if value else param.secondary_opts)[0]
    return f"  [default: {value}]"


def module_map() -> str:
    """Every module of the package with the first line of its docstring, in Markdown."""
    package = Path(__file__).parents[1]
    parts = []
    for folder in (package, *sorted(p.parent for p in package.glob("*/__init__.py"))):
        about = {p.name: _first_line(p) for p in sorted(folder.glob("*.py")) if p.stem != "__main__"}
        head = "igpt_cli" if folder == package else folder.name
        lines = [f"- `{name}`: {text}" for name, text in about.items() if name != "__init__.py"]
        parts.append("\n".join([f"**{head}/** {about['__init__.py']}", "", *lines]))
    return "\n\n".join(parts)


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    print(module_map() if "modules" in sys.argv else reference(), end="")
