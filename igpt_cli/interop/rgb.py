"""What importers of RGB models share.

Names and shapes are compared before any value is read; what differs is said in timm's names, which are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from igpt_cli.documents import numbers
from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.transforms import Preparation
from igpt_cli.interop import resnet_keys, swin_keys, vit_keys
from igpt_cli.interop.stored import Stored
from igpt_cli.interop.weights import describe, differences, refuse
from igpt_cli.model_dir import ModelDir, new_config, write_model
from igpt_cli.models.registry import BACKENDS, build_model
from igpt_cli.models.vit import resize_positions

#: For each backend the tables of its names and sizes, and what it is called in messages.
FAMILIES: dict[str, tuple[ModuleType, str]] = {
    "vit": (vit_keys, "a ViT"),
    "deit": (vit_keys, "a DeiT"),
    "deit_distilled": (vit_keys, "a DeiT"),
    "deit_two_tokens": (vit_keys, "a DeiT"),
    "swin": (swin_keys, "a Swin"),
    "resnet": (resnet_keys, "a ResNet"),
}
READABLE = ("float32", "float16", "bfloat16")

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def keys_of(backend: str) -> ModuleType:
    """The module with the tables for a backend.

    Raises:
        InputError: a model that neither timm nor transformers has.
    """
    if backend not in FAMILIES:
        raise InputError(f"models of backend {backend!r} are not exchanged; {', '.join(FAMILIES)} are")
    return FAMILIES[backend][0]


def named_shapes(file: Path, keys: ModuleType, layout: str, stored: Mapping[str, Stored], what: str) -> dict:
    """Tensors without values, as the model of ours names them.

    Raises:
        FormatError: query, key and value of a block do not go together.
    """
    without = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    try:
        return keys.to_ours(without, layout)
    except (RuntimeError, IndexError) as e:
        raise FormatError(f"{file} cannot be read as {what}: query, key and value differ in shape") from e


def sizes_by_shape(file: Path, keys: ModuleType, named: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """What shapes show of the sizes.

    Raises:
        FormatError: a tensor that shows one is missing, or of a shape that no such model has.
    """
    try:
        return keys.sizes_of(named)
    except KeyError as e:
        names = ", ".join(list(named)[:3])
        raise FormatError(f"{file} cannot be read as {what}: {e.args[0]} is missing; it has {names}, ...") from e
    except (ValueError, IndexError, ZeroDivisionError) as e:
        raise FormatError(f"{file} cannot be read as {what}: {e}") from e


def read_values(
    file: Path, keys: ModuleType, layout: str, stored: Mapping[str, Stored], model: Mapping[str, Any], what: str
) -> dict[str, Tensor]:
    """The state dict of the model that `model` describes, float32: every tensor by name and shape, all finite.

    Raises:
        FormatError: with all that differs.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in build_model(dict(model)).state_dict().items()}
    named = named_shapes(file, keys, layout, stored, what)
    problems = differences({name: tuple(t.shape) for name, t in named.items()}, expected)
    taken = {name: tensor for name, tensor in stored.items() if not keys.EXCLUDED.search(name)}
    problems += [
        f"{name} is {tensor.dtype}; {', '.join(READABLE)} can be read"
        for name, tensor in taken.items()
        if tensor.dtype not in READABLE and not name.endswith(resnet_keys.COUNT)
    ]
    refuse(file, problems, what)
    values = {
        name: tensor.read().to(torch.int64 if name.endswith(resnet_keys.COUNT) else torch.float32)
        for name, tensor in taken.items()
    }
    refuse(file, [f"{name} holds NaN or infinity" for name, x in values.items() if not torch.isfinite(x).all()], what)
    ours = keys.to_ours(values, layout)
    return {name: ours[name].contiguous() for name in expected}


