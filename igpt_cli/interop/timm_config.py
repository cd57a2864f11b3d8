"""timm's config.json: architecture, arguments, image preparation, defaults.

Weights show most sizes and none of the settings: an argument that is not known here is refused, since the model could
compute something else with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from igpt_cli.documents import read_json
from igpt_cli.errors import InputError
from igpt_cli.interop.keys import is_size, square
from igpt_cli.interop.rgb import HALVES, IMAGENET, checked_preparation
from igpt_cli.interop.weights import refuse
from igpt_cli.model_dir import CONFIG
from igpt_cli.models.registry import RGB_PRESETS, find_preset

#: What is usual in timm below 225 pixels; above, nothing is cut off ViT, DeiT and Swin.
USUAL = {
    "vit": {"crop": 0.9, "filter": "bicubic", **HALVES},
    **{name: {"crop": 0.9, "filter": "bicubic", **IMAGENET} for name in ("deit", "deit_distilled", "swin")},
    "resnet": {"crop": 0.875, "filter": "bilinear", **IMAGENET},
}
#: What timm takes for a key that `pretrained_cfg` leaves out, or has as null, where it states others of these.
STATED = {"crop_pct": 0.875, "interpolation": "bicubic", **IMAGENET, "crop_mode": "center"}
OURS = {"crop_pct": "crop", "interpolation": "filter"}
#: Part of an architecture's name -> the argument that it stands for, where weights do not show it.
IN_NAME = {
    "quickgelu": ("act_layer", "quick_gelu"),
    "resnetaa": ("aa_layer", "avg"),
    "resnetblur": ("aa_layer", "blur"),
}
#: timm's argument -> the field of ours that it must equal.
SIZES = {
    "img_size": "resolution",
    "num_classes": "n_classes",
    "layers": "depths",
    **{name: name for name in ("embed_dim", "depth", "depths", "num_heads", "mlp_ratio", "patch_size", "window_size")},
}
#: Arguments that play no part in what a trained model computes at its own resolution, or that shapes show.
NO_PART = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("drop_block_rate", "weight_init", "fix_init", "zero_init_last", "strict_img_size", "dynamic_img_size", "block"),
)
_TRANSFORMER: dict[str, tuple] = {"in_chans": (3,), "qkv_bias": (True,), "norm_layer": (None, "layernorm")}
_VIT: dict[str, tuple] = {
    **_TRANSFORMER,
    "act_layer": (None, "gelu"),
    "global_pool": ("token",),
    "class_token": (True,),
    "pos_embed": ("learn",),
    "reg_tokens": (0,),
    "init_values": (None,),
    "fc_norm": (None, False),
    "embed_norm_layer": (None,),
    "proj_bias": (True,),
    "final_norm": (True,),
    **dict.fromkeys(("qk_norm", "scale_attn_norm", "scale_mlp_norm", "no_embed_class", "pre_norm"), (False,)),
    **dict.fromkeys(("dynamic_img_pad", "pool_include_prefix"), (False,)),
}
_SWIN: dict[str, tuple] = {**_TRANSFORMER, "global_pool": ("avg",), "head_dim": (None,), "always_partition": (False,)}
_RESNET: dict[str, tuple] = {
    "in_chans": (3,),
    "act_layer": (None, "relu"),
    "norm_layer": (None, "batchnorm2d"),
    "global_pool": ("avg",),
    "output_stride": (32,),
    "cardinality": (1,),
    "base_width": (64,),
    "stem_width": (64,),
    "stem_type": ("",),
    "aa_layer": (None,),
    "block_args": (None, {}),
    "channels": (None, [64, 128, 256, 512]),
    **dict.fromkeys(("block_reduce_first", "down_kernel_size"), (1,)),
    **dict.fromkeys(("replace_stem_pool", "avg_down"), (False,)),
}
#: backend -> {argument: the values with which timm's model is ours}.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "vit": _VIT,
    "deit": _VIT,
    "deit_distilled": _VIT,
    "swin": _SWIN,
    "resnet": _RESNET,
}


def read_config_json(file: Path) -> dict[str, Any]:
    """timm's config.json in the folder of the weights; {} where there is none, or another's.

    timm before 0.8 wrote the keys of `pretrained_cfg` next to `architecture`; they come out as it.

    Raises:
        FormatError: it cannot be read, its arguments are no object, or its images are no squares.
    """
    if not (file.parent / CONFIG).is_file():
        return {}
    found = read_json(file.parent / CONFIG, "timm's config.json")
    if "architecture" not in found and "pretrained_cfg" not in found:
        return {}
    problems = [
        f"{name} is {short(found[name])}, expected an object"
        for name in ("pretrained_cfg", "model_args")
        if not isinstance(found.get(name) or {}, dict)
    ]
    refuse(file.parent / CONFIG, problems, "timm's config.json")
    found["pretrained_cfg"] = stated = found.get("pretrained_cfg") or dict(found)
    size = stated.get("input_size")
    if size is not None and not (isinstance(size, list) and len(size) == 3 and is_size(square(size[1:]))):
        problems.append(f"input_size is {short(size)}, expected [3, R, R]")
    refuse(file.parent / CONFIG, problems, "timm's config.json")
    return found


def arguments(known: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the architecture, as arguments of timm's class; of {} nothing."""
    found = dict(known.get("model_args") or {})
    if "global_pool" in known:
        found.setdefault("global_pool", known["global_pool"])
    for part, (name, value) in IN_NAME.items():
        if part in str(known.get("architecture")):
            found.setdefault(name, value)
    return found


