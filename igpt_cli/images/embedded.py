"""The embedded images: coloured handwritten digits that need no network and no files.

scikit-learn ships 1,797 handwritten digits of 8x8 grey values and two photographs. Each digit is enlarged
smoothly to the model resolution and drawn several times, each time in two colours (stroke and ground) that
are pixels of the photographs. Either colour may be the lighter, so that raw pixels tell little about the digit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from igpt_cli.errors import OutputError
from igpt_cli.files import check_output, reason

#: The least difference of luma (0..255) between stroke and ground.
LEAST_CONTRAST = 64.0
#: One original digit in five is kept for testing, with all its colourings.
TEST_PART = 0.2
#: How often each digit is drawn.
COLOURINGS = 8

#: Rec. 601 luma of an RGB pixel, the usual measure of how light it looks.
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class EmbeddedSplit:
    """One split: `images` (N, R, R, 3) uint8, `labels` (N,) int32 in 0..9, `names` such as "train/3/0042-1.png"."""

    images: np.ndarray
    labels: np.ndarray
    names: list[str]


def embedded_images(resolution: int = 32, colourings: int = COLOURINGS, seed: int = 0) -> dict[str, EmbeddedSplit]:
    """Draw the embedded images.

    Args:
        resolution: side R of the images in pixels.
        colourings: how many images are drawn of each digit.
        seed: decides the split of the digits and their colours.

    Returns:
        {"train": ..., "test": ...}; all colourings of one original digit are in the same split. Within a split
        the images are shuffled, so that any first part of it is a fair sample.
    """
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    colours = np.concatenate([photo.reshape(-1, 3) for photo in load_sample_images().images])
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(digits.images))
    n_test = round(TEST_PART * len(shuffled))
    stroke = np.stack([_enlarge(image / 16.0, resolution) for image in digits.images])  # (1797, R, R) in [0, 1]
    out = {}
    for split, originals in (("train", shuffled[n_test:]), ("test", shuffled[:n_test])):
        order = rng.permutation(len(originals) * colourings)
        which, drawing = originals[order // colourings], order % colourings
        a, b = _colour_pairs(colours, len(order), rng)
        images = np.empty((len(order), resolution, resolution, 3), np.uint8)
        for i, digit in enumerate(which):
            images[i] = np.rint(b[i] + stroke[digit][..., None] * (a[i] - b[i]))
        labels = digits.target[which].astype(np.int32)
        names = [f"{split}/{label}/{digit:04d}-{k}.png" for label, digit, k in zip(labels, which, drawing, strict=True)]
        out[split] = EmbeddedSplit(images, labels, names)
    return out


def _enlarge(digit: np.ndarray, resolution: int) -> np.ndarray:
    """(8, 8) float in [0, 1] -> (R, R) float32 in [0, 1], bicubic."""
    side = (resolution, resolution)
    enlarged = Image.fromarray(digit.astype(np.float32)).resize(side, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(enlarged), 0, 1)


def _colour_pairs(colours: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two (n, 3) float arrays of colours whose lumas differ by at least `LEAST_CONTRAST`, row by row."""
    pairs = np.empty((0, 2, 3))
    while len(pairs) < n:
        drawn = colours[rng.integers(len(colours), size=(2 * n, 2))].astype(float)  # (2n, 2, 3)
        contrast = np.abs((drawn @ LUMA)[:, 0] - (drawn @ LUMA)[:, 1])
        pairs = np.concatenate((pairs, drawn[contrast >= LEAST_CONTRAST]))
    return pairs[:n, 0], pairs[:n, 1]


def write_embedded(
    folder: Path,
    resolution: int = 32,
    colourings: int = COLOURINGS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the embedded images as `folder`/train/<digit>/*.png and `folder`/test/<digit>/*.png.

    The folder appears when it is complete. Returns the number of images.

    Raises:
        OutputError: it exists already, or cannot be written.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already; choose another --out")
    check_output(folder)
    splits = embedded_images(resolution, colourings, seed)
    total, done = sum(len(s.images) for s in splits.values()), 0
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent) as part:
            for split in splits.values():
                for name, image in zip(split.names, split.images, strict=True):
                    path = Path(part, "images", name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(path)
                    done += 1
                    if progress:
                        progress(done, total)
            Path(part, "images").rename(folder)
    except OSError as e:
        raise OutputError(f"cannot write {folder}: {reason(e)}") from e
    return total
