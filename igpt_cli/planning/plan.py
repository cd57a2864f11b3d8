"""Plan a pretraining run: FLOPs, memory on each GPU, GPUs, days."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from igpt_cli.errors import InputError
from igpt_cli.models.registry import find_preset, model_config
from igpt_cli.planning.cost import activation_bytes, flops_per_token, largest_micro_batch, parameters, state_parts
from igpt_cli.planning.gpus import find_gpu

SHARDS = ("auto", "none", "full")
#: With fewer tokens at a time than this, recomputing activations costs less than small matrices do.
ENOUGH_TOKENS = 4096
#: ImageNet's training images (ILSVRC-2012).
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Layout:
    """One way to lay a training step out over `gpus` GPUs, and what that puts on each of them, in bytes.

    shard: "none", every GPU has the whole model (DDP), or "full" (FSDP). A step is `accumulate` micro-batches of
    `micro_batch` images on each GPU; where even one image does not fit, these are for one image. recompute: activations
    are computed again in the backward pass. gathered_bytes: blocks that are whole for a while under FSDP.
    """

    shard: str
    gpus: int
    micro_batch: int
    accumulate: int
    recompute: bool
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    activations_bytes: int
    total_bytes: int
    fits: bool


def lay_out(
    config: dict[str, Any],
    memory_bytes: float,
    batch_size: int,
    gpus: int = 1,
    *,
    shard: str = "auto",
    recompute: bool | None = None,
    optimizer: str = "adamw",
    precision: str = "bfloat16",
    micro_batch: int | None = None,
) -> Layout:
    """The layout that costs the least time, with the largest micro-batch that fits, or with the requested one.

    What is left open is tried in this order: everything retained on each GPU; sharded; activations recomputed; both. A
    sharded model sends more, but recomputing costs a third more arithmetic. Activations are also recomputed where fewer
    than `ENOUGH_TOKENS` at a time fit otherwise, as small matrices waste more. If nothing fits, the last one tried is
    returned, with `fits` false.

    Args:
        config: from `model_config`.
        memory_bytes: what all of training may take on each GPU.
        batch_size: images in a step, over all GPUs; a multiple of `gpus`.
        shard: "none", "full", or "auto" for whichever is needed. One GPU has nothing to share.
        recompute: None for if needed.
        micro_batch: images at a time on each GPU, where that is not left open.
    """
    shards = {"auto": ("none", "full"), "none": ("none",), "full": ("full",)}[shard] if gpus > 1 else ("none",)
    per_gpu = batch_size // gpus
    enough = min(per_gpu, -(-ENOUGH_TOKENS // config["resolution"] ** 2))
    found = [
        _layout(config, memory_bytes, per_gpu, gpus, kind, again, optimizer, precision, micro_batch)
        for again in ((False, True) if recompute is None else (recompute,))
        for kind in shards
    ]
    good = [f for f in found if f.fits]
    if micro_batch is not None:
        return good[0] if good else found[-1]
    return next((f for f in good if f.micro_batch >= enough or f.recompute), good[0] if good else found[-1])


def _layout(config, memory_bytes, per_gpu, gpus, shard, recompute, optimizer, precision, requested) -> Layout:
    n = gpus if shard == "full" else 1
    micro = requested or largest_micro_batch(config, memory_bytes, per_gpu, precision, recompute, optimizer, n) or 1
    parts = state_parts(config, optimizer, n)
    parts["activations"] = activation_bytes(config, micro, precision, recompute)
    return Layout(
        shard=shard,
        gpus=gpus,
        micro_batch=micro,
        accumulate=per_gpu // micro,
        recompute=recompute,
        **{f"{k}_bytes": v for k, v in parts.items()},
        total_bytes=sum(parts.values()),
        fits=sum(parts.values()) <= memory_bytes,
    )


@dataclass(frozen=True)
class Column:
    """A layout with the time it takes: `days` of all its GPUs at once, None where it does not fit. cost: in the price's
    currency, None without one."""

    layout: Layout
    days: float | None
    gpu_days: float | None
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Tokens are pixels; *_bytes are bytes, *_flops_per_second FLOP/s, `mfu` a fraction.

    chosen: the layout for the requested GPUs. columns: what there is to compare, without and with sharding, and on the
    fewest GPUs where more are needed. fewest_gpus: the smallest number of this GPU that divides the batch and holds the
    model, with activations recomputed if need be; fewest_gpus_keeping: without that. None: no number does.
    """

    model: str
    objective: str
    resolution: int
    n_vocab: int
    n_layer: int
    n_embd: int
    parameters: int
    optimizer: str
    learning_rate: float
    learning_rate_published: bool
    batch_size: int
    steps: int
    tokens_per_step: int
    tokens_total: int
    flops_per_token: int
    flops_per_image: int
    flops_total: int
    gpu: str
    gpus: int
    gpu_memory_bytes: int
    gpu_usable_bytes: int
    gpu_peak_flops_per_second: float
    mfu: float
    price_per_gpu_hour: float | None
    chosen: Column
    columns: list[Column]
    fewest_gpus: int | None
    fewest_gpus_keeping: int | None


