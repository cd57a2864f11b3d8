"""Features of frozen models: any layers from one forward pass.

Shapes: N images, B of them in a batch, T = R * R tokens of an image, M masks of an image, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from igpt_cli.device import autocast, free_memory
from igpt_cli.errors import IgptError, InputError, NonFiniteError
from igpt_cli.files import sha256_of
from igpt_cli.model_input import Decode, as_tokens
from igpt_cli.probing.layers import Layer, in_order, place, recorded
from igpt_cli.tokens.loader import MASK_PROB, fixed_mask

#: How positions become one vector, or one for each quarter of the image; "none" keeps them all.
POOLS = ("mean", "quadrants", "max", "last", "none")
#: Tokens computed at a time when no batch size is given; a CPU's caches hold less, a GPU needs more to be kept busy.
CPU_TOKENS, GPU_TOKENS = 4096, 65_536
#: Features of one batch take at most so many bytes when no batch size is given.
BATCH_BYTES = 2**28

#: {layer: (B, ...) float32}
Batch = dict[Layer, np.ndarray]


@dataclass(frozen=True)
class Masking:
    """BERT's masks, `n_masks` of each image. A mask depends on (seed, row, draw) alone, not on the batch."""

    n_masks: int = 1
    prob: float = MASK_PROB
    seed: int = 0

    def masks(self, rows: np.ndarray, n_ctx: int, draw: int) -> np.ndarray:
        """(B, n_ctx) bool, true where the pixel is hidden; `rows` (B,) are the images' rows in their split."""
        return fixed_mask(rows, n_ctx, self.prob, self.seed, draw)


def extract(
    model: torch.nn.Module,
    tokens: np.ndarray,
    layers: Sequence[Layer],
    *,
    pool: str = "mean",
    batch_size: int | None = 16,
    precision: str = "float32",
    masking: Masking | None = None,
    decode: Decode | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Layer, np.ndarray]:
    """Features of every image at every layer, in memory; `store.extract_features` streams them to a file.

    Args:
        model: anything with `features(x, layers, pool)`; it is put in evaluation mode and must not change.
        tokens: (N, T) integer palette indices.
        layers: which of 0..model.n_layers, or sites within blocks such as "2.mlp" (see `layers`).
        pool: how positions become one vector, "mean" as in the paper (section 2.4).
        batch_size: images at a time; None for as many as suit the device. It changes no result but by rounding.
        precision: "float32" or "bfloat16"; means and results are float32 either way.
        masking: for BERT models; a row's place is its index in `tokens`.
        decode: what makes the model's input of (B, T) tokens, see `model_input.decoder`; default the tokens themselves.
        progress: called with (images done, N).

    Returns:
        {layer: (N, D) float32}, with masking (M, N, D); with pool "none" (..., T, D).

    Raises:
        ValueError: a layer that the model does not have, or an unknown pool.
        InputError: the features do not fit in memory. NonFiniteError: a feature is NaN or infinite.
        IgptError: the model's weights changed meanwhile.
    """
    layers, rows = in_order(layers), np.arange(len(tokens))
    guard = Frozen(model)
    shapes = feature_shapes(model, tokens, layers, pool, precision, decode)
    head = (masking.n_masks,) if masking else ()
    _check_memory(shapes, len(tokens) * (masking.n_masks if masking else 1), f"of {len(tokens):,} images")
    out = {layer: np.empty((*head, len(tokens), *shapes[layer]), np.float32) for layer in layers}
    size = images_at_once(batch_size, tokens.shape[1], shapes, model_device(model))
    for at, draw, found in batches(
        model, tokens, rows, layers, size, pool=pool, precision=precision, masking=masking, decode=decode
    ):
        for layer, values in found.items():
            (out[layer][draw] if masking else out[layer])[at] = values
        if progress and draw == (masking.n_masks if masking else 1) - 1:
            progress(at.stop, len(tokens))
    guard.check()
    return out


def batches(
    model: torch.nn.Module,
    tokens: np.ndarray,
    rows: np.ndarray,
    layers: Sequence[Layer],
    batch_size: int,
    *,
    pool: str = "mean",
    precision: str = "float32",
    masking: Masking | None = None,
    decode: Decode | None = None,
    first: int = 0,
) -> Iterator[tuple[slice, int, Batch]]:
    """Yield (part of `rows`, draw, {layer: (B, ...) float32}), for each batch all its masks.

    While a batch is used here, a GPU computes the next one.

    Args:
        tokens: (N, T) integers, or (N, R, R, 3) uint8 pixels, as `model_input.inputs_of` gives them with `decode`.
        rows: (n,) the rows to read.
        first: the place in `rows` at which to start.

    Raises:
        MemoryError: a batch does not fit on the device.
        NonFiniteError: a feature is NaN or infinite; row and layer are named.
    """
    waiting = None
    for start in range(first, len(rows), batch_size):
        at = slice(start, min(start + batch_size, len(rows)))
        batch = np.asarray(tokens[rows[at]])
        x = (decode or as_tokens)(batch)
        for draw in range(masking.n_masks if masking else 1):
            mask = torch.from_numpy(masking.masks(rows[at], tokens.shape[1], draw)) if masking else None
            started = at, draw, _copied(_forward(model, x, layers, pool, precision, mask))
            if waiting:
                yield _arrived(*waiting, rows, precision)
            waiting = started
    if waiting:
        yield _arrived(*waiting, rows, precision)


