"""igpt features"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from igpt_cli.cli import options
from igpt_cli.cli.candidates import runs, splits
from igpt_cli.cli.output import Voice, present, table
from igpt_cli.files import check_output
from igpt_cli.workspace import features_path

if TYPE_CHECKING:
    from igpt_cli.probing.store import Features


def features(
    run: Annotated[
        str | None,
        Argument(metavar="RUN", autocompletion=runs, help="A run, or a features file to show. Default: runs/latest."),
    ] = None,
    tokens: options.Images = None,
    layers: options.Layers = "all",
    split: Annotated[
        list[str] | None,
        Option(metavar="NAME", autocompletion=splits, help="Only this split; repeatable.  [default: all with labels]"),
    ] = None,
    test_part: options.TestPart = None,
    column: options.Column = None,
    pool: Annotated[
        str,
        Option(
            metavar="mean|quadrants|max|last|none", help="Pooling over positions (quadrants: four); none keeps all."
        ),
    ] = "mean",
    bert_masks: Annotated[
        int | None,
        Option(min=0, metavar="M", help="BERT: masks of each image (train: one); 0: whole images.  [default: 5]"),
    ] = None,
    limit: options.Limit = None,
    precision: options.Precision = "float32",
    batch_size: options.BatchSize = None,
    resume: options.ResumeWriting = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the features of any set of layers to a file, from one pass over the images, for any number of probes.

    \b
    Examples:
      igpt features
      igpt features runs/igpt-s-1 data/tokens-32.h5 --layers 10-30 -o features.h5 --resume
      igpt features builtin:igpt-tiny embedded --split test --limit 100 --json
      igpt features runs/igpt-s-1 photos/ --test-part 0.2 -o features.h5
      igpt features features.h5

    A file that holds these features already is left as it is. Default of -o: data/features-<RUN>.h5.
    """
    voice = Voice(quiet)
    from igpt_cli.tokens.open_or_tokenize import is_token_file

    if run is not None and tokens is None and is_token_file(run):
        _show(run, json)
        return
    from igpt_cli.cli.resolve import open_for_model, run_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.images.subset import evenly
    from igpt_cli.model_dir import load_model
    from igpt_cli.probing.layers import check_layers, parse_places
    from igpt_cli.probing.store import extract_features, unfinished

    model = load_model(run_or_default(run, voice), choose_device(device))
    places = check_layers(model, parse_places(layers, int(model.model.n_layers)))  # type: ignore[arg-type]
    if out is None:
        out = features_path(model.path)
        voice.default("out", out)
    if force or not out.is_file():  # a file that is there may hold these features
        check_output(out, force)
    source, started, passes = tokens or tokens_of(model, voice), time.monotonic(), 0
    how: dict[str, Any] = {"pool": pool, "limit": limit, "bert_masks": bert_masks, "precision": precision}
    how |= {"batch_size": batch_size, "seed": seed, "resume": resume, "force": force, "source": source}
    with open_for_model(source, model, voice, evenly(split, limit), False, test_part, column, seed) as file:
        try:
            with voice.progress("features") as progress:

                def counted(done: int, total: int) -> None:
                    nonlocal passes
                    passes = done
                    progress(done, total)

                found = extract_features(model, file, out, places, split, **how, progress=counted)
        except KeyboardInterrupt:
            if done := unfinished(out):
                voice.say(f"{done:,} images are stored in {out}.part; the same command with --resume continues")
            raise
    seconds = time.monotonic() - started
    _say(found, passes, seconds, voice)
    present({**found.describe(), "reused": found.reused, "seconds": round(seconds, 2)}, found.path, json)


def _say(found: Features, passes: int, seconds: float, voice: Voice) -> None:
    if found.reused:
        voice.say(f"{found.path} holds these features already, since {found.attrs['created']}; --force makes them anew")
        return
    splits = ", ".join(f"{name} {len(s):,}" + _masks(s.n_masks) for name, s in found.splits.items())
    voice.say(
        f"{len(found.layers)} layers of {found.attrs['model_name']}, {splits} images, pool {found.attrs['pool']}, "
        f"{found.attrs['precision']}: {found.path.stat().st_size / 1e6:,.1f} MB in {seconds:.1f} s, "
        f"{passes / max(seconds, 1e-9):,.1f} images/s"
    )


def _masks(n: int) -> str:
    return f" under {n} mask{'s' if n > 1 else ''}" if n else ""


def _show(path: str | Path, json: bool) -> None:
    """What a features file holds."""
    from igpt_cli.probing.feature_file import format_layers, open_features

    found = open_features(path)
    attrs, about = found.attrs, found.describe()
    widths = sorted(set(about["widths"]))
    rows: list[tuple[str, Any]] = [
        ("model", f"{attrs['model_name']}, {attrs['run']}"),
        ("checkpoint", f"{attrs['checkpoint_sha256'][:12]}"),
        ("tokens", attrs["tokens"]),
        ("layers", f"{format_layers(found.layers)} of 0-{found.n_layers}, width {', '.join(map(str, widths))}"),
        ("pool", attrs["pool"]),
        ("precision", attrs["precision"]),
        ("made", f"{attrs['created']}, {attrs['tool_version']}"),
    ]
    for name, split in about["splits"].items():
        rows.append((name, f"{split['images']:,} images, {split['labelled']:,} labelled{_masks(split['masks'])}"))
    present(about, table(rows, ["", str(path)]), json)
