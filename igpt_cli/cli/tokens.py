"""igpt tokens: look at token files, check them, join them, export and import them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from igpt_cli.cli.candidates import splits
from igpt_cli.cli.options import Force, Json, Out, Quiet, Seed
from igpt_cli.cli.output import Voice, printable, result, result_json, table
from igpt_cli.cli.resolve import tokens_or_default

if TYPE_CHECKING:
    from igpt_cli.tokens.store import TokenSplit

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Token files: look at them, check them, join them, export and import them.\n\n"
    "\b\nExamples:\n  igpt tokens info data/tokens-32.h5\n  igpt tokens show -o sheet.png\n"
    "  igpt tokens verify data/tokens-32.h5",
)

Tokens = Annotated[
    Path | None,
    typer.Argument(metavar="T", help="The token file. Default: data/tokens-<R>.h5.", show_default=False),
]


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
    if json:
        result_json(about)
    else:
        result(printable(_text(about)))


@app.command("show")
def show(
    tokens: Tokens = None,
    out: Out = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--number",
            min=1,
            max=1000,
            help="How many images.  [default: 32; 4 with --terminal]",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", autocompletion=splits, help="Of which split.  [default: the first]"),
    ] = None,
    terminal: Annotated[
        bool,
        typer.Option("--terminal", help="Show them in the terminal instead, where it has 24-bit colours (COLORTERM)."),
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Draw a contact sheet: quantized images with their classes, the originals beside them where they are stored.

    Default: <name>-<split>.png beside the token file.

    \b
    Examples:
      igpt tokens show
      igpt tokens show data/tokens-32.h5 -n 64 --split test -o sheet.png
      igpt tokens show data/tokens-32.h5 --terminal

    Where originals are stored, the sheet also tells what quantizing lost of these images, as PSNR. --terminal lists the
    images as text where stdout is no terminal, or has no 24-bit colours.
    """
    from igpt_cli.errors import InputError
    from igpt_cli.files import check_outputs
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
        result(_in_terminal(part, 4 if n is None else n, seed, voice))
        return
    if out is None:
        out = tokens.with_name(f"{tokens.stem}-{part.name}.png")
        voice.default("out", out)
    check_outputs({"--out": (out, PIXELS)}, force)
    save_picture(contact_sheet(part, 32 if n is None else n, seed), out)
    result(out)


def _in_terminal(split: TokenSplit, n: int, seed: int, voice: Voice) -> str:
    """Images as coloured text, originals at the left where they are stored and fit; or else a table of them."""
    import numpy as np

    from igpt_cli.cli.preview import previews, room, true_colour
    from igpt_cli.tokens.sheet import class_or_name, sample_rows

    rows, side, columns = sample_rows(split, n, seed), split.file.resolution, room()
    if not len(rows):
        return printable(f"{split.file.path}: the split {split.name} has no images")
    captions = [printable(class_or_name(split, row)) for row in rows]
    if not true_colour() or columns < side:
        why = f"an image takes {side} columns of {columns}" if true_colour() else "stdout has no 24-bit colours"
        voice.say(f"{why}; the images are listed instead")
        named = zip(rows.tolist(), captions, (split.names[row] for row in rows))
        return table([list(row) for row in named], ["row", "class", "name"])
    pictures = split.decode(rows)
    if split.rgb is not None and columns >= 2 * side:
        pictures = np.concatenate([split.rgb[rows], pictures], axis=2)
        voice.say("originals at the left, quantized at the right")
    return previews(list(pictures), captions, columns)


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
    if json:
        result_json({"path": str(path), "ok": not problems, "problems": problems})
    else:
        result("\n".join(problems) if problems else f"{path} is sound")
    if problems:
        raise typer.Exit(1)


