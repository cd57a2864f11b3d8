"""What a recipe comes to on a machine: the images, the model, the batches, the validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from igpt_cli.device import autocast, choose_precision
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.models.registry import build_model
from igpt_cli.planning.cost import flops_per_token, state_bytes
from igpt_cli.tokens.loader import TokenLoader, fixed_mask
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.distributed import Ranks, distribute
from igpt_cli.training.ema import EMA
from igpt_cli.training.fitting import Fit, fit, tried
from igpt_cli.training.loop import Batch, Found, lowest_loss
from igpt_cli.training.objectives import Objective
from igpt_cli.training.optim import make_optimizers
from igpt_cli.training.recipe import MANY_IMAGES, Execution, Learning, Recipe, check_recipe, resolve_recipe
from igpt_cli.training.speed import checkpoint_activations, compile_blocks, require_compiler


@dataclass(frozen=True)
class Data:
    """The images of a run: those to train on, by row of the split "train", and those held out."""

    rows: np.ndarray
    val: np.ndarray  # (N, T)
    val_rows: np.ndarray  # (N,) which rows of their split these are


def held_out(n: int, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0..n-1 in two sorted parts, for training and for validation; a function of n, `part` and `seed` alone."""
    order = np.random.default_rng([seed, n]).permutation(n)
    n_val = max(1, round(part * n))
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def resolve(tokens: TokenFile, recipe: Recipe, device: torch.device) -> tuple[Recipe, Data]:
    """The whole recipe, and the images that it trains on and holds out."""
    split = tokens.split("train")
    if "val" in tokens.splits:
        rows, val, val_rows = np.arange(len(split)), tokens.split("val").tokens, np.arange(len(tokens.split("val")))
    elif len(split) < 2:
        raise InputError(
            f"{tokens.path}: the split 'train' has {len(split)} image; one to train and one to validate are needed"
        )
    else:
        if recipe.val_part is None:
            recipe = replace(recipe, val_part=0.04 if len(split) >= MANY_IMAGES else 0.1)
        check_recipe(recipe)
        rows, val_rows = held_out(len(split), recipe.val_part, recipe.seed)
        val = split.tokens
    recipe = resolve_recipe(recipe, len(rows), tokens.resolution, device)
    if recipe.batch_size > len(rows):
        raise MismatchError(
            f"batch_size {recipe.batch_size} is more than the {len(rows)} training images of {tokens.path}; "
            f"lower --batch-size"
        )
    if recipe.val_images and recipe.val_images < len(val_rows):
        # Evenly spread, as files are often sorted by class.
        val_rows = val_rows[np.linspace(0, len(val_rows) - 1, recipe.val_images).astype(np.int64)]
    return recipe, Data(rows, np.ascontiguousarray(val[val_rows]), val_rows)


