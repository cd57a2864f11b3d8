"""What the commands that train share: a run is started or resumed, and shown meanwhile."""

from __future__ import annotations

import json as json_text
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.candidates import own_runs
from igpt_cli.cli.output import Voice, result, result_json
from igpt_cli.cli.training_display import TrainingDisplay

if TYPE_CHECKING:
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.tokens.store import TokenFile
    from igpt_cli.training.distributed import Ranks
    from igpt_cli.training.run import RunResult
    from igpt_cli.training.task import Task

Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        autocompletion=own_runs,
        help="Continue a run ('latest' is the newest) from its checkpoint.",
    ),
]
Tensorboard = Annotated[
    bool, typer.Option("--tensorboard", help="Write the records for TensorBoard, too, into RUN/tensorboard.")
]


@dataclass
class Job:
    """What a command that trains is to do.

    tokens: what is named; `opened` opens it. out: the run's folder. make: the task; None resumes the run `out`.
    """

    tokens: str
    opened: AbstractContextManager[TokenFile]
    out: Path
    make: Callable[[TokenFile], Task] | None = None
    teacher: ModelDir | None = None


@dataclass
class Where:
    """Where a command trains, and to whom it speaks: rank 0 alone speaks."""

    device: str
    ranks: Ranks
    voice: Voice
    stack: ExitStack

    def new_run(self, name: str) -> Path:
        """The default folder of a run."""
        from igpt_cli.workspace import new_run

        out = self.ranks.broadcast_from_rank0(lambda: self.stack.enter_context(new_run(name)))
        self.voice.default("run", out)
        return out

    def resumed(self, resume: str) -> tuple[Path, dict[str, Any]]:
        """The folder of the run to resume, and its config.json."""
        from igpt_cli.model_dir import read_config
        from igpt_cli.workspace import resolve_run

        run = resolve_run(resume)
        if resume == "latest":
            self.voice.default("run", run)
        return run, read_config(run)

    def recorded_tokens(self, tokens: str | None, run: Path, config: dict[str, Any]) -> str:
        """The tokens named, or those that a run was trained on."""
        from igpt_cli.training.checkpoint import recorded_tokens

        if tokens is None:
            tokens = recorded_tokens(run, config)
            self.voice.default("tokens", tokens)
        return tokens

    def default_tokens(self, tokens: str | None) -> str:
        """The tokens named, or the workspace's."""
        from igpt_cli.workspace import default_tokens

        if tokens is None:
            tokens = str(default_tokens())
            self.voice.default("tokens", tokens)
        return tokens

    def say_budget(self, settings: Any, execution: Any) -> None:
        """Say that a run on a CPU without an end gets one."""
        from igpt_cli.device import choose_device
        from igpt_cli.training.settings import CPU_BUDGET, with_an_end

        if with_an_end(settings, execution, choose_device(self.device).type) != settings:
            self.voice.default("budget on a CPU", f"{CPU_BUDGET:.0f} s of training, about two minutes in all")


