"""The model directory: a run, an import or an export.

config.json         format, versions, "model" (architecture), "training" (every resolved setting), "data", "result"
model.safetensors   float32 weights
palette.npz         the palette the tokens were made with; an imported model of RGB images has none
metrics.jsonl       one record for every step
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from igpt_cli import __version__
from igpt_cli.documents import METRICS_FIELDS, RUN_FIELDS, check_fields, parse_json, read_json, write_json
from igpt_cli.errors import FormatError, InputError, MismatchError
from igpt_cli.files import check_folder, replacing, replacing_folder, require_file
from igpt_cli.models.registry import build_model, checked_config
from igpt_cli.palette.palette import Palette
from igpt_cli.workspace import name_of_run, resolve_run

if TYPE_CHECKING:
    from igpt_cli.tokens.store import TokenFile

FORMAT, FORMAT_VERSION = "igpt-model", 1
CONFIG, WEIGHTS, PALETTE, METRICS = "config.json", "model.safetensors", "palette.npz", "metrics.jsonl"
#: The key of a config.json that says with which trained model's weights the run started.
FINETUNED_FROM = "finetuned_from"
#: What a run learns, and the command of igpt that makes such runs.
TASKS = ("pretrain", "finetune", "train")

#: What weights may be stored as; a model computes with its own.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class ModelDir:
    """A model read from disk, in evaluation mode. `palette` is None for a model of RGB images that has none."""

    path: Path
    model: torch.nn.Module
    palette: Palette | None
    config: dict[str, Any]

    @property
    def run(self) -> str:
        """Its name in results and messages: the path, or "builtin:<name>"."""
        return name_of_run(self.path)

    @property
    def own_palette(self) -> Palette:
        """The palette, for what cannot be done without. Raises InputError: the model has none."""
        if self.palette is None:
            raise InputError(f"{self.run} has no palette: it is {self.name}, a model of RGB images that knows none")
        return self.palette

    @property
    def name(self) -> str:
        """The preset's name, such as igpt-tiny."""
        return self.config["model"].get("name", self.path.name)


