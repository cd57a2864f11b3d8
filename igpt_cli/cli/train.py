"""igpt train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_cli.cli.candidates import rgb_models_and_runs, runs
from igpt_cli.cli.finetune import resumed_tokens
from igpt_cli.cli.options import Column, Device, Force, Json, Out, Quiet, TestPart
from igpt_cli.cli.output import Voice
from igpt_cli.cli.settings_options import with_settings
from igpt_cli.cli.training import (
    Job,
    Resume,
    Tensorboard,
    Where,
    check_usage,
    execute,
    rates_of,
    say_unlabelled,
    sizes_of,
)
from igpt_cli.training.settings import TrainSettings


@with_settings(TrainSettings)
def train(
    settings: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            autocompletion=rgb_models_and_runs,
            help="A model of RGB images by name, such as resnet-18-32 (igpt models lists them), or a run or an import "
            "whose weights training starts from.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Argument(
            metavar="T",
            help="A token file with labels, or images in class folders. Default: the workspace's token file, or what "
            "the run was trained on.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="RUN",
            autocompletion=runs,
            help="A trained model with the same classes, to learn from.",
        ),
    ] = None,
    sizes_given: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A size of the model in place of the preset's, such as patch_size=2 or pos_embed=2d. May be repeated.",
            show_default=False,
        ),
    ] = None,
    no_shift: Annotated[
        bool | None, typer.Option("--no-shift", help="Swin: keep the windows in their places, the paper's ablation.")
    ] = None,
    test_part: TestPart = None,
    column: Column = None,
    resume: Resume = None,
    tensorboard: Tensorboard = False,
    palette: Annotated[
        str | None,
        typer.Option("--palette", "-p", help="Where T is images: their palette.  [default: data/palette.npz]"),
    ] = None,
    resolution: Annotated[int, typer.Option("--resolution", "-r", help="Where T is images: their side.")] = 32,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model of RGB images on labelled images and write a run; prints the run's folder.

    \b
    Examples:
      igpt train vit-ti-32                           on data/tokens-32.h5, about two minutes on a CPU
      igpt train resnet-18-32 cifar.h5 --recipe plain --augment crop-flip --epochs 5 -o runs/r18
      igpt train vit-ti-32 cifar.h5 --recipe deit --epochs 100 -o runs/vit
      igpt train resnet-18-32 cifar.h5 --recipe resnet --epochs 30 -o runs/r18-sgd
      igpt train vit-ti-32 cifar.h5 --set patch_size=2 --set pos_embed=2d --set global_pool=avg -o runs/vit-2
      igpt train vit-ti-32 photos/ --test-part 0.2 -o runs/photos
      igpt train runs/vit photos/ --layer-decay 0.75 --epochs 10 -o runs/tuned
      igpt train deit-ti-distilled-32 cifar.h5 --recipe deit --teacher runs/r18 --distill hard -o runs/deit
      igpt train --resume runs/vit                   continue after Ctrl-C, a crash or a time limit
      torchrun --nproc-per-node 8 -m igpt_cli train swin-t tokens-224.h5 --recipe swin
      igpt train resnet-18-32 cifar.h5 --json | jq .accuracy

    The images are those that T kept (igpt tokenize --keep-rgb), or the colours of its tokens. A tenth of each class of
    the split "train" is held out, unless there is a split "val"; the weights of the best held-out accuracy are kept,
    and the split "test" is classified once, at the end. Without --steps, --epochs or --budget training ends after the
    recipe's epochs, on a CPU after 110 seconds. The recipe plain augments nothing: --augment crop-flip suits CIFAR,
    but digits must not be mirrored. A trained MODEL sees images as it did before, and gets a fresh class head unless T
    has just its classes. With --teacher, --distill is hard unless given.
    """
    sizes = {**sizes_of(sizes_given or ()), **({"shift": False} if no_shift else {})}
    check_usage(resume, force, tensorboard, out=out)
    if model is None and resume is None:
        raise typer.BadParameter("name the MODEL to train, such as resnet-18-32, or a run to --resume")
    if resume and sizes:
        raise typer.BadParameter("--resume continues with the run's own model; leave out --set and --no-shift")

    def prepare(where: Where) -> Job:
        from igpt_cli.cli.resolve import open_for_model, open_tokens_or_images, palette_or_default, selection, tokens_of
        from igpt_cli.model_dir import load_model
        from igpt_cli.tokens.open_or_tokenize import is_token_file
        from igpt_cli.training.settings import split_settings
        from igpt_cli.training.supervised import Supervised, check_trained

        sees, began = None, {}
        teaches = load_model(teacher) if teacher else None
        if resume:
            folder, was = where.resumed(resume)
            named, make = where.recorded_tokens(resumed_tokens(model, tokens), folder, was), None
            if not is_token_file(named):
                sees, began = load_model(folder), was["data"]
        else:
            sees = base = load_model(str(model)) if _is_run(str(model)) else None
            if base:
                check_trained(base)
                if palette:
                    raise typer.BadParameter(f"{model} has its own preparation of images; leave out --palette")
            named = tokens_of(base, where.voice) if base and tokens is None else where.default_tokens(tokens)
            requested, execution = split_settings(TrainSettings, settings)
            folder = out or where.new_run(f"{base.name}-finetuned" if base else str(model))
            where.say_budget(requested, execution)
            on: dict[str, Any] = {"sizes": sizes, "teacher": teaches, "device": where.device, "ranks": where.ranks}
            make = lambda file: Supervised.new(base or str(model), file, requested, execution, **on)  # noqa: E731
        held = {"needs": ("train",)} | selection(began, test_part, column, settings.get("seed"))
        if sees:
            opened = open_for_model(named, sees, where.voice, **held)
        else:
            colours = lambda: palette_or_default(palette, where.voice)  # noqa: E731
            opened = open_tokens_or_images(named, colours, resolution, where.voice, **held)
        return Job(named, opened, folder, make, teaches)

    if teacher and not resume:
        settings.setdefault("distill", "hard")
    how: dict[str, Any] = {"device": device, "tensorboard": tensorboard, "force": force, "json": json, "quiet": quiet}
    execute("train", prepare, _introduce, settings, **how)


