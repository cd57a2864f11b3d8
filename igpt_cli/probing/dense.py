"""A linear probe of dense features: the class of each pixel.

igpt-dense-v1: an image is resized to the model's R x R, features are computed at every position of a layer, a linear
classifier of single positions is trained by SGD on masks resized to the layer's grid (nearest neighbour), its scores
are upsampled to the mask's own size (bilinear), and the likeliest class is compared pixel by pixel. The learning rate
and the layer are chosen by mean IoU on the grid of a held-out tenth of the training images; the classifier is refitted
on all of them and the test images are scored once. Mask pixels that are `ignore` neither train nor count.

Shapes: N images, B of them in a batch, g x g the grid of a layer, P its positions, D features, K classes, H x W a mask.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from igpt_cli.errors import InputError
from igpt_cli.images.decode import BadImageError, load_rgb
from igpt_cli.images.masks import MOST_CLASSES, Pair, find_pairs, load_mask, resize_mask
from igpt_cli.model_dir import ModelDir
from igpt_cli.model_input import decoder, pixel_input
from igpt_cli.probing.features import Frozen, batches, extract, model_device
from igpt_cli.probing.layers import check_layers, whole_layers
from igpt_cli.probing.linear import Linear
from igpt_cli.probing.logistic import logistic
from igpt_cli.probing.probe import Stage, silent
from igpt_cli.probing.protocol import VAL_PART
from igpt_cli.probing.sgd import RATES

PROTOCOL = "igpt-dense-v1"
#: Positions of an update, passes over the training positions, and updates at least.
BATCH, EPOCHS, LEAST_STEPS = 1024, 10, 2000
#: Images at a time through the model.
IMAGES = 16
#: Bytes of upsampled scores at a time.
UPSAMPLED_BYTES = 2**28


class Tally:
    """Pixel counts by class, for intersection over union and pixel accuracy.

    >>> tally = Tally()
    >>> tally.add(np.array([1, 1, 2, 2]), np.array([1, 2, 2, 2]))
    >>> tally.class_iou(), tally.mean_iou, tally.pixel_accuracy
    ({1: 50.0, 2: 66.66666666666667}, 58.333333333333336, 75.0)
    """

    def __init__(self) -> None:
        self.right, self.true, self.predicted = (np.zeros(MOST_CLASSES, np.int64) for _ in range(3))

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Class numbers, two arrays of one shape; pixels that do not count are left out before."""
        for counts, labels in (
            (self.right, truth[predicted == truth]),
            (self.true, truth),
            (self.predicted, predicted),
        ):
            counts += np.bincount(labels.ravel(), minlength=MOST_CLASSES)

    def class_iou(self) -> dict[int, float]:
        """Percent, of each class that was there or was predicted."""
        union = self.true + self.predicted - self.right
        return {int(k): float(100 * self.right[k] / union[k]) for k in np.flatnonzero(union)}

    @property
    def mean_iou(self) -> float:
        """Percent, the mean over the classes that were there or were predicted."""
        return float(np.mean(list(self.class_iou().values()) or [0.0]))

    @property
    def pixel_accuracy(self) -> float:
        """Percent."""
        return float(100 * self.right.sum() / max(1, self.true.sum()))


@dataclass(frozen=True)
class DenseLayer:
    """One layer of a dense probe: grid (g x g places), what was chosen, and what test images gave."""

    layer: int
    grid: int
    n_features: int
    learning_rate: float
    at_edge: bool
    val_mean_iou: float
    converged: bool
    mean_iou: float
    pixel_accuracy: float


@dataclass(frozen=True)
class DenseResult:
    """What `dense_probe` returns; its fields are those of the JSON document.

    mean_iou, pixel_accuracy: percent, of the layer chosen on held-out images. class_iou: percent by class number.
    commonest: what predicting the commonest class everywhere reaches. skipped: unreadable images by split.
    """

    protocol: str
    model: str
    run: str
    checkpoint_sha256: str
    images: str
    mean_iou: float
    pixel_accuracy: float
    layer: int
    n_layers: int
    class_iou: dict[str, float]
    layers: list[DenseLayer]
    commonest: dict[str, float]
    n_train: int
    n_test: int
    skipped: dict[str, int]
    n_classes: int
    ignore: int
    seed: int
    precision: str
    seconds: float


