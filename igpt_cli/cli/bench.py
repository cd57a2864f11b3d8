"""igpt bench: how fast it is on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.options import Device, Force, Json, Out, Quiet
from igpt_cli.cli.output import Voice, result, result_json, table

if TYPE_CHECKING:
    from igpt_cli.bench.contender import TrainingSpeed
    from igpt_cli.bench.probe import FeatureSpeed
    from igpt_cli.bench.sample import SamplingSpeed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure how fast it is on this machine.\n\n"
    "\b\nExamples:\n  igpt bench train\n  igpt bench train igpt-s igpt-m igpt-l --against transformers\n"
    "  igpt bench sample --against transformers\n  igpt bench probe",
)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="Which models, one after the other. Default: igpt-s igpt-m igpt-l; on a CPU igpt-tiny.",
        show_default=False,
    ),
]
Resolution = Annotated[int, typer.Option("--resolution", "-r", min=1, help="Side of the images in pixels.")]
Layers = Annotated[int | None, typer.Option("--n-layer", help="Blocks.  [default: the preset's]")]
Heads = Annotated[int | None, typer.Option("--n-head", help="Attention heads.  [default: the preset's]")]
Width = Annotated[int | None, typer.Option("--n-embd", help="Width.  [default: the preset's]")]
Precision = Annotated[
    str, typer.Option("--precision", metavar="auto|float32|bfloat16", help="Precision of the matrix products.")
]


@app.command("train")
def train(
    models: Models = None,
    resolution: Resolution = 32,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_embd: Width = None,
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
    precision: Precision = "auto",
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
    from igpt_cli.bench.train import bench_train

    names, on = _begin(models, device, out, force, voice)
    settings: dict[str, Any] = {
        "resolution": resolution,
        "sizes": _sizes(n_layer, n_head, n_embd),
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
    rows = _measured(names, bench_train, settings, "timings", voice)
    _finish(rows, on, _training_table, out, json, voice)


@app.command("sample")
def sample(
    models: Models = None,
    resolution: Resolution = 32,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_embd: Width = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images drawn at once.")] = 16,
    pixels: Annotated[
        int | None,
        typer.Option(
            "--pixels",
            metavar="N",
            help="Draw only the first N pixels of each image, which are the quickest.  [default: all]",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="PEER",
            help="Also measure the `generate` of transformers: transformers (in --precision), transformers-float32. "
            "May be repeated.",
            show_default=False,
        ),
    ] = None,
    precision: Precision = "float32",
    repeats: Annotated[int, typer.Option("--repeats", help="Timings, of which the median counts.")] = 3,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the drawing of images: images/s, milliseconds a pixel, memory.

    \b
    Examples:
      igpt bench sample
      igpt bench sample igpt-tiny --against transformers --pixels 256
      igpt bench sample igpt-s igpt-m igpt-l -b 64 --precision bfloat16 --json

    Images are drawn as igpt sample draws them, and by transformers with its cache, from the same random weights, at
    temperature 1 from all colours. A step draws one pixel of every image, and takes the longer the more pixels are
    there already: figures for other numbers of --pixels cannot be compared. `first` is the time from the loaded model
    to the first images, on a GPU with the recording of CUDA graphs. A ratio above 1 says that igpt is faster.
    -o writes the JSON document.
    """
    voice = Voice(quiet)
    from igpt_cli.bench.sample import bench_sample

    names, on = _begin(models, device, out, force, voice)
    settings: dict[str, Any] = {
        "resolution": resolution,
        "sizes": _sizes(n_layer, n_head, n_embd),
        "batch_size": batch_size,
        "pixels": pixels,
        "device": device,
        "precision": precision,
        "repeats": repeats,
        "against": against or (),
    }
    rows = _measured(names, bench_sample, settings, "drawings", voice)
    _finish(rows, on, _sampling_table, out, json, voice)