@torch.inference_mode()
def _forward(model: Any, x: torch.Tensor, layers, pool: str, precision: str, mask: torch.Tensor | None) -> dict:
    device = model_device(model)
    hidden = {} if mask is None else {"mask": mask.to(device, non_blocking=True)}
    # A block with a site has run when the next layer is reached.
    numbers = {layer if isinstance(layer, int) else place(layer)[0] + 1 for layer in layers}
    try:
        with autocast(precision, device), recorded(model, layers, pool) as inside:
            found = model.features(x.to(device, non_blocking=True), sorted(numbers), pool=pool, **hidden)
        return {layer: (inside if layer in inside else found)[layer].float() for layer in in_order(layers)}
    except torch.OutOfMemoryError as e:
        raise MemoryError(f"{len(x)} images at a time do not fit on {device}; give a lower --batch-size") from e


def _copied(found: dict[Layer, torch.Tensor]) -> Callable[[], Batch]:
    """Begin to copy features to the CPU's memory, all layers of one shape at once; the result waits for them."""
    alike: dict[torch.Size, list[Layer]] = {}
    for layer, values in found.items():
        alike.setdefault(values.shape, []).append(layer)
    on_gpu = any(values.is_cuda for values in found.values())
    if not on_gpu:
        return lambda: {layer: values.cpu().numpy() for layer, values in found.items()}
    device = next(iter(found.values())).device
    copies = [(ls, torch.stack([found[k] for k in ls]).to("cpu", non_blocking=True)) for ls in alike.values()]
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(device))

    def wait() -> Batch:
        there.synchronize()
        return {layer: stack[i].numpy() for ls, stack in copies for i, layer in enumerate(ls)}

    return wait


def _arrived(
    at: slice, draw: int, wait: Callable[[], Batch], rows: np.ndarray, precision: str
) -> tuple[slice, int, Batch]:
    found = wait()
    for layer, values in found.items():
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0])
            raise NonFiniteError(
                f"the features of row {rows[at][bad]} at layer {layer} hold NaN or infinity: the weights overflow in "
                f"{precision}" + ("; try --precision float32" if precision != "float32" else "")
            )
    return at, draw, found


def feature_shapes(
    model: torch.nn.Module,
    tokens: np.ndarray,
    layers: Sequence[Layer],
    pool: str,
    precision: str,
    decode: Decode | None,
) -> dict[Layer, tuple[int, ...]]:
    """{layer: shape of one image's features}, found by computing those of the first image."""
    found = _forward(model, (decode or as_tokens)(np.asarray(tokens[:1])), layers, pool, precision, None)
    return {layer: tuple(values.shape[1:]) for layer, values in found.items()}


def images_at_once(asked: int | None, n_ctx: int, shapes: Mapping[Layer, tuple[int, ...]], device: torch.device) -> int:
    """The requested batch size, or what suits the device. Raises InputError below 1, or if a batch does not fit in
    memory.
    """
    if asked is not None:
        if asked < 1:
            raise InputError(f"the batch size is {asked}; it must be at least 1")
        _check_memory(shapes, asked, f"of {asked:,} images, one batch")
        return asked
    suits = (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS) // n_ctx
    return max(1, min(suits, BATCH_BYTES // bytes_of(shapes)))


def bytes_of(shapes: Mapping[Layer, tuple[int, ...]]) -> int:
    """Bytes of one image's features at all layers."""
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


def _check_memory(shapes: Mapping[Layer, tuple[int, ...]], images: int, what: str) -> None:
    needed, free = images * bytes_of(shapes), free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise InputError(
            f"the features {what}, at {len(shapes)} layers take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of "
            f"memory are free; use the pool mean, fewer layers or fewer images"
        )


def model_device(model: torch.nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def fingerprints(model: torch.nn.Module) -> dict[str, str]:
    """{tensor of the state dict: SHA-256 of its dtype, shape and values}, wherever the model is."""
    out = {}
    for name, tensor in model.state_dict().items():
        t = tensor.detach().cpu().contiguous()
        what = f"{t.dtype} {tuple(t.shape)} ".encode()
        out[name] = sha256_of(what, memoryview(t.reshape(-1).view(torch.uint8).numpy()))
    return out


class Frozen:
    """A model in evaluation mode whose weights must not change; sha256 is of its state dict: names, types, shapes,
    values.
    """

    def __init__(self, model: torch.nn.Module, name: str = "the model"):
        self.model, self.name = model.eval(), name
        self._before = fingerprints(model)
        self.sha256 = sha256_of("".join(f"{k} {self._before[k]}\n" for k in sorted(self._before)).encode())

    def check(self) -> None:
        """Raises IgptError, naming it, if a tensor of the state dict has changed."""
        after = fingerprints(self.model)
        changed = [k for k in self._before if after.get(k) != self._before[k]]
        if changed:
            raise IgptError(
                f"{self.name} changed while its features were taken: {changed[0]} is not what it was "
                f"({len(changed)} of {len(after)} tensors); they are not those of a frozen model and are thrown away"
            )