def dense_probe(
    run: ModelDir,
    root: str | Path,
    layers: Sequence[int] | None = None,
    *,
    train_images: int | None = None,
    test_images: int | None = None,
    ignore: int = 0,
    steps: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    stage: Stage = silent,
    on_bad: Callable[[str, str], None] | None = None,
) -> DenseResult:
    """Fit a linear classifier of single positions on each layer's features, and score it on the pixels of test images.

    An RGB model gives features of its patches or cells, an iGPT of every pixel of its R x R; there position i of an
    autoregressive model has seen the pixels before i alone. Class and distillation tokens are left out.

    Args:
        root: images/{training,validation} and annotations/{training,validation}, as `images.masks` has it.
        layers: which of 0..n_layers; None for all. Training features of all of them are held in memory.
        train_images, test_images: use at most so many, drawn by `seed`.
        ignore: the number in a mask that stands for no class; 0 in ADE20K, 255 in others.
        steps: updates of the classifier; default 10 passes over the training positions, at least 2,000.
        seed: of the images used, the held-out part, and the order of the positions.
        stage: opens a bar for each part of the work.
        on_bad: called with (path, reason) for each image or mask that cannot be read; the next of the draw replaces it.

    Raises:
        InputError: no such layer or folders, no images and masks that can be read, fewer than two classes, or features
            that do not fit in memory.
    """
    started = time.monotonic()
    layers = whole_layers(check_layers(run, layers), "pixels are classified from")
    pairs = find_pairs(root)
    decode, guard, side = _decoder(run), Frozen(run.model), run.config["model"]["resolution"]
    n_bad = Counter[str]()

    def usable(split: str, most: int | None) -> tuple[list[Pair], np.ndarray]:
        def bad(path: str, reason: str) -> None:
            n_bad[split] += 1
            if on_bad:
                on_bad(path, reason)

        with stage(f"reading {split} images") as step:
            return _usable(pairs[split], most, seed, side, bad, step)

    train, train_pictures = usable("train", train_images)
    test, test_pictures = usable("test", test_images)
    if len(train) < 2:
        raise InputError(f"{root} has {len(train)} training image; one is held out, so at least two are needed")
    device = model_device(run.model)
    settings: dict[str, Any] = {"pool": "none", "precision": precision, "decode": decode}
    with stage("features") as step:
        found = extract(run.model, train_pictures, layers, batch_size=IMAGES, progress=step, **settings)  # type: ignore[arg-type]
    truth = _small_masks(train, {grid_side(x.shape[1]) for x in found.values()})
    fits, rows = {}, dict[int, dict[str, Any]]()
    with stage("classifiers") as step:
        for done, layer in enumerate(layers):
            x = on_grid(found.pop(layer))
            fits[layer], rows[layer] = _fit(x, truth[x.shape[1]], ignore, steps, seed, device, f"layer {layer}")
            step(done + 1, len(layers))
    tallies = {layer: Tally() for layer in layers}
    commonest, always = _commonest(truth, ignore), Tally()
    with stage("test images") as step:
        for at, _, part in batches(run.model, test_pictures, np.arange(len(test)), layers, IMAGES, **settings):  # type: ignore[arg-type]
            for i, pair in enumerate(test[at]):
                mask = load_mask(pair.mask)
                known = mask != ignore
                for layer in layers:
                    x = on_grid(part[layer][i : i + 1])[0]
                    tallies[layer].add(predict(fits[layer], x, mask.shape, device)[known], mask[known])
                always.add(np.full(known.sum(), commonest), mask[known])
            step(at.stop, len(test))
    guard.check()
    for layer in layers:
        rows[layer] |= {
            "mean_iou": round(tallies[layer].mean_iou, 4),
            "pixel_accuracy": round(tallies[layer].pixel_accuracy, 4),
        }
    scores = [DenseLayer(layer=layer, **row) for layer, row in rows.items()]
    chosen = max(scores, key=lambda score: score.val_mean_iou)
    scores_of_commonest = {"mean_iou": round(always.mean_iou, 4), "pixel_accuracy": round(always.pixel_accuracy, 4)}
    return DenseResult(
        protocol=PROTOCOL,
        model=run.name,
        run=run.run,
        checkpoint_sha256=guard.sha256,
        images=str(root),
        mean_iou=chosen.mean_iou,
        pixel_accuracy=chosen.pixel_accuracy,
        layer=chosen.layer,
        n_layers=run.model.n_layers,  # type: ignore[arg-type]
        class_iou={str(k): round(v, 4) for k, v in tallies[chosen.layer].class_iou().items()},
        layers=scores,
        commonest={"class": commonest, **scores_of_commonest},
        n_train=len(train),
        n_test=len(test),
        skipped=dict(n_bad),
        n_classes=len(fits[chosen.layer].classes),
        ignore=ignore,
        seed=seed,
        precision=precision,
        seconds=round(time.monotonic() - started, 1),
    )


