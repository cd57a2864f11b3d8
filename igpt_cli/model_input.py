"""The input of a model, from images, stored tokens or pixels.

Every command and every part of the library that gives images to a model does so through this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.transforms import Preparation, Preprocess
from igpt_cli.model_dir import CONFIG, ModelDir
from igpt_cli.palette.palette import Palette, even_palette
from igpt_cli.tokens.store import TokenSplit

#: From some rows of what is stored, (B, T) tokens or (B, R, R, 3) uint8, to what the model takes, on the CPU.
Decode = Callable[[np.ndarray], torch.Tensor]
#: Pixels of an RGB image that count like one token when images are put together in batches.
PIXELS_A_TOKEN = 32


@dataclass(frozen=True)
class Wanted:
    """How images are made ready for a model: quantized with `palette`, and kept beside their tokens if `keep_rgb`."""

    palette: Palette
    preprocess: Preprocess
    keep_rgb: bool


def takes_rgb(run: ModelDir) -> bool:
    """Whether the model takes RGB images; one that does not takes tokens.

    Raises:
        InputError: `input_kind` is neither.
    """
    kind = getattr(run.model, "input_kind", None)
    if kind not in ("tokens", "rgb"):
        raise InputError(f"{run.name} takes {kind!r} as its input; 'tokens' or 'rgb' are needed")
    return kind == "rgb"


def wanted(run: ModelDir) -> Wanted:
    """How a model wants its images, as its config.json says.

    A model trained here sees images as those of its training: cut out as `igpt tokenize` does, and as the colours of
    its palette unless its images were kept. An imported one states its own `preparation`; it has no palette, and an
    even one of 512 colours serves where colours are counted.

    Raises:
        FormatError: the preparation cannot be used.
    """
    side, stated = run.config["model"]["resolution"], run.config.get("preparation") or {}
    if not takes_rgb(run):
        return Wanted(run.own_palette, Preprocess(side), keep_rgb=False)
    palette = run.palette or even_palette()
    if "crop" not in stated and "filter" not in stated and side <= 224:
        kept = run.palette is None or run.config.get("data", {}).get("images") == "rgb"
        return Wanted(palette, Preprocess(side), keep_rgb=kept)
    try:
        how = Preparation(side, crop=stated.get("crop", 1.0), filter=stated.get("filter", "bicubic"))
    except InputError as e:
        raise FormatError(f"{run.path / CONFIG} states a preparation that cannot be used: {e}") from e
    return Wanted(palette, how, keep_rgb=True)


def inputs_of(run: ModelDir, split: TokenSplit) -> tuple[np.ndarray, Decode]:
    """What a model sees of a split: an array of which rows are read, and what makes its input of some of them.

    A model of tokens sees the tokens; one of RGB images the images that the file kept, or else the tokens' colours.

    Raises:
        InputError: `input_kind` is neither.
    """
    if takes_rgb(run) and split.rgb is not None:
        return split.rgb, pixel_input(run)
    return split.tokens, decoder(run, split.file.palette)


def places(run: ModelDir, resolution: int) -> int:
    """What an image of R x R pixels counts in tokens, when it is asked how many images suit a device."""
    return max(1, resolution**2 // (PIXELS_A_TOKEN if takes_rgb(run) else 1))


def decoder(run: ModelDir, palette: Palette) -> Decode:
    """What makes a model's input of tokens (B, T): (B, T) int64 for "tokens", (B, 3, R, R) float32 for "rgb".

    RGB is the palette's colours, as `pixel_input` has them.

    Raises:
        InputError: `input_kind` is neither.
    """
    if not takes_rgb(run):
        return as_tokens
    pixels = pixel_input(run)

    def decode(tokens: np.ndarray) -> torch.Tensor:
        R = round(tokens.shape[1] ** 0.5)
        return pixels(palette.dequantize(tokens).reshape(-1, R, R, 3))

    return decode


def as_tokens(tokens: np.ndarray) -> torch.Tensor:
    """(B, T) whole numbers as int64."""
    return torch.from_numpy(tokens.astype(np.int64))


def pixel_input(run: ModelDir) -> Callable[[np.ndarray], torch.Tensor]:
    """What makes an RGB model's input, (B, 3, R, R) float32, of pixels (B, R, R, 3) uint8.

    That is colours in 0..1, less the `mean` and over the `std` (three numbers each, of red, green and blue) that
    config.json states under `preparation`, if it does.
    """
    stated: dict[str, Any] = run.config.get("preparation", {})
    mean, std = (torch.tensor(stated.get(k, [v] * 3), dtype=torch.float32) for k, v in (("mean", 0.0), ("std", 1.0)))

    def prepare(pixels: np.ndarray) -> torch.Tensor:
        rgb = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).float() / 255
        return ((rgb - mean) / std).permute(0, 3, 1, 2).contiguous()

    return prepare