def plan(
    model: str = "igpt-s",
    resolution: int = 32,
    gpus: int = 1,
    gpu: str = "h200",
    *,
    objective: str = "ar",
    batch_size: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    images: int = IMAGENET,
    optimizer: str | None = None,
    shard: str = "auto",
    mfu: float = 0.4,
    price_per_gpu_hour: float | None = None,
    n_vocab: int = 512,
) -> Plan:
    """Parameters, arithmetic, memory and time of pretraining a preset on so many GPUs, in bfloat16.

    Args:
        batch_size: images in a step, over all GPUs. This, steps and optimizer are the preset's where not given.
        steps: of the run; or else `epochs` passes over `images` training images.
        shard: as for `lay_out`.
        mfu: the part of the GPU's peak that the arithmetic reaches. Activations that are computed again (one forward
            pass of three) count as arithmetic here, so that such a run takes 4/3 of the time.
        price_per_gpu_hour: in any currency.

    Raises:
        InputError: an unknown name, or a value out of range; all of the latter are reported together.
    """
    preset, kind = find_preset(model), find_gpu(gpu)
    config = model_config(model, resolution=resolution, objective=objective, n_vocab=n_vocab)
    batch = preset.recipe["batch_size"] if batch_size is None else batch_size
    optimizer = optimizer or preset.recipe.get("optimizer", "adamw")
    _check(batch, steps, epochs, images, gpus, shard, mfu, price_per_gpu_hour)
    if steps is None:
        steps = preset.recipe["steps"] if epochs is None else max(1, round(epochs * max(1, images // batch)))
    per_token, T = flops_per_token(config), resolution**2
    total = per_token * T * batch * steps

    def column(layout: Layout) -> Column:
        if not layout.fits:
            return Column(layout, None, None, None)
        gpu_days = total * (4 / 3 if layout.recompute else 1) / (mfu * kind.peak_flops * 86_400)
        cost = None if price_per_gpu_hour is None else gpu_days * 24 * price_per_gpu_hour
        return Column(layout, gpu_days / layout.gpus, gpu_days, cost)

    def laid_out(n: int, shard: str, recompute: bool | None = None) -> Layout:
        return lay_out(config, kind.usable_bytes, batch, n, shard=shard, recompute=recompute, optimizer=optimizer)

    def fewest(recompute: bool) -> int | None:
        divisors = (n for n in range(1, batch + 1) if batch % n == 0)
        return next((n for n in divisors if laid_out(n, "full", recompute).fits), None)

    chosen = laid_out(gpus, shard)
    fewest_gpus, fewest_keeping = fewest(True), fewest(False)
    compared = [chosen] if gpus == 1 else [laid_out(gpus, "none"), laid_out(gpus, "full")]
    if not chosen.fits and fewest_gpus is not None and fewest_gpus != gpus:
        compared.append(laid_out(fewest_gpus, "full"))
    elif gpus == 1 and chosen.recompute and fewest_keeping is not None:
        compared.append(laid_out(fewest_keeping, "full"))
    rate, published = preset.learning_rate(objective, resolution)
    return Plan(
        model=model,
        objective=objective,
        **{key: config[key] for key in ("resolution", "n_vocab", "n_layer", "n_embd")},
        parameters=parameters(config),
        optimizer=optimizer,
        learning_rate=rate,
        learning_rate_published=published,
        batch_size=batch,
        steps=steps,
        tokens_per_step=batch * T,
        tokens_total=batch * T * steps,
        flops_per_token=per_token,
        flops_per_image=per_token * T,
        flops_total=total,
        gpu=gpu,
        gpus=gpus,
        gpu_memory_bytes=kind.memory_bytes,
        gpu_usable_bytes=kind.usable_bytes,
        gpu_peak_flops_per_second=kind.peak_flops,
        mfu=mfu,
        price_per_gpu_hour=price_per_gpu_hour,
        chosen=column(chosen),
        columns=[column(c) for c in compared],
        fewest_gpus=fewest_gpus,
        fewest_gpus_keeping=fewest_keeping,
    )


def _check(batch, steps, epochs, images, gpus, shard, mfu, price) -> None:
    counts = {"batch_size": batch, "steps": steps, "epochs": epochs, "images": images, "gpus": gpus}
    problems = [
        f"{name} is {value}, expected more than 0"
        for name, value in counts.items()
        if value is not None and not (value > 0 and math.isfinite(value))
    ]
    if steps is not None and epochs is not None:
        problems.append("steps and epochs are both given; one follows from the other")
    if not 0 < mfu <= 1:
        problems.append(f"mfu is {mfu}, expected a fraction of the peak: more than 0 and at most 1")
    if price is not None and not (price >= 0 and math.isfinite(price)):
        problems.append(f"price_per_gpu_hour is {price}, expected 0 or more")
    if shard not in SHARDS:
        problems.append(f"shard is {shard!r}, expected one of {', '.join(SHARDS)}")
    if not problems and batch % gpus:
        below = max(n for n in range(1, gpus) if batch % n == 0)
        problems.append(
            f"a batch of {batch} images does not divide among {gpus} GPUs; "
            f"use {below} GPUs, or a batch of {-(-batch // gpus) * gpus}"
        )
    if problems:
        raise InputError("; ".join(problems))
