"""Run and print igpt probe for layers, checkpoints, or every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from igpt_cli.cli.output import BadImages, Voice, bars, interval, table

if TYPE_CHECKING:
    import torch

    from igpt_cli.model_dir import ModelDir
    from igpt_cli.probing.dense import DenseResult
    from igpt_cli.probing.probe import CheckpointProbe
    from igpt_cli.tokens.store import TokenFile

    Opened = Callable[..., AbstractContextManager[TokenFile]]


def probe_layers(
    model: ModelDir,
    opened: Opened,
    source: str,
    beside: list[str],
    pictures: tuple[Path | None, Path | None],
    how: dict[str, Any],
    voice: Voice,
) -> tuple[dict[str, Any], str]:
    """What each layer knows of the classes: the JSON document, and the table."""
    from igpt_cli.probing.heads import tested_heads
    from igpt_cli.probing.probe import shipped_result
    from igpt_cli.probing.seeds import probe_seeds
    from igpt_cli.report.figures import confusion_figure, probe_figure

    # What features files and class heads are of is known by the hash of all tokens, so for them there must be all.
    some = how["features"] is None and not beside and model.config["model"].get("n_classes") is None
    with opened(always=some) as file:
        shipped, heads = shipped_result(model.run, file), tested_heads(model.path, beside, file)
        found = probe_seeds(model, file, **how)
    found["tokens"] = source
    if heads:
        found["heads"] = heads
    for path, draw in zip(pictures, (probe_figure, confusion_figure)):
        if path is not None:
            draw(found, path)
            voice.say(f"drawn: {path}")
    explain(found, shipped, voice)
    return found, probe_table(found)


def probe_checkpoints(
    model: ModelDir, opened: Opened, source: str, figure: Path | None, how: dict[str, Any], voice: Voice
) -> tuple[dict[str, Any], str]:
    """Accuracy against loss, checkpoint by checkpoint: the JSON document, and the table."""
    from igpt_cli.probing.features import model_device
    from igpt_cli.probing.probe import probe_checkpoints as library
    from igpt_cli.report.figures import loss_against_accuracy

    with opened(always=model.config["model"].get("n_classes") is None) as file:
        rows = library(model.path, file, model_device(model.model), **how)
    if figure is not None:
        loss_against_accuracy(rows, figure, f"{model.name}: {len(rows)} checkpoints")
        voice.say(f"drawn: {figure}")
    return {"model": model.name, "tokens": source, "checkpoints": [asdict(row) for row in rows]}, checkpoint_table(rows)


def probe_dense(model: ModelDir, root: Path, how: dict[str, Any], voice: Voice) -> tuple[dict[str, Any], str]:
    """What each layer knows of the class of every pixel: the JSON document, and the table."""
    from igpt_cli.probing.dense import dense_probe

    bad = BadImages(voice)
    found = dense_probe(model, root, on_bad=bad, **how)
    bad.say_how_many()
    explain_dense(found, voice)
    return asdict(found), dense_table(found)


def images_used(
    train_images: str | None, test_images: str | None, device: torch.device, voice: Voice
) -> tuple[int | None, int | None]:
    """How many images of the splits "train" and "test" to use at most, None for all; a CPU's default is said."""
    from igpt_cli.probing.images import CPU_IMAGES

    limits = [_count(train_images, "--train-images"), _count(test_images, "--test-images")]
    if device.type == "cpu":
        limits = [default if requested is None else requested for requested, default in zip(limits, CPU_IMAGES)]
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


def probe_table(found: dict[str, Any]) -> str:
    """One row a layer, then class heads and baselines, in 80 columns; then seeds, few labels. *: chosen."""
    rows = _rows(found)
    several, knn = "seeds" in found, "knn" in found
    tried = "rate" if "learning_rate" in found["layers"][0] else "C"
    heads = ["layer", "mean %", "std"] if several else ["layer", "accuracy %", "95%", "held out %", tried]
    heads += ["kNN %"] if knn else []
    cells = []
    for name, r in rows:
        value = r.get("C", r.get("learning_rate"))
        cells.append([name, _percent(r.get("accuracy_mean", r["accuracy"]))])
        if several:
            cells[-1].append(_percent(r.get("accuracy_deviation")))
        else:
            cells[-1] += [interval(r["interval"]), _percent(r["val_accuracy"]), "" if value is None else f"{value:g}"]
        if knn:
            near = r.get("knn", {})
            cells[-1].append(_percent(near.get("accuracy_mean", near.get("accuracy"))))
    room = 33 - 7 * knn + 12 * several - max(len(name) for name, _ in rows)
    drawn = bars([r.get("accuracy_mean", r["accuracy"]) for _, r in rows], 100.0, min(24, room))
    text = table([[*c, b] for c, b in zip(cells, drawn)], [*heads, ""])
    if several:
        text += "\n\n" + _seeds_table(found, tried)
    if "few_labels" in found:
        cells = [
            [
                r["labels_per_class"],
                r["n_train"],
                _percent(r["accuracy"]),
                _percent(r["deviation"]),
                ", ".join(str(x["layer"]) for x in r["repeats"]),
            ]
            for r in found["few_labels"]
        ]
        text += "\n\n" + table(cells, ["labels of a class", "labels", "accuracy %", "std", "layers chosen"])
    return text


