"""Presets: sizes and parameter counts of the paper, and every preset can be built."""

from __future__ import annotations

import json

import pytest
import torch

from igpt_cli.errors import FormatError, InputError
from igpt_cli.models.cost import describe_models
from igpt_cli.models.presets import PRESETS
from igpt_cli.models.registry import build_model, count_parameters, find_preset, model_config

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
        InputError, match=r"there is no model 'igpt-tinny'; did you mean igpt-tiny\? known: igpt-tiny, "
    ):
        find_preset("igpt-tinny")
    config = model_config("igpt-tiny")
    with pytest.raises(FormatError, match="backend is 'mamba'"):
        build_model({**config, "backend": "mamba"})
    with pytest.raises(FormatError, match="cannot be used: .*n_layers"):
        build_model({**config, "n_layers": 3})


def test_models_command(igpt):
    assert [row["name"] for row in json.loads(igpt("models", "--json").stdout)] == list(PRESETS)
    text = igpt("models", "igpt-s").stdout
    assert "igpt-s" in text
    assert "76,571,648" in text
    done = igpt("models", "vit")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no model 'vit'")
