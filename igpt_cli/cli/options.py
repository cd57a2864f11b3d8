"""Arguments and options that several commands share, declared once; groups of commands."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from igpt_cli.cli.candidates import runs, splits


def group(about: str, *examples: str) -> typer.Typer:
    """Several commands under one name; the help shows what they are for, and examples."""
    text = about + ("\n\n\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples) if examples else "")
    return typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=text)


def only(ctx: typer.Context, allowed: Collection[str], why: str) -> None:
    """Refuse what does not go with what was requested.

    Args:
        allowed: the parameters that may be typed, named as in Python.

    Raises:
        BadParameter: `why`, and what else was typed.
    """
    sources = {p.name: ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
    typed = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    others = [p for p in ctx.command.params if p.name in typed - set(allowed)]
    if others:
        names = (p.metavar if not p.opts[0].startswith("-") else (p.opts + p.secondary_opts)[0] for p in others)
        raise typer.BadParameter(f"{why}: leave out {', '.join(map(str, names))}")


Run = Annotated[
    str | None,
    Argument(metavar="RUN", autocompletion=runs, help="A run's folder or builtin:igpt-tiny. Default: runs/latest."),
]
Images = Annotated[
    str | None, Argument(metavar="T", help="A token file, or images. Default: what the run was trained on.")
]
ManyImages = Annotated[
    list[str] | None,
    Argument(metavar="IMAGE...", help="Images, 'embedded', or a token file. Default: what the run was trained on."),
]
Out = Annotated[Path | None, Option("--out", "-o", metavar="PATH", help="Where to write the result.")]
Folder = Annotated[Path, Option("--out", "-o", metavar="DIR", help="The folder to write.")]
NewFile = Annotated[Path, Option("--out", "-o", metavar="PATH", help="The file to write.")]
Force = Annotated[bool, Option("--force", help="Overwrite an existing output.")]
#: Of every library; scikit-learn takes no larger one.
MAX_SEED = 2**32 - 1
Seed = Annotated[int, Option("--seed", min=0, max=MAX_SEED, help="Seed of every random choice.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
Device = Annotated[
    str, Option("--device", metavar="auto|cpu|cuda[:K]|mps", help="Where to compute; auto takes the best there is.")
]
Precision = Annotated[
    str,
    Option("--precision", metavar="float32|bfloat16|auto", help="Precision; bfloat16 is faster on GPUs and rounds."),
]
BatchSize = Annotated[
    int | None,
    Option("--batch-size", "-b", min=1, help="Images at a time.  [default: what suits the model and device]"),
]
Resolution = Annotated[int, Option("--resolution", "-r", min=1, help="Side of the images in pixels.")]
Split = Annotated[
    str | None,
    Option("--split", metavar="NAME", autocompletion=splits, help="Which split to use.  [default: test, else val]"),
]
Limit = Annotated[
    int | None, Option("--limit", min=1, metavar="N", help="At most N images of each split, evenly spaced.")
]
Layers = Annotated[
    str,
    Option("--layers", help="Layers: all, 20, 0,12,24 or 10-14; L: the final norm. In a block: 20.attention, all.mlp."),
]
ResumeWriting = Annotated[bool, Option("--resume", help="Continue an interrupted run, if there is one; else begin.")]
ExactDecode = Annotated[bool, Option("--exact-decode", help="Decode large JPEGs in full, not at a reduced scale.")]
TrainImages = Annotated[
    str | None, Option("--train-images", metavar="N|all", help="Training images used. Default: all; on a CPU 500.")
]
TestImages = Annotated[
    str | None, Option("--test-images", metavar="N|all", help="Test images used. Default: all; on a CPU 300.")
]
Null = Annotated[bool, Option("--null", "-0", help="With the source '-': paths on stdin end with NUL, not newline.")]
StrictSource = Annotated[
    bool,
    Option("--strict", help="Stop at the first unreadable image, or if images or classes would be dropped or guessed."),
]
Column = Annotated[
    str | None,
    Option("--column", metavar="NAME", help="Parquet column or WebDataset suffix of the images.  [default: likeliest]"),
]
TestPart = Annotated[
    float | None,
    Option("--test-part", metavar="P", help="No test split: hold out this part of each class, such as 0.2, by --seed."),
]
Workers = Annotated[
    int | None, Option("--workers", "-j", min=1, help="Processes to work in; default: one for each core.")
]
Sources = Annotated[
    list[str] | None,
    Argument(
        metavar="SOURCE",
        help="Folders, image files, tar, zip or Parquet files, CIFAR or STL-10 folders, .npy arrays, "
        "'-' for paths on stdin, or 'embedded'. Default: the embedded images.",
    ),
]
Palette = Annotated[
    str | None, Option("--palette", "-p", metavar="P", help="Palette, token file or run. Default: data/palette.npz.")
]
