"""The models between convolution and attention by name, as data: ResNets (He et al. 2016), stand-alone self-attention
(Ramachandran et al. 2019) and attention as convolution (Cordonnier et al. 2020); forms for small images are ours.

Accuracies are top-1 on ImageNet, as the papers give them; those of ResNet are of Ramachandran's table 1, where there
are any.
"""

from __future__ import annotations

from typing import Any

from igpt_cli.models.presets import Preset


def _resnet(name: str, depths: tuple[int, ...], block: str, about: str, **more: Any) -> Preset:
    sizes = {"depths": depths, "block": block, "stem": "7x7", "resolution": 224, **more}
    return Preset(name, "resnet", sizes, {}, {}, about)


def _sasa(name: str, depths: tuple[int, ...], about: str, **more: Any) -> Preset:
    sizes = {"depths": depths, "stem": "attention", "window": 7, "num_heads": 8, "resolution": 224, **more}
    return Preset(name, "local_attention", sizes, {}, {}, about)


def _conv(name: str, positions: str, about: str, **more: Any) -> Preset:
    sizes = {"depth": 6, "num_heads": 9, "embed_dim": 400, "positions": positions, "resolution": 32, **more}
    return Preset(name, "attention_conv", sizes, {}, {}, about)


_18, _26, _34, _38 = (2, 2, 2, 2), (1, 2, 4, 1), (3, 4, 6, 3), (2, 3, 5, 2)
_50 = _34
#: Stems that leave 32 x 32 positions to the first stage.
_AT_32, _AT_64 = {"stem": "3x3", "resolution": 32}, {"stem": "3x3-pool", "resolution": 64}

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        _resnet("resnet-18", _18, "basic", "paper: 11.7M, 1.8G"),
        _resnet("resnet-34", _34, "basic", "paper: 21.8M, 3.6G"),
        _resnet("resnet-50", _50, "bottleneck", "v1.5: 25.6M, 4.1G, ImageNet 76.9%"),
        _resnet("resnet-18-32", _18, "basic", "32x32, the stem 3x3", **_AT_32),
        _resnet("resnet-34-32", _34, "basic", "32x32, the stem 3x3", **_AT_32),
        _resnet("resnet-50-32", _50, "bottleneck", "32x32, the stem 3x3", **_AT_32),
        _resnet("resnet-18-64", _18, "basic", "64x64, the stem 3x3 and pooling", **_AT_64),
        _resnet("resnet-34-64", _34, "basic", "64x64, the stem 3x3 and pooling", **_AT_64),
        _resnet("resnet-50-64", _50, "bottleneck", "64x64, the stem 3x3 and pooling", **_AT_64),
        _sasa("sasa-26", _26, "paper: 10.3M, 2.4G, ImageNet 74.8%"),
        _sasa("sasa-38", _38, "paper: 14.1M, 3.0G, ImageNet 76.9%"),
        _sasa("sasa-50", _50, "paper: 18.0M, 3.6G, ImageNet 77.6%"),
        _sasa("sasa-26-32", _26, "32x32, the stem a 3x3 convolution", **_AT_32),
        _sasa("sasa-26-64", _26, "64x64, the stem a 3x3 convolution and pooling", **_AT_64),
        _conv("attention-conv", "quadratic", "paper: 12.1M, CIFAR-10 93.8%"),
        _conv("attention-conv-learned", "learned", "paper: 12.3M, learned relative positions"),
        _conv("attention-conv-content", "learned+content", "paper: 29.5M, learned positions and content"),
    )
}
