"""Images with masks, drawn: what a dense probe is tried on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

#: Colour of class 1, 2, 3.
COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 210]])


def draw(root: Path, n_train: int = 12, n_test: int = 5) -> Path:
    """Images of many sizes: left, right and below in the colours of three classes, noise at the top for none."""
    rng = np.random.default_rng(0)
    for folder, n in (("training", n_train), ("validation", n_test)):
        (root / "images" / folder).mkdir(parents=True)
        (root / "annotations" / folder).mkdir(parents=True)
        for i in range(n):
            H, W = rng.integers(40, 80, 2)
            mask = np.zeros((H, W), np.uint8)
            top, low, middle = H // 6, int(H * rng.uniform(0.5, 0.8)), int(W * rng.uniform(0.3, 0.7))
            mask[top:low, :middle], mask[top:low, middle:], mask[low:] = 1, 2, 3
            image = np.where(mask[..., None] > 0, COLOURS[mask.astype(int) - 1], 0)
            image = np.where(mask[..., None] == 0, rng.integers(0, 256, image.shape), image)
            image = (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / folder / f"{i:03}.jpg", quality=95)
            Image.fromarray(mask).save(root / "annotations" / folder / f"{i:03}.png")
    return root
