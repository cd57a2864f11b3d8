"""Parameters, FLOPs and memory of a model, built on the meta device.

A FLOP is one multiplication or one addition, so a multiply-add, which papers on models of RGB images call a FLOP, is 2.

Sizes: L blocks, D width, H heads, T tokens an image, V palette, N parameters. A config is what `model_config` returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import torch

from igpt_cli.errors import InputError
from igpt_cli.models.local_attention import LocalAttention
from igpt_cli.models.presets import Preset
from igpt_cli.models.registry import all_presets, build_model, count_parameters, find_preset, model_config

#: Bytes of a number in the matrix products; the residual stream, norms, softmaxes and the loss are float32 anyway.
WIDTHS = {"float32": 4, "bfloat16": 2}
#: Tokens whose logits are there at a time, as in training.objectives.TOKENS_AT_ONCE.
LOGITS_AT_ONCE = 16_384

Fixed = tuple[tuple[str, Any], ...]


def describe_models(
    names: Iterable[str] | None = None, resolution: int | None = None, n_vocab: int = 512, flops: bool = True
) -> list[dict[str, Any]]:
    """One object a model: name, backend, input, sizes, resolution, parameters, forward_flops_per_image and half of it,
    forward_multiply_adds_per_image, train_flops_per_image, training_state_bytes, about; see `docs/formats.md`.

    Models of tokens are those of the AR objective, and also have train_flops_per_token. Models of RGB images have a
    class head of 1,000 classes from 224 pixels on, as the papers count them, and of 10 below; their FLOPs are those
    that torch counts. training_state_bytes are float32 weights, gradients and Adam's two moments (16 bytes a
    parameter); activations come on top and depend on the batch.

    Args:
        names: which models; None for all that can be built at this resolution.
        resolution: R in pixels; None for 32, or for a model of RGB images its preset's own.
        flops: count them, which takes about a fifth of a second a model; without it there are no keys of FLOPs.

    Raises:
        InputError: an unknown name, or a model named that cannot be built at this resolution.
    """
    if names is not None:
        return [_describe(find_preset(name), resolution, n_vocab, flops) for name in names]
    rows = []
    for preset in all_presets().values():
        try:
            rows.append(_describe(preset, resolution, n_vocab, flops))
        except InputError:
            continue
    return rows


def _describe(preset: Preset, resolution: int | None, n_vocab: int, flops: bool) -> dict[str, Any]:
    if preset.of_tokens:
        config = model_config(preset.name, resolution=resolution or 32, n_vocab=n_vocab)
        n_layers = config["n_layer"]
    else:
        config = rgb_config(preset.name, resolution)
        n_layers = _on_meta(_fixed(config)).n_layers
    costs: dict[str, Any] = {}
    if flops:
        forward = forward_flops(config)
        costs = {"forward_flops_per_image": forward, "forward_multiply_adds_per_image": forward // 2}
        costs |= {"train_flops_per_token": flops_per_token(config)} if preset.of_tokens else {}
        costs["train_flops_per_image"] = 3 * forward
    shown = {k: v for k, v in config.items() if k != "objective"}
    return {
        **shown,
        "input": "tokens" if preset.of_tokens else "rgb",
        "n_layers": n_layers,
        "parameters": parameters(config),
        **costs,
        "training_state_bytes": 16 * parameters(config),
        "recipe": preset.recipe,
        "learning_rates": [
            {"objective": objective, "resolution": side, "learning_rate": rate}
            for (objective, side), rate in preset.learning_rates.items()
        ],
        "about": preset.about,
    }


def rgb_config(name: str, resolution: int | None = None) -> dict[str, Any]:
    """The description of a model of RGB images with a class head of as many classes as the papers have: 1,000 from 224
    pixels on, 10 below.

    Raises:
        InputError: sizes that do not fit together.
    """
    at = {} if resolution is None else {"resolution": resolution}
    side = model_config(name, **at)["resolution"]
    return model_config(name, **at, n_classes=1000 if side >= 224 else 10)


def forward_flops(config: dict[str, Any]) -> int:
    """FLOPs of one image's way through the whole model: of one of tokens a third of `flops_per_token` for each of its
    pixels, of one of RGB images what torch counts (products of matrices, convolutions, attention), of local attention
    without the padding of its blocks (`LocalAttention.window_flops`)."""
    if config["backend"] == "igpt":
        return flops_per_token(config) * config["resolution"] ** 2 // 3
    return _counted(_fixed(config))


@lru_cache
def _counted(fixed: Fixed) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    config, model = dict(fixed), _on_meta(fixed)
    side = config["resolution"]
    call = model if config.get("n_classes") else (lambda x: model.features(x, [model.n_layers]))
    local = [module for module in model.modules() if isinstance(module, LocalAttention)]
    windows: list[int] = []
    for layer in local:
        layer.forward = partial(_projected, layer, windows)  # type: ignore[method-assign]
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        call(torch.zeros(1, 3, side, side))
    for layer in local:
        del layer.forward
    return counter.get_total_flops() + sum(windows)


def _projected(layer: LocalAttention, windows: list[int], x: torch.Tensor) -> torch.Tensor:
    """Local attention without its windows, whose FLOPs are appended to a list: the shape that it gives."""
    for projection in (layer.query, layer.key, layer.value):
        y = x if projection is None else projection(x)
    windows.append(layer.window_flops(*y.shape[-2:]))
    return y


@lru_cache(maxsize=1)
def _on_meta(fixed: Fixed) -> Any:
    with torch.device("meta"):
        return build_model(dict(fixed)).eval()


def parameters(config: dict[str, Any]) -> int:
    """N, each parameter counted once."""
    return _parameters(_fixed(config))


@lru_cache
def _parameters(fixed: Fixed) -> int:
    return count_parameters(_on_meta(fixed))


def _fixed(config: dict[str, Any]) -> Fixed:
    """A config that can be a key."""
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items())


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

    Adam keeps two moments of each parameter, SGD one; Muon keeps one of the blocks' matrices, the rest is Adam's.
    `shards` GPUs share all of this (FSDP) where it is more than 1. Then "gathered" is what each has whole for a while:
    weights and gradients of two blocks, the one at work and the one on its way, and of what lies outside the blocks.
    Gradients are taken to be shared out after each micro-batch.

    Raises:
        InputError: an unknown optimizer.
    """
    n, L, D = parameters(config), config["n_layer"], config["n_embd"]
    matrices = 12 * L * D * D
    retained = {"adamw": 8 * n, "muon": 8 * n - 4 * matrices, "sgd": 4 * n}
    if optimizer not in retained:
        raise InputError(f"optimizer is {optimizer!r}, expected one of {', '.join(retained)}")
    block = matrices // L + 2 * D
    return {
        "weights": -(-4 * n // shards),
        "gradients": -(-4 * n // shards),
        "optimizer": -(-retained[optimizer] // shards),
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
    """The most that a micro-batch needs on one GPU in addition to `state_bytes`: the larger of two moments.

    What the blocks keep (`block_bytes_per_token`; with `recompute` each block's float32 input alone) is there at both,
    and so are the bfloat16 copies that autocast made of their weights (with `recompute` those of one block). At the
    beginning of the backward pass the last norm, log-probabilities of `LOGITS_AT_ONCE` tokens and two gradients of them
    come to it; in a block's backward pass the gradients within its MLP, and with `recompute` the block's activations.

    Args:
        micro_batch: images at a time on this GPU.
        precision, fused_norm: as for `block_bytes_per_token`.
        recompute: as by `training.memory.checkpoint_activations`.
    """
    L, D, V, T = config["n_layer"], config["n_embd"], config["n_vocab"], config["resolution"] ** 2
    size, tokens = WIDTHS[precision], micro_batch * T
    block = tokens * block_bytes_per_token(config, precision, fused_norm=fused_norm)
    retained = L * (tokens * 4 * D if recompute else block)
    copies = 2 * (12 * L * D * D + V * D) if precision == "bfloat16" else 0
    held = copies // L if recompute else copies
    norm = tokens * D * (4 + 4 + size + (0 if fused_norm else 4))
    logits = min(tokens, max(T, LOGITS_AT_ONCE)) * V * 4
    within = tokens * D * (2 * 4 * size + 2 * 4)  # two of the MLP's width; two of the residual stream's, float32
    return retained + held + max(norm + 3 * logits, within + (block if recompute else 0))


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
