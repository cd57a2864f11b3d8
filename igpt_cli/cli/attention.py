"""igpt attention"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from igpt_cli.cli.options import Device, Force, Json, ManyImages, Out, Quiet, Run, Split
from igpt_cli.cli.output import Voice, present, table
from igpt_cli.errors import InputError
from igpt_cli.files import PICTURES, check_output, check_outputs

if TYPE_CHECKING:
    from igpt_cli.model_dir import ModelDir

#: Images that the mean distance is taken over when no number is given.
FOR_DISTANCE = 64


def attention(
    run: Run = None,
    images: ManyImages = None,
    layer: Annotated[str, Option(help="Which blocks: all, or such as 5, 0,6,11 or 3-8.")] = "all",
    head: Annotated[str, Option(help="Which heads are drawn: all, or such as 0 or 0,3.")] = "all",
    pixel: Annotated[
        str | None,
        Option(metavar="ROW,COLUMN", help="Whose attention, counted from 0. Default: the middle of the image."),
    ] = None,
    distance: Annotated[
        bool, Option("--distance", help="How far each head looks on average, in pixels, by layer.")
    ] = False,
    n: Annotated[
        int | None,
        Option("-n", "--number", min=1, help="How many images, evenly spaced.  [default: 1; 64 with --distance]"),
    ] = None,
    split: Split = None,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw what a model looks at: where its heads look, what one pixel looks at, or how far heads look.

    \b
    Examples:
      igpt attention
      igpt attention builtin:igpt-tiny photo.jpg --pixel 20,12 -o looks.png
      igpt attention runs/vit-ti-32-1 --layer 0,6,11 -n 3
      igpt attention runs/vit-ti-32-1 --distance -o distance.png
      igpt attention runs/attention-conv-1 -o heads.svg
      igpt attention runs/vit-ti-32-1 --distance --json | jq '.layers[].mean'

    The picture has a map for each layer and head: the probability with which the framed pixel, or the patch it lies in,
    looks at each place. For igpt it is the place that predicts the pixel; it and all after it, in raster order, cannot
    be seen, and are pale.

    A model whose heads are Gaussians around the query (attention-conv) has no need of images: a panel a layer shows
    their centres and widths. Name images or --pixel for maps of it.

    --distance is figure 7 of the ViT paper: the distance from query to key, weighted by attention, over all pixels.

    Default of -o: samples/attention-<n>.png in the run's folder, or in the current one for a built-in model.
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import picture_or_default, run_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.model_dir import load_model
    from igpt_cli.probing.attention import attention_layers
    from igpt_cli.probing.layers import parse_layers
    from igpt_cli.report.attention import draw_gaussians, gaussians_of

    check_outputs({"--out": (out, PICTURES)}, force)
    if distance and (pixel is not None or head != "all"):
        raise InputError("--distance is about all pixels and heads; leave out --pixel and --head, or --distance")
    place = _pixel(pixel)
    model = load_model(run_or_default(run, voice), choose_device(device))
    layers = attention_layers(model, parse_layers(layer))
    out = picture_or_default(out, model, "attention", voice)
    check_output(out, force)
    gaussians = gaussians_of(model, layers)
    if gaussians and not images and pixel is None and not distance:
        if head != "all" or n is not None or split is not None:
            raise InputError("--head, -n and --split are about maps of images; name images or --pixel with them")
        document = draw_gaussians(model, gaussians, out)
    else:
        source = images or tokens_of(model, voice)
        n = n or (FOR_DISTANCE if distance else 1)
        how: dict[str, Any] = {} if distance else {"heads": parse_layers(head), "pixel": place}
        document = _of_images(model, source, split, n, layers, distance, out, how, voice)
    voice.say(f"drawn: {out}")
    document = {"path": str(out), "model": model.name, "run": model.run, **document}
    present(document, _table(document["layers"]) if distance else out, json)


def _of_images(
    model: ModelDir,
    source: str | list[str],
    split: str | None,
    n: int,
    layers: list[int],
    distance: bool,
    out: Path,
    how: dict[str, Any],
    voice: Voice,
) -> dict[str, Any]:
    """Draw what heads look at in some images, or how far; what the JSON document says of it."""
    from igpt_cli.cli.resolve import name_of, open_for_model, split_or_default
    from igpt_cli.images.subset import evenly
    from igpt_cli.model_dir import check_fit
    from igpt_cli.report.attention import draw_distances, draw_maps
    from igpt_cli.statistics import evenly_spaced

    with open_for_model(source, model, voice, evenly([split] if split else None, n)) as file:
        part = split_or_default(file, split, voice)
        rows = evenly_spaced(len(part), n)
        if not len(rows):
            raise InputError(f"{file.path}: the split {part.name!r} is empty; there is nothing to look at")
        check_fit(model, file)
        if not distance:
            with voice.progress("looking") as progress:
                return draw_maps(model, part, rows, layers, out, **how, progress=progress)
        with voice.progress("measuring") as progress:
            return draw_distances(model, part, rows, layers, out, f"{name_of(source)}, {part.name}", progress)


def _pixel(text: str | None) -> tuple[int, int] | None:
    """ "3,12" -> (3, 12)."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f"--pixel {text!r} is not a row and a column; write both, as in 16,16")
    return int(parts[0]), int(parts[1])


def _table(layers: list[dict[str, Any]]) -> str:
    rows = [
        [row["layer"], *(f"{pixels:.2f}" for pixels in (row["mean"], min(row["heads"]), max(row["heads"])))]
        for row in layers
    ]
    return table(rows, ["layer", "mean distance (pixels)", "nearest head", "furthest head"])
