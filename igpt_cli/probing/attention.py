"""Attention maps and distances, read through the model contract.

Shapes: I images, T = R * R tokens of an image, H heads, n x n the grid that a layer's attention works on, of which a
place is R / n pixels wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch

from igpt_cli.errors import InputError
from igpt_cli.model_dir import ModelDir
from igpt_cli.model_input import Decode
from igpt_cli.probing.features import model_device

#: Probabilities of one image held at a time take about so many bytes, or those of one layer if they take more.
BYTES_AT_ONCE = 2**28


@dataclass(frozen=True)
class Looks:
    """What one place of a layer's grid attends to.

    query: (row, column) on the grid. maps: (I, H, n, n) float32, the probability of each place. elsewhere: (I, H)
    float32, the rest, which a class token or sos takes.
    """

    query: tuple[int, int]
    maps: np.ndarray
    elsewhere: np.ndarray


def attention_maps(
    run: ModelDir,
    tokens: np.ndarray,
    layers: Sequence[int] | None = None,
    *,
    pixel: tuple[int, int] | None = None,
    decode: Decode | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Looks]:
    """Where one pixel of each image attends, in every head of the layers.

    Args:
        tokens: (I, T) integer palette indices.
        layers: which of those with attention; None for all.
        pixel: (row, column) in the image, from 0; None for the middle. Where a grid is coarser, its place there.
        decode: what makes the model's input of tokens, see `model_input.inputs_of`; default the tokens themselves.
        progress: called with (images done, I).

    Raises:
        InputError: the model has no attention, or not in one of the layers; the pixel is outside the image.
    """
    wanted, R = attention_layers(run, layers), run.config["model"]["resolution"]
    row, column = pixel or (R // 2, R // 2)
    if not (0 <= row < R and 0 <= column < R):
        raise InputError(f"the pixel {row},{column} is outside the image; rows and columns go from 0 to {R - 1}")
    queries: dict[int, tuple[int, int]] = {}
    maps: dict[int, list[np.ndarray]] = {layer: [] for layer in wanted}
    elsewhere: dict[int, list[np.ndarray]] = {layer: [] for layer in wanted}
    for layer, p in _probabilities(run, tokens, wanted, decode, progress):
        n = isqrt(p.shape[-2])
        queries[layer] = row * n // R, column * n // R
        seen = on_grid(p)[0, :, queries[layer][0] * n + queries[layer][1]].float()  # (H, n * n)
        maps[layer].append(seen.unflatten(1, (n, n)).cpu().numpy())
        elsewhere[layer].append((1 - seen.sum(1)).clamp(min=0).cpu().numpy())
    return {layer: Looks(queries[layer], np.stack(maps[layer]), np.stack(elsewhere[layer])) for layer in wanted}


def attention_distance(
    run: ModelDir,
    tokens: np.ndarray,
    layers: Sequence[int] | None = None,
    *,
    decode: Decode | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, np.ndarray]:
    """Mean attention distance of each head in pixels: {layer: (H,) float64} (Dosovitskiy et al. 2021, figure 7).

    The distance between the middles of query and key, weighted by attention, over all places of all images, without
    class tokens and sos. Arguments and errors as for `attention_maps`.
    """
    wanted, R = attention_layers(run, layers), run.config["model"]["resolution"]
    sums: dict[int, Any] = dict.fromkeys(wanted, 0.0)
    masses: dict[int, Any] = dict.fromkeys(wanted, 0.0)
    between: dict[int, torch.Tensor] = {}
    for layer, p in _probabilities(run, tokens, wanted, decode, progress):
        n = isqrt(p.shape[-2])
        if n not in between:
            between[n] = distances(n).to(p.device) * (R / n)
        p = on_grid(p)[0]
        # Over keys in the model's precision, then over queries in double: there are up to ten million of them.
        sums[layer] += (p * between[n]).sum(-1).double().sum(-1)
        masses[layer] += p.sum(-1).double().sum(-1)
    return {layer: (sums[layer] / masses[layer]).cpu().numpy() for layer in wanted}


def attention_layers(run: ModelDir, layers: Sequence[int] | None = None) -> list[int]:
    """The layers in rising order; None means all that have attention. Raises InputError for layers without."""
    model: Any = run.model
    if not hasattr(model, "attention"):
        raise InputError(f"{run.name} is a model whose attention cannot be shown: it has none, or does not give it")
    known = list(getattr(model, "attention_layers", range(model.n_layers)))
    wanted = known if layers is None else sorted(set(layers))
    outside = [layer for layer in wanted if layer not in known]
    if outside or not wanted:
        asked = ", ".join(map(str, outside)) or "none"
        names = f"0 to {known[-1]}" if known == list(range(len(known))) else ", ".join(map(str, known))
        raise InputError(f"layer {asked} asked for; the layers of {run.name} that have attention: {names}")
    return wanted


def on_grid(p: torch.Tensor) -> torch.Tensor:
    """(..., T', S) as `attention` gives it -> (..., n * n, n * n), without class tokens, distillation token, sos.

    These come first, and are fewer than would make the grid larger by one.
    """
    queries, keys = (isqrt(size) ** 2 for size in p.shape[-2:])
    return p[..., -queries:, -keys:]


def distances(n: int) -> torch.Tensor:
    """(n * n, n * n) float32: between the places of an n x n grid, in places.

    >>> distances(2)[0].tolist()
    [0.0, 1.0, 1.0, 1.4142135381698608]
    """
    at = torch.arange(n, dtype=torch.float32)
    places = torch.cartesian_prod(at, at)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


@torch.inference_mode()
def _probabilities(
    run: ModelDir,
    tokens: np.ndarray,
    layers: list[int],
    decode: Decode | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(layer, probabilities (1, H, T', S) of one image), image by image; as many layers in one pass as memory holds."""
    model: Any = run.model.eval()
    at_once = 0
    for i in range(len(tokens)):
        batch = np.asarray(tokens[i : i + 1])
        x = decode(batch) if decode else torch.from_numpy(batch.astype(np.int64))
        x = x.to(model_device(model))
        if not at_once:
            first = model.attention(x, layers[:1])[layers[0]]
            at_once = max(1, BYTES_AT_ONCE // (first.numel() * first.element_size()))
            del first
        for start in range(0, len(layers), at_once):
            yield from model.attention(x, layers[start : start + at_once]).items()
        if progress:
            progress(i + 1, len(tokens))