def check_arguments(file: Path, known: Mapping[str, Any], model: Mapping[str, Any], what: str) -> None:
    """
    Args:
        file: config.json.
        model: the description of the model that was made of the weights.

    Raises:
        FormatError: an argument with which timm computes something else, or that is not known here.
    """
    problems, fixed = [], FIXED[model["backend"]]
    for name, value in arguments(known).items():
        if name in SIZES and SIZES[name] in model:
            if not _same(name, value, model):
                problems.append(f"{name} is {short(value)}, the model has {short(model[SIZES[name]])}")
        elif name in fixed:
            if value not in fixed[name]:
                problems.append(f"{name} is {short(value)}, {what} here has {fixed[name][-1]!r}")
        elif name == "num_classes":
            if value:
                problems.append(f"num_classes is {short(value)}, and the weights have no class head")
        elif name not in NO_PART:
            problems.append(f"{name} is {short(value)}, an argument that igpt does not know")
    refuse(file, problems, what)


def _same(name: str, value: Any, model: Mapping[str, Any]) -> bool:
    """Whether an argument says of a size what the model has."""
    ours = model[SIZES[name]]
    if name == "mlp_ratio":
        D = model["embed_dim"]
        return isinstance(value, (int, float)) and abs(value) < 2**16 and int(value * D) == int(ours * D)
    if name in ("img_size", "patch_size", "window_size"):
        value = square(value)
    if name == "window_size" and isinstance(value, int):  # no window is larger than the grid that it lies on
        value = min(value, model["resolution"] // model["patch_size"])
    return bool(value == ours)


def heads(file: Path, sizes: Mapping[str, Any], known: Mapping[str, Any], preset: str | None) -> int:
    """num_heads of a ViT: from config.json, the preset named, or the presets of that width."""
    stated = arguments(known).get("num_heads")
    if isinstance(stated, int):
        return stated
    if preset:
        return find_preset(preset).sizes.get("num_heads", 0)
    vits = [p.sizes for p in RGB_PRESETS.values() if p.backend.startswith(("vit", "deit"))]
    heads = {size["num_heads"] for size in vits if size["embed_dim"] == sizes["embed_dim"]}
    if len(heads) == 1:
        return heads.pop()
    raise InputError(
        f"{file} is {sizes['embed_dim']} wide, as no ViT of `igpt models` is, and shapes do not show how many heads "
        f"it has; say --num-heads N"
    )


def swin_resolution(file: Path, sizes: Mapping[str, Any], known: Mapping[str, Any], preset: str | None) -> int:
    """The image side of a Swin: from config.json, the preset named, or the presets with these sizes."""
    if stated := _input_side(known):
        return stated
    if preset:
        return find_preset(preset).sizes["resolution"]
    same = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items() if k not in ("n_classes", "mlp_ratio")}
    fits = [p for p in RGB_PRESETS.values() if all(p.sizes.get(k) == v for k, v in same.items())]
    if fits:
        return fits[0].sizes["resolution"]
    raise InputError(
        f"{file} has the sizes of no Swin of `igpt models`, and shapes do not show its image side; put timm's "
        f"config.json with pretrained_cfg.input_size into its folder"
    )


def resnet_rest(
    file: Path, sizes: Mapping[str, Any], known: Mapping[str, Any], preset: str | None, note: Callable[[str], None]
) -> dict[str, Any]:
    """The stem and image side of a ResNet: from shapes, config.json, the preset named; 224 pixels are usual."""
    named = find_preset(preset).sizes if preset else {}
    stem = sizes.get("stem") or named.get("stem")
    if stem is None:
        raise InputError(
            f"the stem of {file} is not 7x7, and shapes do not show whether pooling follows it; say --preset NAME, "
            f"such as resnet-18-32 (none) or resnet-18-64 (pooling)"
        )
    side = _input_side(known) or named.get("resolution")
    if side is None:
        note("taken as a model of 224x224 images, which its weights do not show; --resolution R says otherwise")
    return {"stem": stem, "resolution": side or 224}


def _input_side(known: Mapping[str, Any]) -> int | None:
    """The image side in model_args, or else in pretrained_cfg."""
    size = arguments(known).get("img_size") or (known.get("pretrained_cfg") or {}).get("input_size")
    side = square(size[-2:] if isinstance(size, list) else size)
    return side if is_size(side) else None


def read_preparation(
    file: Path, known: Mapping[str, Any], backend: str, resolution: int, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """`preparation` of our config.json: size, crop, filter, mean, std, from `pretrained_cfg` or timm's usual values.

    Raises:
        FormatError: values that are none.
    """
    usual = dict(USUAL[backend])
    if resolution > 224 and backend != "resnet":
        usual["crop"] = 1.0
    stated = {k: v for k, v in known.get("pretrained_cfg", {}).items() if k in STATED and v is not None}
    if not stated:
        note(f"images are prepared as is usual in timm: {usual}")
        return {"size": resolution, **usual}
    found = {OURS.get(k, k): v for k, v in {**STATED, **stated}.items()}
    mode = found.pop("crop_mode")
    if mode == "squash" and found["crop"] == 1:
        found["crop"] = None
    elif mode != "center":
        note(f"crop_mode is {short(mode)}; here the middle is cut out")
    return checked_preparation(file, {"size": resolution, **found})


def class_names(known: Mapping[str, Any], n_classes: int | None) -> list[str] | None:
    """label_names (once labels), where there is one for each class."""
    stated = {**known.get("pretrained_cfg", {}), **known}
    names = stated.get("label_names", stated.get("labels"))
    good = isinstance(names, list) and len(names) == n_classes and all(isinstance(name, str) for name in names)
    return list(names) if good and isinstance(names, list) else None
