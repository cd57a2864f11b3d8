"""igpt finetune"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from igpt_cli.cli.candidates import runs
from igpt_cli.cli.options import Column, Device, Force, Json, Out, Quiet, TestPart
from igpt_cli.cli.output import Voice
from igpt_cli.cli.settings_options import with_settings
from igpt_cli.cli.training import Job, Resume, Tensorboard, Where, check_usage, execute, rates_of, say_unlabelled
from igpt_cli.training.settings import FinetuneSettings


@with_settings(FinetuneSettings)
def finetune(
    settings: dict[str, Any],
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=runs,
            help="The pretrained model: a run's folder or builtin:igpt-tiny. Default: runs/latest.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Argument(
            metavar="T",
            help="A token file with labels, or images in class folders. Default: what the run was trained on.",
            show_default=False,
        ),
    ] = None,
    test_part: TestPart = None,
    column: Column = None,
    resume: Resume = None,
    tensorboard: Tensorboard = False,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model to classify, all its weights, from where pretraining left them; prints the new run's folder.

    \b
    Examples:
      igpt finetune                                  the newest run, on the images it was trained on
      igpt finetune builtin:igpt-tiny embedded --budget 5m -o runs/emoji
      igpt finetune runs/small tokens.h5 --augment crop-flip --lr-search 1e-3,3e-4,1e-4 -o runs/tuned
      igpt finetune runs/small tokens.h5 --from-scratch -o runs/scratch
      igpt finetune runs/small photos/ --test-part 0.2 -o runs/photos
      igpt finetune --resume runs/tuned              continue after Ctrl-C, a crash or a time limit
      igpt finetune runs/small tokens.h5 --json | jq .accuracy

    A linear class head reads the mean over positions of the final norm; the loss is L_GEN + L_CLF. A tenth of each
    class of the split "train" is held out, unless there is a split "val"; the weights of the best held-out accuracy
    are kept, and the split "test" is classified once, at the end. Without --steps, --epochs or --budget training ends
    after 50 epochs, on a CPU after 110 seconds. Images are not augmented unless requested: crop-flip is the paper's for
    CIFAR, but digits must not be mirrored. Models of RGB images are fine-tuned by igpt train RUN.
    """
    check_usage(resume, force, tensorboard, out=out)
    if "lr_search" in settings and "learning_rate" in settings:
        raise typer.BadParameter("--lr says which learning rate, --lr-search looks for one; give one of them")

    def prepare(where: Where) -> Job:
        from igpt_cli.cli.resolve import open_tokens_or_images, palette_or_default, selection, tokens_of
        from igpt_cli.model_dir import load_model
        from igpt_cli.tokens.open_or_tokenize import is_token_file
        from igpt_cli.training.finetune import Finetuning, check_pretrained
        from igpt_cli.training.settings import split_settings

        seed = settings.get("seed")
        if resume:
            folder, was = where.resumed(resume)
            named = where.recorded_tokens(resumed_tokens(run, tokens), folder, was)
            held = selection({} if is_token_file(named) else was["data"], test_part, column, seed)
            palette = lambda: palette_or_default(str(folder), where.voice)  # noqa: E731
            side = was["model"]["resolution"]
            opened = open_tokens_or_images(named, palette, side, where.voice, needs=("train",), **held)
            return Job(named, opened, folder)
        base = load_model(_pretrained(run, where.voice))
        check_pretrained(base)
        named = tokens or tokens_of(base, where.voice)
        requested, execution = split_settings(FinetuneSettings, _fewer_tests(settings, where))
        folder = out or where.new_run(f"{base.name}-finetuned")
        where.say_budget(requested, execution)
        on: dict[str, Any] = {"device": where.device, "ranks": where.ranks}
        held, side = selection({}, test_part, column, seed), base.config["model"]["resolution"]
        opened = open_tokens_or_images(named, lambda: base.own_palette, side, where.voice, needs=("train",), **held)
        return Job(named, opened, folder, lambda file: Finetuning.new(base, file, requested, execution, **on))

    how: dict[str, Any] = {"device": device, "tensorboard": tensorboard, "force": force, "json": json, "quiet": quiet}
    execute("finetune", prepare, _introduce, settings, **how)


def resumed_tokens(first: str | None, tokens: str | None) -> str | None:
    """What a run continues with: `igpt train --resume RUN [T]`, where T stands in the place of the `first` argument."""
    if first is not None and tokens is not None:
        raise typer.BadParameter("--resume RUN continues with the run's own model; give the token file alone")
    return first or tokens


def _pretrained(run: str | None, voice: Voice) -> str:
    """The run named, or the newest if it was pretrained.

    Raises:
        InputError: none was named, and the newest is itself fine-tuned.
    """
    from igpt_cli.cli.resolve import run_or_default
    from igpt_cli.errors import InputError
    from igpt_cli.model_dir import FINETUNED_FROM, read_config
    from igpt_cli.workspace import resolve_run

    if run is None:
        config = read_config(resolve_run(newest := run_or_default(None, voice)))
        if origin := config.get(FINETUNED_FROM):
            raise InputError(
                f"the newest run, {newest}, is itself fine-tuned from {origin['path']}; name the run to fine-tune"
            )
        return newest
    return run


def _fewer_tests(settings: dict[str, Any], where: Where) -> dict[str, Any]:
    """On a CPU fewer test images are classified, which is said."""
    from igpt_cli.device import choose_device
    from igpt_cli.training.finetune import CPU_TEST_IMAGES as MOST

    if choose_device(where.device).type != "cpu" or "test_images" in settings:
        return settings
    where.voice.say(f"test images: at most {MOST}, to be quick on a CPU (default; --test-images all for all of them)")
    return {**settings, "test_images": MOST}


def _introduce(config: dict[str, Any], voice: Voice) -> None:
    """What is particular to fine-tuning."""
    model, training = config["model"], config["training"]
    origin = "fresh weights" if training["from_scratch"] else f"the weights of {config['finetuned_from']['path']}"
    layer = f"layer {model['head_layer']}" + (" (final norm)" if model["head_layer"] == model["n_layer"] else "")
    voice.say(
        f"{model['n_classes']} classes, head on {layer}; starts from {origin}; loss {training['gen_weight']:g} L_GEN + "
        f"{training['clf_weight']:g} L_CLF; augmentation {training['augment']}; learning rate constant"
        + rates_of(training)
    )
    say_unlabelled(config["data"], voice)
