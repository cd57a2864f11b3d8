"""The settings of training, declared once: name, type, default, range and help.

From these declarations come the checks (`check`), config.json both ways (`to_config`, `from_config`) and the options of
`igpt pretrain`, `finetune` and `train` (`cli.settings_options`). What a user requests is a `PretrainSettings`,
`FinetuneSettings` or `TrainSettings`, in which None leaves a setting open; what a run trains with is its `Resolved`
form, in which nothing is. This module does not import torch, so that the commands show their help at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from igpt_cli.documents import RUN_FIELDS, check_fields, read_json
from igpt_cli.errors import FormatError, InputError

#: Seconds that a run on a CPU trains for when no setting says how long.
CPU_BUDGET = 110.0
#: Held-out images to validate on, on a CPU, unless requested otherwise.
CPU_VAL_IMAGES = 128
#: Training images from which on 4% are held out, not 10% (section 3.1: ImageNet, against the small sets).
MANY_IMAGES = 1_000_000

Settings = TypeVar("Settings")
Learning = TypeVar("Learning", bound="LearningSettings")


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


def count_or(word: str) -> Callable[[str], int | None]:
    """A parser: a number of images from 1 on, or `word`, which is None."""

    def parse(text: str) -> int | None:
        if text != word and not (text.isdecimal() and int(text)):
            raise InputError(f"is {text!r}, expected {word} or a number of images")
        return None if text == word else int(text)

    return parse


def learning_rates(text: str) -> tuple[float, ...]:
    """Numbers from a list with commas, such as 1e-3,3e-4."""
    try:
        return tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise InputError(f"is {text!r}, expected a list of learning rates, such as 1e-3,3e-4") from None


@dataclass(frozen=True)
class Range:
    """What a setting's value, or each value of a tuple, may be. least, most: of an integer."""

    expected: str
    holds: Callable[[Any], bool]
    least: int | None = None
    most: int | None = None


