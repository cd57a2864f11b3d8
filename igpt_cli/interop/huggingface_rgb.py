"""Hugging Face's ViT, DeiT and Swin: import and export.

config.json has the sizes and the names of the classes, model.safetensors the weights (tables of names: `vit_keys`,
`swin_keys`), preprocessor_config.json how images are prepared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short
from types import ModuleType
from typing import Any

from igpt_cli.documents import read_json, write_json
from igpt_cli.errors import FormatError
from igpt_cli.files import check_folder, replacing_folder
from igpt_cli.interop.keys import rewritten
from igpt_cli.interop.rgb import (
    FAMILIES,
    HALVES,
    IMAGENET,
    checked_preparation,
    keys_of,
    named_shapes,
    own_preparation,
    sizes_by_shape,
    write_imported,
)
from igpt_cli.interop.stored import DTYPES, open_tensors, read_text, without_wrappers
from igpt_cli.interop.weights import describe_read, refuse, require_apart
from igpt_cli.model_dir import CONFIG, classes_of, load_model, write_weights
from igpt_cli.models.registry import count_parameters

PROCESSOR = "preprocessor_config.json"
#: Theirs -> the tables, and what is used where preprocessor_config.json is missing.
MODEL_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {"crop": None, "filter": "bilinear", **HALVES}),
    "deit": ("deit_distilled", {"crop": 0.875, "filter": "bicubic", **IMAGENET}),
    "swin": ("swin", {"crop": None, "filter": "bicubic", **IMAGENET}),
}
#: Our backend -> (their model_type, its layout, their class with a head and the one without).
CLASSES = {
    "vit": ("vit", "vit", "ViTForImageClassification", "ViTModel"),
    "deit": ("vit", "vit", "ViTForImageClassification", "ViTModel"),
    "deit_distilled": ("deit", "deit_with_teacher", "DeiTForImageClassificationWithTeacher", "DeiTModel"),
    "deit_two_tokens": ("deit", "deit", "DeiTForImageClassification", "DeiTModel"),
    "swin": ("swin", "huggingface", "SwinForImageClassification", "SwinModel"),
}
_VIT = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 2, "size": 224}
_CUT = {**_VIT, "resample": 3, "do_center_crop": True, "crop_size": 224}
_CLIP = {
    **_CUT,
    "size": {"shortest_edge": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
#: What an image processor of theirs takes for a missing key, by how its name begins; others as ViT's.
DEFAULTS: dict[str, dict[str, Any]] = {"DeiT": {**_CUT, "size": 256}, "CLIP": _CLIP, "Bit": _CLIP}
#: Pillow's numbers.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def import_rgb(
    folder: Path,
    out: Path,
    theirs: Mapping[str, Any],
    *,
    resolution: int | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make a model directory of a folder that `save_pretrained` of a ViT, DeiT or Swin wrote.

    Args:
        theirs: its config.json, with a `model_type` of `MODEL_TYPES`.
        resolution: another image side; positions are resized.

    Returns, Raises: as `huggingface.import_huggingface`.
    """
    model_type, file = str(theirs["model_type"]), folder / CONFIG
    keys, what = FAMILIES[MODEL_TYPES[model_type][0]]
    sizes, problems = keys.sizes_from_huggingface(theirs)
    refuse(file, problems, what)
    weights_file, stored = open_tensors(folder)
    stored = without_wrappers(weights_file, stored, note)
    if any(".q_proj." in name for name in stored):
        note("names of tensors: those of transformers 5's state_dict(), read as what save_pretrained writes")
        stored = {rewritten(name, keys.INNER): tensor for name, tensor in stored.items()}
    layout = keys.layout_of(stored)
    if layout.split("_")[0] not in (model_type, "huggingface"):
        raise FormatError(f"{file} says {model_type!r}, and the tensors in {weights_file} are named as of {layout!r}")
    named = named_shapes(weights_file, keys, layout, stored, what)
    by_shape = sizes_by_shape(weights_file, keys, named, what)
    D, stated = by_shape["embed_dim"], sizes.get("mlp_ratio", by_shape["mlp_ratio"])
    if isinstance(stated, (int, float)) and math.isfinite(stated) and int(stated * D) == int(by_shape["mlp_ratio"] * D):
        by_shape["mlp_ratio"] = stated  # several ratios make the same whole number
    _compare(file, keys, sizes, by_shape, what)
    model = describe_read(file, keys.backend_of(named), {**sizes, **by_shape}, what)
    return write_imported(
        out,
        weights_file,
        stored,
        keys,
        layout,
        model,
        read_preparation(folder, model_type, model["resolution"], note),
        classes=_class_names(theirs, model.get("n_classes")),
        resolution=resolution,
        force=force,
        note=note,
        form="huggingface",
        transformers_version=read_text(theirs, "transformers_version"),
    )


