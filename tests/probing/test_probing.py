"""Probes: features, the solver against a plain scikit-learn pipeline, and the protocol."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_cli.errors import InputError, MismatchError
from igpt_cli.model_dir import ModelDir, load_model
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.probing.features import extract
from igpt_cli.probing.layers import parse_layers
from igpt_cli.probing.probe import probe
from igpt_cli.probing.protocol import C_GRID, FeatureSet, Labels, classify, hold_out
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.run import pretrain
from igpt_cli.training.settings import PretrainSettings


@pytest.fixture
def run(toy_tokens, tmp_path) -> ModelDir:
    recipe = PretrainSettings(steps=2, batch_size=4, optimizer="adamw", val_images=4)
    return load_model(pretrain(open_tokens(toy_tokens()), tmp_path / "run", recipe, device="cpu").run)


def noisy(n: int, classes: int = 3, dims: int = 6, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    means = 2 * np.eye(classes, dims)
    return (means[y] + rng.normal(size=(n, dims))) * 10.0 ** np.arange(dims) + 5, y


def linear_probe(x, y, x_test, y_test, **settings) -> dict:
    """The protocol on one set of features."""
    (found,) = classify([FeatureSet(x, x_test[None])], Labels(y, y_test), **settings)
    return found


def test_the_solver_equals_a_plain_scikit_learn_pipeline():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_test, y_test) = noisy(300), noisy(200, seed=1)
    found = linear_probe(x, y, x_test, y_test)
    fit, val = hold_out(y, 0.1, 0)

    def pipeline(C):
        return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000, tol=1e-6))

    scores = {C: pipeline(C).fit(x[fit], y[fit]).score(x[val], y[val]) for C in C_GRID}
    assert 100 * max(scores.values()) == pytest.approx(found["val_accuracy"])
    assert scores[found["C"]] == max(scores.values())
    chosen = pipeline(found["C"]).fit(x, y)
    assert found["accuracy"] == pytest.approx(100 * chosen.score(x_test, y_test))
    assert found["accuracy"] > 70
    assert found["converged"]


def test_the_test_split_decides_nothing():
    (x, y), (x_test, y_test) = noisy(200), noisy(100, seed=1)
    a = linear_probe(x, y, x_test, y_test)
    b = linear_probe(x, y, x_test, (y_test + 1) % 3)
    assert [a[k] for k in ("C", "val_accuracy", "val_loss")] == [b[k] for k in ("C", "val_accuracy", "val_loss")]
    assert a["accuracy"] != b["accuracy"]


def test_a_chosen_C_at_the_edge_is_told():
    (x, y), (x_test, y_test) = noisy(200), noisy(100, seed=1)
    assert linear_probe(x, y, x_test, y_test, grid=[1e-4, 1e-3])["at_edge"]
    assert not linear_probe(x, y, x_test, y_test, grid=[1.0])["at_edge"]


@given(st.lists(st.integers(0, 4), min_size=20, max_size=200), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_hold_out_is_a_partition_in_the_shares_of_the_classes(labels, seed):
    y = np.array(labels + [0, 1, 2, 3, 4] * 3)
    fit, val = hold_out(y, 0.1, seed)
    assert sorted([*fit, *val]) == list(range(len(y)))
    expected = len(val) * np.bincount(y, minlength=5) / len(y)
    assert (np.abs(np.bincount(y[val], minlength=5) - expected) < 1 + 1e-9).all()


def test_features_do_not_depend_on_the_batch_and_leave_the_model_alone():
    torch.manual_seed(0)
    model = build_model(model_config("igpt-tiny", resolution=4, n_vocab=8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokens = np.random.default_rng(0).integers(8, size=(7, 16)).astype(np.uint16)
    said = []
    found = extract(model, tokens, [3, 24, 0], batch_size=3, progress=lambda *done: said.append(done))
    assert list(found) == [0, 3, 24]
    assert said == [(3, 7), (6, 7), (7, 7)]
    whole = model.features(torch.from_numpy(tokens.astype(np.int64)), [0, 3, 24])
    for layer in found:
        assert found[layer].dtype == np.float32
        np.testing.assert_allclose(found[layer], whole[layer].detach().numpy(), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_probe_reports_the_whole_protocol(run, toy_tokens):
    said = []
    found = probe(
        run, open_tokens(toy_tokens()), [0, 3], stage=lambda label: nullcontext(lambda *n: said.append((label, *n)))
    )
    json.dumps(found, allow_nan=False)
    assert found["protocol"] == "igpt-linear-v1"
    # Colour tells the class, and layer 0 sees colours.
    assert found["layers"][0]["accuracy"] > 90
    assert [row["layer"] for row in found["layers"]] == [0, 3]
    chosen = max(found["layers"], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert (found["layer"], found["accuracy"], found["interval"]) == tuple(
        chosen[k] for k in ("layer", "accuracy", "interval")
    )
    assert (found["n_train"], found["n_test"], found["n_classes"], found["chance"]) == (64, 64, 2, 50.0)
    assert found["floors"]["raw pixels"]["accuracy"] > 90
    assert [row["layer"] for row in found["floors"]["untrained network"]["layers"]] == [0, 3]
    assert set(found["floors"]) == {"raw pixels", "colour histogram", "untrained network"}  # 4x4 holds no patch
    assert ("features", 128, 128) in said
    assert said[-1][0] == "classifiers, untrained network"
    assert said[-1][1] == said[-1][2]


def test_the_sweep_finds_the_one_layer_of_a_model_that_tells_the_classes(toy_tokens, tmp_path, monkeypatch):
    """Layer 3 is separable by construction, the others are noise: found with and without few labels and neighbours."""
    recipe = PretrainSettings(n_layer=5, steps=1, batch_size=4, optimizer="adamw", val_images=4)
    run = load_model(pretrain(open_tokens(toy_tokens()), tmp_path / "five", recipe, device="cpu").run)

    def features(tokens, layers, pool="mean"):
        label = (tokens.float().mean(1, keepdim=True) > 3.5).float()  # what the toy's colours say
        noise = {k: torch.from_numpy(np.random.default_rng(k).normal(size=(len(tokens), 4))).float() for k in layers}
        return {k: noise[k] + 20 * label if k == 3 else noise[k] for k in layers}

    monkeypatch.setattr(run.model, "features", features)
    found = probe(
        run, open_tokens(toy_tokens()), baselines=False, concat=3, labels_per_class=[6], repeats=2, details=True
    )
    assert (found["layer"], found["accuracy"]) == (3, 100)
    assert [row["accuracy"] > 80 for row in found["layers"]] == [False, False, False, True, False, False]
    assert found["details"]["confusion"] == [[32, 0], [0, 32]]
    assert found["concat"]["layers"] == [2, 3, 4]
    assert found["concat"]["accuracy"] == 100
    assert [row["layer"] for row in found["few_labels"][0]["repeats"]] == [3, 3]


def test_limits_balance_the_classes(run, toy_tokens):
    found = probe(run, open_tokens(toy_tokens()), [0], train_images=21, test_images=10, baselines=False)
    assert (found["n_train"], found["n_test"]) == (21, 10)
    assert found["chance"] == 50.0
    assert "floors" not in found


def test_layers_are_parsed():
    assert parse_layers("all") is None
    assert parse_layers("20") == [20]
    assert parse_layers("0,12, 20-22") == [0, 12, 20, 21, 22]
    for bad in ("", "twenty", "3-", "-1", "5-3", "1-2-3"):
        with pytest.raises(InputError, match="layers"):
            parse_layers(bad)


def test_what_cannot_be_probed(run, toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    with pytest.raises(InputError, match=r"layer 99 asked for; igpt-tiny has the layers 0 to 24"):
        probe(run, tokens, [99])
    with pytest.raises(InputError, match=r"layer none asked for"):
        probe(run, tokens, [])
    other = open_tokens(toy_tokens(tmp_path / "shade.h5", shade=1))
    with pytest.raises(MismatchError, match=r"uses palette \w{12} \(8 colours\), .* trained with palette \w{12}"):
        probe(run, other, [0])
    with pytest.raises(InputError, match="has no split 'test'; its splits: train"):
        probe(run, open_tokens(toy_tokens(tmp_path / "train.h5", splits=("train",))), [0])
    with pytest.raises(InputError, match="no image of the split 'train' has a label"):
        probe(run, open_tokens(toy_tokens(tmp_path / "bare.h5", labelled=False)), [0])
    with pytest.raises(InputError, match="the training images are all of one class"):
        probe(run, open_tokens(toy_tokens(tmp_path / "one.h5", classes=("dark",))), [0])
    with pytest.raises(InputError, match="6 training images of 2 classes are too few"):
        probe(run, tokens, [0], train_images=6)
