"""The root command and its error boundary.

Exit codes: 0 done, 1 it failed (one clear message), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from igpt_cli import __version__
from igpt_cli.cli import bench, data, demo, evaluate, models, palette, plan, pretrain, probe, tokenize, tokens
from igpt_cli.cli.output import printable
from igpt_cli.errors import ElsewhereError, IgptError

#: The commands in the order of the road, as the help lists them.
ROAD = ("demo", "data", "palette", "tokenize", "tokens", "models", "plan", "pretrain", "evaluate", "probe", "bench")


class Root(TyperGroup):
    """Turns errors into one message on stderr. `--debug`, anywhere on the line, shows the traceback instead."""

    def list_commands(self, ctx):
        return sorted(super().list_commands(ctx), key=lambda name: (*ROAD, name).index(name))

    def parse_args(self, ctx, args):
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["debug"] = "--debug" in args[:end] or bool(os.environ.get("IGPT_DEBUG"))
        return super().parse_args(ctx, [a for i, a in enumerate(args) if a != "--debug" or i > end])

    def invoke(self, ctx):
        # SIGTERM unwinds like Ctrl-C, so that temporary files are removed and the old ones stay.
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, IgptError, OSError, MemoryError) as e:
            if ctx.meta["debug"] or isinstance(e, BrokenPipeError):
                raise
            message, code = _explain(e)
            _record(e)
        except Exception as e:
            if ctx.meta["debug"] or isinstance(e, _usage_errors()):
                raise
            message, code = f"error: internal: {type(e).__name__}: {e}; --debug shows where, please report it", 1
            _record(e)
        finally:
            signal.signal(signal.SIGTERM, previous)
        _say(message)
        raise typer.Exit(code)


def _explain(e: BaseException) -> tuple[str, int]:
    """The message and the exit code for an error that is not a bug."""
    if isinstance(e, KeyboardInterrupt):
        return str(e) or "interrupted", 130
    if isinstance(e, ElsewhereError):
        return "", 1
    if isinstance(e, MemoryError):
        return f"error: out of memory: {str(e) or 'an allocation failed'}", 1
    if isinstance(e, OSError) and e.filename is not None:
        return f"error: {e.filename}: {e.strerror}", 1
    return f"error: {e}", 1


def _say(message: str) -> None:
    """The message on stderr; under torchrun with the rank that it comes from."""
    many = os.environ.get("WORLD_SIZE", "1") != "1"
    if message:
        rank = f"rank {os.environ.get('RANK')}: " if many else ""
        print(rank + printable(message), file=sys.stderr, flush=True)


def _record(e: BaseException) -> None:
    """Leave the error where torchrun, which shows the first failing rank's, looks for it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and not isinstance(e, ElsewhereError):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(e)


def _usage_errors() -> tuple[type[BaseException], ...]:
    """What typer itself shows (wrong usage) or uses to leave (Exit, Abort)."""
    return (typer.Exit, typer.Abort, *(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"))


app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="--debug, anywhere on the line, shows the traceback of an error.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"igpt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """The iGPT pixel pipeline: palette, tokens, pretraining, linear probes.

    \b
    Examples:
      igpt demo                    the whole road on the embedded images, in minutes
      igpt palette fit             then: igpt tokenize, igpt pretrain, igpt probe --layer 20
      igpt COMMAND --help          examples for each command
    """


app.command("demo")(demo.demo)
app.add_typer(palette.app, name="palette")
app.command("tokenize")(tokenize.tokenize)
app.add_typer(tokens.app, name="tokens")
app.command("pretrain")(pretrain.pretrain)
app.command("evaluate")(evaluate.evaluate)
app.command("probe")(probe.probe)
app.command("models")(models.models)
app.command("plan")(plan.plan)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
