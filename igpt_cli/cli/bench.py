"""igpt bench: how fast it is on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Argument, Option

from igpt_cli.cli import bench_run
from igpt_cli.cli.bench_run import begin, finish, measured, sizes
from igpt_cli.cli.candidates import token_models
from igpt_cli.cli.options import BatchSize, Device, Force, Json, Out, Precision, Quiet, Resolution, group
from igpt_cli.cli.output import Voice

app = group(
    "Measure how fast it is on this machine.",
    "igpt bench train",
    "igpt bench train igpt-s igpt-m igpt-l --against transformers",
    "igpt bench sample --against transformers",
    "igpt bench probe",
)

Models = Annotated[
    list[str] | None,
    Argument(
        metavar="MODEL",
        autocompletion=token_models,
        help="Which models. Default: igpt-s igpt-m igpt-l; on a CPU igpt-tiny.",
    ),
]
Layers = Annotated[int | None, Option("--n-layer", help="Blocks.  [default: the preset's]")]
Heads = Annotated[int | None, Option("--n-head", help="Attention heads.  [default: the preset's]")]
Repeats = Annotated[int, Option("--repeats", help="Timings, of which the median counts.")]
Width = Annotated[int | None, Option("--n-embd", help="Width.  [default: the preset's]")]


@app.command("train")
def train(
    models: Models = None,
    resolution: Resolution = 32,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_embd: Width = None,
    batch_size: Annotated[
        int | None, Option("--batch-size", "-b", help="Images in a step.  [default: the preset's; on a CPU 4]")
    ] = None,
    micro_batch: Annotated[str, Option(metavar="auto|N", help="Images at a time; auto: the most that fit.")] = "auto",
    against: Annotated[
        list[str] | None,
        Option(
            metavar="PEER",
            help="Also measure transformers' ImageGPT: transformers (the same arithmetic), transformers-compiled (the "
            "same, compiled), transformers-float32, transformers-as-is (float32, with its dropout). May be repeated.",
        ),
    ] = None,
    precision: Precision = "auto",
    compile: Annotated[
        bool | None, Option("--compile/--no-compile", help="Compile the blocks.  [default: on a GPU]")
    ] = None,
    recompute: Annotated[
        bool | None,
        Option("--recompute/--no-recompute", help="Recompute activations in the backward pass.  [default: if needed]"),
    ] = None,
    attention: Annotated[
        str, Option(metavar="auto|flash|cudnn|efficient|math", help="PyTorch's attention kernel.")
    ] = "auto",
    optimizer: Annotated[str, Option(metavar="adamw|muon", help="The optimizer.")] = "adamw",
    update: Annotated[
        bool, Option("--update/--forward-backward", help="Whole steps, or forward and backward passes alone.")
    ] = True,
    steps: Annotated[int | None, Option(help="Steps in a timing.  [default: as many as take two seconds]")] = None,
    repeats: Repeats = 5,
    warmup: Annotated[int, Option(help="Untimed steps after the first.")] = 2,
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

    names, on = begin(models, device, out, force, voice)
    settings: dict[str, Any] = {"resolution": resolution, "sizes": sizes(n_layer, n_head, n_embd)}
    settings |= {"batch_size": batch_size, "micro_batch": None if micro_batch == "auto" else int(micro_batch)}
    settings |= {"device": device, "precision": precision, "compile": compile, "recompute": recompute}
    settings |= {"attention": attention, "optimizer": optimizer, "update": update, "steps": steps, "repeats": repeats}
    settings |= {"warmup": warmup, "against": against or ()}
    rows = measured(names, bench_train, settings, "timings", voice)
    finish({"rows": rows}, on, {"rows": bench_run.training_table}, out, json, voice)


@app.command("sample")
def sample(
    models: Models = None,
    resolution: Resolution = 32,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_embd: Width = None,
    batch_size: Annotated[int, Option("--batch-size", "-b", help="Images drawn at once.")] = 16,
    pixels: Annotated[
        int | None,
        Option(metavar="N", help="Draw only the first N pixels of each image, which are the quickest.  [default: all]"),
    ] = None,
    against: Annotated[
        list[str] | None,
        Option(
            metavar="PEER", help="Also time transformers (in --precision) or transformers-float32. May be repeated."
        ),
    ] = None,
    precision: Precision = "float32",
    repeats: Repeats = 3,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time sampling: images/s, milliseconds a pixel, memory.

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

    names, on = begin(models, device, out, force, voice)
    settings: dict[str, Any] = {"resolution": resolution, "sizes": sizes(n_layer, n_head, n_embd)}
    settings |= {"batch_size": batch_size, "pixels": pixels, "device": device, "precision": precision}
    settings |= {"repeats": repeats, "against": against or ()}
    rows = measured(names, bench_sample, settings, "drawings", voice)
    finish({"rows": rows}, on, {"rows": bench_run.sampling_table}, out, json, voice)


@app.command("probe")
def probe(
    models: Models = None,
    resolution: Resolution = 32,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_embd: Width = None,
    batch_size: BatchSize = None,
    precision: Precision = "float32",
    repeats: Repeats = 5,
    only: Annotated[str | None, Option(metavar="features|solvers", help="Half of it.  [default: both]")] = None,
    problems: Annotated[
        int | None, Option(min=1, metavar="N", help="Solvers: layers.  [default: 25; on a CPU 5]")
    ] = None,
    rows: Annotated[
        int | None, Option(min=1, metavar="N", help="Solvers: images.  [default: 50,000; on a CPU 3,000]")
    ] = None,
    width: Annotated[
        int | None, Option(min=1, metavar="D", help="Solvers: features of a layer.  [default: 512; on a CPU 192]")
    ] = None,
    classes: Annotated[int, Option(min=2, metavar="K", help="Solvers: classes.")] = 10,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a probe: features of all layers compared with the deepest layer's alone; then the classifiers of all layers.

    \b
    Examples:
      igpt bench probe
      igpt bench probe igpt-s igpt-m igpt-l --precision bfloat16 --json
      igpt bench probe --only solvers --problems 25 --rows 50000 --width 512

    Features are computed as igpt features does, from random tokens to the CPU's memory, without the disk. The ratio
    is the time of all layers by that of the deepest alone. Solvers fit made-up, correlated features: igpt every layer
    with the seven values of C that a probe tries, to convergence; scikit-learn, on the CPU and at its own tolerance,
    one layer with C = 1. `above` is how far the loss of that one is above the lower of both, and a regression of igpt's
    is so many times as fast. Memory is that of the GPU. -o writes the JSON document.
    """
    voice = Voice(quiet)
    if only not in (None, "features", "solvers"):
        raise typer.BadParameter(f"{only!r} is neither features nor solvers", param_hint="--only")
    if only == "solvers" and models:
        raise typer.BadParameter("--only solvers needs no model: features are made up", param_hint="MODEL")
    from igpt_cli.bench.probe import bench_features
    from igpt_cli.bench.solvers import bench_solvers

    names, on = begin(["igpt-tiny"] if only == "solvers" else models, device, out, force, voice)
    settings: dict[str, Any] = {"resolution": resolution, "sizes": sizes(n_layer, n_head, n_embd)}
    settings |= {"batch_size": batch_size, "device": device, "precision": precision, "repeats": repeats}
    timed: dict[str, list] = {}
    if only != "solvers":
        timed["rows"] = measured(names, bench_features, settings, "timings", voice)
    if only != "features":
        with voice.progress("solvers", "regressions") as progress:
            timed["solvers"] = bench_solvers(
                problems, rows, width, classes, device=device, progress=progress, on_event=voice.say
            )
    finish(timed, on, {"rows": bench_run.feature_table, "solvers": bench_run.solver_table}, out, json, voice)
