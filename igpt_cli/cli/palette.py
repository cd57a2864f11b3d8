"""igpt palette: fit, count, show, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from igpt_cli.cli import options
from igpt_cli.cli.candidates import splits
from igpt_cli.cli.options import group
from igpt_cli.cli.output import Voice, present, result, result_json
from igpt_cli.cli.palette_run import counts_of, error, facts, origin, print_colours, psnr, say_left_out
from igpt_cli.cli.resolve import palette_or_default
from igpt_cli.files import check_output, check_outputs
from igpt_cli.workspace import PALETTE

app = group(
    "The colours that pixels become: fit, count, show, convert.",
    "igpt palette fit photos/ -o palette.npz",
    "igpt palette show palette.npz -o swatch.png",
)

SourcesOrCounts = Annotated[
    list[str] | None,
    Argument(
        metavar="SOURCE",
        help="Images as for `igpt tokenize`, or files that `igpt palette count` wrote, in any mixture; '-' for paths "
        "on stdin. Default: the embedded images.",
    ),
]
Resolution = Annotated[
    int, Option("--resolution", "-r", min=1, metavar="R", help="Side in pixels to which images are reduced first.")
]
Views = Annotated[
    int, Option("--views", min=0, metavar="K", help="Random views counted of each training image; 0: the centre crop.")
]
Split = Annotated[
    str | None,
    Option("--split", metavar="NAME|all", autocompletion=splits, help="Split to count.  [default: train, if any]"),
]
Limit = Annotated[int | None, Option("--limit", min=1, metavar="N", help="Only the first N images.  [default: all]")]
P = Annotated[
    str | None,
    Argument(metavar="P", help="A palette: .npz, .npy, .json, a token file or a run. Default: data/palette.npz."),
]


@app.command("fit")
def fit(
    sources: SourcesOrCounts = None,
    out: options.Out = None,
    clusters: Annotated[
        int, Option("--clusters", "-k", min=2, metavar="V", help="How many colours the palette has.")
    ] = 512,
    seed: options.Seed = 0,
    resolution: Resolution = 32,
    views: Views = 0,
    split: Split = None,
    limit: Limit = None,
    exact_decode: options.ExactDecode = False,
    strict: options.StrictSource = False,
    column: options.Column = None,
    workers: options.Workers = None,
    null: options.Null = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit a palette to all pixels of the images: k-means, the same for the same seed on any machine.

    Of images with splits, the training split is taken. Counts made in parts, by `igpt palette count`, give the same
    palette as the images together. Default: the embedded images, data/palette.npz.

    \b
    Examples:
      igpt palette fit
      igpt palette fit photos/ -o palette.npz --clusters 512 --seed 0
      igpt palette fit part-0.counts.npz part-1.counts.npz -o palette.npz
    """
    from igpt_cli.palette.describe import describe
    from igpt_cli.palette.fit import fit_palette

    voice = Voice(quiet)
    if out is None:
        out = PALETTE
        voice.default("out", out)
    check_output(out, force)
    how: dict[str, Any] = {"split": split, "limit": limit, "workers": workers, "strict": strict}
    counts, bad = counts_of(sources, null, column, (resolution, views, seed, exact_decode), how, voice)
    with voice.progress("fitting", unit="iterations") as progress:
        palette = fit_palette(counts, clusters, seed, progress)
    palette.save(out, force)
    summary = {k: v for k, v in describe(palette).items() if k not in ("colours", "meta")}
    voice.say(
        f"{palette.n_vocab:,} colours for {counts.pixels:,} pixels ({palette.meta['distinct_colours']:,} distinct) of "
        f"{counts.images:,} images: mean squared error {error(summary)}, {psnr(summary)}"
    )
    say_left_out(voice, bad)
    voice.say(f"next: igpt tokenize{' SOURCE' * bool(sources)}{'' if out == PALETTE else f' -p {out}'}")
    present({"path": str(out), **summary, "distinct_colours": palette.meta["distinct_colours"], "bad": bad}, out, json)


