"""igpt doctor"""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from igpt_cli.cli.options import Json, Quiet
from igpt_cli.cli.output import Voice, present, printable

if TYPE_CHECKING:
    from igpt_cli.doctor.examine import Finding


def doctor(
    compile: Annotated[
        bool, Option("--compile/--no-compile", help="Also try torch.compile, which takes longest.")
    ] = True,
    limit: Annotated[float, Option(min=1, help="Seconds that each trial may take.")] = 180,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the installation and this machine, and suggest fixes for what does not work.

    \b
    Examples:
      igpt doctor
      igpt doctor --no-compile                     sooner done
      igpt doctor --json | jq -r '.findings[] | select(.state != "ok") | .advice'

    Each line is ok; or a note, where igpt works without it or more slowly; or it FAILS, and the exit code is 1. What
    may hang or crash is tried in processes of their own. Nothing is changed, and no network is used.
    """
    voice = Voice(quiet)
    from igpt_cli.doctor.examine import examine, works

    findings = examine(".", compile, limit, voice.say)
    well = works(findings)
    present({"works": well, "findings": [f.as_json() for f in findings]}, report(findings), json)
    failing = [f.name for f in findings if f.state == "fails"]
    voice.say(f"does not work: {', '.join(failing)}" if failing else "all that igpt needs works")
    if not well:
        raise typer.Exit(1)


def report(findings: list[Finding], width: int | None = None) -> str:
    """The findings as text, a line each and below it what to do; long ones are broken at the width of the terminal."""
    width = width or min(100, shutil.get_terminal_size().columns)
    marks = {"ok": "ok   ", "note": "note ", "fails": "FAILS"}
    names = max(len(f.name) for f in findings) + 2
    lines = []
    for i, f in enumerate(findings):
        if not i or f.group != findings[i - 1].group:
            lines += [*([""] if i else []), f.group]
        before = f"  {marks[f.state]}  {f.name:<{names}}"
        lines += _broken(before, printable(f.found).replace("\n", " "), width)
        lines += _broken(" " * len(before) + "-> ", f.advice, width) if f.advice else []
    return "\n".join(lines)


def _broken(before: str, text: str, width: int) -> list[str]:
    """Text behind `before`, its other lines below its first."""
    room = max(30, width - len(before))
    first, *rest = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    return [before + first, *(" " * len(before) + line for line in rest)]
