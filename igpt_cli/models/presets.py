"""Presets, and iGPT's: S to XL are the paper's (section 3.3), tiny and xs ours.

Models of RGB images have files of their own, presets_<family>.py; `registry.all_presets` has them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

#: (objective, resolution), such as ("ar", 32).
Case = tuple[str, int]


@dataclass(frozen=True)
class Preset:
    """One named model.

    `backend` names the class in `registry.BACKENDS`; `sizes` are that class's own arguments, of a model of RGB images
    its own resolution among them. `recipe` holds the settings of pretraining that differ from the defaults of
    `training.settings.PretrainSettings`. `learning_rates` holds the peak rates found for this model: those of the
    paper's Table 5, and for tiny and xs those of our own AR runs at 32x32. Models of RGB images, whose recipes go by
    the batch (`training.recipes`), have neither.
    """

    name: str
    backend: str
    sizes: dict[str, Any]
    recipe: dict[str, Any]
    learning_rates: dict[Case, float]
    about: str

    @property
    def of_tokens(self) -> bool:
        """Whether it is a model of tokens, iGPT; the others are of RGB images and learn classes."""
        return self.backend == "igpt"

    def nearest_case(self, objective: str, resolution: int) -> Case:
        """Which of the `learning_rates` serves: the same objective first, then the nearest resolution by ratio."""
        return min(self.learning_rates, key=lambda case: (case[0] != objective, abs(math.log(case[1] / resolution))))

    def learning_rate(self, objective: str, resolution: int) -> tuple[float, bool]:
        """The peak learning rate, and whether it is published for this very objective and resolution.

        Where it is not, it is the rate of `nearest_case`.

        >>> PRESETS["igpt-l"].learning_rate("ar", 48), PRESETS["igpt-l"].learning_rate("bert", 48)
        ((0.01, True), (0.001, False))
        """
        case = self.nearest_case(objective, resolution)
        return self.learning_rates[case], case == (objective, resolution)


# Section 3.4.
_PAPER = {"batch_size": 128, "steps": 1_000_000}
_RECIPES: dict[str, dict[str, Any]] = {
    "igpt-tiny": {"batch_size": 4, "optimizer": "muon", "steps": 4000},
    "igpt-xs": {"batch_size": 32, "steps": 30_000},
    "igpt-xl": {"batch_size": 64, "steps": 2_000_000},
}
_RATES: dict[str, dict[Case, float]] = {
    "igpt-tiny": {("ar", 32): 0.005},
    "igpt-xs": {("ar", 32): 0.003},
    "igpt-s": {("ar", 32): 0.003, ("bert", 32): 0.01},
    "igpt-m": {("ar", 32): 0.003, ("bert", 32): 0.003},
    "igpt-l": {("ar", 32): 0.001, ("ar", 48): 0.01, ("bert", 32): 0.001},
    "igpt-xl": {("ar", 64): 0.0003},
}


def _igpt(name: str, n_layer: int, n_embd: int, n_head: int, about: str) -> Preset:
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}
    return Preset(name, "igpt", sizes, _RECIPES.get(name, _PAPER), _RATES[name], about)


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        _igpt("igpt-tiny", 24, 64, 1, "minutes on a CPU: demo, tests, docs"),
        _igpt("igpt-xs", 24, 256, 8, "an hour on one GPU: CIFAR-10"),
        _igpt("igpt-s", 24, 512, 8, "paper: 76M, ImageNet loss 2.0895 nats"),
        _igpt("igpt-m", 36, 1024, 8, "paper: 455M, ImageNet loss 2.0614 nats"),
        _igpt("igpt-l", 48, 1536, 16, "paper: 1.4B, ImageNet loss 2.0466 nats"),
        # The paper does not give XL's heads; 48 keeps the head width of S, 64.
        _igpt("igpt-xl", 60, 3072, 48, "paper: 6.8B, 64x64"),
    )
}
