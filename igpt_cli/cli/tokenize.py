"""igpt tokenize: images and a palette become a token file."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from igpt_cli.cli import options
from igpt_cli.cli.candidates import splits
from igpt_cli.cli.output import BadImages, Voice, present
from igpt_cli.cli.resolve import images_or_default, palette_or_default
from igpt_cli.errors import InputError

SIZES = (32, 48, 64)


def tokenize(
    sources: options.Sources = None,
    palette: options.Palette = None,
    resolution: Annotated[
        int, Option("--resolution", "-r", metavar="32|48|64", help="Side R of the images in pixels.")
    ] = 32,
    out: options.Out = None,
    split: Annotated[
        str | None,
        Option(
            metavar="NAME",
            autocompletion=splits,
            help="Only this split; for images without splits, the split to write them as.  [default: all; train]",
        ),
    ] = None,
    views: Annotated[
        int, Option(min=0, metavar="K", help="Random views of each training image, a row each; 0: the centre crop.")
    ] = 0,
    seed: options.Seed = 0,
    exact_decode: options.ExactDecode = False,
    keep_rgb: Annotated[bool, Option("--keep-rgb", help="Store the prepared images with their tokens.")] = False,
    limit: Annotated[
        int | None, Option(min=1, metavar="N", help="At most N images of each split.  [default: all]")
    ] = None,
    shard: Annotated[
        str | None,
        Option(
            metavar="i/n|auto",
            help="Every n-th image from the i-th on, i in 0..n-1, for `igpt tokens merge`; auto takes i and n from "
            "torchrun or a Slurm array job.  [default: all]",
        ),
    ] = None,
    resume: options.ResumeWriting = False,
    strict: options.StrictSource = False,
    column: options.Column = None,
    test_part: options.TestPart = None,
    workers: options.Workers = None,
    allow_size: Annotated[
        bool, Option("--allow-size", help="Allow other resolutions; a sequence has R * R tokens.")
    ] = False,
    null: options.Null = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn images into a token file: resize and crop as the iGPT paper does, then the nearest palette colour.

    A source with train/, val/ and test/ becomes a file with these splits. Images that cannot be read are excluded,
    named and counted. Default: the embedded images, data/palette.npz, data/tokens-<R>.h5.

    \b
    Examples:
      igpt tokenize
      igpt tokenize photos/ -p palette.npz -r 48 -o photos-48.h5
      igpt tokenize photos/ -p palette.npz --test-part 0.2 -o photos.h5
      igpt tokenize photos.tar -p palette.npz --views 4 -o photos.h5 --resume
      find . -name '*.jpg' | igpt tokenize - -p palette.npz --split test -o t.h5
    """
    from igpt_cli.images.held_out import HeldOutSource
    from igpt_cli.images.transforms import Preprocess
    from igpt_cli.tokens import tokenize as library
    from igpt_cli.tokens.shards import Shard

    voice = Voice(quiet)
    if resolution not in SIZES and not allow_size:
        raise InputError(
            f"resolution {resolution} would make sequences of {resolution**2:,} tokens; iGPT uses 32, 48 or 64, and "
            f"--allow-size allows others"
        )
    preprocess = Preprocess(resolution, views, seed, exact_decode)
    part = Shard.parse(shard) if shard else Shard(0, 1)
    colours = palette_or_default(palette, voice)
    source = images_or_default(sources, null, voice, column, strict)
    if test_part is not None:
        source = HeldOutSource(source, test_part, seed)
    for note in source.notes:
        voice.say(note)
    if out is None:
        out = part.path(resolution)
        voice.default("out", out)
    how: dict[str, Any] = {"workers": workers, "split": split, "shard": part, "limit": limit, "keep_rgb": keep_rgb}
    how |= {"strict": strict, "resume": resume, "force": force, "on_bad": BadImages(voice)}
    try:
        with voice.progress("tokenizing") as progress:
            report = library.tokenize(source, colours, out, preprocess, **how, progress=progress)
    except KeyboardInterrupt:
        if done := library.unfinished(out):
            voice.say(f"{done:,} images are stored in {out}.part; the same command with --resume continues")
        raise
    _say(voice, report, resolution, source)
    present(report.to_dict(), report.path, json)


def _say(voice: Voice, report, resolution: int, source) -> None:
    rows = ", ".join(f"{name} {n:,}" for name, n in report.rows.items())
    new = report.images + report.n_bad - report.resumed
    voice.say(
        f"{report.images:,} images ({rows} rows of {resolution**2:,} tokens, {len(source.classes)} classes) in "
        f"{report.seconds:.1f} s, {new / max(report.seconds, 1e-9):,.0f} images/s"
    )
    if report.alike:
        voice.say(
            f"all views of {report.alike:,} images are the same: an image that is {resolution} x {resolution} already "
            f"is used as it is; --views 0 writes one row of each"
        )
    if report.n_bad:
        voice.say(
            f"{report.n_bad:,} images could not be read and were excluded; --json names them, --strict stops at one"
        )
