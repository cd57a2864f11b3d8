"""igpt attention"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.options import Device, Force, Json, Out, Quiet, Run, Split
from igpt_cli.cli.output import Voice, result, result_json, table

if TYPE_CHECKING:
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.model_input import Decode
    from igpt_cli.tokens.store import TokenSplit

#: Images that the mean distance is taken over when no number is given.
FOR_DISTANCE = 64


def attention(
    run: Run = None,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE...",
            help="Images, or a token file. Default: what the run was trained on.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[str, typer.Option("--layer", help="Which blocks: all, or such as 5, 0,6,11 or 3-8.")] = "all",
    head: Annotated[str, typer.Option("--head", help="Which heads are drawn: all, or such as 0 or 0,3.")] = "all",
    pixel: Annotated[
        str | None,
        typer.Option(
            "--pixel",
            metavar="ROW,COLUMN",
            help="Whose attention, counted from 0. Default: the middle of the image.",
            show_default=False,
        ),
    ] = None,
    distance: Annotated[
        bool, typer.Option("--distance", help="How far each head looks on average, in pixels, by layer.")
    ] = False,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--number",
            min=1,
            help="How many images, evenly spaced.  [default: 1; 64 with --distance]",
            show_default=False,
        ),
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
    from igpt_cli.cli.resolve import evenly, name_of, open_for_model, run_or_default, tokens_of
    from igpt_cli.cli.sample import output_or_default
    from igpt_cli.device import choose_device
    from igpt_cli.errors import InputError
    from igpt_cli.evaluation.pixels import default_split, evenly_spaced
    from igpt_cli.files import PICTURES, check_output, check_outputs
    from igpt_cli.model_dir import check_fit, load_model
    from igpt_cli.model_input import inputs_of
    from igpt_cli.probing.attention import attention_layers
    from igpt_cli.probing.layers import parse_layers

    check_outputs({"--out": (out, PICTURES)}, force)
    if distance and (pixel is not None or head != "all"):
        raise InputError("--distance is about all pixels and heads; leave out --pixel and --head, or --distance")
    place = _pixel(pixel)
    model = load_model(run_or_default(run, voice), choose_device(device))
    layers = attention_layers(model, parse_layers(layer))
    out = output_or_default(out, model, "attention", voice)
    check_output(out, force)
    gaussians = _gaussians(model, layers)
    if gaussians and not images and pixel is None and not distance:
        if head != "all" or n is not None or split is not None:
            raise InputError("--head, -n and --split are about maps of images; name images or --pixel with them")
        document: dict[str, Any] = _draw_gaussians(model, gaussians, out)
    else:
        source: Any = images or tokens_of(model, voice)
        most = n or (FOR_DISTANCE if distance else 1)
        with open_for_model(source, model, voice, evenly([split] if split else None, most)) as file:
            if split is None:
                split = default_split(file)
                voice.default("split", split)
            part = file.split(split)
            rows = evenly_spaced(len(part), most)
            if not len(rows):
                raise InputError(f"{file.path}: the split {split!r} is empty; there is nothing to look at")
            check_fit(model, file)
            seen = inputs_of(model, part)
            if distance:
                images_of = f"{name_of(source)}, {split}"
                document = _draw_distances(model, images_of, rows, layers, seen, out, voice)
            else:
                document = _draw_maps(model, part, rows, layers, parse_layers(head), place, seen, out, voice)
    voice.say(f"drawn: {out}")
    if json:
        result_json({"path": str(out), "model": model.name, "run": model.run, **document})
    elif distance:
        result(_table(document["layers"]))
    else:
        result(out)


def _pixel(text: str | None) -> tuple[int, int] | None:
    """ "3,12" -> (3, 12)."""
    from igpt_cli.errors import InputError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f"--pixel {text!r} is not a row and a column; write both, as in 16,16")
    return int(parts[0]), int(parts[1])


def _gaussians(run: ModelDir, layers: list[int]) -> dict[int, tuple[Any, Any]]:
    """{layer: (centres, covariances)} of a model whose heads are Gaussians; of any other, nothing."""
    model: Any = run.model
    found = model.gaussians() if hasattr(model, "gaussians") else {}
    return {layer: tuple(t.cpu().numpy() for t in found[layer]) for layer in layers if layer in found}


def _draw_gaussians(run: ModelDir, gaussians: dict[int, tuple[Any, Any]], out: Path) -> dict[str, Any]:
    from igpt_cli.report.attention import gaussian_figure

    gaussian_figure(gaussians, out, f"{run.name}: where each head looks")
    return {
        "layers": [
            {"layer": layer, "centres": centres.tolist(), "covariances": covariances.tolist()}
            for layer, (centres, covariances) in gaussians.items()
        ]
    }


def _draw_maps(
    run: ModelDir,
    split: TokenSplit,
    rows: Any,
    layers: list[int],
    heads: list[int] | None,
    pixel: tuple[int, int] | None,
    seen: tuple[Any, Decode],
    out: Path,
    voice: Voice,
) -> dict[str, Any]:
    from igpt_cli.cli.evaluate import caption_of
    from igpt_cli.errors import InputError
    from igpt_cli.probing.attention import attention_maps
    from igpt_cli.report.attention import map_figure

    (values, decode), R = seen, run.config["model"]["resolution"]
    with voice.progress("looking") as progress:
        looks = attention_maps(run, values[rows], layers, pixel=pixel, decode=decode, progress=progress)
    known = min(look.maps.shape[1] for look in looks.values())
    heads = list(range(known)) if heads is None else heads
    if heads[-1] >= known:
        raise InputError(f"head {heads[-1]} asked for; {run.name} has the heads 0 to {known - 1}")
    pixel = pixel or (R // 2, R // 2)
    pictures = split.decode(rows) if split.rgb is None else split.rgb[rows]
    captions = [caption_of(split, row) for row in rows]
    title = f"{run.name}: what pixel {pixel[0]},{pixel[1]} looks at" + ("" if known == 1 else " in each head")
    note = "colours from 0 to each map's own highest probability; pale: cannot be seen; the red frame is the query"
    map_figure(looks, pictures, out, heads, pixel, captions, title, note)
    return {
        "pixel": list(pixel),
        "rows": rows.tolist(),
        "layers": [
            {
                "layer": layer,
                "query": list(look.query),
                "highest": look.maps[:, heads].max((2, 3)).round(6).tolist(),
                "elsewhere": look.elsewhere[:, heads].round(6).tolist(),
            }
            for layer, look in looks.items()
        ],
    }


def _draw_distances(
    run: ModelDir, images_of: str, rows: Any, layers: list[int], seen: tuple[Any, Decode], out: Path, voice: Voice
) -> dict[str, Any]:
    from igpt_cli.probing.attention import attention_distance
    from igpt_cli.report.attention import distance_figure

    values, decode = seen
    with voice.progress("measuring") as progress:
        found = attention_distance(run, values[rows], layers, decode=decode, progress=progress)
    images = f"{len(rows):,} image{'s' if len(rows) > 1 else ''}"
    distance_figure(found, out, f"{run.name} on {images} ({images_of})")
    return {
        "rows": rows.tolist(),
        "layers": [
            {"layer": layer, "mean": round(float(d.mean()), 4), "heads": d.round(4).tolist()}
            for layer, d in found.items()
        ],
    }


def _table(layers: list[dict[str, Any]]) -> str:
    rows = [
        [row["layer"], *(f"{pixels:.2f}" for pixels in (row["mean"], min(row["heads"]), max(row["heads"])))]
        for row in layers
    ]
    return table(rows, ["layer", "mean distance (pixels)", "nearest head", "furthest head"])
