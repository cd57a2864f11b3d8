"""What each task minimises; losses of pixels are in nats per token (sections 2.1 and 2.3 of the iGPT paper).

Shapes: B batch, T tokens, D width, V palette size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_cli.errors import InputError, MismatchError
from igpt_cli.model_dir import ModelDir, classes_of
from igpt_cli.training.augment import MEAN, STD, normalised
from igpt_cli.training.settings import TrainSettings

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

    #: What `forward` gives after the loss.
    METRICS = ("gen_loss", "clf_loss", "accuracy")

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
        metrics = [gen.detach(), clf.detach(), 100.0 * (predicted == labels)]
        return torch.stack([loss, *metrics, *([] if self.training else [predicted.float()])], dim=1)


class Classification(nn.Module):
    """A model of RGB images with the loss of its classes: what the training loop calls and distributes.

    Args:
        teacher: (B, 3, R, R) -> logits (B, C), or None.
        mean, std: of each channel, by which the model's colours are normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        teacher: Callable[[Tensor], Tensor] | None = None,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ):
        super().__init__()
        self.model, self.settings, self.teacher, self.mean, self.std = model, settings, teacher, mean, std

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            x: (B, 3, R, R) float, colours in 0..1.
            targets: (B, C) float, rows of sum 1.

        Returns:
            In training (B, K) float32: the loss, which alone has a gradient, and what `Supervised.metrics` names; the
            accuracy is 100 where the class head's likeliest class is the target's. In evaluation mode (B, 1 + heads):
            the cross-entropy of the logits that the model is tested by, and for these, and then each head alone if
            there are two, 1 where the class is right.
        """
        truth = targets.argmax(1)
        if not self.training:
            heads = test_heads(self.model, normalised(x, self.mean, self.std))
            loss = F.cross_entropy(heads[0], targets, reduction="none")
            return torch.stack([loss, *((head.argmax(1) == truth).float() for head in heads)], dim=1)
        heads = train_heads(self.model, normalised(x, self.mean, self.std))
        loss = F.cross_entropy(heads[0], targets, reduction="none")
        right = 100.0 * (heads[0].detach().argmax(1) == truth)
        if self.teacher is None:
            return torch.stack([loss, right], dim=1)
        taught = teacher_loss(heads[-1], self.teacher(x), self.settings.distill, self.settings.tau)
        part = self.settings.distill_weight or 0.0
        return torch.stack([(1 - part) * loss + part * taught, loss.detach(), taught.detach(), right], dim=1)


def has_two_heads(model: Any) -> bool:
    """Whether a model has a distillation head next to its class head, and so `heads` and `together`."""
    return hasattr(model, "heads")


def train_heads(model: Any, x: Tensor) -> list[Tensor]:
    """Logits (B, C) float32 of a model's class head, and of its distillation head where it has one."""
    logits: Any = model.heads(x) if has_two_heads(model) else (model(x),)
    return [head.float() for head in logits]


def test_heads(model: Any, x: Tensor) -> list[Tensor]:
    """Logits (B, C) that a model is tested by; of a model with two heads then those of each, class first."""
    heads = train_heads(model, x)
    return [model.together(*heads), *heads] if has_two_heads(model) else heads


def teacher_loss(logits: Tensor, taught: Tensor, kind: str, tau: float) -> Tensor:
    """(B,): tau^2 KL(teacher || student) at temperature tau ("soft"), or the cross-entropy of the teacher's class."""
    if kind == "hard":
        return F.cross_entropy(logits, taught.argmax(1), reduction="none")
    ours, theirs = F.log_softmax(logits / tau, 1), F.log_softmax(taught / tau, 1)
    return tau**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def of_images(losses: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T) losses of tokens -> (B,): the mean over all tokens, or over the masked ones; 0 where none is masked."""
    if mask is None:
        return losses.mean(1)
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


def head_loss(head: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, D) final states and (B, T) targets -> (B, T) float32 losses; the softmax is taken in float32."""
    logits = head(hidden).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


#: Pixels whose colours are looked up at a time.
PIXELS_AT_ONCE = 16_384


class Teacher:
    """A frozen model with a class head; no module, so that it is no part of what is trained, saved or shared out.

    A model of tokens sees the images quantized with its palette, every other as its preparation says.

    Args:
        run: in evaluation mode, on the device where it is called.
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
        MismatchError: it takes images of another size, or has other classes, or has them in another order.
    """
    model, known = run.config["model"], classes_of(run.config)
    n = model.get("n_classes")
    if not n:
        raise InputError(
            f"the teacher {run.run} has no class head, so it cannot teach; give a model from igpt train or "
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
