"""igpt tokens: show, verify, merge, export and import token files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from igpt_cli.cli.candidates import splits
from igpt_cli.cli.options import Force, Json, NewFile, Out, Quiet, Seed, group
from igpt_cli.cli.output import Voice, present, printable, result
from igpt_cli.cli.resolve import tokens_or_default
from igpt_cli.cli.tokens_text import description, in_terminal
from igpt_cli.errors import InputError
from igpt_cli.files import check_outputs

app = group(
    "Token files: look at them, check them, join them, export and import them.",
    "igpt tokens info data/tokens-32.h5",
    "igpt tokens show -o sheet.png",
    "igpt tokens verify data/tokens-32.h5",
)

Tokens = Annotated[Path | None, Argument(metavar="T", help="The token file. Default: data/tokens-<R>.h5.")]


@app.command("info")
def info(tokens: Tokens = None, json: Json = False, quiet: Quiet = False) -> None:
    """Show what a token file holds: its tree, attributes, classes, and how the palette is used.

    \b
    Examples:
      igpt tokens info
      igpt tokens info data/tokens-32.h5 --json
    """
    from igpt_cli.tokens.describe import describe

    about = describe(tokens_or_default(tokens, Voice(quiet)))
    present(about, printable(description(about)), json)


@app.command("show")
def show(
    tokens: Tokens = None,
    out: Out = None,
    n: Annotated[
        int | None, Option("-n", "--number", min=1, max=1000, help="How many images.  [default: 32; 4 with --terminal]")
    ] = None,
    seed: Seed = 0,
    split: Annotated[
        str | None, Option(metavar="NAME", autocompletion=splits, help="Of which split.  [default: the first]")
    ] = None,
    terminal: Annotated[
        bool, Option("--terminal", help="Show them in the terminal instead, where it has 24-bit colours (COLORTERM).")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Draw a contact sheet: quantized images with their classes, and the originals where they are stored.

    Default: <name>-<split>.png in the folder of the token file.

    \b
    Examples:
      igpt tokens show
      igpt tokens show data/tokens-32.h5 -n 64 --split test -o sheet.png
      igpt tokens show data/tokens-32.h5 --terminal

    Where originals are stored, the sheet also shows what quantizing lost of these images, as PSNR. --terminal lists the
    images as text where stdout is no terminal, or has no 24-bit colours.
    """
    from igpt_cli.images.pictures import PIXELS, save_picture
    from igpt_cli.tokens.sheet import contact_sheet
    from igpt_cli.tokens.store import open_tokens

    voice = Voice(quiet)
    if terminal and out is not None:
        raise InputError("--terminal writes no file; leave out --out, or --terminal")
    tokens = tokens_or_default(tokens, voice)
    file = open_tokens(tokens)
    part = file.split(split or next(iter(file.splits)))
    if terminal:
        result(in_terminal(part, 4 if n is None else n, seed, voice))
        return
    if out is None:
        out = tokens.with_name(f"{tokens.stem}-{part.name}.png")
        voice.default("out", out)
    check_outputs({"--out": (out, PIXELS)}, force)
    save_picture(contact_sheet(part, 32 if n is None else n, seed), out)
    result(out)


@app.command("verify")
def verify(tokens: Tokens = None, json: Json = False, quiet: Quiet = False) -> None:
    """Check everything in a token file: structure, shapes, ranges, checksums. Every problem is listed; exit 1 if any.

    \b
    Examples:
      igpt tokens verify
      igpt tokens verify data/tokens-32.h5 --json
    """
    from igpt_cli.tokens.verify import verify as library

    path = tokens_or_default(tokens, Voice(quiet))
    problems = library(path)
    present(
        {"path": str(path), "ok": not problems, "problems": problems},
        "\n".join(problems) if problems else f"{path} is sound",
        json,
    )
    if problems:
        raise typer.Exit(1)