def new_config(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """The head of every config.json, then `model` and the other parts (training, data, result)."""
    versions = {"igpt": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": python_version()}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "model": model,
        **parts,
    }


def task_of(config: dict[str, Any]) -> str:
    """The task of a run: "pretrain", "finetune" or "train"; inferred for a config.json of version 0.1."""
    if config.get("task") in TASKS:
        return config["task"]
    if "recipe" in (config.get("training") or {}):
        return "train"
    return "finetune" if FINETUNED_FROM in config else "pretrain"


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write config.json in the folder `path`."""
    write_json(config, path / CONFIG)


def write_weights(
    path: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, name: str = WEIGHTS
) -> None:
    """Write a state dict as model.safetensors in the folder `path`; integers (BatchNorm's batches) keep their type."""
    weights = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None) for k, v in weights.items()}
    weights = {k: v.contiguous() for k, v in weights.items()}
    with replacing(path / name) as part:
        save_file(weights, part, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        os.umask(mask := os.umask(0))
        part.chmod(0o666 & ~mask)


def write_model(
    path: Path | str,
    weights: dict[str, torch.Tensor],
    palette: Palette | None,
    config: dict[str, Any],
    force: bool = False,
) -> Path:
    """Write a whole model directory atomically.

    Args:
        weights: the state dict of the model that `config["model"]` describes.
        palette: that of its tokens; None for a model of RGB images without one.
        config: from `new_config`.
        force: replace an existing model directory.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    path = check_folder(path, CONFIG, force)
    with replacing_folder(path) as part:
        write_weights(part, weights)
        if palette is not None:
            palette.save(part / PALETTE)
        write_config(part, config)
    return path


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the model directory `path`, checked.

    Raises:
        InputError, FormatError: no such file, not JSON, another format, or a newer version of it.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a model directory; a folder with {CONFIG} and {WEIGHTS} was expected")
    if not (file := path / CONFIG).exists():
        raise InputError(f"{path} is not a model directory: it has no {CONFIG}")
    config = read_json(file, "a model's config.json")
    if config.get("model_type") in ("imagegpt", "vit", "deit", "swin"):
        todo = f"make a model of it: igpt import huggingface {path} -o MODEL"
        raise FormatError(f"{path} is a Hugging Face folder; {todo}")
    if config.get("format") != FORMAT:
        raise FormatError(f"{file} is not an igpt model's: its format is {config.get('format')!r}, expected {FORMAT!r}")
    versions = config["versions"] if isinstance(config.get("versions"), dict) else {}
    if config.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{file} has format version {config.get('format_version')!r}; this igpt {__version__} reads version "
            f"{FORMAT_VERSION}; use the igpt that wrote it ({versions.get('igpt', 'unknown')})"
        )
    if not isinstance(config.get("model"), dict):
        raise FormatError(f"{file} does not describe a model: the key 'model' is missing")
    check_fields(config, RUN_FIELDS, str(file))
    try:
        return {**config, "model": checked_config(config["model"])}
    except FormatError as e:
        raise FormatError(f"{file}: {e}") from e


def load_model(run: str | Path, device: torch.device | str = "cpu") -> ModelDir:
    """Read a model directory ("runs/x", "latest", "builtin:igpt-tiny") strictly: every tensor, by name and shape.

    Raises:
        InputError, FormatError, MismatchError: naming the file and the problem.
    """
    path = resolve_run(run)
    config = read_config(path)
    with torch.device("meta"):  # so that sizes other than the weights' take no memory
        weights = read_weights(path, build_model(config["model"]))
    model = build_model(config["model"])
    model.load_state_dict(weights)
    of_rgb = getattr(model, "input_kind", "tokens") == "rgb"
    palette = None if of_rgb and not (path / PALETTE).exists() else Palette.load(path / PALETTE)
    if palette is not None and palette.n_vocab != (n_vocab := config["model"].get("n_vocab", palette.n_vocab)):
        raise MismatchError(f"{path / PALETTE} has {palette.n_vocab} colours and the model {n_vocab}; they must agree")
    return ModelDir(path, model.eval().to(device), palette, config)


def read_weights(path: Path, model: torch.nn.Module, name: str = WEIGHTS) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors in the folder `path`, checked to have the names, shapes and types of those of
    `model`, which may be on the meta device, and finite values.

    Raises:
        InputError, FormatError: naming the file and the problem.
    """
    file = require_file(path / name, "the model's weights")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as e:
        raise FormatError(f"{file} is not a readable safetensors file: {e}") from e
    expected = model.state_dict()
    problems = [f"{k} is missing" for k in expected if k not in weights]
    problems += [f"{k} is not part of the model" for k in weights if k not in expected]
    for k in [k for k, v in expected.items() if k in weights and weights[k].shape != v.shape]:
        problems.append(f"{k} is {tuple(weights[k].shape)}, expected {tuple(expected[k].shape)}")
    for k, v in weights.items():
        dtype = expected[k].dtype if k in expected else v.dtype
        if v.dtype != dtype and not (v.dtype in FLOATS and dtype in FLOATS):
            problems.append(f"{k} is {v.dtype}, expected {dtype}".replace("torch.", ""))
        elif v.dtype in FLOATS:
            weights[k] = v.to(dtype)
            if not torch.isfinite(weights[k]).all():
                problems.append(f"{k} holds NaN or infinity")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise FormatError(f"{file} does not fit its {CONFIG}: {'; '.join(problems[:3])}{more}")
    return weights


def classes_of(config: dict[str, Any]) -> list[str] | None:
    """The class names of a model with a class head, in the order of its logits; None without one."""
    for part in ("data", "imported"):
        if names := (config.get(part) or {}).get("classes"):
            return [str(name) for name in names]
    return None


def check_fit(run: ModelDir, tokens: TokenFile) -> None:
    """Check that tokens have the model's palette and resolution; a model of RGB images takes any palette.

    Raises:
        MismatchError: naming both and what to do.
    """
    resolution = run.config["model"].get("resolution")
    images = f"{tokens.path} has images of {tokens.resolution}x{tokens.resolution}, {run.run}"
    if getattr(run.model, "input_kind", "tokens") == "rgb":
        if tokens.resolution != resolution:
            todo = "name the images themselves, which are prepared for it, or a token file of that resolution"
            raise MismatchError(f"{images} takes {resolution}x{resolution}; {todo}")
        return
    if resolution is not None and tokens.resolution != resolution:
        todo = f"tokenize again with --resolution {resolution}"
        raise MismatchError(f"{images} was trained at {resolution}x{resolution}; {todo}")
    own = run.own_palette
    if tokens.palette.sha256 != own.sha256:
        raise MismatchError(
            f"{tokens.path} uses palette {tokens.palette.sha256[:12]} ({tokens.n_vocab} colours), {run.run} was "
            f"trained with palette {own.sha256[:12]} ({own.n_vocab} colours); tokenize again with "
            f"--palette {run.run}, or give the images themselves"
        )


def check_predicts_pixels(run: ModelDir) -> None:
    """
    Raises:
        InputError: a model of RGB images, which tells classes apart.
    """
    if getattr(run.model, "input_kind", "tokens") != "tokens":
        raise InputError(
            f"{run.run} is {run.name}, a model of RGB images: it predicts no pixels, so it has no loss on them, "
            f"samples none and cannot be fine-tuned as iGPT is; igpt probe evaluates its features"
        )


class MetricsWriter:
    """Appends records to metrics.jsonl; each record is one line of JSON."""

    def __init__(self, path: Path, after: int | None = None):
        """`path` is the run; records after step `after`, from which it is resumed, are removed."""
        if after is not None and (path / METRICS).exists():
            records = read_metrics(path, lambda r: isinstance(r.get("step"), int) and r["step"] <= after)
            with replacing(path / METRICS) as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        # Line by line, so that a run can be watched.
        self._file = open(path / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """One record, such as {"step": 1, "loss": 6.2383}."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, keep: Callable[[dict], bool] = lambda record: True) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in the model directory `path`, without a truncated last line.

    Raises:
        InputError, FormatError: there is none, or a field has the wrong type.
    """
    file, records = require_file(path / METRICS, "a run's metrics"), []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = parse_json(line, f"{file}, line {number}", "a record")
        except FormatError:
            continue
        check_fields(record, METRICS_FIELDS, f"{file}, line {number}")
        if keep(record):
            records.append(record)
    return records
