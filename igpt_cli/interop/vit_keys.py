"""ViT's and DeiT's tensor names and sizes in timm and transformers.

Pure functions on {name: tensor} and on their config.json. A name that is not in the table is left as it is, for the
caller to find.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any

from torch import Tensor

from igpt_cli.errors import InputError
from igpt_cli.interop.keys import PARTS, NameTable, fixed_problems, is_size, join_qkv, ratio, split_qkv, square

#: timm, and Facebook's DeiT; transformers' ViTForImageClassification, DeiTForImageClassification (with both tokens and
#: one head) and DeiTForImageClassificationWithTeacher, on disk.
LAYOUTS = ("timm", "vit", "deit", "deit_with_teacher")

#: (our name, transformers' below "vit." or "deit."), of what all of them have. Query, key and value are apart there,
#: which `split_qkv` and `join_qkv` see to.
_BODY = (
    ("cls_token", "embeddings.cls_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    *(
        (f"blocks.{{b}}.{ours}", f"encoder.layer.{{b}}.{theirs}")
        for ours, theirs in (
            ("norm1", "layernorm_before"),
            ("attn.qkv", "attention.attention.qkv"),
            ("attn.proj", "attention.output.dense"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        )
    ),
    ("norm", "layernorm"),
)
#: (our name, its name in each of LAYOUTS).
NAMES: tuple[tuple[str, ...], ...] = (
    *((ours, ours, f"vit.{theirs}", f"deit.{theirs}", f"deit.{theirs}") for ours, theirs in _BODY),
    ("head", "head", "classifier", "classifier", "cls_classifier"),
    ("head_dist", "head_dist", "distillation_classifier", "distillation_classifier", "distillation_classifier"),
)
_TABLE = NameTable(("ours", *LAYOUTS), NAMES)
#: Inside a model of transformers 5, as `state_dict()` gives the names -> on disk.
INNER = (
    (r"^((?:vit|deit)\.)?layers\.(?=\d)", r"\1encoder.layer."),
    *((rf"\.attention\.{part[0]}_proj\.", f".attention.attention.{part}.") for part in PARTS),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
#: Of transformers' bare ViTModel and DeiTModel: a map of the class token after the norm, which no class head reads; of
#: their models of masked images what stands for a masked patch, and what predicts its pixels.
EXCLUDED = re.compile(r"^((vit|deit)\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)$|^decoder\.0\.")


def layout_of(names: Iterable[str]) -> str:
    """Which of LAYOUTS these names are in."""
    names = set(names)
    if not any("embeddings.patch_embeddings.projection" in name for name in names):
        return "timm"
    if not any(name.endswith("embeddings.distillation_token") for name in names):
        return "vit"
    return "deit" if "classifier.weight" in names else "deit_with_teacher"


def to_ours(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Weights as `models.vit.ViT` and the models of `models.deit` name them; a pooler is excluded."""
    found = {name: tensor for name, tensor in weights.items() if not EXCLUDED.search(name)}
    if layout != "timm":
        root = layout.split("_")[0]
        if not any(name.startswith(f"{root}.") for name in found):  # the bare ViTModel, DeiTModel
            found = {f"{root}.{name}": tensor for name, tensor in found.items()}
        found = join_qkv(found)
    return {_TABLE.rename(name, layout, "ours"): tensor for name, tensor in found.items()}


