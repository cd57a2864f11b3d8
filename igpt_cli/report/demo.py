"""The whole pipeline on the embedded emoji, in minutes on a CPU."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from igpt_cli import __version__
from igpt_cli.device import choose_device, choose_precision
from igpt_cli.documents import write_json
from igpt_cli.errors import OutputError
from igpt_cli.images.pictures import save_picture
from igpt_cli.images.sources import EMBEDDED, open_source
from igpt_cli.images.transforms import Preprocess
from igpt_cli.model_dir import ModelDir, load_model, read_config, read_metrics
from igpt_cli.palette.count import count_colours
from igpt_cli.palette.describe import swatch
from igpt_cli.palette.fit import fit_palette
from igpt_cli.palette.palette import Palette
from igpt_cli.probing.probe import UNTRAINED, probe
from igpt_cli.report.figures import layer_curve
from igpt_cli.report.losses import Recorded, loss_curves
from igpt_cli.sampling.draw import SamplingParams
from igpt_cli.sampling.generate import complete
from igpt_cli.sampling.missing import keep_rows
from igpt_cli.sampling.pictures import captioned, completions, with_missing
from igpt_cli.statistics import evenly_spaced
from igpt_cli.tokens.sheet import contact_sheet
from igpt_cli.tokens.store import TokenFile, open_tokens
from igpt_cli.tokens.tokenize import tokenize
from igpt_cli.training.run import RunResult, pretrain
from igpt_cli.training.settings import PretrainSettings

#: Seconds of pretraining, and images to probe with: what fits into four minutes on two cores.
PRETRAIN_SECONDS = 60.0
TRAIN_IMAGES, TEST_IMAGES = 1000, 600
#: Test images to complete, how often each, and how likely a colour must be to be drawn: unlikely ones spoil an image.
COMPLETED, TIMES, TEMPERATURE = 6, 4, 0.9
SHIPPED = "builtin:igpt-tiny"
SUMMARY, PROBE = "summary.json", "probe.json"


class Listener(Protocol):
    """Who follows the demo."""

    def say(self, text: str) -> None:
        """One line of text."""

    def show(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        """Images (H, W, 3) uint8, each with a caption."""

    def progress(self, label: str, unit: str = "images") -> AbstractContextManager[Callable[[int, int], None]]:
        """A context whose value is called with (done, total)."""


def demo(
    out: Path | str,
    listener: Listener,
    *,
    seconds: float = PRETRAIN_SECONDS,
    train_images: int | None = None,
    test_images: int | None = None,
    recompute: bool = False,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the whole pipeline and write the folder `out`.

    In the folder: palette.npz, 1-palette.png, tokens-32.h5, 2-quantized.png, run/, 3-loss.png, 4-completions.png,
    5-layers.png and summary.json, which is what is returned: times, losses (nats per token) and accuracies (percent).
    The accuracies are those of the probe that ships with the model, unless it is computed again.

    Args:
        out: the folder; made, and refused if it is there already, unless `force`.
        seconds: of pretraining.
        recompute: probe the shipped model here, on a part of the images.
        train_images, test_images: how many images that takes; default TRAIN_IMAGES, TEST_IMAGES.

    Raises:
        OutputError: the folder is there already or cannot be made.
    """
    started = time.monotonic()
    train_images, test_images = train_images or TRAIN_IMAGES, test_images or TEST_IMAGES
    out = _folder(Path(out), force)
    chosen = choose_device(device)
    shipped = load_model(SHIPPED, chosen)
    palette, tokens, step_seconds = _tokens(out, listener, seed)
    done = _pretrain(tokens, out, listener, seconds, seed, device, on_start=on_start, on_record=on_record)
    recorded = Recorded(name="here", config=read_config(done.run), metrics=read_metrics(done.run))
    loss_curves([recorded], out / "3-loss.png", f"igpt-tiny, {done.seconds:.0f} s of pretraining")
    step_seconds["pretraining"], at = round(done.seconds, 1), time.monotonic()
    if shipped.own_palette.sha256 != palette.sha256:  # fitted by libraries that round otherwise
        tokenize(open_source([EMBEDDED]), shipped.own_palette, out / "tokens-shipped.h5", Preprocess(32))
        tokens = open_tokens(out / "tokens-shipped.h5")
    _complete(shipped, tokens, out, listener, seed)
    step_seconds["completions"], at = round(time.monotonic() - at, 1), time.monotonic()
    if recompute:
        listener.say(
            f"5. Linear probes of every layer of the shipped model, of an untrained copy and of raw pixels: "
            f"{train_images:,} images to learn from, {test_images:,} to test"
        )
        probed = probe(
            shipped,
            tokens,
            train_images=train_images,
            test_images=test_images,
            seed=seed,
            precision=choose_precision("auto", chosen),
            stage=listener.progress,
        )
    else:
        probed = json.loads((shipped.path / PROBE).read_text(encoding="utf-8"))
        listener.say(
            f"5. Linear probes of every layer of the shipped model, of an untrained copy and of raw pixels, stored "
            f"with the model: {probed['n_train']:,} images to learn from, {probed['n_test']:,} to test (--recompute "
            f"probes a part of them here, in about three minutes)"
        )
    step_seconds["probes"] = round(time.monotonic() - at, 1)
    baselines = probed.pop("floors")
    layer_curve(
        {
            f"shipped igpt-tiny, {shipped.config['result']['steps']:,} steps": probed["layers"],
            "the same, untrained": baselines[UNTRAINED]["layers"],
        },
        {name: row["accuracy"] for name, row in baselines.items() if name != UNTRAINED} | {"chance": probed["chance"]},
        out / "5-layers.png",
        f"Nine groups of emoji, linear classifier ({probed['n_train']:,} training, {probed['n_test']:,} test images)",
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
            "last_loss": done.train_loss and round(done.train_loss, 4),
            "val_loss": done.val_loss and round(done.val_loss, 4),
            "uniform_loss": round(math.log(palette.n_vocab), 4),
        },
        "probe": {**probed, "floors": baselines, "training": shipped.config["result"], "stored": not recompute},
    }
    write_json(summary, out / SUMMARY)
    return summary


