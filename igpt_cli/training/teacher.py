"""A trained model as a teacher: asked for its class logits on the images that a student sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_cli.errors import InputError, MismatchError
from igpt_cli.model_dir import ModelDir, classes_of
from igpt_cli.training.augment import normalised

#: Pixels whose colours are looked up at a time.
PIXELS_AT_ONCE = 16_384


class Teacher:
    """A frozen model with a class head; no module, so that it is no part of what is trained, saved or shared out.

    A model of tokens sees the images quantized with its palette, every other as its preparation says.

    Args:
        run: in evaluation mode, on the device where it is asked.
    """

    def __init__(self, run: ModelDir):
        self.model: Any = run.model.eval().requires_grad_(False)
        stated = run.config.get("preparation") or {}
        self.mean, self.std = tuple(stated.get("mean", (0.0,) * 3)), tuple(stated.get("std", (1.0,) * 3))
        self.tokens = getattr(run.model, "input_kind", None) == "tokens"
        self.centers: Any = (
            torch.tensor(run.own_palette.centers).to(next(run.model.parameters()).device) if self.tokens else None
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, R, R) in 0..1 -> class logits (B, C) float32."""
        if not self.tokens:
            return self.model(normalised(x, self.mean, self.std)).float()
        _, classes = self.model.hidden_and_classes(quantized(x, self.centers))
        return classes.float()


def quantized(x: Tensor, centers: Tensor) -> Tensor:
    """(B, 3, R, R) in 0..1, rounded to whole colours -> (B, T) int64: the nearest of the centres (V, 3) in 0..255."""
    pixels = (255 * x.float()).round().clamp(0, 255).flatten(2).transpose(1, 2)  # (B, T, 3)
    with torch.autocast(x.device.type, enabled=False):
        exactly = "donot_use_mm_for_euclid_dist"
        parts = [
            torch.cdist(part, centers, compute_mode=exactly).argmin(1)
            for part in pixels.reshape(-1, 3).split(PIXELS_AT_ONCE)
        ]
    return torch.cat(parts).view(len(x), -1)


def check_teacher(run: ModelDir, resolution: int, classes: list[str]) -> None:
    """
    Raises:
        InputError: the teacher has no class head.
        MismatchError: it takes images of another size, or tells other classes apart, or in another order.
    """
    model, known = run.config["model"], classes_of(run.config)
    n = model.get("n_classes")
    if not n:
        raise InputError(
            f"the teacher {run.run} has no class head, so it tells no classes apart; give a model from igpt train or "
            f"igpt finetune"
        )
    if model.get("resolution", resolution) != resolution:
        raise MismatchError(
            f"the teacher {run.run} takes images of {model['resolution']}x{model['resolution']}, these are "
            f"{resolution}x{resolution}; both must see the same images"
        )
    if n != len(classes) or (known and known != list(classes)):
        theirs = ", ".join((known or [f"{n} classes"])[:5])
        raise MismatchError(
            f"the teacher {run.run} knows other classes, or has them in another order: {theirs}, ..., not "
            f"{', '.join(classes[:5])}, ..."
        )
