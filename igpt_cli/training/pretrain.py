"""Pretraining: tokens in, a run out (section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from igpt_cli.device import choose_device
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.model_dir import CONFIG, WEIGHTS, ModelDir, check_fit, new_config, read_config
from igpt_cli.models.registry import build_model, check_of_tokens, count_parameters, model_config
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.checkpoint import FINETUNED_FROM, is_supervised, last_checkpoint
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.loop import Progress, Record
from igpt_cli.training.recipe import (
    Execution,
    Recipe,
    check_execution,
    described,
    differing,
    for_config,
    recipe_of,
    with_an_end,
)
from igpt_cli.training.run import (
    ALONE,
    Told,
    carry_out,
    data_of,
    differing_data,
    file_sha256,
    make_run,
    resumed_execution,
)
from igpt_cli.training.setup import Setup, resolve
from igpt_cli.workspace import resolve_run


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave: losses in nats per token, `seconds` in all, `status` "done" or why it ended early."""

    run: Path
    status: str
    steps: int
    tokens_seen: int
    train_loss: float | None
    val_loss: float | None
    best: dict[str, float] | None
    seconds: float


def pretrain(
    tokens: TokenFile,
    out: Path | str,
    recipe: Recipe | None = None,
    execution: Execution | None = None,
    *,
    init: ModelDir | None = None,
    device: str = "auto",
    ranks: Ranks = ALONE,
    force: bool = False,
    command: str | None = None,
    data_path: str | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> PretrainResult:
    """Pretrain a model on a token file's split "train" and write the run `out`.

    Args:
        tokens: an open token file; its resolution and palette become the model's.
        out: the run's folder; made, and refused if it is there already, unless `force`.
        recipe: what is learned; what is None comes from the preset.
        execution: how the machine does it.
        init: a trained model whose weights training starts from; the recipe takes its name, sizes and objective.
        device: see `device.choose_device`.
        ranks: this process's place among those of torchrun, from `distributed.joined`; each calls this function.
        command: what to record as the command that made the run.
        data_path: what to record as the data, where `tokens` is a temporary file made of it.
        on_start: called once with the resolved settings (the run's config.json).
        on_record: called with each record of metrics.jsonl, to which `fraction` (of the run, 0..1) is added.
        on_event: called with a sentence now and then, such as that the validation loss rose.

    Raises:
        InputError, MismatchError, OutputError: before any training.
        OutputError: a checkpoint could not be written; those before it are as they were.
        NonFiniteError: the gradient became NaN or infinite; the last good weights are in `out`.
        Interrupted: SIGINT, SIGTERM or SIGUSR1; a checkpoint of the last step is in `out`.
    """
    told, out, chosen = Told(on_start, on_record, on_event), Path(out), choose_device(device)
    recipe, execution = recipe or Recipe(), execution or Execution()
    check_execution(execution)
    if init is not None:
        check_fit(init, tokens)
        recipe = replace(recipe, **described(init.config["model"]))
    check_of_tokens(recipe.model)
    recipe, data = resolve(tokens, with_an_end(recipe, execution, chosen), chosen)
    description = model_config(
        recipe.model,
        resolution=tokens.resolution,
        n_vocab=tokens.n_vocab,
        objective=recipe.objective,
        **recipe.sizes,
    )
    config = new_config(
        description,
        training={**for_config(recipe), "n_parameters": _count(description)},
        execution=asdict(execution),
        data=data_of(
            tokens,
            data_path,
            n_train=len(data.rows),
            n_val=len(data.val),
            tokens_per_step=recipe.batch_size * tokens.resolution**2,
        ),
        result={"status": "running"},
    )
    if command:
        config["command"] = command
    setup = Setup(tokens, data, recipe, execution, description, chosen, ranks)
    if init is not None:
        config["initialised_from"] = {"path": init.run, "sha256": file_sha256(init.path / WEIGHTS)}
        setup.initial = init.model.state_dict()
    ranks.from_first(lambda: make_run(out, force, tokens, {**config, "machine": setup.machine}))
    config["machine"] = setup.machine
    return carry_out(setup, out, config, None, told, partial(_result, out, setup))


def resume(
    tokens: TokenFile,
    run: Path | str,
    given: dict[str, Any] | None = None,
    *,
    device: str = "auto",
    ranks: Ranks = ALONE,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> PretrainResult:
    """Go on with a run from its last checkpoint, as if it had never stopped.

    Args:
        tokens: the token file that the run was begun with.
        run: the run's folder, or "latest".
        given: settings asked for now, by name. Those of `Execution` take effect; those of `Recipe` must be what
            they were.

    The other arguments, and what is raised, as for `pretrain`.

    Raises:
        MismatchError: the tokens, the palette or a setting of the recipe differ from the run's; all are named.
    """
    told, run, chosen, given = Told(on_start, on_record, on_event), resolve_run(run), choose_device(device), given or {}
    config = ranks.from_first(lambda: read_config(run))
    if is_supervised(config):
        raise InputError(f"{run} is being trained with labels; go on with: igpt train --resume {run}")
    if FINETUNED_FROM in config:
        raise InputError(f"{run} is being fine-tuned; go on with: igpt finetune --resume {run}")
    folder = ranks.from_first(lambda: last_checkpoint(run))
    recipe, execution = recipe_of(config, run / CONFIG)
    changed = {k: v for k, v in given.items() if hasattr(execution, k)}
    differ = differing(recipe, {k: v for k, v in given.items() if k not in changed})
    differ += differing_data(config, tokens)
    if differ:
        raise MismatchError(
            f"{run} goes on as it was begun, but {'; '.join(differ)}; resume it with the settings and the token file "
            f"that it had ({config['data']['path']}), or start a new run with --config {run / CONFIG}"
        )
    execution = resumed_execution(execution, changed)
    recipe, data = resolve(tokens, replace(recipe, val_images=config["data"]["n_val"]), chosen)
    setup = Setup(tokens, data, recipe, execution, config["model"], chosen, ranks)
    config = {**config, "execution": asdict(execution), "machine": setup.machine, "result": {"status": "running"}}
    return carry_out(setup, run, config, folder, told, partial(_result, run, setup))


def _result(run: Path, setup: Setup, status: str, progress: Progress, found: dict[str, Any]) -> PretrainResult:
    return PretrainResult(
        run=run,
        status=status,
        steps=progress.step,
        tokens_seen=progress.step * setup.recipe.batch_size * setup.n_ctx,
        train_loss=progress.train_loss,
        val_loss=progress.val_loss,
        best=progress.best,
        seconds=round(progress.seconds, 3),
    )


def _count(description: dict[str, Any]) -> int:
    with torch.device("meta"):
        return count_parameters(build_model(description))
