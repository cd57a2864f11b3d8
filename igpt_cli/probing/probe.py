"""The linear probe: how well does each layer of a frozen model classify?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_cli.errors import InputError
from igpt_cli.files import replacing
from igpt_cli.model_dir import ModelDir, check_fit
from igpt_cli.models.registry import build_model
from igpt_cli.probing.features import extract
from igpt_cli.probing.solvers import C_GRID, LinearProbe, linear_probe
from igpt_cli.tokens.store import TokenFile, TokenSplit

#: How features are scaled, what is chosen on what, and what is reported; a result with another name is not comparable.
PROTOCOL = "igpt-linear-v1"
#: Images used of the training and test splits when nothing is said and the device is a CPU.
CPU_IMAGES = (500, 300)


def probe(
    run: ModelDir,
    tokens: TokenFile,
    layers: Sequence[int] | None = None,
    *,
    train_images: int | None = None,
    test_images: int | None = None,
    floors: bool = True,
    seed: int = 0,
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fit a linear classifier on each layer's features and score it on the test split.

    Features are the mean over positions of each layer's normed values (section 2.4). Layer and C are chosen on a
    held-out tenth of the training split; each layer's classifier is refitted on all of it and scored once on the
    test split. The headline is the layer chosen on the held-out part, not the best on the test split.

    Args:
        run: a loaded model; its weights are not changed.
        tokens: a token file with labelled splits "train" and "test" and the model's palette.
        layers: which of 0..n_layers; None for all.
        train_images, test_images: use at most so many, the same number of each class as far as it goes.
        floors: add what raw pixels, and the same network untrained, reach on the same images.
        seed: decides the images, the held-out part and the untrained network.
        progress: called with (images done, images in all networks).

    Returns:
        What a probe's JSON holds: protocol, accuracy (percent), interval, layer, layers (one object a layer), floors.

    Raises:
        InputError, MismatchError: no such layer, other palette or resolution, a split or labels missing.
    """
    started = time.monotonic()
    layers = check_layers(run, layers)
    check_fit(run, tokens)
    x, y = {}, {}
    for split, limit in (("train", train_images), ("test", test_images)):
        x[split], y[split] = _labelled(tokens.split(split), split, limit, seed, tokens)
    _check_labels(y, tokens)
    n_train = len(y["train"])
    both = np.concatenate((x["train"], x["test"]))
    networks = {"trained": run.model}
    if floors:
        device = next(run.model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks["untrained network"] = build_model(run.config["model"]).to(device)
    sweeps = {}
    for i, (name, network) in enumerate(networks.items()):
        step = progress and (lambda done, _, i=i: progress(i * len(both) + done, len(networks) * len(both)))
        found = extract(network, both, layers, precision=precision, progress=step)
        sweeps[name] = [
            {"layer": layer, **_fit(f[:n_train], y["train"], f[n_train:], y["test"], seed)}
            for layer, f in found.items()
        ]
    chosen = _choose(sweeps["trained"])
    result = {
        "protocol": PROTOCOL,
        "model": run.name,
        "run": str(run.path) if run.path.name not in ("", ".") else run.name,
        "tokens": str(tokens.path),
        "accuracy": chosen["accuracy"],
        "interval": chosen["interval"],
        "layer": chosen["layer"],
        "n_layers": run.model.n_layers,
        "pool": "mean",
        "n_train": n_train,
        "n_test": len(y["test"]),
        "n_classes": len(np.unique(y["train"])),
        "chance": 100 * float(np.bincount(y["test"]).max() / len(y["test"])),
        "seed": seed,
        "C_grid": list(C_GRID),
        "layers": sweeps["trained"],
    }
    if floors:
        pixels = [tokens.palette.dequantize(x[s]).reshape(len(x[s]), -1) / np.float32(255) for s in ("train", "test")]
        untrained = sweeps["untrained network"]
        result["floors"] = {
            "raw pixels": _fit(pixels[0], y["train"], pixels[1], y["test"], seed),
            "untrained network": {**_choose(untrained), "layers": untrained},
        }
    result["seconds"] = round(time.monotonic() - started, 2)
    return result


def check_layers(run: ModelDir, layers: Sequence[int] | None) -> list[int]:
    """The layers in rising order; None means all of 0..n_layers.

    Raises:
        InputError: a layer that the model does not have, or none at all.
    """
    n_layers = run.model.n_layers
    wanted = sorted(set(range(n_layers + 1) if layers is None else layers))
    outside = [layer for layer in wanted if not 0 <= layer <= n_layers]
    if outside or not wanted:
        asked = ", ".join(map(str, outside)) or "none"
        raise InputError(
            f"layer {asked} asked for; {run.name} has the layers 0 to {n_layers} ({n_layers} = final norm)"
        )
    return wanted


def parse_layers(text: str) -> list[int] | None:
    """ "all" -> None, "20" -> [20], "0,12,24" and "10-14" -> the layers named.

    Raises:
        InputError: anything else.
    """
    if text.strip() == "all":
        return None
    out: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if not (1 <= len(ends) <= 2 and all(e.strip().isdecimal() for e in ends)):
            raise InputError(f"layers {text!r} cannot be read; write all, 20, 0,12,24 or 10-14")
        out += range(int(ends[0]), int(ends[-1]) + 1)
    if not out:
        raise InputError(f"layers {text!r} names none; write the lower end first, as in 10-14")
    return out


def _labelled(split: TokenSplit, name: str, limit: int | None, seed: int, file: TokenFile):
    """Tokens (n, T) and labels (n,) of a split's labelled images, at most `limit`, balanced over the classes."""
    labels = np.asarray(split.labels)
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise InputError(f"{file.path}: no image of the split {name!r} has a label; a probe needs class folders")
    if limit is not None and limit < len(rows):
        rows = balanced(labels, rows, limit, seed)
    return np.ascontiguousarray(split.tokens[rows]), labels[rows].astype(np.int64)


def balanced(labels: np.ndarray, rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """`n` of `rows`, sorted: one of each class in turn until there are enough; drawn by `seed`."""
    shuffled = np.random.default_rng([seed, len(rows)]).permutation(rows)
    turn = np.empty(len(shuffled), np.int64)  # how many of the same class came before
    for label in np.unique(labels[shuffled]):
        same = labels[shuffled] == label
        turn[same] = np.arange(same.sum())
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:n]])


