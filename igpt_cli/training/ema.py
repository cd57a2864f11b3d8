"""The moving average of a model's weights, which is validated, published and tested in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """An exponential moving average of everything in a model's state dict; whole numbers are those of the last step.

    After step n (1, 2, ...) it is d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)),
    so that the weights a run begins with are soon forgotten. A function of the step, so a resumed run goes on exactly.

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
