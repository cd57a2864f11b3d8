"""Swin against transformers' Swin with the same random weights, brute force over pixels, published sizes, and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from igpt_cli.interop.swin_keys import to_theirs
from igpt_cli.models.presets_swin import PRESETS
from igpt_cli.models.stochastic_depth import StochasticDepth, depth_rates
from igpt_cli.models.swin import PatchMerging, Swin, SwinConfig, resize_windows
from igpt_cli.models.windows import partition, relative_positions, resize_bias_table, shift_mask, unpartition

TOY = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "patch_size": 2, "window_size": 4, "n_classes": 5}


def small(**changes) -> Swin:
    """A toy with every parameter random: grids of 16, 8, 4 patches."""
    torch.manual_seed(0)
    model = Swin(SwinConfig(**{"resolution": 32, **TOY, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def images(*sides: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, *(sides * 2)[:2], generator=torch.Generator().manual_seed(1))


def peer(model: Swin, tmp_path):
    """transformers' Swin with the weights of ours, read from a folder as it writes them."""
    from safetensors.torch import save_file
    from transformers import SwinConfig as TheirConfig
    from transformers import SwinForImageClassification

    c = model.config
    TheirConfig(
        image_size=c.resolution, patch_size=c.patch_size, embed_dim=c.embed_dim, depths=list(c.depths),
        num_heads=list(c.num_heads), window_size=c.window_size, mlp_ratio=c.mlp_ratio, num_labels=c.n_classes,
    ).save_pretrained(tmp_path)  # fmt: skip
    save_file(to_theirs(model.state_dict(), "huggingface"), tmp_path / "model.safetensors", {"format": "pt"})
    other, told = SwinForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    if not c.shift:
        for stage in other.swin.encoder.layers:
            for block in stage.blocks:
                block.shift_size = 0
    return other.eval()


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("sides", [(32,), (64, 48), (44, 52), (37, 53)], ids=str)
def test_logits_and_layers_equal_transformers(tmp_path, shift, sides):
    """32 pixels fit; 64 x 48 are whole windows; the others are padded to whole patches, windows and merged grids."""
    model = small(shift=shift)
    other, x, seen = peer(model, tmp_path), images(*sides), []
    blocks = [block for stage in other.swin.encoder.layers for block in stage.blocks]
    for module in [*(block.layernorm_before for block in blocks), other.swin.layernorm]:
        module.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    torch.testing.assert_close(model(x), other(x).logits, atol=1e-4, rtol=1e-4)
    ours = model.features(x, range(model.n_layers + 1), pool="none")
    assert len(seen) == len(ours) == 7
    for layer, theirs in enumerate(seen):
        torch.testing.assert_close(ours[layer], theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_shifting_changes_what_odd_blocks_give():
    x = images(32)
    with_, without = small(), small(shift=False)
    a, b = (model.features(x, [1, 2]) for model in (with_, without))
    torch.testing.assert_close(a[1], b[1], atol=0, rtol=0)
    assert (a[2] - b[2]).abs().max() > 1e-3


@torch.no_grad()
def test_pyramid_equals_transformers_backbone(tmp_path):
    from transformers import SwinBackbone

    model = small()
    peer(model, tmp_path).save_pretrained(tmp_path)
    names = ["stage1", "stage2", "stage3"]
    other = SwinBackbone.from_pretrained(tmp_path, out_features=names).eval()
    other.hidden_states_norms["stage3"].load_state_dict(model.norm.state_dict())  # the others: gain 1, bias 0
    for sides in ((64,), (76, 90)):  # every grid is larger than a window: their backbone shifts smaller ones, too
        x = images(*sides)
        maps = model.pyramid(x)
        assert list(maps) == names
        assert (model.strides, model.channels) == ((2, 4, 8), (8, 16, 32))
        for ours, theirs, stride, channels in zip(
            maps.values(), other(x).feature_maps, model.strides, model.channels, strict=True
        ):
            assert ours.shape == (2, channels, *(math.ceil(side / stride) for side in x.shape[2:]))
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Windows.


def test_partition_and_back():
    x = torch.arange(2 * 6 * 9 * 5).view(2, 6, 9, 5)
    windows = partition(x, 3)
    assert windows.shape == (2, 6, 9, 5)
    assert torch.equal(windows[1, 4], x[1, 3:6, 3:6].reshape(9, 5))  # second row of windows, second of it
    assert torch.equal(unpartition(windows, 6, 9), x)


@pytest.mark.parametrize(("H", "W", "M", "shift"), [(8, 8, 4, 2), (14, 21, 7, 3), (6, 9, 3, 1)])
def test_mask_lets_see_what_lay_together_in_the_image(H, W, M, shift):
    """Two pixels of a shifted window see each other if no edge of the image lies between them."""
    mask = shift_mask(H, W, M, shift)
    assert mask.shape == (H * W // M**2, M * M, M * M)
    for w in range(len(mask)):
        row, column = divmod(w, W // M)
        # Where each pixel of the window lies in the image, and whether it came round the edge.
        places = [(row * M + y + shift, column * M + x + shift) for y in range(M) for x in range(M)]
        for i, (y1, x1) in enumerate(places):
            for j, (y2, x2) in enumerate(places):
                together = (y1 >= H) == (y2 >= H) and (x1 >= W) == (x2 >= W)
                assert mask[w, i, j] == (0 if together else -100)


@torch.no_grad()
def test_shifted_attention_equals_attention_pixel_by_pixel():
    """Each query on its own: the keys are the pixels of its shifted window that lie in the image."""
    H, M, s = 12, 4, 2
    block = small(resolution=48, depths=(2,), num_heads=(2,), patch_size=4).stages[0].blocks[1]
    assert (block.window, block.shift, block.attn.num_heads) == (M, s, 2)
    x = torch.randn(1, H, H, 8, generator=torch.Generator().manual_seed(2))
    q, k, v = block.attn.qkv(x[0]).view(H, H, 3, 2, 4).unbind(2)  # each (H, H, A, K)
    expected = torch.zeros(H, H, 8)
    for y in range(H):
        for z in range(H):
            keys = [
                (y2, z2)
                for y2 in range(H)
                for z2 in range(H)
                if (y2 - s) // M == (y - s) // M and (z2 - s) // M == (z - s) // M
            ]
            for head in range(2):
                scores = torch.stack([q[y, z, head] @ k[y2, z2, head] / 4**0.5 for y2, z2 in keys])
                rows = [(y - y2 + M - 1) * (2 * M - 1) + z - z2 + M - 1 for y2, z2 in keys]
                weights = (scores + block.attn.bias_table[rows, head]).softmax(0)
                expected[y, z, 4 * head : 4 * head + 4] = weights @ torch.stack([v[p][head] for p in keys])
    torch.testing.assert_close(block.attend(x)[0], block.attn.proj(expected), atol=1e-5, rtol=1e-4)


def test_relative_positions_of_a_2x2_window():
    # Query (0, 0) and key (1, 1): (-1 + 1) * 3 - 1 + 1 = 0.
    assert relative_positions(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


@torch.no_grad()
def test_merging_takes_rows_first():
    merge = PatchMerging(1)
    merge.norm = nn.Identity()
    merge.reduction.weight.copy_(torch.tensor([[1.0, 10, 100, 1000], [0, 0, 0, 1]]))
    x = torch.tensor([[1.0, 2], [3, 4]]).view(1, 2, 2, 1)
    assert merge(x).flatten().tolist() == [1 + 30 + 200 + 4000, 4]


def cubic(t: float, a: float = -0.75) -> float:
    """Keys' kernel, as torch's bicubic has it."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resized(grid: np.ndarray, side: int) -> np.ndarray:
    """(n, n) -> (side, side): bicubic, pixels as areas, the border repeated."""
    n = len(grid)
    out = np.zeros((side, side))
    for y in range(side):
        for x in range(side):
            cy, cx = (y + 0.5) * n / side - 0.5, (x + 0.5) * n / side - 0.5
            for j in range(math.floor(cy) - 1, math.floor(cy) + 3):
                for i in range(math.floor(cx) - 1, math.floor(cx) + 3):
                    at = grid[min(max(j, 0), n - 1), min(max(i, 0), n - 1)]
                    out[y, x] += cubic(cy - j) * cubic(cx - i) * at
    return out


@pytest.mark.parametrize(("M", "wanted"), [(4, 7), (7, 4), (3, 3)])
def test_bias_tables_are_resized_as_pictures(M, wanted):
    table = torch.randn((2 * M - 1) ** 2, 3, generator=torch.Generator().manual_seed(3))
    found = resize_bias_table(table, wanted)
    assert found.shape == ((2 * wanted - 1) ** 2, 3)
    for head in range(3):
        expected = resized(table[:, head].view(2 * M - 1, -1).double().numpy(), 2 * wanted - 1)
        np.testing.assert_allclose(found[:, head].view(2 * wanted - 1, -1).numpy(), expected, atol=1e-5)


def test_a_table_of_no_square_window_is_refused():
    with pytest.raises(ValueError, match="48 rows"):
        resize_bias_table(torch.zeros(48, 2), 4)


@torch.no_grad()
def test_weights_move_to_another_window():
    small_, large = small(), small(resolution=48, window_size=6)
    weights = resize_windows(small_.state_dict(), large.config)
    large.load_state_dict(weights)
    assert large.stages[0].blocks[0].attn.bias_table.shape == (121, 1)
    same = {k: v for k, v in small_.state_dict().items() if "bias_table" not in k}
    assert all(torch.equal(weights[k], v) for k, v in same.items())
    assert large(images(48)).isfinite().all()


# Sizes.

#: Published parameters (paper, table 7; counted from the released weights), and multiply-adds in 1e9 as its code counts.
PUBLISHED = [
    ("swin-t", 28_288_354, 4.494),
    ("swin-s", 49_606_258, 8.747),
    ("swin-b", 87_768_224, 15.438),
    ("swin-l", 196_532_476, 34.487),
    ("swin-b-384", 87_903_584, 47.105),
    ("swin-l-384", 196_735_516, 103.9),
]


@pytest.mark.parametrize(("name", "parameters", "multiply_adds"), PUBLISHED)
def test_presets_have_the_published_sizes(name, parameters, multiply_adds):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = Swin(SwinConfig(**PRESETS[name].sizes, n_classes=1000)).eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model(torch.empty(1, 3, *[model.config.resolution] * 2)).shape == (1, 1000)
    # Theirs counts norms besides.
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=2e-3)


def test_presets_have_the_papers_stochastic_depth():
    rates = {name: PRESETS[name].sizes["drop_path_rate"] for name, _, _ in PUBLISHED}
    assert rates == {
        "swin-t": 0.2, "swin-s": 0.3, "swin-b": 0.5, "swin-l": 0.2, "swin-b-384": 0.1, "swin-l-384": 0.2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["swin-t-32", "swin-t-64"])
def test_small_presets_have_several_windows_and_no_lone_token(name):
    config = SwinConfig(**PRESETS[name].sizes, n_classes=10)
    assert config.resolution == int(name.rpartition("-")[2])
    assert config.grid(0) > config.window(0) > 1
    assert config.grid(3) > 1
    with torch.device("meta"), torch.no_grad():
        assert Swin(config).eval()(torch.empty(2, 3, config.resolution, config.resolution)).shape == (2, 10)


def test_a_stage_no_larger_than_the_window_is_one_window():
    model = small(resolution=16, depths=(2, 2, 2), window_size=8)  # grids 8, 4, 2
    assert [stage.blocks[1].window for stage in model.stages] == [8, 4, 2]
    assert [len(stage.blocks[1].attn.bias_table) for stage in model.stages] == [225, 49, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 32, "patch_size": 4, "depths": (2, 2), "num_heads": (2, 2), "window_size": 7}, "8 or 4"),
        ({"resolution": 36}, "multiple of 8, such as 32 or 40"),
        ({"num_heads": (1, 2)}, "differ in length"),
        ({"num_heads": (3, 2, 4)}, "width of 8"),
        ({"drop_path_rate": 1.0}, "less than 1"),
        ({"window_size": 0}, "window_size is 0"),
        ({"n_classes": 1}, "at least 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SwinConfig(**{"resolution": 32, **TOY, **changes})


# Laws.


def test_initial_values():
    torch.manual_seed(0)
    model = Swin(SwinConfig(embed_dim=32, depths=(2, 2), num_heads=(2, 4), resolution=56, n_classes=10))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif name.startswith("patch_embed"):
            bound = 1 / math.sqrt(3 * 4 * 4)
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name


@torch.no_grad()
def test_features_stop_early_and_pool():
    model, x = small(), images(32)
    all_ = model.features(x, range(7), pool="none")
    assert [v.shape[1:] for v in all_.values()] == [(256, 8)] * 2 + [(64, 16)] * 2 + [(16, 32)] * 3
    model.stages[2].register_forward_pre_hook(lambda *_: pytest.fail("the pass went on"))
    model.stages[2].merge.register_forward_pre_hook(lambda *_: pytest.fail("the pass went on"))
    found = model.features(x, [3, 0, 3])
    assert list(found) == [0, 3]
    torch.testing.assert_close(found[3], all_[3].mean(1))
    torch.testing.assert_close(model.features(x, [3], "max")[3], all_[3].amax(1))
    assert model.features(x, []) == {}
    for layers, pool, message in (([7], "mean", "0 to 6"), ([0], "last", "class token"), ([0], "sum", "expected one")):
        with pytest.raises(ValueError, match=message):
            model.features(x, layers, pool)


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False])
def test_attention_between_all_places_is_what_the_blocks_use(shift):
    model, x = small(shift=shift), images(32)
    found, calls = model.attention(x, range(6)), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    assert list(model.attention(x, [2, 0])) == [0, 2]
    assert calls == [0, 1]
    normed = model.features(x, range(6), pool="none")
    for layer, (block, p) in enumerate(zip(model.blocks, found.values())):
        n, A, side = normed[layer], block.attn.num_heads, (16, 8, 4)[layer // 2]
        assert p.shape == (2, A, side**2, side**2)
        torch.testing.assert_close(p.sum(-1), torch.ones(2, A, side**2))
        v = block.attn.qkv(n).unflatten(-1, (3, A, -1))[:, :, 2].transpose(1, 2)
        y = block.attn.proj((p @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(y, block.attend(n.unflatten(1, (side, side))).flatten(1, 2), atol=1e-5, rtol=1e-4)
        assert ((p > 1e-30).sum(-1) <= 16).all()  # a window of 4 x 4
    padded = model.attention(images(36), [0, 1])
    for p in padded.values():
        assert p.shape == (2, 1, 18**2, 18**2)
        assert (p.sum(-1) < 1 + 1e-5).all()
        torch.testing.assert_close(p.sum(-1)[..., 0], torch.ones(2, 1))  # the first window has no padding
    assert model.attention(x, []) == {}
    with pytest.raises(ValueError, match=r"layers \[6\] requested; attention is in the layers 0 to 5"):
        model.attention(x, [6])


@torch.no_grad()
def test_the_head_reads_the_mean_of_the_last_layer():
    model, x = small(), images(32)
    torch.testing.assert_close(model(x), model.head(model.features(x, [6])[6]))
    with pytest.raises(ValueError, match="no class head"):
        small(n_classes=None)(x)


def test_config_round_trip_and_fresh_tables():
    config = SwinConfig(**{"resolution": 32, **TOY, "shift": False})
    assert SwinConfig(**config.to_dict()) == config
    assert not any("positions" in key for key in Swin(config).state_dict())


def test_gradients_reach_every_parameter_and_half_precision_runs():
    model = small(drop_path_rate=0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images(32, n=4)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(block.attn.bias_table.grad.any() for block in model.blocks[1:])


def test_stochastic_depth_leaves_out_images_and_keeps_the_mean():
    drop = StochasticDepth(0.25)
    x = torch.ones(20_000, 2, 3)
    torch.manual_seed(0)
    found = drop.train()(x)
    assert torch.equal(found, found[:, :1, :1].expand_as(found))  # all of an image or nothing
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    assert found.mean().item() == pytest.approx(1, abs=0.02)
    assert drop.eval()(x) is x


def test_rates_grow_over_all_blocks():
    model = small(drop_path_rate=0.5)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert depth_rates(0.3, 1) == [0]
