"""igpt probe"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_cli.cli.options import Device, Force, Json, Out, Quiet
from igpt_cli.cli.output import Voice, bars, result, result_json, table


def probe(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="A run's folder or builtin:igpt-tiny. Default: runs/latest.", show_default=False
        ),
    ] = None,
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
    layers: Annotated[str, typer.Option("--layers", help="all, or such as 0,12,24 or 10-14.")] = "all",
    train_images: Annotated[
        str | None,
        typer.Option(
            "--train-images",
            metavar="N|all",
            help="Training images used. Default: all; on a CPU 500.",
            show_default=False,
        ),
    ] = None,
    test_images: Annotated[
        str | None,
        typer.Option(
            "--test-images", metavar="N|all", help="Test images used. Default: all; on a CPU 300.", show_default=False
        ),
    ] = None,
    floors: Annotated[
        bool, typer.Option("--floors/--no-floors", help="Also probe raw pixels and the same network untrained.")
    ] = True,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="PNG", help="Draw accuracy by layer (.png, .svg or .pdf).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the images used and the held-out part.")] = 0,
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
      igpt probe runs/igpt-tiny-1 --layers all --figure layers.png -o probe.json
      igpt probe builtin:igpt-tiny embedded --json | jq .accuracy

    Layer and C are chosen on a held-out tenth of the training images, the classifier is refitted on all of them, and
    the test split is used once. -o writes the JSON document.
    """
    voice = Voice(quiet)
    from igpt_cli.cli.resolve import open_tokens_or_images, run_or_default, tokens_of
    from igpt_cli.device import choose_device
    from igpt_cli.errors import InputError
    from igpt_cli.files import check_output
    from igpt_cli.model_dir import load_model
    from igpt_cli.probing.probe import CPU_IMAGES, check_layers, parse_layers, write_result
    from igpt_cli.probing.probe import probe as run_probe

    chosen = choose_device(device)
    model = load_model(run_or_default(run, voice), chosen)
    wanted = check_layers(model, parse_layers(str(layer)) if layer is not None else parse_layers(layers))
    if figure is not None and figure.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure {figure} ends in {figure.suffix!r}; a .png, .svg or .pdf file can be drawn")
    for path in (out, figure):
        if path is not None:
            check_output(path, force)
    limits = [_count(train_images, "--train-images"), _count(test_images, "--test-images")]
    if chosen.type == "cpu":
        limits = [default if asked is None else asked for asked, default in zip(limits, CPU_IMAGES)]
        if train_images is None or test_images is None:
            voice.say(
                f"images: at most {limits[0]:,} to train on and {limits[1]:,} to test, to be quick on a CPU "
                f"(default; --train-images all --test-images all for every image)"
            )
    n_train, n_test = (None if n == 0 else n for n in limits)
    source = tokens or tokens_of(model, voice)
    side = model.config["model"]["resolution"]
    with open_tokens_or_images(source, lambda: model.palette, side, voice) as file:
        with voice.progress("features") as progress:
            found = run_probe(
                model,
                file,
                wanted,
                train_images=n_train,
                test_images=n_test,
                floors=floors,
                seed=seed,
                progress=progress,
            )
    found["tokens"] = source
    if out is not None:
        write_result(found, out)
    if figure is not None:
        from igpt_cli.report.figures import probe_figure

        probe_figure(found, figure)
        voice.say(f"drawn: {figure}")
    _explain(found, voice)
    if json:
        result_json(found)
    else:
        result(_table(found))


def _count(text: str | None, option: str) -> int | None:
    """A number of images; "all" is 0, None stays None."""
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdecimal() or int(text) == 0:
        raise typer.BadParameter(f"{text!r} is neither a number of images nor 'all'", param_hint=option)
    return int(text)


def _table(found: dict[str, Any]) -> str:
    """One row a layer, then the floors; the chosen layer is marked."""
    rows = [(str(r["layer"]) + (" *" if r["layer"] == found["layer"] else ""), r) for r in found["layers"]]
    floors = found.get("floors", {})
    if "raw pixels" in floors:
        rows.append(("raw pixels", floors["raw pixels"]))
    if "untrained network" in floors:
        rows.append((f"untrained, layer {floors['untrained network']['layer']}", floors["untrained network"]))
    cells = [
        [
            name,
            f"{r['accuracy']:.1f}",
            f"{r['interval'][0]:.1f}-{r['interval'][1]:.1f}",
            f"{r['val_accuracy']:.1f}",
            f"{r['C']:g}",
        ]
        for name, r in rows
    ]
    drawn = bars([r["accuracy"] for _, r in rows], 100.0)
    return table([[*c, b] for c, b in zip(cells, drawn)], ["layer", "accuracy %", "95%", "held out %", "C", ""])


def _explain(found: dict[str, Any], voice: Voice) -> None:
    low, high = found["interval"]
    voice.say(
        f"{found['model']} layer {found['layer']}: {found['accuracy']:.1f}% of {found['n_test']:,} test images "
        f"(95%: {low:.1f} to {high:.1f}; the commonest class: {found['chance']:.1f}%), "
        f"trained on {found['n_train']:,} labels"
    )
    edge = [r["layer"] for r in found["layers"] if r["at_edge"] and r["layer"] == found["layer"]]
    if edge:
        voice.say(f"note: the C chosen for layer {edge[0]} is at the edge of the grid {found['C_grid']}")
    if not all(r["converged"] for r in found["layers"]):
        voice.say("note: L-BFGS did not converge at some layer within 1,000 iterations")
