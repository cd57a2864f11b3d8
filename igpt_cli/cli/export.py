"""igpt export: write models for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from igpt_cli.cli.options import Force, Json, Quiet
from igpt_cli.cli.output import Voice, result, result_json

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Write models for others.\n\n"
    "\b\nExamples:\n  igpt export huggingface runs/igpt-s-1 -o imagegpt\n"
    "  igpt export huggingface builtin:igpt-tiny -o imagegpt-tiny --dtype bfloat16",
)


@app.callback()
def root() -> None:
    """Makes `huggingface` a command of its own while it is the only one."""


@app.command("huggingface")
def huggingface(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")],
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A run's folder or builtin:igpt-tiny. Default: runs/latest.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="float32|bfloat16", help="The type of the weights; bfloat16 rounds them.")
    ] = "float32",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model as transformers' ImageGPT: config.json, model.safetensors and preprocessor_config.json.

    transformers' image processor does not put the start of sequence before the tokens; docs/checkpoints.md shows how to
    feed the model. A BERT model is refused, since transformers' ImageGPT always looks at the past alone.

    \b
    Examples:
      igpt export huggingface runs/igpt-s-1 -o imagegpt
      igpt export huggingface builtin:igpt-tiny -o imagegpt-tiny --dtype bfloat16
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import run_or_default
    from igpt_cli.interop.huggingface import export_huggingface

    summary = export_huggingface(run_or_default(run, voice), out, dtype=dtype, force=force)
    voice.say(
        f"{summary['n_parameters']:,} parameters and {summary['n_biases']:,} biases, which are zero, "
        f"in {summary['dtype']}"
    )
    voice.say("next: feed it [sos] + tokens[:-1]; docs/checkpoints.md shows how")
    if json:
        result_json(summary)
    else:
        result(out)
