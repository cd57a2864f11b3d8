"""Pretraining: next or masked pixels of a token file's split "train" (section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from igpt_cli.device import autocast, choose_device
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.files import file_sha256
from igpt_cli.model_dir import WEIGHTS, ModelDir, check_fit
from igpt_cli.models.registry import check_of_tokens, find_preset, model_config
from igpt_cli.tokens.loader import MASK_PROB
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.loop import Batch, Metrics
from igpt_cli.training.settings import (
    CPU_VAL_IMAGES,
    MANY_IMAGES,
    Execution,
    PretrainSettings,
    ResolvedPretrain,
    architecture,
    check,
    resolved,
    steps_of,
    with_an_end,
)
from igpt_cli.training.task import ALONE, Images, Subset, Task


class Pretraining(Task):
    """Learns to predict the next pixel, or masked ones (section 2.1)."""

    name = "pretrain"
    settings_type = PretrainSettings
    resolved_type = ResolvedPretrain

    @classmethod
    def new(
        cls,
        tokens: TokenFile,
        settings: PretrainSettings | None = None,
        execution: Execution | None = None,
        *,
        init: ModelDir | None = None,
        device: str = "auto",
        ranks: Ranks = ALONE,
    ) -> Pretraining:
        """
        Args:
            tokens: an open token file; its resolution and palette become the model's.
            settings: what is learned; what is None comes from the preset.
            execution: how the machine executes it.
            init: a trained model whose weights training starts from; `settings` take its name, sizes and objective.
            device: see `device.choose_device`.
            ranks: from `distributed.init_distributed`, under torchrun.

        Raises:
            InputError, MismatchError: values out of range, too few images, another palette or resolution.
        """
        requested, execution, chosen = settings or PretrainSettings(), execution or Execution(), choose_device(device)
        check(execution)
        config, weights = {}, None
        if init is not None:
            check_fit(init, tokens)
            requested = replace(requested, **architecture(init.config["model"]))
            config["initialised_from"] = {"path": init.run, "sha256": file_sha256(init.path / WEIGHTS)}
            weights = init.model.state_dict()
        check_of_tokens(requested.model)
        found, images = resolve(tokens, with_an_end(requested, execution, chosen.type), chosen.type)
        shape = {"resolution": tokens.resolution, "n_vocab": tokens.n_vocab, "objective": found.objective}
        description = model_config(found.model, **shape, **found.sizes)
        return cls(tokens, images, found, execution, description, chosen, ranks, config, weights)

    @classmethod
    def resumed(
        cls, tokens: TokenFile, config: dict[str, Any], settings: Any, execution: Execution, device, ranks: Ranks
    ) -> Pretraining:
        """See `Task.resumed`."""
        found, images = resolve(tokens, replace(settings, val_images=config["data"]["n_val"]), device.type)
        return cls(tokens, images, found, execution, config["model"], device, ranks)

    def example(self, n: int) -> Batch:
        """A batch of n images, on torch's default device."""
        tokens = torch.zeros((n, self.n_ctx), dtype=torch.int64)
        return tokens, *([tokens.bool()] if self.masked else [])

    def batch(self, step: int) -> Batch:
        """Tokens, and BERT's mask."""
        part = self.ranks.shard(self.settings.batch_size)
        return torch.from_numpy(self.loader.batch(step, part)), *self.masks(step, part)

    @torch.no_grad()
    def validate(self, objective: nn.Module, give_up: Callable[[], bool]) -> Metrics | None:
        """The mean loss over the held-out images, which the ranks share; BERT's masks are fixed by the seed."""
        val, total = self.images.val, torch.zeros((), dtype=torch.float64)
        for places, n in self.shard_of(len(val.rows)):
            if give_up():
                return None
            rows = val.rows[places]
            tokens = torch.from_numpy(val.split.tokens[rows].astype(np.int64)).to(self.device)
            with autocast(self.precision, self.device):
                losses = objective(tokens, self.fixed_mask(rows))
            total += losses[:n].cpu().double().sum()
        return {"val_loss": self.ranks.all_reduce_sum(total).item() / len(val.rows)}


def held_out(n: int, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0..n-1 in two sorted parts, for training and for validation; a function of n, `part` and `seed` alone."""
    order = np.random.default_rng([seed, n]).permutation(n)
    n_val = max(1, round(part * n))
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def resolve(tokens: TokenFile, settings: PretrainSettings, device: str) -> tuple[ResolvedPretrain, Images]:
    """The settings with nothing left open, and the images to train on and to hold out.

    Raises:
        InputError: a value out of range (all are named), or too few images.
        MismatchError: a batch of more images than there are.
    """
    split = tokens.split("train")
    if "val" in tokens.splits:
        val = tokens.split("val")
        rows, val_rows = np.arange(len(split)), np.arange(len(val))
    elif len(split) < 2:
        raise InputError(
            f"{tokens.path}: the split 'train' has {len(split)} image; one to train and one to validate are needed"
        )
    else:
        check(settings)
        val, part = split, settings.val_part or (0.04 if len(split) >= MANY_IMAGES else 0.1)
        settings = replace(settings, val_part=part)
        rows, val_rows = held_out(len(split), part, settings.seed)
    found = resolve_settings(settings, len(rows), tokens.resolution, device)
    if found.batch_size > len(rows):
        raise MismatchError(
            f"batch_size {found.batch_size} is more than the {len(rows)} training images of {tokens.path}; "
            f"lower --batch-size"
        )
    if found.val_images and found.val_images < len(val_rows):
        # Evenly spread, as files are often sorted by class.
        val_rows = val_rows[np.linspace(0, len(val_rows) - 1, found.val_images).astype(np.int64)]
    return found, Images(rows, Subset(val, val_rows))


def resolve_settings(settings: PretrainSettings, n_train: int, resolution: int, device: str) -> ResolvedPretrain:
    """Fill in what was left open: first the preset's own values, then what fits the data and the device.

    Args:
        n_train: training images.
        resolution: R of the images; learning rates differ by it.
        device: its type, such as "cpu".

    Raises:
        InputError: values out of range; all are named.
    """
    check(settings)
    preset = find_preset(settings.model)
    values: dict[str, Any] = {"optimizer": "adamw", **preset.recipe, "mask_prob": MASK_PROB}
    values |= {"betas": values.get("betas", (0.9, 0.95)), "weight_decay": values.get("weight_decay", 0.0)}
    values["learning_rate"], _ = preset.learning_rate(settings.objective, resolution)
    if settings.steps or settings.epochs or settings.budget:
        values.pop("steps", None)
    if device == "cpu":
        values["val_images"] = CPU_VAL_IMAGES
    per_epoch = max(1, n_train // (settings.batch_size or values["batch_size"]))
    steps = steps_of(settings, per_epoch) or values.get("steps")
    # The paper warms up for one epoch; a short run gets a tenth of its steps, and one that ends by time 20 steps.
    values["warmup_steps"] = min(per_epoch, max(1, steps // 10) if steps else 20)
    found = resolved(ResolvedPretrain, settings, **values)
    check(found)
    return replace(found, steps=steps)
