"""igpt probe: of layers, of a run's checkpoints, or of every pixel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from igpt_cli.cli import options
from igpt_cli.cli.candidates import runs
from igpt_cli.cli.options import only
from igpt_cli.cli.output import Voice, present
from igpt_cli.cli.probe_run import images_used, probe_checkpoints, probe_dense, probe_layers
from igpt_cli.files import PICTURES, check_outputs

LIMITS = ("train_images", "test_images")
#: Options that go with any probe, and in addition with --all-checkpoints.
ALWAYS = {"run", "layer", "layers", *LIMITS, "floors", "repeats", "precision", "seed"}
ALWAYS |= {"device", "out", "force", "json", "quiet"}
OF_CHECKPOINTS = {
    "all_checkpoints",
    "tokens",
    "test_part",
    "column",
    "solver",
    "standardise",
    "pool",
    "bert_masks",
    "figure",
}


def probe(
    ctx: typer.Context,
    run: options.Run = None,
    tokens: options.Images = None,
    layer: Annotated[int | None, Option(help="One layer: 0 is the first block's input, L the final norm.")] = None,
    layers: options.Layers = "all",
    train_images: options.TrainImages = None,
    test_images: options.TestImages = None,
    test_part: options.TestPart = None,
    column: options.Column = None,
    solver: Annotated[
        str,
        Option(metavar="lbfgs|sgd|knn", help="Logistic regression by L-BFGS or (features beyond memory) SGD; or kNN."),
    ] = "lbfgs",
    standardise: Annotated[
        bool,
        Option("--standardise/--no-standardise", help="Standardise features (mean 0, std 1); off is another protocol."),
    ] = True,
    pool: Annotated[
        str, Option(metavar="mean|quadrants", help="Mean over the image; or over quadrants, which is another protocol.")
    ] = "mean",
    knn: Annotated[bool, Option("--knn", help="Also classify by the nearest neighbours of the same features.")] = False,
    concat: Annotated[
        int | None, Option(min=1, metavar="N", help="Also probe N neighbouring layers together, around the best.")
    ] = None,
    labels_per_class: Annotated[
        str | None, Option(metavar="N,...", help="Also with so few labels of each class, such as 4,25,400.")
    ] = None,
    repeats: Annotated[int, Option(min=1, help="Random subsets for each number of --labels-per-class.")] = 5,
    bert_masks: Annotated[
        int | None, Option(min=0, metavar="N", help="BERT: masks of a test image, which vote; 0: whole.  [default: 5]")
    ] = None,
    all_checkpoints: Annotated[
        bool, Option("--all-checkpoints", help="Probe each checkpoint of the run: loss against accuracy.")
    ] = False,
    features: Annotated[
        Path | None, Option(metavar="F", help="Use this features file, or make it, for the next probe.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        Option(metavar="RUN2", autocompletion=runs, help="Also show the class head of this run. May be repeated."),
    ] = None,
    dense: Annotated[
        Path | None,
        Option(metavar="DIR", help="Classify pixels: DIR has images/ and annotations/, masks as in ADE20K (0: none)."),
    ] = None,
    details: Annotated[
        bool, Option("--details", help="Report the accuracy of each class, and the confusion matrix (--json).")
    ] = False,
    floors: Annotated[
        bool,
        Option("--floors/--no-floors", help="Also probe baselines: pixels, histogram, patches, untrained network."),
    ] = True,
    precision: options.Precision = "float32",
    figure: Annotated[Path | None, Option(metavar="PNG", help="Draw accuracy by layer (.png, .svg or .pdf).")] = None,
    confusion: Annotated[
        Path | None, Option(metavar="PNG", help="Draw the confusion matrix; implies --details.")
    ] = None,
    seed: options.Seed = 0,
    seeds: Annotated[
        int,
        Option(min=1, metavar="N", help="Probe with N seeds from --seed on: mean and standard deviation of figures."),
    ] = 1,
    device: options.Device = "auto",
    out: options.Out = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Classify images linearly from a layer's features, and say how good that is.

    \b
    Examples:
      igpt probe --layer 20
      igpt probe runs/igpt-tiny-1 photos/ --test-part 0.2
      igpt probe runs/igpt-tiny-1 --layers all --figure layers.png -o probe.json
      igpt probe builtin:igpt-tiny embedded --json | jq .accuracy
      igpt probe runs/igpt-s-1 --layers 10-14 --concat 3 --features features.h5 --details -o probe.json
      igpt probe runs/igpt-s-1 --labels-per-class 4,25,400 --repeats 5
      igpt probe runs/igpt-s-1 --beside runs/tuned --beside runs/scratch --knn
      igpt probe runs/igpt-s-1 --seeds 3 --train-images 5000 --figure layers.png
      igpt probe runs/igpt-s-1 --layers all,all.attention,all.mlp
      igpt probe runs/igpt-s-1 --all-checkpoints --figure loss-and-accuracy.png
      igpt probe runs/swin --dense ADEChallengeData2016 --layer 12 -o dense.json

    Layer and C are chosen on a held-out tenth of the training images, the classifier is refitted on all of them, and
    the test split is used once. --labels-per-class uses nothing but those labels: C and layer are chosen
    by cross-validation among them. A class head's accuracy is the one that its run recorded when training ended; that
    of RUN itself is shown, too, if it has one. With --seeds the headline is that of the first seed, with mean
    and standard deviation. -o writes the JSON document.
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_for_model, run_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.documents import write_json
    from igpt_cli.model_dir import load_model
    from igpt_cli.probing.images import Subsets
    from igpt_cli.probing.layers import check_layers, parse_places

    model = load_model(run_or_default(run, voice), choose_device(device))
    places = check_layers(model, parse_places(layers if layer is None else str(layer), int(model.model.n_layers)))  # type: ignore[arg-type]
    check_outputs({"--out": (out, ()), "--figure": (figure, PICTURES), "--confusion": (confusion, PICTURES)}, force)
    limits = images_used(train_images, test_images, choose_device(device), voice)
    few = _counts(labels_per_class)
    how: dict[str, Any] = {"layers": places, "precision": precision, "stage": voice.progress}
    if dense is not None:
        only(ctx, {*ALWAYS, "dense"}, "--dense probes the pixels of its own images")
        document, text = probe_dense(model, dense, dict(zip(LIMITS, limits), seed=seed, **how), voice)
    else:
        if all_checkpoints:
            only(ctx, {*ALWAYS, *OF_CHECKPOINTS}, "--all-checkpoints probes layers alone")
        if knn and solver == "knn":
            raise typer.BadParameter("--knn sets nearest neighbours beside another solver; --solver knn is them alone")
        source, subsets = tokens or tokens_of(model, voice), Subsets(*limits, range(seed, seed + seeds))
        held: dict[str, Any] = {"test_part": test_part, "column": column, "seed": seed}
        opened = partial(open_for_model, source, model, voice, subsets, needs=("train", "test"), **held)
        how |= {"solver": solver, "standardise": standardise, "pool": pool, "bert_masks": bert_masks}
        if all_checkpoints:
            how |= dict(zip(LIMITS, limits), seed=seed)
            document, text = probe_checkpoints(model, opened, source, figure, how, voice)
        else:
            how |= {"knn": knn, "concat": concat, "labels_per_class": few, "repeats": repeats, "baselines": floors}
            how |= {"details": details or confusion is not None, "features": features, "subsets": subsets}
            document, text = probe_layers(model, opened, source, beside or [], (figure, confusion), how, voice)
    if out is not None:
        write_json(document, out)
    present(document, text, json)


def _counts(text: str | None) -> list[int]:
    """Numbers of labels: "4,25,400"."""
    parts = [] if text is None else text.split(",")
    if any(not part.strip().isdecimal() or int(part) < 2 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is no list of numbers from 2 on, such as 4,25,400", param_hint="--labels-per-class"
        )
    return sorted({int(part) for part in parts})
