"""Optimizers and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from igpt_cli.errors import InputError

OPTIMIZERS = ("adamw", "muon")


def make_optimizers(
    model: nn.Module, optimizer: str, learning_rate: float, betas: Sequence[float]
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once.

    "adamw" is the paper's Adam, which has no weight decay (section 3.4). "muon" orthogonalises the momentum of the
    blocks' matrices (torch.optim.Muon, its update scaled to AdamW's so that one learning rate serves both) and leaves
    embeddings, positions, gains and the head to AdamW.

    Raises:
        InputError: an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    matrices = [p for n, p in model.named_parameters() if n.startswith("h.") and p.ndim == 2]
    if optimizer == "adamw":
        matrices = []
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=learning_rate, betas=(betas[0], betas[1]), weight_decay=0.0)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return made


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    """Let the next step of every optimizer use this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def schedule(step: int, warmup_steps: int, fraction: float) -> float:
    """The part of the learning rate in use at `step` (0-based): linear warm-up, then a cosine to 0 (section 3.4).

    `fraction` is how much of the run after the warm-up is done, by steps or by time; at 1 the rate is exactly 0.

    >>> schedule(0, 10, 0.0), schedule(10, 10, 0.0), schedule(60, 10, 0.5), schedule(110, 10, 1.0)
    (0.1, 1.0, 0.5, 0.0)
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + round(math.cos(math.pi * min(fraction, 1.0)), 15))