def execute(
    task: str,
    prepare: Callable[[Where], Job],
    introduce: Callable[[dict[str, Any], Voice], None],
    settings: dict[str, Any],
    *,
    device: str,
    tensorboard: bool,
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Start or resume a run, show it, and report what it gave.

    Args:
        task: the command's name. prepare: finds out what to do. introduce: says what is particular to the task.
    """
    voice = Voice(quiet)
    from igpt_cli.tokens.open_or_tokenize import is_token_file
    from igpt_cli.training.distributed import init_distributed, under_torchrun
    from igpt_cli.training.run import resume, start

    with init_distributed(device, voice.say) as (ranks, device), ExitStack() as stack:
        if not ranks.first:
            voice = Voice(quiet=True)
        job = prepare(Where(device, ranks, voice, stack))
        if under_torchrun() and not is_token_file(job.tokens):
            raise typer.BadParameter(f"{job.tokens} is no token file; under torchrun, run `igpt tokenize` first")
        with job.opened as file, shown(voice, ranks, job.out, task, tensorboard, introduce) as (display, callbacks):
            if job.make is None:
                where: dict[str, Any] = {"device": device, "ranks": ranks, "teacher": job.teacher}
                done = resume(file, job.out, settings, task=task, **where, **callbacks)
            else:
                noted: dict[str, Any] = {"command": command_typed(), "data_path": str(job.tokens)}
                done = start(job.make(file), job.out, force=force, **noted, **callbacks)
        if ranks.first:
            report(done, task, display, json, voice)


def report(done: RunResult, task: str, display: TrainingDisplay, json: bool, voice: Voice) -> None:
    """The end of a run: what it gave, and the next command."""
    from igpt_cli.model_dir import read_config

    learns_classes = task != "pretrain"
    if display.first_step == done.steps:
        voice.say(f"{done.run} is complete: it has done its {done.steps:,} steps; nothing was left to do")
    elif learns_classes and done.best is not None:
        voice.say(
            f"{done.steps:,} steps in {done.seconds:.0f} s; the best held-out accuracy, {done.val_accuracy:.2f}%, "
            f"was after step {done.best['step']:,}"
        )
    elif done.train_loss is not None:
        held_out = f", held-out loss {done.val_loss:.3f}" if done.val_loss is not None else ""
        voice.say(
            f"{done.steps:,} steps in {done.seconds:.0f} s: training loss {done.train_loss:.3f}{held_out} nats per "
            f"token (a uniform guess: {display.uniform:.3f})"
        )
    if done.accuracy is not None and done.interval is not None:
        low, high = done.interval
        voice.say(f"test accuracy {done.accuracy:.2f}% of {done.n_test:,} images (95%: {low:.1f} to {high:.1f})")
        if done.accuracy_class is not None:
            voice.say(
                f"of both heads together; the class head alone {done.accuracy_class:.2f}%, the distillation head "
                f"alone {done.accuracy_distillation:.2f}%"
            )
    elif learns_classes and done.status != "time limit":
        voice.say("there are no labelled test images, so nothing was tested")
    if done.status == "time limit":
        voice.say(f"the time limit ended it; resume it with: igpt {task} --resume {done.run}")
    else:
        voice.say(f"next: igpt probe {done.run} --layers all")
    if json:
        result_json({"run": str(done.run), **{k: v for k, v in read_config(done.run)["result"].items() if k != "run"}})
    else:
        result(done.run)


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
            sizes[name] = json_text.loads(value)
        except ValueError:
            sizes[name] = value
    return sizes


def rates_of(training: dict[str, Any]) -> str:
    """What a run says of its layers' learning rates at its start; nothing where they are all the same."""
    decay, head = training.get("layer_decay", 1.0), training.get("head_learning_rate")
    said = f", {head:g} for the class head" if head else ""
    return said + (f", times {decay:g} from each block to the one below it" if decay != 1 else "")


def say_unlabelled(data: dict[str, Any], voice: Voice) -> None:
    """How many images are excluded for want of a label."""
    if data["left_out"]:
        counted = ", ".join(f"{n:,} of {name!r}" for name, n in data["left_out"].items())
        voice.say(f"images without a label are excluded: {counted}")


def check_usage(resume: str | None, force: bool, tensorboard: bool, **of_new_runs: Any) -> None:
    """Options that do not go together, and what they need to have installed."""
    if resume:
        for name, value in of_new_runs.items():
            if value:
                raise typer.BadParameter(f"--resume continues in the run's own folder; leave out --{name}")
        if force:
            raise typer.BadParameter("--resume overwrites nothing; leave out --force")
    if tensorboard:
        try:
            import tensorboard as _  # noqa: F401
        except ImportError as e:
            raise typer.BadParameter("--tensorboard needs TensorBoard: pip install 'igpt-cli[tensorboard]'") from e


def command_typed() -> str | None:
    """The line that was typed, where igpt was called from one."""
    return shlex.join(["igpt", *sys.argv[1:]]) if "igpt" in Path(sys.argv[0]).as_posix() else None


@contextmanager
def shown(
    voice: Voice,
    ranks: Ranks,
    run: Path,
    task: str,
    tensorboard: bool,
    introduce: Callable[[dict[str, Any], Voice], None] = lambda config, voice: None,
) -> Iterator[tuple[TrainingDisplay, dict[str, Any]]]:
    """Show a run, then draw its loss curve. Yields the display and the callbacks of the run."""
    from igpt_cli.workspace import as_latest

    label = {"pretrain": "pretraining", "finetune": "fine-tuning"}.get(task, "training")
    with (
        as_latest(run) as name_latest,
        TrainingDisplay(voice, label) as display,
        Board(tensorboard and ranks.first) as board,
    ):

        def start(config: dict[str, Any]) -> None:
            introduce(config, voice)
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
    """Writes records for TensorBoard when it is `enabled`."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.writer: Any = None

    def open(self, run: Path) -> None:
        if self.enabled:
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
