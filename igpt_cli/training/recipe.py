"""What is learned and for how long (`Learning`, `Recipe`), and how a machine carries it out (`Execution`)."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from igpt_cli.documents import RUN_FIELDS, check_fields, read_json
from igpt_cli.errors import FormatError, InputError
from igpt_cli.models.registry import find_preset
from igpt_cli.tokens.loader import AUGMENTATIONS, MASK_PROB
from igpt_cli.training.objectives import OBJECTIVES

#: What a run on a CPU gets when nothing says how long it shall be, in seconds.
CPU_BUDGET = 110.0
#: Held-out images that are looked at on a CPU unless told otherwise.
CPU_VAL_IMAGES = 128
#: From so many images on, 4% are held out rather than 10% (section 3.1: ImageNet, against the small sets).
MANY_IMAGES = 1_000_000
SHARDS = ("auto", "none", "full")

AnyLearning = TypeVar("AnyLearning", bound="Learning")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Learning:
    """Settings that decide what is learned, of pretraining and fine-tuning alike. `None` is resolved later.

    batch_size is in images, over all ranks and micro-batches. learning_rate is the peak, after warmup_steps. The run
    ends after `steps`, after `epochs` passes over the training images, or after `budget` seconds of training. clip is
    the largest norm of the gradient; None does not clip. weight_decay is for matrices. val_part is the part of the
    split "train" that is held out when the token file has no split "val"; val_images is how many of the held-out
    images are looked at.
    """

    #: Whether the learning rate falls to 0 after the warm-up, as a cosine, or stays.
    falls: ClassVar[bool] = True
    #: What `augment` and `optimizer` may be.
    augmentations: ClassVar[tuple[str, ...]] = AUGMENTATIONS
    optimizers: ClassVar[tuple[str, ...]] = ("adamw", "muon")

    batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    steps: int | None = None
    epochs: float | None = None
    budget: float | None = None
    optimizer: str | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float | None = None
    mask_prob: float = MASK_PROB
    augment: str = "none"
    seed: int = 0
    val_part: float | None = None
    val_images: int | None = None


@dataclass(frozen=True)
class Recipe(Learning):
    """Every setting that decides what pretraining learns. `None` is resolved by `resolve_recipe`.

    n_layer, n_head and n_embd put other sizes in place of the preset's. The learning rate's fall is fitted to steps,
    epochs or budget, whichever ends first. For the other settings see `Learning`.
    """

    model: str = "igpt-tiny"
    objective: str = "ar"
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that replace the preset's."""
        return {k: v for k in ("n_layer", "n_head", "n_embd") if (v := getattr(self, k)) is not None}


@dataclass(frozen=True)
class Execution:
    """How a run is carried out: free to change when it is resumed. What is learned stays the same to rounding.

    precision: "auto", "float32" or "bfloat16" (of the matrix products; weights and losses are float32).
    compile: compile the blocks; None does so on a GPU.
    micro_batch: images at a time on each rank; None takes the most that fit, or batch_size / (ranks * accumulate).
    recompute: activations are computed again in the backward pass; None does so where they do not fit.
    shard: "none" replicates the model (DDP), "full" shards it (FSDP2), "auto" shards where it does not fit.
    eval_every: steps from one validation to the next; None validates after each epoch.
    save_every: steps (500) or time ("15m") from one checkpoint to the next; the last `keep` are kept, and the best.
    time_limit: seconds after which this process ends the run gracefully, wherever the schedule stands.
    """

    precision: str = "auto"
    compile: bool | None = None
    micro_batch: int | None = None
    accumulate: int | None = None
    recompute: bool | None = None
    shard: str = "auto"
    eval_every: int | None = None
    save_every: int | str = "15m"
    keep: int = 2
    time_limit: float | None = None


