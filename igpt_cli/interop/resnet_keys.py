"""ResNet's tensor names in timm and torchvision.

Pure functions on {name: tensor}. A name that is not in the table is left as it is, for the caller to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from igpt_cli.interop.keys import NameTable

LAYOUTS = ("timm",)
#: (our name, theirs). {s} is a stage, which they count from 1, {p} the same counted from 0, {b} a block.
NAMES: tuple[tuple[str, str], ...] = (
    ("stem.conv", "conv1"),
    ("stem.norm", "bn1"),
    *(
        (f"stages.{{p}}.{{b}}.{ours}", f"layer{{s}}.{{b}}.{theirs}")
        for ours, theirs in (
            *((f"conv{i}", f"conv{i}") for i in (1, 2, 3)),
            *((f"norm{i}", f"bn{i}") for i in (1, 2, 3)),
            ("shortcut.0", "downsample.0"),
            ("shortcut.1", "downsample.1"),
        )
    ),
    ("head", "fc"),
)
_TABLE = NameTable(("ours", *LAYOUTS), NAMES)
#: Nothing: every tensor of theirs has a place.
EXCLUDED = re.compile(r"(?!)")
#: Batches that a norm has seen: whole numbers, which no result depends on; files from before torch 0.4.1 lack them.
COUNT = "num_batches_tracked"


def layout_of(names: Iterable[str]) -> str:
    """Which of LAYOUTS these names are in."""
    return LAYOUTS[0]


def to_ours(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Weights as `models.resnet.ResNet` names them; counts of batches that are missing are 0."""
    found = {_TABLE.rename(name, layout, "ours"): tensor for name, tensor in weights.items()}
    norms = [name.removesuffix("running_mean") for name in found if name.endswith(".running_mean")]
    return {**{norm + COUNT: torch.zeros((), dtype=torch.int64) for norm in norms}, **found}


def backend_of(names: Iterable[str]) -> str:
    """The backend of `models.registry` that has tensors of these names, which are ours."""
    return "resnet"


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a ResNet's tensors, named as ours, show of its `ResNetConfig`: all but resolution.

    A stem of 3x3 is not among them: whether pooling follows it, shapes do not show.

    Raises:
        KeyError: a tensor that shows a size is missing.
    """
    blocks = [m for m in map(re.compile(r"stages\.(\d{1,9})\.(\d{1,9})\.conv1\.weight").fullmatch, weights) if m]
    width, _, side = weights["stem.conv.weight"].shape[:3]
    sizes: dict[str, Any] = {
        "depths": [sum(int(m[1]) == s for m in blocks) for s in range(len({m[1] for m in blocks}))],
        "block": "bottleneck" if "stages.0.0.conv3.weight" in weights else "basic",
        "width": width,
    }
    if side == 7:
        sizes["stem"] = "7x7"
    if "head.weight" in weights:
        sizes["n_classes"] = weights["head.weight"].shape[0]
    return sizes
