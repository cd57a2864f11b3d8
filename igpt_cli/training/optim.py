"""Optimizers and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from igpt_cli.errors import InputError

OPTIMIZERS = ("adamw", "muon")


def make_optimizers(
    model: nn.Module, optimizer: str, learning_rate: float, betas: Sequence[float], weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once.

    "adamw" is the paper's Adam when weight_decay is 0, as it is in the paper (section 3.4). "muon" orthogonalises the
    momentum of the blocks' matrices (torch.optim.Muon, its update scaled to AdamW's so that one learning rate serves
    both) and leaves embeddings, positions, gains and the head to AdamW.

    Weight decay is for what multiplies: the weights of linear layers and convolutions, of the blocks and the head, not
    biases, norms, embeddings, positions, tokens, tables of relative positions.

    Raises:
        InputError: an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if optimizer == "muon" else []
    linear = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    by_muon = {id(p) for p in matrices}
    decayed = [p for p in linear if id(p) not in by_muon]
    others = {id(p) for p in decayed} | by_muon
    plain = [p for p in model.parameters() if id(p) not in others]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(betas[0], betas[1]), fused=True)
    ]
    if by_muon:
        made.append(
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return made


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    """Let the next step of every optimizer use this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def clip_gradient(model: nn.Module, largest: float | None) -> Tensor:
    """The norm of the whole gradient, a float32 scalar on its device; the gradient is scaled down to `largest`.

    Nothing waits for the device. Sharded gradients count whole.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def schedule(step: int, warmup_steps: int, fraction: float) -> float:
    """The part of the learning rate in use at `step` (0-based): linear warm-up, then a cosine to 0 (section 3.4).

    `fraction` is how much of the run after the warm-up is done, by steps or by time; at 1 the rate is exactly 0.

    >>> schedule(0, 10, 0.0), schedule(10, 10, 0.0), schedule(60, 10, 0.5), schedule(110, 10, 1.0)
    (0.1, 1.0, 0.5, 0.0)
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + round(math.cos(math.pi * min(fraction, 1.0)), 15))
