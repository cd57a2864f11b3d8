"""Compare models: one protocol, the same images, timed on one machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_cli import __version__
from igpt_cli.device import autocast, choose_device, choose_precision
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.evaluation.classes import evaluate_head, has_head
from igpt_cli.images.records import brief, unique
from igpt_cli.model_dir import ModelDir, load_model, read_config
from igpt_cli.model_input import inputs_of, places, takes_rgb
from igpt_cli.planning.cost import forward_flops, parameters
from igpt_cli.probing.features import Frozen, feature_shapes, images_at_once, model_device
from igpt_cli.probing.images import Images, choose_images
from igpt_cli.probing.probe import Stage, probe, silent
from igpt_cli.probing.protocol import PROTOCOLS
from igpt_cli.report.budgets import SAME_BUDGET, TrainingCost, mixed_budgets, training_cost
from igpt_cli.tokens.store import TokenFile
from igpt_cli.workspace import resolve_run

PROTOCOL = PROTOCOLS["lbfgs"]
#: A model's speed is the median of at least so many passes, and as many as fill so many seconds.
LEAST_PASSES, TIMED_SECONDS = 3, 1.0

#: Opens the images for a model, as it wants them.
OpenImages = Callable[[ModelDir], AbstractContextManager[TokenFile]]


@dataclass(frozen=True)
class Noted:
    """What `notes_on` must know of a model."""

    name: str
    training: TrainingCost
    resolution: int | None = None
    bert_masks: int | None = None
    head_note: str | None = None


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison. Accuracies and intervals are percentages of the test images.

    Attributes:
        name, run, model: the row's name, the model directory, the preset's name.
        accuracy, interval, val_accuracy, layer, n_features: of the probe at the layer chosen on held-out images.
        relative_depth: layer / n_layers. layers: one object a layer, as in a probe's JSON.
        head: accuracy, interval, top_5_accuracy, log_loss, n_images and matched of its own class head, or None;
            head_note: why it was not evaluated.
        flops_per_image: of one image going forward, a multiply-add counting two.
        memory: bytes at most, of the "gpu" or the "process" (memory_of); None where it is not known.
        reused: the probe was computed before.
    """

    name: str
    run: str
    model: str
    backend: str
    input: str
    resolution: int
    checkpoint_sha256: str
    accuracy: float
    interval: list[float]
    layer: int
    bert_masks: int | None
    val_accuracy: float
    n_layers: int
    relative_depth: float
    n_features: int
    layers: list[dict[str, Any]]
    head: dict[str, Any] | None
    head_note: str | None
    parameters: int
    flops_per_image: int
    images_per_second: float
    batch_size: int
    memory: int | None
    memory_of: str | None
    training: TrainingCost
    reused: bool


@dataclass(frozen=True)
class Comparison:
    """What `compare.json` holds (docs/formats.md): protocol and images, which all models share, machine, models,
    and notes on what differs."""

    protocol: str
    tokens: str
    images_sha256: str
    n_train: int
    n_test: int
    n_classes: int
    chance: float
    seed: int
    precision: str
    device: str
    device_name: str | None
    versions: dict[str, str]
    models: list[ComparedModel]
    notes: list[str]

    @property
    def images_used(self) -> str:
        """The title of its figures."""
        return f"{self.n_train:,} training, {self.n_test:,} test images ({self.protocol})"

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Comparison:
        """The comparison of a JSON document that `to_dict` made."""
        models = [ComparedModel(**{**row, "training": TrainingCost(**row["training"])}) for row in document["models"]]
        return cls(**{**document, "models": models})


