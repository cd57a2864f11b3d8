"""igpt bench: how fast it is on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.options import Device, Force, Json, Out, Quiet
from igpt_cli.cli.output import Voice, result, result_json, table

if TYPE_CHECKING:
    from igpt_cli.bench.contender import TrainingSpeed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure how fast it is on this machine.\n\n"
    "\b\nExamples:\n  igpt bench train\n  igpt bench train igpt-s igpt-m igpt-l --against transformers",
)


@app.callback()
def root() -> None:
    """Makes `train` a command of its own while it is the only one."""


@app.command("train")
def train(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Which models, one after the other. Default: igpt-s igpt-m igpt-l; on a CPU igpt-tiny.",
            show_default=False,
        ),
    ] = None,
    resolution: Annotated[int, typer.Option("--resolution", "-r", min=1, help="Side of the images in pixels.")] = 32,
    n_layer: Annotated[int | None, typer.Option("--n-layer", help="Blocks.  [default: the preset's]")] = None,
    n_head: Annotated[int | None, typer.Option("--n-head", help="Attention heads.  [default: the preset's]")] = None,
    n_embd: Annotated[int | None, typer.Option("--n-embd", help="Width.  [default: the preset's]")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", help="Images in a step.  [default: the preset's; on a CPU 4]"),
    ] = None,
    micro_batch: Annotated[
        str, typer.Option("--micro-batch", metavar="auto|N", help="Images at a time; auto: the most that fit.")
    ] = "auto",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="PEER",
            help="Also measure transformers' ImageGPT: transformers (the same arithmetic), transformers-compiled (the "
            "same, compiled), transformers-float32, transformers-as-is (float32, with its dropout). May be repeated.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="auto|float32|bfloat16", help="Precision of the matrix products.")
    ] = "auto",
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the blocks.  [default: on a GPU]", show_default=False),
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            "--recompute/--no-recompute",
            help="Compute activations again in the backward pass.  [default: if they do not fit]",
            show_default=False,
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option("--attention", metavar="auto|flash|cudnn|efficient|math", help="PyTorch's attention kernel.")
    ] = "auto",
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="adamw|muon", help="The optimizer.")] = "adamw",
    update: Annotated[
        bool, typer.Option("--update/--forward-backward", help="Whole steps, or forward and backward passes alone.")
    ] = True,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps in a timing.  [default: as many as take two seconds]")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timings, of which the median counts.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", help="Untimed steps after the first.")] = 2,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time training steps: tokens/s, the part of the GPU's peak (MFU), memory.

    \b
    Examples:
      igpt bench train
      igpt bench train igpt-s igpt-m igpt-l --against transformers --json
      igpt bench train igpt-xs --n-layer 6 -b 4 --forward-backward --against transformers-float32

    The steps are those of pretraining, on random tokens. MFU counts 6 FLOPs for each parameter that multiplies and
    token, and 12 L D T / 2 for causal attention, against the dense bfloat16 peak; recomputed activations do not count.
    A ratio above 1 says that igpt is faster. Memory is that of the GPU; on a CPU, that of the process. Where a GPU's
    memory is too short for a micro-batch, it is halved, which is said. -o writes the JSON document.
    """
    voice = Voice(quiet)
    if micro_batch != "auto" and not (micro_batch.isdecimal() and int(micro_batch)):
        raise typer.BadParameter(f"{micro_batch!r} is neither auto nor a number", param_hint="--micro-batch")
    from dataclasses import asdict

    from igpt_cli.bench.machine import machine
    from igpt_cli.bench.train import bench_train, write_bench
    from igpt_cli.device import choose_device
    from igpt_cli.errors import IgptError
    from igpt_cli.files import check_output
    from igpt_cli.models.registry import find_preset

    if out is not None:
        check_output(out, force)
    names = models or []
    if not names:
        names = ["igpt-tiny"] if choose_device(device).type == "cpu" else ["igpt-s", "igpt-m", "igpt-l"]
        voice.default("models", ", ".join(names))
    for name in names:
        find_preset(name)
    on = machine(device)
    voice.say(f"on {on['device_name']}, torch {on['versions']['torch']}")
    sizes = {k: v for k, v in (("n_layer", n_layer), ("n_head", n_head), ("n_embd", n_embd)) if v is not None}
    settings: dict[str, Any] = {
        "resolution": resolution,
        "sizes": sizes,
        "batch_size": batch_size,
        "micro_batch": None if micro_batch == "auto" else int(micro_batch),
        "device": device,
        "precision": precision,
        "compile": compile,
        "recompute": recompute,
        "attention": attention,
        "optimizer": optimizer,
        "update": update,
        "steps": steps,
        "repeats": repeats,
        "warmup": warmup,
        "against": against or (),
    }
    rows: list[TrainingSpeed] = []
    for name in names:
        try:
            with voice.progress(name, "timings") as progress:
                rows += bench_train(name, **settings, progress=progress, on_event=voice.say)
        except IgptError as e:
            if len(names) == 1:
                raise
            voice.say(f"{name}: {e}")  # the others count all the same
    document = {"command": _command(), **on, "rows": [asdict(row) for row in rows]}
    if out is not None:
        write_bench(document, out)
    if json:
        result_json(document)
    else:
        result(_table(rows))
    if all(row.failed for row in rows):
        voice.say("nothing could be measured")
        raise typer.Exit(1)


def _command() -> str | None:
    return shlex.join(["igpt", *sys.argv[1:]]) if "igpt" in Path(sys.argv[0]).as_posix() else None


def _table(rows: list[TrainingSpeed]) -> str:
    """One row a model and implementation; the last column is how many times as fast igpt is."""
    header = ["model", "implementation", "precision", "batch", "ms/step", "range", "tokens/s", "MFU %", "GB", "igpt is"]
    return table([[row.model, row.implementation, row.precision, _batch(row), *_cells(row)] for row in rows], header)


def _batch(row: TrainingSpeed) -> str:
    """Images in a step: 128, or 2 x 64 where they are computed 64 at a time."""
    parts = row.batch_size // row.micro_batch
    return f"{row.batch_size}" if parts == 1 else f"{parts} x {row.micro_batch}"


def _cells(row: TrainingSpeed) -> list[str]:
    if row.ms_per_step is None:
        return [row.failed or "-", "", "", "", "", ""]
    return [
        f"{row.ms_per_step:,.1f}",
        f"{row.fastest_ms:,.1f}-{row.slowest_ms:,.1f}",
        f"{row.tokens_per_second:,.0f}",
        "-" if row.mfu is None else f"{100 * row.mfu:.1f}",
        "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}x as fast",
    ]
