"""Features of frozen models, read through the model contract alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from igpt_cli.device import autocast


@torch.inference_mode()
def extract(
    model: torch.nn.Module,
    tokens: np.ndarray,
    layers: Sequence[int],
    *,
    pool: str = "mean",
    batch_size: int = 16,
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, np.ndarray]:
    """Features of every image at every layer asked for; one forward pass serves all of them.

    Args:
        model: anything with `features(x, layers, pool)`; it is put in evaluation mode and not changed otherwise.
        tokens: (N, T) integer palette indices.
        layers: which of 0..model.n_layers.
        pool: how positions become one vector, "mean" as in the paper.
        progress: called with (images done, N).

    Returns:
        {layer: (N, D) float32}.

    Raises:
        ValueError: a layer that the model does not have.
    """
    model.eval()
    device = next(model.parameters()).device
    out: dict[int, list[np.ndarray]] = {layer: [] for layer in sorted(set(layers))}
    for start in range(0, len(tokens), batch_size):
        batch = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64)).to(device)
        with autocast(precision, device):
            found = model.features(batch, layers, pool=pool)
        for layer, values in found.items():
            out[layer].append(values.float().cpu().numpy())
        if progress:
            progress(min(start + batch_size, len(tokens)), len(tokens))
    return {layer: np.concatenate(parts) for layer, parts in out.items()}
