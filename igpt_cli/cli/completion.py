"""igpt completion: words for a shell, from what the commands declare."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, cast

import typer

from igpt_cli.cli.options import Force, Quiet
from igpt_cli.cli.output import Voice, result
from igpt_cli.workspace import BUILTIN, RUNS, builtin_models

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

Shell = Annotated[
    str | None,
    typer.Option("--shell", metavar="bash|zsh|fish", help="Which shell. Default: the one that $SHELL names."),
]

#: A candidate and what it is, in a few words.
Offer = tuple[str, str]

SPLITS = [("train", "training images"), ("val", "held-out images"), ("test", "test images")]
#: What an option or argument takes: by its metavar, or else by its name, or else by the command that it is the first
#: argument of.
OF_METAVAR = {"RUN": "run", "RUN2": "run"}
OF_NAME = {"run": "run", "split": "split", "gpu": "gpu", "preset": "rgb", "model": "igpt", "models": "igpt"}
OF_COMMAND = {"igpt train": "trained", "igpt models": "model", "igpt ablate": "ablation"}
#: Metavars of what is neither a file nor a word that can be known.
FREE = {"TIME", "N", "N|TIME", "N|all", "NAME", "PART", "ROW,COLUMN", "A,B,...", "N,...", "X,Y,W,H", "i/n|auto"}


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
    from igpt_cli.completion import install as install_script
    from igpt_cli.completion import login_shell

    at = install_script(shell or login_shell(), force)
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
    from igpt_cli.completion import login_shell, script

    result(script(shell or login_shell()).rstrip("\n"))


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
    kept = max((typed[-1].rfind(sign) + 1 for sign in ":=" if sign in breaks), default=0)
    out = [f"{value[kept:]}\t{_short(told)}" for value, told in offered if "\n" not in value]
    result("\n".join(["files" if files else "words", *out]))


def words_of(line: str) -> list[str]:
    """The words after the program in a line that ends at the cursor, the last one unfinished.

    >>> words_of("igpt probe 'my run"), words_of("igpt probe ")
    (['probe', 'my run'], ['probe', ''])
    """
    for closing in ("", "'", '"', "\\"):
        try:
            words = shlex.split(line + closing)
        except ValueError:
            continue
        ended = not closing and re.search(r"(?<!\\)\s$", line)
        return [*words[1:], *([""] if ended or len(words) < 2 else [])]
    return [""]


def complete(words: list[str]) -> tuple[list[Offer], bool]:
    """What could stand in the place of the last word, and whether it could be the name of a file as well.

    Args:
        words: what follows `igpt`; the last is as far as it has been typed, "" where it has not been begun.
    """
    from igpt_cli.cli.app import app as root

    *done, word = words
    name, command = "igpt", cast(Any, typer.main.get_command(root))
    while done and hasattr(command, "commands") and (child := command.get_command(None, done[0])):
        name, command, done = f"{name} {done[0]}", child, done[1:]
    options = {o: p for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    arguments = [p for p in command.params if not p.opts[0].startswith("-")]
    given: set[Any] = set()
    places, only_words, waits = 0, False, None
    for w in done:
        if waits is not None:
            waits = None
        elif w == "--" and not only_words:
            only_words = True
        elif w.startswith("-") and w != "-" and not only_words:
            option = options.get(w.partition("=")[0])
            given.add(option)
            waits = option if option is not None and not option.is_flag and "=" not in w else None
        else:
            places += 1
    if waits is not None:
        return _matching(word, *_values(name, waits))
    if word.startswith("--") and "=" in word and not only_words and (option := options.get(word.partition("=")[0])):
        before, _, value = word.partition("=")
        offered, _ = _matching(value, *_values(name, option))
        return [(f"{before}={v}", told) for v, told in offered], False
    if word.startswith("-") and not only_words:
        return _matching(word, _options(command, given), False)
    if hasattr(command, "commands"):
        return _matching(word, _commands(command) if not places else [], False)
    argument = next((p for i, p in enumerate(arguments) if i >= places or p.nargs == -1), None)
    if argument is not None:
        return _matching(word, *_values(name, argument))
    return _matching(word, [] if only_words else _options(command, given), False)


def _matching(word: str, offered: list[Offer], files: bool) -> tuple[list[Offer], bool]:
    return [(value, told) for value, told in offered if value.startswith(word)], files


def _commands(group: Any) -> list[Offer]:
    from igpt_cli.cli.app import ROAD

    names = group.list_commands(None)
    if names == list(ROAD):  # what they are, without loading them
        return list(ROAD.items())
    return [(n, (group.get_command(None, n).help or "").strip().split("\n")[0]) for n in names]


def _options(command: Any, given: set[Any]) -> list[Offer]:
    """The options that can still be given, by their long names; --help last."""
    left = [p for p in command.params if p.opts[0].startswith("-") and (p not in given or p.multiple)]
    names = [(o, p.help or "") for p in left for o in (max(p.opts, key=len), *p.secondary_opts)]
    return [*(n for n in names if n[0] != "--help"), ("--help", "Show this message and exit.")]


def _values(name: str, param: Any) -> tuple[list[Offer], bool]:
    """What an option or argument of the command `name` could be, and whether it could be a file."""
    from igpt_cli.cli.reference import is_number

    metavar = param.metavar or ""
    own = OF_COMMAND.get(name) if param.name in ("name", "model") else None
    match own or OF_METAVAR.get(metavar) or OF_NAME.get(param.name):
        case "run":
            return _runs(builtin=param.name != "resume"), True
        case "trained":  # a model by name, or trained weights to begin with
            return [*_presets("rgb"), *_runs(builtin=False)], True
        case "split":
            return SPLITS, False
        case "gpu":
            return _gpus(), False
        case "ablation":
            return _ablations(), False
        case str(kind):
            return _presets(kind), False
    if choices := _choices(metavar):
        return choices, False
    path = "Path" in str(getattr(param, "type_descriptor", None) or getattr(param, "type", ""))
    return [], (bool(metavar) or path) and metavar not in FREE and not is_number(param)


def _choices(metavar: str) -> list[Offer]:
    """The words among which a metavar such as none|soft|hard lets one choose."""
    words = re.sub(r"\[.*?\]", "", metavar).split("|")
    return [(w, "") for w in words if re.fullmatch(r"-?[a-z0-9][a-z0-9.-]*", w)]


def _runs(builtin: bool) -> list[Offer]:
    """The runs of the workspace, the newest, and the models that ship with igpt."""
    runs = sorted(path.parent for path in RUNS.glob("*/config.json"))
    latest = [("latest", "the newest run")] if (RUNS / "latest").is_file() else []
    shipped = [(BUILTIN + n, "ships with igpt") for n in builtin_models()] if builtin else []
    return [*((str(path), "run") for path in runs), *latest, *shipped]


def _presets(kind: str) -> list[Offer]:
    """Models by name: those of tokens ("igpt"), of RGB images ("rgb"), or all ("model"); torch is not needed."""
    from igpt_cli.models import presets, presets_conv, presets_swin, presets_vit

    found: dict[str, Any] = {}
    for module in (presets, presets_vit, presets_swin, presets_conv):
        found |= module.PRESETS
    return [(n, p.about) for n, p in found.items() if kind == "model" or p.of_tokens == (kind == "igpt")]


def _gpus() -> list[Offer]:
    from igpt_cli.planning.gpus import GPUS

    return [(n, f"{gpu.memory} GB") for n, gpu in GPUS.items()]


def _ablations() -> list[Offer]:
    from igpt_cli.ablations.catalogue import ABLATIONS

    return [(n, ablation.question) for n, ablation in ABLATIONS.items()]


def _short(text: str, width: int = 60) -> str:
    """The first words of a help text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rsplit(" ", 1)[0] + "…"