def _check_labels(y: dict[str, np.ndarray], tokens: TokenFile) -> None:
    unknown = sorted(set(np.unique(y["test"])) - set(np.unique(y["train"])))
    if unknown:
        names = ", ".join(tokens.classes[i] if i < len(tokens.classes) else str(i) for i in unknown[:5])
        raise InputError(f"{tokens.path}: the test images used have classes that the training images lack: {names}")
    if len(np.unique(y["train"])) < 2:
        raise InputError(f"{tokens.path}: the training images are all of one class; a probe needs at least two")
    n, classes = len(y["train"]), len(np.unique(y["train"]))
    if n < 4 * classes:
        raise InputError(
            f"{tokens.path}: {n} training images of {classes} classes are too few to probe; at least {4 * classes} "
            f"are needed (four a class)"
        )


def _fit(x_train, y_train, x_test, y_test, seed: int) -> dict[str, Any]:
    found: LinearProbe = linear_probe(x_train, y_train, x_test, y_test, seed=seed)
    values = {k: round(v, 4) if isinstance(v, float) and k != "C" else v for k, v in asdict(found).items()}
    return {**values, "interval": [round(end, 2) for end in found.interval]}


def _choose(sweep: list[dict[str, Any]]) -> dict[str, Any]:
    """The layer with the best held-out accuracy; ties go to the lower held-out loss."""
    return max(sweep, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def write_result(found: dict[str, Any], path: Path | str) -> None:
    """Write what `probe` returned as a JSON document."""
    with replacing(path) as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
