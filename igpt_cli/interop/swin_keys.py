"""Swin's tensor names in timm, old and new, the paper's code, and transformers.

Pure functions on {name: tensor}. A name that is not in the table is left as it is, for the caller to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any

from torch import Tensor

from igpt_cli.errors import InputError
from igpt_cli.interop.keys import PARTS, NameTable, fixed_problems, is_size, join_qkv, ratio, split_qkv, square

#: timm from 0.9 on; timm before that and the paper's own code; transformers' SwinForImageClassification, on disk.
LAYOUTS = ("timm", "official", "huggingface")

_BLOCK, _THEIRS, _HF = "stages.{s}.blocks.{b}.", "layers.{s}.blocks.{b}.", "swin.encoder.layers.{s}.blocks.{b}."
#: (our name, its name in each of LAYOUTS). {s} is a stage, {p} the one before it, {b} a block. transformers keeps
#: query, key and value apart, which `split_qkv` and `join_qkv` see to.
NAMES: tuple[tuple[str, str, str, str], ...] = (
    ("patch_embed.proj", "patch_embed.proj", "patch_embed.proj", "swin.embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "patch_embed.norm", "patch_embed.norm", "swin.embeddings.norm"),
    *(
        (
            f"stages.{{s}}.merge.{part}",
            f"layers.{{s}}.downsample.{part}",
            f"layers.{{p}}.downsample.{part}",
            f"swin.encoder.layers.{{p}}.downsample.{part}",
        )
        for part in ("norm", "reduction")
    ),
    *(
        (_BLOCK + ours, _THEIRS + theirs, _THEIRS + theirs, _HF + transformers)
        for ours, theirs, transformers in (
            ("norm1", "norm1", "layernorm_before"),
            ("attn.qkv", "attn.qkv", "attention.self.qkv"),
            ("attn.proj", "attn.proj", "attention.output.dense"),
            ("attn.bias_table", "attn.relative_position_bias_table", "attention.self.relative_position_bias_table"),
            ("norm2", "norm2", "layernorm_after"),
            ("mlp.fc1", "mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "mlp.fc2", "output.dense"),
        )
    ),
    ("norm", "norm", "norm", "swin.layernorm"),
    ("head", "head.fc", "head", "classifier"),
)
#: Stored with the weights by some, and made anew here; of transformers' model of masked images what stands for a masked
#: patch, and what predicts its pixels.
EXCLUDED = re.compile(r"\.(attn_mask|relative_position_index)$|^(swin\.)?embeddings\.mask_token$|^decoder\.0\.")
_TABLE = NameTable(("ours", *LAYOUTS), NAMES)
#: Inside a model of transformers 5, as `state_dict()` gives the names -> on disk.
INNER = (
    *((rf"\.attention\.{part[0]}_proj\.", f".attention.self.{part}.") for part in PARTS),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def layout_of(names: Iterable[str]) -> str:
    """Which of LAYOUTS these names are in.

    Without merging only the head distinguishes the two of timm.
    """
    names = set(names)
    if any(name.startswith("swin.") or ".layernorm_before." in name for name in names):
        return "huggingface"
    return "official" if "layers.0.downsample.reduction.weight" in names or "head.weight" in names else "timm"


def to_ours(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Weights as `models.swin.Swin` names them; stored masks and tables of positions are excluded."""
    found = {name: tensor for name, tensor in weights.items() if not EXCLUDED.search(name)}
    if layout == "huggingface":
        if not any(name.startswith("swin.") for name in found):  # the bare SwinModel
            found = {f"swin.{name}": tensor for name, tensor in found.items()}
        found = join_qkv(found)
    return {_TABLE.rename(name, layout, "ours"): tensor for name, tensor in found.items()}


