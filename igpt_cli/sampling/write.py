"""Write samples and completions as pictures, GIFs and NumPy arrays.

Shapes: n images, k completions of each, R pixels a side, T = R * R tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.errors import MismatchError
from igpt_cli.model_dir import ModelDir
from igpt_cli.sampling.draw import SamplingParams
from igpt_cli.sampling.generate import Drawn
from igpt_cli.sampling.gif import raster_gif
from igpt_cli.sampling.nearest import Nearest
from igpt_cli.sampling.pictures import (
    GAP,
    SPACE,
    captioned,
    completions,
    grid,
    with_nearest,
    write_npz,
    write_picture,
)
from igpt_cli.tokens.store import TokenSplit, open_tokens

#: A grid of more images than this shows none of them well.
MOST_SHOWN = 400


@dataclass(frozen=True)
class Outputs:
    """The files to write; None for those that are not wanted."""

    picture: Path
    gif: Path | None = None
    npz: Path | None = None

    def to_dict(self) -> dict[str, str | None]:
        """The paths, as the JSON documents of `igpt sample` and `igpt complete` have them."""
        paths = {"path": self.picture, "gif": self.gif, "npz": self.npz}
        return {name: None if path is None else str(path) for name, path in paths.items()}


def write_samples(
    run: ModelDir,
    drawn: Drawn,
    outputs: Outputs,
    settings: dict[str, Any],
    near: Nearest | None = None,
    training: TokenSplit | None = None,
    of: str = "",
) -> None:
    """Write the first `MOST_SHOWN` samples (n, T) as a grid, or each with its nearest images of `training`; all as
    arrays.

    Args:
        settings: stored in the files; see `settings_of`.
        of: what the images are, for the caption.
    """
    side = run.config["model"]["resolution"]
    images = run.own_palette.dequantize(drawn.tokens.reshape(-1, side, side))
    shown = images[:MOST_SHOWN]
    if near is None or training is None:
        picture, gap = grid(shown), GAP
    else:
        names = [[training.names[row] for row in rows] for rows in near.rows[:MOST_SHOWN]]
        picture, gap = with_nearest(shown, near.images[:MOST_SHOWN], near.distances[:MOST_SHOWN], names), SPACE
    write_picture(captioned(picture, caption(settings, of), gap), outputs.picture, settings)
    if outputs.gif is not None:
        raster_gif(shown, drawn.order[:MOST_SHOWN], outputs.gif, settings)
    if outputs.npz is not None:
        write_npz(outputs.npz, drawn.tokens, images, settings)


def write_completions(
    run: ModelDir,
    tokens: np.ndarray,
    missing: np.ndarray,
    drawn: Drawn,
    outputs: Outputs,
    settings: dict[str, Any],
    of: str = "",
) -> None:
    """Write completions (n, k, T): each row of the picture has the input, the completions and the original.

    Args:
        tokens: (n, T) the originals; missing: (R, R) bool, what was drawn.
        settings, of: as for `write_samples`.
    """
    (n, k, T), side = drawn.tokens.shape, missing.shape[0]
    originals = run.own_palette.dequantize(tokens.reshape(n, side, side))
    images = run.own_palette.dequantize(drawn.tokens.reshape(n, k, side, side))
    masks = np.broadcast_to(missing, (n, side, side))
    picture = completions(originals, masks, images, originals)
    write_picture(captioned(picture, caption(settings, of), SPACE), outputs.picture, settings)
    if outputs.gif is not None:
        order = drawn.order.reshape(n * k, T)
        raster_gif(images.reshape(n * k, side, side, 3), order, outputs.gif, settings, columns=k)
    if outputs.npz is not None:
        write_npz(outputs.npz, drawn.tokens, images, settings, originals=originals, missing=masks)


def settings_of(
    command: str, run: ModelDir, drawn: Drawn, params: SamplingParams, seed: int, **more: Any
) -> dict[str, Any]:
    """The settings that made the images, as the picture and the JSON document of "sample" or "complete" hold them."""
    sizes = run.config["model"]
    return {
        "command": command,
        "model": run.name,
        "run": run.run,
        "steps": (run.config.get("result") or {}).get("steps"),
        "objective": drawn.objective,
        "resolution": sizes["resolution"],
        "palette_sha256": run.own_palette.sha256,
        "seed": seed,
        **more,
        **params.to_dict(),
        "rounds": drawn.rounds,
        "order": "raster" if drawn.objective == "ar" else "surest first",
        "precision": drawn.precision,
        "device": drawn.device,
        "batch_size": drawn.batch_size,
        "n": len(drawn.tokens),
    }


def caption(settings: dict[str, Any], of: str = "") -> str:
    """What stands below a picture: the model, how it drew, and of what the images are.

    >>> caption({"model": "igpt-s", "steps": 1000, "temperature": 1.0, "top_k": 50, "top_p": None, "seed": 0}, "cats")
    'igpt-s after 1,000 steps; temperature 1, top-k 50, seed 0; cats'
    """
    model = settings["model"] + (f" after {settings['steps']:,} steps" if settings["steps"] else "")
    how = [f"temperature {settings['temperature']:g}"]
    how += [f"{name} {settings[key]:g}" for key, name in (("top_k", "top-k"), ("top_p", "top-p")) if settings[key]]
    return "; ".join([model, ", ".join([*how, f"seed {settings['seed']}"]), *([of] if of else [])])


def training_split(path: str, run: ModelDir) -> TokenSplit:
    """The split "train" of a token file, or its first. Raises MismatchError for another resolution than the model's."""
    file, side = open_tokens(path), run.config["model"]["resolution"]
    if file.resolution != side:
        raise MismatchError(
            f"{path} has images of {file.resolution}x{file.resolution}, {run.run} draws {side}x{side}; --nearest "
            "needs the same resolution"
        )
    return file.split("train" if "train" in file.splits else next(iter(file.splits)))
