"""igpt train"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.candidates import rgb_models_and_runs, runs
from igpt_cli.cli.options import MAX_SEED, Column, Device, Force, Json, Out, Quiet, TestPart
from igpt_cli.cli.output import TrainingDisplay, Voice, result, result_json
from igpt_cli.cli.training import (
    Accumulate,
    Epochs,
    HeadRate,
    Keep,
    LayerDecay,
    MicroBatch,
    Precision,
    Resume,
    SaveEvery,
    Shard,
    Tensorboard,
    TimeLimit,
    ValImages,
    ValPart,
    also,
    check_usage,
    command_typed,
    rates_told,
    resumed_tokens,
    settings_of,
    shown,
    sizes_of,
    test_images_of,
)

if TYPE_CHECKING:
    from igpt_cli.training.supervised import TrainResult


def train(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            autocompletion=rgb_models_and_runs,
            help="A model of RGB images by name, such as resnet-18-32 (igpt models lists them), or a run or an import "
            "whose weights it begins with.",
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
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="plain|deit|swin|resnet", help="What is not given otherwise.  [default: plain]"
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="RUN",
            autocompletion=runs,
            help="A trained model with the same classes, to be learnt from.",
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill",
            metavar="none|soft|hard",
            help="Learn the teacher's probabilities, or its decision.  [default: hard with a teacher]",
        ),
    ] = None,
    tau: Annotated[float | None, typer.Option("--tau", help="Temperature of --distill soft.  [default: 3]")] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option("--distill-weight", help="The teacher's part in the loss.  [default: 0.1 of soft, 0.5 of hard]"),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="End after so many steps.")] = None,
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
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience", min=0, help="End after so many validations without a better one; 0: never.  [default: 0]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "-b", help="Images in a step, over all GPUs.  [default: the recipe's; 64 on a CPU]"
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr", help="Peak learning rate.  [default: the recipe's for this batch; a tenth with trained weights]"
        ),
    ] = None,
    head_learning_rate: HeadRate = None,
    layer_decay: LayerDecay = None,
    warmup_steps: Annotated[
        int | None, typer.Option("--warmup-steps", help="Steps of linear warm-up.  [default: the recipe's part]")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer",
            metavar="adamw|muon|sgd",
            help="AdamW, Muon for the linear maps of blocks, or SGD with momentum.  [default: the recipe's]",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            "--weight-decay", help="Of what multiplies, not biases, norms, positions.  [default: 0.05; 0.0001 of SGD]"
        ),
    ] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", help="Largest norm of the gradient; 0: any.  [default: the recipe's]")
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            "--augment",
            metavar="none|flip|crop-flip|resized-crop-flip",
            help="How images are framed.  [default: the recipe's]",
        ),
    ] = None,
    randaugment: Annotated[
        float | None, typer.Option("--randaugment", help="Strength of RandAugment, 0 (off) to 10.")
    ] = None,
    colour_jitter: Annotated[
        float | None, typer.Option("--colour-jitter", help="How much brightness, contrast and colour vary.")
    ] = None,
    erasing: Annotated[float | None, typer.Option("--erasing", help="Probability that a box becomes noise.")] = None,
    mixup: Annotated[
        float | None, typer.Option("--mixup", help="Alpha of the share with which two images are mixed; 0: off.")
    ] = None,
    cutmix: Annotated[
        float | None, typer.Option("--cutmix", help="Alpha of the share of a box put into another image; 0: off.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option("--label-smoothing", help="The part of the target that all classes share.")
    ] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Views of each image in a step.")] = None,
    drop_path: Annotated[
        float | None, typer.Option("--drop-path", help="Stochastic depth: the rate at the last block.")
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
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema", help="Decay of a moving average of the weights, which is then the model.  [default: off]"
        ),
    ] = None,
    labels_per_class: Annotated[
        int | None,
        typer.Option(
            "--labels-per-class", min=1, help="Use so many labelled training images of each class.  [default: all]"
        ),
    ] = None,
    val_part: ValPart = None,
    val_images: ValImages = None,
    test_images: Annotated[
        str | None, typer.Option("--test-images", metavar="N|all", help="Test images to classify.  [default: all]")
    ] = None,
    test_part: TestPart = None,
    column: Column = None,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", min=1, help="Steps between validations.  [default: an epoch, at least 10]"),
    ] = None,
    save_every: SaveEvery = None,
    keep: Keep = None,
    micro_batch: MicroBatch = None,
    accumulate: Accumulate = None,
    precision: Precision = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks.  [default: no]")
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            "--recompute/--no-recompute",
            help="Compute activations again in the backward pass, to save memory.  [default: no]",
        ),
    ] = None,
    shard: Shard = None,
    resume: Resume = None,
    tensorboard: Tensorboard = False,
    palette: Annotated[
        str | None,
        typer.Option("--palette", "-p", help="Where T is images: their palette.  [default: data/palette.npz]"),
    ] = None,
    resolution: Annotated[int, typer.Option("--resolution", "-r", help="Where T is images: their side.")] = 32,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=MAX_SEED, help="Seed of weights, held-out part, order, augmentation.  [default: 0]"
        ),
    ] = None,
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
      igpt train --resume runs/vit                   go on after Ctrl-C, a crash or a time limit
      torchrun --nproc-per-node 8 -m igpt_cli train swin-t tokens-224.h5 --recipe swin
      igpt train resnet-18-32 cifar.h5 --json | jq .accuracy

    The images are those that T kept (igpt tokenize --keep-rgb), or the colours of its tokens. A tenth of each class of
    the split "train" is held out, unless there is a split "val"; the weights of the best held-out accuracy are kept,
    and the split "test" is classified once, at the end. Without --steps, --epochs or --budget training ends after the
    recipe's epochs, on a CPU after 110 seconds. The recipe plain augments nothing: --augment crop-flip suits CIFAR,
    but digits must not be mirrored. A trained MODEL sees images as it did before, and gets a fresh class head unless T
    has just its classes.
    """
    given = {k: v for k, v in locals().items() if v is not None}
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_for_model, open_tokens_or_images, palette_or_default, selection, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.model_dir import load_model, read_config
    from igpt_cli.tokens.anything import is_token_file
    from igpt_cli.training.begin import check_trained
    from igpt_cli.training.distributed import joined, under_torchrun
    from igpt_cli.training.recipe import CPU_BUDGET, with_an_end
    from igpt_cli.training.supervised import resume as run_resumed
    from igpt_cli.training.supervised import train as run_training
    from igpt_cli.workspace import default_tokens, new_run, resolve_run

    settings = _settings(given)
    sizes = {**sizes_of(sizes_given or ()), **({"shift": False} if no_shift else {})}
    check_usage(given)
    if model is None and resume is None:
        raise typer.BadParameter("name the MODEL to train, such as resnet-18-32, or a run to --resume")
    if resume and sizes:
        raise typer.BadParameter("--resume goes on with the run's own model; leave out --set and --no-shift")
    with joined(device, voice.say) as (ranks, device), ExitStack() as stack:
        if not ranks.first:
            voice = Voice(quiet=True)
        supervision, execution = _supervision_and_execution(settings)
        base = load_model(model) if model is not None and not resume and _is_run(model) else None
        if base:
            check_trained(base)
        if base and palette:
            raise typer.BadParameter(f"{model} has its own preparation of images; leave out --palette")
        if resume:
            out = resolve_run(resume)
            if resume == "latest":
                voice.default("run", out)
            was = read_config(out)
            tokens = resumed_tokens(model, tokens, out, was, voice)
        else:
            if tokens is None and base:
                tokens = tokens_of(base, voice)
            elif tokens is None:
                tokens = str(default_tokens())
                voice.default("tokens", tokens)
            if out is None:
                out = ranks.from_first(
                    lambda: stack.enter_context(new_run(f"{base.name}-finetuned" if base else str(model)))
                )
                voice.default("run", out)
            if with_an_end(supervision, execution, choose_device(device)) != supervision:
                voice.default("budget on a CPU", f"{CPU_BUDGET:.0f} s of training, about two minutes in all")
        if under_torchrun() and not is_token_file(tokens):
            raise typer.BadParameter(f"{tokens} is no token file; under torchrun, run `igpt tokenize` first")
        teaches = load_model(teacher) if teacher else None
        sees = load_model(out) if resume and not is_token_file(tokens) else base
        began = sees.config["data"] if resume and sees else {}
        held = {"needs": ("train",)} | selection(began, test_part, column, seed)
        opened = (
            open_for_model(tokens, sees, voice, **held)
            if sees
            else open_tokens_or_images(tokens, lambda: palette_or_default(palette, voice), resolution, voice, **held)
        )
        with (
            opened as file,
            shown(voice, ranks, out, "training", tensorboard) as (display, told),
        ):
            told["on_start"] = also(lambda config: _introduce(config, voice), told["on_start"])
            where: dict[str, Any] = {"device": device, "ranks": ranks, "teacher": teaches}
            if resume:
                done = run_resumed(file, out, settings, **where, **told)
            else:
                noted: dict[str, Any] = {"command": command_typed(), "data_path": str(tokens)}
                done = run_training(
                    base or str(model),
                    file,
                    out,
                    supervision,
                    execution,
                    sizes=sizes,
                    **where,
                    **told,
                    **noted,
                    force=force,
                )
        if ranks.first:
            _report(done, display, json, voice)


