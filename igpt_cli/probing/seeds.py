"""A probe with several seeds: variation by images, held-out part and first weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.model_dir import ModelDir, check_fit
from igpt_cli.model_input import takes_rgb
from igpt_cli.probing.images import Subsets
from igpt_cli.probing.layers import Layer, check_layers
from igpt_cli.probing.probe import Stage, layers_taken, probe, silent
from igpt_cli.probing.store import extract_features
from igpt_cli.tokens.store import TokenFile

#: Fields of each seed, with its number.
SEED_FIELDS = ("accuracy", "interval", "layer", "images_sha256")


def probe_seeds(
    run: ModelDir,
    tokens: TokenFile,
    layers: Sequence[Layer] | None = None,
    *,
    subsets: Subsets,
    concat: int | None = None,
    labels_per_class: Sequence[int] = (),
    details: bool = False,
    bert_masks: int | None = None,
    features: Path | str | None = None,
    precision: str = "float32",
    stage: Stage = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Probe with each seed of `subsets`: its own images, held-out part, masks, and untrained network.

    Features of whole images are computed once for all seeds; BERT's masks, and so its features, are of a seed. Few
    labels and details are of the first seed alone. `settings` and the other arguments are those of `probe`.

    Returns:
        What `probe` returns with the first seed; with several, also `seeds`: of each seed, accuracy, interval, layer,
        val_accuracy and C (or learning_rate) there, images_sha256; and accuracy_mean and accuracy_deviation (sample
        standard deviation) over the seeds in the document, its `layers`, `floors`, `concat` and `knn`.

    Raises:
        InputError: as `probe`; or a features file is to be used for masks of several seeds.
    """
    started = time.monotonic()
    layers = check_layers(run, layers)
    taken = layers_taken(run, layers, concat)
    check_fit(run, tokens)
    images = [subsets.images(tokens, seed, as_kept=takes_rgb(run)) for seed in subsets.seeds]
    masked = run.config["model"].get("objective") == "bert" and bert_masks != 0
    several = len(images) > 1
    if several and masked and features is not None:
        raise InputError(
            f"{run.run} sees its images masked, by each seed otherwise, and a features file holds one seed's; leave "
            f"out --features or --seeds, or show it whole images (--bert-masks 0)"
        )
    with tempfile.TemporaryDirectory(prefix="igpt-") as folder:
        if several and not masked:
            features = features or Path(folder) / "features.h5"
            rows = {k: np.unique(np.concatenate([one.rows[k] for one in images])) for k in images[0].rows}
            take: dict[str, Any] = {"rows": rows, "bert_masks": bert_masks, "precision": precision}
            with stage("features") as step:
                extract_features(run, tokens, features, taken, ["train", "test"], **take, progress=step)
        settings |= {"concat": concat, "bert_masks": bert_masks, "features": features, "precision": precision}
        results: list[dict[str, Any]] = []
        for seed, drawn in zip(subsets.seeds, images):

            def named(label: str, seed: int = seed) -> AbstractContextManager[Callable[[int, int], None]]:
                return stage(f"seed {seed}, {label}" if several else label)

            first: dict[str, Any] = {"labels_per_class": labels_per_class, "details": details} if not results else {}
            results.append(probe(run, tokens, layers, images=drawn, seed=seed, stage=named, **settings, **first))
    if several:
        return {**combine(results), "seconds": round(time.monotonic() - started, 2)}
    return results[0]


def combine(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of several results of `probe`, with what all of them say."""
    out = dict(results[0])
    out |= _spread(results)
    rows = [next(row for row in one["layers"] if row["layer"] == one["layer"]) for one in results]
    out["seeds"] = [
        {
            "seed": one["seed"],
            **{k: one[k] for k in SEED_FIELDS},
            **{k: row[k] for k in ("val_accuracy", "C", "learning_rate") if k in row},
            **({"knn": one["knn"]} if "knn" in one else {}),
        }
        for one, row in zip(results, rows)
    ]
    out["layers"] = _each(results)
    if "concat" in out:
        out["concat"] = out["concat"] | _spread([one["concat"] for one in results])
    if "floors" in out:
        out["floors"] = {
            name: row | _spread([one["floors"][name] for one in results]) for name, row in out["floors"].items()
        }
        for name, row in out["floors"].items():
            if "layers" in row:
                row["layers"] = _each([one["floors"][name] for one in results])
    return out


def _each(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the first, each with what the rows of its layer say."""
    return [rows[0] | _spread(rows) for rows in zip(*(one["layers"] for one in results), strict=True)]


def _spread(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of the accuracies of some rows, and of those of their nearest neighbours."""
    values = [row["accuracy"] for row in rows]
    out: dict[str, Any] = {
        "accuracy_mean": round(float(np.mean(values)), 4),
        "accuracy_deviation": round(float(np.std(values, ddof=1)), 4),
    }
    if "knn" in rows[0]:
        out["knn"] = rows[0]["knn"] | _spread([row["knn"] for row in rows])
    return out
