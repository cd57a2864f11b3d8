"""Cosine of class and distillation token by layer (DeiT, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from igpt_cli.device import choose_precision
from igpt_cli.errors import InputError
from igpt_cli.model_dir import ModelDir
from igpt_cli.model_input import inputs_of
from igpt_cli.probing.features import batches, model_device
from igpt_cli.tokens.store import TokenSplit


@dataclass(frozen=True)
class TokenCosine:
    """What `token_cosine` found: the mean cosine over `n_images` of a split, by layer from 0."""

    run: str
    model: str
    split: str
    n_images: int
    cosines: list[float]

    def to_dict(self) -> dict[str, Any]:
        """As `igpt evaluate --tokens-cosine --json` prints it."""
        layers = [{"layer": layer, "cosine": cosine} for layer, cosine in enumerate(self.cosines)]
        return {k: v for k, v in vars(self).items() if k != "cosines"} | {"layers": layers}


def token_cosine(
    run: ModelDir,
    split: TokenSplit,
    rows: np.ndarray | None = None,
    *,
    batch_size: int = 16,
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> TokenCosine:
    """The cosine of class and distillation token, the mean over images, at every layer of the model contract.

    (The paper measures the tokens themselves: 0.06 at the input, 0.93 after the last block.)

    Args:
        split: images of the model's resolution.
        rows: (n,) which of them; default all.
        progress: called with (images done, images in all).

    Raises:
        InputError: the model has no distillation token, or there are no images.
        NonFiniteError: a feature is NaN or infinite.
    """
    if not hasattr(run.model, "heads"):
        raise InputError(f"{run.run} is {run.name}, which has no distillation token to compare with a class token")
    rows = np.arange(len(split)) if rows is None else rows
    if not len(rows):
        raise InputError(f"the split {split.name!r} has no images")
    n_layers: Any = run.model.n_layers
    layers = list(range(n_layers + 1))
    sums = np.zeros(len(layers))
    seen, decode = inputs_of(run, split)
    precision = choose_precision(precision, model_device(run.model))
    how: dict[str, Any] = {"pool": "none", "precision": precision, "decode": decode}
    for at, _, found in batches(run.model.eval(), seen, rows, layers, batch_size, **how):
        for layer in layers:
            first, second = found[layer][:, 0], found[layer][:, 1]  # (B, D) each: class, distillation
            lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
            sums[layer] += ((first * second).sum(1) / lengths).sum()
        if progress:
            progress(at.stop, len(rows))
    return TokenCosine(run.run, run.name, split.name, len(rows), (sums / len(rows)).tolist())
