"""The whole road on the embedded images, in minutes on a CPU: palette, tokens, pretraining, probe, pictures."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from igpt_cli import __version__
from igpt_cli.device import choose_device
from igpt_cli.errors import OutputError
from igpt_cli.files import replacing
from igpt_cli.images.pictures import save_picture
from igpt_cli.images.sources import open_source
from igpt_cli.images.transforms import Preprocess
from igpt_cli.model_dir import ModelDir, load_model, read_config, read_metrics
from igpt_cli.palette.count import count_colours
from igpt_cli.palette.describe import swatch
from igpt_cli.palette.fit import fit_palette
from igpt_cli.probing.probe import probe
from igpt_cli.report.figures import layer_curve
from igpt_cli.report.losses import Recorded, loss_curves
from igpt_cli.tokens.anything import EMBEDDED, tokens_from
from igpt_cli.tokens.sheet import contact_sheet
from igpt_cli.tokens.store import TokenFile, open_tokens
from igpt_cli.tokens.tokenize import tokenize
from igpt_cli.training.pretrain import PretrainResult, Recipe, pretrain

#: Seconds of pretraining, and images to probe with: what fits into four minutes on two cores.
PRETRAIN_SECONDS = 60.0
TRAIN_IMAGES, TEST_IMAGES = 280, 180
SHIPPED = "builtin:igpt-tiny"
SUMMARY = "summary.json"


class Listener(Protocol):
    """Whoever the demo speaks to."""

    def say(self, text: str) -> None:
        """One line for people."""

    def progress(self, label: str, unit: str = "images") -> AbstractContextManager[Callable[[int, int], None]]:
        """A context whose value is called with (done, total)."""


def demo(
    out: Path | str,
    listener: Listener,
    *,
    seconds: float = PRETRAIN_SECONDS,
    train_images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Walk the whole road and write the folder `out`.

    In the folder: palette.npz, 1-palette.png, tokens-32.h5, 2-quantized.png, run/, 3-loss.png, 4-layers.png and
    summary.json, which is what is returned: times, losses (nats per token) and accuracies (percent), all measured.

    Args:
        out: the folder; made, and refused if it is there already, unless `force`.
        seconds: of pretraining.
        train_images, test_images: how many images each network is probed with; default TRAIN_IMAGES, TEST_IMAGES.

    Raises:
        OutputError: the folder is there already or cannot be made.
    """
    started = time.monotonic()
    train_images, test_images = train_images or TRAIN_IMAGES, test_images or TEST_IMAGES
    out = _folder(Path(out), force)
    palette, tokens, step_seconds = _tokens(out, listener, seed)
    done = _pretrain(tokens, out, listener, seconds, seed, device, on_start, on_record)
    recorded = Recorded(name="here", config=read_config(done.run), metrics=read_metrics(done.run))
    loss_curves([recorded], out / "3-loss.png", f"igpt-tiny, {done.seconds:.0f} s of pretraining")
    step_seconds["pretraining"] = round(done.seconds, 1)
    at, chosen = time.monotonic(), choose_device(device)
    listener.say(f"4. Linear probes of every layer: {train_images} images to learn from, {test_images} to be tested on")
    limits = {"train_images": train_images, "test_images": test_images, "seed": seed}
    here = _probe("here, untrained", load_model(done.run, chosen), tokens, listener, floors=True, **limits)
    shipped_model = load_model(SHIPPED, chosen)
    if shipped_model.own_palette.sha256 == palette.sha256:
        shipped = _probe("shipped model", shipped_model, tokens, listener, floors=False, **limits)
    else:
        with tokens_from(EMBEDDED, lambda: shipped_model.own_palette, 32) as own:
            shipped = _probe("shipped model", shipped_model, own, listener, floors=False, **limits)
    step_seconds["probes"] = round(time.monotonic() - at, 1)
    untrained, pixels = here["floors"]["untrained network"], here["floors"]["raw pixels"]
    layer_curve(
        {
            f"shipped igpt-tiny, {shipped_model.config['result']['steps']:,} steps": shipped["layers"],
            f"trained here, {done.steps:,} steps": here["layers"],
            "untrained": untrained["layers"],
        },
        {"raw pixels": pixels["accuracy"], "most frequent class": here["chance"]},
        out / "4-layers.png",
        f"Digits told by a linear probe ({train_images} training, {test_images} test images)",
    )
    summary = {
        "tool_version": __version__,
        "seconds": {**step_seconds, "total": round(time.monotonic() - started, 1)},
        "palette": {"n_vocab": palette.n_vocab, "mean_squared_error": palette.meta["mean_squared_error"]},
        "images": {name: len(split) for name, split in tokens.splits.items()},
        "pretraining": {
            "steps": done.steps,
            "tokens_seen": done.tokens_seen,
            "first_loss": read_metrics(done.run)[0]["loss"],
            "last_loss": round(done.train_loss, 4),
            "val_loss": round(done.val_loss, 4),
            "uniform_loss": round(math.log(palette.n_vocab), 4),
        },
        "probe": {
            "chance": here["chance"],
            "raw_pixels": pixels,
            "untrained": untrained,
            "trained_here": _without_floors(here),
            "shipped": {**_without_floors(shipped), "training": shipped_model.config["result"]},
        },
    }
    with replacing(out / SUMMARY) as part:
        part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _tokens(out: Path, listener: Listener, seed: int):
    times, at = {}, time.monotonic()
    source = open_source([EMBEDDED])
    listener.say(f"1. Palette: 512 colours for {source.counts['train']:,} images of handwritten digits in two colours")
    with listener.progress("counting colours") as progress:
        counts = count_colours(source, progress=progress)
    with listener.progress("k-means", "iterations") as progress:
        palette = fit_palette(counts, 512, seed, progress=progress)
    palette.save(out / "palette.npz")
    save_picture(swatch(palette), out / "1-palette.png")
    times["palette"], at = round(time.monotonic() - at, 1), time.monotonic()
    listener.say("2. Tokens: each pixel becomes the number of its nearest palette colour, each image 1,024 numbers")
    with listener.progress("quantizing") as progress:
        tokenize(source, palette, out / "tokens-32.h5", Preprocess(32), keep_rgb=True, progress=progress)
    tokens = open_tokens(out / "tokens-32.h5")
    save_picture(contact_sheet(tokens.split("test"), 32, seed), out / "2-quantized.png")
    times["tokens"] = round(time.monotonic() - at, 1)
    return palette, tokens, times


