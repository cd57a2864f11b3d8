"""Draw tokens from logits, with a random stream for each image.

A token is where the running sum of the probabilities passes a number drawn from [0, 1). That number depends on the
seed, the image and the place alone, so an image does not change with the others that are drawn beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_cli.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class SamplingParams:
    """How logits become probabilities; by default the model's own, as in the paper.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest colour.
        top_k, top_p: draw only from so many of the likeliest colours, or from those that reach this probability; None:
            all.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it must be at least 0, and 1 changes nothing")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1; left out, all colours can be drawn")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1; left out, all can be drawn")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def draw(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """Draw a token for each row: the smallest whose cumulative probability exceeds the row's uniform number.

    Sums are in the precision of `uniforms`, so that rounding does not draw a colour of probability 0.

    Args:
        logits: (B, V), finite.
        uniforms: (B,) float64 in [0, 1); float32 on a device that has no more.

    Returns:
        (B,) int64.
    """
    if params.temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(uniforms.dtype)
    if params.temperature != 1:  # the highest is made 0, so that nothing overflows however low the temperature is
        logits = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    logits = _truncated(logits, params)
    sums = logits.softmax(-1).cumsum(-1)  # (B, V)
    total = sums[:, -1]
    below = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, below[:, None], right=True).squeeze(-1)


def _truncated(logits: Tensor, params: SamplingParams) -> Tensor:
    """(B, V), -inf for the tokens that top_k and top_p exclude; of equal ones the first stay."""
    if params.top_k is None and params.top_p is None:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if params.top_k is not None:
        ranked[:, params.top_k :] = -torch.inf
    if params.top_p is not None:
        p = ranked.softmax(-1)
        # The likelier ones before it reach top_p already. Never true for the likeliest, before which there is nothing.
        ranked = ranked.masked_fill(p.cumsum(-1) - p >= params.top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def stream(seed: int, image: int, copy: int) -> np.random.Generator:
    """The random numbers of one image, from whole numbers in 0..2^64 - 1.

    `image` counts all images drawn with the seed; `copy` is which of its completions it is, 0 for a sample.
    """
    # A counter-based generator: streams of other images begin 2^128 and more numbers away, those of other seeds have
    # another key. The type is said, for NumPy takes a list with a number from 2^63 on for floats.
    return np.random.Generator(np.random.Philox(key=seed, counter=np.array([0, 0, copy, image], np.uint64)))


def uniform_dtype(device: torch.device) -> torch.dtype:
    """float64; Apple's GPUs have no more than float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def require_finite(finite: bool | Tensor, precision: str) -> None:
    """Raises NonFiniteError if some logits, computed in this precision, are not finite."""
    if not finite:
        hint = "" if precision == "float32" else "; try --precision float32"
        raise NonFiniteError(f"the model's logits are NaN or infinite: its weights overflow{hint}")
