"""ViT and DeiT: transformers' implementations with the same random weights, and laws that hold without numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.init import normal_
from transformers import DeiTConfig as TheirDeiTConfig
from transformers import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, ViTForImageClassification
from transformers import ViTConfig as TheirViTConfig

from igpt_cli.models.deit import DeiT, DistilledConfig, DistilledDeiT, TwoTokenDeiT
from igpt_cli.models.presets_vit import PRESETS
from igpt_cli.models.registry import build_model, count_parameters, model_config
from igpt_cli.models.vit import POSITIONS, ViT, ViTConfig, resize_grid, resize_positions
from igpt_cli.planning.cost import forward_flops, rgb_config

SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 4, "resolution": 16, "n_classes": 5}
THEIRS = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
    "num_labels": 5,
}


def randomised(model):
    """Every parameter random and large enough to matter, norms and biases among them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            normal_(p, std=0.3)
    return model.eval()


def to_theirs(weights: dict[str, torch.Tensor], root: str, heads: dict[str, str]) -> dict[str, torch.Tensor]:
    """Our tensors under their names."""
    fixed = {
        "cls_token": f"{root}.embeddings.cls_token",
        "dist_token": f"{root}.embeddings.distillation_token",
        "pos_embed": f"{root}.embeddings.position_embeddings",
        "patch_embed.proj": f"{root}.embeddings.patch_embeddings.projection",
        "norm": f"{root}.layernorm",
        **heads,
    }
    inner = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    out = {}
    for key, value in weights.items():
        stem, _, kind = key.rpartition(".")
        if key in fixed:
            out[fixed[key]] = value
        elif stem in fixed:
            out[f"{fixed[stem]}.{kind}"] = value
        else:
            _, layer, within = stem.split(".", 2)
            if within == "attn.qkv":
                for name, part in zip("qkv", value.chunk(3)):
                    out[f"{root}.layers.{layer}.attention.{name}_proj.{kind}"] = part
            else:
                out[f"{root}.layers.{layer}.{inner[within]}.{kind}"] = value
    return out


def images(n: int = 2, side: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def assert_features_are_theirs(ours, theirs, backbone) -> None:
    """Layer l is what enters the attention of their block l, after its norm; the last is their final norm's output."""
    seen = {}
    for i, block in enumerate(backbone.layers):
        block.layernorm_before.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out))
    with torch.no_grad():
        last = backbone(images()).last_hidden_state
        found = ours.features(images(), range(4), pool="none")
        pooled = ours.features(images(), range(4))
    E = ours.config.n_prefix
    for layer, expected in {**seen, 3: last}.items():
        torch.testing.assert_close(found[layer], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled[layer], expected[:, E:].mean(1), atol=1e-4, rtol=1e-4)
    assert len(seen) == 3


def test_vit_equals_transformers():
    ours = randomised(ViT(ViTConfig(**SIZES)))
    theirs = ViTForImageClassification(TheirViTConfig(**THEIRS)).eval()
    theirs.load_state_dict(to_theirs(ours.state_dict(), "vit", {"head": "classifier"}))
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()).logits, atol=1e-4, rtol=1e-4)
    assert_features_are_theirs(ours, theirs, theirs.vit)


def test_distilled_deit_equals_transformers():
    ours = randomised(DistilledDeiT(DistilledConfig(**SIZES)))
    theirs = DeiTForImageClassificationWithTeacher(TheirDeiTConfig(**THEIRS)).eval()
    heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    theirs.load_state_dict(to_theirs(ours.state_dict(), "deit", heads))
    with torch.no_grad():
        expected = theirs(images())
        torch.testing.assert_close(ours(images()), expected.logits, atol=1e-4, rtol=1e-4)
        of_classes, of_distillation = ours.heads(images())
    torch.testing.assert_close(of_classes, expected.cls_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(of_distillation, expected.distillation_logits, atol=1e-4, rtol=1e-4)
    assert_features_are_theirs(ours, theirs, theirs.deit)


def test_deit_with_both_tokens_and_one_head_equals_transformers():
    ours = randomised(TwoTokenDeiT(DistilledConfig(**SIZES)))
    assert not hasattr(ours, "heads")
    theirs = DeiTForImageClassification(TheirDeiTConfig(**THEIRS)).eval()
    theirs.load_state_dict(to_theirs(ours.state_dict(), "deit", {"head": "classifier"}))
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()).logits, atol=1e-4, rtol=1e-4)
    assert_features_are_theirs(ours, theirs, theirs.deit)


# Published sizes.


