"""What a model costs: parameters, FLOPs, memory. Models are built on the meta device, so the largest costs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from igpt_cli.models.presets import PRESETS
from igpt_cli.models.registry import build_model, count_parameters, find_preset, model_config


def describe_models(
    names: Iterable[str] | None = None, resolution: int = 32, n_vocab: int = 512
) -> list[dict[str, Any]]:
    """One object a model: name, backend, sizes, parameters, train_flops_per_token and _per_image, training_state_bytes.

    FLOPs count forward and backward: 6 for each parameter that multiplies (all but the embeddings) and token, and
    12 L D T / 2 for causal attention. training_state_bytes are float32 weights, gradients and Adam's two moments
    (16 bytes a parameter); activations come on top and depend on the batch.

    Raises:
        InputError: an unknown name.
    """
    return [_describe(name, resolution, n_vocab) for name in (PRESETS if names is None else names)]


def _describe(name: str, resolution: int, n_vocab: int) -> dict[str, Any]:
    preset = find_preset(name)
    config = model_config(name, resolution=resolution, n_vocab=n_vocab)
    with torch.device("meta"):
        parameters = count_parameters(build_model(config))
    n_layer, n_embd, n_ctx = config["n_layer"], config["n_embd"], resolution**2
    multiplying = parameters - (n_vocab + n_ctx + 1) * n_embd  # wte, wpe and sos are looked up, not multiplied
    per_token = 6 * multiplying + 12 * n_layer * n_embd * n_ctx // 2
    return {
        "name": name,
        "backend": preset.backend,
        **preset.sizes,
        "resolution": resolution,
        "n_vocab": n_vocab,
        "parameters": parameters,
        "train_flops_per_token": per_token,
        "train_flops_per_image": per_token * n_ctx,
        "training_state_bytes": 16 * parameters,
        "recipe": preset.recipe,
        "about": preset.about,
    }