def compare(
    runs: Sequence[str | Path],
    open_images: OpenImages,
    *,
    train_images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    device: str = "auto",
    reuse: Mapping[str, dict[str, Any]] | None = None,
    mix: bool = False,
    stage: Stage = silent,
) -> Comparison:
    """Probe every model by the protocol igpt-linear-v1 on the same images, and measure what each costs.

    One model at a time is in memory. A class head is evaluated on the test images of the probe.

    Args:
        runs: model directories, in the order of the table.
        open_images: gives the token file, or the images, that a model is probed on.
        train_images, test_images, seed, precision: as for `probing.probe.probe`.
        device: where everything is computed and timed.
        reuse: {name: probe result}, taken in place of a probe of the same weights on the same images.
        mix: also models with other budgets or augmentations, as far as their config.json says (`mixed_budgets`).
        stage: opens a bar for each part of the work.

    Raises:
        InputError: no runs, one named twice, or images that cannot be probed.
        MismatchError: budgets differ, without `mix`; a model takes other images than a token file has, or the models
            saw different images.
    """
    paths = distinct_runs(runs, "compare")
    names = names_of(paths)
    if (differ := mixed_budgets({name: read_config(path) for name, path in zip(names, paths)})) and not mix:
        raise MismatchError(
            f"these models were not trained alike, so a table would compare runs rather than architectures: "
            f"{'; '.join(differ)}. Compare them all the same with --mixed-budgets; what differs is then said below the "
            f"table"
        )
    chosen, stored, why_not = choose_device(device), dict(reuse or {}), dict[str, str]()
    settings: dict[str, Any] = {"train_images": train_images, "test_images": test_images, "seed": seed}
    rows: list[ComparedModel] = []
    first: dict[str, Any] = {}
    for path, name in zip(paths, names):
        run = load_model(path, chosen)
        with open_images(run) as file:
            images = choose_images(file, train_images, test_images, seed, as_kept=takes_rgb(run))
            found = _stored_probe(run, images, seed, precision, stored, why_not)
            if fresh := found is None:
                found = probe(run, file, **settings, baselines=False, precision=precision, stage=stage_of(name, stage))
            first = first or found
            if found["images_sha256"] != first["images_sha256"]:
                raise MismatchError(
                    f"{run.run} was shown other images than {rows[0].run}, so their figures cannot stand in one "
                    f"table; if images cannot be read, leave them out (igpt data info SOURCE --check names them)"
                )
            rows.append(_row(run, name, file, images, found, precision, not fresh))
    return Comparison(
        protocol=PROTOCOL,
        **{k: first[k] for k in ("tokens", "images_sha256", "n_train", "n_test", "n_classes", "chance")},
        seed=seed,
        precision=choose_precision(precision, chosen),
        device=str(chosen),
        device_name=torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.processor() or None,
        versions={"igpt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        models=rows,
        notes=notes_on(rows) + [f"{name} was not used: {why}" for name, why in why_not.items() if name in stored],
    )


def distinct_runs(runs: Sequence[str | Path], purpose: str) -> list[Path]:
    """The folders of runs.

    Raises:
        InputError: no runs, or one named twice.
    """
    paths = [resolve_run(run) for run in runs]
    if not paths:
        raise InputError(f"no run to {purpose}; name one or more")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"a run is named twice: {', '.join(map(str, runs))}; name each once")
    return paths


def stage_of(name: str, stage: Stage) -> Stage:
    """Stages of the work on one run, with its name."""
    return lambda label: stage(f"{name}, {label}")


def names_of(paths: Sequence[Path]) -> list[str]:
    """What the rows are called: the folders' names, or whole paths where these are not enough."""
    short = [
        path.parent.parent.name + "/" + path.name if path.parent.name == "checkpoints" else path.name for path in paths
    ]
    return short if len(set(short)) == len(short) else unique(map(str, paths))


def _stored_probe(
    run: ModelDir, images: Images, seed: int, precision: str, stored: dict[str, dict[str, Any]], why_not: dict[str, str]
) -> dict[str, Any] | None:
    """The probe result that is one of this model on these images, taken out of `stored`; or why each is not."""
    model: Any = run.model
    expected = {
        "protocol": PROTOCOL,
        "images_sha256": images.sha256,
        "seed": seed,
        "precision": choose_precision(precision, model_device(model)),
        "pool": "mean",
        "layers": list(range(model.n_layers + 1)),
    }
    sha256, taken = Frozen(run.model).sha256, None
    for name, found in list(stored.items()):
        if found.get("checkpoint_sha256") != sha256:
            why_not.setdefault(name, "its weights are those of none of these models")
            continue
        there = {**found, "layers": [row.get("layer") for row in found.get("layers", [])]}
        if wrong := [k for k, v in expected.items() if there.get(k) != v]:
            why_not[name] = f"it has other {brief([k.removesuffix('_sha256') for k in wrong])} than this comparison"
        elif taken is not None:
            why_not[name] = "another result of the same probe was taken"
        else:
            taken = stored.pop(name)
    return taken


