"""Presets of ViT and DeiT: the papers' sizes, and small-image forms.

ViT's Ti and S are those of its code and of DeiT; its paper has B, L and H. Accuracies are top-1 on ImageNet: of ViT at
384 pixels after pretraining on ImageNet-21k (table 5), of DeiT trained on ImageNet alone (table 5). The number in a
hybrid's name, as in any other's, is the pixels from one token to the next.
"""

from __future__ import annotations

from typing import Any

from igpt_cli.models.presets import Preset

#: (embed_dim, depth, num_heads); the MLP is four times as wide.
_TI, _S, _B, _L, _H = (192, 12, 3), (384, 12, 6), (768, 12, 12), (1024, 24, 16), (1280, 32, 16)


def _vit(name: str, size: tuple[int, int, int], patch_size: int, about: str, **more: Any) -> Preset:
    return _preset(name, "vit", size, patch_size, about, **more)


def _deit(name: str, size: tuple[int, int, int], about: str, distilled: bool = False, **more: Any) -> Preset:
    backend = "deit_distilled" if distilled else "deit"
    return _preset(name, backend, size, **{"patch_size": 16, "about": about, "drop_path_rate": 0.1, **more})


def _preset(name: str, backend: str, size: tuple[int, int, int], patch_size: int, about: str, **more: Any) -> Preset:
    sizes: dict[str, Any] = dict(zip(("embed_dim", "depth", "num_heads"), size))
    return Preset(name, backend, {**sizes, "patch_size": patch_size, "resolution": 224, **more}, {}, {}, about)


# Each has 64 tokens, where iGPT has 1,024 or 4,096.
_AT_32: dict[str, Any] = {"resolution": 32, "patch_size": 4}
_AT_64: dict[str, Any] = {"resolution": 64, "patch_size": 8}

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        _vit("vit-ti16", _TI, 16, "5.7M, of ViT's code"),
        _vit("vit-s16", _S, 16, "22M, of ViT's code"),
        _vit("vit-b16", _B, 16, "paper: 86M, ImageNet-21k first, 84.0%"),
        _vit("vit-b32", _B, 32, "paper: 88M, ImageNet-21k first, 81.3%"),
        _vit("vit-l16", _L, 16, "paper: 307M, ImageNet-21k first, 85.2%"),
        _vit("vit-l32", _L, 32, "paper: 307M, ImageNet-21k first, 81.0%"),
        _vit("vit-h14", _H, 14, "paper: 632M, ImageNet-21k first, 85.1%"),
        _vit("vit-b16-384", _B, 16, "384x384", resolution=384),
        _vit("vit-l16-384", _L, 16, "384x384", resolution=384),
        _vit("vit-r50-b16", _B, 16, "hybrid: ResNet of stages 3, 4, 9", hybrid=(3, 4, 9)),
        _vit("vit-r26-b32", _B, 32, "hybrid: ResNet of stages 2, 2, 2, 2", hybrid=(2, 2, 2, 2)),
        _vit("vit-r50-l32", _L, 32, "hybrid: ResNet of stages 3, 4, 6, 3", hybrid=(3, 4, 6, 3)),
        _vit("vit-r26-s32", _S, 32, "hybrid: ResNet of stages 2, 2, 2, 2", hybrid=(2, 2, 2, 2)),
        # The papers' code calls it R+Ti/16 and counts the stem as 2 pixels instead of 4.
        _vit("vit-r-ti32", _TI, 32, "hybrid: a ResNet's stem alone", hybrid=()),
        _vit("vit-ti-32", _TI, 4, "32x32, patches of 4", resolution=32),
        _vit("vit-s-32", _S, 4, "32x32, patches of 4", resolution=32),
        _vit("vit-ti-64", _TI, 8, "64x64, patches of 8", resolution=64),
        _vit("vit-s-64", _S, 8, "64x64, patches of 8", resolution=64),
        _deit("deit-ti", _TI, "paper: 5M, ImageNet 72.2%"),
        _deit("deit-s", _S, "paper: 22M, ImageNet 79.8%"),
        _deit("deit-b", _B, "paper: 86M, ImageNet 81.8%"),
        _deit("deit-b-384", _B, "paper: 86M, 384x384, ImageNet 83.1%", resolution=384),
        _deit("deit-ti-distilled", _TI, "paper: 6M, ImageNet 74.5%", True),
        _deit("deit-s-distilled", _S, "paper: 22M, ImageNet 81.2%", True),
        _deit("deit-b-distilled", _B, "paper: 87M, ImageNet 83.4%", True),
        _deit("deit-b-distilled-384", _B, "paper: 87M, 384x384, ImageNet 84.5%", True, resolution=384),
        _deit("deit-ti-32", _TI, "32x32, patches of 4", **_AT_32),
        _deit("deit-ti-64", _TI, "64x64, patches of 8", **_AT_64),
        _deit("deit-ti-distilled-32", _TI, "32x32, patches of 4", True, **_AT_32),
        _deit("deit-ti-distilled-64", _TI, "64x64, patches of 8", True, **_AT_64),
    )
}
