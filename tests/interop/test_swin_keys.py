"""Swin's names in timm, old and new, in the paper's code and in transformers: written out here, and both ways."""

from __future__ import annotations

import pytest
import torch

from igpt_cli.errors import InputError
from igpt_cli.interop.swin_keys import (
    layout_of,
    sizes_from_huggingface,
    sizes_of,
    sizes_to_huggingface,
    to_ours,
    to_theirs,
)
from igpt_cli.models.swin import Swin, SwinConfig

SIZES = {
    "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2, "mlp_ratio": 3.0,
    "n_classes": 5,
}  # fmt: skip


def tensors(**changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Swin(SwinConfig(**{**SIZES, "resolution": 32, **changes})).state_dict()


def block(prefix: str, D: int, A: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.norm1.weight": (D,), f"{prefix}.norm1.bias": (D,),
        f"{prefix}.attn.relative_position_bias_table": (49, A),
        f"{prefix}.attn.qkv.weight": (3 * D, D), f"{prefix}.attn.qkv.bias": (3 * D,),
        f"{prefix}.attn.proj.weight": (D, D), f"{prefix}.attn.proj.bias": (D,),
        f"{prefix}.norm2.weight": (D,), f"{prefix}.norm2.bias": (D,),
        f"{prefix}.mlp.fc1.weight": (3 * D, D), f"{prefix}.mlp.fc1.bias": (3 * D,),
        f"{prefix}.mlp.fc2.weight": (D, 3 * D), f"{prefix}.mlp.fc2.bias": (D,),
    }  # fmt: skip


def theirs(merging: str, head: str) -> dict[str, tuple[int, ...]]:
    return {
        "patch_embed.proj.weight": (8, 3, 2, 2), "patch_embed.proj.bias": (8,),
        "patch_embed.norm.weight": (8,), "patch_embed.norm.bias": (8,),
        **block("layers.0.blocks.0", 8, 2), **block("layers.0.blocks.1", 8, 2),
        f"{merging}.norm.weight": (32,), f"{merging}.norm.bias": (32,), f"{merging}.reduction.weight": (16, 32),
        **block("layers.1.blocks.0", 16, 4),
        "norm.weight": (16,), "norm.bias": (16,), f"{head}.weight": (5, 16), f"{head}.bias": (5,),
    }  # fmt: skip


#: Facts: timm 0.9 and later move merging to the stage it leads into, and the head into a module of its own.
LAYOUTS = {"timm": theirs("layers.1.downsample", "head.fc"), "official": theirs("layers.0.downsample", "head")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_timms_names_both_ways(layout):
    ours = tensors()
    there = to_theirs(ours, layout)
    assert {name: tuple(x.shape) for name, x in there.items()} == LAYOUTS[layout]
    assert layout_of(there) == layout
    back = to_ours(there, layout)
    assert list(back) == list(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_transformers_names_both_ways(tmp_path):
    from safetensors.torch import load_file
    from transformers import SwinConfig as TheirConfig
    from transformers import SwinForImageClassification, SwinModel

    config = TheirConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, mlp_ratio=3.0,
        num_labels=5,
    )  # fmt: skip
    SwinForImageClassification(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ours = to_ours(stored, layout_of(stored))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tensors().items()}
    there = to_theirs(ours, "huggingface")
    assert set(there) == set(stored)
    assert all(torch.equal(there[name], stored[name]) for name in stored)
    SwinModel(config).save_pretrained(tmp_path / "bare")
    stored = load_file(tmp_path / "bare" / "model.safetensors")
    assert layout_of(stored) == "huggingface"
    assert set(to_ours(stored, "huggingface")) == {name for name in tensors() if not name.startswith("head")}


def test_stored_masks_and_tables_are_left_out():
    there = to_theirs(tensors(), "official")
    extra = {
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
    }
    assert set(to_ours({**there, **extra}, "official")) == set(tensors())


def test_what_is_not_swins_keeps_its_name():
    found = to_ours({"layers.0.blocks.0.attn.rope": torch.zeros(1), "absolute_pos_embed": torch.zeros(1)}, "timm")
    assert set(found) == {"layers.0.blocks.0.attn.rope", "absolute_pos_embed"}


def test_headless_files_are_told_apart():
    ours = {name: x for name, x in tensors(n_classes=None).items() if not name.startswith("head")}
    assert [layout_of(to_theirs(ours, layout)) for layout in ("timm", "official", "huggingface")] == [
        "timm", "official", "huggingface",
    ]  # fmt: skip


def test_sizes_are_read_off_the_shapes():
    assert sizes_of(tensors()) == SIZES
    # The second stage's grid, 4, is smaller than the window: what is told is the largest.
    assert sizes_of(tensors(resolution=16, window_size=8))["window_size"] == 8
    assert "n_classes" not in sizes_of(tensors(n_classes=None))
    with pytest.raises(KeyError):
        sizes_of({})


def test_transformers_config_both_ways():
    from transformers import SwinConfig as TheirConfig

    config = SwinConfig(**SIZES, resolution=32, drop_path_rate=0.2)
    there = TheirConfig(**sizes_to_huggingface(config.to_dict()), num_labels=5).to_dict()
    sizes, problems = sizes_from_huggingface(there)
    assert not problems
    assert SwinConfig(**sizes, n_classes=5) == config
    # What they leave out is Swin-T's.
    sizes, problems = sizes_from_huggingface(TheirConfig().to_diff_dict())
    assert not problems
    assert SwinConfig(**sizes) == SwinConfig(drop_path_rate=0.1)


def test_what_is_no_swin_of_ours_or_theirs_is_said():
    other = {"model_type": "swinv2", "hidden_act": "relu", "image_size": [224, 192], "layer_norm_eps": 1e-6}
    _, problems = sizes_from_huggingface(other)
    assert [problem.split(" is ")[0] for problem in problems] == [
        "model_type", "hidden_act", "layer_norm_eps", "image_size",
    ]  # fmt: skip
    with pytest.raises(InputError, match="not shifted"):
        sizes_to_huggingface(SwinConfig(shift=False).to_dict())
    with pytest.raises(InputError, match="a grid of 4, smaller than its windows of 8"):
        sizes_to_huggingface(SwinConfig(depths=(2, 2), num_heads=(3, 6), window_size=8, resolution=32).to_dict())
