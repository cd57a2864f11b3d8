"""Train the runs of an ablation in order, or resume them.

The folder of an ablation has `ablation.json` from the start, with the settings; `<run>/`, a model directory for each
run, in those that are probed with `probe.json`; at the end `table.md` and `picture.png`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.ablations.catalogue import LAYER, PRETRAIN, SIZES, Ablation, find_ablation
from igpt_cli.ablations.findings import differences, findings
from igpt_cli.ablations.page import write_page
from igpt_cli.ablations.runs import layer_rows, probed, row_of, shown, train_run
from igpt_cli.ablations.settings import DOCUMENT, Settings, checked, read_ablation, write_ablation
from igpt_cli.ablations.window_cost import SIDES, measure
from igpt_cli.bench.machine import machine
from igpt_cli.device import choose_device, choose_precision
from igpt_cli.errors import Interrupted, OutputError
from igpt_cli.files import check_folder, reason
from igpt_cli.model_dir import load_model
from igpt_cli.probing.images import choose_images
from igpt_cli.probing.probe import Stage, silent
from igpt_cli.tokens.store import TokenFile

#: The stage of "window-cost".
TIMING = "attention"

#: Gives the callbacks of a training run (on_start, on_record, on_event); called with the run's label.
Callbacks = Callable[[str], AbstractContextManager[dict[str, Any]]]


def no_callbacks(label: str) -> AbstractContextManager[dict[str, Any]]:
    """The `Callbacks` of a run that reports nothing."""
    return nullcontext({})


def ablate(
    name: str,
    tokens: TokenFile | None,
    out: Path | str,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    command: str | None = None,
    callbacks: Callbacks = no_callbacks,
    stage: Stage = silent,
) -> dict[str, Any]:
    """Run an ablation and write the folder `out`; return what `ablation.json` holds (see docs/formats.md).

    Args:
        name: one of `catalogue.ABLATIONS`.
        tokens: labelled images, with splits "train" and "test"; None for "window-cost", which needs none.
        force: replace an ablation that is there.
        command: what to record as the command that made it.
        callbacks, stage: called during training, and during other work.

    Raises:
        InputError, MismatchError, OutputError: before any training.
        Interrupted: complete runs are kept for `resume`.
    """
    ablation, settings, out = find_ablation(name), settings or Settings(), Path(out)
    settings = checked(ablation, settings, tokens is not None, device)
    if tokens is not None:
        choose_images(tokens, None, None, settings.seed)  # both splits with labels, before hours of training
    check_folder(out, DOCUMENT, force)
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
    except OSError as e:
        raise OutputError(f"cannot make the folder {out}: {reason(e)}") from e
    started = {"name": name, "status": "running", "settings": asdict(settings)}
    write_ablation(out, started | ({"command": command} if command else {}))
    return _run(ablation, tokens, out, settings, device, callbacks, stage)


def resume(
    tokens: TokenFile | None,
    out: Path | str,
    *,
    device: str = "auto",
    callbacks: Callbacks = no_callbacks,
    stage: Stage = silent,
) -> dict[str, Any]:
    """Resume an ablation: complete runs stay, an incomplete one continues from its last checkpoint.

    Arguments, result and errors are those of `ablate`. Raises MismatchError if the images are others now.
    """
    out = Path(out)
    document = read_ablation(out)
    ablation, settings = find_ablation(document["name"]), Settings(**document["settings"])
    return _run(ablation, tokens, out, settings, device, callbacks, stage)


def _run(
    ablation: Ablation,
    tokens: TokenFile | None,
    out: Path,
    settings: Settings,
    device: str,
    callbacks: Callbacks,
    stage: Stage,
) -> dict[str, Any]:
    began = time.monotonic()
    try:
        if tokens is None or not ablation.runs:
            found = _timed(ablation, settings, device, stage)
        else:
            found = _trained(ablation, tokens, out, settings, device, callbacks, stage)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is complete is kept; resume with: igpt ablate --resume {out}") from None
    document = {
        **read_ablation(out),
        **{k: getattr(ablation, k) for k in ("question", "paper", "table", "published")},
        **found,
        "machine": machine(device),
        "seconds": round(time.monotonic() - began, 1),
        "status": "done",
    }
    document["differs"] = differences(ablation, document)
    document["findings"] = findings(document)
    write_page(document, out)
    write_ablation(out, document)
    return document


def _timed(ablation: Ablation, settings: Settings, device: str, stage: Stage) -> dict[str, Any]:
    """What "window-cost" measures."""
    passes = settings.steps or int(settings.size_of(ablation).amount["steps"])
    precision = choose_precision("auto", choose_device(device))
    with stage(TIMING) as step:
        how: dict[str, Any] = {"device": device, "precision": precision, "seed": settings.seed, "progress": step}
        cost = measure(SIDES[settings.size or SIZES[0]], passes, **how)
    return {"passes": passes, "precision": precision, "cost": cost}


def _trained(
    ablation: Ablation,
    tokens: TokenFile,
    out: Path,
    settings: Settings,
    device: str,
    callbacks: Callbacks,
    stage: Stage,
) -> dict[str, Any]:
    """The results of every run, trained in turn."""
    rows: list[dict[str, Any]] = []
    if settings.run:
        found = probed(load_model(settings.run, choose_device(device)), out, tokens, ablation, settings, stage)
        return {"chance": found["chance"], "arms": [], "rows": layer_rows(found), "layers": found["layers"]}
    for run in ablation.runs:
        with callbacks(run.label) as called:
            train_run(run, ablation, tokens, out, settings, {"device": device, **called})
        row = row_of(run, out / run.name)
        if run.how == PRETRAIN:
            model = load_model(out / run.name, choose_device(device))
            found = probed(model, out / run.name, tokens, ablation, settings, stage)
            row |= {k: found[k] for k in ("accuracy", "interval", "layer", "n_layers", "n_test", "layers", "chance")}
        rows.append(row)
    if ablation is LAYER:
        (row,) = rows
        more = {"chance": row.pop("chance"), "rows": layer_rows(row), "layers": row.pop("layers")}
        return {"arms": [row], **more}
    chance = max([row.pop("chance") for row in rows if "chance" in row], default=None) or commonest(tokens)
    return {"chance": chance, "arms": rows, "rows": [shown(row) for row in rows]}


def commonest(tokens: TokenFile) -> float:
    """How many of the labelled test images are of the commonest class, in percent."""
    labels = np.asarray(tokens.split("test").labels)
    counts = np.bincount(labels[labels >= 0])
    return 100 * float(counts.max() / counts.sum())
