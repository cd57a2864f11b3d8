"""igpt pretrain"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_cli.cli.candidates import runs, token_models
from igpt_cli.cli.options import MAX_SEED, Device, Force, Json, Out, Palette, Quiet
from igpt_cli.cli.output import TrainingDisplay, Voice, result, result_json
from igpt_cli.cli.training import (
    Accumulate,
    Augment,
    Compile,
    Epochs,
    Keep,
    MicroBatch,
    Precision,
    Recompute,
    Resume,
    SaveEvery,
    Shard,
    Tensorboard,
    TimeLimit,
    ValImages,
    ValPart,
    check_usage,
    command_typed,
    settings_of,
    shown,
)

TokensArg = Annotated[
    str | None,
    typer.Argument(
        metavar="T",
        help="A token file, or images, which are quantized on the way. Default: data/tokens-<R>.h5.",
        show_default=False,
    ),
]


def pretrain(
    tokens: TokensArg = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            autocompletion=token_models,
            help="Which model; `igpt models` lists them.  [default: igpt-tiny]",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", metavar="ar|bert", help="ar: next pixel; bert: masked pixels.  [default: ar]"),
    ] = None,
    n_layer: Annotated[int | None, typer.Option("--n-layer", help="Blocks.  [default: the preset's]")] = None,
    n_head: Annotated[int | None, typer.Option("--n-head", help="Attention heads.  [default: the preset's]")] = None,
    n_embd: Annotated[int | None, typer.Option("--n-embd", help="Width.  [default: the preset's]")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="End after so many steps.  [default: the preset's]")
    ] = None,
    epochs: Epochs = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="End after so much time (90s, 15m, 2h); the learning rate falls to 0 by then, by the clock.",
        ),
    ] = None,
    time_limit: TimeLimit = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Images in a step, over all GPUs.  [default: the preset's]")
    ] = None,
    micro_batch: MicroBatch = None,
    accumulate: Accumulate = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate.  [default: the preset's]")
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            "--warmup-steps", help="Steps of linear warm-up.  [default: one epoch, at most a tenth of the steps]"
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", metavar="adamw|muon", help="The paper's Adam, or Muon for the blocks' matrices."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Weight decay of the matrices.  [default: 0]")
    ] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", help="Largest norm of the gradient.  [default: not clipped]")
    ] = None,
    mask_prob: Annotated[
        float | None, typer.Option("--mask-prob", help="bert: probability that a pixel is masked.  [default: 0.15]")
    ] = None,
    augment: Augment = None,
    val_part: ValPart = None,
    val_images: ValImages = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", min=1, help="Steps between validations.  [default: an epoch]")
    ] = None,
    save_every: SaveEvery = None,
    keep: Keep = None,
    precision: Precision = None,
    compile: Compile = None,
    recompute: Recompute = None,
    shard: Shard = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Take the settings of this run's config.json; options go first."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init", metavar="RUN", autocompletion=runs, help="Start from this model's weights instead of fresh ones."
        ),
    ] = None,
    resume: Resume = None,
    tensorboard: Tensorboard = False,
    palette: Palette = None,
    resolution: Annotated[int, typer.Option("--resolution", "-r", help="Model resolution, where T is images.")] = 32,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=MAX_SEED, help="Seed of weights, held-out part, order and masks.  [default: 0]"
        ),
    ] = None,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain a model on next or masked pixels and write a run; prints the run's folder.

    \b
    Examples:
      igpt pretrain                                  igpt-tiny on data/tokens-32.h5, about two minutes on a CPU
      igpt pretrain tokens.h5 -m igpt-s --epochs 10 -o runs/small
      igpt pretrain --resume latest                  go on after Ctrl-C, a crash or a time limit
      igpt pretrain tokens.h5 --config runs/small/config.json --lr 0.001
      igpt pretrain photos/ --init builtin:igpt-photos   train a model further, on images of your own
      torchrun --nproc-per-node 8 -m igpt_cli pretrain tokens.h5 -m igpt-l
      igpt probe "$(igpt pretrain tokens.h5)" --layer 20 --json | jq .accuracy

    What is not given comes from the model's preset. On a CPU, without --steps, --epochs, --budget or --time-limit,
    training ends after 110 seconds. A tenth of the split "train" is held out for the validation loss, unless there is
    a split "val". Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the run.
    """
    given = {k: v for k, v in locals().items() if v is not None}
    voice = Voice(quiet)
    from dataclasses import replace

    from igpt_cli.cli.resolve import open_tokens_or_images, palette_or_default
    from igpt_cli.device import choose_device
    from igpt_cli.model_dir import load_model, read_config
    from igpt_cli.models.registry import check_of_tokens
    from igpt_cli.tokens.anything import is_token_file
    from igpt_cli.training.checkpoint import recorded_tokens
    from igpt_cli.training.distributed import joined, under_torchrun
    from igpt_cli.training.pretrain import pretrain as run_pretraining
    from igpt_cli.training.pretrain import resume as run_resumed
    from igpt_cli.training.recipe import CPU_BUDGET, described, with_an_end
    from igpt_cli.workspace import default_tokens, new_run, resolve_run

    settings = settings_of(given)
    check_usage(given)
    if init and (fixed := [o for o in ("model", "objective", "n_layer", "n_head", "n_embd") if o in settings]):
        names = ", ".join("--" + o.replace("_", "-") for o in fixed)
        raise typer.BadParameter(f"--init takes the model of {init} as it is; leave out {names}")
    with joined(device, voice.say) as (ranks, device), ExitStack() as stack:
        if not ranks.first:
            voice = Voice(quiet=True)
        run = resolve_run(resume) if resume else None
        if resume == "latest":
            voice.default("run", run)
        recipe, execution = _recipe_and_execution(settings, config, run)
        initial = load_model(init) if init else None
        if initial is not None:
            recipe = replace(recipe, **described(initial.config["model"]))
            palette, resolution = palette or init, initial.config["model"].get("resolution", resolution)
        check_of_tokens(recipe.model)
        if run:
            was = read_config(run)
            palette, resolution = palette or str(run), was["model"].get("resolution", resolution)
        if tokens is None:
            tokens = recorded_tokens(run, was) if run else str(default_tokens())
            voice.default("tokens", tokens)
        if run is None and out is None:
            out = ranks.from_first(lambda: stack.enter_context(new_run(recipe.model)))
            voice.default("run", out)
        if run is None and with_an_end(recipe, execution, choose_device(device)) != recipe:
            voice.default("budget on a CPU", f"{CPU_BUDGET:.0f} s of training, about two minutes in all")
        if under_torchrun() and not is_token_file(tokens):
            raise typer.BadParameter(f"{tokens} is no token file; under torchrun, run `igpt tokenize` first")
        with (
            open_tokens_or_images(tokens, lambda: palette_or_default(palette, voice), resolution, voice) as file,
            shown(voice, ranks, run or out, "pretraining", tensorboard) as (display, told),
        ):
            where: dict[str, Any] = {"device": device, "ranks": ranks}
            if run:
                done = run_resumed(file, run, settings, **where, **told)
            else:
                noted: dict[str, Any] = {"command": command_typed(), "data_path": str(tokens)}
                done = run_pretraining(
                    file, out, recipe, execution, **where, **told, **noted, init=initial, force=force
                )
        if ranks.first:
            _report(done, display, json, voice)


