"""The linear probe of each layer of a frozen model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_cli.documents import read_json, write_json
from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import require_file
from igpt_cli.model_dir import ModelDir, check_fit, load_model
from igpt_cli.model_input import takes_rgb
from igpt_cli.models.registry import build_model
from igpt_cli.probing.baselines import RandomPatches, raw_pixels
from igpt_cli.probing.feature_file import Features
from igpt_cli.probing.features import model_device
from igpt_cli.probing.images import Images, choose_images
from igpt_cli.probing.layers import Layer, check_layers, whole_layers
from igpt_cli.probing.protocol import GRIDS, FeatureSet, best_of, classify, few_shot, neighbours, protocol_name
from igpt_cli.probing.result_fields import RESULT, ROW, check_result
from igpt_cli.probing.store import extract_features
from igpt_cli.tokens.store import TokenFile
from igpt_cli.workspace import BUILTIN, CHECKPOINTS, builtin_models

UNTRAINED = "untrained network"
#: Opens a bar with a label; within it (done, total) is told.
Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def silent(label: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A `Stage` that tells nobody."""
    return nullcontext(lambda done, total: None)


def probe(
    run: ModelDir,
    tokens: TokenFile,
    layers: Sequence[Layer] | None = None,
    *,
    train_images: int | None = None,
    test_images: int | None = None,
    images: Images | None = None,
    solver: str = "lbfgs",
    standardise: bool = True,
    pool: str = "mean",
    knn: bool = False,
    concat: int | None = None,
    labels_per_class: Sequence[int] = (),
    repeats: int = 5,
    baselines: bool = True,
    details: bool = False,
    bert_masks: int | None = None,
    features: Path | str | None = None,
    seed: int = 0,
    precision: str = "float32",
    stage: Stage = silent,
) -> dict[str, Any]:
    """Fit a linear classifier on each layer's features and score it on the test split.

    Features are the mean over positions of each layer's normed values (section 2.4). Layer and C are chosen on a
    held-out tenth of the training split; each layer's classifier is refitted on all of it and scored once on the test
    split. The headline is the layer chosen on the held-out part, not the best on the test split.

    Args:
        tokens: a token file with labelled splits "train" and "test" and the model's palette; a model of RGB images sees
            the images that the file stores, or else the colours of any palette.
        layers: which of 0..n_layers, None for all of them; or sites within blocks such as "20.mlp", too (see `layers`).
        train_images, test_images: use at most so many, balanced over the classes; or the `images` given.
        solver: "lbfgs"; "sgd" for features that do not fit in memory; "knn".
        standardise: features, with the statistics of the training images; a protocol with another name if not.
        pool: "mean" over the image as in the paper, or over its "quadrants": another protocol.
        knn: add nearest neighbours on the same features.
        concat: also probe so many neighbouring layers together, around the chosen one.
        labels_per_class, repeats: add the accuracy with so few labels, over random subsets (`few_shot`).
        baselines: add raw pixels, the colour histogram, random patches, and the same network untrained.
        details: add the accuracy of each class and the confusion matrix at the chosen layer.
        bert_masks: masks of a test image of a BERT model, whose predictions vote; 0 for whole images. Default 5.
        features: a features file to use or to make; without it features are temporary.
        seed: of the images, the held-out part, the subsets, BERT's masks and the untrained network.
        stage: opens a bar for each part of the work.

    Returns:
        The probe result of docs/formats.md: protocol, accuracy (percent), interval, layer, layers, floors (baselines).

    Raises:
        InputError, MismatchError: no such layer, other palette or resolution, a split or labels missing.
    """
    started = time.monotonic()
    protocol = protocol_name(solver, standardise, pool)
    layers, n_layers = check_layers(run, layers), int(run.model.n_layers)  # type: ignore[arg-type]
    taken = layers_taken(run, layers, concat)
    check_fit(run, tokens)
    images = images or choose_images(tokens, train_images, test_images, seed, as_kept=takes_rgb(run))
    y, device = images.labels, model_device(run.model)
    settings: dict[str, Any] = {"seed": seed, "standardise": standardise, "device": device}

    def rows_of(sets: Sequence[FeatureSet], **more: Any) -> list[dict[str, Any]]:
        """What the solver, and nearest neighbours beside it, reach."""
        rows = classify(sets, y, solver=solver, **settings, **more)
        for row, s in zip(rows, sets) if knn else ():
            (near,) = classify([s], y, solver="knn", **settings)
            row["knn"] = {k: near[k] for k in ("accuracy", "interval", "val_accuracy", "val_loss")}
        return rows

    def sweep_of(found: Features, label: str) -> list[dict[str, Any]]:
        with stage(label) as step:
            rows = rows_of([feature_set(found, [k]) for k in layers], progress=step, details=details and found is kept)
        return [{"layer": layer, **row} for layer, row in zip(layers, rows, strict=True)]

    with tempfile.TemporaryDirectory(prefix="igpt-") as folder:
        take: dict[str, Any] = {"rows": images.rows, "bert_masks": bert_masks, "pool": pool}
        take |= {"precision": precision, "seed": seed}
        with stage("features") as step:
            path = features or Path(folder) / "features.h5"
            kept = extract_features(run, tokens, path, taken, ["train", "test"], **take, progress=step)
        sweep = sweep_of(kept, "classifiers")
        chosen = best_of(sweep)
        told = {k: chosen.pop(k) for k in ("class_accuracy", "confusion") if k in chosen}
        for row in sweep:
            for key in told:
                row.pop(key, None)
        result: dict[str, Any] = {
            "protocol": protocol,
            "model": run.name,
            "run": run.run,
            "checkpoint_sha256": kept.attrs["checkpoint_sha256"],
            "tokens": tokens.title,
            "accuracy": chosen["accuracy"],
            "interval": chosen["interval"],
            "layer": chosen["layer"],
            "n_layers": n_layers,
            "pool": pool,
            "standardise": standardise,
            "bert_masks": kept.n_masks("test") if run.config["model"].get("objective") == "bert" else None,
            "precision": kept.attrs["precision"],
            "n_train": len(y.train),
            "n_test": len(y.test),
            "n_classes": len(np.unique(y.train)),
            "images_sha256": images.sha256,
            "chance": 100 * float(np.bincount(y.test).max() / len(y.test)),
            "seed": seed,
            "C_grid": list(GRIDS[solver]) if solver == "lbfgs" else None,
            "layers": sweep,
        }
        if knn:
            best = best_of([{"layer": row["layer"], **row["knn"]} for row in sweep])
            result["knn"] = {"protocol": protocol_name("knn", standardise, pool), **best}
        if told:
            result["details"] = {"classes": tokens.classes, **told}
        if concat is not None:
            several = neighbours(chosen["layer"], n_layers, concat)
            (row,) = rows_of([feature_set(kept, several)])
            result["concat"] = {"layers": several, **row}
        if labels_per_class:
            sets = {layer: feature_set(kept, [layer]) for layer in layers}
            with stage("few labels") as step:
                result["few_labels"] = few_shot(sets, y, labels_per_class, repeats, **settings, progress=step)
        if baselines:
            with stage("baselines"):
                result["floors"] = {name: rows_of([s])[0] for name, s in _baselines(images, seed, device)}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                untrained = replace(run, model=build_model(run.config["model"]).eval().to(device))
            with stage(f"features, {UNTRAINED}") as step:
                path = Path(folder) / "untrained.h5"
                found = extract_features(untrained, tokens, path, layers, ["train", "test"], **take, progress=step)
            sweep = sweep_of(found, f"classifiers, {UNTRAINED}")
            result["floors"][UNTRAINED] = {**best_of(sweep), "layers": sweep}
    result["seconds"] = round(time.monotonic() - started, 2)
    return result