@pytest.mark.parametrize(
    ("name", "n_classes", "expected"),
    [
        ("vit-ti16", 1000, 5_717_416),
        ("vit-s16", 1000, 22_050_664),
        ("vit-b16", 1000, 86_567_656),
        ("vit-b32", 1000, 88_224_232),
        ("vit-l16", 1000, 304_326_632),
        ("vit-l32", None, 305_510_400),
        ("vit-h14", None, 630_764_800),
        ("vit-b16-384", 1000, 86_859_496),
        ("vit-l16-384", 1000, 304_715_752),
        ("vit-r50-b16", None, 97_890_112),
        ("vit-r26-b32", 1000, 101_383_976),
        ("vit-r50-l32", 1000, 328_994_856),
        ("vit-r26-s32", 1000, 36_431_912),
        ("deit-ti", 1000, 5_717_416),
        ("deit-s", 1000, 22_050_664),
        ("deit-b", 1000, 86_567_656),
        ("deit-b-384", 1000, 86_859_496),
        ("deit-ti-distilled", 1000, 5_910_800),
        ("deit-s-distilled", 1000, 22_436_432),
        ("deit-b-distilled", 1000, 87_338_192),
        ("deit-b-distilled-384", 1000, 87_630_032),
    ],
)
def test_parameters_are_the_published_ones(name, n_classes, expected):
    with torch.device("meta"):
        assert count_parameters(build_model(model_config(name, n_classes=n_classes))) == expected


@pytest.mark.parametrize(
    ("name", "published"),
    [("deit-s", 4.6), ("deit-b", 17.5), ("deit-b-384", 55.4), ("vit-b16-384", 55.4), ("vit-l16-384", 190.7)],
)
def test_costs_are_the_published_ones(name, published):
    """Multiply-adds in 10^9, as Swin's paper has them for ViT and DeiT (table 1; theirs have none)."""
    assert forward_flops(rgb_config(name)) / 2e9 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name", ["vit-ti-32", "vit-s-64", "deit-ti-32", "deit-ti-distilled-64"])
def test_small_presets_run(name):
    model = build_model(model_config(name, n_classes=10)).eval()
    with torch.no_grad():
        assert model(images(2, model.config.resolution)).shape == (2, 10)


# Positions.


def test_without_positions_the_order_of_patches_does_not_matter_and_with_them_it_does():
    x = images(1)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)  # (1, 3, 4, 4, 4, 4)
    turned = patches.flip(2, 3).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 16, 16)
    for pos_embed in POSITIONS:
        model = randomised(ViT(ViTConfig(**SIZES, pos_embed=pos_embed)))
        with torch.no_grad():
            same = torch.allclose(model(x), model(turned), atol=1e-4)
        assert same == (pos_embed == "none"), pos_embed


def test_relative_positions_by_a_loop():
    """Q (K + r)^T / sqrt(K width), r by the distance query - key."""
    model = randomised(ViT(ViTConfig(**{**SIZES, "depth": 1}, pos_embed="relative")))
    attn, x = model.blocks[0].attn, torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        q, k, _ = attn.split(x)
        found = attn.probabilities(x)
        scores = np.zeros((3, 17, 17))
        for head in range(3):
            for i in range(17):
                for j in range(17):
                    key = k[0, head, j] + attn.offsets[i - j + 16]
                    scores[head, i, j] = float(q[0, head, i] @ key) / 8**0.5
        expected = np.exp(scores - scores.max(-1, keepdims=True))
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
        # The fast form is the plain one.
        v = attn.split(x)[2]
        y = attn.proj((found @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x), y, atol=1e-5, rtol=1e-5)


def test_two_dimensional_positions_are_of_row_and_column():
    model = randomised(ViT(ViTConfig(**SIZES, pos_embed="2d")))
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        patches = model.embed(images(1))[0, 1:].reshape(4, 4, 24)
    for row in range(4):
        for column in range(4):
            assert torch.equal(patches[row, column, :12], model.pos_embed_rows[0, row, 0])
            assert torch.equal(patches[row, column, 12:], model.pos_embed_columns[0, 0, column])


def cubic(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_positions_are_resized_by_bicubic_interpolation():
    """Against the formula, one number after the other; borders are repeated."""
    grid = torch.randn(3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = np.zeros((5, 3))
    for i in range(5):
        at = (i + 0.5) * 3 / 5 - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), 2)] += cubic(at - j)
    expected = np.einsum("ia,jb,abd->ijd", weights, weights, grid.numpy())
    np.testing.assert_allclose(resize_grid(grid, 5, 5).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "config", "prefix"), [(ViT, ViTConfig, 1), (DistilledDeiT, DistilledConfig, 2)])
def test_a_model_for_another_resolution_keeps_the_positions_of_its_tokens(kind, config, prefix):
    small, large = kind(config(**SIZES)), config(**{**SIZES, "resolution": 24})
    weights = resize_positions(small.state_dict(), large)
    kind(large).load_state_dict(weights)
    assert torch.equal(weights["pos_embed"][:, :prefix], small.pos_embed[:, :prefix])
    assert weights["pos_embed"].shape == (1, prefix + 36, 24)
    same = resize_positions(small.state_dict(), small.config)
    assert all(torch.equal(same[k], v) for k, v in small.state_dict().items())


def test_relative_positions_are_not_resized():
    config = ViTConfig(**SIZES, pos_embed="relative")
    with pytest.raises(ValueError, match="relative positions are distances in a sequence"):
        resize_positions(ViT(config).state_dict(), config)