@app.command("merge")
def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="T...", help="The token files to join.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="Where to write.", show_default=False)],
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
        typer.Option(
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
        typer.Argument(
            metavar="X.npy [Y.npy] | NAME",
            help="Tokens and their labels; or the beginning of the names of all: openai/imagenet reads "
            "openai/imagenet_trX.npy, openai/imagenet_trY.npy and so on, as many as are there.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="Where to write.", show_default=False)],
    palette: Annotated[
        Path | None,
        typer.Option(
            "--palette",
            "-p",
            metavar="P",
            help="The palette that the tokens were made with.  [default: kmeans_centers.npy beside them]",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="NAME",
            autocompletion=splits,
            help="Only this split; of X.npy, the split it is.  [default: all; as the name of X.npy ends]",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            "--classes", metavar="NAMES.txt", help="The names of the classes, one a line.  [default: 0, 1, ...]"
        ),
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
    from igpt_cli.tokens.import_ import import_openai, read_class_names

    voice = Voice(quiet)
    arrays = _arrays(sources, split, voice)
    colours = Palette.load(palette or _palette_beside(next(iter(arrays.values()))[0], voice))
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


def _arrays(sources: list[Path], split: str | None, voice: Voice) -> dict[str, tuple[Path, Path | None]]:
    """Which arrays are meant, by split."""
    from igpt_cli.errors import InputError
    from igpt_cli.tokens.import_ import find_arrays, split_from_name

    if len(sources) > 2:
        raise InputError(
            f"{len(sources)} files were given; one split is X.npy and Y.npy, and several are named by the beginning of "
            f"their names, as openai/imagenet"
        )
    if len(sources) == 1 and not sources[0].is_file() and sources[0].suffix != ".npy":
        arrays = find_arrays(sources[0])
        if split is not None and split not in arrays:
            raise InputError(f"{sources[0]} has no arrays of {split!r}; there are those of {', '.join(arrays)}")
        return arrays if split is None else {split: arrays[split]}
    x, y = sources[0], sources[1] if len(sources) == 2 else None
    if split is None:
        split = split_from_name(x)
        if split is None:
            raise InputError(f"which split {x} is cannot be told from its name; say it with --split train|val|test")
        voice.default("split", split)
    return {split: (x, y)}


def _palette_beside(x: Path, voice: Voice) -> Path:
    from igpt_cli.errors import InputError

    path = x.with_name("kmeans_centers.npy")
    if not path.exists():
        raise InputError(
            f"no palette was given and none is at {path}; give the one that the tokens were made with, --palette P"
        )
    voice.default("palette", path)
    return path


def _text(about: dict) -> str:
    """A description for people."""
    attrs, palette = about["attrs"], about["palette"]
    lines = [str(about["path"])]
    lines += [
        f"  {k} = {', '.join(f'{n}={v}' for n, v in attrs[k].items()) if k == 'preprocess' else attrs[k]}"
        for k in sorted(attrs)
    ]
    tree = [
        [t["name"], " x ".join(map(str, t["shape"])), t["dtype"], f"{t['bytes'] / 1e6:,.2f} MB"] for t in about["tree"]
    ]
    lines += ["", table(tree, ["dataset", "shape", "dtype", "size"])]
    splits = about["splits"]
    rows = [[name, *(s["classes"][name] for s in splits.values())] for name in next(iter(splits.values()))["classes"]]
    for key in ("unlabelled", "skipped"):
        if any(s[key] for s in splits.values()):
            rows.append([f"({key})", *(s[key] for s in splits.values())])
    rows.append(["rows", *(s["rows"] for s in splits.values())])
    lines += ["", table(rows, ["class", *splits])]
    most = [[m["token"], "#{:02x}{:02x}{:02x}".format(*m["rgb"]), f"{m['share']:.2f}%"] for m in palette["most_used"]]
    lines += ["", f"{palette['used']:,} of {palette['colours']:,} colours are used; most used:"]
    lines.append(table(most, ["token", "colour", "pixels"]))
    return "\n".join(lines)