def _tokens(out: Path, listener: Listener, seed: int) -> tuple[Palette, TokenFile, dict[str, float]]:
    times, at = {}, time.monotonic()
    source = open_source([EMBEDDED])
    listener.say(f"1. Palette: the 512 colours that best stand for all pixels of {source.counts['train']:,} emoji")
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


def _pretrain(tokens: TokenFile, out: Path, listener: Listener, seconds, seed, device, **callbacks: Any) -> RunResult:
    listener.say(f"3. Pretraining: igpt-tiny learns to predict the next pixel, for {seconds:.0f} seconds")
    recipe = PretrainSettings(model="igpt-tiny", budget=seconds, warmup_steps=10, val_images=32, seed=seed)
    return pretrain(tokens, out / "run", recipe, device=device, command="igpt demo", **callbacks)


def _complete(model: ModelDir, tokens: TokenFile, out: Path, listener: Listener, seed: int) -> None:
    """Lower halves of test images by the shipped model: a picture, and the first ones for the listener."""
    listener.say("4. Completions: the shipped model sees upper halves of emoji new to it, and draws the lower ones")
    split, side = tokens.split("test"), tokens.resolution
    rows = evenly_spaced(len(split), COMPLETED)
    given, missing = split.tokens[rows].astype(np.int64), keep_rows(side, 0.5)
    with listener.progress("drawing", "pixels") as progress:
        drawn = complete(model, given, missing, TIMES, seed=seed, params=SamplingParams(TEMPERATURE), progress=progress)
    originals = split.decode(rows)
    outputs = model.own_palette.dequantize(drawn.tokens.reshape(len(rows), TIMES, side, side))
    masks = np.broadcast_to(missing, (len(rows), side, side))
    picture = completions(originals, masks, outputs, originals)
    steps = f"{model.config['result']['steps']:,} steps"
    text = f"{model.name} as shipped, {steps}; temperature {TEMPERATURE}; test images of the embedded emoji"
    save_picture(captioned(picture, text), out / "4-completions.png")
    for i in range(2):
        pair = [with_missing(originals[i : i + 1], masks[i : i + 1])[0], outputs[i, 0], originals[i]]
        listener.show(pair, ["the model sees", "it draws", "the original"])


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
