"""igpt evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.options import Device, Force, Json, Out, Quiet, Run, Split
from igpt_cli.cli.output import Voice, result, result_json, table

if TYPE_CHECKING:
    from igpt_cli.evaluation.pixels import Evaluation
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.tokens.store import TokenFile, TokenSplit


def evaluate(
    run: Run = None,
    tokens: Annotated[
        str | None,
        typer.Argument(
            metavar="T", help="A token file, or images. Default: what the run was trained on.", show_default=False
        ),
    ] = None,
    split: Split = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="Only N images, evenly spaced over the split."),
    ] = None,
    mask_prob: Annotated[
        float | None,
        typer.Option(
            "--mask-prob",
            metavar="P",
            help="BERT: the probability that a pixel is hidden. Default: as in training, or 0.15.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="BERT: seed of the masks.")] = 0,
    per_image: Annotated[
        Path | None,
        typer.Option(
            "--per-image", metavar="CSV", help="Write row, name, label and loss of each image (.csv or .jsonl)."
        ),
    ] = None,
    position_map: Annotated[
        Path | None,
        typer.Option("--position-map", metavar="PNG", help="Draw the mean loss at each position (.png, .svg or .pdf)."),
    ] = None,
    map_path: Annotated[
        Path | None,
        typer.Option(
            "--map",
            metavar="PNG",
            help="Draw images, each beside the loss of its pixels (.png, .svg or .pdf), or write arrays (.npz).",
        ),
    ] = None,
    map_images: Annotated[
        int | None,
        typer.Option(
            "--map-images",
            min=1,
            metavar="N",
            help="How many images --map has, evenly spaced over those evaluated.  [default: 8]",
            show_default=False,
        ),
    ] = None,
    tokens_cosine: Annotated[
        bool,
        typer.Option(
            "--tokens-cosine", help="Instead: how alike class and distillation token of a DeiT are, by layer."
        ),
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", metavar="PNG", help="Draw --tokens-cosine by layer (.png, .svg or .pdf)."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            metavar="both|class|distillation",
            help="Of a model with a distillation head: which head is asked.  [default: both]",
            show_default=False,
        ),
    ] = None,
    class_order: Annotated[
        str | None,
        typer.Option(
            "--class-order",
            metavar="value|text",
            help="Of an imported model that does not name its classes, where the images' are numbers: 0, 1, 2, 10, or "
            "0, 1, 10, 2 as torchvision sorts folders.  [default: what fits the images better]",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Images at a time. Default: 16,384 pixels.", show_default=False),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="float32|bfloat16|auto", help="bfloat16 is faster and rounds.")
    ] = "float32",
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
      igpt evaluate runs/igpt-tiny-1 photo.jpg --map surprise.png
      igpt evaluate runs/igpt-tiny-1 --limit 8 --map surprise.png     the map alone: 8 images, not the split
      igpt evaluate runs/igpt-tiny-1 --json | jq .nats_per_token
      igpt evaluate runs/resnet-18-32-1 cifar.h5
      igpt evaluate runs/deit --tokens-cosine --figure cosine.png

    A model of RGB images, and a fine-tuned one besides, is asked for the classes of labelled images: accuracy with its
    95% interval, from 100 classes on top 5, and log loss in nats. Classes are matched by name.

    Beside the model stand three guesses for the same pixels: all colours alike (uniform), colours as often as in the
    split train (unigram), and given the pixel to the left (bigram). A BERT model is asked for hidden pixels alone,
    the same ones for the same --seed; for --map it is asked for each pixel once, a part of the image at a time. Where
    a model is surprised on average is --position-map, where in an image --map.

    Bits per sub-pixel are a third of the bits per token: they are of the quantised image and cannot be compared with
    the bits/dim of models of 8-bit images. -o writes the JSON document.
    """
    voice = Voice(quiet)
    from dataclasses import replace

    from igpt_cli.cli.evaluate_head import only_of_classes, show_head, show_tokens_cosine
    from igpt_cli.cli.resolve import evenly, open_for_model, run_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.errors import InputError
    from igpt_cli.evaluation.pixels import default_split, write_evaluation, write_per_image
    from igpt_cli.evaluation.pixels import evaluate as run_evaluation
    from igpt_cli.files import PICTURES, check_outputs
    from igpt_cli.model_dir import load_model
    from igpt_cli.model_input import takes_rgb

    outputs = {
        "--out": (out, ()),
        "--per-image": (per_image, (".csv", ".jsonl")),
        "--position-map": (position_map, PICTURES),
        "--map": (map_path, (*PICTURES, ".npz")),
        "--figure": (figure, PICTURES),
    }
    check_outputs(outputs, force)
    if class_order not in (None, "value", "text"):
        raise InputError(f"--class-order is {class_order!r}, expected value or text")
    _check_map(map_path, map_images)
    if figure is not None and not tokens_cosine:
        raise InputError("--figure draws --tokens-cosine; give it with it, or --map or --position-map instead")
    model = load_model(run_or_default(run, voice), choose_device(device))
    if takes_rgb(model):
        of_pixels = {
            "--mask-prob": mask_prob,
            "--per-image": per_image,
            "--position-map": position_map,
            "--map": map_path,
        }
        only_of_classes({option: value is not None for option, value in of_pixels.items()}, model.name)
    elif class_order is not None:
        raise InputError(f"--class-order is for a model of RGB images with a class head; {model.name} is one of pixels")
    elif head is not None:
        raise InputError(f"--head is for a model with a distillation head; {model.name} is a model of pixels")
    source = tokens or tokens_of(model, voice)
    with open_for_model(source, model, voice, evenly([split] if split else None, limit)) as file:
        if split is None:
            split = default_split(file)
            voice.default("split", split)
        part = file.split(split)
        if limit is not None and limit < len(part):
            voice.say(f"images: {limit:,} of {len(part):,}, evenly spaced")
        if tokens_cosine:
            show_tokens_cosine(model, part, limit, batch_size, precision, out, figure, json, voice)
            return
        if takes_rgb(model):
            show_head(model, file, source, split, limit, head, class_order, batch_size, precision, out, json, voice)
            return
        with voice.progress("evaluating") as progress:
            found = run_evaluation(
                model,
                file,
                split,
                limit=limit,
                batch_size=batch_size,
                precision=precision,
                mask_prob=mask_prob,
                seed=seed,
                progress=progress,
            )
        found = replace(found, tokens=source)
        mapped = {}
        if map_path is not None:
            mapped = _map(model, file, found, map_path, map_images or 8, batch_size, voice)
        if per_image is not None:
            write_per_image(found, part, per_image)
            voice.say(f"written: {per_image}")
    if position_map is not None:
        from igpt_cli.report.maps import position_map as draw

        draw(found.by_position, position_map, _title(found, file, found.n_images))
        voice.say(f"drawn: {position_map}")
    if out is not None:
        write_evaluation(found, out, **mapped)
    _explain(found, voice)
    if json:
        result_json(found.to_dict() | mapped)
    else:
        result(_table(found))