def to_theirs(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """What `to_ours` undoes."""
    found = {_TABLE.rename(name, "ours", layout): tensor for name, tensor in weights.items()}
    return found if layout == "timm" else split_qkv(found)


def backend_of(names: Iterable[str]) -> str:
    """The backend of `models.registry` that has tensors of these names, which are ours. A plain DeiT is as a ViT."""
    names = set(names)
    if "dist_token" not in names:
        return "vit"
    return "deit_two_tokens" if "head.weight" in names and "head_dist.weight" not in names else "deit_distilled"


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of tensors, named as ours, show of the `ViTConfig`: all but num_heads, norm_eps and rates.

    Raises:
        KeyError: a tensor that shows a size is missing.
        ValueError: the positions are of no square grid of patches.
    """
    blocks = {int(m[1]) for m in map(re.compile(r"blocks\.(\d{1,9})\.norm1\.weight").fullmatch, weights) if m}
    D, _, patch_size = weights["patch_embed.proj.weight"].shape[:3]
    n_tokens = 1 + ("dist_token" in weights)
    rows = weights["pos_embed"].shape[-2] - n_tokens
    if math.isqrt(rows + n_tokens) ** 2 == rows + n_tokens > 1:
        raise ValueError(
            f"pos_embed has {rows + n_tokens} rows, one a patch and none for the class token, as in DeiT III; igpt has "
            f"a position for each token"
        )
    if rows < 1 or math.isqrt(rows) ** 2 != rows:
        raise ValueError(f"pos_embed has {rows} rows for patches, which is no square grid")
    sizes = {
        "embed_dim": D,
        "depth": len(blocks),
        "mlp_ratio": ratio(weights["blocks.0.mlp.fc1.weight"].shape[0], D),
        "patch_size": patch_size,
        "resolution": math.isqrt(rows) * patch_size,
    }
    if "head.weight" in weights:
        sizes["n_classes"] = weights["head.weight"].shape[0]
    return sizes


def check_published_form(config: Mapping[str, Any]) -> None:
    """
    Args:
        config: the fields of a `ViTConfig`, as its `to_dict` gives them.

    Raises:
        InputError: a ViT that only igpt has.
    """
    problems = []
    if config["pos_embed"] != "learned-1d":
        problems.append(f"its positions are {config['pos_embed']!r}, theirs are one learned vector a token")
    if config["global_pool"] != "token":
        problems.append("its head reads the mean over patches, theirs the class token")
    if config.get("hybrid") is not None:
        problems.append("its patches are those of a ResNet, whose tensors are not exchanged")
    if problems:
        raise InputError(f"this ViT has no counterpart in timm and transformers: {'; '.join(problems)}")


# transformers' config.json.

#: Field of `ViTConfig` -> (key of theirs, their default).
SIZES: dict[str, tuple[str, Any]] = {
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "patch_size": ("patch_size", 16),
    "resolution": ("image_size", 224),
    "norm_eps": ("layer_norm_eps", 1e-12),
}
HIDDEN = ("intermediate_size", 3072)
#: What a ViT has here, whatever its size: {key of theirs: (value, why)}. A missing key has this value there.
FIXED: dict[str, tuple[Any, str]] = {
    "num_channels": (3, "images are RGB"),
    "hidden_act": ("gelu", "the exact GELU"),
    "qkv_bias": (True, "query, key and value have biases"),
}


def sizes_from_huggingface(theirs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Their config.json as arguments of `ViTConfig`, but for n_classes, and what cannot be had here, a sentence each.

    image_size and patch_size may be lists of two equal numbers. A missing size is ViT-B/16's, here as there.
    """
    problems = fixed_problems(theirs, FIXED, "a ViT here")
    sizes = {ours: theirs.get(key, default) for ours, (key, default) in SIZES.items()}
    for ours in ("resolution", "patch_size"):
        sizes[ours] = square(sizes[ours])
    eps, hidden = sizes["norm_eps"], theirs.get(*HIDDEN)
    whole = {SIZES[ours][0]: value for ours, value in sizes.items() if ours != "norm_eps"} | {HIDDEN[0]: hidden}
    problems += [
        f"{key} is {short(value)}, expected a whole number of at least 1"
        for key, value in whole.items()
        if not is_size(value)
    ]
    if not isinstance(eps, float):
        problems.append(f"{SIZES['norm_eps'][0]} is {short(eps)}, expected a small number above 0")
    if not problems:
        sizes["mlp_ratio"] = ratio(hidden, sizes["embed_dim"])
    return sizes, problems


def sizes_to_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `sizes_from_huggingface` undoes: the architecture in their config.json.

    Args:
        config: the fields of a `ViTConfig`, as its `to_dict` gives them.

    Raises:
        InputError: a ViT that transformers does not have.
    """
    check_published_form(config)
    sizes = {key: config[ours] for ours, (key, _) in SIZES.items()}
    return {
        **{key: value for key, (value, _) in FIXED.items()},
        **sizes,
        HIDDEN[0]: int(config["mlp_ratio"] * config["embed_dim"]),
    }
