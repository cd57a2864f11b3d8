"""Run igpt probe for layers, checkpoints, or every pixel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from igpt_cli.cli.output import BadImages, Voice
from igpt_cli.cli.probe_text import checkpoint_table, dense_table, explain, explain_dense, probe_table

if TYPE_CHECKING:
    import torch

    from igpt_cli.model_dir import ModelDir
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
    model: ModelDir,
    opened: Opened,
    source: str,
    figure: Path | None,
    how: dict[str, Any],
    voice: Voice,
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
