"""The root command and its error boundary.

Exit codes: 0 done, 1 it failed (one clear message), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated

import typer
from typer import Option
from typer.core import TyperGroup

from igpt_cli import __version__
from igpt_cli.cli.output import printable
from igpt_cli.errors import ElsewhereError, IgptError

#: The commands in the order of the pipeline, as the help lists them. Their modules are loaded when they are used, so
#: that help is instant however many there are.
COMMANDS = {
    "demo": "Run the whole pipeline on the embedded images, in minutes.",
    "data": "Images: make the embedded ones, fetch published ones, look.",
    "palette": "The colours that pixels become: fit, count, show, convert.",
    "tokenize": "Turn images into a token file.",
    "tokens": "Token files: look at them, check, join, import, export.",
    "models": "List the models: parameters, FLOPs, memory.",
    "plan": "Plan a pretraining run: memory, GPUs, days.",
    "pretrain": "Pretrain a model on next or masked pixels.",
    "evaluate": "Measure how well a model predicts pixels, or classes.",
    "sample": "Sample new images, pixel by pixel.",
    "complete": "Complete partial images.",
    "features": "Extract the features of any set of layers to a file.",
    "probe": "Classify images linearly from a layer's features.",
    "compare": "Compare models: one protocol, one table.",
    "report": "Report runs on one HTML page: curves, samples, probes.",
    "attention": "Draw where heads look, and how far.",
    "finetune": "Train a pretrained model to classify.",
    "train": "Train a model of RGB images on labelled images.",
    "ablate": "Repeat the papers' ablations in minutes.",
    "import": "Import models: Hugging Face's, timm's, OpenAI's.",
    "export": "Export models for transformers and timm.",
    "bench": "Measure how fast it is on this machine.",
    "doctor": "Check the installation and suggest fixes.",
    "completion": "Complete commands with the Tab key, in bash, zsh, fish.",
}


#: The modules of commands whose name means something else in Python, or in the package.
MODULES = {"import": "import_", "completion": "shell_completion"}


def _load(name: str) -> Callable | typer.Typer:
    """What a command calls, or a group of commands: `app` in cli/<name>.py, or the function named as the command."""
    module = import_module(f"igpt_cli.cli.{MODULES.get(name, name)}")
    return getattr(module, "app", None) or getattr(module, name)


class Root(TyperGroup):
    """Loads commands when they are used, and turns errors into one message on stderr.

    `--debug`, anywhere on the line, shows the traceback instead.
    """

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name):
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            found = _load(cmd_name)
            if not isinstance(found, typer.Typer):
                single = typer.Typer(add_completion=False, rich_markup_mode=None)
                single.command(cmd_name)(found)
                found = single
            self.commands[cmd_name] = typer.main.get_command(found)
            self.commands[cmd_name].name = cmd_name
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx, args):
        if args and args[0] not in COMMANDS:
            for name in COMMANDS:  # so that typer can suggest the nearest name
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx, args):
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["debug"] = "--debug" in args[:end] or bool(os.environ.get("IGPT_DEBUG"))
        return super().parse_args(ctx, [a for i, a in enumerate(args) if a != "--debug" or i > end])

    def invoke(self, ctx):
        _encode_anything()
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


def _encode_anything() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is escaped, odd bytes of file names pass."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


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
    one_of_many = os.environ.get("WORLD_SIZE", "1") not in ("", "1") and os.environ.get("RANK")
    if message:
        rank = f"rank {os.environ['RANK']}: " if one_of_many else ""
        # In one piece, or lines of ranks that end together run into each other.
        sys.stderr.write(f"{rank}{printable(message)}\n")
        sys.stderr.flush()


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
    add_completion=False,  # igpt completion is ours
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="--debug, anywhere on the line, shows the traceback of an error.",
)


def _show_version(context: typer.Context, requested: bool) -> None:
    if requested and not context.resilient_parsing:  # which is completing the command line
        print(f"igpt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """The iGPT pixel pipeline: palette, tokens, pretraining, linear probes.

    \b
    Examples:
      igpt demo                    the whole pipeline on the embedded images, in minutes
      igpt palette fit             then: igpt tokenize, igpt pretrain, igpt probe --layer 20
      igpt COMMAND --help          examples for each command
    """
