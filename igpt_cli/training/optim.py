"""Optimizers and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from igpt_cli.errors import InputError

#: The key of a group of parameters for its part of the learning rate.
SCALE = "lr_scale"
OPTIMIZERS = ("adamw", "muon", "sgd")
#: What models call their class heads.
HEADS = ("wclf", "head", "head_dist")


def make_optimizers(
    model: nn.Module,
    optimizer: str,
    learning_rate: float,
    betas: Sequence[float],
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    head_rate: float | None = None,
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once.

    "adamw" is the paper's Adam when weight_decay is 0, as it is in the paper (section 3.4). "muon" orthogonalises the
    momentum of the linear maps in and between the blocks (torch.optim.Muon, its update scaled to AdamW's so that one
    learning rate serves both) and leaves the rest to AdamW: embeddings, positions, gains, heads, and convolutions,
    which are no matrices. "sgd" has momentum betas[0], not Nesterov's, and adds weight decay to the gradient (He et al.
    2016).

    Weight decay is for what multiplies: the weights of linear layers and convolutions, of the blocks and the head, not
    biases, norms, embeddings, positions, tokens, tables of relative positions.

    Args:
        layer_decay: what the learning rate loses from one block to the one below, as in ELECTRA, BEiT and MAE. Block
            l = 0..L-1 has learning_rate * layer_decay ** (L - l), what lies below the blocks learning_rate *
            layer_decay ** (L + 1), final norm and heads the whole.
        head_rate: the learning rate of class heads, while that of the rest is learning_rate; None for the same.

    Raises:
        InputError: an unknown optimizer, or no matrices for Muon.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    blocks: Any = model.blocks
    depth, last = depths(model), len(blocks)
    matrices = linear_maps(model) if optimizer == "muon" else set()
    multiplies = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    heads = {id(p) for name in HEADS if hasattr(model, name) for p in getattr(model, name).parameters()}

    def groups(chosen: set[int], decay: float) -> list[dict[str, Any]]:
        """The parameters chosen by id: a group for each learning rate."""
        found: dict[float, dict[str, Any]] = {}
        for p in (p for p in model.parameters() if id(p) in chosen):
            scale = layer_decay ** (last - depth[id(p)])
            if head_rate is not None and id(p) in heads:
                scale = head_rate / learning_rate
            fresh = {"params": [], "lr": learning_rate * scale, SCALE: scale, "weight_decay": decay}
            found.setdefault(scale, fresh)["params"].append(p)
        return list(found.values())

    rest = groups(multiplies - matrices, weight_decay) + groups(set(depth) - multiplies, 0.0)
    if optimizer == "sgd":
        sharded = any(hasattr(p, "full_tensor") for p in model.parameters())  # of which torch's fused SGD knows nothing
        sgd = torch.optim.SGD(rest, lr=learning_rate, momentum=betas[0], fused=not sharded)
        for p in model.parameters():  # a first step that must change nothing would leave it undefined
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [sgd]
    adam = torch.optim.AdamW(rest, lr=learning_rate, betas=(betas[0], betas[1]), fused=True)
    made: list[torch.optim.Optimizer] = [adam]
    if optimizer == "muon":
        hidden = groups(matrices, weight_decay)
        made.append(torch.optim.Muon(hidden, lr=learning_rate, adjust_lr_fn="match_rms_adamw"))
    return made


def linear_maps(model: nn.Module) -> set[int]:
    """What Muon updates, by id: the weights of the linear layers in and between the blocks.

    Raises:
        InputError: there are none, as in ResNets, whose blocks are convolutions.
    """
    blocks: Any = model.blocks
    depth = depths(model)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    if found := {key for key in linear if 0 <= depth[key] < len(blocks)}:
        return found
    raise InputError("muon is for linear maps, and the blocks of this model have none; take adamw or sgd")


def depths(model: nn.Module) -> dict[int, int]:
    """{id of a parameter: how deep it lies}: -1 below the blocks, l in block l = 0..L-1, L above them.

    Models name their parts in the order in which images pass them. What lies between two blocks, a Swin's patch
    merging, counts with the block before it.
    """
    blocks: Any = model.blocks
    of_block = {id(p): layer for layer, block in enumerate(blocks) for p in block.parameters()}
    found, layer = {}, -1
    for p in model.parameters():
        layer = of_block.get(id(p), layer if layer < len(blocks) - 1 else len(blocks))
        found[id(p)] = layer
    return found


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    """Let the next step of every optimizer use this learning rate, of which a group of parameters may have a part."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get(SCALE, 1.0)


def clip_gradient(model: nn.Module, largest: float | None) -> Tensor:
    """The norm of the whole gradient, a float32 scalar on its device; the gradient is scaled down to `largest`.

    Nothing waits for the device. Sharded gradients count whole.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
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


class EMA:
    """An exponential moving average of everything in a model's state dict; whole numbers are those of the last step.

    After step n (1, 2, ...) it is d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)),
    so that the initial weights are soon forgotten. It is a function of the step, so resuming is exact.

    Args:
        model: as it is trained; sharded weights have sharded averages.
        decay: at least 0 and less than 1; DeiT's is 0.99996.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.kept = {k: v.clone() for k, v in self._now().items()}

    def _now(self) -> dict[str, Tensor]:
        """The model's tensors; of sharded ones this rank's part. Asking makes FSDP let go of what it has gathered."""
        state = self.model.state_dict()
        return {k: v.to_local() if isinstance(v, DTensor) else v for k, v in state.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = self._now()
        moving = [k for k, v in self.kept.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.kept[k] for k in moving], [now[k] for k in moving], 1 - decay)
        for k in self.kept.keys() - set(moving):
            self.kept[k].copy_(now[k])

    @torch.no_grad()
    def restart(self) -> None:
        """Let the average be the weights as they are."""
        for k, v in self._now().items():
            self.kept[k].copy_(v)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average's weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        now = self._now()
        for k, v in self.kept.items():
            was = now[k].clone()
            now[k].copy_(v)
            v.copy_(was)
