"""What pretraining (section 2.1) and fine-tuning (section 2.3) minimise; generative losses are in nats per token.

Shapes: B batch, T tokens, D width, V palette size, C classes.
"""

from __future__ import annotations

from typing import Any

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
        self.model: Any = model
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
        return of_images(self.token_losses(tokens, mask), mask)

    def token_losses(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) float32: -log p of the pixel at each position, masked or not. Arguments as for `forward`."""
        return self.losses_of(self.model.hidden(tokens, mask), tokens)

    def losses_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, D) final states -> (B, T) float32: the loss of each of the tokens (B, T)."""
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


class Joint(Objective):
    """A model with a class head, and the loss of fine-tuning: gen_weight * L_GEN + clf_weight * L_CLF (section 2.3).

    L_GEN is the objective that the model was pretrained with; L_CLF is the cross-entropy of the class, in nats. Both
    come from one pass over the same masked or unmasked images.
    """

    #: What `forward` gives beside the loss.
    TOLD = ("gen_loss", "clf_loss", "accuracy")

    def __init__(self, model: nn.Module, gen_weight: float = 1.0, clf_weight: float = 1.0):
        super().__init__(model)
        self.gen_weight, self.clf_weight = gen_weight, clf_weight

    def forward(self, tokens: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The losses of each image.

        Args:
            tokens: (B, T) int64 in [0, V).
            labels: (B,) int64 in [0, C).
            mask: as for `Objective.forward`. A BERT model that sees the whole image has no L_GEN, so with None that
                figure and the loss mean nothing, while the classes do.

        Returns:
            (B, 4) float32: the loss, L_GEN, L_CLF, and the accuracy: 100 where the class is right, 0 where not. The
            loss alone has a gradient. In evaluation mode (B, 5), with the predicted class.
        """
        hidden, classes = self.model.hidden_and_classes(tokens, mask)
        gen = of_images(self.losses_of(hidden, tokens), mask)
        clf = F.cross_entropy(classes, labels, reduction="none")
        predicted = classes.detach().argmax(1)
        loss = self.gen_weight * gen + self.clf_weight * clf
        beside = [gen.detach(), clf.detach(), 100.0 * (predicted == labels)]
        return torch.stack([loss, *beside, *([] if self.training else [predicted.float()])], dim=1)


def of_images(losses: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T) losses of tokens -> (B,): the mean over all tokens, or over the masked ones; 0 where none is masked."""
    if mask is None:
        return losses.mean(1)
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


def head_loss(head: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, D) final states and (B, T) targets -> (B, T) float32 losses; the softmax is taken in float32."""
    logits = head(hidden).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
