"""An ablation from its first arm to its last: every arm is an ordinary run, so that what was interrupted goes on.

The folder of an ablation has `ablation.json` from the start, with the settings; `<arm>/`, the runs, and in those that
are probed `probe.json`; at the end `table.md` and `picture.png`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from igpt_cli.ablations.catalogue import (
    FINETUNE,
    LAYER,
    LAYER_ROWS,
    PRETRAIN,
    SIZES,
    TRAIN,
    Ablation,
    Arm,
    find_ablation,
)
from igpt_cli.ablations.findings import differences, findings
from igpt_cli.ablations.page import write_page
from igpt_cli.ablations.window_cost import SIDES, measure
from igpt_cli.bench.machine import machine
from igpt_cli.device import choose_device
from igpt_cli.errors import FormatError, InputError, Interrupted, MismatchError, OutputError
from igpt_cli.files import check_folder, reason, replacing, require_file
from igpt_cli.model_dir import CONFIG, ModelDir, load_model, read_config
from igpt_cli.models.cost import forward_flops
from igpt_cli.probing.probe import Stage, probe, silent, write_result
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training import finetune, pretrain, supervised
from igpt_cli.training.checkpoint import checkpoints
from igpt_cli.training.recipe import Recipe
from igpt_cli.training.run import differing_data
from igpt_cli.training.supervision import Supervision
from igpt_cli.training.tuning import Tuning

DOCUMENT, PROBE = "ablation.json", "probe.json"
#: The stage of "window-cost".
TIMING = "attention"
#: What the result of a run that is complete says.
COMPLETE = ("done", "early stop")

#: Gives what a run is to call (on_start, on_record, on_event) while an arm goes on; called with its name.
Told = Callable[[str], AbstractContextManager[dict[str, Any]]]


def untold(label: str) -> AbstractContextManager[dict[str, Any]]:
    """A `Told` that tells nobody."""
    return nullcontext({})


@dataclass(frozen=True)
class Settings:
    """What an ablation is run with, as `ablation.json` has it.

    size: "small" or "full"; None: by the device. steps, epochs, budget (seconds): of each arm; else those of the size.
    recipe, augment: of arms with labels; None: plain, none. run: a pretrained run for "layer". images, palette,
    resolution: from where the images came, for whoever opens them again.
    """

    size: str | None = None
    steps: int | None = None
    epochs: float | None = None
    budget: float | None = None
    recipe: str | None = None
    augment: str | None = None
    run: str | None = None
    seed: int = 0
    images: str | None = None
    palette: str | None = None
    resolution: int = 32

    @property
    def amount(self) -> dict[str, Any]:
        """What was said of how long each arm goes on."""
        return {k: v for k in ("steps", "epochs", "budget") if (v := getattr(self, k)) is not None}


def ablate(
    name: str,
    tokens: TokenFile | None,
    out: Path | str,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    command: str | None = None,
    told: Told = untold,
    stage: Stage = silent,
) -> dict[str, Any]:
    """Run an ablation and write the folder `out`.

    Args:
        name: one of `catalogue.ABLATIONS`.
        tokens: labelled images, with splits "train" and "test"; None for "window-cost", which needs none.
        force: replace an ablation that is there.
        command: what to record as the command that made it.
        told, stage: who is told of arms in training, and of other work.

    Returns:
        What `ablation.json` holds (see docs/formats.md).

    Raises:
        InputError, MismatchError, OutputError: before any training.
        Interrupted: what was done is kept; `resume` goes on.
    """
    ablation, settings, out = find_ablation(name), settings or Settings(), Path(out)
    settings = _checked(ablation, settings, tokens, device)
    check_folder(out, DOCUMENT, force)
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
    except OSError as e:
        raise OutputError(f"cannot make the folder {out}: {reason(e)}") from e
    started = {"name": name, "status": "running", "settings": asdict(settings)}
    _write(out, started | ({"command": command} if command else {}))
    return _carry_out(ablation, tokens, out, settings, device, told, stage)


def resume(
    tokens: TokenFile | None,
    out: Path | str,
    *,
    device: str = "auto",
    told: Told = untold,
    stage: Stage = silent,
) -> dict[str, Any]:
    """Go on with an ablation: arms that are complete stay, one that is not goes on from its last checkpoint.

    Args:
        tokens: those that it was begun with.

    The other arguments, what is returned and raised, as for `ablate`.

    Raises:
        MismatchError: the images are others now.
    """
    out = Path(out)
    document = read_ablation(out)
    ablation, settings = find_ablation(document["name"]), Settings(**document["settings"])
    return _carry_out(ablation, tokens, out, settings, device, told, stage)


def read_ablation(out: Path | str) -> dict[str, Any]:
    """The `ablation.json` of a folder.

    Raises:
        InputError, FormatError: it is not there, or is something else.
    """
    path = require_file(Path(out) / DOCUMENT, "what igpt ablate writes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        Settings(**found["settings"])
        find_ablation(found["name"])
    except (ValueError, TypeError, KeyError) as e:
        raise FormatError(f"{path} is no ablation of this version of igpt: {e}") from e
    return found


def _checked(ablation: Ablation, settings: Settings, tokens: TokenFile | None, device: str) -> Settings:
    """The settings, the size decided.

    Raises:
        InputError: what does not go together.
    """
    if settings.size is None:
        settings = replace(settings, size="small" if choose_device(device).type == "cpu" else "full")
    if settings.size not in SIZES:
        raise InputError(f"size is {settings.size!r}, expected one of {', '.join(SIZES)}")
    if len(settings.amount) > 1:
        raise InputError(f"{' and '.join(settings.amount)} are given; each arm ends by one of them")
    if settings.run and ablation is not LAYER:
        raise InputError(f"the ablation {ablation.name} trains its models itself; a run is for {LAYER.name}")
    for key in ("recipe", "augment"):
        if getattr(settings, key) and TRAIN not in ablation.hows:
            raise InputError(
                f"the ablation {ablation.name} has no arm that is trained with labels alone; leave out {key}"
            )
    if not ablation.arms:
        if tokens is not None:
            raise InputError(f"the ablation {ablation.name} trains nothing and takes no images")
        if "epochs" in settings.amount or "budget" in settings.amount:
            raise InputError(f"the ablation {ablation.name} trains nothing; steps are how often each layer is timed")
    elif tokens is None:
        raise InputError(f"the ablation {ablation.name} needs labelled images")
    return settings


def _carry_out(
    ablation: Ablation,
    tokens: TokenFile | None,
    out: Path,
    settings: Settings,
    device: str,
    told: Told,
    stage: Stage,
) -> dict[str, Any]:
    began = time.monotonic()
    try:
        if tokens is None or not ablation.arms:
            found = _timed(ablation, settings, device, stage)
        else:
            found = _trained(ablation, tokens, out, settings, device, told, stage)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is complete is kept; go on with: igpt ablate --resume {out}") from None
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
    _write(out, document)
    return document


def _timed(ablation: Ablation, settings: Settings, device: str, stage: Stage) -> dict[str, Any]:
    """What "window-cost" measures."""
    size = settings.size or SIZES[0]
    passes = settings.steps or int(ablation.size(size).amount["steps"])
    with stage(TIMING) as step:
        return {
            "passes": passes,
            "cost": measure(SIDES[size], passes, device=device, seed=settings.seed, progress=step),
        }


def _trained(
    ablation: Ablation, tokens: TokenFile, out: Path, settings: Settings, device: str, told: Told, stage: Stage
) -> dict[str, Any]:
    """Every arm, in turn; then what each gave."""
    rows: list[dict[str, Any]] = []
    if settings.run:
        found = _probed(load_model(settings.run, choose_device(device)), out, tokens, ablation, settings, stage)
        return {"chance": found["chance"], "arms": [], "rows": layer_rows(found), "layers": found["layers"]}
    for arm in ablation.arms:
        with told(arm.label) as listeners:
            _train(arm, ablation, tokens, out, settings, {"device": device, **listeners})
        row = _row(arm, out / arm.name)
        if arm.how == PRETRAIN:
            run = load_model(out / arm.name, choose_device(device))
            found = _probed(run, out / arm.name, tokens, ablation, settings, stage)
            row |= {k: found[k] for k in ("accuracy", "interval", "layer", "n_layers", "n_test", "layers", "chance")}
        rows.append(row)
    if ablation is LAYER:
        (row,) = rows
        more = {"chance": row.pop("chance"), "rows": layer_rows(row), "layers": row.pop("layers")}
        return {"arms": [row], **more}
    chance = next((row.pop("chance") for row in rows if "chance" in row), None)
    for row in rows:
        row.pop("chance", None)
    return {"chance": chance, "arms": rows, "rows": [_shown(row) for row in rows]}


def _train(
    arm: Arm, ablation: Ablation, tokens: TokenFile, out: Path, settings: Settings, how: Mapping[str, Any]
) -> None:
    """The run of an arm, complete at the end: begun, gone on with, or there already.

    Raises:
        MismatchError: it is there already, of other images.
    """
    folder = out / arm.name
    config = read_config(folder) if (folder / CONFIG).is_file() else None
    if config and config["result"].get("status") in COMPLETE:
        if differ := differing_data(config, tokens):
            raise MismatchError(f"{out} goes on with the images that it was begun with, but {'; '.join(differ)}")
        return
    (folder / PROBE).unlink(missing_ok=True)
    before = load_model(out / arm.after) if arm.after else None
    if config and checkpoints(folder):
        if arm.how == TRAIN:
            supervised.resume(tokens, folder, teacher=before, **how)
        else:
            {PRETRAIN: pretrain.resume, FINETUNE: finetune.resume}[arm.how](tokens, folder, **how)
        return
    size = ablation.size(settings.size or SIZES[0])
    preset, sizes = size.models.get(arm.model, ("", {}))
    learnt: dict[str, Any] = {"seed": settings.seed + arm.seed, **(settings.amount or size.amount)}
    learnt |= {**size.settings.get(arm.how, {}), **arm.settings}
    begun: dict[str, Any] = {"force": folder.exists(), "data_path": settings.images, **how}
    if arm.how == TRAIN:
        learnt |= {k: v for k in ("recipe", "augment") if (v := getattr(settings, k)) is not None}
        given = {**sizes, **arm.sizes}
        supervised.train(preset, tokens, folder, Supervision(**learnt), sizes=given, teacher=before, **begun)
    elif arm.how == PRETRAIN:
        pretrain.pretrain(tokens, folder, Recipe(model=preset, **sizes, **learnt), **begun)
    else:
        assert before is not None
        finetune.finetune(before, tokens, folder, Tuning(patience=0, **learnt), **begun)


def _probed(
    run: ModelDir, folder: Path, tokens: TokenFile, ablation: Ablation, settings: Settings, stage: Stage
) -> dict[str, Any]:
    """The probe of every layer, or that which was written already."""
    path = folder / PROBE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    train_images, test_images = ablation.size(settings.size or SIZES[0]).probe
    found = probe(
        run,
        tokens,
        train_images=train_images,
        test_images=test_images,
        seed=settings.seed,
        floors=False,
        stage=stage,
    )
    write_result(found, path)
    return found


def _row(arm: Arm, folder: Path) -> dict[str, Any]:
    """What the run of an arm says of itself."""
    config = read_config(folder)
    training, result, data = config["training"], config["result"], config["data"]
    seen = result.get("images_seen") or result["tokens_seen"] // config["model"]["resolution"] ** 2
    return {
        "arm": arm.name,
        "label": arm.label,
        "against": arm.against,
        "paper": dict(arm.paper),
        "how": arm.how,
        "model": config["model"]["name"],
        "resolution": config["model"]["resolution"],
        "parameters": training["n_parameters"],
        "flops_per_image": forward_flops(config["model"]),
        "accuracy": result.get("accuracy"),
        "interval": result.get("interval"),
        "accuracy_class": result.get("accuracy_class"),
        "accuracy_distillation": result.get("accuracy_distillation"),
        "n_test": result.get("n_test"),
        "val_loss": result["val_loss"],
        "steps": result["steps"],
        "images_seen": seen,
        "n_train": data["n_train"],
        "source": data["source"],
        "recipe": training.get("recipe"),
        "augment": training.get("augment"),
        "seconds": result["seconds"],
        "device": config["machine"]["device_name"] or config["machine"]["device"],
    }


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an arm that stands in the table and the picture."""
    keys = ("arm", "label", "against", "accuracy", "interval", "n_test", "layer", "n_layers", "paper")
    return {k: row[k] for k in keys if k in row}


def layer_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of "layer": the layer that held-out images chose, the first, the middle and the last.

    Args:
        found: `layer`, `n_layers`, `layers` and `n_test` of a probe result.
    """
    L, layers = found["n_layers"], {row["layer"]: row for row in found["layers"]}
    places = {"best": found["layer"], "first": 0, "middle": L // 2, "last": L}
    return [
        {
            "arm": None,
            "label": f"{name} layer",
            "against": None if name == "best" else "best layer",
            **{k: layers[layer][k] for k in ("accuracy", "interval")},
            "n_test": found["n_test"],
            "layer": layer,
            "n_layers": L,
            "paper": {"iGPT-L, CIFAR-10": LAYER_ROWS[name]},
        }
        for name, layer in places.items()
    ]


def _write(out: Path, document: Mapping[str, Any]) -> None:
    with replacing(out / DOCUMENT) as part:
        part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