def with_an_end(recipe: AnyLearning, execution: Execution, device: torch.device) -> AnyLearning:
    """On a CPU, where a preset's steps could take months, a recipe that does not say when to end gets `CPU_BUDGET`."""
    said = (recipe.steps, recipe.epochs, recipe.budget, execution.time_limit)
    return recipe if device.type != "cpu" or any(said) else replace(recipe, budget=CPU_BUDGET)


def resolve_recipe(recipe: Recipe, n_train: int, resolution: int, device: torch.device) -> Recipe:
    """Fill in what was left open: first the preset's own values, then what fits the data and the device.

    Args:
        n_train: training images.
        resolution: R of the images; learning rates differ by it.

    Raises:
        InputError: a value out of range; all such problems are reported together.
    """
    preset = find_preset(recipe.model)
    how_long = [k for k in ("steps", "epochs", "budget") if getattr(recipe, k) is not None]
    defaults = {**preset.recipe, "optimizer": preset.recipe.get("optimizer", "adamw")}
    if recipe.objective in OBJECTIVES:
        defaults["learning_rate"], _ = preset.learning_rate(recipe.objective, resolution)
    if how_long:
        defaults.pop("steps", None)
    recipe = replace(recipe, **{k: v for k, v in defaults.items() if getattr(recipe, k) is None})
    if recipe.val_images is None and device.type == "cpu":
        recipe = replace(recipe, val_images=CPU_VAL_IMAGES)
    check_recipe(recipe)
    per_epoch = max(1, n_train // recipe.batch_size)
    if recipe.epochs is not None:
        steps = max(1, round(recipe.epochs * per_epoch))
        recipe = replace(recipe, steps=min(recipe.steps or steps, steps))
    if recipe.warmup_steps is None:
        # The paper warms up for one epoch; a short run gets a tenth of its steps, and one that ends by time 20 steps.
        warmup = min(per_epoch, max(1, recipe.steps // 10)) if recipe.steps else min(per_epoch, 20)
        recipe = replace(recipe, warmup_steps=warmup)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Raise InputError that names every value out of range; None passes."""
    problems = problems_of(recipe)
    if recipe.objective not in OBJECTIVES:
        problems.append(f"objective is {recipe.objective!r}, expected one of {', '.join(OBJECTIVES)}")
    if problems:
        raise InputError("; ".join(problems))


def problems_of(recipe: Learning) -> list[str]:
    """Every value out of range, in words; None passes."""
    problems = []
    positive = ("batch_size", "learning_rate", "head_learning_rate", "steps", "epochs", "budget", "clip", "val_images")
    for name in positive:
        value = getattr(recipe, name, None)  # only what classifies has a head
        if value is not None and not (value > 0 and math.isfinite(value)):
            problems.append(f"{name} is {value}, expected more than 0")
    for name in ("warmup_steps", "weight_decay", "seed"):
        value = getattr(recipe, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            problems.append(f"{name} is {value}, expected 0 or more")
    for name in ("val_part", "mask_prob"):
        value = getattr(recipe, name)
        if value is not None and not 0 < value < 1:
            problems.append(f"{name} is {value}, expected between 0 and 1")
    layer_decay = getattr(recipe, "layer_decay", 1.0)  # of what may begin with trained weights
    if not 0 < layer_decay <= 1:
        problems.append(f"layer_decay is {layer_decay}, expected more than 0 and at most 1")
    if not all(0 <= b < 1 for b in recipe.betas or ()):
        problems.append(f"betas are {tuple(recipe.betas)}, expected two numbers of at least 0 and less than 1")
    for name, known in (("optimizer", recipe.optimizers), ("augment", recipe.augmentations)):
        value = getattr(recipe, name)
        if value is not None and value not in known:
            problems.append(f"{name} is {value!r}, expected one of {', '.join(known)}")
    return problems


def check_execution(execution: Execution) -> None:
    """Raise InputError that names every value out of range; None passes."""
    problems = []
    for name in ("micro_batch", "accumulate", "eval_every", "keep", "time_limit"):
        value = getattr(execution, name)
        if value is not None and not value > 0:
            problems.append(f"{name} is {value}, expected more than 0")
    if execution.micro_batch and execution.accumulate:
        problems.append("give micro_batch or accumulate, not both: one follows from the other")
    if execution.shard not in SHARDS:
        problems.append(f"shard is {execution.shard!r}, expected one of {', '.join(SHARDS)}")
    try:
        save_interval(execution.save_every)
    except InputError as e:
        problems.append(str(e))
    if problems:
        raise InputError("; ".join(problems))


def seconds(text: str | float) -> float:
    """A duration in seconds from "90", "90s", "15m", "2h" or "1h30m".

    >>> seconds("1h30m")
    5400.0

    Raises:
        InputError: anything else, or a duration of 0.
    """
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", str(text).strip())
    total = sum(float(n) * units[u] for n, u in parts)
    if "".join(n + u for n, u in parts) != str(text).strip() or not 0 < total < math.inf:
        raise InputError(f"{text!r} is not a duration; write seconds (90) or 90s, 15m, 2h, 1h30m")
    return total


def save_interval(save_every: int | str) -> tuple[int | None, float | None]:
    """(steps, None) or (None, seconds): a plain number is steps, one with a unit is time.

    >>> save_interval("500"), save_interval("15m")
    ((500, None), (None, 900.0))
    """
    if re.fullmatch(r"\d+", str(save_every)) and int(save_every) > 0:
        return int(save_every), None
    if not re.search(r"[smhd]", str(save_every)):
        raise InputError(f"save_every is {save_every!r}; write a number of steps (500) or a time (15m)")
    return None, seconds(save_every)


def read_recipe(file: Path | str) -> tuple[Recipe, Execution]:
    """The recipe and the execution in a run's config.json, to be used again.

    Raises:
        InputError, FormatError: no such file, not JSON, or a setting that this version does not know.
    """
    path = Path(file)
    config = read_json(path, "a run's config.json")
    check_fields(config, RUN_FIELDS, str(path))
    return recipe_of(config, path)


def training_in(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """`training` of a config.json as settings of a recipe; `path` is named in errors."""
    if not isinstance(config.get("training"), dict):
        raise FormatError(f"{path} has no object 'training'; expected the config.json of a run")
    return {k: v for k, v in config["training"].items() if k != "n_parameters"}


def recipe_of(config: dict[str, Any], path: Path) -> tuple[Recipe, Execution]:
    """As `read_recipe`, from the content of a config.json; `path` is named in errors."""
    recipe = settings_of(Recipe, {**training_in(config, path), **described(config.get("model") or {})}, path)
    execution = settings_of(Execution, config.get("execution") or {}, path)
    check_recipe(recipe)
    check_execution(execution)
    return recipe, execution


def described(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a `Recipe` that make the model which config.json describes."""
    name = model.get("name", Recipe.model)
    preset = find_preset(name)
    sizes: dict[str, Any] = {k: model[k] for k in ("n_layer", "n_head", "n_embd") if k in model}
    sizes = {k: size for k, size in sizes.items() if size != preset.sizes.get(k)}
    return {"model": name, "objective": model.get("objective", Recipe.objective), **sizes}


def settings_of(kind: type[Made], given: dict[str, Any], path: Path) -> Made:
    """A Recipe, an Execution or another set of settings from a part of the config.json at `path`.

    Raises:
        FormatError: a setting that this version does not know.
    """
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(given) - known):
        raise FormatError(f"{path}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def for_config(recipe: Learning) -> dict[str, Any]:
    """The recipe as config.json's "training"; the architecture stands under "model" there."""
    return {k: v for k, v in asdict(recipe).items() if k not in ("model", "objective", "n_layer", "n_head", "n_embd")}


def differing(was: Learning, given: dict[str, Any]) -> list[str]:
    """What is asked for now, `given`, and differs from the recipe of a run: each with both values."""
    return [f"{k} was {getattr(was, k)} and is now {v}" for k, v in given.items() if v != getattr(was, k)]
