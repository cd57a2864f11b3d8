"""Stochastic depth: residual branches dropped at random in training (Huang et al. 2016).

As ViT-like models use it (DeiT, Swin): for each image and branch on its own, more often the deeper the block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """In training, the branch of an image is dropped with probability `rate`, else divided by 1 - rate.

    The mean over many draws is the branch itself, which is what evaluation computes. It has no weights.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:  # (B, ...) -> (B, ...)
        if not self.training or self.rate == 0:
            return branch
        one_an_image = (len(branch),) + (1,) * (branch.ndim - 1)
        retained = torch.rand(one_an_image, device=branch.device) >= self.rate
        return branch * (retained / (1 - self.rate)).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def depth_rates(rate: float, depth: int) -> list[float]:
    """The rates of the blocks, from 0 for the first to `rate` for the last, by equal steps.

    >>> depth_rates(0.2, 3)
    [0.0, 0.1, 0.2]

    Raises:
        ValueError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate is {rate!r}, expected a number of at least 0 and less than 1")
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
