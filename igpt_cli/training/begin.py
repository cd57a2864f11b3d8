"""What a run of supervised training begins with: a preset with fresh weights, or a trained model with its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igpt_cli.errors import InputError
from igpt_cli.model_dir import WEIGHTS, ModelDir, check_fit, classes_of
from igpt_cli.model_input import takes_rgb
from igpt_cli.models.registry import UNTAUGHT, build_model, find_preset, model_config
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.augment import MEAN, STD
from igpt_cli.training.run import file_sha256
from igpt_cli.training.supervision import Supervision

#: The rate of stochastic depth, in the description of models that have it.
DROP_PATH = "drop_path_rate"
#: An image of fewer patches than this has little left for attention to do.
MANY_PATCHES = 16
#: How a preparation of images cuts them out.
FRAMING = ("crop", "filter")


@dataclass(frozen=True)
class Beginning:
    """What is trained, before its first step.

    description: the model, as config.json has it. preparation: of its images, likewise.
    weights: the part of its state dict that is not fresh, on the CPU; None: all is fresh.
    origin: whose weights these are, for config.json: path, sha256, and head, "kept" or "fresh".
    """

    description: dict[str, Any]
    preparation: dict[str, Any]
    weights: dict[str, Tensor] | None = None
    origin: dict[str, str] | None = None


def with_fresh_weights(model: str, tokens: TokenFile, sizes: Mapping[str, Any] | None, asked: Supervision) -> Beginning:
    """A preset, for the images' resolution and classes; `sizes` are put over its own.

    Raises:
        InputError: an unknown name, or that of a model of tokens, which is pretrained and then fine-tuned; a decay of
            the learning rate by layers, which would spare nothing.
    """
    if find_preset(model).backend == "igpt":
        raise InputError(
            f"{model} is a model of tokens: it learns classes by igpt finetune RUN, or without pretraining by "
            f"igpt finetune RUN --from-scratch"
        )
    if asked.layer_decay != 1:
        raise InputError(
            f"layer_decay is {asked.layer_decay}, which spares trained layers, and {model} begins with fresh weights; "
            f"leave it out, or name a run or an import to begin with"
        )
    sized = {**(sizes or {}), "resolution": tokens.resolution, "n_classes": len(tokens.classes)}
    preparation = {"size": tokens.resolution, "mean": list(MEAN), "std": list(STD)}
    return Beginning(model_config(model, **sized), preparation)


def with_trained_weights(run: ModelDir, tokens: TokenFile, sizes: Mapping[str, Any] | None, taught: bool) -> Beginning:
    """A trained model, with a fresh class head where it does not tell just these classes apart, in this order.

    Without a teacher a model goes on without the head that only a teacher's decisions train.

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
        kept = build_model({k: v for k, v in description.items() if same or k != "n_classes"}).state_dict()
    origin = {
        "path": run.run,
        "sha256": file_sha256(run.path / WEIGHTS),
        "head": "kept" if same else "fresh",
    }
    weights = {k: v.cpu() for k, v in run.model.state_dict().items() if k in kept}
    return Beginning(description, _preparation(run, tokens), weights, origin)


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


def _preparation(run: ModelDir, tokens: TokenFile) -> dict[str, Any]:
    """How images are shown to a model that goes on with these: normalised as before; cut out as these were."""
    stated = run.config.get("preparation") or {}
    colours = {"mean": stated.get("mean", [0.0] * 3), "std": stated.get("std", [1.0] * 3)}
    framing = {k: stated[k] for k in FRAMING if k in stated}
    as_stated = all(tokens.preprocess.get(k, "unknown") == v for k, v in framing.items())
    return {"size": tokens.resolution, **colours, **(framing if as_stated else {})}