def _check_map(path: Path | None, n: int | None) -> None:
    from igpt_cli.errors import InputError
    from igpt_cli.files import PICTURES
    from igpt_cli.report.maps import MOST_IMAGES

    if path is None and n is not None:
        raise InputError("--map-images is about the images of --map; give --map with it")
    if path is not None and path.suffix.lower() in PICTURES and (n or 0) > MOST_IMAGES:
        raise InputError(
            f"--map-images is {n}; a picture holds {MOST_IMAGES}. Write more as arrays: --map {path.stem}.npz"
        )


def _map(
    run: ModelDir, file: TokenFile, found: Evaluation, path: Path, n: int, batch_size: int | None, voice: Voice
) -> dict[str, Any]:
    """Draw or write where the model is surprised; what the JSON document says of it."""
    from igpt_cli.evaluation.pixel_map import passes, surprise, write_surprise
    from igpt_cli.evaluation.pixels import evenly_spaced
    from igpt_cli.report.maps import surprise_map

    split, rows = file.split(found.split), found.rows[evenly_spaced(found.n_images, n)]
    if len(rows) < found.n_images:
        voice.say(f"map: {len(rows):,} of {found.n_images:,} images, evenly spaced")
    with voice.progress("mapping") as progress:
        nats = surprise(
            run,
            split.tokens[rows],
            rows,
            batch_size=batch_size,
            precision=found.precision,
            mask_prob=found.mask_prob,
            seed=found.seed or 0,
            progress=progress,
        )
    if path.suffix.lower() == ".npz":
        write_surprise(nats, split, rows, path)
        voice.say(f"written: {path}")
    else:
        images = split.decode(rows) if split.rgb is None else split.rgb[rows]
        note = "each pixel predicted from those before it, row by row"
        if found.mask_prob is not None:
            k = passes(found.mask_prob)
            note = f"each pixel predicted once, with {f'1/{k} of the' if k > 1 else 'the whole'} image hidden"
        captions = [caption_of(split, row) for row in rows]
        surprise_map(nats, images, captions, path, _title(found, file, len(rows)), note)
        voice.say(f"drawn: {path}")
    means = [round(float(x), 6) for x in nats.mean((1, 2))]
    return {
        "map": {"path": str(path), "rows": rows.tolist(), "nats_per_token": means, "passes": passes(found.mask_prob)}
    }


