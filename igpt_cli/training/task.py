"""What a run learns: the model and its loss, the batch of a step, what is validated, what is done at the end.

`pretrain.Pretraining`, `finetune.Finetuning` and `supervised.Supervised` are the three tasks; `run` executes any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from igpt_cli.device import choose_precision
from igpt_cli.models.registry import build_model, count_parameters
from igpt_cli.planning.cost import flops_per_token, state_bytes
from igpt_cli.tokens.loader import TokenLoader, fixed_mask
from igpt_cli.tokens.store import TokenFile, TokenSplit
from igpt_cli.training.distributed import Ranks, distribute
from igpt_cli.training.loop import Batch, Metrics, lowest_loss
from igpt_cli.training.memory import (
    MemoryPlan,
    checkpoint_activations,
    compile_blocks,
    plan_memory,
    reduce_until_it_fits,
    require_compiler,
)
from igpt_cli.training.objectives import Objective
from igpt_cli.training.optim import EMA, make_optimizers
from igpt_cli.training.settings import Execution, LearningSettings, Resolved

ALONE = Ranks()


@dataclass(frozen=True)
class Subset:
    """Images of a split: `rows` (n,) int64, rising, and their `labels` (n,) int64 where they are looked at."""

    split: TokenSplit
    rows: np.ndarray
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class Images:
    """The images of a run: those to train on, by row of the split "train", those held out, and those to test on.

    labels: of every image of the split "train". unlabelled: images left out for want of a label, by split.
    """

    rows: np.ndarray
    val: Subset
    test: Subset | None = None
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    unlabelled: dict[str, int] = field(default_factory=dict)


class Task:
    """What is learned, on a device.

    Args:
        tokens: an open token file.
        images: which of its images are used.
        settings, execution: resolved and checked.
        description: the model, as config.json has it.
        config: what else config.json has: whose weights training starts from, and the like.
        weights: a state dict, or a part of one, that training starts from instead of fresh weights.
    """

    #: config.json's "task", and the command of igpt that makes such runs.
    name: ClassVar[str]
    settings_type: ClassVar[type[LearningSettings]]
    resolved_type: ClassVar[type[Resolved]]
    #: What stands under "result" in config.json, of `run.RunResult`.
    results: ClassVar[tuple[str, ...]] = (
        "status", "steps", "tokens_seen", "train_loss", "val_loss", "best", "seconds",
    )  # fmt: skip
    #: What the objective returns after the loss.
    metrics: tuple[str, ...] = ()
    #: How good a validation is; for how many validations none may be better.
    score: Callable[[Metrics], tuple[float, ...]] = staticmethod(lowest_loss)
    patience: int | None = None
    #: Whether the blocks draw random numbers.
    random_blocks = False

    def __init__(
        self,
        tokens: TokenFile,
        images: Images,
        settings: Any,
        execution: Execution,
        description: dict[str, Any],
        device: torch.device,
        ranks: Ranks = ALONE,
        config: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ):
        self.tokens, self.images, self.settings, self.execution = tokens, images, settings, execution
        self.description, self.device, self.ranks = description, device, ranks
        self.config, self.weights = dict(config or {}), weights
        self.n_ctx = tokens.resolution**2
        self.precision = choose_precision(execution.precision, device)
        self.compile = self.compiles()
        if self.compile:
            require_compiler(device)
        self.memory = self.plan_memory()
        self.loader = self.make_loader()
        self.eval_every = execution.eval_every or self.loader.steps_per_epoch

    # What a run is made of; tasks have their own.

    def objective(self) -> Any:
        """The model with its loss, and fresh weights."""
        return Objective(build_model(self.description))

    def initialise(self, model: nn.Module) -> None:
        """Give a fresh model the weights that training starts from."""
        if self.weights is not None:
            model.load_state_dict({**model.state_dict(), **self.weights})

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of a step."""
        raise NotImplementedError

    def example(self, n: int) -> Batch:
        """A batch of n images, whatever is in them."""
        raise NotImplementedError

    def validate(self, objective: nn.Module, give_up: Callable[[], bool]) -> Metrics | None:
        """Metrics of the held-out images; None when `give_up` says so."""
        raise NotImplementedError

    def finish(self, objective: Any, shared: nn.Module, run: Path) -> dict[str, Any]:
        """What is done when training has ended of itself; its metrics become the run's results."""
        return {}

    def prepared(self, train: Callable[[Task], Any], say: Callable[[str], object]) -> Task:
        """The task with what only short runs can find, such as a learning rate.

        Args:
            train: trains another task; its run leaves nothing on disk.
        """
        return self

    def data_config(self) -> dict[str, Any]:
        """What config.json's "data" has of the images."""
        return {
            "n_train": len(self.images.rows),
            "n_val": len(self.images.val.rows),
            "tokens_per_step": self.settings.batch_size * self.n_ctx,
        }

    @classmethod
    def differences(cls, config: dict[str, Any], tokens: TokenFile) -> list[str]:
        """How these images differ from those of the run, apart from their tokens; each with both values."""
        return []

    @classmethod
    def resumed(cls, tokens: TokenFile, config: dict[str, Any], settings: Any, *where: Any, **more: Any) -> Task:
        """The task of a run that is resumed; its weights come from the checkpoint.

        Args:
            config: the run's config.json.
            where: execution, device, ranks.
        """
        raise NotImplementedError

    # How it fits a device.

    def compiles(self) -> bool:
        """Whether the blocks are compiled."""
        return self.device.type == "cuda" if self.execution.compile is None else self.execution.compile

    def plan_memory(self) -> MemoryPlan:
        """What fits the device by the model's cost."""
        how = (self.execution, self.precision, self.device, self.ranks)
        return plan_memory(self.description, self.settings.batch_size, self.settings.optimizer, *how)

    def make_loader(self, batch_size: int | None = None, augment: str | None = None) -> TokenLoader:
        """The images in the order in which they are trained on."""
        settings, split = self.settings, self.tokens.split("train")
        how = (batch_size or settings.batch_size, settings.seed, augment or settings.augment)
        return TokenLoader(split.tokens, self.tokens.resolution, *how, self.images.rows)

    def optimizers(self, model: nn.Module, **rates: Any) -> list[torch.optim.Optimizer]:
        """What updates a model's weights; `rates`, of its parts, as for `make_optimizers`."""
        s = self.settings
        return make_optimizers(model, s.optimizer, s.learning_rate, s.betas, s.weight_decay, **rates)

    def ema(self, model: nn.Module) -> EMA | None:
        """The moving average of a model's weights, where one is requested."""
        return None

    def n_parameters(self) -> int:
        """The model's parameters."""
        with torch.device("meta"):
            return count_parameters(build_model(self.description))

    def flops_per_image(self) -> float:
        """FLOPs of training on one image, forward and backward."""
        return self.n_ctx * flops_per_token(self.description)

    def state_bytes(self) -> int:
        """Weights, gradients and what the optimizer keeps."""
        return state_bytes(self.description, self.settings.optimizer)

    @property
    def machine(self) -> dict[str, Any]:
        """For config.json: what was taken where the execution left it open."""
        return {
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "ranks": self.ranks.world_size,
            "precision": self.precision,
            "compile": self.compile,
            "micro_batch": self.memory.micro_batch,
            "accumulate": self.settings.batch_size // self.ranks.world_size // self.memory.micro_batch,
            "recompute": self.memory.recompute,
            "shard": self.memory.shard,
            "eval_every": self.eval_every,
        }

    def build(self) -> tuple[Any, nn.Module]:
        """The objective, whose fresh weights are drawn by the seed alone: by itself, and as all ranks train it."""
        sharded = self.memory.shard == "full"
        objective: Any = None
        if not sharded or self.ranks.first:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.settings.seed)
                objective = self.objective()
                self.initialise(objective.model)
        weights = objective.model.state_dict() if sharded and self.ranks.first else {}
        if sharded:
            with torch.device("meta"):
                objective = self.objective()
        else:
            objective.to(self.device)
        if self.memory.recompute:
            checkpoint_activations(objective.model, self.random_blocks)
        if self.compile:
            compile_blocks(objective)
        if not sharded and self.execution.micro_batch is None and self.execution.accumulate is None:
            how = (self.example, self.precision, self.state_bytes() // 2, self.device, self.ranks)
            self.memory = reduce_until_it_fits(objective, self.memory, *how)
        shared = distribute(objective, self.ranks, self.device, self.memory.shard)
        if sharded:
            objective.to_empty(device=self.device)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.ranks.world_size > 1)
            set_model_state_dict(objective.model, weights, options=options)
            self._fill_tables(objective.model)
        return objective, shared

    def _fill_tables(self, model: nn.Module) -> None:
        """Buffers that no checkpoint has, such as tables of relative positions, in a model made on the meta device."""
        tables = {k: v for k, v in model.named_buffers() if k not in model.state_dict()}
        if tables:
            with torch.random.fork_rng(devices=[]):
                made = dict(self.objective().model.named_buffers())
            for k, v in tables.items():
                v.copy_(made[k])

    # What the tasks share.

    def shard_of(self, n: int) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's shard of n images to evaluate, a batch at a time: places (B,) in 0..n-1, and how many count.

        All batches have one shape, for which the blocks are compiled, and every rank gets as many, as sharded weights
        need them all: the last are filled up with images that do not count.
        """
        size, ranks = self.memory.micro_batch, self.ranks
        for turn in range(-(-n // (size * ranks.world_size))):
            start = (turn * ranks.world_size + ranks.rank) * size
            yield np.arange(start, start + size) % n, max(0, min(size, n - start))

    @property
    def masked(self) -> bool:
        """Whether the model predicts masked pixels (BERT)."""
        return self.description["objective"] == "bert"

    def masks(self, step: int, part: slice) -> Batch:
        """BERT's mask of a part of a batch; nothing for AR."""
        return (torch.from_numpy(self.loader.mask(step, self.settings.mask_prob, part)),) if self.masked else ()

    def fixed_mask(self, rows: np.ndarray, draw: int = 0) -> Tensor | None:
        """The mask, fixed by the seed, under which BERT sees the images of these rows of a split; None for AR."""
        if not self.masked:
            return None
        drawn = fixed_mask(rows, self.n_ctx, self.settings.mask_prob, self.settings.seed, draw)
        return torch.from_numpy(drawn).to(self.device)
