"""What the commands that train share: options, settings, and what is shown while a run goes on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.candidates import own_runs
from igpt_cli.cli.output import TrainingDisplay, Voice

if TYPE_CHECKING:
    from igpt_cli.training.distributed import Ranks

Epochs = Annotated[float | None, typer.Option("--epochs", help="End after so many passes over the training images.")]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        "--time-limit",
        metavar="TIME",
        help="Save and end after so much time, wherever the schedule stands; --resume goes on.",
    ),
]
MicroBatch = Annotated[
    str | None,
    typer.Option("--micro-batch", metavar="auto|N", help="Images at a time on a GPU; auto: the most that fit."),
]
Accumulate = Annotated[
    int | None, typer.Option("--accumulate", min=1, help="Parts in which a GPU computes its share of a step.")
]
Augment = Annotated[
    str | None,
    typer.Option("--augment", metavar="none|flip|crop-flip", help="Augmentation of the token images.  [default: none]"),
]
ValPart = Annotated[
    float | None,
    typer.Option(
        "--val-part",
        help="Part of the split 'train' to hold out, without a split 'val'.  [default: 0.1, or 0.04 of a million]",
    ),
]
ValImages = Annotated[
    int | None,
    typer.Option("--val-images", min=1, help="Held-out images to look at.  [default: all; 128 on a CPU]"),
]
SaveEvery = Annotated[
    str | None,
    typer.Option(
        "--save-every", metavar="N|TIME", help="Steps (500) or time (15m) between checkpoints.  [default: 15m]"
    ),
]
Keep = Annotated[
    int | None,
    typer.Option("--keep", min=1, help="Last checkpoints to keep; the best stays besides.  [default: 2]"),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="auto|float32|bfloat16", help="Precision of the matrix products.  [default: auto]"
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the blocks.  [default: on a GPU]"),
]
Recompute = Annotated[
    bool | None,
    typer.Option(
        "--recompute/--no-recompute",
        help="Compute activations again in the backward pass, to save memory.  [default: where needed]",
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="auto|none|full", help="Under torchrun: replicate (DDP) or shard (FSDP2) the model."
    ),
]
HeadRate = Annotated[
    float | None,
    typer.Option("--head-lr", help="Learning rate of the class head, while --lr is the rest's.  [default: the same]"),
]
LayerDecay = Annotated[
    float | None,
    typer.Option(
        "--layer-decay",
        metavar="X",
        help="Learning rate of each block over that of the next, such as 0.75; heads have the whole.  [default: 1]",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        autocompletion=own_runs,
        help="Go on with a run ('latest' is the newest) from its checkpoint.",
    ),
]
Tensorboard = Annotated[
    bool, typer.Option("--tensorboard", help="Write the records for TensorBoard, too, into RUN/tensorboard.")
]

#: Options that are no setting of what is learned or how.
NO_SETTING = (
    "run",
    "tokens",
    "config",
    "init",
    "resume",
    "tensorboard",
    "palette",
    "resolution",
    "test_part",
    "column",
    "device",
    "out",
    "force",
    "json",
    "quiet",
)


def sizes_of(pairs: Sequence[str]) -> dict[str, Any]:
    """What --set gives: values are read as JSON, or else taken as they stand.

    >>> sizes_of(["patch_size=2", "pos_embed=2d", "depths=[2, 2]", "shift=false"])
    {'patch_size': 2, 'pos_embed': '2d', 'depths': [2, 2], 'shift': False}
    """
    sizes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"--set {pair}: write a name, = and a value, as in patch_size=2")
        if name in ("resolution", "n_classes"):
            raise typer.BadParameter(f"--set {pair}: {name} comes from the images")
        try:
            sizes[name] = json.loads(value)
        except ValueError:
            sizes[name] = value
    return sizes


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The settings among the options given, as the library names and types them."""
    from igpt_cli.training.recipe import seconds

    settings = {k: v for k, v in given.items() if k not in NO_SETTING}
    for key in ("budget", "time_limit"):
        if key in settings:
            settings[key] = seconds(settings[key])
    if (n := settings.get("micro_batch")) is not None:
        if n != "auto" and not (n.isdecimal() and int(n)):
            raise typer.BadParameter(f"--micro-batch is {n!r}, expected auto or a number of images")
        settings["micro_batch"] = None if n == "auto" else int(n)
    return settings


