"""Training cost of models, and whether they were trained alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from igpt_cli.images.records import brief
from igpt_cli.planning.cost import forward_flops

#: Budgets that differ by more than this factor are said to differ.
SAME_BUDGET = 1.05
#: What is done to images in training in addition to their framing, as config.json's "training" names it.
ON_IMAGES = ("randaugment", "colour_jitter", "erasing", "mixup", "cutmix", "repeats")


@dataclass(frozen=True)
class TrainingCost:
    """What a model's config.json says of its training; None where it does not say.

    Attributes:
        kind: "pretrained", "fine-tuned", "from scratch", "supervised" or "imported".
        steps, seconds, device: how long it was trained, on what.
        images_seen, epochs: views of the training images.
        recipe, augment, teacher: how it was trained; source: of its images; start: the model that was fine-tuned.
    """

    kind: str
    steps: int | None = None
    images_seen: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    device: str | None = None
    recipe: str | None = None
    augment: str | None = None
    teacher: str | None = None
    source: str | None = None
    start: str | None = None


def mixed_budgets(configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """How the training of models differed that are to be compared, one sentence each; none if they were trained alike.

    Alike are models that saw as many images (those of an epoch times epochs) or that took as many FLOPs in training,
    and saw them under the same augmentation; a fine-tuned model has seen more than its config.json counts. Models that
    do not say how they were trained are excluded.

    Args:
        configs: {name: config.json}.
    """
    out = []
    cost = {name: training_cost(config) for name, config in configs.items()}
    seen = {name: c.images_seen for name, c in cost.items() if c.images_seen}
    if _differ(seen.values()) and _differ(n * forward_flops(configs[name]["model"]) for name, n in seen.items()):
        out.append("images seen in training: " + brief([f"{n:,} by {name}" for name, n in seen.items()]))
    shown = {name: text for name, config in configs.items() if (text := augmentation(config))}
    if len(set(shown.values())) > 1:
        out.append("augmentation: " + "; ".join(f"{text} of {name}" for name, text in shown.items()))
    again = [name for name, c in cost.items() if c.kind == "fine-tuned"]
    if again and len(again) < len(seen):
        out.append(f"{brief(again)} had been pretrained before")
    return out


def _differ(budgets: Iterable[int]) -> bool:
    values = list(budgets)
    return bool(values) and max(values) > SAME_BUDGET * min(values)


def augmentation(config: dict[str, Any]) -> str | None:
    """What was done to the images in training: "crop-flip, mixup 0.8"; None where config.json does not say."""
    training = config.get("training") or {}
    if not training.get("augment"):
        return None
    used = [f"{key} {training[key]:g}" for key in ON_IMAGES if (training.get(key) or 0) > (key == "repeats")]
    return ", ".join([training["augment"], *used])


def training_cost(config: dict[str, Any]) -> TrainingCost:
    """What a model's config.json says of its training."""
    training, data, result = (config.get(part) or {} for part in ("training", "data", "result"))
    if "imported" in config and not training:
        kind = "imported"
    elif "finetuned_from" in config:
        kind = "from scratch" if training.get("from_scratch") else "fine-tuned"
    else:
        kind = "supervised" if "recipe" in training else "pretrained"
    side = config["model"]["resolution"]
    seen = result.get("images_seen") or (result["tokens_seen"] // side**2 if result.get("tokens_seen") else None)
    n = data.get("n_train")
    machine = config.get("machine") or {}
    return TrainingCost(
        kind=kind,
        steps=result.get("steps"),
        images_seen=seen,
        epochs=round(seen / n, 4) if seen and n else None,
        seconds=result.get("seconds"),
        device=machine.get("device_name") or machine.get("device"),
        recipe=training.get("recipe"),
        augment=training.get("augment"),
        teacher=(config.get("teacher") or {}).get("name"),
        source=data.get("source"),
        start=(config.get("finetuned_from") or {}).get("path"),
    )