@app.command("merge")
def merge(
    parts: Annotated[list[Path], Argument(metavar="T...", help="The token files to join.")],
    out: NewFile,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Join token files. All shards of one source give exactly what one run would have given; other files are appended.

    Palette, resolution, preparation of the images and classes must be the same in all.

    \b
    Examples:
      igpt tokens merge data/tokens-32.shard-*.h5 -o data/tokens-32.h5
    """
    from igpt_cli.tokens.merge import merge as library

    voice = Voice(quiet)
    with voice.progress("merging", unit="rows") as progress:
        result(library(parts, out, force=force, progress=progress))


@app.command("export")
def export(
    tokens: Tokens = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            "-o",
            metavar="NAME",
            help="Path and beginning of the file names: out/photos gives out/photos_trX.npy and so on.  "
            "[default: as the token file]",
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write OpenAI's form: NAME_{trX,trY,vaX,vaY,teX,teY}.npy, X (N, R*R) int32 and Y (N, C) float32 one-hot.

    \b
    Examples:
      igpt tokens export data/tokens-32.h5 -o openai/photos
    """
    from igpt_cli.tokens.export import export_openai
    from igpt_cli.tokens.store import open_tokens

    voice = Voice(quiet)
    tokens = tokens_or_default(tokens, voice)
    if out is None:
        out = tokens.with_suffix("")
        voice.default("out", out)
    with voice.progress("exporting", unit="rows") as progress:
        paths, lacking = export_openai(open_tokens(tokens), out, force=force, progress=progress)
    for sentence in lacking:
        voice.say(sentence)
    result("\n".join(map(str, paths)))


@app.command("import")
def import_(
    sources: Annotated[
        list[Path],
        Argument(
            metavar="X.npy [Y.npy] | NAME",
            help="Tokens and their labels; or the beginning of the names of all: openai/imagenet reads "
            "openai/imagenet_trX.npy, openai/imagenet_trY.npy and so on, as many as are there.",
        ),
    ],
    out: NewFile,
    palette: Annotated[
        Path | None,
        Option("--palette", "-p", metavar="P", help="Its palette.  [default: kmeans_centers.npy in their folder]"),
    ] = None,
    split: Annotated[
        str | None,
        Option(metavar="NAME", autocompletion=splits, help="Only this split.  [default: all; as X.npy's name ends]"),
    ] = None,
    classes: Annotated[
        Path | None, Option(metavar="NAMES.txt", help="The names of the classes, one a line.  [default: 0, 1, ...]")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Read OpenAI's form: X (N, R*R) whole numbers, Y (N, C) one-hot or (N,) whole numbers. The opposite of export.

    \b
    Examples:
      igpt tokens import openai/imagenet_teX.npy openai/imagenet_teY.npy -p openai/kmeans_centers.npy -o imagenet.h5
      igpt tokens import openai/imagenet -o imagenet.h5
      igpt tokens import out/photos -p data/tokens-32.h5 -o photos.h5
    """
    from igpt_cli.palette.palette import Palette
    from igpt_cli.tokens.import_ import import_openai, named_arrays, palette_beside, read_class_names

    voice = Voice(quiet)
    arrays = named_arrays(sources, split)
    if split is None and sources[0] in arrays[next(iter(arrays))]:
        voice.default("split", next(iter(arrays)))
    if palette is None:
        palette = palette_beside(next(iter(arrays.values()))[0])
        voice.default("palette", palette)
    colours = Palette.load(palette)
    names = read_class_names(classes) if classes else []
    for name, (x, y) in arrays.items():
        if y is None:
            voice.say(f"no labels for {name}: there is no Y with {x}")
    with voice.progress("importing", unit="rows") as progress:
        file = import_openai(arrays, colours, out, classes=names, force=force, progress=progress)
    rows = ", ".join(f"{name} {len(part):,}" for name, part in file.splits.items())
    voice.say(f"{rows} rows of {file.resolution**2:,} tokens, {len(file.classes):,} classes")
    for name, part in file.splits.items():
        if arrays[name][1] is not None and (none := int((part.labels < 0).sum())):
            voice.say(f"{none:,} images of {name} have no label")
    result(out)
