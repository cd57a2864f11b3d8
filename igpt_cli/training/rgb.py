"""Supervised training on a machine: `Setup` for models of RGB images, augmented on the device that trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.device import autocast
from igpt_cli.errors import InputError
from igpt_cli.models.registry import build_model
from igpt_cli.statistics import wilson
from igpt_cli.tokens.loader import step_generator, view_draws
from igpt_cli.tokens.store import TokenFile, TokenSplit
from igpt_cli.training.augment import DRAWS, MEAN, STD, Views, drawn_mixture, normalised, smoothed
from igpt_cli.training.classify import Classifying
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.ema import EMA
from igpt_cli.training.fitting import Fit, fit_measured
from igpt_cli.training.loop import Batch, Found
from igpt_cli.training.optim import linear_maps
from igpt_cli.training.recipe import Execution
from igpt_cli.training.supervision import Supervision
from igpt_cli.training.teacher import Teacher
from igpt_cli.training.tuning import LabelledData, Part


class Classification(nn.Module):
    """A model of RGB images with the loss of its classes: what the training loop calls and distributes.

    Args:
        teacher: (B, 3, R, R) -> logits (B, C), or None.
        mean, std: of each channel, by which the model's colours are normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Supervision,
        teacher: Callable[[Tensor], Tensor] | None = None,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ):
        super().__init__()
        self.model, self.recipe, self.teacher, self.mean, self.std = model, recipe, teacher, mean, std

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            x: (B, 3, R, R) float, colours in 0..1.
            targets: (B, C) float, rows of sum 1.

        Returns:
            In training (B, K) float32: the loss, which alone has a gradient, and what `Supervised.told` names; the
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
        taught = teacher_loss(heads[-1], self.teacher(x), self.recipe.distill, self.recipe.tau)
        part = self.recipe.distill_weight
        return torch.stack([(1 - part) * loss + part * taught, loss.detach(), taught.detach(), right], dim=1)


def has_two_heads(model: Any) -> bool:
    """Whether a model has a distillation head beside its class head, and so `heads` and `together`."""
    return hasattr(model, "heads")


def train_heads(model: Any, x: Tensor) -> list[Tensor]:
    """Logits (B, C) float32 of a model's class head, and of its distillation head where it has one."""
    found: Any = model.heads(x) if has_two_heads(model) else (model(x),)
    return [head.float() for head in found]


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