def test_images_of(text: str) -> int | None:
    """How many test images: "300" -> 300, "all" -> None."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise typer.BadParameter(f"{text!r} is neither a number of images nor 'all'", param_hint="--test-images")
    return None if text == "all" else int(text)


def rates_told(training: dict[str, Any]) -> str:
    """What a run says of its layers' learning rates at its start; nothing where they are all the same."""
    decay, head = training.get("layer_decay", 1.0), training.get("head_learning_rate")
    told = f", {head:g} for the class head" if head else ""
    return told + (f", times {decay:g} from each block to the one below it" if decay != 1 else "")


def resumed_tokens(first: str | None, tokens: str | None, run: Path, was: dict[str, Any], voice: Voice) -> str:
    """What a run goes on with: `igpt train --resume RUN [T]`, where T stands in the place of the `first` argument."""
    if first is not None and tokens is not None:
        raise typer.BadParameter("--resume RUN goes on with the run's own model; give the token file alone")
    named = first or tokens
    if named is None:
        from igpt_cli.training.checkpoint import recorded_tokens

        named = recorded_tokens(run, was)
        voice.default("tokens", named)
    return named


def also(last: Callable[[Any], None], first: Callable[[Any], None]) -> Callable[[Any], None]:
    """Both, one after the other."""

    def both(argument: Any) -> None:
        first(argument)
        last(argument)

    return both


def check_usage(given: dict[str, Any]) -> None:
    """Options that do not go together, and what they need to have installed."""
    if "resume" in given:
        for name in ("config", "init", "out"):
            if name in given:
                raise typer.BadParameter(f"--resume goes on in the run's own folder; leave out --{name}")
        if given["force"]:
            raise typer.BadParameter("--resume overwrites nothing; leave out --force")
    if given["tensorboard"]:
        try:
            import tensorboard  # noqa: F401
        except ImportError as e:
            raise typer.BadParameter("--tensorboard needs TensorBoard: pip install 'igpt-cli[tensorboard]'") from e


def command_typed() -> str | None:
    """The line that was typed, where igpt was called from one."""
    return shlex.join(["igpt", *sys.argv[1:]]) if "igpt" in Path(sys.argv[0]).as_posix() else None


@contextmanager
def shown(
    voice: Voice, ranks: Ranks, run: Path, label: str, tensorboard: bool
) -> Iterator[tuple[TrainingDisplay, dict[str, Any]]]:
    """While a run goes on, show it; in the end, draw its loss curve.

    Yields the display, and what the library is to call: on_start, on_record, on_event.
    """
    from igpt_cli.workspace import as_latest

    with (
        as_latest(run) as name_latest,
        TrainingDisplay(voice, label) as display,
        Board(tensorboard and ranks.first) as board,
    ):

        def start(config: dict[str, Any]) -> None:
            display.start(config)
            if ranks.first:
                name_latest()
                board.open(run)

        def record(record: dict[str, Any]) -> None:
            display.record(record)
            board.record(record)

        try:
            yield display, {"on_start": start, "on_record": record, "on_event": display.event}
        finally:
            if ranks.first and display.first_step is not None and run.exists():
                draw(run, voice)


def draw(run: Path, voice: Voice) -> None:
    """The loss curve, into the run's folder."""
    from igpt_cli.errors import IgptError
    from igpt_cli.model_dir import read_config, read_metrics
    from igpt_cli.report.losses import Recorded, loss_curves

    try:
        config = read_config(run)
        recorded = Recorded(name=run.name, config=config, metrics=read_metrics(run))
        images = Path(config["data"]["path"]).name
        loss_curves([recorded], run / "loss.png", f"{run.name}: {config['model']['name']} on {images}")
    except IgptError as e:
        voice.say(f"the loss curve was not drawn: {e}")


class Board:
    """Writes records for TensorBoard when it is `wanted`."""

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self.writer: Any = None

    def open(self, run: Path) -> None:
        if self.wanted:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run / "tensorboard"))

    def record(self, record: dict[str, Any]) -> None:
        if self.writer:
            for key, value in record.items():
                if key not in ("step", "fraction") and value is not None:
                    self.writer.add_scalar(key, value, record["step"])

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.writer:
            self.writer.close()
