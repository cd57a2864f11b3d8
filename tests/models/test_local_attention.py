"""Stand-alone self-attention against loops over pixels in NumPy, the paper's sizes and costs, and laws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from igpt_cli.models.local_attention import (
    AttentionStem,
    LocalAttention,
    LocalAttentionConfig,
    LocalAttentionNet,
    block_side,
)


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().double().numpy() for k, v in module.state_dict().items()}


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def layer(dim=8, num_heads=2, window=3, **parts) -> LocalAttention:
    torch.manual_seed(0)
    made = LocalAttention(dim, num_heads, window, **parts)
    for p in made.parameters():
        nn.init.normal_(p)
    return made


def by_pixel(made: LocalAttention, x: np.ndarray, shift=(0, 0)) -> np.ndarray:
    """Section 2.2 for one image (D, H, W), pixel by pixel, head by head, key by key, in float64."""
    w, N, half = numbers(made), made.num_heads, made.window // 2
    D, H, W = x.shape
    K = D // N
    out = np.zeros((D, H, W))
    for i in range(H):
        for j in range(W):
            for head in range(N):
                at = slice(head * K, (head + 1) * K)
                q = w["query.weight"][at, :, 0, 0] @ x[:, i, j]
                logits, values = [], []
                for a in range(i - half, i + half + 1):
                    for b in range(j - half, j + half + 1):
                        if not (0 <= a < H and 0 <= b < W):
                            continue
                        logit = 0.0
                        if "key.weight" in w:
                            logit += q @ (w["key.weight"][at, :, 0, 0] @ x[:, a, b])
                        if "positions.rows" in w:
                            row = w["positions.rows"][head, :, a - i + half]
                            column = w["positions.columns"][head, :, b - j + half]
                            logit += q @ np.concatenate((row, column))
                        logits.append(logit)
                        values.append(w["value.weight"][at, :, 0, 0] @ x[:, a, b])
                out[at, i, j] = softmax(np.array(logits)) @ np.array(values)
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    ("H", "W", "settings"),
    [
        (9, 9, {}),  # more than one block, the last with queries that are only padding
        (11, 3, {"window": 5}),
        (2, 2, {"window": 7, "num_heads": 4}),  # a window larger than the image
        (5, 13, {"content": False}),
        (5, 5, {"relative": False}),
        (4, 4, {"window": 1}),
    ],
)
def test_the_layer_equals_a_loop_over_pixels(H, W, settings):
    made = layer(**settings)
    x = torch.randn(2, 8, H, W, generator=torch.Generator().manual_seed(1))
    expected = np.stack([by_pixel(made, image) for image in x.double().numpy()])
    np.testing.assert_allclose(made(x), expected, atol=1e-4, rtol=1e-4)
    p = made.probabilities(x)
    v = made.value(x).flatten(2).unflatten(1, (made.num_heads, -1)).mT
    plain = (p @ v).mT.flatten(1, 2).unflatten(-1, (H, W))
    np.testing.assert_allclose(plain, expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_blocks_are_those_of_the_plain_formula():
    made = layer(window=5).double()
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    leaves = [x, *made.parameters()]
    fast = torch.autograd.grad((made(x) * weight).sum(), leaves)
    plain = (made.probabilities(x) @ made.value(x).flatten(2).unflatten(1, (2, -1)).mT).mT.reshape(1, 8, 9, 9)
    slow = torch.autograd.grad((plain * weight).sum(), leaves)
    for a, b in zip(fast, slow):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_without_a_border_the_layer_commutes_with_shifts_and_without_positions_with_permutations():
    x = torch.randn(1, 8, 12, 12)
    made = layer(window=3)
    shifted = made(x.roll((2, 1), (2, 3)))[..., 4:-4, 4:-4]
    torch.testing.assert_close(shifted, made(x).roll((2, 1), (2, 3))[..., 4:-4, 4:-4])
    everywhere = layer(window=23, relative=False)  # every pixel sees all
    order = torch.randperm(144)
    permuted = everywhere(x.flatten(2)[..., order].unflatten(-1, (12, 12))).flatten(2)
    torch.testing.assert_close(permuted, everywhere(x).flatten(2)[..., order], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_pixel_sees_its_window_and_nothing_else():
    made, x = layer(window=5), torch.randn(1, 8, 9, 9)
    changed = x.clone()
    changed[0, :, 4, 7] += 1
    moved = (made(x) != made(changed)).any(1)[0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 5:9] = True
    assert torch.equal(moved, expected)


@torch.no_grad()
def test_the_stem_equals_a_loop_over_blocks():
    torch.manual_seed(0)
    stem = AttentionStem(16).eval()
    for p in stem.parameters():
        nn.init.normal_(p)
    stem.norm.running_mean.normal_()
    x = torch.randn(1, 3, 8, 12)
    w, image = numbers(stem), x[0].double().numpy()
    out = np.full((16, 2, 3), -np.inf)
    for block in np.ndindex(2, 3):
        pixels = [(i, j) for i in range(4) for j in range(4)]
        seen = {(i, j): image[:, 4 * block[0] + i, 4 * block[1] + j] for i, j in pixels}
        for i, j in pixels:
            y = np.zeros(16)
            for head in range(4):
                at = slice(4 * head, 4 * head + 4)
                q = w["query.weight"][at, :, 0, 0] @ seen[i, j]
                logits, values = [], []
                for a, b in pixels:
                    r = np.concatenate(
                        (w["positions.rows"][head, :, a - i + 3], w["positions.columns"][head, :, b - j + 3])
                    )
                    logits.append(q @ (w["key.weight"][at, :, 0, 0] @ seen[a, b] + r))
                    p = softmax((w["row"][a, 0] + w["column"][b]) @ w["nu"].T)
                    values.append(np.einsum("m,mdc->dc", p, w["value"])[at] @ seen[a, b])
                y[at] = softmax(np.array(logits)) @ np.array(values)
            y = (y - w["norm.running_mean"]) / np.sqrt(w["norm.running_var"] + 1e-5)
            y = y * w["norm.weight"] + w["norm.bias"]
            out[:, block[0], block[1]] = np.maximum(out[:, block[0], block[1]], y)
    np.testing.assert_allclose(stem(x)[0], out, atol=1e-4, rtol=1e-4)


def on_meta(**changes) -> LocalAttentionNet:
    with torch.device("meta"):
        return LocalAttentionNet(LocalAttentionConfig(n_classes=1000, **changes)).eval()


DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        # Table 1, both stems; table 6, q . r alone; table 3, attention in some stages. The paper cuts digits off.
        *(({"depths": DEPTHS[n], "stem": stem}, m) for n, m in ((26, 10.3), (38, 14.1), (50, 18.0)) for stem in ("7x7", "attention")),
        ({"stem": "7x7", "content": False}, 16.7),
        *(({"stem": "7x7", "attention_stages": stages}, m) for stages, m in (
            ((2, 3, 4), 18.1), ((3, 4), 18.5), ((4,), 20.8), ((), 25.6), ((1,), 25.5), ((1, 2), 25.0), ((1, 2, 3), 22.7),
        )),
        *(({"window": k}, 18.0) for k in (3, 11)),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_papers(settings, published):
    found = sum(p.numel() for p in on_meta(**settings).parameters()) / 1e6
    assert found == pytest.approx(published, abs=0.1)


def test_the_parameters_of_positions_are_k_times_the_width():
    made = LocalAttention(64, 8, 7)
    assert sum(p.numel() for p in made.positions.parameters()) == 7 * 64


@pytest.mark.parametrize(("n", "published"), [(26, 4.5), (38, 5.7), (50, 7.0)])
def test_the_formulas_flops_are_the_papers(n, published):
    """Table 1, conv stem, multiplies and adds counted apart: convolutions, and q . k, q . r and the sum of each window."""
    from torch.utils.flop_counter import FlopCounterMode

    model, windows = on_meta(depths=DEPTHS[n], stem="7x7"), []
    for block in model.blocks:
        block.conv2[0].register_forward_hook(lambda m, x, y: windows.append(3 * 2 * 49 * y.numel()))
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    convolutions = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "convolution" in str(k))
    assert (convolutions + sum(windows)) / 1e9 == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize("settings", [{}, {"content": False}, {"positions": "none"}, {"window": 3, "resolution": 72}])
def test_counted_flops_are_the_models_and_not_those_of_padded_blocks(settings):
    """Every convolution and linear map by its sizes; of each window q . k, q . r by rows and columns, and the sum."""
    from igpt_cli.planning.cost import forward_flops

    model, expected = on_meta(depths=(1, 1), stem="7x7", **settings), []
    c = model.config
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(lambda m, x, y: expected.append(2 * m.weight[0].numel() * y.numel()))
    for block in model.blocks:
        each = 2 * c.window**2 * (1 + c.content) + 2 * c.window * (c.positions == "relative")
        block.conv2[0].register_forward_hook(lambda m, x, y, each=each: expected.append(each * y.numel()))
    model(torch.empty(1, 3, c.resolution, c.resolution, device="meta"))
    config = {"backend": "local_attention", "name": "x", **c.to_dict()}
    assert forward_flops(config) == sum(expected)
    headless = {k: v for k, v in config.items() if k != "n_classes"}
    assert forward_flops(headless) == sum(expected) - expected[-1]


@pytest.mark.parametrize(("name", "gflops"), [("sasa-26", 4.46), ("sasa-38", 5.67), ("sasa-50", 6.88)])
def test_flops_of_presets(name, gflops):
    """With the padding of blocks, of keys that no query of theirs sees, sasa-26 would have 5.08."""
    from igpt_cli.planning import cost

    config = cost.rgb_config(name)
    assert cost.forward_flops(config) / 1e9 == pytest.approx(gflops, abs=0.005)
    model = cost._on_meta(cost._fixed(config))
    assert not any("forward" in vars(m) for m in model.modules())


def small(**changes) -> LocalAttentionNet:
    torch.manual_seed(0)
    settings = {"depths": (1, 2), "width": 16, "num_heads": 2, "window": 3, "resolution": 16, "n_classes": 4, **changes}
    return LocalAttentionNet(LocalAttentionConfig(**settings)).eval()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"stem": "3x3", "resolution": 15}, {"attention_stages": (2,)}])
def test_the_network_runs_and_its_attention_is_what_the_blocks_use(settings):
    model = small(**settings)
    side = model.config.resolution
    x = torch.randn(2, 3, side, side)
    assert model(x).shape == (2, 4)
    features = model.features(x, range(4))
    torch.testing.assert_close(model.head(features[3]), model(x))
    layers = [1, 2] if settings.get("attention_stages") else [0, 1, 2]
    assert model.attention_layers == layers
    seen: dict[int, torch.Tensor] = {}
    for i in layers:
        model.blocks[i].conv2[0].register_forward_hook(lambda m, x, y, i=i: seen.update({i: (m, x[0], y)}))
    found = model.attention(x, layers)
    model(x)
    assert list(found) == layers
    for i, p in found.items():
        attention, h, y = seen[i]
        assert p.shape == (2, 2, h[0, 0].numel(), h[0, 0].numel())
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
        v = attention.value(h).flatten(2).unflatten(1, (2, -1)).mT
        torch.testing.assert_close((p @ v).mT.reshape(y.shape), y, atol=1e-5, rtol=1e-4)
    assert model.attention(x, []) == {}
    with pytest.raises(ValueError, match=r"layers \[3\] requested; attention is in the layers"):
        model.attention(x, [3])


@torch.no_grad()
def test_where_a_convolution_had_stride_two_pooling_follows_attention():
    model = small()
    attention, pool = model.blocks[1].conv2
    x = torch.randn(1, 32, 4, 4)
    expected = attention(x).unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    torch.testing.assert_close(model.blocks[1].conv2(x), expected)
    assert isinstance(model.blocks[0].conv2[1], nn.Identity)
    assert isinstance(model.blocks[2].conv2[1], nn.Identity)
    assert isinstance(pool, nn.AvgPool2d)


@torch.no_grad()
def test_logits_of_attention_begin_near_variance_one():
    torch.manual_seed(0)
    made = LocalAttentionNet(LocalAttentionConfig(depths=(1,), resolution=32, n_classes=4))
    attention = made.blocks[0].conv2[0]
    x = torch.randn(4, 64, 8, 8).relu()
    q, k = (f(x).flatten(2).unflatten(1, (8, -1)) for f in (attention.query, attention.key))
    assert 0.5 < (q.mT @ k).var() < 2
    assert 0.5 < (q.mT[..., :4] @ attention.positions.rows).var() < 2


def test_blocks_cover_a_map_with_little_beyond_it():
    assert [block_side(n, n) for n in (56, 28, 14, 7, 4, 2, 9, 32)] == [8, 7, 7, 7, 4, 4, 5, 8]


def test_sizes_that_do_not_fit_are_refused():
    for changes, message in (
        ({"window": 4}, "window is 4, expected an odd number"),
        ({"num_heads": 3, "stem": "3x3"}, "width 16 does not divide into 3 heads with halves for rows and columns"),
        ({"num_heads": 1, "width": 12}, "width 12 does not divide into 4 heads"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"block": "basic"}, "local attention needs 'bottleneck'"),
        ({"resolution": 18}, "resolution 18 does not divide into the 4x4 blocks"),
        ({"attention_stages": (3,)}, r"attention_stages are \(3,\), expected some of 1 to 2"),
        ({"positions": "absolute"}, "positions is 'absolute'"),
        ({"positions": "none", "content": False}, "the logits are empty"),
        ({"stem": "5x5"}, "stem is '5x5', expected one of attention, 7x7, 3x3, 3x3-pool"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    config = small().config
    assert LocalAttentionConfig(**json.loads(json.dumps(config.to_dict()))) == config
