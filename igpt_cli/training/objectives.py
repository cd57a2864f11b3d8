"""What pretraining minimises (section 2.1), in nats per token.

Shapes: B batch, T tokens, D width, V palette size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

OBJECTIVES = ("ar", "bert")
#: Logits are made for so many tokens at a time, so that a large batch never has all of them in float32.
TOKENS_AT_ONCE = 16_384


class Objective(nn.Module):
    """A pixel model with its loss: what the training loop calls, compiles and distributes.

    The objective is the model's own: without a mask the loss is autoregressive ("ar"), and every pixel is predicted
    from those before it; with one it is masked ("bert"), and masked pixels are predicted from all others.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head_loss = head_loss

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each image; the mean over images is what training minimises.

        Args:
            tokens: (B, T) int64 in [0, V).
            mask: (B, T) bool for a BERT model, true where the model must not see the pixel; None for AR.

        Returns:
            (B,) float32, nats per token: the mean over all T tokens (AR) or over the masked ones (BERT). An image
            without a masked token has the loss 0.
        """
        losses = self.token_losses(tokens, mask)
        if mask is None:
            return losses.mean(1)
        return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)

    def token_losses(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) float32: -log p of the pixel at each position, masked or not. Arguments as for `forward`."""
        hidden = self.model.hidden(tokens, mask)  # (B, T, D)
        B, T = tokens.shape
        images = max(1, TOKENS_AT_ONCE // T)
        if images >= B:
            return self.head_loss(self.model.wtet, hidden, tokens)
        # Each part's logits are made again in the backward pass rather than kept.
        return torch.cat(
            [
                checkpoint(self.head_loss, self.model.wtet, h, t, use_reentrant=False, preserve_rng_state=False)
                for h, t in zip(hidden.split(images), tokens.split(images))
            ]
        )


def head_loss(head: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, D) final states and (B, T) targets -> (B, T) float32 losses; the softmax is taken in float32."""
    logits = head(hidden).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
