"""igpt finetune"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.candidates import runs
from igpt_cli.cli.options import MAX_SEED, Column, Device, Force, Json, Out, Quiet, TestPart
from igpt_cli.cli.output import TrainingDisplay, Voice, result, result_json
from igpt_cli.cli.training import (
    Accumulate,
    Augment,
    Compile,
    Epochs,
    HeadRate,
    Keep,
    LayerDecay,
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
    also,
    check_usage,
    command_typed,
    rates_told,
    resumed_tokens,
    settings_of,
    shown,
    test_images_of,
)

if TYPE_CHECKING:
    from igpt_cli.training.finetune import FinetuneResult


def finetune(
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
    from_scratch: Annotated[
        bool | None,
        typer.Option("--from-scratch", help="Begin with fresh weights, not RUN's: the baseline to compare with."),
    ] = None,
    labels_per_class: Annotated[
        int | None,
        typer.Option(
            "--labels-per-class", min=1, help="Use so many labelled training images of each class.  [default: all]"
        ),
    ] = None,
    head_layer: Annotated[
        int | None,
        typer.Option(
            "--head-layer", help="Layer that the class head reads, as in igpt probe.  [default: the final norm]"
        ),
    ] = None,
    gen_weight: Annotated[
        float | None, typer.Option("--gen-weight", help="Weight of L_GEN, the loss of pretraining.  [default: 1]")
    ] = None,
    clf_weight: Annotated[
        float | None, typer.Option("--clf-weight", help="Weight of L_CLF, the loss of the classes.  [default: 1]")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="End after so many steps.")] = None,
    epochs: Epochs = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="End after so much time (90s, 15m, 2h).")
    ] = None,
    time_limit: TimeLimit = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience", min=0, help="End after so many validations without a better one; 0: never.  [default: 5]"
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--lr", help="Learning rate, constant after the warm-up.  [default: a tenth of pretraining's]"),
    ] = None,
    lr_search: Annotated[
        str | None,
        typer.Option(
            "--lr-search", metavar="A,B,...", help="Try these learning rates, a tenth of the run each; take the best."
        ),
    ] = None,
    head_learning_rate: HeadRate = None,
    layer_decay: LayerDecay = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option("--warmup-steps", help="Steps of linear warm-up.  [default: 20, at most a tenth of the steps]"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", help="Images in a step, over all GPUs.  [default: as pretrained]"),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer",
            metavar="adamw|muon",
            help="Adam, or Muon for the blocks' matrices.  [default: as pretrained]",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Weight decay of the matrices.  [default: as pretrained]")
    ] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", help="Largest norm of the gradient.  [default: as pretrained]")
    ] = None,
    augment: Augment = None,
    mask_prob: Annotated[
        float | None,
        typer.Option("--mask-prob", help="bert: probability that a pixel is masked.  [default: as pretrained]"),
    ] = None,
    bert_masks: Annotated[
        int | None,
        typer.Option(
            "--bert-masks", min=0, help="bert: masks whose predictions vote; 0: see the whole image.  [default: 5]"
        ),
    ] = None,
    val_part: ValPart = None,
    val_images: ValImages = None,
    test_images: Annotated[
        str | None,
        typer.Option("--test-images", metavar="N|all", help="Test images to classify.  [default: all; 300 on a CPU]"),
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
    compile: Compile = None,
    recompute: Recompute = None,
    shard: Shard = None,
    resume: Resume = None,
    tensorboard: Tensorboard = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=MAX_SEED, help="Seed of the images used, their order and masks.  [default: 0]"
        ),
    ] = None,
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
      igpt finetune --resume runs/tuned              go on after Ctrl-C, a crash or a time limit
      igpt finetune runs/small tokens.h5 --json | jq .accuracy

    A linear class head reads the mean over positions of the final norm; the loss is L_GEN + L_CLF. A tenth of each
    class of the split "train" is held out, unless there is a split "val"; the weights of the best held-out accuracy
    are kept, and the split "test" is classified once, at the end. Without --steps, --epochs or --budget training ends
    after 50 epochs, on a CPU after 110 seconds. Images are not augmented unless asked: crop-flip is the paper's for
    CIFAR, but digits must not be mirrored. Models of RGB images are fine-tuned by igpt train RUN.
    """
    given = {k: v for k, v in locals().items() if v is not None}
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_tokens_or_images, palette_or_default, selection, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.model_dir import load_model, read_config
    from igpt_cli.tokens.anything import is_token_file
    from igpt_cli.training.distributed import joined, under_torchrun
    from igpt_cli.training.finetune import check_pretrained
    from igpt_cli.training.finetune import finetune as run_finetuning
    from igpt_cli.training.finetune import resume as run_resumed
    from igpt_cli.training.recipe import CPU_BUDGET, with_an_end
    from igpt_cli.workspace import new_run, resolve_run

    settings = _settings(given)
    check_usage(given)
    with joined(device, voice.say) as (ranks, device), ExitStack() as stack:
        if not ranks.first:
            voice = Voice(quiet=True)
        if resume:
            out, base = resolve_run(resume), None
            if resume == "latest":
                voice.default("run", out)
            was = read_config(out)
            tokens = resumed_tokens(run, tokens, out, was, voice)
            side = was["model"].get("resolution", 32)
        else:
            base = load_model(_pretrained(run, voice))
            check_pretrained(base)
            tokens, side = tokens or tokens_of(base, voice), base.config["model"]["resolution"]
            tuning, execution = _tuning_and_execution(settings, choose_device(device), voice)
            if out is None:
                out = ranks.from_first(lambda: stack.enter_context(new_run(f"{base.name}-finetuned")))
                voice.default("run", out)
            if with_an_end(tuning, execution, choose_device(device)) != tuning:
                voice.default("budget on a CPU", f"{CPU_BUDGET:.0f} s of training")
        if under_torchrun() and not is_token_file(tokens):
            raise typer.BadParameter(f"{tokens} is no token file; under torchrun, run `igpt tokenize` first")
        began = was["data"] if resume and not is_token_file(tokens) else {}
        held = selection(began, test_part, column, seed)
        palette = (lambda: base.own_palette) if base else (lambda: palette_or_default(str(out), voice))
        with (
            open_tokens_or_images(tokens, palette, side, voice, needs=("train",), **held) as file,
            shown(voice, ranks, out, "fine-tuning", tensorboard) as (display, told),
        ):
            told["on_start"] = also(lambda config: _introduce(config, voice), told["on_start"])
            where: dict[str, Any] = {"device": device, "ranks": ranks}
            if base is None:
                done = run_resumed(file, out, settings, **where, **told)
            else:
                noted: dict[str, Any] = {"command": command_typed(), "data_path": str(tokens)}
                done = run_finetuning(base, file, out, tuning, execution, **where, **told, **noted, force=force)
        if ranks.first:
            _report(done, display, json, voice)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings among the options given, as Tuning and Execution name and type them; "all" test images are 0."""
    settings = settings_of(given)
    if (text := settings.get("test_images")) is not None:
        settings["test_images"] = test_images_of(text)
    if (text := settings.get("lr_search")) is not None:
        try:
            settings["lr_search"] = tuple(float(rate) for rate in text.split(","))
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is no list of learning rates, such as 1e-3,3e-4", param_hint="--lr-search"
            ) from None
        if "learning_rate" in settings:
            raise typer.BadParameter("--lr says which learning rate, --lr-search looks for one; give one of them")
    return settings


def _pretrained(run: str | None, voice: Voice) -> str:
    """The run named, or the newest if it was pretrained.

    Raises:
        InputError: none was named, and the newest is itself fine-tuned.
    """
    from igpt_cli.cli.resolve import run_or_default
    from igpt_cli.errors import InputError
    from igpt_cli.model_dir import read_config
    from igpt_cli.workspace import resolve_run

    if run is None:
        config = read_config(resolve_run(newest := run_or_default(None, voice)))
        if origin := config.get("finetuned_from"):
            raise InputError(
                f"the newest run, {newest}, is itself fine-tuned from {origin['path']}; name the run to fine-tune"
            )
        return newest
    return run


def _tuning_and_execution(settings: dict[str, Any], device, voice: Voice):
    """What was asked for; on a CPU fewer test images are classified, which is said."""
    from igpt_cli.training.recipe import Execution
    from igpt_cli.training.tuning import CPU_TEST_IMAGES, Tuning

    of_execution = {k: v for k, v in settings.items() if hasattr(Execution, k)}
    of_tuning = {k: v for k, v in settings.items() if k not in of_execution}
    if device.type == "cpu" and "test_images" not in settings:
        of_tuning["test_images"] = CPU_TEST_IMAGES
        voice.say(
            f"test images: at most {CPU_TEST_IMAGES}, to be quick on a CPU (default; --test-images all for all of them)"
        )
    return Tuning(**of_tuning), Execution(**of_execution)


def _introduce(config: dict[str, Any], voice: Voice) -> None:
    """What is particular to fine-tuning, beside what every run says at its start."""
    model, training, data = config["model"], config["training"], config["data"]
    origin = "fresh weights" if training["from_scratch"] else f"the weights of {config['finetuned_from']['path']}"
    layer = f"layer {model['head_layer']}" + (" (final norm)" if model["head_layer"] == model["n_layer"] else "")
    voice.say(
        f"{model['n_classes']} classes, head on {layer}; begins with {origin}; loss {training['gen_weight']:g} L_GEN + "
        f"{training['clf_weight']:g} L_CLF; augmentation {training['augment']}; learning rate constant"
        + rates_told(training)
    )
    if data["left_out"]:
        counted = ", ".join(f"{n:,} of {name!r}" for name, n in data["left_out"].items())
        voice.say(f"images without a label are left out: {counted}")


def _report(done: FinetuneResult, display: TrainingDisplay, json: bool, voice: Voice) -> None:
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
    elif done.status == "time limit":
        voice.say(f"the time limit ended it; go on with: igpt finetune --resume {done.run}")
    else:
        voice.say("there are no labelled test images, so nothing was tested")
    if done.status != "time limit":
        voice.say(f"next: igpt probe {done.run} --layers all, to see its head beside what the layers have learnt")
    if json:
        from igpt_cli.model_dir import read_config

        result_json({"run": str(done.run), **{k: v for k, v in read_config(done.run)["result"].items() if k != "run"}})
    else:
        result(done.run)
