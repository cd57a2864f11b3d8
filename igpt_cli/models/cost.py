"""What a model costs: parameters, FLOPs, memory. Models are built on the meta device, so the largest costs nothing.

Sizes: L blocks, D width, H heads, T tokens an image, V palette, N parameters. A config is what `model_config` returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch

from igpt_cli.errors import InputError
from igpt_cli.models.presets import PRESETS
from igpt_cli.models.registry import build_model, count_parameters, find_preset, model_config

#: Bytes of a number in the matrix products; the residual stream, norms, softmaxes and the loss are float32 anyway.
WIDTHS = {"float32": 4, "bfloat16": 2}
#: Tokens whose logits are there at a time, as in training.objectives.TOKENS_AT_ONCE.
LOGITS_AT_ONCE = 16_384


def describe_models(
    names: Iterable[str] | None = None, resolution: int = 32, n_vocab: int = 512
) -> list[dict[str, Any]]:
    """One object a model: name, backend, sizes, parameters, train_flops_per_token and _per_image, training_state_bytes.

    FLOPs are those of `flops_per_token` for the AR objective. training_state_bytes are float32 weights, gradients and
    Adam's two moments (16 bytes a parameter); activations come on top and depend on the batch.

    Raises:
        InputError: an unknown name.
    """
    return [_describe(name, resolution, n_vocab) for name in (PRESETS if names is None else names)]


def _describe(name: str, resolution: int, n_vocab: int) -> dict[str, Any]:
    preset = find_preset(name)
    config = model_config(name, resolution=resolution, n_vocab=n_vocab)
    per_token = flops_per_token(config)
    return {
        "name": name,
        "backend": preset.backend,
        **preset.sizes,
        "resolution": resolution,
        "n_vocab": n_vocab,
        "parameters": parameters(config),
        "train_flops_per_token": per_token,
        "train_flops_per_image": per_token * resolution**2,
        "training_state_bytes": state_bytes(config, "adamw"),
        "recipe": preset.recipe,
        "learning_rates": [
            {"objective": objective, "resolution": side, "learning_rate": rate}
            for (objective, side), rate in preset.learning_rates.items()
        ],
        "about": preset.about,
    }


def parameters(config: dict[str, Any]) -> int:
    """N, each parameter counted once."""
    return _parameters(tuple(config.items()))


@lru_cache
def _parameters(items: tuple[tuple[str, Any], ...]) -> int:
    with torch.device("meta"):
        return count_parameters(build_model(dict(items)))


def flops_per_token(config: dict[str, Any]) -> int:
    """FLOPs of training on one token, forward and backward: 6 for each parameter that multiplies, and the attention.

    The embeddings (palette, positions, sos) are looked up, not multiplied, and do not count; nor does a class head,
    which multiplies once an image. Attention is 12 L D T
    both ways (BERT): two products of 2 D T each forward, twice that backward, in each block. A causal model (AR) needs
    half. Arithmetic that is done again to save memory does not count, as is usual where a part of the peak is stated.

    For igpt-s at 32x32, by hand: 24 blocks of 12 * 512^2 + 2 * 512 = 3,146,752, a last gain of 512 and a head of
    512 * 512 make 75,784,704 parameters; 6 times that and 12 * 24 * 512 * 1024 / 2 = 75,497,472 make 530,205,696.
    """
    L, D, T = config["n_layer"], config["n_embd"], config["resolution"] ** 2
    causal = config["objective"] == "ar"
    looked_up = (config["n_vocab"] + T + causal + config.get("n_classes", 0)) * D
    return 6 * (parameters(config) - looked_up) + 12 * L * D * T // (2 if causal else 1)


def state_parts(config: dict[str, Any], optimizer: str = "adamw", shards: int = 1) -> dict[str, int]:
    """Bytes on each GPU that do not depend on the batch: "weights", "gradients", "optimizer", "gathered"; all float32.

    Adam keeps two moments of each parameter; Muon keeps one of the blocks' matrices and leaves the rest to Adam.
    `shards` GPUs share all of this (FSDP) where it is more than 1. Then "gathered" is what each has whole for a while:
    weights and gradients of two blocks, the one at work and the one on its way, and of what lies outside the blocks.
    Gradients are taken to be shared out after each micro-batch.

    Raises:
        InputError: an unknown optimizer.
    """
    n, L, D = parameters(config), config["n_layer"], config["n_embd"]
    matrices = 12 * L * D * D
    kept = {"adamw": 8 * n, "muon": 8 * n - 4 * matrices}
    if optimizer not in kept:
        raise InputError(f"optimizer is {optimizer!r}, expected one of {', '.join(kept)}")
    block = matrices // L + 2 * D
    return {
        "weights": -(-4 * n // shards),
        "gradients": -(-4 * n // shards),
        "optimizer": -(-kept[optimizer] // shards),
        "gathered": 0 if shards == 1 else 8 * (2 * block + n - L * block),
    }


def state_bytes(config: dict[str, Any], optimizer: str = "adamw", shards: int = 1) -> int:
    """The sum of `state_parts`: 16 bytes a parameter for Adam on one GPU."""
    return sum(state_parts(config, optimizer, shards).values())


def block_bytes_per_token(config: dict[str, Any], precision: str = "bfloat16", *, fused_norm: bool = True) -> int:
    """What autograd keeps of one block for one token until the backward pass. Blocks run one operation at a time.

    Compiled blocks keep less: 34 bytes for each unit of width rather than the 44 here, for bfloat16 (measured).

    Args:
        precision: of the matrix products, "float32" or "bfloat16" (autocast).
        fused_norm: RMS norm as one kernel, as GPUs have it. A CPU computes it in steps and keeps one tensor more.
    """
    D, size = config["n_embd"], WIDTHS[precision]
    return (
        2 * 4 * D  # the residual stream as it enters each norm, float32
        + (0 if fused_norm else 2 * 4 * D)  # divided by its RMS, not yet times the gain
        + 2 * 4  # 1 / RMS of each norm, float32
        + 2 * size * D  # the norms' outputs, which enter c_attn and c_fc
        + 3 * size * D  # query, key, value
        + size * D  # attention's output, which enters its c_proj; flash attention keeps no T x T matrix
        + 4 * config["n_head"]  # the logarithm of each softmax's sum, float32
        + 2 * size * 4 * D  # c_fc's output and the sigmoid of it
        + size * 4 * D  # their product, which enters the MLP's c_proj
    )


def activation_bytes(
    config: dict[str, Any], micro_batch: int, precision: str, recompute: bool, *, fused_norm: bool = True
) -> int:
    """The most that a micro-batch needs on one GPU beside `state_bytes`: the largest of three moments.

    What the blocks keep (`block_bytes_per_token`; with `recompute` each block's float32 input alone) is there at all of
    them, and so are the bfloat16 copies that autocast made of their weights (with `recompute` those of one block).
    At the end of the forward pass the last norm, logits and log-probabilities of `LOGITS_AT_ONCE` tokens come to it; at
    the beginning of the backward pass log-probabilities and two gradients of them; in a block's backward pass the
    gradients within its MLP, and with `recompute` the block's activations.

    Args:
        micro_batch: images at a time on this GPU.
        precision, fused_norm: as for `block_bytes_per_token`.
        recompute: as by `training.speed.checkpoint_activations`.
    """
    L, D, V, T = config["n_layer"], config["n_embd"], config["n_vocab"], config["resolution"] ** 2
    size, tokens = WIDTHS[precision], micro_batch * T
    block = tokens * block_bytes_per_token(config, precision, fused_norm=fused_norm)
    kept = L * (tokens * 4 * D if recompute else block)
    copies = 2 * (12 * L * D * D + V * D) if precision == "bfloat16" else 0
    held = copies // L if recompute else copies
    norm = tokens * D * (4 + 4 + size + (0 if fused_norm else 4))
    logits = min(tokens, max(T, LOGITS_AT_ONCE)) * V * 4
    within = tokens * D * (2 * 4 * size + 2 * 4)  # two of the MLP's width; two of the residual stream's, float32
    return kept + max(
        held + norm + 2 * logits,
        held + norm + 3 * logits,
        held + within + (block if recompute else 0),
    )


def largest_micro_batch(
    config: dict[str, Any],
    free_bytes: float,
    per_rank_batch: int,
    precision: str,
    recompute: bool,
    optimizer: str = "adamw",
    shards: int = 1,
    *,
    fused_norm: bool = True,
) -> int:
    """The most images at a time that fit: a divisor of `per_rank_batch`, or 0 where not even one image fits.

    Args:
        free_bytes: memory of the GPU for all of training, before the model is put there.
        per_rank_batch: images of one step on this GPU; a divisor of it makes all micro-batches of a step equally large.
        precision, recompute, fused_norm: as for `activation_bytes`.
        optimizer, shards: as for `state_bytes`.
    """
    left = free_bytes - state_bytes(config, optimizer, shards)
    for n in range(per_rank_batch, 0, -1):
        needs = activation_bytes(config, n, precision, recompute, fused_norm=fused_norm)
        if per_rank_batch % n == 0 and needs <= left:
            return n
    return 0