# The rest of the model.


def test_mean_pooling_reads_the_patches_alone():
    model = randomised(ViT(ViTConfig(**SIZES, global_pool="avg")))
    with torch.no_grad():
        expected = model.head(model.hidden(images()).mean(1))
        torch.testing.assert_close(model(images()), expected)
        with pytest.raises(ValueError, match="last"):
            model.features(images(), [1], pool="last")
    assert not any("cls_token" in k for k in model.state_dict())


def test_pools_leave_the_tokens_out_but_last_is_the_class_token():
    model = randomised(DistilledDeiT(DistilledConfig(**SIZES)))
    with torch.no_grad():
        whole = model.features(images(), [2], pool="none")[2]
        for pool, expected in (("mean", whole[:, 2:].mean(1)), ("max", whole[:, 2:].amax(1)), ("last", whole[:, 0])):
            torch.testing.assert_close(model.features(images(), [2], pool=pool)[2], expected)


def test_attention_is_what_the_blocks_compute():
    model = randomised(ViT(ViTConfig(**SIZES)))
    with torch.no_grad():
        found = model.attention(images(), [0, 2])
        block, n = model.blocks[2], model.features(images(), [2], pool="none")[2]
        y = (found[2] @ block.attn.split(n)[2]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.proj(y), block.attn(n), atol=1e-5, rtol=1e-5)
    assert set(found) == {0, 2}
    torch.testing.assert_close(found[0].sum(-1), torch.ones(2, 3, 17))


def test_a_hybrid_reads_the_map_of_its_resnet():
    model = ViT(ViTConfig(**{**SIZES, "patch_size": 32, "resolution": 64}, hybrid=(1, 1, 1, 1))).eval()
    with torch.no_grad():
        grid = model.patch_embed.backbone.feature_map(images(1, 64))
        patches = model.patch_embed(images(1, 64))
    assert grid.shape[-2:] == (2, 2)
    expected = F.conv2d(grid, model.patch_embed.proj.weight, model.patch_embed.proj.bias).flatten(2).mT
    torch.testing.assert_close(patches, expected)


def test_initial_values():
    """The first loss of a ViT is ln C; DeiT's matrices have std 0.02."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**{**SIZES, "embed_dim": 96}))
    with torch.no_grad():
        assert torch.equal(vit(images()), torch.zeros(2, 5))
    assert vit.blocks[0].attn.qkv.weight.abs().max() <= (6 / 192) ** 0.5
    assert vit.patch_embed.proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)
    deit = DeiT(ViTConfig(**{**SIZES, "embed_dim": 96}))
    assert deit.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert deit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert deit.head.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_stochastic_depth_is_for_training_alone():
    model = randomised(ViT(ViTConfig(**SIZES, drop_path_rate=0.9)))
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))
        model.train()
        assert not torch.equal(model(images()), model(images()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 18}, "resolution 18 does not divide into patches of 4; take 16 or 20, or another patch_size"),
        ({"num_heads": 5}, "embed_dim 24 does not divide into num_heads 5 heads"),
        ({"pos_embed": "3d"}, "pos_embed is '3d', expected one of learned-1d, 2d, relative, none"),
        ({"patch_size": 0}, "patch_size is 0, expected a whole number of at least 1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**SIZES, **change})


def test_images_of_another_size_and_a_missing_head_are_named():
    with pytest.raises(ValueError, match="images of 20x20, and this model has positions for 16x16"):
        ViT(ViTConfig(**SIZES))(images(1, 20))
    with pytest.raises(ValueError, match="no class head"):
        ViT(ViTConfig(**{**SIZES, "n_classes": None}))(images())
    with pytest.raises(ValueError, match="each read their token"):
        DistilledConfig(**SIZES, global_pool="avg")


# The pages.

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["models-vit.md", "models-deit.md"])
def test_the_pages_state_the_sizes_of_every_preset(page):
    """Parameters, and multiply-adds as far as they are printed."""
    rows = re.findall(
        r"^\| ((?:vit|deit)-[^|]*)\|.*\| ([\d,]+)(?: \(32\))? \| ([\d.]+) G ", (DOCS / page).read_text(), re.M
    )
    stated = {names.split(",")[0].strip(): (int(n.replace(",", "")), g) for names, n, g in rows}
    ours = {name for name, p in PRESETS.items() if page == "models-vit.md" and p.backend == "vit"}
    ours |= {name for name, p in PRESETS.items() if page == "models-deit.md" and p.backend != "vit"}
    assert set(stated) == {name for name in ours if not name.endswith("-64")}
    for name, (parameters, multiply_adds) in stated.items():
        config = rgb_config(name)
        with torch.device("meta"):
            assert count_parameters(build_model(config)) == parameters
        digits = len(multiply_adds.partition(".")[2])
        assert f"{forward_flops(config) / 2e9:.{digits}f}" == multiply_adds


def test_the_code_of_the_page_runs(capsys):
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "models-vit.md").read_text(), re.S):
        exec(compile(code, "docs/models-vit.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([1, 10])\n"
