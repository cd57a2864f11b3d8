"""igpt pretrain"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_cli.cli.candidates import runs, token_models
from igpt_cli.cli.options import Device, Force, Json, Out, Palette, Quiet
from igpt_cli.cli.settings_options import with_settings
from igpt_cli.cli.training import Job, Resume, Tensorboard, Where, check_usage, execute
from igpt_cli.training.settings import Execution, PretrainSettings

#: Settings that --init takes from the model.
ARCHITECTURE = ("model", "objective", "n_layer", "n_head", "n_embd")


@with_settings(PretrainSettings, model=token_models)
def pretrain(
    settings: dict[str, Any],
    tokens: Annotated[
        str | None,
        typer.Argument(
            metavar="T",
            help="A token file, or images, which are quantized on the way. Default: data/tokens-<R>.h5.",
            show_default=False,
        ),
    ] = None,
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
      igpt pretrain --resume latest                  continue after Ctrl-C, a crash or a time limit
      igpt pretrain tokens.h5 --config runs/small/config.json --lr 0.001
      igpt pretrain photos/ --init builtin:igpt-photos   train a model further, on images of your own
      torchrun --nproc-per-node 8 -m igpt_cli pretrain tokens.h5 -m igpt-l
      igpt probe "$(igpt pretrain tokens.h5)" --layer 20 --json | jq .accuracy

    What is not given comes from the model's preset. On a CPU, without --steps, --epochs, --budget or --time-limit,
    training ends after 110 seconds. A tenth of the split "train" is held out for the validation loss, unless there is
    a split "val". Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the run.
    """
    check_usage(resume, force, tensorboard, config=config, init=init, out=out)
    if init and (fixed := [o for o in ARCHITECTURE if o in settings]):
        names = ", ".join("--" + o.replace("_", "-") for o in fixed)
        raise typer.BadParameter(f"--init takes the model of {init} as it is; leave out {names}")

    def prepare(where: Where) -> Job:
        from igpt_cli.cli.resolve import open_tokens_or_images, palette_or_default
        from igpt_cli.model_dir import load_model
        from igpt_cli.models.registry import check_of_tokens
        from igpt_cli.training.pretrain import Pretraining
        from igpt_cli.training.settings import architecture

        nonlocal palette, resolution
        if resume:
            run, was = where.resumed(resume)
            model, named, make = was["model"], where.recorded_tokens(tokens, run, was), None
            palette = palette or str(run)
        else:
            initial = load_model(init) if init else None
            model = initial.config["model"] if initial else {}
            palette = palette or init
            requested, execution = requested_settings({**settings, **(architecture(model) if initial else {})}, config)
            check_of_tokens(requested.model)
            named, run = where.default_tokens(tokens), out or where.new_run(requested.model)
            where.say_budget(requested, execution)
            on: dict[str, Any] = {"init": initial, "device": where.device, "ranks": where.ranks}
            make = lambda file: Pretraining.new(file, requested, execution, **on)  # noqa: E731
        opened = open_tokens_or_images(
            named, lambda: palette_or_default(palette, where.voice), model.get("resolution", resolution), where.voice
        )
        return Job(named, opened, run, make)

    how: dict[str, Any] = {"device": device, "tensorboard": tensorboard, "force": force, "json": json, "quiet": quiet}
    execute("pretrain", prepare, lambda config, voice: None, settings, **how)


def requested_settings(settings: dict[str, Any], config: Path | None) -> tuple[PretrainSettings, Execution]:
    """What was requested, over what --config says."""
    from dataclasses import replace

    from igpt_cli.training.settings import read_settings, split_settings

    if config is None:
        return split_settings(PretrainSettings, settings)
    base, execution = read_settings(config)
    if any(k in settings for k in ("steps", "epochs", "budget")):  # the one given replaces all of them
        base = replace(base, steps=None, epochs=None, budget=None)
    if "micro_batch" in settings or "accumulate" in settings:
        execution = replace(execution, micro_batch=None, accumulate=None)
    of_execution = {k: v for k, v in settings.items() if hasattr(execution, k)}
    return replace(base, **{k: v for k, v in settings.items() if k not in of_execution}), replace(
        execution, **of_execution
    )
