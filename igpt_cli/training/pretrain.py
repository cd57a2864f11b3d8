"""Pretraining on next-pixel prediction: one process, one device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_cli.device import autocast, choose_device, choose_precision
from igpt_cli.errors import InputError, Interrupted, MismatchError, NonFiniteError, OutputError
from igpt_cli.model_dir import (
    CONFIG,
    METRICS,
    PALETTE,
    WEIGHTS,
    MetricsWriter,
    new_config,
    write_config,
    write_weights,
)
from igpt_cli.models.registry import build_model, count_parameters, find_preset, model_config
from igpt_cli.tokens.loader import AUGMENTATIONS, TokenLoader
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.objectives import ar_loss
from igpt_cli.training.optim import OPTIMIZERS, make_optimizers, schedule, set_learning_rate

#: What a run on a CPU gets when neither steps, epochs nor a time limit are asked for, in seconds.
CPU_TIME_LIMIT = 110.0
#: Weights that gave a finite loss are remembered this often, in steps.
KEEP_GOOD_EVERY = 25

#: One record for every step: step, loss, learning_rate, seconds, tokens_per_second, fraction (of the run, 0..1).
StepRecord = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Every setting of a pretraining run. `None` is resolved by `resolve_recipe`.

    n_layer, n_head and n_embd put other sizes in place of the preset's.
    batch_size is in images, learning_rate is the peak after warmup_steps, time_limit is in seconds, val_part is the
    part of the training split that is held out when the token file has no split "val".
    """

    model: str = "igpt-tiny"
    objective: str = "ar"
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    steps: int | None = None
    epochs: float | None = None
    time_limit: float | None = None
    optimizer: str | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    augment: str = "none"
    seed: int = 0
    val_part: float = 0.1
    val_images: int = 128
    precision: str = "auto"


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave: losses in nats per token, `seconds` of training, `status` "done" or why it ended early."""

    run: Path
    status: str
    steps: int
    tokens_seen: int
    train_loss: float
    val_loss: float | None
    seconds: float


def resolve_recipe(recipe: Recipe, n_train: int, device: torch.device, resolution: int = 32) -> Recipe:
    """Fill in what was left open: first the preset's own values, then defaults that fit the data and the device.

    The preset's learning rate depends on the objective and on `resolution`, the side of the images.

    Raises:
        InputError: a value out of range; all such problems are reported together.
    """
    preset = find_preset(recipe.model)
    unset = {k: v for k, v in preset.recipe.items() if getattr(recipe, k) is None}
    asked = any(getattr(recipe, k) is not None for k in ("steps", "epochs", "time_limit"))
    if asked:
        unset.pop("steps", None)
    if recipe.learning_rate is None:
        unset["learning_rate"], _ = preset.learning_rate(recipe.objective, resolution)
    recipe = replace(recipe, **unset)
    if not asked and device.type == "cpu":
        recipe = replace(recipe, steps=None, time_limit=CPU_TIME_LIMIT)
    recipe = replace(
        recipe, optimizer=recipe.optimizer or "adamw", precision=choose_precision(recipe.precision, device)
    )
    _check(recipe)
    per_epoch = max(1, n_train // recipe.batch_size)
    steps = recipe.steps
    if recipe.epochs is not None:
        steps = min(steps or math.inf, max(1, round(recipe.epochs * per_epoch)))
    if recipe.warmup_steps is None:
        # The paper warms up for one epoch; a short run gets a tenth of its steps, and one that ends by time 20 steps.
        warmup = min(per_epoch, max(1, steps // 10)) if steps else min(per_epoch, 20)
        recipe = replace(recipe, warmup_steps=warmup)
    return replace(recipe, steps=steps)


def _check(recipe: Recipe) -> None:
    problems = []
    for name in ("batch_size", "learning_rate", "steps", "epochs", "time_limit"):
        value = getattr(recipe, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            problems.append(f"{name} is {value}, expected more than 0")
    if recipe.warmup_steps is not None and recipe.warmup_steps < 0:
        problems.append(f"warmup_steps is {recipe.warmup_steps}, expected 0 or more")
    if not 0 < recipe.val_part < 1:
        problems.append(f"val_part is {recipe.val_part}, expected between 0 and 1")
    if recipe.objective != "ar":
        problems.append(f"objective is {recipe.objective!r}, this version pretrains 'ar'")
    if recipe.optimizer not in OPTIMIZERS:
        problems.append(f"optimizer is {recipe.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    if recipe.augment not in AUGMENTATIONS:
        problems.append(f"augment is {recipe.augment!r}, expected one of {', '.join(AUGMENTATIONS)}")
    if problems:
        raise InputError("; ".join(problems))


def held_out(n: int, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0..n-1 in two sorted parts, for training and for validation; a function of n, `part` and `seed` alone."""
    order = np.random.default_rng([seed, n]).permutation(n)
    n_val = max(1, round(part * n))
    return np.sort(order[n_val:]), np.sort(order[:n_val])


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, tokens: np.ndarray, batch_size: int, device: torch.device) -> float:
    """Mean AR loss over the images `tokens` (N, T), in nats per token, float32."""
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(tokens), batch_size):
        batch = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64)).to(device)
        total += ar_loss(model, batch).item() * len(batch)
    model.train(was_training)
    return total / len(tokens)


