"""igpt probe"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.candidates import runs
from igpt_cli.cli.options import Column, Device, Force, Json, Out, Quiet, Run, TestImages, TestPart, TrainImages
from igpt_cli.cli.output import Voice, result, result_json
from igpt_cli.cli.probe_text import checkpoint_table, explain, probe_table

if TYPE_CHECKING:
    import torch


def probe(
    run: Run = None,
    tokens: Annotated[
        str | None,
        typer.Argument(
            metavar="T",
            help="A token file with splits train and test, or images. Default: what the run was trained on.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="One layer: 0 is the first block's input, L the final norm.")
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            help="all, or such as 0,12,24 or 10-14. Inside a block: 20.attention, all.mlp.",
        ),
    ] = "all",
    train_images: TrainImages = None,
    test_images: TestImages = None,
    test_part: TestPart = None,
    column: Column = None,
    solver: Annotated[
        str,
        typer.Option(
            "--solver",
            metavar="lbfgs|sgd|knn",
            help="Logistic regression to convergence, or by SGD where features do not fit in memory; or neighbours.",
        ),
    ] = "lbfgs",
    standardise: Annotated[
        bool,
        typer.Option(
            "--standardise/--no-standardise",
            help="Features by mean and deviation of the training images, or as they are: another protocol.",
        ),
    ] = True,
    pool: Annotated[
        str,
        typer.Option(
            "--pool",
            metavar="mean|quadrants",
            help="Mean over the image, as in the paper, or over each quadrant: another protocol, 4 times the features.",
        ),
    ] = "mean",
    knn: Annotated[
        bool, typer.Option("--knn", help="Also tell what the nearest neighbours by the same features say.")
    ] = False,
    concat: Annotated[
        int | None,
        typer.Option(
            "--concat", min=1, metavar="N", help="Also probe N neighbouring layers together, around the best."
        ),
    ] = None,
    labels_per_class: Annotated[
        str | None,
        typer.Option(
            "--labels-per-class", metavar="N,...", help="Also with so few labels of each class, such as 4,25,400."
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Random subsets for each number of --labels-per-class.")
    ] = 5,
    bert_masks: Annotated[
        int | None,
        typer.Option(
            "--bert-masks", min=0, metavar="N", help="BERT: masks of a test image, which vote; 0: whole.  [default: 5]"
        ),
    ] = None,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Probe each checkpoint of the run: loss against accuracy.")
    ] = False,
    features: Annotated[
        Path | None,
        typer.Option("--features", metavar="F", help="Use this features file, or make it, for the next probe."),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            "--beside",
            metavar="RUN2",
            autocompletion=runs,
            help="Show what the class head of this run, of igpt finetune or train, reached. May be repeated.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            "--dense",
            metavar="DIR",
            help="Classify pixels instead: DIR has images/ and annotations/ with PNG masks, as ADE20K; 0 is no class.",
        ),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Tell the accuracy of each class, and the confusion matrix (--json).")
    ] = False,
    floors: Annotated[
        bool,
        typer.Option(
            "--floors/--no-floors",
            help="Also probe raw pixels, colour histogram, random patches, and the same network untrained.",
        ),
    ] = True,
    precision: Annotated[
        str, typer.Option("--precision", metavar="float32|bfloat16|auto", help="In which the model computes.")
    ] = "float32",
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="PNG", help="Draw accuracy by layer (.png, .svg or .pdf).")
    ] = None,
    confusion: Annotated[
        Path | None,
        typer.Option("--confusion", metavar="PNG", help="Draw the confusion matrix, too; with --details implied."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the images used and the held-out part.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", min=1, metavar="N", help="Probe with N seeds from --seed on: mean and deviation of all figures."
        ),
    ] = 1,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
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
    the test split is used once. With --labels-per-class nothing but those labels is looked at: C and layer are chosen
    by cross-validation among them. A class head's accuracy is the one that its run recorded when training ended; that
    of RUN itself is shown, too, if it has one. With --seeds the headline is that of the first seed, beside mean and
    deviation. -o writes the JSON document.
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_for_model, run_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.files import PICTURES, check_outputs
    from igpt_cli.model_dir import load_model
    from igpt_cli.probing.heads import own_head, tested_head
    from igpt_cli.probing.images import Draws
    from igpt_cli.probing.layers import check_layers, parse_places
    from igpt_cli.probing.probe import probe_checkpoints, shipped_result, write_result
    from igpt_cli.probing.seeds import probe_seeds
    from igpt_cli.workspace import resolve_run

    chosen = choose_device(device)
    model = load_model(run_or_default(run, voice), chosen)
    wanted = check_layers(model, parse_places(layers if layer is None else str(layer), int(model.model.n_layers)))  # type: ignore[arg-type]
    outputs = {"--out": (out, ()), "--figure": (figure, PICTURES), "--confusion": (confusion, PICTURES)}
    check_outputs(outputs, force)
    n_train, n_test = images_used(train_images, test_images, chosen, voice)
    few = _counts(labels_per_class)
    if dense is not None:
        from igpt_cli.cli.dense import only_dense, probe_dense

        only_dense(
            {
                "T": tokens is not None,
                "--solver": solver != "lbfgs",
                "--no-standardise": not standardise,
                "--knn": knn,
                "--pool": pool != "mean",
                "--seeds": seeds > 1,
                "--concat": concat is not None,
                "--labels-per-class": bool(few),
                "--bert-masks": bert_masks is not None,
                "--all-checkpoints": all_checkpoints,
                "--features": features is not None,
                "--details": details,
                "--beside": bool(beside),
                "--confusion": confusion is not None,
                "--figure": figure is not None,
                "--test-part": test_part is not None,
                "--column": column is not None,
            }
        )
        part = {"layers": wanted, "train_images": n_train, "test_images": n_test, "seed": seed, "precision": precision}
        probe_dense(dense, model, out, json, voice, **part)
        return
    details = details or confusion is not None
    if all_checkpoints and (features is not None or few or details or concat or beside or knn or seeds > 1):
        raise typer.BadParameter("--all-checkpoints probes layers alone: leave out --features, --concat and the like")
    if knn and solver == "knn":
        raise typer.BadParameter("--knn sets nearest neighbours beside another solver; --solver knn is them alone")
    source = tokens or tokens_of(model, voice)
    settings: dict[str, Any] = {
        "layers": wanted,
        "solver": solver,
        "standardise": standardise,
        "pool": pool,
        "bert_masks": bert_masks,
        "precision": precision,
        "stage": voice.progress,
    }
    draws = Draws(n_train, n_test, range(seed, seed + seeds))
    # What features files and class heads are of is known by the hash of all tokens, so for them there must be all.
    some = features is None and not beside and model.config["model"].get("n_classes") is None
    held: dict[str, Any] = {"needs": ("train", "test"), "test_part": test_part, "column": column, "seed": seed}
    with open_for_model(source, model, voice, draws, always=some, **held) as file:
        shipped = shipped_result(model.run, file)
        heads = own_head(model.path, file) + [tested_head(resolve_run(name), file) for name in beside or ()]
        if all_checkpoints:
            drawn: dict[str, Any] = {"train_images": n_train, "test_images": n_test, "seed": seed}
            rows = probe_checkpoints(model.path, file, chosen, **drawn, **settings)
        else:
            found = probe_seeds(
                model,
                file,
                draws=draws,
                knn=knn,
                concat=concat,
                labels_per_class=few,
                repeats=repeats,
                floors=floors,
                details=details,
                features=features,
                **settings,
            )
    if all_checkpoints:
        _show_checkpoints(rows, model.name, source, out, figure, json, voice)
        return
    found["tokens"] = source
    if heads:
        found["heads"] = heads
    if out is not None:
        write_result(found, out)
    if figure is not None:
        from igpt_cli.report.figures import probe_figure

        probe_figure(found, figure)
        voice.say(f"drawn: {figure}")
    if confusion is not None:
        from igpt_cli.report.figures import confusion_figure

        confusion_figure(found, confusion)
        voice.say(f"drawn: {confusion}")
    explain(found, voice)
    if shipped:
        voice.say(
            f"for comparison, builtin:igpt-tiny, trained for hours, reaches {shipped['accuracy']:.1f}% at layer "
            f"{shipped['layer']} with {shipped['n_train']:,} training and {shipped['n_test']:,} test images"
        )
    if json:
        result_json(found)
    else:
        result(probe_table(found))


def _counts(text: str | None) -> list[int]:
    """Numbers of labels: "4,25,400"."""
    parts = [] if text is None else text.split(",")
    if any(not part.strip().isdecimal() or int(part) < 2 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is no list of numbers from 2 on, such as 4,25,400", param_hint="--labels-per-class"
        )
    return sorted({int(part) for part in parts})


def _show_checkpoints(
    rows: list[dict[str, Any]], name: str, source: str, out: Path | None, figure: Path | None, json: bool, voice: Voice
) -> None:
    """Loss against accuracy, a row for each checkpoint."""
    from igpt_cli.probing.probe import write_result
    from igpt_cli.report.figures import loss_against_accuracy

    document = {"model": name, "tokens": source, "checkpoints": rows}
    if out is not None:
        write_result(document, out)
    if figure is not None:
        loss_against_accuracy(rows, figure, f"{name}: {len(rows)} checkpoints")
        voice.say(f"drawn: {figure}")
    if json:
        result_json(document)
        return
    result(checkpoint_table(rows))


def images_used(
    train_images: str | None, test_images: str | None, device: torch.device, voice: Voice
) -> tuple[int | None, int | None]:
    """How many images of the splits "train" and "test" to use at most, None for all; a CPU's default is said."""
    from igpt_cli.probing.images import CPU_IMAGES

    limits = [_count(train_images, "--train-images"), _count(test_images, "--test-images")]
    if device.type == "cpu":
        limits = [default if asked is None else asked for asked, default in zip(limits, CPU_IMAGES)]
        if train_images is None or test_images is None:
            voice.say(
                f"images: at most {limits[0]:,} to train on and {limits[1]:,} to test, to be quick on a CPU "
                f"(default; --train-images all --test-images all for every image)"
            )
    n_train, n_test = (None if n == 0 else n for n in limits)
    return n_train, n_test


def _count(text: str | None, option: str) -> int | None:
    """A number of images; "all" is 0, None stays None."""
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdecimal() or int(text) == 0:
        raise typer.BadParameter(f"{text!r} is neither a number of images nor 'all'", param_hint=option)
    return int(text)
