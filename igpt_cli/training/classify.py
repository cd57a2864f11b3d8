"""Fine-tuning on a machine: `Setup` with a class head, labels, and accuracy as what is validated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_cli.device import autocast
from igpt_cli.models.registry import build_model
from igpt_cli.statistics import vote, wilson
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.checkpoint import best_checkpoint, load_weights, publish_weights
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.loop import Batch, Found
from igpt_cli.training.objectives import Joint, Objective
from igpt_cli.training.recipe import Execution
from igpt_cli.training.setup import Setup
from igpt_cli.training.tuning import LabelledData, Part
from igpt_cli.workspace import CHECKPOINTS

#: Steps from one validation to the next at least, however few images an epoch has.
MIN_STEPS = 10


def best_accuracy(found: Found) -> tuple[float, ...]:
    """How good a validation is: by its accuracy; ties go to the lower L_CLF."""
    return found["val_accuracy"], -found["val_clf_loss"]


class Classifying(Setup):
    """A tuning on a machine.

    Args:
        weights: the backbone's state dict to begin with; None begins with fresh weights. The class head begins at 0.
        tests: classify the test images at the end.
    """

    recipe: Any  # a Tuning; of `rgb.Supervised` a Supervision
    told: tuple[str, ...] = Joint.TOLD
    score = staticmethod(best_accuracy)

    def __init__(
        self,
        tokens: TokenFile,
        data: LabelledData,
        recipe: Any,
        execution: Execution,
        description: dict[str, Any],
        device: torch.device,
        ranks: Ranks,
        weights: dict[str, Tensor] | None = None,
        tests: bool = True,
    ):
        super().__init__(tokens, data, recipe, execution, description, device, ranks)
        self.weights, self.tests = weights, tests
        self.patience = recipe.patience or None
        self.eval_every = execution.eval_every or max(MIN_STEPS, self.loader.steps_per_epoch)

    def objective(self) -> Any:
        """The model with its head and the joint loss."""
        return Joint(build_model(self.description), self.recipe.gen_weight, self.recipe.clf_weight)

    def optimizers(self, model: nn.Module, **rates: Any) -> list[torch.optim.Optimizer]:
        """What updates a model's weights, with the rates that the recipe has for lower layers and for class heads."""
        recipe = self.recipe
        return super().optimizers(model, layer_decay=recipe.layer_decay, head_rate=recipe.head_learning_rate, **rates)

    def example(self, n: int) -> Batch:
        """A batch of n images with their classes."""
        tokens, *mask = super().example(n)
        return tokens, tokens[:, 0], *mask

    def begin(self, model: Any) -> None:
        """Put the pretrained weights below the head."""
        if self.weights is not None:
            model.load_state_dict({"wclf.weight": model.wclf.weight, **self.weights})

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of a step: tokens, labels, and BERT's mask."""
        part = self.ranks.share(self.recipe.batch_size)
        labels = self.data.labels[self.loader.batch_indices(step, part)]
        return torch.from_numpy(self.loader.batch(step, part)), torch.from_numpy(labels), *self.masks(step, part)

    def validate(self, objective: nn.Module, give_up: Callable[[], bool]) -> Found | None:
        """Losses and accuracy on the held-out images."""
        found = self.classify(objective, self.data.val, give_up)
        if found is None:
            return None
        gen, clf, right = (found / len(self.data.val.rows)).tolist()
        loss = self.recipe.gen_weight * gen + self.recipe.clf_weight * clf
        return {"val_loss": loss, "val_gen_loss": gen, "val_clf_loss": clf, "val_accuracy": 100 * right}

    def finish(self, objective: Objective, shared: nn.Module, run: Path) -> dict[str, Any]:
        """Take the best checkpoint's weights, let them be the run's own, and classify the test images, once."""
        folder = run / CHECKPOINTS / self.ranks.from_first(lambda: str(best_checkpoint(run)))
        load_weights(folder, objective.model, self.ranks)
        self.ranks.from_first(lambda: publish_weights(run, folder))
        if self.data.test is None or not self.tests:
            return {}
        shared.eval()
        return self.test(shared, self.data.test)

    def test(self, objective: nn.Module, part: Part) -> dict[str, Any]:
        """The accuracy on the test images, in percent, with its 95% Wilson interval."""
        _, _, right = self.classify(objective, part).tolist()
        n = len(part.rows)
        return {"accuracy": 100 * right / n, "interval": wilson(round(right), n), "n_test": n}

    @torch.no_grad()
    def classify(self, objective: nn.Module, part: Part, give_up: Callable[[], bool] = lambda: False) -> Tensor | None:
        """(3,) float64, sums over the images of a part, which the ranks share: L_GEN, L_CLF, 1 for each right class.

        BERT sees each image under `bert_masks` masks, fixed by the seed: losses are means over them, and the class is
        the one that most of them give. With 0, L_GEN comes from one mask, and L_CLF and the class from the whole image.

        Args:
            objective: the joint loss, in evaluation mode.
            give_up: asked before each batch; if it says so, None is returned.
        """
        sums, n_masks = torch.zeros(3, dtype=torch.float64), self.recipe.bert_masks
        whole = slice(1, None) if n_masks == 0 else slice(None)
        for places, n in self.shared_out(len(part.rows)):
            if give_up():
                return None
            rows, labels = part.rows[places], part.labels[places]
            tokens = torch.from_numpy(part.split.tokens[rows].astype(np.int64)).to(self.device)
            truth = torch.from_numpy(labels).to(self.device)
            masks = [self.fixed_mask(rows, draw) for draw in range(n_masks or 1)] + [None] * (n_masks == 0)
            with autocast(self.precision, self.device):
                found = torch.stack([objective(tokens, truth, mask) for mask in masks])[:, :n]  # (M, B, 5)
            found = found.cpu().double()
            gen = found[:1] if n_masks == 0 else found
            predicted = vote(found[whole, :, 4].long().numpy(), rows[:n], self.recipe.seed)
            sums[0] += gen[:, :, 1].mean(0).sum()
            sums[1] += found[whole, :, 2].mean(0).sum()
            sums[2] += int((predicted == labels[:n]).sum())
        return self.ranks.total(sums)
