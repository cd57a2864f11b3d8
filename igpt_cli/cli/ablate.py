"""igpt ablate"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from igpt_cli.cli.candidates import ablations, runs
from igpt_cli.cli.options import Device, Force, Json, Quiet, only
from igpt_cli.cli.output import Voice, duration, present, table
from igpt_cli.cli.training import command_typed
from igpt_cli.cli.training_display import TrainingDisplay
from igpt_cli.files import check_folder

COMMON = {"json", "quiet"}
#: The palette of the embedded images: that of the model which ships with igpt.
SHIPPED = "builtin:igpt-tiny"


def ablate(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        Argument(metavar="NAME", autocompletion=ablations, help="Which ablation; without it they are listed."),
    ] = None,
    tokens: Annotated[
        str | None,
        Argument(metavar="T", help="A token file with labels, or images in class folders. Default: embedded images."),
    ] = None,
    size: Annotated[
        str | None, Option(metavar="small|full", help="How large the models are.  [default: small; on a GPU full]")
    ] = None,
    steps: Annotated[
        int | None, Option(min=1, help="End each run after so many steps.  [default: the size's steps or epochs]")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="End after this many passes over the training images.")
    ] = None,
    budget: Annotated[
        str | None, Option(metavar="TIME", help="End each run after so much time (90s, 15m), by the clock.")
    ] = None,
    recipe: Annotated[
        str | None,
        Option(metavar="plain|deit|swin", help="Of runs trained with labels, as for igpt train.  [default: plain]"),
    ] = None,
    augment: Annotated[
        str | None,
        Option(metavar="none|flip|crop-flip|resized-crop-flip", help="How images are framed.  [default: the recipe's]"),
    ] = None,
    run: Annotated[
        str | None, Option(metavar="RUN", autocompletion=runs, help="layer: probe this model, and train none.")
    ] = None,
    resume: Annotated[
        Path | None, Option(metavar="DIR", help="Continue an ablation; runs that are complete stay.")
    ] = None,
    palette: Annotated[
        str | None,
        Option(
            "--palette", "-p", help="Palette, where T is images.  [default: data/palette.npz; embedded: the shipped]"
        ),
    ] = None,
    resolution: Annotated[int, Option("--resolution", "-r", help="Where T is images: their side.")] = 32,
    seed: Annotated[int | None, Option(min=0, help="Seed of every run.  [default: 0]")] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, Option("--out", "-o", metavar="DIR", help="The folder to write.  [default: ablations/NAME]")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Repeat an ablation of the papers in minutes, with our numbers and the paper's; without NAME, list them.

    \b
    Examples:
      igpt ablate
      igpt ablate positions                          on the embedded images, into ablations/positions
      igpt ablate shift cifar.h5 --augment crop-flip --epochs 30 -o shift
      igpt ablate distillation cifar.h5 --recipe deit --budget 5m -o distillation
      igpt ablate layer --run builtin:igpt-tiny -o layer
      igpt ablate --resume distillation              continue after Ctrl-C
      igpt ablate window-cost --json | jq '.cost[].seconds'

    All runs of an ablation are trained alike, for as many steps, epochs or as much time. Each is an ordinary run in
    DIR/<name>, which igpt compare and igpt probe take. DIR also has table.md, picture.png and ablation.json.
    """
    voice = Voice(quiet)
    if name is None and resume is None:
        only(ctx, {*COMMON, "device", "force", "resolution"}, "igpt ablate lists; name one for its options")
        _list(json)
        return
    from igpt_cli.ablations.catalogue import find_ablation
    from igpt_cli.ablations.runner import TIMING
    from igpt_cli.ablations.runner import ablate as run_ablation
    from igpt_cli.ablations.runner import resume as run_resumed
    from igpt_cli.ablations.settings import DOCUMENT, Settings, checked, read_ablation
    from igpt_cli.training.settings import seconds

    how: dict[str, Any] = {
        "device": device,
        "callbacks": partial(_display, voice),
        "stage": lambda label: voice.progress(label, "measurements" if label == TIMING else "images"),
    }
    if resume is not None:
        only(ctx, {*COMMON, "resume", "device", "resolution"}, "--resume continues with the settings that it had")
        document = read_ablation(resume)
        with _images(document["settings"], voice) as file:
            found = run_resumed(file, resume, **how)
    else:
        ablation = find_ablation(str(name))
        typed: dict[str, Any] = {"budget": None if budget is None else seconds(budget), "seed": seed or 0}
        typed |= {"size": size, "steps": steps, "epochs": epochs, "recipe": recipe, "augment": augment, "run": run}
        typed |= _where(tokens, palette, run, bool(ablation.runs), voice)
        settings = Settings(**typed, resolution=resolution)
        settings = checked(ablation, settings, settings.images is not None, device)
        if out is None:
            out = Path("ablations") / ablation.name
            voice.default("out", out)
        check_folder(out, DOCUMENT, force)
        with _images(asdict(settings), voice) as file:
            found = run_ablation(ablation.name, file, out, settings, force=force, command=command_typed(), **how)
    _report(found, resume or out, json, voice)


