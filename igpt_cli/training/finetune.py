"""Fine-tuning: a pretrained model learns classes while it still predicts pixels (section 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_cli.device import autocast, choose_device
from igpt_cli.errors import InputError, Interrupted, MismatchError, NonFiniteError
from igpt_cli.files import file_sha256
from igpt_cli.model_dir import FINETUNED_FROM, WEIGHTS, ModelDir, check_fit
from igpt_cli.model_input import takes_rgb
from igpt_cli.models.presets import PRESETS
from igpt_cli.models.registry import build_model
from igpt_cli.statistics import vote, wilson
from igpt_cli.tokens.loader import MASK_PROB
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.labelled import LabelledTask, best_accuracy, default_part, labelled, resumed_images
from igpt_cli.training.loop import Batch, Metrics
from igpt_cli.training.objectives import Joint
from igpt_cli.training.settings import (
    CPU_VAL_IMAGES,
    Execution,
    FinetuneSettings,
    ResolvedFinetune,
    check,
    resolved,
    steps_of,
    with_an_end,
)
from igpt_cli.training.task import ALONE, Images, Subset, Task

#: The learning rate is that of pretraining divided by this ("often 10 times smaller", section 3.4).
SMALLER = 10
#: Passes over the training images after which it ends at the latest, where nothing is said and there is a GPU.
EPOCHS = 50
#: Steps of warm-up at most: about what Adam's second moment, with beta2 = 0.95, averages over.
WARMUP = 20
#: Masks of an image whose predictions vote (section 4.6).
BERT_MASKS = 5
#: Test images that `igpt finetune` classifies on a CPU unless requested otherwise.
CPU_TEST_IMAGES = 300
#: The part of a run for which each learning rate of a search is tried.
SEARCH_PART = 0.1


class Finetuning(LabelledTask):
    """Learns gen_weight * L_GEN + clf_weight * L_CLF.

    A linear head without bias, zeros at first, reads the mean over positions of the final norm's output.
    """

    name = "finetune"
    settings_type = FinetuneSettings
    resolved_type = ResolvedFinetune
    metrics = Joint.METRICS
    score = staticmethod(best_accuracy)

    @classmethod
    def new(
        cls,
        run: ModelDir,
        tokens: TokenFile,
        settings: FinetuneSettings | None = None,
        execution: Execution | None = None,
        *,
        device: str = "auto",
        ranks: Ranks = ALONE,
    ) -> Finetuning:
        """
        Args:
            run: the pretrained model; it is not changed. A class head that it has already is replaced.
            tokens: an open token file with the model's palette and resolution, and labels.
            settings: what is learned.

        For the other arguments see `pretrain.Pretraining.new`.

        Raises:
            InputError, MismatchError: as there; labels or classes are missing; a model of RGB images.
        """
        requested, execution, chosen = settings or FinetuneSettings(), execution or Execution(), choose_device(device)
        check(execution)
        check_pretrained(run)
        check_fit(run, tokens)
        requested = with_an_end(requested, execution, chosen.type)
        found, images = resolve(run, tokens, requested, chosen.type, ranks.world_size)
        backbone = {k: v for k, v in run.config["model"].items() if k not in ("n_classes", "head_layer")}
        description = {**backbone, "n_classes": len(tokens.classes), "head_layer": found.head_layer}
        weights = None
        if not found.from_scratch:
            weights = {k: v.cpu() for k, v in run.model.state_dict().items() if not k.startswith("wclf.")}
        config = {FINETUNED_FROM: {"path": run.run, "sha256": file_sha256(run.path / WEIGHTS)}}
        return cls(tokens, images, found, execution, description, chosen, ranks, config, weights)

    @classmethod
    def resumed(
        cls, tokens: TokenFile, config: dict[str, Any], settings: Any, execution: Execution, device, ranks: Ranks
    ) -> Finetuning:
        """See `Task.resumed`; the pretrained model is not needed."""
        images = resumed_images(tokens, settings, config)
        return cls(tokens, images, settings, execution, config["model"], device, ranks)

    def objective(self) -> Any:
        """The model with its head and the joint loss."""
        return Joint(build_model(self.description), self.settings.gen_weight, self.settings.clf_weight)

    def example(self, n: int) -> Batch:
        """A batch of n images with their classes."""
        tokens = torch.zeros((n, self.n_ctx), dtype=torch.int64)
        return tokens, tokens[:, 0], *([tokens.bool()] if self.masked else [])

    def batch(self, step: int) -> Batch:
        """Tokens, labels, and BERT's mask."""
        part = self.ranks.shard(self.settings.batch_size)
        labels = self.images.labels[self.loader.batch_indices(step, part)]
        return torch.from_numpy(self.loader.batch(step, part)), torch.from_numpy(labels), *self.masks(step, part)

    def validate(self, objective: nn.Module, give_up: Callable[[], bool]) -> Metrics | None:
        """Losses and accuracy on the held-out images."""
        sums = self.classify(objective, self.images.val, give_up)
        if sums is None:
            return None
        gen, clf, right = (sums / len(self.images.val.rows)).tolist()
        loss = self.settings.gen_weight * gen + self.settings.clf_weight * clf
        return {"val_loss": loss, "val_gen_loss": gen, "val_clf_loss": clf, "val_accuracy": 100 * right}

    def tested(self, sums: Tensor, n: int) -> dict[str, Any]:
        """The accuracy, in percent, with its 95% Wilson interval."""
        right = sums.tolist()[2]
        return {"accuracy": 100 * right / n, "interval": wilson(round(right), n)}

    @torch.no_grad()
    def classify(
        self, objective: nn.Module, subset: Subset, give_up: Callable[[], bool] = lambda: False
    ) -> Tensor | None:
        """See `LabelledTask.classify`: L_GEN, L_CLF, and 1 for each right class.

        BERT sees each image under `bert_masks` masks, fixed by the seed: losses are means over them, and the class is
        the one that most of them give. With 0, L_GEN comes from one mask, and L_CLF and the class from the whole image.
        """
        sums, n_masks = torch.zeros(3, dtype=torch.float64), self.settings.bert_masks
        whole = slice(1, None) if n_masks == 0 else slice(None)
        for places, n in self.shard_of(len(subset.rows)):
            if give_up():
                return None
            rows, labels = subset.rows[places], subset.labels[places]
            tokens = torch.from_numpy(subset.split.tokens[rows].astype(np.int64)).to(self.device)
            truth = torch.from_numpy(labels).to(self.device)
            masks = [self.fixed_mask(rows, draw) for draw in range(n_masks or 1)] + [None] * (n_masks == 0)
            with autocast(self.precision, self.device):
                out = torch.stack([objective(tokens, truth, mask) for mask in masks])[:, :n]  # (M, B, 5)
            out = out.cpu().double()
            gen = out[:1] if n_masks == 0 else out
            predicted = vote(out[whole, :, 4].long().numpy(), rows[:n], self.settings.seed)
            sums[0] += gen[:, :, 1].mean(0).sum()
            sums[1] += out[whole, :, 2].mean(0).sum()
            sums[2] += int((predicted == labels[:n]).sum())
        return self.ranks.all_reduce_sum(sums)

    def prepared(self, train: Callable[[Task], Any], say: Callable[[str], object]) -> Task:
        """With `lr_search`, the task with the learning rate of the best held-out accuracy after a tenth of the run.

        What each rate gave stands under "search" in config.json. The test images are not looked at.
        """
        rates = self.settings.lr_search
        if not rates:
            return self
        named = ", ".join(f"{rate:g}" for rate in rates)
        say(f"trying the learning rates {named}, each for a tenth of the run")
        rows = [self._tried(rate, train, say) for rate in rates]
        good = [row for row in rows if row["val_accuracy"] is not None]
        if not good:
            raise NonFiniteError(f"every learning rate tried is too large: {named}")
        best = max(good, key=best_accuracy)["learning_rate"]
        say(f"learning rate {best:g} is taken")
        return self._with(replace(self.settings, learning_rate=best), self.execution, {**self.config, "search": rows})

    def _tried(self, rate: float, train: Callable[[Task], Any], say: Callable[[str], object]) -> dict[str, Any]:
        """What a learning rate gives in a short run, validated at its end: steps, val_accuracy, val_clf_loss."""
        s = self.settings
        steps = s.steps and max(1, round(SEARCH_PART * s.steps))
        short = replace(
            s,
            learning_rate=rate,
            steps=steps,
            budget=s.budget and SEARCH_PART * s.budget,
            warmup_steps=min(s.warmup_steps, max(1, steps // 10)) if steps else s.warmup_steps,
            patience=0,
        )
        quiet = replace(self.execution, eval_every=10**9, save_every=10**9, keep=1, time_limit=None)
        task = self._with(short, quiet, self.config)
        task.tests = False
        row: dict[str, Any] = {"learning_rate": rate, "steps": None, "val_accuracy": None, "val_clf_loss": None}
        try:
            done = train(task)
            row |= {"steps": done.steps, **{k: done.best[k] for k in ("val_accuracy", "val_clf_loss")}}
            say(f"learning rate {rate:g}: held-out accuracy {row['val_accuracy']:.2f}% after {done.steps:,} steps")
        except NonFiniteError:
            say(f"learning rate {rate:g} is too large: the gradient became infinite")
        except Interrupted:
            raise Interrupted(
                "interrupted while learning rates were tried, of which the run keeps nothing; start again, with --force"
            ) from None
        return row

    def _with(self, settings: ResolvedFinetune, execution: Execution, config: dict[str, Any]) -> Finetuning:
        where = (self.description, self.device, self.ranks)
        return Finetuning(self.tokens, self.images, settings, execution, *where, config, self.weights)


def check_pretrained(run: ModelDir) -> None:
    """
    Raises:
        InputError: a model of RGB images, which `igpt train` fine-tunes.
    """
    if takes_rgb(run):
        raise InputError(
            f"{run.run} is {run.name}, a model of RGB images, which has no loss on pixels; fine-tune it with: "
            f"igpt train {run.run}"
        )


def resolve(
    run: ModelDir, tokens: TokenFile, settings: FinetuneSettings, device: str, n_ranks: int
) -> tuple[ResolvedFinetune, Images]:
    """The settings with nothing left open, and the images; how many are looked at depends on the device, too."""
    check_finetuning(settings, run.config["model"]["n_layer"])
    images = labelled(tokens, settings)
    found = resolve_settings(settings, run.config, len(images.rows), device, n_ranks)
    if images.val.split.name == "train" and found.val_part is None:
        found = replace(found, val_part=default_part(images.labels))
    return found, labelled(tokens, found)


def pretraining_of(config: dict[str, Any]) -> dict[str, Any]:
    """How a model was pretrained, as far as fine-tuning follows it: by its config.json, its preset, or the paper."""
    model, training = config["model"], config.get("training") or {}
    preset = PRESETS.get(model.get("name", ""), PRESETS["igpt-s"])
    rate, _ = preset.learning_rate(model["objective"], model["resolution"])
    published = {
        "batch_size": preset.recipe["batch_size"],
        "learning_rate": rate,
        "optimizer": preset.recipe.get("optimizer", "adamw"),
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "clip": None,
        "mask_prob": MASK_PROB,
    }
    said = {k: tuple(v) if k == "betas" else v for k, v in training.items() if k in published and v is not None}
    if FINETUNED_FROM in config:  # its rate is a small one already
        said.pop("learning_rate", None)
    return published | said


def resolve_settings(
    settings: FinetuneSettings, config: dict[str, Any], n_train: int, device: str, n_ranks: int = 1
) -> ResolvedFinetune:
    """Fill in what was left open.

    Args:
        config: the config.json of the pretrained model.
        n_train: labelled training images.
        device: its type, such as "cpu".

    Raises:
        InputError: values out of range; all are named.
        MismatchError: a batch of more images than there are.
    """
    values, model = pretraining_of(config), config["model"]
    bert = model["objective"] == "bert"
    if settings.bert_masks is not None and not bert:
        raise InputError(f"bert_masks is {settings.bert_masks}, but the model is autoregressive and sees whole images")
    values["batch_size"] = max(n_ranks, min(values["batch_size"], n_train // n_ranks * n_ranks))
    values["learning_rate"] /= 1 if settings.from_scratch else SMALLER
    values |= {"head_layer": model["n_layer"], "bert_masks": BERT_MASKS if bert else None}
    if device == "cpu":
        values["val_images"] = CPU_VAL_IMAGES
    if not (settings.steps or settings.epochs or settings.budget):
        values["epochs"] = EPOCHS
    values["warmup_steps"] = WARMUP
    found = resolved(ResolvedFinetune, settings, **values)
    check_finetuning(found, model["n_layer"])
    if found.batch_size > n_train:
        raise MismatchError(
            f"batch_size {found.batch_size} is more than the {n_train} labelled training images; lower --batch-size"
        )
    found = replace(found, steps=steps_of(found, max(1, n_train // found.batch_size)))
    if settings.warmup_steps is None and found.steps:
        found = replace(found, warmup_steps=min(WARMUP, max(1, found.steps // 10)))
    return found


def check_finetuning(settings: FinetuneSettings, n_layer: int) -> None:
    """Raise InputError that names every value out of range; None passes."""
    spared = layer = None
    if settings.from_scratch and settings.layer_decay != 1:
        spared = f"layer_decay is {settings.layer_decay}, and from_scratch there are no trained layers to spare"
    if settings.head_layer is not None and not 0 <= settings.head_layer <= n_layer:
        layer = f"head_layer is {settings.head_layer}, expected one of 0 to {n_layer} ({n_layer} = final norm)"
    check(settings, spared, layer)
