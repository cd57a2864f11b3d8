"""igpt completion: install and show the scripts, and answer them through click."""

from __future__ import annotations

import re
from textwrap import shorten
from typing import Annotated, Any, cast

import typer

from igpt_cli.cli.candidates import Candidate
from igpt_cli.cli.options import Force, Quiet
from igpt_cli.cli.output import Voice, result

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

Shell = Annotated[
    str | None,
    typer.Option("--shell", metavar="bash|zsh|fish", help="Which shell. Default: the one that $SHELL names."),
]

#: Metavars of what is no file.
FREE = {"TIME", "N", "N|TIME", "N|all", "NAME", "PART", "ROW,COLUMN", "A,B,...", "N,...", "X,Y,W,H", "i/n|auto", None}


@app.callback()
def completion() -> None:
    """Complete commands, options, models and runs with the Tab key, in bash, zsh and fish.

    \b
    Examples:
      igpt completion install               for the shell that $SHELL names
      igpt completion show --shell fish     only the script
    """


@app.command()
def install(shell: Shell = None, force: Force = False, quiet: Quiet = False) -> None:
    """Install completion for your shell; prints the path of the script.

    \b
    Examples:
      igpt completion install
      igpt completion install --shell zsh

    For bash and zsh a line at the end of ~/.bashrc or ~/.zshrc reads the script; fish finds it by itself. Installing
    again replaces the script, and leaves one such line.
    """
    from igpt_cli import shell_completion

    at = shell_completion.install(shell or shell_completion.login_shell(), force)
    where = f", read by {at.startup}" if at.startup else ""
    Voice(quiet).say(f"{at.shell} completes igpt's command line from its next start on{where}")
    result(at.script)


@app.command()
def show(shell: Shell = None) -> None:
    """Print the script that completes igpt's command line.

    \b
    Examples:
      igpt completion show --shell bash > igpt.bash
      source <(igpt completion show --shell bash)      this shell only
    """
    from igpt_cli import shell_completion

    result(shell_completion.script(shell or shell_completion.login_shell()).rstrip("\n"))


@app.command()
def candidates(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORD", help="The words after igpt, the last one unfinished.")
    ] = None,
    line: Annotated[
        str | None, typer.Option("--line", help="The line up to the cursor instead, as it was typed.")
    ] = None,
    breaks: Annotated[
        str, typer.Option("--breaks", help="Signs at which the shell divides words itself, bash's COMP_WORDBREAKS.")
    ] = "",
) -> None:
    """Print what could stand in the place of a last word; the scripts ask this at each Tab.

    \b
    Examples:
      igpt completion candidates -- train vit
      igpt completion candidates -- pretrain --objective ""

    The first line is "files" where a path could stand there, too, or else "words"; a candidate a line follows, with a
    tab and what it is.
    """
    typed = words_of(line) if line is not None else words or [""]
    offered, files = complete(typed)
    # bash replaces what follows the last of these signs in the word, and nothing before it.
    start = max((typed[-1].rfind(sign) + 1 for sign in ":=" if sign in breaks), default=0)
    out = [f"{value[start:]}\t{shorten(about, 60, placeholder='…')}" for value, about in offered if "\n" not in value]
    result("\n".join(["files" if files else "words", *out]))


def words_of(line: str) -> list[str]:
    """The words after the program in a line that ends at the cursor, the last one unfinished.

    >>> words_of("igpt probe 'my run"), words_of("igpt probe ")
    (['probe', 'my run'], ['probe', ''])
    """
    *words, last = _click().split_arg_string(line + "x")  # x: the last word continues, even after a space
    return [*words[1:], last[:-1]] if words else [""]


def complete(words: list[str]) -> tuple[list[Candidate], bool]:
    """What could stand in the place of the last word, and whether it could be the name of a file as well.

    Args:
        words: what follows `igpt`; the last is as far as it has been typed, "" where it has not been begun.
    """
    from igpt_cli.cli.app import COMMANDS
    from igpt_cli.cli.app import app as root
    from igpt_cli.cli.reference import is_number

    click, (*args, word) = _click(), words
    context = click._resolve_context(cast(Any, typer.main.get_command(root)), {}, "igpt", args)
    target, value = click._resolve_incomplete(context, args.copy(), word)
    metavar = getattr(target, "metavar", None)
    choices = [w for w in re.sub(r"\[.*?\]", "", metavar or "").split("|") if re.fullmatch(r"-?[a-z0-9][a-z0-9.-]*", w)]
    if context.parent is None and not word.startswith("-"):  # what the commands are, without loading them
        offered = [] if args else list(COMMANDS.items())
    else:
        found = target.shell_complete(context, value)
        offered = [(item.value, item.help or "") for item in found] or [(w, "") for w in choices]
    files = target is not context.command and not choices and metavar not in FREE and not is_number(target)
    before = word.removesuffix(value)  # --model= of --model=igpt-s
    return [(before + v, about) for v, about in offered if v.startswith(value)], files


def _click() -> Any:
    """Click's own completion, of which recent versions of Typer hold a copy."""
    try:
        from typer._click import shell_completion
    except ImportError:
        from click import shell_completion  # type: ignore[no-redef]
    return shell_completion
