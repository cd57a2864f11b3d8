"""igpt complete"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from igpt_cli.cli.options import BatchSize, Device, Force, Json, ManyImages, Out, Precision, Quiet, Run, Seed, Split
from igpt_cli.cli.output import Voice, present
from igpt_cli.cli.sample import Gif, Npz, Rounds, Temperature, TopK, TopP, checked_outputs, say_drawn, say_written

if TYPE_CHECKING:
    import numpy as np

#: Images completed where nobody says how many.
IMAGES = 8


def complete(
    run: Run = None,
    images: ManyImages = None,
    keep: Annotated[
        float | None,
        Option(metavar="PART", help="Keep this part of the rows, from the top, and draw the rest.  [default: 0.5]"),
    ] = None,
    box: Annotated[
        str | None, Option(metavar="X,Y,W,H", help="BERT: draw this box, in pixels of the model's resolution.")
    ] = None,
    mask_image: Annotated[
        Path | None, Option(metavar="M", help="BERT: draw where this image is white or transparent.")
    ] = None,
    n: Annotated[int, Option("-n", "--number", min=1, help="Completions of each image.")] = 4,
    limit: Annotated[
        int | None, Option(min=1, metavar="N", help="At most N images, evenly spaced.  [default: 8, or all named]")
    ] = None,
    split: Split = None,
    out: Out = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    rounds: Rounds = None,
    gif: Gif = None,
    npz: Npz = None,
    batch_size: BatchSize = None,
    precision: Precision = "float32",
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Complete partial images; each row shows the input, several completions, the original.

    \b
    Examples:
      igpt complete
      igpt complete builtin:igpt-tiny embedded --keep 0.5 -o completed.png
      igpt complete runs/igpt-s-1 cat.jpg dog.jpg --keep 0.25 -n 6
      igpt complete runs/bert-1 photos/ --box 8,8,16,16 --rounds 16
      igpt complete runs/bert-1 photo.png --mask-image hole.png --gif filling.gif

    An autoregressive model continues in raster order from the rows that are kept. A BERT model fills any part: in each
    round it draws all missing pixels, and those that it is surest of stay. What is given is shown with the palette's
    colours, as the model sees it.

    Completion J of the image I has its own random stream of --seed. In a mask image white or transparent is drawn,
    black is kept; one of another size is cut to its middle square and made smaller, as the images are.

    Default: samples/complete-<n>.png in the run's folder, or in the current one for a built-in model.
    """
    voice = Voice(quiet)
    if sum(given is not None for given in (keep, box, mask_image)) > 1:
        raise typer.BadParameter("give one of --keep, --box and --mask-image: what is to be drawn")
    import time

    from igpt_cli.cli.resolve import name_of, open_for_model, picture_or_default, run_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.evaluation.pixels import default_split
    from igpt_cli.model_dir import check_fit, check_predicts_pixels, load_model
    from igpt_cli.sampling.draw import SamplingParams
    from igpt_cli.sampling.generate import complete as library
    from igpt_cli.sampling.write import settings_of, write_completions
    from igpt_cli.statistics import evenly_spaced

    params = SamplingParams(temperature, top_k, top_p)
    model = load_model(run_or_default(run, voice), choose_device(device))
    check_predicts_pixels(model)
    missing, part = _missing(model.config["model"]["resolution"], keep, box, mask_image)
    outputs = checked_outputs(picture_or_default(out, model, "complete", voice), gif, npz, force)
    sources = images or [tokens_of(model, voice)]
    with open_for_model(sources, model, voice) as file:
        check_fit(model, file)
        chosen = file.split(split or default_split(file))
        rows = evenly_spaced(len(chosen), limit or max(IMAGES, len(sources)))
        if len(rows) < len(chosen):
            voice.say(f"images: {len(rows):,} of {len(chosen):,} of the split {chosen.name}, evenly spaced")
        tokens, names = chosen.tokens[rows].astype("int64"), [chosen.names[row] for row in rows]
    how: dict[str, Any] = {"params": params, "rounds": rounds, "precision": precision, "batch_size": batch_size}
    started = time.monotonic()
    with voice.progress("drawing", "pixels") as progress:
        drawn = library(model, tokens, missing, n, seed=seed, **how, progress=progress)
    say_drawn(voice, model, drawn, len(rows) * n, time.monotonic() - started)
    settings = settings_of("complete", model, drawn, params, seed, completions=n, missing=part, images=names)
    write_completions(model, tokens, missing, drawn, outputs, settings, f"images: {name_of(sources)}, {chosen.name}")
    say_written(voice, outputs)
    present(outputs.to_dict() | settings, outputs.picture, json)


def _missing(side: int, keep: float | None, box: str | None, mask_image: Path | None) -> tuple[np.ndarray, dict]:
    """(R, R) bool, and how it was said."""
    from igpt_cli.sampling import missing

    if box is not None:
        return missing.box(side, box), {"box": box}
    if mask_image is not None:
        return missing.mask_image(mask_image, side), {"mask_image": str(mask_image)}
    keep = 0.5 if keep is None else keep
    return missing.keep_rows(side, keep), {"keep": keep}
