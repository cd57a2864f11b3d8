"""igpt evaluate: loss of pixels, accuracy of a class head, cosine of a DeiT's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from igpt_cli.cli.evaluate_run import evaluate_classes, evaluate_cosine, evaluate_pixels
from igpt_cli.cli.options import BatchSize, Device, Force, Images, Json, Limit, Out, Precision, Quiet, Run, Seed, Split
from igpt_cli.cli.output import Voice, present
from igpt_cli.errors import InputError
from igpt_cli.files import PICTURES, check_outputs

if TYPE_CHECKING:
    from igpt_cli.model_dir import ModelDir


def evaluate(
    run: Run = None,
    tokens: Images = None,
    split: Split = None,
    limit: Limit = None,
    mask_prob: Annotated[
        float | None,
        Option(metavar="P", help="BERT: the probability that a pixel is hidden. Default: as in training, or 0.15."),
    ] = None,
    seed: Seed = 0,
    per_image: Annotated[
        Path | None, Option(metavar="CSV", help="Write row, name, label and loss of each image (.csv or .jsonl).")
    ] = None,
    position_map: Annotated[
        Path | None, Option(metavar="PNG", help="Draw the mean loss at each position (.png, .svg or .pdf).")
    ] = None,
    map_path: Annotated[
        Path | None,
        Option("--map", metavar="PNG", help="Draw the loss of each pixel (.png, .svg or .pdf), or write it (.npz)."),
    ] = None,
    map_images: Annotated[
        int | None,
        Option(min=1, metavar="N", help="How many images --map has, evenly spaced over those evaluated.  [default: 8]"),
    ] = None,
    tokens_cosine: Annotated[
        bool, Option("--tokens-cosine", help="Instead: how alike class and distillation token of a DeiT are, by layer.")
    ] = False,
    figure: Annotated[
        Path | None, Option(metavar="PNG", help="Draw --tokens-cosine by layer (.png, .svg or .pdf).")
    ] = None,
    head: Annotated[
        str | None,
        Option(metavar="both|class|distillation", help="DeiT with two heads: which classifies.  [default: both]"),
    ] = None,
    class_order: Annotated[
        str | None,
        Option(
            metavar="value|text",
            help="Of an imported model that does not name its classes, where the images' are numbers: 0, 1, 2, 10, or "
            "0, 1, 10, 2 as torchvision sorts folders.  [default: what fits the images better]",
        ),
    ] = None,
    batch_size: BatchSize = None,
    precision: Precision = "float32",
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how well a model predicts pixels, in nats and bits per token, or one of RGB images classes, on any split.

    \b
    Examples:
      igpt evaluate
      igpt evaluate runs/igpt-tiny-1 data/tokens-32.h5 --split train --limit 200
      igpt evaluate builtin:igpt-tiny embedded --per-image images.csv --position-map positions.png
      igpt evaluate runs/igpt-tiny-1 photo.jpg --map loss.png
      igpt evaluate runs/igpt-tiny-1 --limit 8 --map loss.png     the map alone: 8 images, not the split
      igpt evaluate runs/igpt-tiny-1 --json | jq .nats_per_token
      igpt evaluate runs/resnet-18-32-1 cifar.h5
      igpt evaluate runs/deit --tokens-cosine --figure cosine.png

    A model of RGB images, and a fine-tuned one as well, classifies labelled images: accuracy with its 95% interval,
    from 100 classes on top 5, and log loss in nats. Classes are matched by name.

    The table compares the model with three baselines on the same pixels: all colours alike (uniform), colours as often
    as in the split train (unigram), and given the pixel to the left (bigram). A BERT model predicts only hidden pixels,
    the same ones for the same --seed; for --map it predicts each pixel once, a part of the image at a time.
    --position-map is the mean loss at each position, --map the loss of every pixel of an image.

    Bits per sub-pixel are a third of the bits per token: they are of the quantised image and cannot be compared with
    the bits/dim of models of 8-bit images. -o writes the JSON document.
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_for_model, run_or_default, split_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.documents import write_json
    from igpt_cli.images.subset import evenly
    from igpt_cli.model_dir import load_model
    from igpt_cli.model_input import takes_rgb

    files = {
        "--per-image": (per_image, (".csv", ".jsonl")),
        "--position-map": (position_map, PICTURES),
        "--map": (map_path, (*PICTURES, ".npz")),
    }
    check_outputs({"--out": (out, ()), **files, "--figure": (figure, PICTURES)}, force)
    _check_options(class_order, map_path, map_images, figure, tokens_cosine)
    model = load_model(run_or_default(run, voice), choose_device(device))
    of_pixels = {"--mask-prob": mask_prob, **{option: path for option, (path, _) in files.items()}}
    _check_kind(model, of_pixels, class_order, head)
    source = tokens or tokens_of(model, voice)
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    with open_for_model(source, model, voice, evenly([split] if split else None, limit)) as file:
        part = split_or_default(file, split, voice)
        if limit is not None and limit < len(part):
            voice.say(f"images: {limit:,} of {len(part):,}, evenly spaced")
        if tokens_cosine:
            document, text = evaluate_cosine(model, part, limit, figure, how, voice)
        elif takes_rgb(model):
            how |= {"head": head or "both", "class_order": class_order}
            document, text = evaluate_classes(model, part, source, limit, how, voice)
        else:
            how |= {"limit": limit, "mask_prob": mask_prob, "seed": seed}
            drawn = (per_image, position_map, map_path, map_images or 8)
            document, text = evaluate_pixels(model, part, source, drawn, how, voice)
    if out is not None:
        write_json(document, out)
    present(document, text, json)


def _check_options(
    class_order: str | None, map_path: Path | None, map_images: int | None, figure: Path | None, tokens_cosine: bool
) -> None:
    from igpt_cli.report.maps import MOST_IMAGES

    if class_order not in (None, "value", "text"):
        raise InputError(f"--class-order is {class_order!r}, expected value or text")
    if map_path is None and map_images is not None:
        raise InputError("--map-images is about the images of --map; give --map with it")
    if map_path is not None and map_path.suffix.lower() in PICTURES and (map_images or 0) > MOST_IMAGES:
        raise InputError(
            f"--map-images is {map_images}; a picture holds {MOST_IMAGES}. Write more as arrays: "
            f"--map {map_path.stem}.npz"
        )
    if figure is not None and not tokens_cosine:
        raise InputError("--figure draws --tokens-cosine; give it with it, or --map or --position-map instead")


def _check_kind(model: ModelDir, of_pixels: dict[str, Any], class_order: str | None, head: str | None) -> None:
    """
    Raises:
        InputError: an option is for models of RGB images and this is one of pixels, or the other way round.
    """
    from igpt_cli.model_input import takes_rgb

    if takes_rgb(model):
        if wrong := [option for option, value in of_pixels.items() if value is not None]:
            raise InputError(
                f"{', '.join(wrong)}: about the loss of pixels, and {model.name} is a model of RGB images, which "
                f"predicts classes"
            )
    elif class_order is not None:
        raise InputError(f"--class-order is for a model of RGB images with a class head; {model.name} is one of pixels")
    elif head is not None:
        raise InputError(f"--head is for a model with a distillation head; {model.name} is a model of pixels")
