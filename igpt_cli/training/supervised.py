"""Supervised training: a model of RGB images and its classes, augmented on the device that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_cli.device import autocast, choose_device
from igpt_cli.errors import InputError
from igpt_cli.files import file_sha256
from igpt_cli.model_dir import FINETUNED_FROM, WEIGHTS, ModelDir, check_fit, classes_of, load_model
from igpt_cli.model_input import takes_rgb
from igpt_cli.models.registry import UNTAUGHT, build_model, find_preset, model_config
from igpt_cli.statistics import wilson
from igpt_cli.tokens.loader import step_generator, view_draws
from igpt_cli.tokens.store import TokenFile, TokenSplit
from igpt_cli.training.augment import DRAWS, MEAN, STD, Views, drawn_mixture, smoothed
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.labelled import LabelledTask, best_accuracy, default_part, labelled, resumed_images
from igpt_cli.training.loop import Batch, Metrics
from igpt_cli.training.memory import MemoryPlan, measure_memory
from igpt_cli.training.objectives import Classification, Teacher, check_teacher, has_two_heads
from igpt_cli.training.optim import EMA, linear_maps
from igpt_cli.training.recipes import find_recipe, resolve_settings
from igpt_cli.training.settings import Execution, ResolvedTrain, TrainSettings, check, with_an_end
from igpt_cli.training.task import ALONE, Subset

#: The rate of stochastic depth, in the description of models that have it.
DROP_PATH = "drop_path_rate"
#: An image of fewer patches than this has little left for attention to do.
MANY_PATCHES = 16
#: How a preparation of images cuts them out.
FRAMING = ("crop", "filter")
TEACHER = "teacher"
#: The accuracies of a model's heads, as metrics; a model with one head has the first alone.
ACCURACIES = ("accuracy", "accuracy_class", "accuracy_distillation")


class Supervised(LabelledTask):
    """Learns the classes of RGB images: those that the token file kept (`tokenize --keep-rgb`), or its tokens' colours.

    Args:
        teacher: called on the same augmented images, where the settings distill.
    """

    name = "train"
    settings_type = TrainSettings
    resolved_type = ResolvedTrain
    metrics: tuple[str, ...] = ("accuracy",)
    score = staticmethod(best_accuracy)
    results = (
        "status", "steps", "images_seen", "train_loss", "val_loss", "val_accuracy", "accuracy", "interval",
        "accuracy_class", "accuracy_distillation", "n_test", "best", "seconds",
    )  # fmt: skip

    def __init__(self, *args: Any, teacher: ModelDir | None = None, **more: Any):
        self.teacher: Teacher | None = None  # while the memory is planned
        super().__init__(*args, **more)
        settings, name = self.settings, self.description["name"]
        stated = self.config.get("preparation") or {}
        self.colours = {k: tuple(stated.get(k, v)) for k, v in (("mean", MEAN), ("std", STD))}
        self.random_blocks = bool(settings.drop_path)
        if teacher:
            self.teacher = Teacher(replace(teacher, model=teacher.model.to(self.device)))
            self.metrics = ("label_loss", "teacher_loss", "accuracy")
        model = self.on_meta().model
        if has_two_heads(model) and not teacher:
            raise InputError(f"{name} has a distillation head, which learns from a teacher; name one (--teacher RUN)")
        if settings.optimizer == "muon":
            linear_maps(model)
        if self.memory.recompute and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise InputError(
                f"{name} has BatchNorm, whose running statistics --recompute would count twice; use a smaller "
                f"--micro-batch"
            )
        self.views = Views(settings.augment, settings.randaugment, settings.colour_jitter, settings.erasing)
        # With repeated augmentation a step has fewer images, and each of them several times.
        self.each = -(-settings.batch_size // settings.repeats)
        self.stream = self.make_loader(self.each)
        self.split = self.tokens.split("train")

    @classmethod
    def new(
        cls,
        model: str | ModelDir,
        tokens: TokenFile,
        settings: TrainSettings | None = None,
        execution: Execution | None = None,
        *,
        sizes: Mapping[str, Any] | None = None,
        teacher: ModelDir | None = None,
        device: str = "auto",
        ranks: Ranks = ALONE,
    ) -> Supervised:
        """
        Args:
            model: a preset's name, which is built for the images' resolution; or a trained model of RGB images, whose
                weights it starts from, and whose normalisation of colours it keeps. A class head of
                other classes, or of another order, is replaced by a fresh one.
            tokens: an open token file with labels.
            settings: what is learned.
            sizes: replace those of a preset, such as {"shift": False} for a Swin.
            teacher: a trained model with the same classes, for `settings.distill`; an RGB model or a fine-tuned iGPT.

        For the other arguments see `pretrain.Pretraining.new`.

        Raises:
            InputError, MismatchError: as there; labels or classes are missing; a model of tokens; a teacher that has
                other classes or sees other images.
        """
        requested, execution, chosen = settings or TrainSettings(), execution or Execution(), choose_device(device)
        check(execution)
        find_recipe(requested.recipe)
        check(requested)
        if (requested.distill == "none") != (teacher is None):
            raise InputError(
                f"distill is {requested.distill!r} and "
                + ("there is no teacher; name one" if teacher is None else "there is a teacher; say soft or hard")
            )
        if teacher is not None:
            check_teacher(teacher, tokens.resolution, tokens.classes)
        if isinstance(model, ModelDir):
            start = _from_trained(model, tokens, sizes, bool(teacher))
        else:
            start = _from_preset(model, tokens, sizes, requested)
        description, config, weights = start
        images = labelled(tokens, requested)
        requested = with_an_end(requested, execution, chosen.type)
        has = (description.get(DROP_PATH), chosen.type, ranks.world_size, weights is not None)
        found = resolve_settings(requested, len(images.rows), tokens.resolution, *has)
        if images.val.split.name == "train" and found.val_part is None:
            found = replace(found, val_part=default_part(images.labels))
        if found.drop_path is not None:
            description[DROP_PATH] = found.drop_path
        if teacher is not None:
            sha256 = file_sha256(teacher.path / WEIGHTS)
            config[TEACHER] = {"path": teacher.run, "name": teacher.name, "sha256": sha256}
        how = (found, execution, description, chosen, ranks, config, weights)
        return cls(tokens, labelled(tokens, found), *how, teacher=teacher)

    @classmethod
    def resumed(
        cls,
        tokens: TokenFile,
        config: dict[str, Any],
        settings: Any,
        execution: Execution,
        device: torch.device,
        ranks: Ranks,
        teacher: ModelDir | None = None,
    ) -> Supervised:
        """See `Task.resumed`; a model that it started from is not needed, a teacher is."""
        images, kept = resumed_images(tokens, settings, config), {"preparation": config.get("preparation")}
        return cls(tokens, images, settings, execution, config["model"], device, ranks, kept, teacher=teacher)

    def data_config(self) -> dict[str, Any]:
        """Which images these are, too."""
        return {**super().data_config(), "images": _images_of(self.tokens)}

    @classmethod
    def differences(cls, config: dict[str, Any], tokens: TokenFile) -> list[str]:
        """Other labels, or images of another kind."""
        was, now = config["data"]["images"], _images_of(tokens)
        other = [] if was == now else [f"the images were {was} and are now others ({tokens.path})"]
        return super().differences(config, tokens) + other

    def compiles(self) -> bool:
        """Only on request."""
        return bool(self.execution.compile)

    def plan_memory(self) -> MemoryPlan:
        """What fits the device by what autograd keeps."""
        how = (self.execution, self.device, self.ranks)
        return measure_memory(self._alone, self.example, self.settings.batch_size, *how)

    def make_loader(self, batch_size: int | None = None, augment: str | None = None):
        """The images in the order in which they are trained on; their pixels are augmented here, not their tokens."""
        return super().make_loader(batch_size, "none")

    def ema(self, model: nn.Module) -> EMA | None:
        """The moving average that the settings request."""
        return EMA(model, self.settings.ema) if self.settings.ema else None

    def flops_per_image(self) -> float:
        """FLOPs of training on one image: those of the forward pass, as torch counts them, three times."""
        from torch.utils.flop_counter import FlopCounterMode

        objective = self.on_meta().eval()
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            objective(*self.example(2))
        return 3 * counter.get_total_flops() / 2

    def state_bytes(self) -> int:
        """Weights, gradients and what the optimizer keeps: SGD's one moment, or at most Adam's two."""
        each = 12 if self.settings.optimizer == "sgd" else 16
        return each * sum(p.numel() for p in self.on_meta().parameters())

    def objective(self) -> Classification:
        """The model with its class head, and the loss."""
        return Classification(build_model(self.description), self.settings, self.teacher, **self.colours)

    def _alone(self) -> Classification:
        return Classification(build_model(self.description), self.settings)

    def on_meta(self) -> Classification:
        """The model without values or teacher, to be looked at."""
        with torch.device("meta"):
            return self._alone()

    def example(self, n: int) -> Batch:
        """A batch of n images with their targets."""
        R, C = self.tokens.resolution, self.description["n_classes"]
        return torch.zeros(n, 3, R, R), torch.full((n, C), 1 / C)

    def batch(self, step: int) -> Batch:
        """Augmented images in 0..1, and targets; on a GPU already."""
        settings, R, C = self.settings, self.tokens.resolution, self.description["n_classes"]
        part = self.ranks.shard(settings.batch_size)
        rows = self.stream.batch_indices(step)[np.arange(settings.batch_size)[part] % self.each]
        generator = step_generator(step, settings.seed)
        mixture = drawn_mixture(R, settings.mixup, settings.cutmix, generator)
        field = lru_cache(lambda: torch.from_numpy(generator.standard_normal((3, R, R), np.float32)))
        first = step * settings.batch_size
        u = view_draws(slice(first + part.start, first + part.stop), DRAWS, settings.seed)
        targets = smoothed(self._put(self.images.labels[rows]), C, settings.label_smoothing)
        return mixture(self.views(self.rgb(self.split, rows), u, field), targets)

    def rgb(self, split: TokenSplit, rows: np.ndarray) -> Tensor:
        """(B, 3, R, R) uint8: the images as they were kept, or the colours of their tokens."""
        rgb = split.decode(rows) if split.rgb is None else np.ascontiguousarray(split.rgb[rows])
        return self._put(rgb).permute(0, 3, 1, 2).contiguous()

    def _put(self, values: np.ndarray) -> Tensor:
        """An array as a tensor where images are augmented: on the GPU, else on the CPU (mps knows no float64)."""
        tensor = torch.from_numpy(values)
        return tensor.to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def validate(self, objective: nn.Module, give_up: Callable[[], bool]) -> Metrics | None:
        """Loss and accuracies on the held-out images."""
        sums = self.classify(objective, self.images.val, give_up)
        if sums is None:
            return None
        loss, *right = (sums / len(self.images.val.rows)).tolist()
        return {"val_loss": loss, **{f"val_{name}": 100 * r for name, r in zip(ACCURACIES, right)}}

    def tested(self, sums: Tensor, n: int) -> dict[str, Any]:
        """The accuracy, in percent, with its 95% Wilson interval, and that of each of two heads."""
        _, *right = sums.tolist()
        heads = {name: 100 * r / n for name, r in zip(ACCURACIES, right)}
        return {**heads, "interval": wilson(round(right[0]), n)}

    @torch.no_grad()
    def classify(
        self, objective: nn.Module, subset: Subset, give_up: Callable[[], bool] = lambda: False
    ) -> Tensor | None:
        """See `LabelledTask.classify`: the loss, and 1 for each right class, of each head where there are two."""
        sums = torch.zeros((), dtype=torch.float64)
        for places, n in self.shard_of(len(subset.rows)):
            if give_up():
                return None
            x = self.rgb(subset.split, subset.rows[places]).float() / 255
            targets = smoothed(self._put(subset.labels[places]), self.description["n_classes"], 0.0)
            with autocast(self.precision, self.device):
                out = objective(x.to(self.device), targets.to(self.device))  # (B, 1 + heads)
            sums = sums + out[:n].cpu().double().sum(0)
        return self.ranks.all_reduce_sum(sums)


Start = tuple[dict[str, Any], dict[str, Any], dict[str, Tensor] | None]
"""What training starts from: the model's description; config.json's preparation and origin; the weights not fresh."""


def _from_preset(model: str, tokens: TokenFile, sizes: Mapping[str, Any] | None, settings: TrainSettings) -> Start:
    """A preset with fresh weights, for the images' resolution and classes; `sizes` replace its own.

    Raises:
        InputError: an unknown name, or that of a model of tokens, which is pretrained and then fine-tuned; a decay of
            the learning rate by layers, which would spare nothing.
    """
    if find_preset(model).backend == "igpt":
        raise InputError(
            f"{model} is a model of tokens: it learns classes by igpt finetune RUN, or without pretraining by "
            f"igpt finetune RUN --from-scratch"
        )
    if settings.layer_decay != 1:
        raise InputError(
            f"layer_decay is {settings.layer_decay}, which spares trained layers, and {model} starts from fresh "
            f"weights; leave it out, or name a run or an import to start from"
        )
    sized = {**(sizes or {}), "resolution": tokens.resolution, "n_classes": len(tokens.classes)}
    preparation = {"size": tokens.resolution, "mean": list(MEAN), "std": list(STD)}
    return model_config(model, **sized), {"preparation": preparation}, None


def _from_trained(run: ModelDir, tokens: TokenFile, sizes: Mapping[str, Any] | None, taught: bool) -> Start:
    """A trained model, with a fresh class head unless it has just these classes, in this order.

    Without a teacher a model continues without the head that only a teacher's decisions train.

    Raises:
        InputError: a model of tokens, or `sizes`, which it has already.
        MismatchError: images of another size.
    """
    check_trained(run)
    if sizes:
        raise InputError(f"{run.run} has its sizes already; leave out {', '.join(sizes)}, or name a preset")
    check_fit(run, tokens)
    description = {**run.config["model"], "n_classes": len(tokens.classes)}
    if not taught:
        description["backend"] = UNTAUGHT.get(description["backend"], description["backend"])
    same = classes_of(run.config) == list(tokens.classes)
    with torch.device("meta"):
        retained = build_model({k: v for k, v in description.items() if same or k != "n_classes"}).state_dict()
    origin = {"path": run.run, "sha256": file_sha256(run.path / WEIGHTS), "head": "kept" if same else "fresh"}
    weights = {k: v.cpu() for k, v in run.model.state_dict().items() if k in retained}
    stated = run.config.get("preparation") or {}
    # Images are normalised as before, and cut out as these were.
    framing = {k: stated[k] for k in FRAMING if k in stated}
    as_stated = all(tokens.preprocess.get(k, "unknown") == v for k, v in framing.items())
    preparation = {
        "size": tokens.resolution,
        "mean": stated.get("mean", [0.0] * 3),
        "std": stated.get("std", [1.0] * 3),
        **(framing if as_stated else {}),
    }
    return description, {"preparation": preparation, FINETUNED_FROM: origin}, weights


def few_patches(description: Mapping[str, Any]) -> str | None:
    """What to say of a model that cuts its images into fewer than 16 patches; None of any other.

    >>> few_patches({"name": "vit-b16", "resolution": 32, "patch_size": 16})
    'note: vit-b16 cuts 32x32 pixels into 4 patches, few for attention; smaller ones see more, as in vit-ti-32'
    >>> few_patches({"name": "vit-ti-32", "resolution": 32, "patch_size": 4})
    """
    R, P = description["resolution"], description.get("patch_size")
    n = (R // P) ** 2 if P else MANY_PATCHES
    if n >= MANY_PATCHES:
        return None
    return (
        f"note: {description['name']} cuts {R}x{R} pixels into {n} patch{'es' if n > 1 else ''}, few for attention; "
        f"smaller ones see more, as in vit-ti-{64 if R > 32 else 32}"
    )


def check_trained(run: ModelDir) -> None:
    """
    Raises:
        InputError: a model of tokens, which `igpt finetune` fine-tunes.
    """
    if not takes_rgb(run):
        raise InputError(f"{run.run} is {run.name}, a model of tokens; fine-tune it with: igpt finetune {run.run}")


def recorded_teacher(config: dict[str, Any], teacher: ModelDir | None) -> tuple[ModelDir | None, list[str]]:
    """The teacher of a run that is resumed, by default the one that config.json names, and how it differs."""
    if TEACHER not in config:
        return None, []
    teacher = teacher or load_model(config[TEACHER]["path"])
    same = file_sha256(teacher.path / WEIGHTS) == config[TEACHER]["sha256"]
    return teacher, [] if same else [f"the teacher's weights are others now ({teacher.run})"]


def _images_of(tokens: TokenFile) -> str:
    return "tokens" if tokens.split("train").rgb is None else "rgb"