def _list(json: bool) -> None:
    from igpt_cli.ablations.catalogue import listing

    found = listing()
    lines = []
    for row in found:
        time = f"about {row['minutes_cpu']:g} min on a core, {row['minutes_gpu']:g} min on a GPU"
        lines += [f"{row['name']:<13} {row['question']}", f"{'':<13} {row['paper']}, {row['table']}"]
        lines.append(f"{'':<13} {row['trains']}; {time}")
    present(found, "\n".join(lines), json)


def _where(
    images: str | None, palette: str | None, run: str | None, needed: bool, voice: Voice
) -> dict[str, str | None]:
    """The images named, or where some are `needed` those of the run, or the embedded ones; and their palette."""
    from igpt_cli.cli.resolve import tokens_of
    from igpt_cli.model_dir import load_model
    from igpt_cli.tokens.open_or_tokenize import EMBEDDED

    if images is None and needed:
        images = EMBEDDED if run is None else tokens_of(load_model(run), voice)
        if run is None:
            voice.default("images", EMBEDDED)
    return {"images": images, "palette": palette or (SHIPPED if images == EMBEDDED and run is None else None)}


@contextmanager
def _images(settings: dict[str, Any], voice: Voice) -> Iterator[Any]:
    """The open token file of an ablation, made of images where these were named; None where it needs none."""
    from igpt_cli.cli.resolve import open_for_model, open_tokens_or_images, palette_or_default
    from igpt_cli.model_dir import load_model
    from igpt_cli.palette.palette import Palette
    from igpt_cli.workspace import BUILTIN, resolve_run

    def palette() -> Palette:
        named = settings["palette"]
        builtin = named is not None and named.startswith(BUILTIN)
        return palette_or_default(resolve_run(named) if builtin else named, voice)

    if settings["images"] is None:
        yield None
    elif settings["run"]:
        with open_for_model(settings["images"], load_model(settings["run"]), voice) as file:
            yield file
    else:
        with open_tokens_or_images(settings["images"], palette, settings["resolution"], voice) as file:
            yield file


@contextmanager
def _display(voice: Voice, label: str) -> Iterator[dict[str, Any]]:
    """The callbacks that show a run while it is trained."""
    voice.say(f"run: {label}")
    with TrainingDisplay(voice, label) as display:
        yield {"on_start": display.start, "on_record": display.record, "on_event": display.event}


def _report(found: dict[str, Any], out: Path | None, json: bool, voice: Voice) -> None:
    from igpt_cli.ablations.page import cells

    voice.say(f"{found['question']} ({found['paper']}, {found['table']})")
    for line in found["findings"]:
        voice.say(line)
    for line in found["differs"]:
        voice.say(f"differs: {line}")
    voice.say(f"written in {duration(found['seconds'])}: {out}")
    header, rows = cells(found)
    present(found, table(rows, header), json)