def _rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What stands in the first table: layers, those together, class heads, baselines."""
    chosen = {one["layer"] for one in found.get("seeds", [found])}
    rows = [(str(r["layer"]) + (" *" if r["layer"] in chosen else ""), r) for r in found["layers"]]
    if "concat" in found:
        among = found["concat"]["layers"]
        rows.append((f"{among[0]}-{among[-1]} together", found["concat"]))
    for head in found.get("heads", []):
        rows.append((f"{head['kind']}, {Path(head['run']).name}"[:30], head))
    for name, row in found.get("floors", {}).items():
        rows.append((f"untrained, layer {row['layer']}" if "layer" in row else name, row))
    return rows


def _seeds_table(found: dict[str, Any], tried: str) -> str:
    """A row a seed at the layer that it chose, then mean and standard deviation."""
    knn = "knn" in found
    cells = []
    for one in found["seeds"]:
        value = one.get("C", one.get("learning_rate"))
        cells.append([one["seed"], one["layer"], _percent(one["accuracy"]), interval(one["interval"])])
        cells[-1] += [_percent(one["val_accuracy"]), "" if value is None else f"{value:g}"]
        cells[-1] += [_percent(one["knn"]["accuracy"]), one["knn"]["layer"]] if knn else []
    for key, name in (("mean", "mean"), ("deviation", "std")):
        cells.append([name, "", _percent(found[f"accuracy_{key}"]), "", "", ""])
        cells[-1] += [_percent(found["knn"][f"accuracy_{key}"]), ""] if knn else []
    heads = ["seed", "layer", "accuracy %", "95%", "held out %", tried]
    return table(cells, heads + (["kNN %", "kNN layer"] if knn else []))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def explain(found: dict[str, Any], shipped: dict[str, Any] | None, voice: Voice) -> None:
    """On stderr: the headline, class heads, and notes."""
    low, high = found["interval"]
    voice.say(
        f"{found['model']} layer {found['layer']}: {found['accuracy']:.1f}% of {found['n_test']:,} test images "
        f"(95%: {low:.1f} to {high:.1f}; the commonest class: {found['chance']:.1f}%), "
        f"trained on {found['n_train']:,} labels"
    )
    if "seeds" in found:
        said = ", ".join(f"{one['accuracy']:.1f}%" for one in found["seeds"])
        voice.say(
            f"that is seed {found['seed']}; {len(found['seeds'])} seeds: mean {found['accuracy_mean']:.1f}%, std "
            f"{found['accuracy_deviation']:.1f} ({said})"
        )
    if "knn" in found:
        near = found["knn"]
        voice.say(
            f"nearest neighbours: layer {near['layer']}, {near['accuracy']:.1f}% (95%: {near['interval'][0]:.1f} to "
            f"{near['interval'][1]:.1f})"
        )
    for head in found.get("heads", []):
        low, high = head["interval"]
        labels = "" if head["labels_per_class"] is None else f" with {head['labels_per_class']:,} labels of a class"
        voice.say(
            f"{head['run']}, {head['kind']}{labels}: {head['accuracy']:.1f}% of {head['n_test']:,} test images by its "
            f"own class head (95%: {low:.1f} to {high:.1f})"
        )
    if any(r["at_edge"] and r["layer"] == found["layer"] for r in found["layers"]):
        voice.say(f"note: what was chosen for layer {found['layer']} is at the edge of the values tried")
    if not all(r["converged"] for r in found["layers"]):
        voice.say("note: L-BFGS did not converge at some layer within 1,000 iterations")
    if shipped:
        voice.say(
            f"for comparison, builtin:igpt-tiny, trained for hours, reaches {shipped['accuracy']:.1f}% at layer "
            f"{shipped['layer']} with {shipped['n_train']:,} training and {shipped['n_test']:,} test images"
        )


def checkpoint_table(rows: Sequence[CheckpointProbe]) -> str:
    """Loss and accuracy, one row a checkpoint."""
    cells = [
        [r.step, "-" if r.val_loss is None else f"{r.val_loss:.4f}", r.layer, f"{r.accuracy:.1f}", interval(r.interval)]
        for r in rows
    ]
    return table(cells, ["step", "held-out loss", "layer", "accuracy %", "95%"])


def explain_dense(found: DenseResult, voice: Voice) -> None:
    """On stderr: the headline of `igpt probe --dense`."""
    baseline = found.commonest
    voice.say(
        f"{found.model} layer {found.layer}: mean IoU {found.mean_iou:.1f}%, {found.pixel_accuracy:.1f}% "
        f"of the pixels of {found.n_test:,} test images (always the commonest class: {baseline['mean_iou']:.1f}%, "
        f"{baseline['pixel_accuracy']:.1f}%), trained on {found.n_train:,} images"
    )


def dense_table(found: DenseResult) -> str:
    """One row a layer; the chosen layer is marked."""
    drawn = bars([row.mean_iou for row in found.layers], 100.0)
    cells = [
        [
            str(row.layer) + (" *" if row.layer == found.layer else ""),
            f"{row.mean_iou:.1f}",
            f"{row.pixel_accuracy:.1f}",
            f"{row.val_mean_iou:.1f}",
            f"{row.grid}x{row.grid}",
            bar,
        ]
        for row, bar in zip(found.layers, drawn, strict=True)
    ]
    return table(cells, ["layer", "mean IoU %", "pixels %", "held out IoU %", "grid", ""])