def _pretrain(
    tokens: TokenFile, out: Path, listener: Listener, seconds, seed, device, on_start, on_record
) -> PretrainResult:
    listener.say(f"3. Pretraining: igpt-tiny learns to predict the next pixel, for {seconds:.0f} seconds")
    recipe = Recipe(model="igpt-tiny", budget=seconds, warmup_steps=10, val_images=32, seed=seed)
    return pretrain(
        tokens, out / "run", recipe, device=device, command="igpt demo", on_start=on_start, on_record=on_record
    )


def _probe(label: str, model: ModelDir, tokens: TokenFile, listener: Listener, **settings) -> dict[str, Any]:
    return probe(model, tokens, stage=lambda part: listener.progress(f"{part} ({label})"), **settings)


def _without_floors(found: dict[str, Any]) -> dict[str, Any]:
    return {k: found[k] for k in ("accuracy", "interval", "layer", "layers", "n_train", "n_test", "protocol")}


def _folder(out: Path, force: bool) -> Path:
    """The empty folder; with `force`, an earlier demo gives way, but no other folder does."""
    if out.exists() and not force:
        raise OutputError(f"{out} exists already; choose another --out, or overwrite it with --force")
    if out.exists():
        if not (out / SUMMARY).is_file() and not (out / "palette.npz").is_file():
            raise OutputError(f"{out} is not the folder of an earlier demo, so --force does not overwrite it")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True)
    except OSError as e:
        raise OutputError(f"cannot make the folder {out}: {e.strerror}") from e
    return out
