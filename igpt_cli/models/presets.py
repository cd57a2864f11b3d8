"""The models by name, as data. Sizes S to XL are the paper's (section 3.3); tiny and xs are ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One named model.

    `backend` names the class in `registry.BACKENDS`; `sizes` are that class's own arguments. `recipe` holds the
    pretraining settings that differ from `training.pretrain.Recipe`'s defaults.
    """

    name: str
    backend: str
    sizes: dict[str, int]
    recipe: dict[str, Any]
    about: str


def _igpt(name: str, n_layer: int, n_embd: int, n_head: int, recipe: dict[str, Any], about: str) -> Preset:
    return Preset(name, "igpt", {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}, recipe, about)


# The batch is 128 images for a million steps (section 3.4); rates are those of Table 5 at 32x32, of XL at 64x64.
_PAPER = {"batch_size": 128, "steps": 1_000_000}

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        _igpt(
            "igpt-tiny",
            24,
            64,
            1,
            {"batch_size": 4, "learning_rate": 0.005, "optimizer": "muon", "steps": 4000},
            "minutes on a CPU: demo, tests, docs",
        ),
        _igpt(
            "igpt-xs",
            24,
            256,
            8,
            {"batch_size": 32, "learning_rate": 0.003, "steps": 30_000},
            "an hour on one GPU: CIFAR-10",
        ),
        _igpt("igpt-s", 24, 512, 8, {**_PAPER, "learning_rate": 0.003}, "paper: 76M, ImageNet loss 2.0895 nats"),
        _igpt("igpt-m", 36, 1024, 8, {**_PAPER, "learning_rate": 0.003}, "paper: 455M, ImageNet loss 2.0614 nats"),
        _igpt("igpt-l", 48, 1536, 16, {**_PAPER, "learning_rate": 0.001}, "paper: 1.4B, ImageNet loss 2.0466 nats"),
        # The paper does not give XL's heads; 48 keeps the head width of S, 64.
        _igpt("igpt-xl", 60, 3072, 48, {"batch_size": 64, "steps": 2_000_000, "learning_rate": 0.0003}, "paper: 6.8B"),
    )
}
