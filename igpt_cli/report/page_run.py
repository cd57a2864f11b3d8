"""What a report shows of a run, read from its folder or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from igpt_cli.device import choose_device
from igpt_cli.errors import IgptError, InputError
from igpt_cli.files import file_sha256
from igpt_cli.model_dir import METRICS, PALETTE, WEIGHTS, ModelDir, load_model, read_config, read_metrics
from igpt_cli.palette.palette import Palette
from igpt_cli.planning.cost import forward_flops, parameters
from igpt_cli.probing.features import Frozen
from igpt_cli.probing.heads import tested_heads
from igpt_cli.probing.probe import Stage, probe, read_result, silent
from igpt_cli.report.compare import distinct_runs, names_of, stage_of
from igpt_cli.report.losses import Recorded
from igpt_cli.report.page_pictures import Picture, complete_some, draw_some, saved_pictures
from igpt_cli.tokens.store import TokenFile
from igpt_cli.workspace import CHECKPOINTS, name_of_run

#: Gives the images for a model, as it wants them, and what names them.
OpenImages = Callable[[ModelDir], AbstractContextManager[tuple[str, TokenFile]]]
#: A result of `igpt probe -o` in a run's folder that is found without being named.
PROBE = "probe.json"


@dataclass(kw_only=True)
class Account(Recorded):
    """What a page shows of one run.

    Attributes:
        name, config, metrics: as of every `Recorded`; the name is also that of its rows.
        run: its path, or "builtin:<name>".
        palette: None for a model that has none.
        n_parameters, flops: of the model; of one image going forward.
        weights_sha256: of the file model.safetensors, None while there is none.
        checkpoint_sha256: of the weights, as in a probe result; None where the model was not read.
        probe: a result of `probing.probe.probe`, and whether it is of this page.
        pictures: samples and completions.
        notes: what is missing from the page, and why.
    """

    run: str
    palette: Palette | None
    n_parameters: int
    flops: int
    weights_sha256: str | None = None
    checkpoint_sha256: str | None = None
    probe: dict[str, Any] | None = None
    probed_here: bool = False
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What the page holds of the run, in short, as `igpt report --json` has it."""
        keys = ("protocol", "accuracy", "interval", "layer", "n_train", "n_test", "tokens")
        return {
            "name": self.name,
            "run": self.run,
            "model": self.config["model"].get("name"),
            "probe": {k: self.probe.get(k) for k in keys} if self.probe else None,
            "probed_here": self.probed_here,
            "pictures": [picture.caption for picture in self.pictures],
            "notes": self.notes,
        }