def to_theirs(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """What `to_ours` undoes."""
    found = {_TABLE.rename(name, "ours", layout): tensor for name, tensor in weights.items()}
    return split_qkv(found) if layout == "huggingface" else found


def backend_of(names: Iterable[str]) -> str:
    """The backend of `models.registry` that has tensors of these names, which are ours."""
    return "swin"


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a Swin's tensors, named as ours, show of its `SwinConfig`: all but resolution and rates.

    window_size is the largest window; resolution decides whether a stage has a smaller one.

    Raises:
        KeyError: a tensor that shows a size is missing.
    """
    table = re.compile(r"stages\.(\d{1,9})\.blocks\.(\d{1,9})\.attn\.bias_table")
    blocks = [m for m in map(table.fullmatch, weights) if m]
    n_stages = max(1, len({m[1] for m in blocks}))  # a later stage in the place of one of these is a missing tensor
    first = [f"stages.{s}.blocks.0.attn.bias_table" for s in range(n_stages)]
    patches = weights["patch_embed.proj.weight"]
    sizes = {
        "embed_dim": patches.shape[0],
        "depths": [sum(int(m[1]) == s for m in blocks) for s in range(n_stages)],
        "num_heads": [weights[name].shape[1] for name in first],
        "window_size": max((round(weights[name].shape[0] ** 0.5) + 1) // 2 for name in first),
        "patch_size": patches.shape[-1],
        "mlp_ratio": ratio(weights["stages.0.blocks.0.mlp.fc1.weight"].shape[0], patches.shape[0]),
    }
    if "head.weight" in weights:
        sizes["n_classes"] = weights["head.weight"].shape[0]
    return sizes


# transformers' config.json.

#: Field of `SwinConfig` -> key of theirs.
SIZES = {
    "resolution": "image_size",
    **{name: name for name in ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")},
    "drop_path_rate": "drop_path_rate",
}
#: What a Swin has here, whatever its size: {key of theirs: (value, why)}. A missing key has this value there.
FIXED: dict[str, tuple[Any, str]] = {
    "model_type": ("swin", "another architecture"),
    "num_channels": (3, "images are RGB"),
    "hidden_act": ("gelu", "the exact GELU"),
    "qkv_bias": (True, "query, key and value have biases"),
    "use_absolute_embeddings": (False, "there are no absolute positions"),
    "layer_norm_eps": (1e-5, "inside the root of the norms"),
}


def sizes_from_huggingface(theirs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Their config.json as arguments of `SwinConfig`, but for n_classes, and what cannot be had here, a sentence each.

    image_size and patch_size may be lists of two equal numbers. A missing size is Swin-T's, here as there.
    """
    problems = fixed_problems(theirs, FIXED, "a Swin here")
    sizes = {ours: theirs[key] for ours, key in SIZES.items() if key in theirs}
    sizes.setdefault("drop_path_rate", 0.1)
    for ours, key in (("resolution", "image_size"), ("patch_size", "patch_size")):
        if ours in sizes:
            sizes[ours] = square(sizes[ours])
            if not is_size(sizes[ours]):
                problems.append(f"{key} is {short(sizes[ours])}, expected a whole number, or two that are equal")
    return sizes, problems


def sizes_to_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `sizes_from_huggingface` undoes: the architecture in their config.json.

    Args:
        config: the fields of a `SwinConfig`, as its `to_dict` gives them.

    Raises:
        InputError: a model that transformers' Swin cannot be: windows that are not shifted, or smaller ones in late
            stages than in the first.
    """
    if not config.get("shift", True):
        raise InputError("the windows of this Swin are not shifted, and transformers' always are")
    last = config["resolution"] // (config["patch_size"] * 2 ** (len(config["depths"]) - 1))
    if last < config["window_size"]:
        raise InputError(
            f"the last stage of this Swin has a grid of {last}, smaller than its windows of {config['window_size']}; "
            f"transformers' Swin has no biases for such windows"
        )
    sizes = {key: config[ours] for ours, key in SIZES.items()}
    return {**{key: value for key, (value, _) in FIXED.items()}, **sizes}
