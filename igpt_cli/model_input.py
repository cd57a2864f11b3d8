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
#: Pixels of an RGB image that count as one token when a batch size is estimated.
PIXELS_A_TOKEN = 32


@dataclass(frozen=True)
class ImageSpec:
    """How images are prepared for a model: quantized with `palette`, and stored with the tokens if `keep_rgb`."""

    palette: Palette
    preprocess: Preprocess
    keep_rgb: bool


def takes_rgb(run: ModelDir) -> bool:
    """Whether the model takes RGB images rather than tokens.

    Raises:
        InputError: `input_kind` is neither.
    """
    kind = getattr(run.model, "input_kind", None)
    if kind not in ("tokens", "rgb"):
        raise InputError(f"{run.name} takes {kind!r} as its input; 'tokens' or 'rgb' are needed")
    return kind == "rgb"


def image_spec(run: ModelDir) -> ImageSpec:
    """How a model's images are prepared, from its config.json.

    A model trained here takes images as in its training: cropped as by `igpt tokenize`, in the colours of its palette
    unless its token file stored RGB. An imported model states its `preparation`; without a palette, an even one of 512
    colours is used.

    Raises:
        FormatError: the preparation cannot be used.
    """
    side, stated = run.config["model"]["resolution"], run.config.get("preparation") or {}
    if not takes_rgb(run):
        return ImageSpec(run.own_palette, Preprocess(side), keep_rgb=False)
    palette = run.palette or even_palette()
    if "crop" not in stated and "filter" not in stated and side <= 224:
        keep_rgb = run.palette is None or run.config.get("data", {}).get("images") == "rgb"
        return ImageSpec(palette, Preprocess(side), keep_rgb)
    try:
        how = Preparation(side, crop=stated.get("crop", 1.0), filter=stated.get("filter", "bicubic"))
    except InputError as e:
        raise FormatError(f"{run.path / CONFIG} states a preparation that cannot be used: {e}") from e
    return ImageSpec(palette, how, keep_rgb=True)


def inputs_of(run: ModelDir, split: TokenSplit) -> tuple[np.ndarray, Decode]:
    """A split's array for a model, and the function from some of its rows to the model's input: tokens, or for a model
    of RGB images the stored images, or else the tokens' colours."""
    if takes_rgb(run) and split.rgb is not None:
        return split.rgb, pixel_input(run)
    return split.tokens, decoder(run, split.file.palette)


def places(run: ModelDir, resolution: int) -> int:
    """The tokens that an image of R x R pixels counts as, to estimate a batch size."""
    return max(1, resolution**2 // (PIXELS_A_TOKEN if takes_rgb(run) else 1))


def decoder(run: ModelDir, palette: Palette) -> Decode:
    """The function from tokens (B, T) to a model's input: (B, T) int64 for "tokens", (B, 3, R, R) float32 for "rgb",
    the palette's colours as in `pixel_input`."""
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
    """The function from pixels (B, R, R, 3) uint8 to an RGB model's input, (B, 3, R, R) float32: colours in 0..1,
    normalised by the `mean` and `std` of red, green and blue under `preparation` in config.json, if stated."""
    stated: dict[str, Any] = run.config.get("preparation", {})
    mean, std = (torch.tensor(stated.get(k, [v] * 3), dtype=torch.float32) for k, v in (("mean", 0.0), ("std", 1.0)))

    def prepare(pixels: np.ndarray) -> torch.Tensor:
        rgb = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).float() / 255
        return ((rgb - mean) / std).permute(0, 3, 1, 2).contiguous()

    return prepare