@app.command("count")
def count(
    sources: options.Sources = None,
    out: options.Out = None,
    resolution: Resolution = 32,
    views: Views = 0,
    seed: options.Seed = 0,
    split: Split = None,
    limit: Limit = None,
    exact_decode: options.ExactDecode = False,
    strict: options.StrictSource = False,
    column: options.Column = None,
    workers: options.Workers = None,
    null: options.Null = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Count the colours of images exactly, into a file that `igpt palette fit` takes, alone or with others.

    So machines can count parts of a large set, each for itself. Default: the embedded images, data/counts.npz.

    \b
    Examples:
      igpt palette count photos/ -o photos.counts.npz
      igpt palette count part-0.tar -o part-0.counts.npz --split all
    """

    voice = Voice(quiet)
    if out is None:
        out = Path("data/counts.npz")
        voice.default("out", out)
    check_output(out, force)
    how: dict[str, Any] = {"split": split, "limit": limit, "workers": workers, "strict": strict}
    counts, bad = counts_of(sources, null, column, (resolution, views, seed, exact_decode), how, voice)
    counts.save(out, force)
    distinct = len(counts.indices)
    voice.say(f"{counts.pixels:,} pixels of {counts.images:,} images, {distinct:,} distinct colours")
    say_left_out(voice, bad)
    voice.say(f"next: igpt palette fit {out}")
    document = {"path": str(out), "images": counts.images, "pixels": counts.pixels, "distinct_colours": distinct}
    present({**document, "sources": counts.sources, "bad": bad}, out, json)


@app.command("show")
def show(
    palette: P = None,
    out: Annotated[
        Path | None, Option("--out", "-o", metavar="PNG", help="Also draw the colours (.png or .svg).")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a palette: each colour with its share of the pixels, the error, and what is known of its making.

    \b
    Examples:
      igpt palette show
      igpt palette show palette.npz -o swatch.png
      igpt palette show builtin:igpt-tiny --json
    """
    from igpt_cli.images.pictures import PIXELS, save_picture
    from igpt_cli.palette.describe import describe, swatch

    voice = Voice(quiet)
    check_outputs({"--out": (out, PIXELS)}, force)
    colours = palette_or_default(palette, voice)
    document = describe(colours)
    if out is not None:
        save_picture(swatch(colours), out)
        voice.say(f"picture: {out}")
    if json:
        result_json({"path": palette or str(PALETTE), **document, "swatch": None if out is None else str(out)})
    else:
        print_colours(document)
        result("\n".join(f"{name:<20} {value}" for name, value in facts(document)))


@app.command("convert")
def convert(
    source: Annotated[str, Argument(metavar="IN", help="A palette in any form that `igpt palette show` takes.")],
    out: Annotated[
        Path, Argument(metavar="OUT", help="By its ending: .npz (igpt), .npy (OpenAI, -1..1), .json (Hugging Face).")
    ],
    scale: Annotated[
        str | None,
        Option(metavar="-1..1|0..1|0..255", help="Range of the colours in IN, if ambiguous.  [default: recognised]"),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert a palette between igpt, OpenAI and Hugging Face; the order of the colours is kept.

    \b
    Examples:
      igpt palette convert kmeans_centers.npy palette.npz
      igpt palette convert palette.npz preprocessor_config.json
      igpt palette convert centroids.npy palette.npz --scale 0..1
    """
    from igpt_cli.palette.formats import read_palette, write_palette

    voice = Voice(quiet)
    palette = read_palette(source, scale)
    write_palette(palette, out, force)
    voice.say(f"{palette.n_vocab:,} colours; palette {palette.sha256[:12]}; {origin(palette.meta)}")
    present({"path": str(out), "n_vocab": palette.n_vocab, "sha256": palette.sha256, "meta": palette.meta}, out, json)
