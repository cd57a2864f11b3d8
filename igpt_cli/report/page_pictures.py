"""Samples and completions of a report, found or drawn."""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from igpt_cli.errors import IgptError
from igpt_cli.evaluation.pixels import default_split
from igpt_cli.model_dir import ModelDir, check_fit
from igpt_cli.sampling.draw import SamplingParams
from igpt_cli.sampling.generate import Progress, complete, sample
from igpt_cli.sampling.missing import keep_rows
from igpt_cli.sampling.pictures import completions, grid, read_settings
from igpt_cli.sampling.write import settings_of
from igpt_cli.statistics import evenly_spaced
from igpt_cli.tokens.store import TokenFile

#: Images drawn where nobody says how many; images completed, and how often each.
CPU_SAMPLES, GPU_SAMPLES = 8, 32
COMPLETED, TIMES, KEEP = 4, 2, 0.5
#: A picture of more bytes would make the page too large to be sent.
LARGEST = 4 * 2**20


@dataclass(frozen=True)
class Picture:
    """A PNG with its text.

    Attributes:
        kind: "sample" or "complete".
        png, size: the file, and its (width, height).
        caption: how it was made.
        alt: what is seen.
        command: the command that makes it.
    """

    kind: str
    png: bytes
    size: tuple[int, int]
    caption: str
    alt: str
    command: list[str]

    @property
    def base64(self) -> str:
        """The file as text."""
        return b64encode(self.png).decode()


def saved_pictures(home: Path, config: dict[str, Any]) -> list[Picture]:
    """The newest samples and completions in RUN/samples/ that were made with as many steps of training as the run has
    now, according to the settings in them."""
    found: dict[str, Picture] = {}
    folder = home / "samples"
    files = [path for path in folder.glob("*.png") if path.is_file()] if folder.is_dir() else []
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            settings = read_settings(path)
        except IgptError:
            continue  # of another command, such as igpt attention
        kind, model = settings.get("command"), config["model"]
        same = (settings.get("model"), settings.get("steps"), settings.get("resolution")) == (
            *(model.get("name"), (config.get("result") or {}).get("steps"), model.get("resolution")),
        )
        if kind not in ("sample", "complete") or kind in found or not same or path.stat().st_size > LARGEST:
            continue
        with Image.open(path) as picture:
            size = picture.size
        settings["images"] = len(settings.get("images") or [])
        caption = f"From {home.name}/samples/{path.name}: {_caption(settings)}"
        command = [str(kind), str(settings.get("run")), "--seed", str(settings.get("seed"))]
        found[kind] = Picture(kind, path.read_bytes(), size, caption, _alt(settings), command)
    return list(found.values())


def draw_some(run: ModelDir, n: int | None, seed: int, progress: Progress) -> Picture:
    """n samples in a grid."""
    n = n or (CPU_SAMPLES if next(run.model.parameters()).device.type == "cpu" else GPU_SAMPLES)
    side = run.config["model"]["resolution"]
    drawn = sample(run, n, seed=seed, progress=_in_images(progress, side * side))
    settings = settings_of("sample", run, drawn, SamplingParams(), seed)
    command = ["sample", run.run, "-n", str(n), "--seed", str(seed), "-o", "samples.png"]
    return _picture(grid(run.own_palette.dequantize(drawn.tokens.reshape(n, side, side))), settings, command)


def complete_some(run: ModelDir, source: str, file: TokenFile, seed: int, progress: Progress) -> Picture:
    """A few images of which the upper half is given, completed twice each; `source` names the file.

    Raises:
        IgptError: the images do not suit the model.
    """
    check_fit(run, file)
    split, side = file.split(default_split(file)), run.config["model"]["resolution"]
    rows = evenly_spaced(len(split), COMPLETED)
    tokens, missing = split.tokens[rows].astype("int64"), keep_rows(side, KEEP)
    drawn = complete(run, tokens, missing, TIMES, seed=seed, progress=_in_images(progress, int(missing.sum())))
    originals = run.own_palette.dequantize(tokens.reshape(-1, side, side))
    outputs = run.own_palette.dequantize(drawn.tokens.reshape(-1, TIMES, side, side))
    masks = np.broadcast_to(missing, (len(rows), side, side))
    more = {"completions": TIMES, "images": len(rows), "split": split.name, "missing": {"keep": KEEP}}
    settings = settings_of("complete", run, drawn, SamplingParams(), seed, **more)
    command = ["complete", run.run, source, "-n", str(TIMES), "--limit", str(len(rows))]
    command += ["--seed", str(seed), "-o", "completed.png"]
    return _picture(completions(originals, masks, outputs, originals), settings, command)


def _in_images(progress: Progress, pixels: int) -> Progress:
    """Report progress in images, where the sampler reports pixels, `pixels` an image."""
    return lambda done, total: progress(done // pixels, total // pixels)


def _picture(image: Image.Image, settings: dict[str, Any], command: list[str]) -> Picture:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return Picture(settings["command"], file.getvalue(), image.size, _caption(settings), _alt(settings), command)


def _caption(settings: dict[str, Any]) -> str:
    """How a picture was made: "8 samples of igpt-tiny after 1,869 steps; temperature 1, seed 0"."""
    if settings["command"] == "sample":
        what = _many(settings.get("n"), "sample")
    else:
        what = f"{_many(settings.get('completions'), 'completion')} each of {_many(settings.get('images'), 'image')}"
        what += f" of the split {settings['split']}" if "split" in settings else ""
        what += f", {_given(settings.get('missing'))}"
    steps = settings.get("steps")
    after = f" after {steps:,} steps" if isinstance(steps, int) else ""
    limits = [f"{key.replace('_', '-')} {settings[key]}" for key in ("top_k", "top_p", "rounds") if settings.get(key)]
    temperature = f"temperature {float(settings.get('temperature') or 0):g}"
    return f"{what}, {settings.get('model')}{after}; " + ", ".join(
        [temperature, *limits, f"seed {settings.get('seed')}"]
    )


def _given(missing: Any) -> str:
    """What of an image was there."""
    how, value = next(iter(missing.items())) if isinstance(missing, dict) and missing else ("keep", None)
    if how == "keep" and isinstance(value, (int, float)):
        return f"the upper {100 * value:.0f}% given"
    return f"all but the box {value} given" if how == "box" else "a part given"


def _many(n: Any, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}" if isinstance(n, int) else f"{what}s"


def _alt(settings: dict[str, Any]) -> str:
    """What is seen, for those who do not see it."""
    side = settings.get("resolution")
    if settings["command"] == "sample":
        return (
            f"A grid of {_many(settings.get('n'), 'image')} of {side} by {side} pixels drawn by {settings.get('model')}"
        )
    return (
        f"Rows of small pictures, one for each of {_many(settings.get('images'), 'image')} of {side} by {side} pixels: "
        f"what was given, {_many(settings.get('completions'), 'completion')} by {settings.get('model')}, the original"
    )
