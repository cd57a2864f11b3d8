"""Presets of Swin: the paper's T, S, B, L (section 3.3), and small-image forms.

Rates of stochastic depth are those of the paper's training on ImageNet-1k (T 0.2, S 0.3, B 0.5); L was trained on
ImageNet-22k with 0.2, and models at 384 pixels are fine-tuned with 0.1 (B) and 0.2 (L).
"""

from __future__ import annotations

from typing import Any

from igpt_cli.models.presets import Preset


def _swin(name: str, dim: int, depths: tuple, heads: tuple, drop_path_rate: float, about: str, **more: int) -> Preset:
    sizes: dict[str, Any] = {"embed_dim": dim, "depths": depths, "num_heads": heads, "window_size": 7, "patch_size": 4}
    return Preset(name, "swin", {**sizes, "drop_path_rate": drop_path_rate, "resolution": 224, **more}, {}, {}, about)


_T, _S = (2, 2, 6, 2), (2, 2, 18, 2)
_T_HEADS, _B_HEADS, _L_HEADS = (3, 6, 12, 24), (4, 8, 16, 32), (6, 12, 24, 48)
_384: dict[str, Any] = {"resolution": 384, "window_size": 12}

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        _swin("swin-t", 96, _T, _T_HEADS, 0.2, "paper: 29M, 4.5G, ImageNet 81.3%"),
        _swin("swin-s", 96, _S, _T_HEADS, 0.3, "paper: 50M, 8.7G, ImageNet 83.0%"),
        _swin("swin-b", 128, _S, _B_HEADS, 0.5, "paper: 88M, 15.4G, ImageNet 83.5%"),
        _swin("swin-l", 192, _S, _L_HEADS, 0.2, "paper: 197M, 34.5G, ImageNet-22k first"),
        _swin("swin-b-384", 128, _S, _B_HEADS, 0.1, "paper: 88M, 47.0G, ImageNet 84.5%", **_384),
        _swin("swin-l-384", 192, _S, _L_HEADS, 0.2, "paper: 197M, 103.9G, ImageNet-22k first, 87.3%", **_384),
        # Grids of 16, 8, 4 and 2 patches. With patches of 4 pixels a 32-pixel image would end in a single token.
        _swin("swin-t-32", 96, _T, _T_HEADS, 0.2, "32x32, patches of 2", resolution=32, patch_size=2, window_size=4),
        _swin("swin-t-64", 96, _T, _T_HEADS, 0.2, "64x64, patches of 4", resolution=64, window_size=4),
    )
}