class Supervised(Classifying):
    """A `Supervision` on a machine.

    Args:
        teacher: asked on the same augmented images, where the recipe distills.
        weights: the state dict to begin with, or a part of it; the rest is fresh, and with None all is.
        preparation: has the `mean` and `std` of each channel, by which colours are normalised; default ImageNet's.
    """

    told: tuple[str, ...] = ("accuracy",)

    def __init__(
        self,
        tokens: TokenFile,
        data: LabelledData,
        recipe: Supervision,
        execution: Execution,
        description: dict[str, Any],
        device: torch.device,
        ranks: Ranks,
        weights: dict[str, Tensor] | None = None,
        teacher: Teacher | None = None,
        preparation: dict[str, Any] | None = None,
    ):
        self.teacher = teacher
        self.colours = {k: tuple((preparation or {}).get(k, v)) for k, v in (("mean", MEAN), ("std", STD))}
        super().__init__(tokens, data, recipe, execution, description, device, ranks, weights)
        self.compile = bool(execution.compile)  # none by default
        self.random_blocks = bool(recipe.drop_path)
        if teacher:
            self.told = ("label_loss", "teacher_loss", "accuracy")
        model = self.on_meta().model
        if has_two_heads(model) and not teacher:
            raise InputError(
                f"{description['name']} has a distillation head, which learns from a teacher; name one (--teacher RUN)"
            )
        if recipe.optimizer == "muon":
            linear_maps(model)
        if self.fit.recompute and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise InputError(
                f"{description['name']} has BatchNorm, whose running statistics --recompute would count twice; use a "
                f"smaller --micro-batch"
            )
        self.views = Views(recipe.augment, recipe.randaugment, recipe.colour_jitter, recipe.erasing)
        # With repeated augmentation a step has fewer images, and each of them several times.
        self.each = -(-recipe.batch_size // recipe.repeats)
        self.stream = super().make_loader(self.each, "none")
        self.split = tokens.split("train")

    @staticmethod
    def score(found: Found) -> tuple[float, ...]:
        """How good a validation is: by its accuracy; ties go to the lower loss."""
        return found["val_accuracy"], -found["val_loss"]

    def fitted(self) -> Fit:
        """What fits the device by what autograd keeps."""
        how = (self.execution, self.device, self.ranks)
        return fit_measured(self.alone, self.example, self.recipe.batch_size, *how)

    def make_loader(self, batch_size: int, augment: str):
        """The images in the order in which they are trained on; their pixels are augmented here, not their tokens."""
        return super().make_loader(batch_size, "none")

    def average(self, model: nn.Module) -> EMA | None:
        """The moving average that the recipe asks for."""
        return EMA(model, self.recipe.ema) if self.recipe.ema else None

    def flops_per_image(self) -> float:
        """FLOPs of training on one image: those of the forward pass, as torch counts them, three times."""
        from torch.utils.flop_counter import FlopCounterMode

        objective = self.on_meta().eval()
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            objective(*self.example(2))
        return 3 * counter.get_total_flops() / 2

    def state_bytes(self) -> int:
        """Weights, gradients and what the optimizer keeps: SGD's one moment, or at most Adam's two."""
        each = 12 if self.recipe.optimizer == "sgd" else 16
        return each * sum(p.numel() for p in self.on_meta().parameters())

    def objective(self) -> Classification:
        """The model with its class head, and the loss."""
        return Classification(build_model(self.description), self.recipe, self.teacher, **self.colours)

    def alone(self) -> Classification:
        """The same without a teacher."""
        return Classification(build_model(self.description), self.recipe)

    def on_meta(self) -> Classification:
        """The model without values, to be looked at."""
        with torch.device("meta"):
            return self.alone()

    def example(self, n: int) -> Batch:
        """A batch of n images with their targets."""
        R, C = self.tokens.resolution, self.description["n_classes"]
        return torch.zeros(n, 3, R, R), torch.full((n, C), 1 / C)

    def begin(self, model: nn.Module) -> None:
        """Put the weights that it begins with, if any."""
        if self.weights is not None:
            model.load_state_dict({**model.state_dict(), **self.weights})

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of a step: augmented images in 0..1, and targets; on a GPU already."""
        recipe, R, C = self.recipe, self.tokens.resolution, self.description["n_classes"]
        part = self.ranks.share(recipe.batch_size)
        rows = self.stream.batch_indices(step)[np.arange(recipe.batch_size)[part] % self.each]
        generator = step_generator(step, recipe.seed)
        mixture = drawn_mixture(R, recipe.mixup, recipe.cutmix, generator)
        field = lru_cache(lambda: torch.from_numpy(generator.standard_normal((3, R, R), np.float32)))
        first = step * recipe.batch_size
        u = view_draws(slice(first + part.start, first + part.stop), DRAWS, recipe.seed)
        targets = smoothed(self.put(self.data.labels[rows]), C, recipe.label_smoothing)
        return mixture(self.views(self.images(self.split, rows), u, field), targets)

    def images(self, split: TokenSplit, rows: np.ndarray) -> Tensor:
        """(B, 3, R, R) uint8: the images as they were kept, or the colours of their tokens."""
        rgb = split.decode(rows) if split.rgb is None else np.ascontiguousarray(split.rgb[rows])
        return self.put(rgb).permute(0, 3, 1, 2).contiguous()

    def put(self, values: np.ndarray) -> Tensor:
        """An array as a tensor where images are augmented: on the GPU, else on the CPU (mps knows no float64)."""
        tensor = torch.from_numpy(values)
        return tensor.to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def validate(self, objective: nn.Module, give_up: Callable[[], bool]) -> Found | None:
        """Loss and accuracies on the held-out images."""
        found = self.classify(objective, self.data.val, give_up)
        if found is None:
            return None
        loss, *right = (found / len(self.data.val.rows)).tolist()
        return {"val_loss": loss, **{f"val_{name}": 100 * r for name, r in zip(ACCURACIES, right)}}

    def test(self, objective: nn.Module, part: Part) -> dict[str, Any]:
        """The accuracy on the test images, in percent, with its 95% Wilson interval, and that of each of two heads."""
        _, *right = self.classify(objective, part).tolist()
        n = len(part.rows)
        heads = {name: 100 * r / n for name, r in zip(ACCURACIES, right)}
        return {**heads, "interval": wilson(round(right[0]), n), "n_test": n}

    @torch.no_grad()
    def classify(self, objective: nn.Module, part: Part, give_up: Callable[[], bool] = lambda: False) -> Tensor | None:
        """(1 + heads,) float64, sums over a part's images, which the ranks share: the loss, and how many are right.

        Args:
            objective: in evaluation mode.
            give_up: asked before each batch; if it says so, None is returned.
        """
        sums = torch.zeros((), dtype=torch.float64)
        for places, n in self.shared_out(len(part.rows)):
            if give_up():
                return None
            x = self.images(part.split, part.rows[places]).float() / 255
            targets = smoothed(self.put(part.labels[places]), self.description["n_classes"], 0.0)
            with autocast(self.precision, self.device):
                found = objective(x.to(self.device), targets.to(self.device))  # (B, 1 + heads)
            sums = sums + found[:n].cpu().double().sum(0)
        return self.ranks.total(sums)


#: What is told of a model's heads; a model with one head has the first alone.
ACCURACIES = ("accuracy", "accuracy_class", "accuracy_distillation")