def _title(found: Evaluation, file: TokenFile, n: int) -> str:
    """Of a picture: "igpt-tiny on 8 images (cifar.h5, test)"; an only split is not worth a word."""
    from igpt_cli.cli.resolve import name_of

    split = f", {found.split}" if len(file.splits) > 1 else ""
    return f"{found.model} on {_images(n)} ({name_of(found.tokens)}{split})"


def _images(n: int) -> str:
    return f"{n:,} image{'s' if n > 1 else ''}"


def caption_of(split: TokenSplit, row: int) -> str:
    """The class, where there is one, and the name without its folders."""
    name, label = split.names[row].rsplit("/", 1)[-1] or f"row {row}", int(split.labels[row])
    return f"{split.file.classes[label]}: {name}" if label >= 0 else name


def _table(found: Evaluation) -> str:
    """The model, then what it is to be measured by."""
    from math import log

    rows = [(found.model, found.nats_per_token, found.standard_error)]
    rows += [(name, nats, None) for name, nats in _baselines(found).items()]
    cells = [
        [name, f"{nats:.4f}", "" if error is None else f"{error:.4f}", f"{nats / log(2):.4f}", f"{nats / log(8):.4f}"]
        for name, nats, error in rows
    ]
    return table(cells, ["", "nats/token", "standard error", "bits/token", "bits/sub-pixel"])


def _baselines(found: Evaluation) -> dict[str, float]:
    named = {"bigram (left)": found.bigram, "unigram": found.unigram, "uniform": found.uniform}
    return {name: nats for name, nats in named.items() if nats is not None}


def _explain(found: Evaluation, voice: Voice) -> None:
    hidden = "" if found.mask_prob is None else f", pixels hidden with probability {found.mask_prob:g}"
    voice.say(
        f"{found.model}, {found.objective}, on {_images(found.n_images)} of the split {found.split}{hidden}: "
        f"{found.n_tokens:,} tokens in {found.seconds:.1f} s"
    )
    if found.accuracy is not None and found.interval is not None:
        low, high = found.interval
        voice.say(
            f"its class head names {found.accuracy:.2f}% of {_images(found.n_labelled or 0)} with a label "
            f"(95%: {low:.1f} to {high:.1f}), log loss {found.log_loss:.4f} nats"
        )
    if found.seen_in_training:
        voice.say("note: the model was trained on these images")
    if found.baselines_fitted_on == found.split:
        voice.say(f"note: the baselines were counted on the split {found.split} itself, which flatters them")
    else:
        voice.say(f"the baselines were counted on the split {found.baselines_fitted_on}")
    voice.say(
        "note: bits per sub-pixel are bits per token / 3, of the quantised image; they are not comparable with the "
        "bits/dim of 8-bit images"
    )
