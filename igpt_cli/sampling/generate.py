"""Samples and completions of a model of either objective.

    >>> run = load_model("builtin:igpt-tiny")
    >>> drawn = sample(run, 16, seed=1)
    >>> run.palette.dequantize(drawn.tokens).reshape(-1, 32, 32, 3)

Shapes: n images, T = R * R pixels, k completions of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from igpt_cli.device import choose_precision, out_of_memory
from igpt_cli.errors import InputError
from igpt_cli.model_dir import ModelDir, check_predicts_pixels
from igpt_cli.sampling.decoder import Decoder
from igpt_cli.sampling.draw import SamplingParams, stream
from igpt_cli.sampling.missing import raster_prefix
from igpt_cli.sampling.unmask import unmask

Progress = Callable[[int, int], None]

#: Passes in which a BERT model fills what is missing.
ROUNDS = 32
#: Images drawn at a time on a GPU, and on a CPU, where more bring little.
GPU_IMAGES, CPU_IMAGES = 64, 32
#: A BERT model looks at whole images, which fill a device one at a time; so none depends on how many there are.
BERT_IMAGES = 1
#: Bytes of a CPU's memory that keys and values may take.
CPU_CACHE = 4 * 2**30


@dataclass(frozen=True)
class Drawn:
    """Images as tokens.

    Attributes:
        tokens: (n, T) uint16; completions (n, k, T).
        order: int32, as tokens: when each pixel was drawn, its place in the raster (AR) or its round (BERT) from 1; 0 =
            given.
        rounds: of a BERT model; None for AR.
    """

    tokens: np.ndarray
    order: np.ndarray
    objective: str
    precision: str
    device: str
    batch_size: int
    rounds: int | None


def sample(
    run: ModelDir,
    n: int,
    *,
    seed: int = 0,
    first: int = 0,
    params: SamplingParams | None = None,
    rounds: int | None = None,
    precision: str = "float32",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Drawn:
    """Draw n images. Image i has the random stream of (seed, first + i), so it is the same however many are drawn.

    (On a GPU another `batch_size` rounds otherwise, which in float32 changes an image in a thousand, in bfloat16 most.)

    Args:
        first: number of the first image.
        params: temperature, top_k, top_p; default the model's own probabilities.
        rounds: for BERT, passes in which an image is filled; default 32.
        precision: "float32", "bfloat16" or "auto".
        batch_size: images at a time; default what suits the device and its memory.
        progress: called with (pixels drawn, pixels in all).

    Raises:
        InputError: a value out of range.
        NonFiniteError: the model's logits overflow.
        MemoryError: the images at a time do not fit on the device.
    """
    if n < 1:
        raise InputError(f"n is {n}; at least 1 image has to be drawn")
    resolution = run.config["model"]["resolution"]
    blank, missing = np.zeros((n, resolution**2), np.uint16), np.ones((resolution, resolution), bool)
    streams = [(first + i, 0) for i in range(n)]
    return _generate(run, blank, missing, streams, seed, params, rounds, precision, batch_size, progress)


def complete(
    run: ModelDir,
    tokens: np.ndarray,
    missing: np.ndarray,
    k: int = 1,
    *,
    seed: int = 0,
    params: SamplingParams | None = None,
    rounds: int | None = None,
    precision: str = "float32",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Drawn:
    """Draw the missing pixels of images k times each. Completion j of image i has the stream of (seed, i, j).

    An AR model completes images whose beginning in raster order is given, a BERT model any part.

    Args:
        tokens: (n, T) integers; values at missing places are ignored.
        missing: (R, R) bool, the same part of all images.
        others: as for `sample`.

    Raises:
        InputError: a value out of range; nothing is missing; or an AR model is given what it cannot see.
        NonFiniteError, MemoryError: as for `sample`.
    """
    if k < 1:
        raise InputError(f"k is {k}; at least 1 completion has to be drawn")
    tokens, missing, T = np.asarray(tokens), np.asarray(missing, bool), run.config["model"]["resolution"] ** 2
    if tokens.ndim != 2 or tokens.shape[1] != T or missing.size != T:
        raise InputError(f"tokens {tokens.shape} and missing {missing.shape} do not fit images of {T:,} pixels")
    if not len(tokens) or not missing.any():
        raise InputError("there is nothing to complete: no image, or no pixel is missing")
    given, n_vocab = tokens[:, ~missing.reshape(-1)], run.own_palette.n_vocab
    if tokens.dtype.kind not in "iu" or (given.size and not 0 <= given.min() <= given.max() < n_vocab):
        raise InputError(f"tokens have to be whole numbers from 0 to {n_vocab - 1}, colours of the model's palette")
    streams = [(i, j) for i in range(len(tokens)) for j in range(k)]
    drawn = _generate(
        run, tokens.repeat(k, axis=0), missing, streams, seed, params, rounds, precision, batch_size, progress
    )
    shape = (len(tokens), k, T)
    return Drawn(**{**vars(drawn), "tokens": drawn.tokens.reshape(shape), "order": drawn.order.reshape(shape)})


def _generate(
    run: ModelDir,
    tokens: np.ndarray,
    missing: np.ndarray,
    streams: list[tuple[int, int]],
    seed: int,
    params: SamplingParams | None,
    rounds: int | None,
    precision: str,
    batch_size: int | None,
    progress: Progress | None,
) -> Drawn:
    """Both: (n, T) tokens, of which those at `missing` (R, R) are drawn with the streams (image, copy) of the seed."""
    check_predicts_pixels(run)
    model: Any = run.model
    objective, device = run.config["model"].get("objective", "ar"), next(model.parameters()).device
    precision, params, n = choose_precision(precision, device), params or SamplingParams(), len(tokens)
    if not 0 <= seed < 2**64:
        raise InputError(f"the seed is {seed}; it must be a whole number from 0 to 2^64 - 1")
    if not 0 <= streams[0][0] <= streams[-1][0] < 2**64:
        raise InputError(f"images {streams[0][0]} to {streams[-1][0]} are asked for; their numbers are 0 to 2^64 - 1")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; it must be at least 1")
    size = batch_size or images_at_a_time(run, precision)
    drawn, order, done, total = tokens.astype(np.uint16), np.zeros(tokens.shape, np.int32), 0, n * int(missing.sum())

    def report(pixels: int) -> None:
        nonlocal done
        done += pixels
        if progress:
            progress(done, total)

    try:
        if objective == "bert":
            rounds = _rounds(rounds)
            hidden = torch.from_numpy(missing.reshape(-1))
            fill = partial(unmask, model, missing=hidden, rounds=rounds, params=params, precision=precision)
        else:
            given = _given(run, missing, rounds)
            # On a GPU there are always as many rows, since another batch rounds otherwise.
            decoder = Decoder(model, min(size, n) if device.type == "cpu" else size, precision, params)
            fill = partial(decoder.fill, given=given)
        for start in range(0, n, size):
            batch = slice(start, start + size)
            images = torch.from_numpy(tokens[batch].astype(np.int64))
            numbers = [stream(seed, image, copy) for image, copy in streams[batch]]
            drawn[batch], order[batch] = fill(tokens=images, streams=numbers, progress=report)
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        raise MemoryError(f"{size} images at a time do not fit on {device}; give a lower --batch-size") from e
    return Drawn(drawn, order, objective, precision, str(device), size, rounds)


def _rounds(rounds: int | None) -> int:
    """In how many rounds a BERT model fills what is missing."""
    if rounds is not None and rounds < 1:
        raise InputError(f"rounds is {rounds}; it must be at least 1")
    return rounds or ROUNDS


def _given(run: ModelDir, missing: np.ndarray, rounds: int | None) -> int:
    """How many pixels are given to an AR model, which can go on from the beginning of an image only."""
    if rounds is not None:
        raise InputError(f"rounds are for BERT models; {run.run} is autoregressive and draws one pixel after the other")
    given = raster_prefix(missing)
    if given is None:
        raise InputError(
            f"{run.run} is autoregressive: it sees only what lies before a pixel in raster order, so the beginning "
            "of the image must be kept and nothing behind it (--keep); a BERT model completes any part"
        )
    return given


def images_at_a_time(run: ModelDir, precision: str) -> int:
    """How many images are drawn at once where nobody says: what suits the device, and what its memory holds.

    It is the same for any number of images, since on a GPU another batch rounds otherwise.
    """
    check_predicts_pixels(run)
    model, weight = run.config["model"], next(run.model.parameters())
    on_cpu, bytes_each = weight.device.type == "cpu", 2 if precision == "bfloat16" else 4
    if model.get("objective") == "bert":
        return BERT_IMAGES
    keys_and_values = 2 * model["n_layer"] * model["n_embd"] * model["resolution"] ** 2 * bytes_each
    memory = CPU_CACHE
    if weight.device.type == "cuda":
        # What the weights take a second time, in their precision, and a quarter for everything else.
        memory = int(torch.cuda.mem_get_info(weight.device)[0] * 0.75) - bytes_each * sum(
            p.numel() for p in run.model.parameters()
        )
    return max(1, min(CPU_IMAGES if on_cpu else GPU_IMAGES, memory // keys_and_values))