class Setup:
    """A recipe on a machine: what is trained, and how. This one pretrains; fine-tuning puts its own in place of
    `objective`, `begin`, `batch`, `validate` and `finish` (`classify.Classifying`).

    Args:
        tokens: an open token file.
        data: has `rows`, those of the split "train" to train on.
        recipe, execution: resolved and checked.
        description: the model, as config.json has it.
    """

    #: What the loop is to tell beside the loss, how good a validation is, and for how long none may be better.
    told: tuple[str, ...] = ()
    score = staticmethod(lowest_loss)
    patience: int | None = None
    #: The state dict that training starts from, instead of fresh weights.
    initial: Mapping[str, Tensor] | None = None
    #: Whether the blocks draw random numbers.
    random_blocks = False

    def __init__(self, tokens, data: Any, recipe: Learning, execution: Execution, description, device, ranks: Ranks):
        self.recipe, self.execution, self.device, self.ranks = recipe, execution, device, ranks
        self.tokens, self.description, self.data = tokens, description, data
        self.n_ctx = tokens.resolution**2
        self.precision = choose_precision(execution.precision, device)
        self.compile = device.type == "cuda" if execution.compile is None else execution.compile
        if self.compile:
            require_compiler(device)
        self.fit = self.fitted()
        self.loader = self.make_loader(recipe.batch_size, recipe.augment)
        self.eval_every = execution.eval_every or self.loader.steps_per_epoch

    @property
    def machine(self) -> dict[str, Any]:
        """For config.json: what was taken where the execution left it open."""
        return {
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "ranks": self.ranks.world_size,
            "precision": self.precision,
            "compile": self.compile,
            "micro_batch": self.fit.micro_batch,
            "accumulate": self.recipe.batch_size // self.ranks.world_size // self.fit.micro_batch,
            "recompute": self.fit.recompute,
            "shard": self.fit.shard,
            "eval_every": self.eval_every,
        }

    def fitted(self) -> Fit:
        """What fits the device by the model's cost."""
        recipe = self.recipe
        how = (self.execution, self.precision, self.device, self.ranks)
        return fit(self.description, recipe.batch_size, recipe.optimizer, *how)

    def make_loader(self, batch_size: int, augment: str) -> TokenLoader:
        """The images in the order in which they are trained on."""
        split, seed = self.tokens.split("train"), self.recipe.seed
        return TokenLoader(split.tokens, self.tokens.resolution, batch_size, seed, augment, self.data.rows)

    def optimizers(self, model: nn.Module, **rates: Any) -> list[torch.optim.Optimizer]:
        """What updates a model's weights; `rates`, of its parts, as for `make_optimizers`."""
        recipe = self.recipe
        rate, betas, weight_decay = recipe.learning_rate, recipe.betas, recipe.weight_decay
        return make_optimizers(model, recipe.optimizer, rate, betas, weight_decay, **rates)

    def average(self, model: nn.Module) -> EMA | None:
        """The moving average of a model's weights, where one is wanted."""
        return None

    def flops_per_image(self) -> float:
        """FLOPs of training on one image, forward and backward."""
        return self.n_ctx * flops_per_token(self.description)

    def state_bytes(self) -> int:
        """Weights, gradients and what the optimizer keeps."""
        return state_bytes(self.description, self.recipe.optimizer)

    def build(self) -> tuple[Objective, nn.Module]:
        """The objective, whose initial weights are drawn by the seed alone; alone, and as all ranks train it."""
        sharded = self.fit.shard == "full"
        objective = None
        if not sharded or self.ranks.first:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.recipe.seed)
                objective = self.objective()
                self.begin(objective.model)
        weights = objective.model.state_dict() if sharded and objective else {}
        if sharded:
            with torch.device("meta"):
                objective = self.objective()
        else:
            objective.to(self.device)
        if self.fit.recompute:
            checkpoint_activations(objective.model, self.random_blocks)
        if self.compile:
            compile_blocks(objective)
        if not sharded and self.execution.micro_batch is None and self.execution.accumulate is None:
            reserve = self.state_bytes() // 2
            self.fit = tried(objective, self.fit, self.example, self.precision, reserve, self.device, self.ranks)
        shared = distribute(objective, self.ranks, self.device, self.fit.shard)
        if sharded:
            objective.to_empty(device=self.device)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.ranks.world_size > 1)
            set_model_state_dict(objective.model, weights, options=options)
            self.fill_tables(objective.model)
        return objective, shared

    def objective(self) -> Any:
        """The model with its loss, and fresh weights."""
        return Objective(build_model(self.description))

    def fill_tables(self, model: nn.Module) -> None:
        """Buffers that no checkpoint has, such as tables of relative positions, in a model made on the meta device."""
        tables = {k: v for k, v in model.named_buffers() if k not in model.state_dict()}
        if tables:
            with torch.random.fork_rng(devices=[]):
                made = dict(self.objective().model.named_buffers())
            for k, v in tables.items():
                v.copy_(made[k])

    def example(self, n: int) -> Batch:
        """A batch of n images, of the right shapes and types, on torch's default device."""
        tokens = torch.zeros((n, self.n_ctx), dtype=torch.int64)
        return tokens, *([tokens.bool()] if self.description["objective"] == "bert" else [])

    def begin(self, model: nn.Module) -> None:
        """Put other weights than fresh ones into a model that begins to train."""
        if self.initial is not None:
            model.load_state_dict(self.initial)

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of a step."""
        part = self.ranks.share(self.recipe.batch_size)
        return torch.from_numpy(self.loader.batch(step, part)), *self.masks(step, part)

    def masks(self, step: int, part: slice) -> Batch:
        """BERT's mask of a part of a batch; nothing for AR."""
        if self.description["objective"] == "ar":
            return ()
        return (torch.from_numpy(self.loader.mask(step, self.recipe.mask_prob, part)),)

    def fixed_mask(self, rows: np.ndarray, draw: int = 0) -> torch.Tensor | None:
        """The mask, fixed by the seed, with which BERT looks at the images of these rows of a split; None for AR."""
        if self.description["objective"] == "ar":
            return None
        drawn = fixed_mask(rows, self.n_ctx, self.recipe.mask_prob, self.recipe.seed, draw)
        return torch.from_numpy(drawn).to(self.device)

    def shared_out(self, n: int) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's share of n images to look at, a batch at a time: places (B,) in 0..n-1, and how many count.

        All batches have one shape, for which the blocks are compiled, and every rank gets as many, as sharded weights
        need them all: the last are filled up with images that do not count.
        """
        size, ranks = self.fit.micro_batch, self.ranks
        for turn in range(-(-n // (size * ranks.world_size))):
            start = (turn * ranks.world_size + ranks.rank) * size
            yield np.arange(start, start + size) % n, max(0, min(size, n - start))

    @torch.no_grad()
    def validate(self, objective: nn.Module, give_up: Callable[[], bool]) -> Found | None:
        """The mean loss over the held-out images, which the ranks share; BERT's masks are fixed by the seed."""
        data, total = self.data, torch.zeros((), dtype=torch.float64)
        for places, n in self.shared_out(len(data.val)):
            if give_up():
                return None
            tokens = torch.from_numpy(data.val[places].astype(np.int64)).to(self.device)
            with autocast(self.precision, self.device):
                losses = objective(tokens, self.fixed_mask(data.val_rows[places]))
            total += losses[:n].cpu().double().sum()
        return {"val_loss": self.ranks.total(total).item() / len(data.val)}

    def finish(self, objective: Objective, shared: nn.Module, run: Path) -> dict[str, Any]:
        """What is left to do when training has ended of itself; what it gives stands in the run's result."""
        return {}