def pretrain(
    tokens: TokenFile,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    command: str | None = None,
    data_path: str | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> PretrainResult:
    """Pretrain a model on a token file's split "train" and write the model directory `out`.

    Args:
        tokens: an open token file; its resolution and palette become the model's.
        out: the run's folder; made, and refused if it is there already, unless `force`.
        recipe: settings; what is None comes from the preset.
        device: see `device.choose_device`.
        command: what to record as the command that made the run.
        data_path: what to record as the data, where `tokens` is a temporary file made of it.
        on_start: called once with the resolved settings (the run's config.json).
        on_step: called after every step with its `StepRecord`.

    Raises:
        InputError, MismatchError, OutputError: before any training.
        NonFiniteError: the loss became NaN or infinite; the last good weights are in `out`.
        Interrupted: Ctrl-C or SIGTERM; the weights so far are in `out`.
    """
    out, chosen = Path(out), choose_device(device)
    split = tokens.split("train")
    if "val" in tokens.splits:
        rows, val = np.arange(len(split)), tokens.split("val").tokens
    elif len(split) < 2:
        raise InputError(
            f"{tokens.path}: the split 'train' has {len(split)} image; one to train and one to validate are needed"
        )
    else:
        part = (recipe or Recipe()).val_part
        rows, val_rows = held_out(len(split), part if 0 < part < 1 else 0.1, (recipe or Recipe()).seed)
        val = split.tokens[val_rows]
    recipe = resolve_recipe(recipe or Recipe(), len(rows), chosen, tokens.resolution)
    val = np.ascontiguousarray(val[: recipe.val_images])
    if recipe.batch_size > len(rows):
        raise MismatchError(
            f"batch_size {recipe.batch_size} is more than the {len(rows)} training images of {tokens.path}; "
            f"lower --batch-size"
        )
    sizes = {k: getattr(recipe, k) for k in ("n_layer", "n_head", "n_embd") if getattr(recipe, k) is not None}
    description = model_config(
        recipe.model, resolution=tokens.resolution, n_vocab=tokens.n_vocab, objective=recipe.objective, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_model(description)
    config = new_config(
        description,
        training={**_settings(recipe), "device": str(chosen), "n_parameters": count_parameters(model)},
        data={
            "path": data_path or str(tokens.path),
            "source": tokens.attrs.get("source", ""),
            "tokens_sha256": split.sha256,
            "palette_sha256": tokens.palette.sha256,
            "n_train": len(rows),
            "n_val": len(val),
            "tokens_per_step": recipe.batch_size * tokens.resolution**2,
        },
        result={"status": "running"},
    )
    if command:
        config["command"] = command
    _make_folder(out, force)
    tokens.palette.save(out / PALETTE, force=True)
    write_config(out, config)
    if on_start:
        on_start(config)
    loader = TokenLoader(
        split.tokens, tokens.resolution, recipe.batch_size, seed=recipe.seed, augment=recipe.augment, indices=rows
    )
    return _train(model.to(chosen), loader, val, recipe, chosen, out, config, on_step)


def _train(model, loader, val, recipe: Recipe, device, out: Path, config, on_step) -> PretrainResult:
    """The loop; whatever ends it, the folder `out` is left with weights, metrics and the reason."""
    optimizers = make_optimizers(model, recipe.optimizer, recipe.learning_rate, recipe.betas)
    metrics = MetricsWriter(out)
    good = {k: v.clone() for k, v in model.state_dict().items()}
    recent: list[float] = []
    status, problem, step = "done", None, 0
    started, warm_at = time.monotonic(), 0.0
    model.train()
    try:
        while not _finished(recipe, step, time.monotonic() - started):
            elapsed = time.monotonic() - started
            if step == recipe.warmup_steps:
                warm_at = elapsed
            rate = recipe.learning_rate * schedule(step, recipe.warmup_steps, _fraction(recipe, step, elapsed, warm_at))
            set_learning_rate(optimizers, rate)
            batch = torch.from_numpy(loader.batch(step)).to(device)
            with autocast(recipe.precision, device):
                loss = ar_loss(model, batch)
            value = loss.item()
            if not math.isfinite(value):
                model.load_state_dict(good)
                status = "non-finite loss"
                problem = NonFiniteError(
                    f"the loss became {value} at step {step + 1} (learning rate {rate:.3g}); the weights of step "
                    f"{step // KEEP_GOOD_EVERY * KEEP_GOOD_EVERY} are kept in {out}; try a lower --lr"
                )
                break
            if step % KEEP_GOOD_EVERY == 0:
                for name, tensor in model.state_dict().items():
                    good[name].copy_(tensor)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds = time.monotonic() - started
            recent = [*recent[-19:], value]
            record = {"step": step, "loss": round(value, 6), "learning_rate": rate, "seconds": round(seconds, 3)}
            metrics.write(record)
            if on_step:
                done = max(_parts(recipe, step, seconds))
                on_step({**record, "fraction": min(done, 1.0), "tokens_per_second": step * batch.numel() / seconds})
    except KeyboardInterrupt:
        status = "interrupted"
        problem = Interrupted(f"interrupted after step {step}; the weights so far are in {out}")
    seconds = time.monotonic() - started
    val_loss = mean_loss(model, val, recipe.batch_size, device) if status == "done" else None
    if val_loss is not None:
        metrics.write({"step": step, "val_loss": round(val_loss, 6)})
    metrics.close()
    result = PretrainResult(
        run=out,
        status=status,
        steps=step,
        tokens_seen=step * recipe.batch_size * val.shape[1],
        train_loss=float(np.mean(recent)) if recent else math.nan,
        val_loss=val_loss,
        seconds=seconds,
    )
    write_weights(out, model)
    finite = {k: v for k, v in asdict(result).items() if not (isinstance(v, float) and math.isnan(v))}
    write_config(out, {**config, "result": {**finite, "run": out.name}})
    if problem:
        raise problem
    return result


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe for config.json; the sizes stand under "model" there."""
    return {k: v for k, v in asdict(recipe).items() if k not in ("model", "objective", "n_layer", "n_head", "n_embd")}


def _parts(recipe: Recipe, step: int, elapsed: float) -> list[float]:
    """How much of each budget (steps, time) is used, 0..1."""
    used = [step / recipe.steps] if recipe.steps else []
    return used + ([elapsed / recipe.time_limit] if recipe.time_limit else [])


def _finished(recipe: Recipe, step: int, elapsed: float) -> bool:
    return max(_parts(recipe, step, elapsed)) >= 1


def _fraction(recipe: Recipe, step: int, elapsed: float, warm_at: float) -> float:
    """How much of the cosine is done: of the budget nearest its end, counted from the end of the warm-up."""
    parts = [0.0]
    if recipe.steps and recipe.steps > recipe.warmup_steps:
        parts.append((step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps))
    if recipe.time_limit and recipe.time_limit > warm_at:
        parts.append((elapsed - warm_at) / (recipe.time_limit - warm_at))
    return max(parts)


def _make_folder(out: Path, force: bool) -> None:
    """The empty run folder; with `force`, a run that is there gives way, but no other folder does."""
    if out.exists() and not force:
        raise OutputError(f"{out} exists already; choose another --out, or overwrite it with --force")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG).exists())):
        raise OutputError(f"{out} is not a run (it has no {CONFIG}), so --force does not overwrite it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, METRICS, CONFIG):
            (out / name).unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"cannot make the folder {out}: {e.strerror}") from e