POSITIVE = Range("more than 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("0 or more", lambda x: 0 <= x < math.inf)
COUNT = Range("at least 1", lambda x: x >= 1, least=1)
COUNT_OR_0 = Range("0 or more", lambda x: x >= 0, least=0)
#: Of every library; scikit-learn takes no larger one.
MAX_SEED = 2**32 - 1
SEED = Range(f"0 to {MAX_SEED}", lambda x: 0 <= x <= MAX_SEED, least=0, most=MAX_SEED)
BETWEEN = Range("between 0 and 1", lambda x: 0 < x < 1)
FRACTION = Range("from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_1 = Range("at least 0 and less than 1", lambda x: 0 <= x < 1)


def choice(*names: str) -> Range:
    """One of these names."""
    return Range(f"one of {', '.join(names)}", lambda x: x in names)


@dataclass(frozen=True)
class Setting:
    """How a setting is shown and checked. names: those of its option, by default --name; option: whether it has one.

    unset: what None stands for, shown in brackets; a settings class may have its own (`unset`).
    """

    help: str
    allowed: Range | None = None
    names: tuple[str, ...] = ()
    option: bool = True
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    unset: str | None = None

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value, in words; None passes."""
        if value is None or self.allowed is None:
            return None
        several = isinstance(value, (tuple, list))
        for one in value if several else (value,):
            if not self.allowed.holds(one):
                shown = repr(one) if isinstance(one, str) else one
                return f"{name} {'has' if several else 'is'} {shown}, expected {self.allowed.expected}"
        return None


def setting(help: str, allowed: Range | None = None, *names: str, default: Any = None, **how: Any) -> Any:
    """A field of a settings class; see `Setting`."""
    return field(default=default, metadata={"setting": Setting(help, allowed, names, **how)})


@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """What every training learns with. None leaves a setting open.

    batch_size is in images, over all ranks and micro-batches. learning_rate is the peak, after warmup_steps. A run ends
    after `steps`, after `epochs` passes over the training images, or after `budget` seconds of training, whichever
    comes first.
    """

    #: Whether the learning rate decays to 0 after the warm-up, as a cosine, or stays.
    cosine_decay: ClassVar[bool] = True
    #: What None stands for, by setting, where it is not the same for all tasks.
    unset: ClassVar[dict[str, str]] = {}

    steps: int | None = setting("End after this many steps.", COUNT)
    epochs: float | None = setting("End after this many passes over the training images.", POSITIVE)
    budget: float | None = setting(
        "End after this much time (90s, 15m, 2h); a decaying learning rate reaches 0 by then.",
        POSITIVE,
        metavar="TIME",
        parse=seconds,
    )
    batch_size: int | None = setting("Images in a step, over all GPUs.", POSITIVE, "--batch-size", "-b")
    learning_rate: float | None = setting("Peak learning rate.", POSITIVE, "--lr")
    warmup_steps: int | None = setting("Steps of linear warm-up.", NOT_NEGATIVE)
    optimizer: str | None = setting(
        "Adam, as in the paper, or Muon for the blocks' matrices.", choice("adamw", "muon"), metavar="adamw|muon"
    )
    betas: tuple[float, float] | None = setting("Decay rates of AdamW's moments.", BELOW_1, option=False)
    weight_decay: float | None = setting("Weight decay of weight matrices, not of biases or norms.", NOT_NEGATIVE)
    clip: float | None = setting("Largest norm of the gradient.", POSITIVE)
    val_part: float | None = setting(
        "Part of the split 'train' to hold out, without a split 'val'.", BETWEEN, unset="0.1, or 0.04 of a million"
    )
    val_images: int | None = setting("Held-out images to validate on.", COUNT, unset="all; 128 on a CPU")
    seed: int = setting("Seed of weights, held-out part, order and augmentation.", SEED, default=0)


@dataclass(frozen=True, kw_only=True)
class TokenSettings(LearningSettings):
    """What the training of models of tokens adds."""

    augment: str = setting(
        "Augmentation of the token images.",
        choice("none", "flip", "crop-flip"),
        metavar="none|flip|crop-flip",
        default="none",
    )
    mask_prob: float | None = setting("bert: probability that a pixel is masked.", BETWEEN)


@dataclass(frozen=True, kw_only=True)
class LabelledSettings(LearningSettings):
    """What learning from labels adds.

    labels_per_class: train and validate on that many labelled images of each class; those of a smaller number are among
    those of a larger one. layer_decay: see `optim.make_optimizers`; 1 is none.
    """

    labels_per_class: int | None = setting("Labelled training images to use of each class.", COUNT, unset="all")
    head_learning_rate: float | None = setting(
        "Learning rate of the class head, while --lr is that of the rest.", POSITIVE, "--head-lr", unset="the same"
    )
    layer_decay: float = setting(
        "Learning rate of each block relative to the next, such as 0.75; class heads have the full rate.",
        Range("more than 0 and at most 1", lambda x: 0 < x <= 1),
        metavar="X",
        default=1.0,
    )
    patience: int = setting("End after this many validations without a better one; 0: never.", COUNT_OR_0, default=0)
    test_images: int | None = setting(
        "Test images to classify.", COUNT, metavar="N|all", parse=count_or("all"), unset="all"
    )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TokenSettings):
    """What pretraining learns (section 3). n_layer, n_head and n_embd replace the preset's sizes."""

    unset: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("steps", "batch_size", "learning_rate"), "the preset's"),
        "optimizer": "the preset's, or adamw",
        "warmup_steps": "one epoch, at most a tenth of the steps",
        "weight_decay": "0",
        "clip": "not clipped",
        "mask_prob": "0.15",
        "eval_every": "an epoch",
    }

    model: str = setting("Model to train; `igpt models` lists them.", None, "--model", "-m", default="igpt-tiny")
    objective: str = setting(
        "ar: next pixel; bert: masked pixels.", choice("ar", "bert"), metavar="ar|bert", default="ar"
    )
    n_layer: int | None = setting("Number of blocks.", unset="the preset's")
    n_head: int | None = setting("Attention heads.", unset="the preset's")
    n_embd: int | None = setting("Width.", unset="the preset's")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that replace the preset's."""
        return {k: v for k in ("n_layer", "n_head", "n_embd") if (v := getattr(self, k)) is not None}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TokenSettings, LabelledSettings):
    """What fine-tuning learns (sections 2.3 and 3.4).

    None stands for what pretraining had: batch_size (at most the training images), optimizer, betas, weight_decay,
    clip, mask_prob. learning_rate is a tenth of pretraining's (from scratch: the same).

    gen_weight, clf_weight: of L_GEN and L_CLF in the loss. head_layer: which of the layers 0..L the class head reads;
    None is L, the final norm. bert_masks: masks of an image whose predictions vote; 0 shows the model the whole image.
    lr_search: learning rates of which the best is taken, each tried for a tenth of the run.
    """

    cosine_decay: ClassVar[bool] = False
    unset: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("batch_size", "optimizer", "weight_decay", "clip", "mask_prob"), "as pretrained"),
        "learning_rate": "a tenth of pretraining's",
        "warmup_steps": "20, at most a tenth of the steps",
        "test_images": "all; 300 on a CPU",
        "eval_every": "an epoch, at least 10",
    }

    patience: int = setting("End after this many validations without a better one; 0: never.", COUNT_OR_0, default=5)
    from_scratch: bool = setting(
        "Start from fresh weights, not RUN's: the baseline to compare with.", None, "--from-scratch", default=False
    )
    head_layer: int | None = setting("Layer that the class head reads, as in igpt probe.", unset="the final norm")
    gen_weight: float = setting("Weight of L_GEN, the loss of pretraining.", NOT_NEGATIVE, default=1.0)
    clf_weight: float = setting("Weight of L_CLF, the loss of the classes.", NOT_NEGATIVE, default=1.0)
    bert_masks: int | None = setting(
        "bert: masks whose predictions vote; 0: show the whole image.", COUNT_OR_0, unset="5"
    )
    lr_search: tuple[float, ...] | None = setting(
        "Try these learning rates, a tenth of the run each; take the best.",
        POSITIVE,
        metavar="A,B,...",
        parse=learning_rates,
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LabelledSettings):
    """What supervised training learns. None stands for what `recipe` says; 0 switches off what can be off.

    randaugment: magnitude of RandAugment, 0 to 10. colour_jitter: how much brightness, contrast and colour vary.
    mixup, cutmix: alpha of the Beta distribution of a step's share; with both, one of them is drawn each step.
    drop_path: rate of stochastic depth at the last block; models without it have None.
    ema: decay of an exponential moving average of the weights, which is then validated and published.
    distill: learn a teacher's probabilities ("soft"), its decision ("hard") or nothing ("none"). tau: temperature of
    "soft". distill_weight: the teacher's part in the loss; None is the paper's, 0.1 of "soft", half of "hard".
    """

    unset: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("optimizer", "clip", "warmup_steps"), "the recipe's"),
        "batch_size": "the recipe's; 64 on a CPU",
        "learning_rate": "the recipe's for this batch; a tenth with trained weights",
        "weight_decay": "0.05; 0.0001 with SGD",
        "compile": "no",
        "recompute": "no",
        "eval_every": "an epoch, at least 10",
    }

    recipe: str = setting(
        "Settings that are not given otherwise.", None, metavar="plain|deit|swin|resnet", default="plain"
    )
    optimizer: str | None = setting(
        "AdamW, Muon for the linear maps of blocks, or SGD with momentum.",
        choice("adamw", "muon", "sgd"),
        metavar="adamw|muon|sgd",
    )
    clip: float | None = setting("Largest norm of the gradient; 0: not clipped.", NOT_NEGATIVE)
    augment: str | None = setting(
        "How images are framed.",
        choice("none", "flip", "crop-flip", "resized-crop-flip"),
        metavar="none|flip|crop-flip|resized-crop-flip",
        unset="the recipe's",
    )
    randaugment: float | None = setting(
        "Magnitude of RandAugment, 0 (off) to 10.", Range("0 to 10", lambda x: 0 <= x <= 10)
    )
    colour_jitter: float | None = setting("How much brightness, contrast and colour vary.", NOT_NEGATIVE)
    erasing: float | None = setting("Probability that a box becomes noise.", FRACTION)
    mixup: float | None = setting("Alpha of mixup's Beta distribution; 0: off.", NOT_NEGATIVE)
    cutmix: float | None = setting("Alpha of CutMix's Beta distribution; 0: off.", NOT_NEGATIVE)
    label_smoothing: float | None = setting("Part of the target that all classes share.", BELOW_1)
    repeats: int | None = setting("Views of each image in a step.", COUNT)
    drop_path: float | None = setting("Stochastic depth: the rate at the last block.", BELOW_1)
    ema: float | None = setting(
        "Decay of an exponential moving average of the weights, which is then the model.", BELOW_1, unset="off"
    )
    distill: str = setting(
        "Learn the teacher's probabilities (soft) or its decision (hard).",
        choice("none", "soft", "hard"),
        metavar="none|soft|hard",
        default="none",
    )
    tau: float = setting("Temperature of --distill soft.", POSITIVE, default=3.0)
    distill_weight: float | None = setting(
        "The teacher's part in the loss.", FRACTION, unset="0.1 of soft, 0.5 of hard"
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with their neighbours."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is executed: may change when it is resumed. What is learned stays the same to rounding.

    precision: of the matrix products; weights and losses are float32.
    micro_batch: images at a time on each rank; None takes the most that fit, or batch_size / (ranks * accumulate).
    shard: "none" replicates the model (DDP), "full" shards it (FSDP2), "auto" shards where it does not fit.
    save_every: steps (500) or time ("15m") from one checkpoint to the next; the last `keep` are kept, and the best.
    time_limit: seconds after which this process ends the run gracefully, wherever the schedule stands.
    """

    unset: ClassVar[dict[str, str]] = {}

    time_limit: float | None = setting(
        "Save and end after this much time, wherever the schedule stands; --resume continues.",
        POSITIVE,
        metavar="TIME",
        parse=seconds,
    )
    micro_batch: int | None = setting(
        "Images at a time on a GPU; auto: the most that fit.", COUNT, metavar="auto|N", parse=count_or("auto")
    )
    accumulate: int | None = setting("Parts in which a GPU computes its share of a step.", COUNT)
    eval_every: int | None = setting("Steps between validations.", COUNT)
    save_every: int | str = setting(
        "Steps (500) or time (15m) between checkpoints.", None, metavar="N|TIME", default="15m"
    )
    keep: int = setting("Last checkpoints to keep; the best is kept besides.", COUNT, default=2)
    precision: str = setting(
        "Precision of the matrix products.",
        choice("auto", "float32", "bfloat16"),
        metavar="auto|float32|bfloat16",
        default="auto",
    )
    compile: bool | None = setting("Compile the blocks.", None, "--compile/--no-compile", unset="on a GPU")
    recompute: bool | None = setting(
        "Compute activations again in the backward pass, to save memory.",
        None,
        "--recompute/--no-recompute",
        unset="where needed",
    )
    shard: str = setting(
        "Under torchrun: replicate (DDP) or shard (FSDP2) the model.",
        choice("auto", "none", "full"),
        metavar="auto|none|full",
        default="auto",
    )


@dataclass(frozen=True, kw_only=True)
class Resolved(LearningSettings):
    """What a run trains with: no setting that it needs is open."""

    batch_size: int
    learning_rate: float
    warmup_steps: int
    optimizer: str
    betas: tuple[float, float]
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class ResolvedPretrain(Resolved, PretrainSettings):
    """Settings of a pretraining run."""

    mask_prob: float


@dataclass(frozen=True, kw_only=True)
class ResolvedFinetune(Resolved, FinetuneSettings):
    """Settings of a fine-tuning run."""

    mask_prob: float
    head_layer: int


@dataclass(frozen=True, kw_only=True)
class ResolvedTrain(Resolved, TrainSettings):
    """Settings of a run of supervised training."""

    augment: str
    randaugment: float
    colour_jitter: float
    erasing: float
    mixup: float
    cutmix: float
    label_smoothing: float
    repeats: int


def declared(kind: type) -> Iterator[tuple[Field, Setting]]:
    """The settings of a class, in order: each field and how it is declared."""
    for f in fields(kind):
        if "setting" in f.metadata:
            yield f, f.metadata["setting"]


def problems(settings: Any, *more: str | None) -> list[str]:
    """Every value out of range, in words."""
    kind = next(k for k in (PretrainSettings, FinetuneSettings, TrainSettings, Execution) if isinstance(settings, k))
    found = [s.problem(f.name, getattr(settings, f.name)) for f, s in declared(kind)]
    return [problem for problem in (*found, *more) if problem]


def check(settings: Any, *more: str | None) -> None:
    """Raise InputError that names every value out of range, and what else is wrong; None passes."""
    if isinstance(settings, Execution):
        more = (*more, *_problems_of_execution(settings))
    if found := problems(settings, *more):
        raise InputError("; ".join(found))


def _problems_of_execution(execution: Execution) -> Iterator[str]:
    if execution.micro_batch and execution.accumulate:
        yield "give micro_batch or accumulate, not both: one follows from the other"
    try:
        save_interval(execution.save_every)
    except InputError as e:
        yield str(e)


def resolved(kind: type[Settings], requested: Any, **values: Any) -> Settings:
    """The settings as another class, with `values` where the request leaves them open."""
    given = {f.name: getattr(requested, f.name) for f in fields(requested)}
    return kind(**given | {k: v for k, v in values.items() if given.get(k) is None})


def with_an_end(settings: Learning, execution: Execution, device: str) -> Learning:
    """On a CPU, where a preset's steps could take months, settings that do not say when to end get `CPU_BUDGET`."""
    said = (settings.steps, settings.epochs, settings.budget, execution.time_limit)
    return settings if device != "cpu" or any(said) else replace(settings, budget=CPU_BUDGET)


def steps_of(settings: LearningSettings, per_epoch: int) -> int | None:
    """The steps after which a run ends: `steps` or `epochs`, whichever comes first; None: neither is given."""
    if settings.epochs is None:
        return settings.steps
    steps = max(1, round(settings.epochs * per_epoch))
    return min(settings.steps or steps, steps)


def split_settings(kind: type[Settings], given: dict[str, Any]) -> tuple[Settings, Execution]:
    """Settings by name as the two that a run takes."""
    names = {f.name for f in fields(Execution)}
    of_execution = {k: v for k, v in given.items() if k in names}
    return kind(**{k: v for k, v in given.items() if k not in names}), Execution(**of_execution)


def to_config(settings: LearningSettings) -> dict[str, Any]:
    """Settings as config.json's "training"; the architecture stands under "model" there."""
    return {k: v for k, v in asdict(settings).items() if k not in ("model", "objective", "n_layer", "n_head", "n_embd")}


def from_config(kind: type[Settings], given: dict[str, Any], path: Path) -> Settings:
    """Settings from a part of the config.json at `path`.

    Raises:
        FormatError: a setting that this version does not know.
    """
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(given) - known - {"n_parameters"}):
        raise FormatError(f"{path}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "n_parameters"})


def read_settings(file: Path | str) -> tuple[PretrainSettings, Execution]:
    """The settings of a pretraining run, from its config.json, to be used again.

    Raises:
        InputError, FormatError: no such file, not JSON, or a setting that this version does not know.
    """
    path = Path(file)
    config = read_json(path, "a run's config.json")
    training = training_in(config, path)
    check_fields(config, RUN_FIELDS, str(path))
    settings = from_config(PretrainSettings, training | architecture(config.get("model") or {}), path)
    execution = from_config(Execution, config.get("execution") or {}, path)
    check(settings)
    check(execution)
    return settings, execution


def training_in(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """`training` of a config.json; `path` is named in errors."""
    if not isinstance(config.get("training"), dict):
        raise FormatError(f"{path} has no object 'training'; expected the config.json of a run")
    return config["training"]


def architecture(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of pretraining that make the model which config.json describes; sizes that are not the preset's."""
    from igpt_cli.models.registry import find_preset

    name = model.get("name", PretrainSettings.model)
    preset = find_preset(name)
    sizes: dict[str, Any] = {
        k: model[k] for k in ("n_layer", "n_head", "n_embd") if k in model and model[k] != preset.sizes.get(k)
    }
    return {"model": name, "objective": model.get("objective", PretrainSettings.objective), **sizes}