def predict(fitted: Linear, x: np.ndarray, size: tuple[int, int], device: str | torch.device = "cpu") -> np.ndarray:
    """The likeliest class of each pixel: features (g, g, D), upsampled scores -> (H, W) int64.

    A few classes at a time are upsampled, so that the scores of all of them at all pixels need not fit in memory.
    """
    weight = fitted.weight / fitted.std
    logits = x @ weight.T + (fitted.bias - weight @ fitted.mean)  # (g, g, K)
    scores = torch.from_numpy(logits.astype(np.float32)).permute(2, 0, 1)[None].to(device)
    at_once = max(1, UPSAMPLED_BYTES // (4 * size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=device)
    chosen = torch.zeros(size, dtype=torch.int64, device=device)
    for first in range(0, scores.shape[1], at_once):
        some = F.interpolate(scores[:, first : first + at_once], size=size, mode="bilinear", align_corners=False)
        value, k = some[0].max(dim=0)
        better = value > best
        best, chosen = torch.where(better, value, best), torch.where(better, first + k, chosen)
    return fitted.classes[chosen.cpu().numpy()]


def grid_side(positions: int) -> int:
    """g of P = g * g positions, before which one or two tokens may come that are of no place."""
    return isqrt(positions)


def on_grid(x: np.ndarray) -> np.ndarray:
    """(N, P, D), in raster order behind class and distillation tokens -> (N, g, g, D)."""
    g = grid_side(x.shape[1])
    return x[:, x.shape[1] - g * g :].reshape(len(x), g, g, x.shape[2])


def _usable(
    pairs: Sequence[Pair],
    most: int | None,
    seed: int,
    side: int,
    on_bad: Callable[[str, str], None],
    progress: Callable[[int, int], None],
) -> tuple[list[Pair], np.ndarray]:
    """At most so many pairs, drawn by `seed`, and their images, (N, R, R, 3) uint8.

    In place of one whose image or mask cannot be read comes the next of the draw; the others stay.
    """
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    n = len(pairs) if most is None else min(most, len(pairs))
    used: list[Pair] = []
    pictures: list[np.ndarray] = []
    first = ""
    for pair in (pairs[i] for i in [*sorted(order[:n]), *order[n:]]):
        if len(used) == n:
            break
        path = pair.mask
        try:
            load_mask(path)
            path = pair.image
            pictures.append(np.asarray(load_rgb(path).resize((side, side), Image.Resampling.BICUBIC)))
            used.append(pair)
            progress(len(used), n)
        except BadImageError as e:
            first = first or f"{path}: {e.reason}"
            on_bad(str(path), e.reason)
    if not used:
        raise InputError(f"none of the {len(pairs):,} images with masks can be read; the first is {first}")
    return used, np.stack(pictures)


def _decoder(run: ModelDir) -> Callable[[np.ndarray], torch.Tensor]:
    """From (B, R, R, 3) uint8 to what the model takes: in the colours of its palette, unless it has none or was trained
    on images as they were kept."""
    if run.palette is None or run.config.get("data", {}).get("images") == "rgb":
        return pixel_input(run)
    palette = run.palette
    tokens = decoder(run, palette)
    return lambda rgb: tokens(palette.quantize(rgb).reshape(len(rgb), -1))


def _small_masks(pairs: Sequence[Pair], sides: set[int]) -> dict[int, np.ndarray]:
    """{g: (N, g, g) int32}"""
    out = {g: np.empty((len(pairs), g, g), np.int32) for g in sides}
    for i, pair in enumerate(pairs):
        mask = load_mask(pair.mask)
        for g, small in out.items():
            small[i] = resize_mask(mask, g)
    return out


def _commonest(truth: dict[int, np.ndarray], ignore: int) -> int:
    """The class of most positions of the finest grid."""
    labels = truth[max(truth)]
    return int(np.bincount(labels[labels != ignore]).argmax())


def _fit(
    x: np.ndarray, truth: np.ndarray, ignore: int, steps: int | None, seed: int, device: torch.device, name: str
) -> tuple[Linear, dict[str, Any]]:
    """The classifier of features (N, g, g, D) with classes (N, g, g), and what was chosen how."""
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    n_val = max(1, round(VAL_PART * len(x)))
    held, rest = np.sort(order[:n_val]), np.sort(order[n_val:])

    def fit(images: np.ndarray, rates: Sequence[float]) -> list[Linear]:
        known = truth != ignore
        known[np.setdiff1d(order, images)] = False
        features, labels = x[known], truth[known]
        updates = steps or max(LEAST_STEPS, EPOCHS * len(labels) // BATCH)
        more: dict[str, Any] = {"steps": updates, "batch_size": BATCH, "seed": seed, "device": device, "names": [name]}
        return logistic([(features, labels)], rates, solver="sgd", **more)[0]

    def val_mean_iou(fitted: Linear) -> float:
        known, tally = truth[held] != ignore, Tally()
        tally.add(fitted.predict(x[held][known]), truth[held][known])
        return tally.mean_iou

    tried = fit(rest, RATES)
    scores = [val_mean_iou(fitted) for fitted in tried]
    best = int(np.argmax(scores))
    final = fit(np.arange(len(x)), [RATES[best]])[0]
    return final, {
        "grid": x.shape[1],
        "n_features": x.shape[3],
        "learning_rate": RATES[best],
        "at_edge": best in (0, len(RATES) - 1),
        "val_mean_iou": round(scores[best], 4),
        "converged": bool(final.converged),
    }
