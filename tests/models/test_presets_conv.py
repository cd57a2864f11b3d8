"""Presets of ResNet, stand-alone self-attention and attention as convolution: each can be built, small ones run."""

from __future__ import annotations

import pytest
import torch

from igpt_cli.models.presets_conv import PRESETS
from igpt_cli.models.registry import BACKENDS, build_model, count_parameters

#: Parameters with 1000 classes at 224 (the papers' sizes in millions where they give no more), with 10 at 32 and 64.
PARAMETERS = {
    "resnet-18": 11_689_512, "resnet-34": 21_797_672, "resnet-50": 25_557_032, "resnet-18-32": 11_173_962,
    "sasa-26": 10_335_016, "sasa-38": 14_183_016, "sasa-50": 18_031_016,
    "attention-conv": 12_086_844, "attention-conv-learned": 12_278_682, "attention-conv-content": 29_601_882,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_size_and_runs(name):
    preset = PRESETS[name]
    assert preset.name == name
    classes = 1000 if preset.sizes["resolution"] == 224 else 10
    config = BACKENDS[preset.backend][1](**preset.sizes, n_classes=classes)
    with torch.device("meta"):
        model = build_model({"backend": preset.backend, "name": name, **config.to_dict()}).eval()
        logits = model(torch.empty(2, 3, config.resolution, config.resolution))
    assert logits.shape == (2, classes)
    assert count_parameters(model) == PARAMETERS.get(name, count_parameters(model))
    assert model.n_layers == len(model.blocks)
    if "-32" in name or "-64" in name:
        assert model.stage_maps(torch.empty(1, 3, *[config.resolution] * 2, device="meta"), [1])[1].shape[2:] == (
            32,
            32,
        )