def _row(
    run: ModelDir, name: str, file: TokenFile, images: Images, found: dict[str, Any], precision: str, reused: bool
) -> ComparedModel:
    """All there is to say of one model."""
    best = next(row for row in found["layers"] if row["layer"] == found["layer"])
    model, head, head_note = run.config["model"], None, None
    if has_head(run):
        try:
            scored = evaluate_head(run, file, "test", rows=images.rows["test"], precision=precision).to_dict()
            head = {k: scored[k] for k in ("accuracy", "interval", "top_5_accuracy", "log_loss", "n_images", "matched")}
        except MismatchError as e:
            head_note = str(e)
    L: Any = run.model.n_layers
    return ComparedModel(
        name=name,
        run=run.run,
        model=run.name,
        backend=model["backend"],
        input=run.model.input_kind,  # type: ignore[arg-type]
        resolution=model["resolution"],
        **{k: found[k] for k in ("checkpoint_sha256", "accuracy", "interval", "layer", "bert_masks", "layers")},
        val_accuracy=best["val_accuracy"],
        n_layers=L,
        relative_depth=round(found["layer"] / L, 4),
        n_features=best["n_features"],
        head=head,
        head_note=head_note,
        parameters=parameters(model),
        flops_per_image=forward_flops(model),
        **measure(run, file, images.rows["test"], precision),
        training=training_cost(run.config),
        reused=reused,
    )


def measure(run: ModelDir, file: TokenFile, rows: np.ndarray, precision: str = "float32") -> dict[str, Any]:
    """How fast a model is and what memory it takes: images of the split test through all of its blocks.

    Returns:
        images_per_second, batch_size; memory in bytes at most, and memory_of: "gpu", or "process" on Linux, else None.
    """
    model: Any = run.model.eval()
    device = model_device(model)
    precision = choose_precision(precision, device)
    values, decode = inputs_of(run, file.split("test"))
    shapes = feature_shapes(model, values, [model.n_layers], "mean", precision, decode)
    n = min(len(rows), images_at_once(None, places(run, file.resolution), shapes, device))
    forget = _forget_peak(device)
    x = decode(np.asarray(values[rows[:n]])).to(device)

    @torch.inference_mode()
    def seconds() -> float:
        began = time.perf_counter()
        with autocast(precision, device):
            model.features(x, [model.n_layers])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds()  # what is done once only
    times = [seconds()]
    while len(times) < LEAST_PASSES or sum(times) < TIMED_SECONDS:
        times.append(seconds())
    memory = _peak(device) if forget else None
    return {
        "images_per_second": round(n / statistics.median(times), 3),
        "batch_size": n,
        "memory": memory,
        "memory_of": None if memory is None else "gpu" if device.type == "cuda" else "process",
    }


def _forget_peak(device: torch.device) -> bool:
    """Begin to look for the most memory used; whether that can be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration, ValueError), open("/proc/self/status", encoding="ascii") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("VmHWM")))
    return None


def notes_on(rows: Sequence[ComparedModel | Noted]) -> list[str]:
    """What must be borne in mind when these rows are compared, one sentence each."""
    notes = []
    cost = {row.name: row.training for row in rows}
    seen = {name: c.images_seen for name, c in cost.items() if c.images_seen}
    if seen and max(seen.values()) > SAME_BUDGET * min(seen.values()):
        least, most = min(seen, key=seen.__getitem__), max(seen, key=seen.__getitem__)
        notes.append(
            f"training budgets differ: {least} has seen {seen[least]:,} images, {most} {seen[most]:,}; the accuracies "
            f"are those of these runs, not of the architectures"
        )
    if unknown := [name for name in cost if name not in seen]:
        notes.append(f"it is not known how long {brief(unknown)} {'was' if len(unknown) == 1 else 'were'} trained")
    if again := [name for name, c in cost.items() if c.kind == "fine-tuned"]:
        notes.append(f"the cost of {brief(again)} is that of fine-tuning alone; pretraining came before")
    taught = {c.kind not in ("pretrained",) for c in cost.values() if c.kind != "imported"}
    if len(taught) == 2:
        pure = [name for name, c in cost.items() if c.kind == "pretrained"]
        notes.append(f"{brief(pure)} learnt without labels, others with them")
    for key, what in (("source", "images"), ("recipe", "recipes"), ("augment", "augmentations")):
        values = {value for c in cost.values() if (value := getattr(c, key))}
        if len(values) > 1:
            notes.append(f"they were trained with different {what}: {brief(sorted(values))}")
    if teachers := [f"{name} by {c.teacher}" for name, c in cost.items() if c.teacher]:
        notes.append(f"taught by a teacher: {brief(teachers)}")
    sizes = sorted({row.resolution for row in rows if row.resolution})
    if len(sizes) > 1:
        notes.append(f"the models see images of different sizes: {brief([f'{n}x{n}' for n in sizes])}")
    for row in rows:
        if row.bert_masks:
            notes.append(f"{row.name} sees each test image {row.bert_masks} times; its FLOPs and speed are of one")
        if row.head_note:
            notes.append(f"the class head of {row.name} was not evaluated: {row.head_note}")
    return notes