def _recipe_and_execution(settings: dict[str, Any], config: Path | None, run: Path | None):
    """What was asked for, over what --config says."""
    from dataclasses import replace

    from igpt_cli.training.recipe import Execution, Recipe, read_recipe

    recipe, execution = read_recipe(config) if config else (Recipe(), Execution())
    if config and any(k in settings for k in ("steps", "epochs", "budget")):  # the one given replaces all of them
        recipe = replace(recipe, steps=None, epochs=None, budget=None)
    if "micro_batch" in settings or "accumulate" in settings:
        execution = replace(execution, micro_batch=None, accumulate=None)
    of_execution = {k: v for k, v in settings.items() if hasattr(execution, k)}
    of_recipe = {k: v for k, v in settings.items() if k not in of_execution}
    return replace(recipe, **of_recipe), replace(execution, **of_execution)


def _report(done, display: TrainingDisplay, json: bool, voice: Voice) -> None:
    """The end of a run: what it gave, and the next command."""
    held_out = f", held-out loss {done.val_loss:.3f}" if done.val_loss is not None else ""
    if display.first_step == done.steps:
        voice.say(f"{done.run} is complete: it has done its {done.steps:,} steps; nothing was left to do")
    elif done.train_loss is not None:
        voice.say(
            f"{done.steps:,} steps in {done.seconds:.0f} s: training loss {done.train_loss:.3f}{held_out} nats per "
            f"token (a uniform guess: {display.uniform:.3f})"
        )
    if done.status == "time limit":
        voice.say(f"the time limit ended it; go on with: igpt pretrain --resume {done.run}")
    else:
        voice.say(f"next: igpt probe {done.run} --layers all")
    if json:
        from igpt_cli.model_dir import read_config

        result_json({"run": str(done.run), **{k: v for k, v in read_config(done.run)["result"].items() if k != "run"}})
    else:
        result(done.run)
