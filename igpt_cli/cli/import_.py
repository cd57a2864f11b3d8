"""igpt import: read models that others made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from igpt_cli.cli.candidates import rgb_models
from igpt_cli.cli.options import Force, Json, Quiet, group
from igpt_cli.cli.output import Voice, result, result_json

app = group(
    "Read models that others made; each becomes a model directory, which every command takes.",
    "igpt import huggingface imagegpt-small/ -o runs/imagegpt-small",
    "igpt import timm vit_base/model.safetensors -o runs/vit-b16",
    "igpt import openai openai/model.ckpt-1000000 -o runs/openai-s",
)

Out = Annotated[Path, Option("--out", "-o", metavar="MODEL", help="The model directory to write.")]
Resolution = Annotated[
    int | None,
    Option("--resolution", metavar="R", help="ViT, DeiT, ResNet: another image side in pixels.  [default: its own]"),
]


@app.command("huggingface")
def huggingface(
    source: Annotated[
        Path,
        Argument(metavar="DIR", help="A folder: config.json, model.safetensors or .bin, preprocessor_config.json."),
    ],
    out: Out,
    palette: Annotated[
        str | None,
        Option("--palette", "-p", metavar="P", help="ImageGPT: its palette.  [default: DIR/preprocessor_config.json]"),
    ] = None,
    no_head: Annotated[
        bool,
        Option(
            "--no-head", help="Accept an ImageGPT without lm_head.weight; its head is zeros (features, no samples)."
        ),
    ] = False,
    resolution: Resolution = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read an ImageGPT, ViT, DeiT or Swin that transformers wrote, or that was downloaded from the Hugging Face hub.

    The weights come out bit by bit, in float32. A model that has another form here (an ImageGPT with biases other than
    zero, another activation) is refused with the reason. How images are prepared for a ViT, DeiT or Swin is recorded.

    \b
    Examples:
      igpt import huggingface imagegpt-small/ -o runs/imagegpt-small
      igpt import huggingface vit-base-patch16-224/ -o runs/vit-b16
      igpt import huggingface checkpoint-1000/ -o runs/tuned --palette runs/imagegpt-small
    """
    from igpt_cli.interop.huggingface import import_huggingface

    voice = Voice(quiet)
    config = import_huggingface(
        source, out, palette=palette, no_head=no_head, resolution=resolution, force=force, note=voice.say
    )
    report(out, config, json, voice)


@app.command("timm")
def timm(
    source: Annotated[Path, Argument(metavar="FILE", help="A safetensors file, or a folder with model.safetensors.")],
    out: Out,
    preset: Annotated[
        str | None,
        Option(
            metavar="NAME",
            autocompletion=rgb_models,
            help="Which of `igpt models` it is, such as deit-s or resnet-18-32.  "
            "[default: by shapes; of DeiT and ViT, ViT]",
        ),
    ] = None,
    num_heads: Annotated[
        int | None, Option(metavar="N", min=1, help="Heads of a ViT or DeiT of another size, which shapes do not show.")
    ] = None,
    resolution: Resolution = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a ViT, DeiT, Swin or ResNet of timm, as safetensors: a file, or a folder from the hub.

    What it is shows in names and shapes of its tensors; torchvision's ResNets have the same. Prefixes of wrapped
    models (module., _orig_mod.) are stripped. How images are prepared is in timm's config.json, if the folder has one;
    otherwise timm's usual values are taken, and shown. Arguments in it that make another model are refused.
    For a PyTorch checkpoint (.pth) the line that converts it is shown.

    \b
    Examples:
      igpt import timm vit_base_patch16_224/ -o runs/vit-b16
      igpt import timm deit_small.safetensors --preset deit-s -o runs/deit-s
      igpt import timm resnet50.a1_in1k/ -o runs/resnet-50
    """
    from igpt_cli.interop.timm import import_timm

    voice = Voice(quiet)
    config = import_timm(
        source, out, preset=preset, num_heads=num_heads, resolution=resolution, force=force, note=voice.say
    )
    report(out, config, json, voice)


@app.command("openai")
def openai(
    checkpoint: Annotated[
        Path,
        Argument(metavar="CKPT", help="A TensorFlow checkpoint: model.ckpt-1000, one of its files, or its folder."),
    ],
    out: Out,
    bert: Annotated[
        bool, Option("--bert", help="The model was trained to predict masked pixels, not the next one.")
    ] = False,
    palette: Annotated[
        Path | None,
        Option("--palette", "-p", metavar="P", help="Its palette.  [default: kmeans_centers.npy in its folder]"),
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
    if model["backend"] == "igpt":
        voice.say(
            f"{model['name']}: {model['n_layer']} layers, width {model['n_embd']}, {model['n_head']} heads, "
            f"{model['resolution']}x{model['resolution']}, {model['n_vocab']} colours, objective {model['objective']}; "
            f"{imported['n_parameters']:,} parameters"
        )
        voice.say(f"next: igpt evaluate {out} IMAGES, or igpt probe {out} IMAGES")
    else:
        prepared, depth = config["preparation"], model.get("depth") or sum(model["depths"])
        cut = "the whole image" if prepared["crop"] is None else f"{prepared['crop']:.3g} of the short side"
        voice.say(
            f"{model['name']}: {depth} blocks, width {model['embed_dim']}, patches of {model['patch_size']}, "
            f"{model['resolution']}x{model['resolution']}, {model.get('n_classes') or 'no'} classes; "
            f"{imported['n_parameters']:,} parameters"
        )
        voice.say(f"images: {cut}, {prepared['filter']}, mean {prepared['mean']}, std {prepared['std']}")
        voice.say(
            f"next: {f'igpt evaluate {out} IMAGES, or ' if model.get('n_classes') else ''}igpt probe {out} IMAGES"
        )
    if json:
        shown = {key: config[key] for key in ("model", "preparation", "imported") if key in config}
        result_json({"path": str(out), **shown})
    else:
        result(out)