def write_imported(
    out: Path,
    file: Path,
    stored: Mapping[str, Stored],
    keys: ModuleType,
    layout: str,
    model: dict[str, Any],
    preparation: dict[str, Any],
    *,
    classes: list[str] | None = None,
    resolution: int | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
    **imported: Any,
) -> dict[str, Any]:
    """Read the weights that `model` describes, and write the model directory.

    Args:
        resolution: another image side, for which the positions of a ViT or DeiT are resized (bicubic, without
            antialiasing; those of its tokens stay).
        imported: entries of config.json in addition to those of every file.

    Returns:
        What config.json says.

    Raises:
        FormatError, InputError, OutputError: see `read_values`; a resolution that the model cannot have; something is
            at `out`.
    """
    what = FAMILIES[model["backend"]][1]
    left_out = [name for name in stored if keys.EXCLUDED.search(name)]
    if left_out:
        note(f"excluded: {', '.join(left_out[:4])}{', ...' if len(left_out) > 4 else ''}")
    weights = read_values(file, keys, layout, stored, model, what)
    if resolution is not None and resolution != model["resolution"]:
        imported["resized_from"] = model["resolution"]
        if "pos_embed" in weights:
            imported["resized_by"] = "bicubic, without antialiasing"
        model, weights = resized(model, weights, resolution)
        preparation = {**preparation, "size": resolution}
    imported = {
        "from": str(file),
        "layout": layout,
        "dtype": ", ".join(sorted({t.dtype for name, t in stored.items() if name not in left_out and t.shape})),
        "left_out": left_out,
        **({"classes": classes} if classes else {}),
        **imported,
        "n_parameters": sum(w.numel() for w in weights.values()),
    }
    config = new_config(model, preparation=preparation, imported=imported)
    write_model(out, weights, None, config, force)
    return config


def resized(
    model: dict[str, Any], weights: dict[str, Tensor], resolution: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of a ViT, DeiT or ResNet for images of another side.

    Raises:
        InputError: another architecture, or a side that is not whole patches.
    """
    keys = keys_of(model["backend"])
    if keys is swin_keys:
        raise InputError(f"{model['name']} has no positions to be resized; --resolution is for ViT, DeiT and ResNet")
    sizes = {k: v for k, v in model.items() if k not in ("name", "backend")}
    try:
        described = describe(model["backend"], {**sizes, "resolution": resolution})
    except ValueError as e:
        raise InputError(f"the model cannot have that resolution: {e}") from e
    if keys is resnet_keys:
        return described, weights
    config = BACKENDS[model["backend"]][1](**{k: v for k, v in described.items() if k not in ("name", "backend")})
    return described, resize_positions(weights, config)


def checked_preparation(file: Path, preparation: dict[str, Any]) -> dict[str, Any]:
    """What `file` says of the preparation of images: size, crop, filter, mean, std.

    Raises:
        FormatError: something that cannot be done so.
    """
    problems = []
    for name in ("mean", "std"):
        value = preparation[name]
        finite = numbers(value, 3) and all(abs(x) < 1e6 for x in value)
        if not finite or (name == "std" and min(value) <= 0):
            problems.append(f"{name} is {short(value)}, expected three numbers")
    try:
        Preparation(preparation["size"], crop=preparation["crop"], filter=preparation["filter"])
    except InputError as e:
        problems.append(str(e))
    refuse(file, problems, "a preparation of images that can be done here")
    return preparation


def own_preparation(run: ModelDir, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """How a model wants its images, in full: what config.json states, and for a model trained here what igpt does.

    That is to cut the middle square out and to resize it, and to show its colours, or those of its palette.
    """
    usual = {"crop": 1.0, "filter": "bicubic", "mean": [0.0] * 3, "std": [1.0] * 3}
    if run.palette is not None and run.config.get("data", {}).get("images") != "rgb":
        note(
            f"trained on images in the {run.palette.n_vocab} colours of its palette; others do not quantize them, "
            f"and figures will differ a little"
        )
    return {**usual, **run.config.get("preparation", {}), "size": run.config["model"]["resolution"]}
