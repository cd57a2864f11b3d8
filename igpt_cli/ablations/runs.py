"""One run of an ablation: train, probe, read its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igpt_cli.ablations.catalogue import LAYER_ROWS, PRETRAIN, TRAIN, Ablation, AblationRun
from igpt_cli.ablations.settings import Settings
from igpt_cli.errors import MismatchError
from igpt_cli.model_dir import CONFIG, ModelDir, load_model, read_config
from igpt_cli.planning.cost import forward_flops
from igpt_cli.probing.probe import Stage, probe, write_result
from igpt_cli.tokens.store import TokenFile
from igpt_cli.training.checkpoint import checkpoints
from igpt_cli.training.run import differing_data, finetune, pretrain, resume, train
from igpt_cli.training.settings import FinetuneSettings, PretrainSettings, TrainSettings

PROBE = "probe.json"
#: What the result of a run that is complete says.
COMPLETE = ("done", "early stop")


def train_run(
    run: AblationRun, ablation: Ablation, tokens: TokenFile, out: Path, settings: Settings, how: Mapping[str, Any]
) -> None:
    """Start a run, resume it, or leave it where it is complete. Raises MismatchError if it is of other images."""
    folder = out / run.name
    config = read_config(folder) if (folder / CONFIG).is_file() else None
    if config and config["result"].get("status") in COMPLETE:
        if differ := differing_data(config, tokens):
            raise MismatchError(f"{out} goes on with the images that it was begun with, but {'; '.join(differ)}")
        return
    (folder / PROBE).unlink(missing_ok=True)
    before = load_model(out / run.after) if run.after else None
    if config and checkpoints(folder):
        resume(tokens, folder, teacher=before if run.how == TRAIN else None, **how)
        return
    size = settings.size_of(ablation)
    preset, sizes = size.models.get(run.model, ("", {}))
    learnt: dict[str, Any] = {"seed": settings.seed + run.seed, **(settings.amount or size.amount)}
    learnt |= {**size.settings.get(run.how, {}), **run.settings}
    begun: dict[str, Any] = {"force": folder.exists(), "data_path": settings.images, **how}
    if run.how == TRAIN:
        learnt |= {k: v for k in ("recipe", "augment") if (v := getattr(settings, k)) is not None}
        given = {**sizes, **run.sizes}
        train(preset, tokens, folder, TrainSettings(**learnt), sizes=given, teacher=before, **begun)
    elif run.how == PRETRAIN:
        pretrain(tokens, folder, PretrainSettings(model=preset, **sizes, **learnt), **begun)
    else:
        assert before is not None
        finetune(before, tokens, folder, FinetuneSettings(patience=0, **learnt), **begun)


def probed(
    run: ModelDir, folder: Path, tokens: TokenFile, ablation: Ablation, settings: Settings, stage: Stage
) -> dict[str, Any]:
    """The probe of every layer, or that which was written already."""
    path = folder / PROBE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    train_images, test_images = settings.size_of(ablation).probe
    found = probe(
        run,
        tokens,
        train_images=train_images,
        test_images=test_images,
        seed=settings.seed,
        baselines=False,
        stage=stage,
    )
    write_result(found, path)
    return found


def row_of(run: AblationRun, folder: Path) -> dict[str, Any]:
    """The settings and results that a run has recorded."""
    config = read_config(folder)
    training, result, data = config["training"], config["result"], config["data"]
    seen = result.get("images_seen") or result["tokens_seen"] // config["model"]["resolution"] ** 2
    return {
        "arm": run.name,
        **{k: getattr(run, k) for k in ("label", "against", "how")},
        "paper": dict(run.paper),
        "model": config["model"]["name"],
        "resolution": config["model"]["resolution"],
        "parameters": training["n_parameters"],
        "flops_per_image": forward_flops(config["model"]),
        **{k: result.get(k) for k in ("accuracy", "interval", "accuracy_class", "accuracy_distillation", "n_test")},
        "val_loss": result["val_loss"],
        "steps": result["steps"],
        "images_seen": seen,
        **{k: data[k] for k in ("n_train", "source")},
        **{k: training.get(k) for k in ("recipe", "augment")},
        "seconds": result["seconds"],
        "device": config["machine"]["device_name"] or config["machine"]["device"],
    }


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run that stands in the table and the picture."""
    keys = ("arm", "label", "against", "accuracy", "interval", "n_test", "layer", "n_layers", "paper")
    return {k: row[k] for k in keys if k in row}


def layer_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of "layer" from a probe result: the layer that held-out images chose, the first, the middle and the
    last.
    """
    L, layers = found["n_layers"], {row["layer"]: row for row in found["layers"]}
    places = {"best": found["layer"], "first": 0, "middle": L // 2, "last": L}
    return [
        {
            "arm": None,
            "label": f"{name} layer",
            "against": None if name == "best" else "best layer",
            **{k: layers[layer][k] for k in ("accuracy", "interval")},
            "n_test": found["n_test"],
            "layer": layer,
            "n_layers": L,
            "paper": {"iGPT-L, CIFAR-10": LAYER_ROWS[name]},
        }
        for name, layer in places.items()
    ]
