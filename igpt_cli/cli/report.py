"""igpt report"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from igpt_cli.cli.candidates import runs as run_names
from igpt_cli.cli.options import Device, Force, Json, Quiet, Seed, TestImages, TrainImages
from igpt_cli.cli.output import Voice, present
from igpt_cli.cli.probe_run import images_used
from igpt_cli.errors import InputError
from igpt_cli.files import PICTURES, check_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from igpt_cli.model_dir import ModelDir
    from igpt_cli.tokens.store import TokenFile


def report(
    runs: Annotated[
        list[str] | None,
        Argument(metavar="RUN", autocompletion=run_names, help="Runs or builtin:igpt-tiny. Default: runs/latest."),
    ] = None,
    out: Annotated[Path, Option("--out", "-o", metavar="HTML", help="The file to write.")] = Path("report.html"),
    figure: Annotated[
        Path | None, Option(metavar="PNG", help="Also draw the runs' loss curves (.png, .svg or .pdf).")
    ] = None,
    images: Annotated[
        str | None,
        Option(metavar="T", help="A token file or images to probe and complete. Default: what each was trained on."),
    ] = None,
    probes: Annotated[
        list[Path] | None,
        Option(
            "--probe",
            metavar="FILE",
            help="A result of igpt probe -o, in place of a probe of the same weights. May be repeated. Default: "
            "RUN/probe.json, if there is one.",
        ),
    ] = None,
    no_probe: Annotated[bool, Option("--no-probe", help="Probe nothing; show the results that are there.")] = False,
    no_samples: Annotated[bool, Option("--no-samples", help="Show no samples and completions.")] = False,
    n: Annotated[
        int | None, Option("-n", "--number", min=1, help="Samples drawn of each model. Default: 32; on a CPU 8.")
    ] = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Report runs on one HTML page: what was trained on what, loss, samples, what the layers know, how to repeat it.

    \b
    Examples:
      igpt report
      igpt report runs/igpt-s-1 runs/vit-ti-32-1 -o report.html
      igpt report runs/igpt-s-1 --probe layers.json --no-samples -o report.html
      igpt report runs/igpt-s-1 runs/igpt-s-2 --no-probe --no-samples --figure loss.png
      igpt report builtin:igpt-tiny --no-probe --no-samples -o tiny.html

    The page is one file that needs no network: charts with values on hovering, tables that sort, pictures, commands,
    versions and hashes. It can be read on a phone, on paper and by ear.

    Samples and completions in RUN/samples/ are shown if they are of the run's last step; else a few are drawn. A model
    without a probe is probed as igpt probe does it, with a confusion matrix. Notes say what is missing.
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_for_model, run_or_default, tokens_of
    from igpt_cli.cli.training import command_typed
    from igpt_cli.device import choose_device
    from igpt_cli.probing.images import balanced
    from igpt_cli.probing.probe import read_result
    from igpt_cli.report.losses import loss_curves
    from igpt_cli.report.page import page, write_page
    from igpt_cli.report.page_run import read_runs

    check_outputs({"--out": (out, (".html", ".htm")), "--figure": (figure, PICTURES)}, force)
    if images is not None and images != "embedded" and not Path(images).exists():
        raise InputError(f"{images} does not exist; a token file or images were expected there")
    named = runs or [run_or_default(None, voice)]
    found = {str(path): read_result(path) for path in probes or ()}
    limits: tuple[int | None, int | None] = (None, None)
    if not no_probe:
        limits = images_used(train_images, test_images, choose_device(device), voice)

    @contextmanager
    def open_images(model: ModelDir) -> Iterator[tuple[str, TokenFile]]:
        source = images or tokens_of(model, voice)
        with open_for_model(source, model, voice, balanced(*limits, seed)) as file:
            yield source, file

    how: dict[str, Any] = {"measure": not no_probe, "draw": not no_samples, "samples": n, "seed": seed}
    how |= {"train_images": limits[0], "test_images": limits[1], "device": device}
    accounts = read_runs(named, open_images, probes=found, **how, stage=voice.progress)
    for account in accounts:
        for note in account.notes:
            voice.say(f"note: {account.name}: {note}")
    write_page(page(accounts, command_typed()), out, force)
    if figure is not None:
        loss_curves(accounts, figure)
        voice.say(f"loss curves: {figure}")
    document = {"path": str(out), "bytes": out.stat().st_size, "runs": [account.summary() for account in accounts]}
    present(document, out, json)
