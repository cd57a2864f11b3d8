"""Presets: sizes and parameter counts of the paper, and every preset can be built."""

from __future__ import annotations

import json

import pytest
import torch

from igpt_cli.errors import FormatError, InputError
from igpt_cli.models.presets import PRESETS
from igpt_cli.models.registry import (
    RGB_PRESETS,
    all_presets,
    build_model,
    count_parameters,
    find_preset,
    model_config,
)
from igpt_cli.planning.cost import describe_models, forward_flops, rgb_config

# reference: parameters at 32x32, 48x48 and 64x64; the paper prints 76M, 455M, 1362M and 6801M.
PARAMETERS = {
    "igpt-s": (76_571_648, 77_227_008, 78_144_512),
    "igpt-m": (455_157_760, 456_468_480, 458_303_488),
    "igpt-l": (1_362_250_752, 1_364_216_832, 1_366_969_344),
    "igpt-xl": (6_801_438_720, 6_805_370_880, 6_810_875_904),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    for resolution, expected in zip((32, 48, 64), PARAMETERS[name]):
        with torch.device("meta"):
            ar = build_model(model_config(name, resolution=resolution))
            bert = build_model(model_config(name, resolution=resolution, objective="bert"))
        assert count_parameters(ar) == expected
        assert count_parameters(bert) == expected - PRESETS[name].sizes["n_embd"]  # no sos


# Table 5 of the paper, whole.
RATES = [
    ("igpt-s", "ar", 32, 0.003),
    ("igpt-m", "ar", 32, 0.003),
    ("igpt-l", "ar", 32, 0.001),
    ("igpt-l", "ar", 48, 0.01),
    ("igpt-xl", "ar", 64, 0.0003),
    ("igpt-s", "bert", 32, 0.01),
    ("igpt-m", "bert", 32, 0.003),
    ("igpt-l", "bert", 32, 0.001),
]


def test_learning_rates_are_the_papers_and_no_others():
    paper = {name: preset for name, preset in PRESETS.items() if name not in ("igpt-tiny", "igpt-xs")}
    assert [(n, *case, rate) for n, p in paper.items() for case, rate in p.learning_rates.items()] == sorted(
        RATES, key=lambda r: list(paper).index(r[0])
    )
    for name, objective, resolution, rate in RATES:
        assert find_preset(name).learning_rate(objective, resolution) == (rate, True)


@pytest.mark.parametrize(
    ("name", "objective", "resolution", "case", "rate"),
    [
        ("igpt-s", "ar", 48, ("ar", 32), 0.003),
        ("igpt-l", "ar", 64, ("ar", 48), 0.01),
        ("igpt-l", "ar", 39, ("ar", 32), 0.001),  # 39/32 = 1.219 and 48/39 = 1.231; the difference would say 32 too
        ("igpt-l", "ar", 40, ("ar", 48), 0.01),  # equally far by difference
        ("igpt-l", "bert", 48, ("bert", 32), 0.001),  # the objective goes before the resolution
        ("igpt-xl", "bert", 32, ("ar", 64), 0.0003),
        ("igpt-tiny", "bert", 8, ("ar", 32), 0.005),
    ],
)
def test_a_learning_rate_not_published_is_the_nearest(name, objective, resolution, case, rate):
    assert find_preset(name).nearest_case(objective, resolution) == case
    assert find_preset(name).learning_rate(objective, resolution) == (rate, False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_described_and_small_ones_run(name):
    (row,) = describe_models([name])
    assert row["name"] == name
    assert row["parameters"] > 0
    if row["parameters"] < 2e7:
        model = build_model(model_config(name, resolution=4, n_vocab=7))
        assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 7)
        assert model.n_layers == row["n_layer"]
        assert model.input_kind == "tokens"


def test_flops_follow_the_stated_formula():
    (row,) = describe_models(["igpt-s"])
    L, d, n, V = 24, 512, 1024, 512
    matrices = L * (12 * d * d + 2 * d) + d + V * d
    assert row["train_flops_per_token"] == 6 * matrices + 12 * L * d * n // 2


def test_unknown_names_and_settings():
    with pytest.raises(
        InputError, match=r"there is no model 'igpt-tinny'; did you mean igpt-tiny or .*\? igpt models lists all \d+ "
    ):
        find_preset("igpt-tinny")
    config = model_config("igpt-tiny")
    with pytest.raises(FormatError, match="backend is 'mamba'"):
        build_model({**config, "backend": "mamba"})
    with pytest.raises(FormatError, match="cannot be used: .*n_layers"):
        build_model({**config, "n_layers": 3})


@pytest.mark.parametrize("name", RGB_PRESETS)
def test_every_preset_of_rgb_images_is_described(name):
    (row,) = describe_models([name])
    assert (row["name"], row["input"], row["backend"]) == (name, "rgb", RGB_PRESETS[name].backend)
    assert row["resolution"] == RGB_PRESETS[name].sizes["resolution"]
    assert row["n_classes"] == (1000 if row["resolution"] >= 224 else 10)
    assert row["forward_flops_per_image"] == 2 * row["forward_multiply_adds_per_image"] > 0
    assert row["train_flops_per_image"] == 3 * row["forward_flops_per_image"]
    with torch.device("meta"):
        model = build_model(model_config(name, n_classes=row["n_classes"]))
    assert (row["n_layers"], row["parameters"]) == (model.n_layers, count_parameters(model))
    assert model.input_kind == "rgb"


def test_flops_of_rgb_images_are_those_of_the_products():
    """ViT by hand: T tokens of width D, patches of P: in each block 12 D^2 T multiply-adds and 2 D T^2 of attention."""
    config = rgb_config("vit-s-32")
    D, L, P, T = 384, 12, 4, 65
    by_hand = (T - 1) * 3 * P * P * D + L * (12 * D * D * T + 2 * D * T * T) + 10 * D
    assert forward_flops(config) == 2 * by_hand
    headless = {k: v for k, v in config.items() if k != "n_classes"}
    assert forward_flops(headless) == 2 * (by_hand - 10 * D)


def test_a_model_of_rgb_images_has_neither_palette_nor_objective():
    for settings, told in (
        ({"n_vocab": 512}, "no n_vocab;"),
        ({"n_vocab": 512, "objective": "ar"}, "no n_vocab and no objective;"),
    ):
        with pytest.raises(InputError, match=f"vit-b16 is a model of RGB images and has {told} .*igpt train vit-b16"):
            model_config("vit-b16", resolution=224, **settings)
    with pytest.raises(InputError, match="resnet-18 cannot be built so: .*resolution"):
        model_config("resnet-18", resolution=0)


def test_models_command(igpt, monkeypatch):
    some = ("igpt-tiny", "igpt-xl", "resnet-18-32", "attention-conv-content")
    presets = {name: all_presets()[name] for name in some}
    monkeypatch.setattr("igpt_cli.planning.cost.all_presets", lambda: presets)
    rows = json.loads(igpt("models", "--json").stdout)
    assert [row["name"] for row in rows] == list(some)
    assert "forward_flops_per_image" not in rows[0]
    counted = json.loads(igpt("models", "--json", "--flops").stdout)
    assert [row["forward_flops_per_image"] for row in counted] == [
        row["forward_flops_per_image"] for row in describe_models(some)
    ]
    listed = igpt("models", "--flops")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["name", *some]
    assert max(map(len, listed.stdout.splitlines())) <= 80
    text = igpt("models", "igpt-s").stdout
    assert "igpt-s" in text
    assert "76,571,648" in text
    text = igpt("models", "swin-t").stdout
    assert "4.49 G multiply-adds, as papers on RGB models count\n" in text
    assert "depths          2, 2, 6, 2\n" in text
    # What cannot be built at a resolution is left out of the list, and refused by name.
    presets["vit-b16"] = RGB_PRESETS["vit-b16"]
    assert "vit-b16" not in igpt("models", "--resolution", 40).stdout
    assert igpt("models", "vit-b16", "--resolution", 40).code == 1
    done = igpt("models", "vit")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no model 'vit'")
