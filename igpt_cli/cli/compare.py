"""igpt compare"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from igpt_cli.cli import options
from igpt_cli.cli.candidates import runs
from igpt_cli.cli.output import Voice, interval, present, table
from igpt_cli.cli.probe_run import images_used

if TYPE_CHECKING:
    from igpt_cli.report.compare import Comparison


def compare(
    out: options.Folder,
    sources: Annotated[
        list[str] | None,
        Argument(
            metavar="RUN",
            autocompletion=runs,
            help="Runs, and behind them T, a token file or images. Default: runs/latest, and what the first run was "
            "trained on.",
        ),
    ] = None,
    train_images: options.TrainImages = None,
    test_images: options.TestImages = None,
    test_part: options.TestPart = None,
    column: options.Column = None,
    reuse: Annotated[
        list[Path] | None,
        Option(metavar="PROBE", help="A result of igpt probe -o, used where it matches. May be repeated."),
    ] = None,
    mixed_budgets: Annotated[
        bool, Option("--mixed-budgets", help="Compare models that saw other numbers of images or other augmentation.")
    ] = False,
    precision: options.Precision = "float32",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Probe models by one protocol on the same images, with what each costs: one table, two pictures.

    \b
    Examples:
      igpt compare runs/vit-ti-32-1 runs/resnet-18-32-1 cifar.h5 -o compared
      igpt compare runs/igpt-s-1 runs/vit-ti-32-1 cifar.h5 -o compared --mixed-budgets
      igpt compare runs/vit-b16 runs/deit-b photos/ --test-part 0.2 -o compared --precision bfloat16
      igpt compare builtin:igpt-tiny embedded -o compared --json | jq '.models[].accuracy'
      igpt compare runs/a runs/b cifar.h5 --reuse a.json --reuse b.json -o compared

    Each model's layers are probed as igpt probe does it, its own class head classifies the same test images, and it is
    timed on this machine. DIR has compare.md, compare.json and the pictures: accuracy against FLOPs, and every layer on
    one axis of depth. Models that saw other numbers of images (and took other FLOPs) or other augmentation are refused
    without --mixed-budgets; notes say what else differs in training (recipe, teacher, image size).
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_for_model, run_or_default, selection, tokens_of, trained_on
    from igpt_cli.device import choose_device
    from igpt_cli.files import check_folder
    from igpt_cli.model_dir import load_model, read_config
    from igpt_cli.probing.images import balanced
    from igpt_cli.probing.probe import read_result
    from igpt_cli.report.compare import compare as run_comparison
    from igpt_cli.report.compare_page import DOCUMENT, write_comparison
    from igpt_cli.workspace import resolve_run

    runs, images = _runs_and_images(sources or [run_or_default(None, voice)])
    check_folder(out, DOCUMENT, force)
    stored = {str(path): read_result(path) for path in reuse or ()}
    n_train, n_test = images_used(train_images, test_images, choose_device(device), voice)
    source = images or tokens_of(load_model(runs[0]), voice)
    choose = balanced(n_train, n_test, seed)
    held: dict[str, Any] = {"test_part": test_part, "column": column, "seed": seed}
    for run in runs:
        held = selection(trained_on(read_config(resolve_run(run)), source), **held)
    how: dict[str, Any] = {"train_images": n_train, "test_images": n_test, "seed": seed, "precision": precision}
    how |= {"device": device, "reuse": stored, "mix": mixed_budgets, "stage": voice.progress}
    found = run_comparison(
        runs,
        lambda model: open_for_model(source, model, voice, choose, always=True, needs=("train", "test"), **held),
        **how,
    )
    found = replace(found, tokens=source)
    write_comparison(found, out, force)
    voice.say(f"written: {out}")
    for note in found.notes:
        voice.say(f"note: {note}")
    present(found.to_dict(), comparison_table(found), json)


def _runs_and_images(sources: list[str]) -> tuple[list[str], str | None]:
    """The runs, and the token file or images behind them, if the last is such."""
    from igpt_cli.errors import InputError
    from igpt_cli.workspace import BEST, BUILTIN, CHECKPOINTS

    def is_run(text: str) -> bool:
        path = Path(text)
        best = path.name == BEST and path.parent.name == CHECKPOINTS
        return text.startswith(BUILTIN) or text == "latest" or best or (path / "config.json").is_file()

    *first, last = sources
    if is_run(last) or (not first and not Path(last).exists()):
        return sources, None
    if not first:
        raise InputError(f"{last} is no run, and there is nothing to compare on it; name runs before it")
    return first, last


def comparison_table(found: Comparison) -> str:
    """One row a model, in 80 columns."""
    cells = [
        [
            row.name if len(row.name) <= 15 else f"{row.name[:7]}…{row.name[-7:]}",
            round(row.accuracy, 1),
            interval(row.interval),
            f"{row.layer}/{row.n_layers}",
            "" if row.head is None else f"{row.head['accuracy']:.1f}",
            round(row.parameters / 1e6, 1),
            round(row.flops_per_image / 1e9, 2),
            round(row.images_per_second) or row.images_per_second,
        ]
        for row in found.models
    ]
    return table(cells, ["run", "probe %", "95%", "layer", "head %", "params M", "GFLOPs", "images/s"])
