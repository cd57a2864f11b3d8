"""igpt pretrain"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from igpt_cli.cli.options import Device, Force, Json, Out, Palette, Quiet
from igpt_cli.cli.output import TrainingDisplay, Voice, result, result_json

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
        str, typer.Option("--model", "-m", help="Which model to train; `igpt models` lists them.")
    ] = "igpt-tiny",
    objective: Annotated[str, typer.Option("--objective", metavar="ar", help="ar: predict the next pixel.")] = "ar",
    n_layer: Annotated[int | None, typer.Option("--n-layer", help="Blocks.  [default: the preset's]")] = None,
    n_head: Annotated[int | None, typer.Option("--n-head", help="Attention heads.  [default: the preset's]")] = None,
    n_embd: Annotated[int | None, typer.Option("--n-embd", help="Width.  [default: the preset's]")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="End after so many steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="End after so many passes over the training images.")
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit", help="End after so many seconds of training; the learning rate falls by the clock."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b", help="Images in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    warmup_steps: Annotated[int | None, typer.Option("--warmup-steps", help="Steps of linear warm-up.")] = None,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", metavar="adamw|muon", help="The paper's Adam, or Muon for the blocks' matrices."),
    ] = None,
    augment: Annotated[
        str, typer.Option("--augment", metavar="none|flip|crop-flip", help="Augmentation of the token images.")
    ] = "none",
    precision: Annotated[
        str, typer.Option("--precision", metavar="auto|float32|bfloat16", help="Precision of the matrix products.")
    ] = "auto",
    val_images: Annotated[
        int, typer.Option("--val-images", min=1, help="Held-out images for the validation loss.")
    ] = 128,
    palette: Palette = None,
    resolution: Annotated[int, typer.Option("--resolution", "-r", help="Model resolution, where T is images.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights, held-out part and order.")] = 0,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain a model on next-pixel prediction and write a run; prints the run's folder.

    \b
    Examples:
      igpt pretrain                                  igpt-tiny on data/tokens-32.h5, about two minutes on a CPU
      igpt pretrain tokens.h5 -m igpt-s --epochs 10 -o runs/small
      igpt probe "$(igpt pretrain tokens.h5)" --layer 20 --json | jq .accuracy

    What is not given comes from the model's preset. On a CPU, without --steps, --epochs or --time-limit, training
    ends after 110 seconds. A tenth of the split "train" is held out for the validation loss, unless there is a split
    "val". Ctrl-C keeps the weights so far.
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_tokens_or_images, palette_or_default
    from igpt_cli.device import choose_device
    from igpt_cli.training.pretrain import CPU_TIME_LIMIT, Recipe
    from igpt_cli.training.pretrain import pretrain as run_pretraining
    from igpt_cli.workspace import default_tokens, new_run, set_latest

    recipe = Recipe(
        model=model,
        objective=objective,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        steps=steps,
        epochs=epochs,
        time_limit=time_limit,
        optimizer=optimizer,
        augment=augment,
        seed=seed,
        val_images=val_images,
        precision=precision,
    )
    if tokens is None:
        tokens = str(default_tokens())
        voice.default("tokens", tokens)
    if out is None:
        out = new_run(model)
        voice.default("run", out)
    if steps is None and epochs is None and time_limit is None and choose_device(device).type == "cpu":
        voice.default("time limit on a CPU", f"{CPU_TIME_LIMIT:.0f} s of training, about two minutes in all")
    with open_tokens_or_images(tokens, lambda: palette_or_default(palette, voice), resolution, voice) as file:
        with TrainingDisplay(voice) as display:
            done = run_pretraining(
                file,
                out,
                recipe,
                device=device,
                force=force,
                command=shlex.join(["igpt", *sys.argv[1:]]) if "igpt" in Path(sys.argv[0]).as_posix() else None,
                data_path=str(tokens),
                on_start=display.start,
                on_step=display.step,
            )
    set_latest(done.run)
    voice.say(
        f"{done.steps:,} steps in {done.seconds:.0f} s: training loss {done.train_loss:.3f}, held-out loss "
        f"{done.val_loss:.3f} nats per token (a uniform guess: {display.uniform:.3f})"
    )
    voice.say(f"next: igpt probe {done.run} --layers all")
    if json:
        from igpt_cli.model_dir import read_config

        result_json({"run": str(done.run), **{k: v for k, v in read_config(done.run)["result"].items() if k != "run"}})
    else:
        result(done.run)
