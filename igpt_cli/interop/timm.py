"""timm's ViT, DeiT, Swin and ResNet: import, and export except ResNet.

Its names of tensors are in `vit_keys`, `swin_keys` and `resnet_keys`. The file says nothing of heads and of how images
are prepared: a config.json in its folder does, as on the Hugging Face hub (`timm_config`), or else the preset with the
same shapes and timm's usual values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from igpt_cli.documents import write_json
from igpt_cli.errors import FormatError, InputError, MismatchError
from igpt_cli.files import check_folder, replacing_folder, require_file
from igpt_cli.interop.rgb import FAMILIES, keys_of, named_shapes, own_preparation, sizes_by_shape, write_imported
from igpt_cli.interop.stored import BIN, DTYPES, SAFETENSORS, Stored, open_safetensors, read_text, without_wrappers
from igpt_cli.interop.timm_config import (
    check_arguments,
    class_names,
    heads,
    read_config_json,
    read_preparation,
    resnet_rest,
    swin_resolution,
)
from igpt_cli.interop.vit_keys import check_published_form
from igpt_cli.interop.weights import describe, describe_read, refuse, require_apart
from igpt_cli.model_dir import CONFIG, classes_of, load_model, read_config, write_weights
from igpt_cli.models.registry import count_parameters, find_preset
from igpt_cli.workspace import resolve_run

#: Our preset -> timm's name of the architecture.
ARCHITECTURES = {
    "vit-ti16": "vit_tiny_patch16_224",
    "vit-s16": "vit_small_patch16_224",
    "vit-b16": "vit_base_patch16_224",
    "vit-b32": "vit_base_patch32_224",
    "vit-l16": "vit_large_patch16_224",
    "vit-l32": "vit_large_patch32_224",
    "vit-h14": "vit_huge_patch14_224",
    "vit-b16-384": "vit_base_patch16_384",
    "vit-l16-384": "vit_large_patch16_384",
    "deit-ti": "deit_tiny_patch16_224",
    "deit-s": "deit_small_patch16_224",
    "deit-b": "deit_base_patch16_224",
    "deit-b-384": "deit_base_patch16_384",
    "deit-ti-distilled": "deit_tiny_distilled_patch16_224",
    "deit-s-distilled": "deit_small_distilled_patch16_224",
    "deit-b-distilled": "deit_base_distilled_patch16_224",
    "deit-b-distilled-384": "deit_base_distilled_patch16_384",
    "swin-t": "swin_tiny_patch4_window7_224",
    "swin-s": "swin_small_patch4_window7_224",
    "swin-b": "swin_base_patch4_window7_224",
    "swin-l": "swin_large_patch4_window7_224",
    "swin-b-384": "swin_base_patch4_window12_384",
    "swin-l-384": "swin_large_patch4_window12_384",
}
#: Of a model that is no preset, the architecture whose sizes are all replaced by `model_args`.
NEAREST = {
    "vit": "vit_base_patch16_224",
    "deit": "deit_base_patch16_224",
    "deit_distilled": "deit_base_distilled_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
}
#: Tensors that models here do not have -> what they are; {n} is the number of rows.
OTHERS = {
    "fc_norm.": "a norm after the mean over patches",
    "patch_embed.backbone.": "a ResNet that makes its patches",
    "reg_token": "{n} register tokens",
    "blocks.0.ls1.": "factors of its branches (LayerScale), as DeiT III has",
    "norm_pre.": "a norm in front of its blocks, as CLIP has",
    "attn_pool.": "attention that pools, as SigLIP has",
    "conv1.0.": "a stem of several convolutions",
    "layer1.0.se.": "squeeze-and-excitation",
}
#: In timm's models, whatever the size.
NORM_EPS = 1e-6


def import_timm(
    source: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    num_heads: int | None = None,
    resolution: int | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make a model directory of a ViT, DeiT, Swin or ResNet that timm wrote as safetensors.

    torchvision's ResNets have the same names and are read, too. What wraps a model in training
    (DistributedDataParallel, torch.compile) is stripped from the names.

    Weights in float32 come out bit by bit; float16 and bfloat16 become float32, which holds them exactly.

    Args:
        source: the file, or a folder with model.safetensors. config.json in its folder, if it is timm's, says the
            architecture and how images are prepared.
        out: the model directory to write.
        preset: which of our models it is: for the heads of an unknown size, a DeiT that is not distilled, a ResNet
            with a stem of 3x3.
        num_heads: heads of a ViT or DeiT that is no preset.
        resolution: of a ViT, DeiT or ResNet, another image side; positions are resized.
        force: replace a model directory that is there.
        note: called with what was taken for granted.

    Returns:
        What config.json says; `imported` says where the model came from.

    Raises:
        InputError, FormatError, MismatchError: none of these architectures, or not one that can be had here: one
            message says all that differs.
        OutputError: something is at `out`, or it cannot be written.
    """
    source, out = Path(source), Path(out)
    file = source / SAFETENSORS if source.is_dir() else source
    if source.is_dir() and not file.exists() and (source / BIN).exists():
        file = source / BIN  # refused, with the line that converts it
    require_file(file, "timm's weights, a safetensors file")
    require_apart(file, out)
    check_folder(out, CONFIG, force)
    named_backend = find_preset(preset).backend if preset else None
    if preset and named_backend not in FAMILIES:
        raise InputError(f"--preset {preset} is no ViT, DeiT, Swin or ResNet, and timm has none of it")
    stored = without_wrappers(file, open_safetensors(file), note)
    known = read_config_json(file)
    keys, what, layout = _family(file, stored)
    named = named_shapes(file, keys, layout, stored, what)
    backend = keys.backend_of(named)
    what = FAMILIES[backend][1]
    sizes = sizes_by_shape(file, keys, named, what)
    if backend == "deit_two_tokens":
        raise FormatError(
            f"{file} cannot be read as {what}: it has a distillation token, and head_dist.weight is missing"
        )
    is_deit = str(known.get("architecture", "")).startswith("deit")
    if backend == "vit" and (named_backend == "deit" or (named_backend is None and is_deit)):
        backend = "deit"
    elif backend == "vit" and named_backend is None and not known:
        note("taken as a ViT; a DeiT has the same tensors and other colours: name it with --preset, as deit-s")
    if backend == "swin":
        sizes.setdefault("resolution", swin_resolution(file, sizes, known, preset))
    elif backend == "resnet":
        sizes |= resnet_rest(file, sizes, known, preset, note)
    else:
        sizes["num_heads"] = num_heads or heads(file, sizes, known, preset)
    model = describe_read(file, backend, sizes, what)
    if preset:
        _require_preset(file, model, preset)
    check_arguments(file.parent / CONFIG, known, model, what)
    return write_imported(
        out,
        file,
        stored,
        keys,
        layout,
        model,
        read_preparation(file.parent / CONFIG, known, backend, model["resolution"], note),
        classes=class_names(known, model.get("n_classes")),
        resolution=resolution,
        force=force,
        note=note,
        form="timm",
        architecture=read_text(known, "architecture"),
    )


