"""Attention as convolution: the theorem shown, the model against plain NumPy, the sizes of the paper."""

from __future__ import annotations

import json
from math import erf

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from igpt_cli.models.attention_conv import (
    AttentionConv,
    AttentionConvConfig,
    QuadraticPositions,
    attention_of_convolution,
    by_pair,
    grid,
)


def as_map(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer on (B, T, D) applied to a map (B, D, n, n)."""
    return layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3, 5])
def test_heads_equal_a_given_convolution_borders_included(K):
    torch.manual_seed(0)
    weight = torch.randn(4, 6, K, K, dtype=torch.float64)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    layer, ring = attention_of_convolution(weight), K // 2
    assert layer.num_heads == K * K
    found = as_map(layer, F.pad(x, [ring] * 4))[..., ring : ring + 8, ring : ring + 8]
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=ring), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_a_convolution_needs_sharp_heads_and_the_ring():
    torch.manual_seed(0)
    weight, x = torch.randn(4, 6, 3, 3, dtype=torch.float64), torch.randn(2, 6, 8, 8, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=1)
    errors = []
    for alpha in (5, 20, 46):
        found = as_map(attention_of_convolution(weight, alpha), F.pad(x, [1] * 4))[..., 1:-1, 1:-1]
        errors.append((found - expected).abs().max().item())
    assert errors[0] > 0.05
    assert 1e-9 < errors[1] < 1e-5
    assert errors[2] < 1e-13
    for alpha in (46, 1000):  # without the ring the interior is right and the border wrong, however sharp the heads
        found = as_map(attention_of_convolution(weight, alpha), x)
        torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-12, rtol=1e-12)
        border = (found - expected).abs()
        assert min(border[..., 0, :].max(), border[..., :, -1].max()) > 0.5
    with pytest.raises(ValueError, match="the kernel is 2 x 2; a square one of an odd side"):
        attention_of_convolution(torch.ones(1, 1, 2, 2))


@torch.no_grad()
def test_the_encoding_is_quadratic():
    """The logit is v . r with r = (|d|^2, d_1, d_2) and v = -alpha (1, -2 D_1, -2 D_2), but for a constant of the head."""
    positions = QuadraticPositions(5)
    positions.init_weights("random")
    alpha, centre = positions.s**2 / 2, positions.centre
    v = -alpha[:, None] * torch.cat((torch.ones(5, 1), -2 * centre), dim=1)
    logits = positions(4)
    for i, j in np.ndindex(7, 7):
        d = torch.tensor([i - 3.0, j - 3.0])
        r = torch.cat((d.square().sum()[None], d))
        torch.testing.assert_close(logits[:, i, j], v @ r - alpha * centre.square().sum(1), atol=1e-4, rtol=1e-4)
    general = QuadraticPositions(5, general=True)
    general.centre.copy_(centre)
    general.s.copy_(torch.eye(2) * positions.s[:, None, None])
    torch.testing.assert_close(general(4), logits)
    torch.testing.assert_close(general.covariance, positions.covariance)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(general(4), logits)
        assert torch.equal(positions(4), logits)
    pairs = by_pair(logits, 4)
    for (a, b), (c, d) in (((0, 0), (3, 2)), ((3, 1), (0, 0)), ((2, 2), (2, 2))):
        torch.testing.assert_close(pairs[:, 4 * a + b, 4 * c + d], logits[:, c - a + 3, d - b + 3])


@torch.no_grad()
def test_a_head_looks_where_its_gaussian_says():
    """Mean and covariance of the offsets that a head in the middle of a large map looks at."""
    torch.manual_seed(1)
    positions = QuadraticPositions(3, general=True)
    positions.centre.copy_(torch.tensor([[2.0, -1.0], [0.3, 0.6], [-4.0, 3.0]]))
    positions.s.copy_(0.5 * torch.eye(2) + 0.1 * torch.randn(3, 2, 2))
    n = 41
    p = by_pair(positions(n), n).softmax(-1)[:, n * n // 2].unflatten(1, (n, n))
    at = torch.arange(n) - 20.0
    d = torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1)
    mean = torch.einsum("hrc,rcd->hd", p, d)
    spread = torch.einsum("hrc,hrcd,hrce->hde", p, d - mean[:, None, None], d - mean[:, None, None])
    torch.testing.assert_close(mean, positions.centre, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(spread, positions.covariance, atol=1e-2, rtol=1e-2)


def small(positions="quadratic", **changes) -> AttentionConv:
    torch.manual_seed(0)
    settings = {
        "depth": 2,
        "num_heads": 9,
        "embed_dim": 8,
        "resolution": 8,
        "n_classes": 4,
        "drop_rate": 0.0,
        **changes,
    }
    model = AttentionConv(AttentionConvConfig(positions=positions, **settings)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("centre", ".s")):
                p.add_(0.3 * torch.randn_like(p))
    return model


def images(n: int = 2, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def plain_numpy(model: AttentionConv, image: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The formulas in float64, for one image (3, R, R), position by position: what enters each block, and the logits."""
    w = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    c, n, p = model.config, model.config.grid_size, model.config.patch_size

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * w[name + ".weight"] + w[name + ".bias"]

    places = [(i, j) for i in range(n) for j in range(n)]
    patches = [
        [image[ch, p * i + a, p * j + b] for a in range(p) for b in range(p) for ch in range(3)] for i, j in places
    ]
    h, inputs = linear(np.array(patches), "embed"), []
    for block in range(c.depth):
        inputs.append(h)
        at, D = f"blocks.{block}.attn.", c.embed_dim
        averages = np.zeros((n * n, c.num_heads, D))
        for head in range(c.num_heads):
            for t, (i, j) in enumerate(places):
                logits = []
                for s, (k, m) in enumerate(places):
                    d = np.array([k - i, m - j])
                    if c.positions in ("quadratic", "general"):
                        away, scale = d - w[at + "positions.centre"][head], w[at + "positions.s"][head]
                        inverse = scale @ scale.T if c.positions == "general" else scale**2 * np.eye(2)
                        logits.append(-away @ inverse @ away / 2)
                        continue
                    logit = w[at + "positions.u_row"][head] @ w[at + "positions.rows"][d[0] + n - 1]
                    logit += w[at + "positions.u_col"][head] @ w[at + "positions.columns"][d[1] + n - 1]
                    if c.positions == "learned+content":
                        part = slice(head * D, (head + 1) * D)
                        q, key = linear(h[t], at + "query")[part], linear(h[s], at + "key")[part]
                        logit += q @ key / np.sqrt(D)
                    logits.append(logit)
                weight = np.exp(np.array(logits) - np.max(logits))
                averages[t, head] = weight / weight.sum() @ h
        a = linear(averages.reshape(n * n, -1), at + "value")
        a = norm(h + linear(a, f"blocks.{block}.dense"), f"blocks.{block}.norm1")
        m = linear(a, f"blocks.{block}.fc1")
        m = m * (1 + np.vectorize(erf)(m / np.sqrt(2))) / 2
        h = norm(a + linear(m, f"blocks.{block}.fc2"), f"blocks.{block}.norm2")
    return [*inputs, h], linear(h.mean(0), "head")


@torch.no_grad()
@pytest.mark.parametrize("positions", ["quadratic", "general", "learned", "learned+content"])
def test_the_model_equals_plain_numpy(positions):
    model, x = small(positions), images()
    features = model.features(x, range(3), pool="none")
    for i, image in enumerate(x.double().numpy()):
        layers, logits = plain_numpy(model, image)
        np.testing.assert_allclose(model(x)[i], logits, atol=1e-4, rtol=1e-4)
        for layer, expected in enumerate(layers):
            np.testing.assert_allclose(features[layer][i], expected, atol=1e-4, rtol=1e-4)


#: Papers and released code: 12.1M, 12.3M, 29.5M in the paper.
PARAMETERS = {
    "quadratic": 12_086_844, "general": 12_087_006, "learned": 12_278_682, "learned+content": 29_601_882,
}  # fmt: skip


@pytest.mark.parametrize("positions", PARAMETERS)
def test_parameter_counts_are_those_of_the_released_code(positions):
    with torch.device("meta"):
        model = AttentionConv(AttentionConvConfig(positions=positions, n_classes=10))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[positions]


@pytest.mark.parametrize(("positions", "published"), [("quadratic", 6.2), ("learned", 6.2), ("learned+content", 15)])
def test_the_papers_flops_are_those_of_the_linear_maps(positions, published):
    """Multiplies and adds counted apart; the averages and q . k come on top."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        AttentionConv(AttentionConvConfig(positions=positions, n_classes=10)).eval()(torch.empty(1, 3, 32, 32))
    maps = {str(k): v / 1e9 for k, v in counter.get_flop_counts()["Global"].items()}
    assert maps["aten.addmm"] == pytest.approx(published, abs=0.1)


@torch.no_grad()
def test_attention_by_position_is_the_same_for_all_images_and_with_content_it_is_not():
    for positions in ("quadratic", "learned", "learned+content"):
        found = small(positions).attention(images(), [1])
        assert {layer: tuple(p.shape) for layer, p in found.items()} == {1: (2, 9, 16, 16)}
        torch.testing.assert_close(found[1].sum(-1), torch.ones(2, 9, 16))
        assert torch.equal(found[1][0], found[1][1]) == (positions != "learned+content")
    model = small()
    assert model.attention(images(), []) == {}
    with pytest.raises(ValueError, match=r"layers \[2\] requested; attention is in the layers 0 to 1"):
        model.attention(images(), [2])
    centres, covariances = model.gaussians()[1]
    assert (centres.shape, covariances.shape) == ((9, 2), (9, 2, 2))
    assert small("learned").gaussians() == {}


def test_initial_values_and_fixed_positions():
    torch.manual_seed(0)
    model = AttentionConv(AttentionConvConfig(num_heads=400, embed_dim=2, n_classes=4))
    positions = [block.attn.positions for block in model.blocks]
    assert torch.cat([p.centre for p in positions]).std().item() == pytest.approx(2, rel=0.05)
    s = torch.cat([p.s for p in positions])
    assert (s.mean().item(), s.std().item()) == (pytest.approx(1, abs=1e-3), pytest.approx(0.01, rel=0.1))
    fixed = AttentionConv(AttentionConvConfig(centres="grid", fixed=True, embed_dim=8))
    assert fixed.blocks[0].attn.positions.centre.tolist() == [[i, j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert not any("positions" in name for name, _ in fixed.named_parameters())
    assert "blocks.0.attn.positions.centre" in fixed.state_dict()
    trained = AttentionConv(AttentionConvConfig(embed_dim=8, n_classes=3, positions="general", drop_rate=0.5))
    trained(images(side=32)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in trained.named_parameters() if "positions" in n)
    assert grid(25)[[0, 12, 24]].tolist() == [[-2, -2], [0, 0], [2, 2]]


@torch.no_grad()
def test_features_come_from_one_pass_that_stops_early():
    model, calls = small(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    found = model.features(images(), [1, 0])
    assert (calls, list(found)) == ([0], [0, 1])
    everything = model.features(images(), range(3), pool="none")
    torch.testing.assert_close(found[1], everything[1].mean(1))
    torch.testing.assert_close(model.features(images(), [2], pool="max")[2], everything[2].amax(1))
    assert model.features(images(), []) == {}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"layers \[3\] requested, this model has the layers 0 to 2"):
        small().features(images(), [3])
    with pytest.raises(ValueError, match="pool is 'last', the class token, and this model has none"):
        small().features(images(), [1], pool="last")
    with pytest.raises(ValueError, match="no class head"):
        small(n_classes=None)(images())
    for changes, message in (
        ({"depth": 0}, "depth is 0"),
        ({"resolution": 9}, "resolution 9 does not divide into patches of side 2"),
        ({"positions": "absolute"}, "positions is 'absolute', expected one of quadratic, general, learned"),
        ({"positions": "learned", "fixed": True}, "fixed and centres are about Gaussians, and positions is 'learned'"),
        ({"centres": "grid", "num_heads": 8}, "8 heads do not make a square grid"),
        ({"centres": "grid", "num_heads": 4}, "4 heads do not make a square grid"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"n_classes": 1}, "n_classes is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    config = small().config
    assert AttentionConvConfig(**json.loads(json.dumps(config.to_dict()))) == config
