"""ResNets against transformers' ResNet and BiT with the same random weights, published sizes, and laws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from igpt_cli.models.resnet import ResNet, ResNetConfig, pad_same


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random, and for batch norms what they remember of training, too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def small(**changes) -> ResNet:
    sizes = {"depths": (2, 1, 2), "width": 8, "resolution": 32, "n_classes": 5, **changes}
    return randomised(ResNet(ResNetConfig(**sizes)))


def images(n: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


#: From our names to those of transformers' ResNet and BiT.
RESNET = {
    "stem.conv": "embedder.embedder.convolution", "stem.norm": "embedder.embedder.normalization",
    "conv1": "layer.0.convolution", "norm1": "layer.0.normalization", "conv2": "layer.1.convolution",
    "norm2": "layer.1.normalization", "conv3": "layer.2.convolution", "norm3": "layer.2.normalization",
    "shortcut.0": "shortcut.convolution", "shortcut.1": "shortcut.normalization",
}  # fmt: skip
BIT = {
    "stem.conv": "embedder.convolution", "stem.norm": "norm",
    "shortcut.0": "downsample.conv", "shortcut.1": "downsample.norm",
}  # fmt: skip


def renamed(model: ResNet, names: dict[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for key, value in model.state_dict().items():
        module, tensor = key.rsplit(".", 1)
        if module.startswith("stages."):
            _, stage, block, module = module.split(".", 3)
            module = f"encoder.stages.{stage}.layers.{block}.{names.get(module, module)}"
        out[f"{names.get(module, module)}.{tensor}"] = value
    return out


def inputs_of(blocks, call) -> list[torch.Tensor]:
    """What enters each of another library's blocks while `call` runs, and what leaves the last, as (B, H * W, D)."""
    seen: list[torch.Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(2).mT.clone())) for b in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out.flatten(2).mT.clone())))
    call()
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_logits_and_layers_equal_transformers(block):
    from transformers import ResNetConfig as TheirConfig
    from transformers import ResNetForImageClassification

    model = small(block=block)
    c = model.config
    sizes = [c.channels(stage) for stage in (1, 2, 3)]
    other = ResNetForImageClassification(
        TheirConfig(embedding_size=8, hidden_sizes=sizes, depths=[2, 1, 2], layer_type=block, num_labels=5)
    ).eval()
    weights = {f"resnet.{k}": v for k, v in renamed(model, RESNET).items() if not k.startswith("head")}
    other.load_state_dict(weights | {"classifier.1.weight": model.head.weight, "classifier.1.bias": model.head.bias})
    x, logits = images(), []
    blocks = [layer for stage in other.resnet.encoder.stages for layer in stage.layers]
    seen = inputs_of(blocks, lambda: logits.append(other(x).logits))
    torch.testing.assert_close(model(x), logits[0], atol=1e-4, rtol=1e-4)
    ours = model.features(x, range(model.n_layers + 1), pool="none")
    assert len(seen) == len(ours) == 6
    for layer, theirs in enumerate(seen):
        torch.testing.assert_close(ours[layer], theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 37])
def test_the_hybrids_network_equals_transformers_bit(side):
    from transformers import BitConfig, BitModel

    model = small(block="bottleneck", norm="group", width=32, n_classes=None)
    other = BitModel(
        BitConfig(
            embedding_size=32, hidden_sizes=[128, 256, 512], depths=[2, 1, 2], layer_type="bottleneck",
            global_padding="SAME", embedding_dynamic_padding=True,
        )
    ).eval()  # fmt: skip
    weights = {k if k.startswith("encoder") else f"embedder.{k}": v for k, v in renamed(model, BIT).items()}
    weights = {k.replace("embedder.embedder.", "embedder."): v for k, v in weights.items()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("norm.") for name in missing), missing  # of the pre-activation form, and not used here
    x, x_ = images(side=side), []
    other.norm = nn.Identity()
    blocks = [layer for stage in other.encoder.stages for layer in stage.layers]
    seen = inputs_of(blocks, lambda: x_.append(other(x)))
    ours = model.features(x, range(model.n_layers + 1), pool="none")
    for layer, theirs in enumerate(seen):
        torch.testing.assert_close(ours[layer], theirs, atol=1e-4, rtol=1e-4)


#: Published: torchvision's documentation for 18, 34, 50; Ramachandran et al. 2019, table 1, for 26 and 38 (millions).
PARAMETERS = [
    ((2, 2, 2, 2), "basic", 11_689_512),
    ((3, 4, 6, 3), "basic", 21_797_672),
    ((3, 4, 6, 3), "bottleneck", 25_557_032),
    ((1, 2, 4, 1), "bottleneck", 13.7e6),
    ((2, 3, 5, 2), "bottleneck", 19.6e6),
]


@pytest.mark.parametrize(("depths", "block", "expected"), PARAMETERS)
def test_parameter_counts_are_the_published(depths, block, expected):
    with torch.device("meta"):
        model = ResNet(ResNetConfig(depths, block, n_classes=1000))
    found = sum(p.numel() for p in model.parameters())
    assert found == expected if isinstance(expected, int) else round(found / 1e6, 1) == expected / 1e6


def test_flops_are_the_published():
    """3.6 and 3.8 thousand million multiply-adds in table 1 of the paper; v1.5 adds to the 50 layers, to 4.1."""
    from torch.utils.flop_counter import FlopCounterMode

    for depths, block, expected in (((3, 4, 6, 3), "basic", 3.66), ((3, 4, 6, 3), "bottleneck", 4.09)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            ResNet(ResNetConfig(depths, block, n_classes=1000)).eval()(torch.empty(1, 3, 224, 224))
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, abs=0.01)


