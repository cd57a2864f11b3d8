"""What supervised training learns (`Supervision`), and the published recipes as data (`RECIPES`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from igpt_cli.errors import InputError, MismatchError, unknown
from igpt_cli.training.augment import FRAMES, MOST
from igpt_cli.training.optim import OPTIMIZERS
from igpt_cli.training.recipe import CPU_VAL_IMAGES, Learning, problems_of
from igpt_cli.training.tuning import SMALLER

DISTILLATIONS = ("none", "soft", "hard")
#: Images in a step on a CPU, where a recipe's batch could take minutes.
CPU_BATCH = 64
#: Steps of warm-up at most in a run that ends by time.
WARMUP = 20


@dataclass(frozen=True)
class Supervision(Learning):
    """Every setting that decides what supervised training learns; for those of every training see `Learning`.

    `None` stands for what `recipe` says; 0 switches off what can be off.

    augment: how images are framed, one of `augment.FRAMES`.
    randaugment: strength of RandAugment, 0 to 10. colour_jitter: by how much of themselves brightness, contrast and
        colour vary. erasing: probability that a box of an image becomes noise.
    mixup, cutmix: of the Beta distribution that a step's share is drawn from; with both, one of them is drawn.
    label_smoothing: the part of the target that all classes share.
    repeats: views of each image in a step.
    drop_path: stochastic depth's rate at the last block; models without it have None.
    ema: decay of the moving average of the weights, which is then validated and published.
    distill: what is learned from a teacher: "none", its probabilities ("soft") or its decision ("hard").
        tau: temperature of "soft". distill_weight: the teacher's part in the loss; None is the paper's, 0.1 of "soft",
        half of "hard".
    head_learning_rate, layer_decay, labels_per_class, patience, test_images: as for `tuning.Tuning`; patience 0 goes
        on.
    """

    augmentations: ClassVar[tuple[str, ...]] = FRAMES
    optimizers: ClassVar[tuple[str, ...]] = OPTIMIZERS

    betas: tuple[float, float] | None = None  # type: ignore[assignment]
    weight_decay: float | None = None  # type: ignore[assignment]
    augment: str | None = None  # type: ignore[assignment]
    recipe: str = "plain"
    randaugment: float | None = None
    colour_jitter: float | None = None
    erasing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    label_smoothing: float | None = None
    repeats: int | None = None
    drop_path: float | None = None
    ema: float | None = None
    distill: str = "none"
    tau: float = 3.0
    distill_weight: float | None = None
    head_learning_rate: float | None = None
    layer_decay: float = 1.0
    labels_per_class: int | None = None
    patience: int = 0
    test_images: int | None = None

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with their neighbours."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True)
class Published:
    """A recipe: `settings` of `Supervision`, and what they follow from.

    images_per_rate: the learning rate is for batches of so many images, and grows with them; None: for any.
    epochs, warmup_epochs: of the whole run; a shorter one warms up for as large a part of it.
    drop_path: None is the model preset's own.
    """

    settings: dict[str, Any]
    learning_rate: float
    images_per_rate: int | None
    epochs: int
    warmup_epochs: int
    drop_path: float | None
    about: str


_OFF = {
    "augment": "none",
    "randaugment": 0.0,
    "colour_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "repeats": 1,
    "ema": 0.0,
    "clip": 0.0,
    "optimizer": "adamw",
    "betas": (0.9, 0.999),
    "weight_decay": 0.05,
}
_STRONG = {
    **_OFF,
    "batch_size": 1024,
    "augment": "resized-crop-flip",
    "randaugment": 9.0,
    "erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}

RECIPES: dict[str, Published] = {
    "plain": Published(
        {**_OFF, "batch_size": 128, "clip": 1.0},
        learning_rate=1e-3,
        images_per_rate=None,
        epochs=100,
        warmup_epochs=5,
        drop_path=0.0,
        about="no augmentation: what is asked for is added, such as --augment crop-flip",
    ),
    "deit": Published(
        {**_STRONG, "repeats": 3},
        learning_rate=5e-4,
        images_per_rate=512,
        epochs=300,
        warmup_epochs=5,
        drop_path=0.1,
        about="Touvron et al. 2021, table 9",
    ),
    "swin": Published(
        {**_STRONG, "clip": 1.0},
        learning_rate=1e-3,
        images_per_rate=1024,
        epochs=300,
        warmup_epochs=20,
        drop_path=None,
        about="Liu et al. 2021, section 4.1: DeiT's without repeated augmentation, the gradient clipped",
    ),
    "resnet": Published(
        {**_OFF, "batch_size": 256, "augment": "resized-crop-flip", "optimizer": "sgd", "weight_decay": 1e-4},
        learning_rate=0.1,
        images_per_rate=256,
        epochs=90,
        warmup_epochs=5,
        drop_path=0.0,
        about="He et al. 2016, section 3.4: SGD; as long, and warmed up, as in Goyal et al. 2017",
    ),
}
#: Up to this resolution the published code crops after padding, as a part of so small an image shows too little.
SMALL = 32


def find_recipe(name: str) -> Published:
    """The recipe of that name.

    Raises:
        InputError: there is none; the message lists the known names and the nearest.
    """
    if name in RECIPES:
        return RECIPES[name]
    raise unknown("recipe", name, RECIPES)


def resolve_supervision(
    asked: Supervision,
    n_train: int,
    resolution: int,
    drop_path: float | None,
    device: torch.device,
    n_ranks: int = 1,
    trained: bool = False,
) -> Supervision:
    """Fill in what was left open: from the recipe, then by what fits the data and the device.

    Learning rate and weight decay go with the optimizer: where another one is asked for than the recipe's, SGD takes
    those of the recipe "resnet", and in its place AdamW and Muon take those of "plain".

    Args:
        n_train: labelled training images.
        resolution: R of the images.
        drop_path: the model preset's own rate; None for a model without stochastic depth.
        trained: the model begins with trained weights; its learning rate is a tenth.

    Raises:
        InputError: values out of range; all are named.
        MismatchError: a batch of more images than there are, or that cannot be mixed in pairs.
    """
    recipe = find_recipe(asked.recipe)
    settings, rates = dict(recipe.settings), recipe
    if ((asked.optimizer or settings["optimizer"]) == "sgd") != (settings["optimizer"] == "sgd"):
        rates = RECIPES["resnet" if asked.optimizer == "sgd" else "plain"]
        settings["weight_decay"] = rates.settings["weight_decay"]
    if settings["augment"] == "resized-crop-flip" and resolution <= SMALL:
        settings["augment"] = "crop-flip"
    if device.type == "cpu":
        settings |= {"val_images": CPU_VAL_IMAGES, "batch_size": min(CPU_BATCH, settings["batch_size"])}
    if not (asked.steps or asked.epochs or asked.budget):
        settings["epochs"] = recipe.epochs
    if drop_path is not None:
        settings["drop_path"] = drop_path if recipe.drop_path is None else recipe.drop_path
    elif asked.drop_path:
        raise InputError(f"drop_path is {asked.drop_path}, but this model has no stochastic depth; leave it out")
    found = replace(asked, **{k: v for k, v in settings.items() if getattr(asked, k) is None})
    if asked.batch_size is None:
        even = n_ranks * (2 if found.mixes else 1)
        found = replace(found, batch_size=max(even, min(found.batch_size, n_train // even * even)))
    if found.learning_rate is None:
        times = found.batch_size / rates.images_per_rate if rates.images_per_rate else 1
        found = replace(found, learning_rate=rates.learning_rate * times / (SMALLER if trained else 1))
    if found.distill_weight is None and found.distill != "none":
        found = replace(found, distill_weight=0.1 if found.distill == "soft" else 0.5)
    found = replace(found, clip=found.clip or None, ema=found.ema or None)
    check_supervision(found)
    if found.batch_size > n_train:
        raise MismatchError(
            f"batch_size {found.batch_size} is more than the {n_train} labelled training images; lower --batch-size"
        )
    if found.mixes and found.batch_size % (2 * n_ranks):
        raise MismatchError(
            f"mixup and CutMix mix images in pairs, and batch_size {found.batch_size} is no multiple of {2 * n_ranks}, "
            f"two for each of {n_ranks} ranks; change --batch-size, or --mixup 0 --cutmix 0"
        )
    per_epoch = max(1, n_train // found.batch_size)
    if found.epochs is not None:
        steps = max(1, round(found.epochs * per_epoch))
        found = replace(found, steps=min(found.steps or steps, steps))
    if found.warmup_steps is None:
        warmup = WARMUP
        if found.steps:
            warmup = min(recipe.warmup_epochs * per_epoch, -(-found.steps * recipe.warmup_epochs // recipe.epochs))
        found = replace(found, warmup_steps=warmup)
    return found


def check_supervision(asked: Supervision) -> None:
    """Raise InputError that names every value out of range; None passes."""
    problems = problems_of(replace(asked, clip=asked.clip or None))  # 0 does not clip
    for name in ("mixup", "cutmix", "patience", "colour_jitter", "tau"):
        value = getattr(asked, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            problems.append(f"{name} is {value}, expected 0 or more")
    for name in ("erasing", "label_smoothing", "drop_path", "ema", "distill_weight"):
        value = getattr(asked, name)
        if value is not None and not 0 <= value <= (1 if name in ("erasing", "distill_weight") else 1 - 1e-9):
            problems.append(f"{name} is {value}, expected a part of 1")
    if asked.randaugment is not None and not 0 <= asked.randaugment <= MOST:
        problems.append(f"randaugment is {asked.randaugment}, expected 0 to {MOST:g}")
    for name in ("repeats", "labels_per_class", "test_images"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            problems.append(f"{name} is {value}, expected at least 1")
    if asked.distill not in DISTILLATIONS:
        problems.append(f"distill is {asked.distill!r}, expected one of {', '.join(DISTILLATIONS)}")
    if asked.tau == 0:
        problems.append("tau is 0, expected more than 0")
    if problems:
        raise InputError("; ".join(problems))
