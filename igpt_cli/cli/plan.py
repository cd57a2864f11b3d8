"""igpt plan"""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from igpt_cli.cli.candidates import gpus as gpu_names
from igpt_cli.cli.candidates import token_models
from igpt_cli.cli.options import Json, Resolution
from igpt_cli.cli.output import present

if TYPE_CHECKING:
    from igpt_cli.planning.plan import Layout, Plan

WIDTH = 80


def plan(
    model: Annotated[
        str, Argument(metavar="MODEL", autocompletion=token_models, help="Which model; `igpt models` lists them.")
    ] = "igpt-s",
    resolution: Resolution = 32,
    gpus: Annotated[int, Option(metavar="N", help="How many GPUs.")] = 1,
    gpu: Annotated[
        str,
        Option(
            metavar="NAME",
            autocompletion=gpu_names,
            help="Which: b200, h200, h100, h100-pcie, h100-nvl, a100-80, a100-40, l40s, l40, l4, a10 or rtx4090.",
        ),
    ] = "h200",
    shard: Annotated[
        str, Option(metavar="auto|none|full", help="Replicate (DDP) or shard (FSDP2) the model; auto: if needed.")
    ] = "auto",
    objective: Annotated[str, Option(metavar="ar|bert", help="ar: next pixel; bert: masked pixels.")] = "ar",
    batch_size: Annotated[
        int | None, Option("--batch-size", "-b", help="Images in a step, over all GPUs.  [default: the preset's]")
    ] = None,
    steps: Annotated[int | None, Option(help="Steps of the run.  [default: the preset's]")] = None,
    epochs: Annotated[float | None, Option(help="Instead of steps: passes over the training images.")] = None,
    images: Annotated[
        int | None, Option(help="Training images, for --epochs.  [default: ImageNet's 1,281,167]")
    ] = None,
    optimizer: Annotated[
        str | None,
        Option(metavar="adamw|muon", help="The paper's Adam, or Muon for blocks' matrices.  [default: the preset's]"),
    ] = None,
    mfu: Annotated[float, Option(help="The part of the GPU's peak that is reached, 0 to 1.")] = 0.4,
    price: Annotated[
        float | None, Option("--price-per-gpu-hour", metavar="X", help="Also compute the cost, in X's currency.")
    ] = None,
    json: Json = False,
) -> None:
    """Plan a pretraining run before renting a GPU: memory, how many GPUs, how many days.

    \b
    Examples:
      igpt plan igpt-s
      igpt plan igpt-xl -r 64 --gpus 8 --gpu h200
      igpt plan igpt-l --gpus 8 --gpu a100-80 --price-per-gpu-hour 2
      igpt plan igpt-m --json | jq .chosen.days

    All is calculated, nothing measured. Memory: float32 weights, gradients and optimizer, and what one micro-batch of
    bfloat16 training keeps with blocks that are not compiled; compiled ones keep about a quarter less. A tenth of the
    GPU's memory is left free. Time: 6 FLOPs for each parameter and token, and attention, at --mfu of the peak; if
    activations are computed again, 4/3 of that.
    """
    if images is not None and epochs is None:
        raise typer.BadParameter("it is for --epochs, which is missing", param_hint="--images")
    from igpt_cli.planning.advice import conclusion, start_command
    from igpt_cli.planning.plan import IMAGENET
    from igpt_cli.planning.plan import plan as make_plan

    how: dict[str, Any] = {"batch_size": batch_size, "steps": steps, "epochs": epochs, "optimizer": optimizer}
    how |= {"shard": shard, "images": IMAGENET if images is None else images, "mfu": mfu, "price_per_gpu_hour": price}
    found = make_plan(model, resolution, gpus, gpu, objective=objective, **how)
    given = {"--batch-size": batch_size, "--steps": steps, "--epochs": epochs, "--optimizer": optimizer}
    given["--shard"] = "none" if shard == "none" and gpus > 1 else None
    start, said = start_command(found, {k: v for k, v in given.items() if v is not None}), conclusion(found)
    document = {**asdict(found), "conclusion": said, "command": " ".join(start) if start else None}
    text = [_head(found), "", _table(found), "", textwrap.fill(said, WIDTH), *_wrapped(start)]
    present(document, "\n".join(text), json)


def _head(found: Plan) -> str:
    rate = f"learning rate {found.learning_rate:g}"
    if not found.learning_rate_published:
        rate += " (none is published for this; the nearest)"
    lines = [
        ("model", f"{found.model}, {found.objective}, {found.resolution}x{found.resolution} pixels"),
        ("", f"{found.parameters:,} parameters, {found.n_layer} layers, width {found.n_embd}"),
        ("recipe", f"{found.steps:,} steps of {found.batch_size} images; {found.optimizer}"),
        ("", rate),
        ("tokens", f"{found.tokens_per_step:,} a step, {found.tokens_total:,} in all"),
        (
            "FLOPs",
            f"{_exponent(found.flops_per_token)} a token, {_exponent(found.flops_per_image)} an image, "
            f"{_exponent(found.flops_total)} in all",
        ),
        (
            "GPU",
            f"{found.gpu}: {found.gpu_memory_bytes / 1e9:.0f} GB, "
            f"{found.gpu_peak_flops_per_second / 1e12:,.0f} TFLOP/s dense bfloat16",
        ),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in lines)


def _table(found: Plan) -> str:
    def gb(part: str) -> list[str]:
        return [f"{getattr(c.layout, part + '_bytes') / 1e9:.2f}" for c in found.columns]

    def days(part: str) -> list[str]:
        return [_number(getattr(c, part)) for c in found.columns]

    layouts: list[Layout] = [c.layout for c in found.columns]
    rows = [
        (f"GPUs ({found.gpu})", [str(c.gpus) for c in layouts]),
        ("--shard", [c.shard if c.gpus > 1 else "-" for c in layouts]),
        ("GB on each: weights", gb("weights")),
        ("gradients", gb("gradients")),
        ("optimizer", gb("optimizer")),
        ("blocks gathered", gb("gathered")),
        ("activations, bfloat16 copies", gb("activations")),
        (f"sum; {found.gpu_usable_bytes / 1e9:.1f} can be used", gb("total")),
        ("fits", ["yes" if c.fits else "no" for c in layouts]),
        ("micro-batch x accumulation", [f"{c.micro_batch} x {c.accumulate}" if c.fits else "-" for c in layouts]),
        ("activations recomputed", ["yes" if c.recompute else "no" for c in layouts]),
        (f"days at {100 * found.mfu:g}% of the peak", days("days")),
        ("GPU-days", days("gpu_days")),
    ]
    if found.price_per_gpu_hour is not None:
        rows.append((f"cost at {found.price_per_gpu_hour:g} an hour", days("cost")))
    return "\n".join(f"{name:<30}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows)


def _exponent(value: int) -> str:
    """
    >>> _exponent(530_205_696)
    '5.302e8'
    """
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits}e{int(power)}"


def _number(value: float | None) -> str:
    """
    >>> _number(2.0332), _number(926.689), _number(5554.6), _number(None)
    ('2.03', '927', '5,555', '-')
    """
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _wrapped(words: list[str] | None) -> list[str]:
    """The command in lines that a shell joins again; an option and its value stay together."""
    parts: list[str] = []
    for word in words or []:
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = ["  "]
    for part in parts:
        if len(lines[-1]) + len(part) + 2 > WIDTH:
            lines[-1] += "\\"
            lines.append(" " * 6)
        lines[-1] += f"{part} "
    return [line.rstrip() for line in lines] if parts else []