def read_runs(
    runs: Sequence[str | Path],
    open_images: OpenImages,
    *,
    probes: Mapping[str, dict[str, Any]] | None = None,
    measure: bool = True,
    draw: bool = True,
    samples: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
    device: str = "auto",
    stage: Stage = silent,
) -> list[Account]:
    """Read what runs have left, and add pictures and probes where these are missing.

    Pictures in the run's samples/ that were made with the weights of now are shown; else some are drawn. A probe is one
    of those given, or the run's own probe.json, if it is of these weights; else the model is probed. What cannot be
    done is noted. Nothing is written.

    Args:
        runs: model directories, in the order of the page.
        open_images: gives the token file, or the images, that a model is probed on and completes; it may raise an
            IgptError, and is called only where images are needed.
        probes: {name: probe result}.
        measure: probe models of which there is no result.
        draw: show samples and completions.
        samples: images drawn of each model; None for `page_pictures.CPU_SAMPLES` on a CPU and more on a GPU.
        train_images, test_images, seed: as for `probing.probe.probe`; the seed is also that of the samples.
        stage: opens a bar for each part of the work.

    Raises:
        InputError: no runs, one named twice, or a probe that is of none of them.
        FormatError: a run's files are damaged.
    """
    paths = distinct_runs(runs, "report on")
    accounts = [_read(path, name) for path, name in zip(paths, names_of(paths))]
    chosen, left = choose_device(device), dict(probes or {})
    for path, account in zip(paths, accounts):
        named = stage_of(account.name, stage)
        nearby = _own_probe(path, account)
        if draw:
            account.pictures += saved_pictures(_home(path), account.config)
        if not (path / WEIGHTS).exists():
            status = (account.config.get("result") or {}).get("status", "not known")
            account.notes.append(f"it has no {WEIGHTS} yet (status: {status}), so it draws nothing and is not probed")
            continue
        account.weights_sha256 = file_sha256(path / WEIGHTS)
        if not (draw or measure or left or nearby):
            continue
        run = load_model(path, chosen)
        account.checkpoint_sha256 = Frozen(run.model).sha256
        _take_probe(account, left, nearby)
        with ExitStack() as stack:
            images = cache(lambda run=run, stack=stack: stack.enter_context(open_images(run)))
            if draw and account.config["model"].get("backend") == "igpt":
                _draw(account, run, images, samples, seed, named)
            if measure and account.probe is None:
                limits: dict[str, Any] = {"train_images": train_images, "test_images": test_images, "seed": seed}
                try:
                    source, file = images()
                    account.probe = probe(run, file, details=True, stage=named, **limits)
                    account.probe |= {"tokens": source, "heads": tested_heads(path, [], file)}
                    account.probed_here = True
                except IgptError as e:
                    account.notes.append(f"it was not probed: {e}")
    if left:
        raise InputError(
            f"{', '.join(left)}: probes of other weights than those of these runs; probe them anew, or leave them out"
        )
    return accounts


def _read(path: Path, name: str) -> Account:
    """What lies in the folder of a run, and costs no time."""
    config = read_config(path)
    metrics: list[dict[str, Any]] = []
    with suppress(InputError):
        metrics = [record for record in read_metrics(_home(path)) if isinstance(record, dict)]
    model, notes = config["model"], [] if metrics else [f"it has no {METRICS}, so there is no loss curve of it"]
    palette = Palette.load(path / PALETTE) if (path / PALETTE).exists() else None
    run = name_of_run(path)
    return Account(
        name=name,
        config=config,
        metrics=metrics,
        run=run,
        palette=palette,
        n_parameters=parameters(model),
        flops=forward_flops(model),
        notes=notes,
    )


def _home(path: Path) -> Path:
    """The run's own folder, also of one of its checkpoints."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def _own_probe(path: Path, account: Account) -> dict[str, Any] | None:
    """The run's probe.json; one that is something else is noted."""
    if not (path / PROBE).is_file():
        return None
    try:
        return read_result(path / PROBE)
    except IgptError as e:
        account.notes.append(str(e))
        return None


def _take_probe(account: Account, left: dict[str, dict[str, Any]], nearby: dict[str, Any] | None) -> None:
    """Give the account the probe of its weights, out of those named or its own; the last named counts."""
    for name, found in list(left.items()):
        if found["checkpoint_sha256"] == account.checkpoint_sha256:
            account.probe = left.pop(name)
    if nearby is None or account.probe is not None:
        return
    if nearby["checkpoint_sha256"] == account.checkpoint_sha256:
        account.probe = nearby
    else:
        account.notes.append(f"its {PROBE} is of other weights and is not used")


def _draw(
    account: Account,
    run: ModelDir,
    images: Callable[[], tuple[str, TokenFile]],
    samples: int | None,
    seed: int,
    stage: Stage,
) -> None:
    """Samples and completions, each where there are none yet."""
    have = {picture.kind for picture in account.pictures}
    try:
        if "sample" not in have:
            with stage("samples") as progress:
                account.pictures.append(draw_some(run, samples, seed, progress))
        if "complete" not in have:
            source, file = images()
            with stage("completions") as progress:
                account.pictures.append(complete_some(run, source, file, seed, progress))
    except IgptError as e:
        account.notes.append(f"it draws nothing more: {e}")
    account.pictures.sort(key=lambda picture: picture.kind, reverse=True)
