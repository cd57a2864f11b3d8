"""The model contract (docs/architecture.md): checks of sizes, layers, class head; logits and features."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides an architecture; a family's sizes are the fields of its subclass."""

    def check_whole(self, *names: str) -> None:
        """
        Raises:
            ValueError: a field, or a number in one that is a tuple, is no whole number of at least 1.
        """
        for name in names:
            value = getattr(self, name)
            parts = {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
            for part, number in parts.items():
                if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                    raise ValueError(f"{part} is {number!r}, expected a whole number of at least 1")

    def check_one_of(self, name: str, known: Collection[str]) -> None:
        """
        Raises:
            ValueError: a field is none of the `known` values.
        """
        if getattr(self, name) not in known:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")

    def check_classes(self) -> None:
        """
        Raises:
            ValueError: n_classes is neither None nor a whole number of at least 2.
        """
        n: Any = getattr(self, "n_classes", None)
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 2):
            raise ValueError(f"n_classes is {n!r}, expected a whole number of at least 2")

    def to_dict(self) -> dict:
        """The fields as plain data, as `config.json` stores them, without those that are None."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


class RGBModel(nn.Module):
    """A model of RGB images. Its own file has `pooled`, `inputs` and `normed`; logits and features are made of them."""

    input_kind = "rgb"
    config: Any
    head: Any

    @property
    def n_layers(self) -> int:
        """L. Features exist for the layers 0..L: the input of block l as `normed` gives it, and the output at L."""
        raise NotImplementedError

    def pooled(self, x: Tensor) -> Tensor:
        """What the class head reads: (B, 3, R, R) float -> (B, D)."""
        raise NotImplementedError

    def inputs(self, x: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(layer, what enters this block) for the layers in rising order; for L, what leaves the last block."""
        raise NotImplementedError

    def normed(self, layer: int, h: Tensor) -> Tensor:
        """The features of every position, (B, T, D) in raster order, from what enters block `layer`."""
        raise NotImplementedError

    def require_head(self) -> None:
        """
        Raises:
            ValueError: the model has no class head.
        """
        if not self.config.n_classes:
            raise ValueError("this model has no class head: n_classes is not given; its features can be had")

    def forward(self, x: Tensor) -> Tensor:
        """Class logits: (B, 3, R, R) float -> (B, C).

        Raises:
            ValueError: the model has no class head.
        """
        self.require_head()
        return self.head(self.pooled(x))

    def features(self, x: Tensor, layers: Iterable[int], pool: str = "mean") -> dict[int, Tensor]:
        """Features for a linear probe, from one pass that stops after the deepest requested layer.

        Args:
            x: (B, 3, R, R) float.
            layers: which of 0..L; `normed` says what they are.
            pool: "mean" or "max" over positions, "quadrants" (B, 4 D), or "none" for (B, T, D) in raster order.

        Returns:
            {layer: (B, D)}, in rising order of layer; D may grow with the layers.

        Raises:
            ValueError: a layer outside 0..L, or an unknown `pool`.
        """
        requested = check_features(layers, self.n_layers, pool)
        return {layer: POOLS[pool](self.normed(layer, h)) for layer, h in self.inputs(x, requested)}


def block_inputs(h: Tensor, blocks: Any, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(layer, what enters this block) for the layers in rising order; for L, what leaves the last block.

    Args:
        h: what enters block 0; no block after the deepest layer is computed.
    """
    for layer in range(layers[-1] + 1 if layers else 0):
        if layer in layers:
            yield layer, h
        if layer < layers[-1]:
            h = blocks[layer](h)


def quadrants(n: Tensor) -> Tensor:
    """(B, T, D) -> (B, 4 D): the mean over each quarter of the square image, as Coates and Ng pool patches.

    Raises:
        ValueError: T is not a square.
    """
    B, T, D = n.shape
    side = math.isqrt(T)
    if side**2 != T:
        raise ValueError(f"pool is 'quadrants', and {T} positions are not a square image; take mean")
    return adaptive_avg_pool2d(n.transpose(1, 2).reshape(B, D, side, side), 2).flatten(1)


#: (B, T, D) -> (B, D) or (B, 4 D), or unchanged for "none".
POOLS = {
    "mean": lambda n: n.mean(dim=1),
    "quadrants": quadrants,
    "max": lambda n: n.amax(dim=1),
    "last": lambda n: n[:, -1],
    "none": lambda n: n,
}


def check_features(layers: Iterable[int], n_layers: int, pool: str, last: bool = False) -> list[int]:
    """The requested layers, in rising order.

    Args:
        last: whether the model has a position that "last" would take: the last pixel, or a class token.

    Raises:
        ValueError: a layer outside 0..n_layers, an unknown pool, or "last" where there is none.
    """
    requested = sorted(set(layers))
    if requested and not 0 <= requested[0] <= requested[-1] <= n_layers:
        raise ValueError(f"layers {requested} requested, this model has the layers 0 to {n_layers}")
    if pool == "last" and not last:
        raise ValueError("pool is 'last', the class token, and this model has none; take mean or max")
    if pool not in POOLS:
        known = [name for name in POOLS if last or name != "last"]
        raise ValueError(f"pool is {pool!r}, expected one of {', '.join(known)}")
    return requested


def check_attention(layers: Iterable[int], n_layers: int) -> list[int]:
    """The blocks whose attention is requested, in rising order.

    Raises:
        ValueError: one outside 0..n_layers - 1.
    """
    requested = sorted(set(layers))
    if requested and not 0 <= requested[0] <= requested[-1] < n_layers:
        raise ValueError(f"layers {requested} requested; attention is in the layers 0 to {n_layers - 1}")
    return requested