@torch.no_grad()
def test_maps_of_stages_have_the_stated_shapes_and_stop_early():
    for stem, side, stem_stride in (("7x7", 64, 4), ("3x3", 32, 1), ("3x3-pool", 64, 2)):
        model = small(stem=stem, resolution=side)
        c = model.config
        calls: list[int] = []
        for i, stage in enumerate(model.stages, 1):
            stage.register_forward_hook(lambda *_, i=i, calls=calls: calls.append(i))
        found = model.stage_maps(images(2, side), [2, 0])
        assert (list(found), calls) == ([0, 2], [1, 2])
        for stage, values in found.items():
            n = side // c.stride(stage)
            assert values.shape == (2, c.channels(stage), n, n)
        assert c.stride(0) == c.stride(1) == stem_stride
        assert (c.stride(3), c.channels(3)) == (4 * stem_stride, 32)
        assert model.stage_maps(images(2, side), []) == {}
        torch.testing.assert_close(model.feature_map(images(2, side)), model.stage_maps(images(2, side), [3])[3])
        pyramid = model.pyramid(images(2, side))
        assert list(pyramid) == ["stage1", "stage2", "stage3"]
        for values, stride, channels in zip(pyramid.values(), model.strides, model.channels):
            assert values.shape == (2, channels, side // stride, side // stride)
        with pytest.raises(ValueError, match=r"stages \[4\] requested, this model has the stages 0 \(stem\) to 3"):
            model.stage_maps(images(2, side), [4])


@torch.no_grad()
def test_a_stem_alone_is_a_network():
    model = ResNet(ResNetConfig(depths=(), width=32, norm="group", resolution=64)).eval()
    assert model.feature_map(images(2, 64)).shape == (2, 32, 16, 16)
    assert (model.n_layers, list(model.features(images(2, 64), [0]))) == (0, [0])


@torch.no_grad()
def test_features_come_from_one_pass_that_stops_early():
    model = small()
    x, calls = images(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    found = model.features(x, [2, 0])
    assert (calls, list(found)) == ([0, 1], [0, 2])
    everything = model.features(x, range(6), pool="none")
    assert {layer: tuple(v.shape) for layer, v in everything.items()} == {
        0: (3, 64, 8), 1: (3, 64, 8), 2: (3, 64, 8), 3: (3, 16, 16), 4: (3, 4, 32), 5: (3, 4, 32),
    }  # fmt: skip
    torch.testing.assert_close(found[2], everything[2].mean(1))
    torch.testing.assert_close(model.features(x, [5], pool="max")[5], everything[5].amax(1))
    four = model.features(x, [4], pool="quadrants")[4]  # 2 x 2 places: each is a quarter
    torch.testing.assert_close(four, everything[4].transpose(1, 2).flatten(1))
    torch.testing.assert_close(model.head(everything[5].mean(1)), model(x))
    assert model.features(x, []) == {}


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    for zero in (False, True):
        model = ResNet(ResNetConfig((1, 1), "bottleneck", n_classes=10, resolution=32, zero_init=zero))
        first, second = model.blocks
        assert first.conv2.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
        assert first.norm1.weight.eq(1).all()
        assert second.norm3.weight.eq(0 if zero else 1).all()
        assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
        h = torch.rand(2, 256, 8, 8)
        identity = ResNet(ResNetConfig((2,), "bottleneck", resolution=32, zero_init=zero)).blocks[1]
        assert torch.equal(identity(h), h) == zero


@pytest.mark.parametrize(
    ("n", "kernel", "stride", "before", "after"), [(8, 3, 2, 0, 1), (7, 3, 2, 1, 1), (224, 7, 2, 2, 3), (5, 3, 1, 1, 1)]
)
def test_padding_is_tensorflows_same(n, kernel, stride, before, after):
    padded = pad_same(torch.ones(1, 1, n, n), kernel, stride)[0, 0]
    assert padded.sum() == n * n
    for line in (padded[before], padded[:, before]):
        assert line.tolist() == [0.0] * before + [1.0] * n + [0.0] * after


def test_unknown_layers_pools_and_sizes_are_refused():
    model = small()
    for layers, pool, message in (
        ([6], "mean", r"layers \[6\] requested, this model has the layers 0 to 5"),
        ([1], "median", "pool is 'median', expected one of mean, quadrants, max, none"),
        ([1], "last", "pool is 'last', the class token, and this model has none"),
    ):
        with pytest.raises(ValueError, match=message):
            model.features(images(), layers, pool)
    for changes, message in (
        ({"depths": (2, 0)}, r"depths\[1\] is 0"),
        ({"block": "wide"}, "block is 'wide', expected one of basic, bottleneck"),
        ({"stem": "5x5"}, "stem is '5x5', expected one of 7x7, 3x3, 3x3-pool"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"norm": "group", "width": 16}, "width 16 does not divide into 32 groups"),
        ({"resolution": 8}, "resolution 8 is less than the network's stride, 16"),
        ({"n_classes": 1}, "n_classes is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    with pytest.raises(ValueError, match="no class head"):
        small(n_classes=None)(images())


def test_a_config_comes_back_from_plain_data():
    import json

    config = ResNetConfig((3, 4, 9), "bottleneck", norm="group")
    stored = json.loads(json.dumps(config.to_dict()))
    assert "n_classes" not in stored
    assert ResNetConfig(**stored) == config