def layers_taken(run: ModelDir, layers: Sequence[Layer], concat: int | None) -> list[Layer]:
    """The layers to compute features of, with all that may be concatenated; one pass gives any layers.

    Raises:
        InputError: layers within blocks are to be concatenated, or more layers than there are.
    """
    if concat is None:
        return list(layers)
    whole = whole_layers(layers, "neighbouring layers are concatenated of")
    return sorted({n for k in whole for n in neighbours(k, run.model.n_layers, concat)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class CheckpointProbe:
    """The probe of one checkpoint: accuracy, interval and val_accuracy in percent at the chosen layer, and all layers.

    val_loss is of the run's own validation; None if there was none.
    """

    step: int
    val_loss: float | None
    val_accuracy: float
    accuracy: float
    interval: list[float]
    layer: Layer
    layers: list[dict[str, Any]]
    checkpoint_sha256: str


def probe_checkpoints(
    run: Path, tokens: TokenFile, device: torch.device | str = "cpu", *, stage: Stage = silent, **settings: Any
) -> list[CheckpointProbe]:
    """Probe every checkpoint step-<n> of a run's folder, in order: how accuracy follows the loss (section 4.3, figure
    3).

    `settings` are those of `probe`. Raises InputError if the run has no checkpoints.
    """
    steps = sorted(int(p.name.partition("-")[2]) for p in (run / CHECKPOINTS).glob("step-*") if p.is_dir())
    if not steps:
        raise InputError(f"{run} has no checkpoints ({CHECKPOINTS}/step-<n>); igpt pretrain --keep N keeps the last N")
    found = []
    for step in steps:
        checkpoint = load_model(run / CHECKPOINTS / f"step-{step}", device)

        def named(label: str, step: int = step) -> AbstractContextManager[Callable[[int, int], None]]:
            return stage(f"step {step:,}, {label}")

        result = probe(checkpoint, tokens, baselines=False, stage=named, **settings)
        best = next(row for row in result["layers"] if row["layer"] == result["layer"])
        keep = {k: result[k] for k in ("accuracy", "interval", "layer", "layers", "checkpoint_sha256")}
        val_loss = checkpoint.config.get("progress", {}).get("val_loss")
        found.append(CheckpointProbe(step, val_loss, best["val_accuracy"], **keep))
    return found


def feature_set(features: Features, layers: Sequence[Layer]) -> FeatureSet:
    """The features of one layer, or of several one beside the other."""
    train = [features.read("train", layer) for layer in layers]
    test = [features.masked("test", layer) for layer in layers]
    if len(layers) == 1:
        return FeatureSet(train[0], test[0])
    return FeatureSet(np.concatenate(train, axis=-1), np.concatenate(test, axis=-1))


def _baselines(images: Images, seed: int, device: torch.device) -> Iterator[tuple[str, FeatureSet]]:
    """The name and the features of each baseline that needs no network."""
    train, test = images.rgb("train"), images.rgb("test")
    yield "raw pixels", FeatureSet(raw_pixels(train), raw_pixels(test)[None])
    yield "colour histogram", FeatureSet(images.histogram("train"), images.histogram("test")[None])
    if images.tokens.resolution >= 8:
        patches = RandomPatches(train, seed, device)
        yield "random patches", FeatureSet(patches(train), patches(test)[None])


def write_result(found: dict[str, Any], path: Path | str) -> None:
    """Write what `probe` returned as a JSON document."""
    write_json(found, path)


def shipped_result(run: str, tokens: TokenFile) -> dict[str, Any] | None:
    """The result of `builtin:igpt-tiny` on all embedded images, to compare the probe of another `run` on them with;
    or None.
    """
    path = builtin_models().get("igpt-tiny", Path()) / "probe.json"
    if tokens.attrs.get("source") != "embedded" or run.startswith(BUILTIN) or not path.is_file():
        return None
    return read_result(path)


def read_result(path: Path | str) -> dict[str, Any]:
    """Read what `write_result` wrote. Raises InputError or FormatError if it is not there or is something else."""
    path = require_file(path, "a result of igpt probe -o")
    found = read_json(path, "a result of igpt probe -o")
    rows: Any = found.get("layers")
    whole = bool(rows) and isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= ROW for row in rows)
    if not whole or not found.keys() >= RESULT:
        raise FormatError(f"{path} is no result of a probe; igpt probe RUN T --layers all -o {path} makes one")
    check_result(found, str(path))
    return found
