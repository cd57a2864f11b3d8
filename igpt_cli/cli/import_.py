"""igpt import: read models that others made."""

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
    help="Read models that others made; each becomes a model directory, which every command takes.\n\n"
    "\b\nExamples:\n  igpt import huggingface imagegpt-small/ -o runs/imagegpt-small\n"
    "  igpt import openai openai/model.ckpt-1000000 -o runs/openai-s",
)

Out = Annotated[Path, typer.Option("--out", "-o", metavar="MODEL", help="The model directory to write.")]


@app.command("huggingface")
def huggingface(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A folder with config.json, model.safetensors or pytorch_model.bin, and preprocessor_config.json.",
        ),
    ],
    out: Out,
    palette: Annotated[
        str | None,
        typer.Option(
            "--palette",
            "-p",
            metavar="P",
            help="The model's palette, in any form that `igpt palette show` takes.  "
            "[default: DIR/preprocessor_config.json]",
            show_default=False,
        ),
    ] = None,
    no_head: Annotated[
        bool,
        typer.Option(
            "--no-head",
            help="Take a model without lm_head.weight (a classifier, a bare ImageGPTModel), with zeros for a head: "
            "for features, not for samples.",
        ),
    ] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read an ImageGPT that transformers wrote, or that was downloaded from the Hugging Face hub.

    The weights come out bit by bit, in float32. A model that iGPT's form cannot hold (biases that are not zero, another
    activation, tied embeddings) is refused with the reason.

    \b
    Examples:
      igpt import huggingface imagegpt-small/ -o runs/imagegpt-small
      igpt import huggingface checkpoint-1000/ -o runs/tuned --palette runs/imagegpt-small
    """
    from igpt_cli.interop.huggingface import import_huggingface

    voice = Voice(quiet)
    config = import_huggingface(source, out, palette=palette, no_head=no_head, force=force, note=voice.say)
    report(out, config, json, voice)


@app.command("openai")
def openai(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT",
            help="A TensorFlow checkpoint: the beginning of its files' names, as model.ckpt-1000000, one of its files, "
            "or its folder.",
        ),
    ],
    out: Out,
    bert: Annotated[
        bool, typer.Option("--bert", help="The model was trained to predict masked pixels, not the next one.")
    ] = False,
    palette: Annotated[
        Path | None,
        typer.Option(
            "--palette",
            "-p",
            metavar="P",
            help="The model's palette.  [default: kmeans_centers.npy beside the checkpoint]",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a checkpoint of OpenAI's image-gpt, AR or BERT.

    S, M and L are recognised by their shapes, and the weights come out bit by bit. What an optimizer or a classifier
    left there is skipped. Needs TensorFlow: pip install 'igpt-cli[openai]'.

    \b
    Examples:
      igpt import openai openai/model.ckpt-1000000 -o runs/openai-s
      igpt import openai bert/model.ckpt-1000000 --bert -p openai/kmeans_centers.npy -o runs/openai-s-bert
    """
    from igpt_cli.interop.openai import import_openai

    voice = Voice(quiet)
    config = import_openai(checkpoint, out, palette=palette, bert=bert, force=force, note=voice.say)
    report(out, config, json, voice)


def report(out: Path, config: dict, json: bool, voice: Voice) -> None:
    """Say what was read, and print the path of the model directory `out`, or its description."""
    model, imported = config["model"], config["imported"]
    voice.say(
        f"{model['name']}: {model['n_layer']} layers, width {model['n_embd']}, {model['n_head']} heads, "
        f"{model['resolution']}x{model['resolution']}, {model['n_vocab']} colours, objective {model['objective']}; "
        f"{imported['n_parameters']:,} parameters"
    )
    voice.say(f"next: igpt evaluate {out} IMAGES, or igpt probe {out} IMAGES")
    if json:
        result_json({"path": str(out), "model": model, "imported": imported})
    else:
        result(out)