def export_timm(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write a ViT, DeiT or Swin as a folder that timm reads: model.safetensors and config.json, as on the hub.

    Args:
        run: a model directory, or "latest".
        out: the folder to write.
        dtype: "float32", or "bfloat16", to which the weights are rounded.
        force: replace a folder that has a config.json.
        note: called with what differs without harm.

    Returns:
        path, dtype, model, architecture (timm's name), n_parameters.

    Raises:
        InputError: a model that timm does not have, or an unknown dtype.
        OutputError: something is at `out`, or it cannot be written.
    """
    path, out = resolve_run(run), Path(out)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; weights are written as {' or '.join(DTYPES)}")
    model = read_config(path)["model"]
    keys, backend = keys_of(model["backend"]), model["backend"]
    if backend == "resnet":
        raise InputError(f"{path} is {model['name']}; a ResNet is read from timm's form and not written in it")
    if backend == "swin":
        if not model.get("shift", True):
            raise InputError("the windows of this Swin are not shifted, and timm's always are")
    else:
        check_published_form(model)
        if backend not in NEAREST:
            raise InputError(f"{path} has a distillation token and no head for it; timm's DeiT has both or neither")
        if model["norm_eps"] != NORM_EPS:
            note(f"the norms of this model add {model['norm_eps']:g}, timm's {NORM_EPS:g}: late digits differ")
    require_apart(path, out)
    check_folder(out, CONFIG, force)
    loaded = load_model(path)
    document = timm_config(model, own_preparation(loaded, note), classes_of(loaded.config))
    with replacing_folder(out) as part:
        write_weights(part, keys.to_theirs(loaded.model.state_dict(), "timm"), DTYPES[dtype])
        write_json(document, part / CONFIG)
    return {
        "path": str(out),
        "dtype": dtype,
        "model": model,
        "architecture": document["architecture"],
        "n_parameters": count_parameters(loaded.model),
    }


def timm_config(model: Mapping[str, Any], preparation: Mapping[str, Any], classes: list[str] | None) -> dict[str, Any]:
    """timm's config.json of the hub: the architecture, what differs from it, and how images are prepared."""
    side, n_classes = preparation["size"], model.get("n_classes") or 0
    document: dict[str, Any] = {
        "architecture": ARCHITECTURES.get(model["name"], NEAREST[model["backend"]]),
        "num_classes": n_classes,
        "num_features": model["embed_dim"] * 2 ** (len(model["depths"]) - 1 if "depths" in model else 0),
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": preparation["filter"],
            "crop_pct": 1.0 if preparation["crop"] is None else preparation["crop"],
            "crop_mode": "squash" if preparation["crop"] is None else "center",
            "mean": list(preparation["mean"]),
            "std": list(preparation["std"]),
            "num_classes": n_classes,
        },
    }
    if model["name"] not in ARCHITECTURES:
        sizes = ("embed_dim", "depth", "depths", "num_heads", "mlp_ratio", "patch_size", "window_size")
        document["model_args"] = {"img_size": side, **{k: model[k] for k in sizes if k in model}}
    if classes and len(classes) == n_classes:
        document["label_names"] = list(classes)
    return document


def _family(file: Path, stored: Mapping[str, Stored]) -> tuple[Any, str, str]:
    """Tables, what it is, and the layout, by the names of the tensors."""
    if any(".patch_embeddings.projection" in name for name in stored):
        raise FormatError(f"{file} has transformers' names; read its folder: igpt import huggingface {file.parent}")
    for family, sign in (
        ("swin", "layers.0.blocks.0.attn.relative_position_bias_table"),
        ("vit", "blocks.0.attn.qkv.weight"),
        ("resnet", "layer1.0.conv1.weight"),
    ):
        if sign in stored:
            keys, what = FAMILIES[family]
            break
    else:
        names = ", ".join(sorted(stored)[:3]) or "none"
        raise FormatError(f"{file} is no ViT, DeiT, Swin or ResNet in timm's names; its tensors are {names}, ...")
    more = []
    for start, reason in OTHERS.items():
        if name := next((name for name in stored if name.startswith(start)), None):
            shape = stored[name].shape
            more.append(f"it has {reason.format(n=shape[-2] if len(shape) > 1 else '?')} ({name})")
    if keys is FAMILIES["vit"][0] and "cls_token" not in stored:
        more.append("it has no class token (cls_token)")
    refuse(file, [f"{reason}, which igpt has not" for reason in more], what)
    return keys, what, keys.layout_of(stored)


def _require_preset(file: Path, model: Mapping[str, Any], preset: str) -> None:
    """
    Raises:
        MismatchError: it is not the model that was named.
    """
    named = find_preset(preset)
    if model["name"] == preset:
        return
    expected = describe(named.backend, named.sizes)
    names = ("backend", "embed_dim", "depth", "depths", "num_heads", "patch_size", "window_size", "resolution")
    other = [
        f"{k} {short(model.get(k))}, not {short(expected.get(k))}" for k in names if model.get(k) != expected.get(k)
    ]
    raise MismatchError(f"{file} is not {preset}: {'; '.join(other) or 'its MLPs have another width'}")