def export_rgb(
    path: Path,
    out: Path,
    *,
    dtype: str = "float32",
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write a ViT, DeiT or Swin as a folder that transformers reads.

    Args:
        path: a model directory.

    Returns, Raises: as `huggingface.export_huggingface`; InputError also for a model that transformers does not have.
    """
    run = load_model(path)
    model = run.config["model"]
    keys = keys_of(model["backend"])
    model_type, layout, with_head, bare = CLASSES[model["backend"]]
    n_classes = model.get("n_classes")
    sizes = keys.sizes_to_huggingface(model)
    require_apart(path, out)
    check_folder(out, PROCESSOR, force)
    weights = keys.to_theirs(run.model.state_dict(), layout)
    if not n_classes:
        weights = {name.removeprefix(f"{model_type}."): tensor for name, tensor in weights.items()}
        if model_type != "swin":
            note(f"without a class head: transformers' {bare} adds a pooler of its own, which is untrained")
    document = {"architectures": [with_head if n_classes else bare], **sizes, "model_type": model_type, "dtype": dtype}
    if n_classes:
        names = classes_of(run.config) or []
        names = names if len(names) == n_classes else [f"LABEL_{i}" for i in range(n_classes)]
        document |= {"id2label": {str(i): name for i, name in enumerate(names)}}
        document |= {"label2id": {name: i for i, name in enumerate(names)}}
    prepared = preprocessor_config(own_preparation(run, note))
    with replacing_folder(out) as part:
        write_weights(part, weights, DTYPES[dtype])
        write_json(document, part / CONFIG)
        write_json(prepared, part / PROCESSOR)
    return {
        "path": str(out),
        "dtype": dtype,
        "model": model,
        "architecture": document["architectures"][0],
        "n_parameters": count_parameters(run.model),
    }


def _compare(file: Path, keys: ModuleType, stated: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """
    Raises:
        FormatError: config.json and the weights disagree about sizes.
    """
    problems = []
    for ours, value in found.items():
        said = list(stated[ours]) if isinstance(stated.get(ours), tuple) else stated.get(ours, value)
        if said != value:
            key = keys.SIZES.get(ours, ours)
            key = key[0] if isinstance(key, tuple) else key
            problems.append(f"{key} is {short(said)}, the weights have {short(value)}")
    refuse(file, problems, what)


# Classes.


def _class_names(theirs: Mapping[str, Any], n_classes: int | None) -> list[str] | None:
    """The names in id2label, in order; None where there are none but LABEL_0, LABEL_1, ..."""
    labels = theirs.get("id2label")
    if not n_classes or not isinstance(labels, dict):
        return None
    names = [labels.get(str(i)) for i in range(n_classes)]
    if len(labels) != n_classes or not all(isinstance(name, str) for name in names):
        return None
    return None if names == [f"LABEL_{i}" for i in range(n_classes)] else [str(name) for name in names]


# Preparation of images.


def read_preparation(
    folder: Path, model_type: str, resolution: int, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """preprocessor_config.json as `preparation` of our config.json: size, crop, filter, mean, std.

    crop is the part of the short side that the crop retains; None squeezes the whole image to a square.

    Raises:
        FormatError: images would be prepared as cannot be said so.
    """
    file, usual = folder / PROCESSOR, MODEL_TYPES[model_type][1]
    if not file.exists():
        note(f"{folder} has no {PROCESSOR}; images are prepared as is usual for {model_type}: {usual}")
        return {"size": resolution, **usual}
    stated = read_json(file, "how the model's images are prepared")
    kind = stated.get("image_processor_type", stated.get("feature_extractor_type", "DeiT" * (model_type == "deit")))
    theirs = {**next((v for k, v in DEFAULTS.items() if str(kind).startswith(k)), _VIT), **stated}
    problems = []
    factor, resample = theirs["rescale_factor"], theirs["resample"]
    if theirs["do_rescale"] is not True or not isinstance(factor, float) or abs(factor - 1 / 255) > 1e-9:
        problems.append("colours are not divided by 255")
    filter = RESAMPLE.get(resample) if type(resample) is int else None
    if filter is None:
        problems.append(f"resample is {short(resample)}, none of Pillow's filters")
    colours = {"mean": [0.0] * 3, "std": [1.0] * 3}
    if theirs["do_normalize"]:
        colours = {ours: theirs.get(f"image_{ours}", [0.5] * 3) for ours in colours}
    short_side, squeezed = _side(theirs["size"])
    cut = _side(theirs.get("crop_size", resolution))[0] if theirs.get("do_center_crop") else None
    if short_side is None or (theirs.get("do_center_crop") and cut is None):
        problems.append(f"size {short(theirs['size'])} or crop_size {short(theirs.get('crop_size'))} is no square")
    refuse(file, problems, "a preparation of images that igpt has")
    assert short_side is not None
    if (cut or short_side) != resolution:
        note(f"{PROCESSOR} makes images of {cut or short_side} pixels a side; the model takes {resolution}")
    crop = None if squeezed else 1.0
    if cut is not None:
        crop = crop_fraction(cut, short_side)
        if squeezed and short_side != cut:
            note(
                f"transformers squeezes images to {short_side}x{short_side} before it cuts {cut}x{cut} out; here the "
                f"short side becomes {short_side}, as in the training of such models"
            )
    return checked_preparation(file, {"size": resolution, "crop": crop, "filter": filter, **colours})


def preprocessor_config(preparation: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_preparation` undoes, but for squeezing before a crop."""
    side = preparation["size"]
    square = {"height": side, "width": side}
    document = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": {name: number for number, name in RESAMPLE.items()}[preparation["filter"]],
        "image_mean": list(preparation["mean"]),
        "image_std": list(preparation["std"]),
    }
    if preparation["crop"] is None:
        return {"image_processor_type": "ViTImageProcessor", **document, "size": square}
    # The processor of CLIP is the one that resizes the short side and cuts the middle out.
    resized = {"shortest_edge": int(side / preparation["crop"])}
    return {
        "image_processor_type": "CLIPImageProcessor",
        **document,
        "size": resized,
        "do_center_crop": True,
        "crop_size": square,
    }


def crop_fraction(side: int, short_side: int) -> float:
    """crop, such that int(side / crop) is `short_side`.

    >>> crop_fraction(224, 256)
    0.875
    """
    crop = side / short_side
    return crop if int(side / crop) == short_side else side / (short_side + 0.5)


def _side(size: Any) -> tuple[int | None, bool]:
    """The side that `size` makes, and whether it makes squares of all images; None where it is none that we know."""
    if isinstance(size, dict):
        if "shortest_edge" in size:
            return _side(size["shortest_edge"])[0], False
        if size.get("height") != size.get("width"):
            return None, True
        size = size.get("height")
    whole = isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**16
    return (size if whole else None), True