def _is_run(model: str) -> bool:
    """Whether MODEL is a model directory, and no preset's name."""
    from igpt_cli.models.registry import all_presets
    from igpt_cli.workspace import BUILTIN

    if model in all_presets():
        return False
    return model == "latest" or model.startswith(BUILTIN) or "/" in model or Path(model).is_dir()


def _introduce(config: dict[str, Any], voice: Voice) -> None:
    """What is particular to supervised training."""
    model, training, data = config["model"], config["training"], config["data"]
    names = {
        "randaugment": "RandAugment",
        "colour_jitter": "colour jitter",
        "erasing": "erasing",
        "mixup": "mixup",
        "cutmix": "CutMix",
        "label_smoothing": "label smoothing",
        "drop_path": "stochastic depth",
        "ema": "EMA",
    }
    used = [f"{name} {training[key]:g}" for key, name in names.items() if training.get(key)]
    used += [f"{training['repeats']} views of each image"] if training["repeats"] > 1 else []
    voice.say(
        f"{model['n_classes']} classes; recipe {training['recipe']} with {training['optimizer']}: augmentation "
        + training["augment"]
        + "".join(f", {u}" for u in used)
        + ("; images as they were kept" if data["images"] == "rgb" else "; images are the colours of tokens")
    )
    if origin := config.get("finetuned_from"):
        head = "its class head, too" if origin["head"] == "kept" else "a fresh class head"
        rates = f"; peak learning rate {training['learning_rate']:g}{rates_of(training)}"
        voice.say(f"starts from the weights of {origin['path']}, {head}{rates}")
    if teacher := config.get("teacher"):
        what = f"soft, temperature {training['tau']:g}" if training["distill"] == "soft" else "hard"
        voice.say(f"teacher {teacher['path']} ({teacher['name']}), {what}, {training['distill_weight']:g} of the loss")
    say_unlabelled(data, voice)
