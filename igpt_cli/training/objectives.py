"""What pretraining minimises (section 2.1), in nats per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ar_loss(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of every pixel given those before it.

    Args:
        model: autoregressive; maps tokens (B, T) to logits (B, T, V), position i predicting pixel i.
        tokens: (B, T) int64 in [0, V).

    Returns:
        A float32 scalar, nats per token, averaged over all positions and images.
    """
    logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