@app.command("probe")
def probe(
    models: Models = None,
    resolution: Resolution = 32,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_embd: Width = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", min=1, help="Images at a time.  [default: what suits the device]"),
    ] = None,
    precision: Precision = "float32",
    repeats: Annotated[int, typer.Option("--repeats", help="Timings, of which the median counts.")] = 5,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time what a probe works on: features of all layers, and of the deepest layer alone.

    \b
    Examples:
      igpt bench probe
      igpt bench probe igpt-s igpt-m igpt-l --precision bfloat16 --json

    Features are computed as igpt features does, from random tokens to the CPU's memory, the disk left out. The ratio
    is the time of all layers by that of the deepest alone. Memory is that of the GPU. -o writes the JSON document.
    """
    voice = Voice(quiet)
    from igpt_cli.bench.probe import bench_features

    names, on = _begin(models, device, out, force, voice)
    settings: dict[str, Any] = {
        "resolution": resolution,
        "sizes": _sizes(n_layer, n_head, n_embd),
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "repeats": repeats,
    }
    rows = _measured(names, bench_features, settings, "timings", voice)
    _finish(rows, on, _feature_table, out, json, voice)


def _begin(
    models: list[str] | None, device: str, out: Path | None, force: bool, voice: Voice
) -> tuple[list[str], dict[str, Any]]:
    """Before anything is measured: which models, and the machine."""
    from igpt_cli.bench.machine import machine
    from igpt_cli.device import choose_device
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
    return names, on


def _sizes(n_layer: int | None, n_head: int | None, n_embd: int | None) -> dict[str, int]:
    """Those that are given."""
    return {k: v for k, v in (("n_layer", n_layer), ("n_head", n_head), ("n_embd", n_embd)) if v is not None}


def _measured(names: list[str], bench: Callable[..., list], settings: dict[str, Any], unit: str, voice: Voice) -> list:
    """The rows of all models; of several, one that fails is told of and left out."""
    from igpt_cli.errors import IgptError

    rows: list = []
    for name in names:
        try:
            with voice.progress(name, unit) as progress:
                rows += bench(name, **settings, progress=progress, on_event=voice.say)
        except IgptError as e:
            if len(names) == 1:
                raise
            voice.say(f"{name}: {e}")  # the others count all the same
    return rows


def _finish(
    rows: list, on: dict[str, Any], as_table: Callable[[list], str], out: Path | None, json: bool, voice: Voice
) -> None:
    """Write and print what was measured; it is a failure if nothing was."""
    from dataclasses import asdict

    from igpt_cli.bench.machine import write_bench

    document = {"command": _command(), **on, "rows": [asdict(row) for row in rows]}
    if out is not None:
        write_bench(document, out)
    if json:
        result_json(document)
    else:
        result(as_table(rows))
    if all(row.failed for row in rows):
        voice.say("nothing could be measured")
        raise typer.Exit(1)


def _command() -> str | None:
    return shlex.join(["igpt", *sys.argv[1:]]) if "igpt" in Path(sys.argv[0]).as_posix() else None


def _training_table(rows: list[TrainingSpeed]) -> str:
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


def _sampling_table(rows: list[SamplingSpeed]) -> str:
    """One row a model and implementation, as above."""
    header = [
        "model",
        "implementation",
        "precision",
        "batch",
        "pixels",
        "ms/step",
        "range",
        "images/s",
        "first s",
        "GB",
    ]
    return table([[*_named(row), *_drawn(row)] for row in rows], [*header, "igpt is"])


def _named(row: SamplingSpeed) -> list[str]:
    return [row.model, row.implementation, row.precision, f"{row.batch_size}", f"{row.pixels:,}"]


def _drawn(row: SamplingSpeed) -> list[str]:
    if row.ms_per_step is None:
        return [row.failed or "-", "", "", "", "", ""]
    return [
        f"{row.ms_per_step:,.2f}",
        f"{row.fastest_ms:,.2f}-{row.slowest_ms:,.2f}",
        "-" if row.images_per_second is None else f"{row.images_per_second:,.3g}",
        f"{row.first_seconds:,.1f}",
        "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}x as fast",
    ]


def _feature_table(rows: list[FeatureSpeed]) -> str:
    """Two rows a model: the deepest layer alone, and all."""
    header = ["model", "layers", "precision", "batch", "images", "s", "range", "images/s", "GB", "ratio"]
    return table([[row.model, row.layers, row.precision, row.batch_size, *_extracted(row)] for row in rows], header)


def _extracted(row: FeatureSpeed) -> list[str]:
    if row.seconds is None:
        return [row.failed or "-", "", "", "", "", ""]
    return [
        f"{row.images:,}",
        f"{row.seconds:,.2f}",
        f"{row.fastest:,.2f}-{row.slowest:,.2f}",
        f"{row.images_per_second:,.1f}",
        "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
    ]
