"""Fill missing pixels with a BERT model in rounds, the surest first.

The schedule is that of MaskGIT (Chang et al. 2022, section 3.2). The paper of iGPT draws from AR models alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from igpt_cli.device import autocast
from igpt_cli.models.igpt import IGPT
from igpt_cli.sampling.draw import SamplingParams, draw, require_finite, uniform_dtype


def left_after(n: int, rounds: int) -> list[int]:
    """How many of n missing pixels are left after each round: n cos(pi r / 2 rounds), at least one less each time.

    >>> left_after(100, 4), left_after(2, 4)
    ([92, 70, 38, 0], [1, 0])
    """
    left = [n]
    while left[-1]:
        r = len(left)
        wanted = math.floor(n * math.cos(math.pi * r / (2 * rounds))) if r < rounds else 0
        left.append(min(wanted, left[-1] - 1))
    return left[1:]


@torch.inference_mode()
def unmask(
    model: IGPT,
    tokens: Tensor,
    streams: Sequence[np.random.Generator],
    missing: Tensor,
    rounds: int,
    params: SamplingParams,
    precision: str = "float32",
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill the missing pixels of B images in at most `rounds` passes.

    Each round draws a colour for every missing pixel and keeps those to which the model gave the highest probability
    (whatever the temperature); of equal ones, the first in raster order.

    Args:
        model: with objective "bert".
        tokens: (B, T) int64; values at missing places are ignored.
        streams: the random numbers of each image, of which every round takes T.
        missing: (T,) bool, the same for all, some true.
        progress: called with the pixels placed since the last call.

    Returns:
        (B, T) int64 tokens, and (B, T) int64 the round, from 1, in which each was placed, 0 = given.

    Raises:
        NonFiniteError: the model's logits overflow.
    """
    (B, T), device = tokens.shape, model.wpe.device
    tokens, hidden = tokens.masked_fill(missing, 0).to(device), missing.expand(B, T).to(device, copy=True)
    order = torch.zeros_like(tokens)
    for r, left in enumerate(left_after(int(missing.sum()), rounds)):
        with autocast(precision, device):
            logits = model(tokens, hidden)[hidden].float()  # (B * missing, V)
        require_finite(torch.isfinite(logits).all(), precision)
        uniforms = torch.from_numpy(np.stack([stream.random(T) for stream in streams]))
        drawn = draw(logits, uniforms.to(device, uniform_dtype(device))[hidden], params)
        sure = logits.softmax(-1).gather(-1, drawn[:, None]).view(B, -1)  # every row has as many missing
        best = sure.argsort(dim=1, descending=True, stable=True)[:, : sure.shape[1] - left]
        places = hidden.nonzero()[:, 1].view(B, -1).gather(1, best)
        tokens.scatter_(1, places, drawn.view(B, -1).gather(1, best))
        hidden.scatter_(1, places, False)
        order.scatter_(1, places, r + 1)
        progress(best.numel())
    return tokens.cpu().numpy(), order.cpu().numpy()
