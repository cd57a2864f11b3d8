"""The published recipes of supervised training, as data, and the settings that a run gets from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from igpt_cli.errors import InputError, MismatchError, unknown
from igpt_cli.training.finetune import SMALLER
from igpt_cli.training.settings import CPU_VAL_IMAGES, ResolvedTrain, TrainSettings, check, resolved, steps_of

#: Images in a step on a CPU, where a recipe's batch could take minutes.
CPU_BATCH = 64
#: Steps of warm-up at most in a run that ends by time.
WARMUP = 20


@dataclass(frozen=True)
class Published:
    """A recipe: `settings` of `TrainSettings`, and what they follow from.

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
        about="no augmentation but what is requested, such as --augment crop-flip",
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


def resolve_settings(
    settings: TrainSettings,
    n_train: int,
    resolution: int,
    drop_path: float | None,
    device: str,
    n_ranks: int = 1,
    trained: bool = False,
) -> ResolvedTrain:
    """Fill in what was left open: from the recipe, then by what fits the data and the device.

    Learning rate and weight decay go with the optimizer: where another one is requested than the recipe's, SGD takes
    those of the recipe "resnet", and in its place AdamW and Muon take those of "plain".

    Args:
        n_train: labelled training images.
        resolution: R of the images.
        drop_path: the model preset's own rate; None for a model without stochastic depth.
        device: its type, such as "cpu".
        trained: the model starts from trained weights; its learning rate is a tenth.

    Raises:
        InputError: values out of range; all are named.
        MismatchError: a batch of more images than there are, or that cannot be mixed in pairs.
    """
    check(settings)
    recipe = find_recipe(settings.recipe)
    values, rates = dict(recipe.settings), recipe
    if ((settings.optimizer or values["optimizer"]) == "sgd") != (values["optimizer"] == "sgd"):
        rates = RECIPES["resnet" if settings.optimizer == "sgd" else "plain"]
        values["weight_decay"] = rates.settings["weight_decay"]
    if values["augment"] == "resized-crop-flip" and resolution <= SMALL:
        values["augment"] = "crop-flip"
    if device == "cpu":
        values |= {"val_images": CPU_VAL_IMAGES, "batch_size": min(CPU_BATCH, values["batch_size"])}
    if not (settings.steps or settings.epochs or settings.budget):
        values["epochs"] = recipe.epochs
    if drop_path is not None:
        values["drop_path"] = drop_path if recipe.drop_path is None else recipe.drop_path
    elif settings.drop_path:
        raise InputError(f"drop_path is {settings.drop_path}, but this model has no stochastic depth; leave it out")
    if settings.distill != "none":
        values["distill_weight"] = 0.1 if settings.distill == "soft" else 0.5
    found = resolved(ResolvedTrain, settings, **values, learning_rate=0.0, warmup_steps=0)
    found = replace(found, clip=found.clip or None, ema=found.ema or None)
    if settings.batch_size is None:
        even = n_ranks * (2 if found.mixes else 1)
        found = replace(found, batch_size=max(even, min(found.batch_size, n_train // even * even)))
    if settings.learning_rate is None:
        times = found.batch_size / rates.images_per_rate if rates.images_per_rate else 1
        found = replace(found, learning_rate=rates.learning_rate * times / (SMALLER if trained else 1))
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
    found = replace(found, steps=steps_of(found, per_epoch))
    if settings.warmup_steps is None:
        warmup = WARMUP
        if found.steps:
            warmup = min(recipe.warmup_epochs * per_epoch, -(-found.steps * recipe.warmup_epochs // recipe.epochs))
        found = replace(found, warmup_steps=warmup)
    return found
