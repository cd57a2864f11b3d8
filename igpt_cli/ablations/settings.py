"""The settings of an ablation, and `ablation.json`, which holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from igpt_cli.ablations.catalogue import LAYER, SIZES, TRAIN, Ablation, Size, find_ablation
from igpt_cli.device import choose_device
from igpt_cli.documents import write_json
from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import require_file

DOCUMENT = "ablation.json"


@dataclass(frozen=True)
class Settings:
    """What an ablation is run with, as `ablation.json` has it.

    size: "small" or "full"; None: by the device. steps, epochs, budget (seconds): of each run; else those of the size.
    recipe, augment: of runs with labels; None: plain, none. run: a pretrained run for "layer". images, palette,
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
        """What was said of how long each run goes on."""
        return {k: v for k in ("steps", "epochs", "budget") if (v := getattr(self, k)) is not None}

    def size_of(self, ablation: Ablation) -> Size:
        """How large the ablation is."""
        return ablation.size(self.size or SIZES[0])


def checked(ablation: Ablation, settings: Settings, images: bool, device: str) -> Settings:
    """Check settings and choose the size; `images`: whether there are some. Raises InputError where they do not fit."""
    if settings.size is None:
        settings = replace(settings, size="small" if choose_device(device).type == "cpu" else "full")
    if settings.size not in SIZES:
        raise InputError(f"size is {settings.size!r}, expected one of {', '.join(SIZES)}")
    if len(settings.amount) > 1:
        raise InputError(f"{' and '.join(settings.amount)} are given; each run ends by one of them")
    if settings.run and ablation is not LAYER:
        raise InputError(f"the ablation {ablation.name} trains its models itself; a run is for {LAYER.name}")
    for key in ("recipe", "augment"):
        if getattr(settings, key) and TRAIN not in ablation.hows:
            raise InputError(
                f"the ablation {ablation.name} has no run that is trained with labels alone; leave out {key}"
            )
    if not ablation.runs:
        if images:
            raise InputError(f"the ablation {ablation.name} trains nothing and takes no images")
        if "epochs" in settings.amount or "budget" in settings.amount:
            raise InputError(f"the ablation {ablation.name} trains nothing; steps are how often each layer is timed")
    elif not images:
        raise InputError(f"the ablation {ablation.name} needs labelled images")
    return settings


def read_ablation(out: Path | str) -> dict[str, Any]:
    """Read the `ablation.json` of a folder. Raises InputError or FormatError if it is not there or is something
    else.
    """
    path = require_file(Path(out) / DOCUMENT, "what igpt ablate writes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        Settings(**found["settings"])
        find_ablation(found["name"])
    except (ValueError, TypeError, KeyError) as e:
        raise FormatError(f"{path} is no ablation of this version of igpt: {e}") from e
    return found


def write_ablation(out: Path, document: Mapping[str, Any]) -> None:
    """Write the `ablation.json` of a folder."""
    write_json(document, out / DOCUMENT)
