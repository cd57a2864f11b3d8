"""Options that mean the same for every command, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from igpt_cli.cli.candidates import runs, splits

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        autocompletion=runs,
        help="A run's folder or builtin:igpt-tiny. Default: runs/latest.",
        show_default=False,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        autocompletion=splits,
        help="Of which split. Default: test, else val.",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="PATH", help="Where to write the result.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda[:K]|mps", help="Where to compute; auto takes the best there is."),
]
TrainImages = Annotated[
    str | None,
    typer.Option(
        "--train-images",
        metavar="N|all",
        help="Training images used. Default: all; on a CPU 500.",
        show_default=False,
    ),
]
TestImages = Annotated[
    str | None,
    typer.Option(
        "--test-images", metavar="N|all", help="Test images used. Default: all; on a CPU 300.", show_default=False
    ),
]
Null = Annotated[
    bool, typer.Option("--null", "-0", help="With the source '-': paths on stdin end with NUL, not newline.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")]
StrictSource = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Stop at the first image that cannot be read, and before where images or their classes would be dropped "
        "or guessed.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        "--column",
        metavar="NAME",
        help="Where there are several: the Parquet column of the images, or their suffix in WebDataset samples, such "
        "as jpg.  [default: the likeliest]",
        show_default=False,
    ),
]
TestPart = Annotated[
    float | None,
    typer.Option(
        "--test-part",
        metavar="P",
        help="Of images without a split test: hold this part of each class out as test, such as 0.2, by --seed.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help="Processes to work in; default: one for each core.")
]
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE",
        help="Folders, image files, tar, zip or Parquet files, CIFAR or STL-10 folders, .npy arrays, "
        "'-' for paths on stdin, or 'embedded'. Default: the embedded images.",
        show_default=False,
    ),
]
Palette = Annotated[
    str | None,
    typer.Option(
        "--palette",
        "-p",
        metavar="P",
        help="A palette: .npz, OpenAI's .npy, preprocessor_config.json, token file or run. Default: data/palette.npz.",
        show_default=False,
    ),
]