def _is_run(model: str) -> bool:
    """Whether MODEL is a model directory, and no preset's name."""
    from pathlib import Path

    from igpt_cli.models.registry import all_presets
    from igpt_cli.workspace import BUILTIN

    if model in all_presets():
        return False
    return model == "latest" or model.startswith(BUILTIN) or "/" in model or Path(model).is_dir()


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings among the options given, as Supervision and Execution name and type them."""
    options = ("model", "teacher", "no_shift", "sizes_given")
    settings = {k: v for k, v in settings_of(given).items() if k not in options}
    if "teacher" in given and "resume" not in given:
        settings.setdefault("distill", "hard")
    if (text := settings.get("test_images")) is not None:
        settings["test_images"] = test_images_of(text)
    return settings


def _supervision_and_execution(settings: dict[str, Any]):
    from igpt_cli.training.recipe import Execution
    from igpt_cli.training.supervision import Supervision

    of_execution = {k: v for k, v in settings.items() if hasattr(Execution, k)}
    return Supervision(**{k: v for k, v in settings.items() if k not in of_execution}), Execution(**of_execution)


def _introduce(config: dict[str, Any], voice: Voice) -> None:
    """What is particular to supervised training, beside what every run says at its start."""
    model, training, data = config["model"], config["training"], config["data"]
    names = {
        "randaugment": "RandAugment",
        "colour_jitter": "colour jitter",
        "erasing": "erasing",
        "mixup": "mixup",
        "cutmix": "CutMix",
        "label_smoothing": "label smoothing",
        "drop_path": "stochastic depth",
        "ema": "moving average",
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
        rates = f"; peak learning rate {training['learning_rate']:g}{rates_told(training)}"
        voice.say(f"begins with the weights of {origin['path']}, {head}{rates}")
    if teacher := config.get("teacher"):
        what = f"soft, temperature {training['tau']:g}" if training["distill"] == "soft" else "hard"
        voice.say(f"teacher {teacher['path']} ({teacher['name']}), {what}, {training['distill_weight']:g} of the loss")
    if data["left_out"]:
        counted = ", ".join(f"{n:,} of {name!r}" for name, n in data["left_out"].items())
        voice.say(f"images without a label are left out: {counted}")


def _report(done: TrainResult, display: TrainingDisplay, json: bool, voice: Voice) -> None:
    """The end of a run: what it gave, and the next command."""
    if display.first_step == done.steps:
        voice.say(f"{done.run} is complete: it has done its {done.steps:,} steps; nothing was left to do")
    elif done.best is not None:
        voice.say(
            f"{done.steps:,} steps in {done.seconds:.0f} s; the best held-out accuracy, {done.val_accuracy:.2f}%, "
            f"was after step {done.best['step']:,}"
        )
    if done.accuracy is not None and done.interval is not None:
        low, high = done.interval
        voice.say(f"test accuracy {done.accuracy:.2f}% of {done.n_test:,} images (95%: {low:.1f} to {high:.1f})")
        if done.accuracy_class is not None:
            voice.say(
                f"of both heads together; the class head alone {done.accuracy_class:.2f}%, the distillation head "
                f"alone {done.accuracy_distillation:.2f}%"
            )
    elif done.status == "time limit":
        voice.say(f"the time limit ended it; go on with: igpt train --resume {done.run}")
    else:
        voice.say("there are no labelled test images, so nothing was tested")
    if done.status != "time limit":
        voice.say(f"next: igpt probe {done.run} --layers all, to see what the layers have learnt")
    if json:
        from igpt_cli.model_dir import read_config

        result_json({"run": str(done.run), **{k: v for k, v in read_config(done.run)["result"].items() if k != "run"}})
    else:
        result(done.run)
