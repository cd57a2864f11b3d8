"""igpt export: write models for others."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from igpt_cli.cli.options import Folder, Force, Json, Quiet, Run, group
from igpt_cli.cli.output import Voice, present

app = group(
    "Write models for others.",
    "igpt export huggingface runs/igpt-s-1 -o imagegpt",
    "igpt export huggingface builtin:igpt-tiny -o imagegpt-tiny --dtype bfloat16",
    "igpt export timm runs/deit-s-1 -o deit-small",
)

Dtype = Annotated[
    str, Option("--dtype", metavar="float32|bfloat16", help="The type of the weights; bfloat16 rounds them.")
]


@app.command("huggingface")
def huggingface(
    out: Folder,
    run: Run = None,
    dtype: Dtype = "float32",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an iGPT, ViT, DeiT or Swin as transformers has it: config, weights and preparation of images.

    transformers' image processor does not put the start of sequence before an ImageGPT's tokens; docs/checkpoints.md
    shows how to feed the model. A BERT model is refused, since transformers' ImageGPT always looks at the past alone.

    \b
    Examples:
      igpt export huggingface runs/igpt-s-1 -o imagegpt
      igpt export huggingface builtin:igpt-tiny -o imagegpt-tiny --dtype bfloat16
      igpt export huggingface runs/vit-s-32-1 -o vit
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import run_or_default
    from igpt_cli.interop.huggingface import export_huggingface

    summary = export_huggingface(run_or_default(run, voice), out, dtype=dtype, force=force, note=voice.say)
    if "n_biases" in summary:
        voice.say(
            f"{summary['n_parameters']:,} parameters and {summary['n_biases']:,} biases, which are zero, "
            f"in {summary['dtype']}"
        )
        voice.say("next: feed it [sos] + tokens[:-1]; docs/checkpoints.md shows how")
    _report(summary, json, voice)


@app.command("timm")
def timm(
    out: Folder,
    run: Run = None,
    dtype: Dtype = "float32",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a ViT, DeiT or Swin as timm has it: model.safetensors and config.json, as on the hub.

    A model that is none of timm's by its sizes has them as model_args.

    \b
    Examples:
      igpt export timm runs/deit-s-1 -o deit-small
      igpt export timm runs/swin-t-32-1 -o swin --dtype bfloat16
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import run_or_default
    from igpt_cli.interop.timm import export_timm

    summary = export_timm(run_or_default(run, voice), out, dtype=dtype, force=force, note=voice.say)
    _report(summary, json, voice)


def _report(summary: dict, json: bool, voice: Voice) -> None:
    """Say what was written, and print its path, or its description."""
    if "architecture" in summary:
        voice.say(f"{summary['architecture']}: {summary['n_parameters']:,} parameters in {summary['dtype']}")
    present(summary, summary["path"], json)
