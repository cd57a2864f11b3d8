"""The protocol of a probe: what is chosen on what, few labels, votes, layers together; against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from igpt_cli.errors import InputError
from igpt_cli.model_dir import load_model
from igpt_cli.probing import probe as probing
from igpt_cli.probing.probe import probe, probe_checkpoints
from igpt_cli.probing.protocol import (
    FeatureSet,
    Labels,
    best_of,
    classify,
    few_shot,
    neighbours,
    nested_subsets,
    score,
)
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.run import pretrain
from igpt_cli.training.settings import Execution, PretrainSettings


def blobs(n: int, signal: float, classes: int = 3, dims: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, dims) float32 whose classes are `signal` apart, and labels in turn."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return (signal * np.eye(classes, dims)[y] + rng.normal(size=(n, dims))).astype(np.float32), y


def sets_with_signals(signals, n=240, n_test=150) -> tuple[list[FeatureSet], Labels]:
    made = [(blobs(n, s, seed=i), blobs(n_test, s, seed=100 + i)) for i, s in enumerate(signals)]
    return [FeatureSet(a[0], b[0][None]) for a, b in made], Labels(made[0][0][1], made[0][1][1])


@pytest.mark.parametrize("solver", ["lbfgs", "sgd", "knn"])
def test_the_layer_that_is_separable_by_construction_is_found(solver):
    sets, labels = sets_with_signals([0, 0, 0, 8, 0])
    rows = classify(sets, labels, solver=solver)
    chosen = best_of(rows)
    assert rows.index(chosen) == 3
    assert chosen["accuracy"] > 98
    assert all(row["accuracy"] < 50 for i, row in enumerate(rows) if i != 3)
    value = {"lbfgs": "C", "sgd": "learning_rate"}.get(solver)
    assert ("C" in chosen, "learning_rate" in chosen) == (value == "C", value == "learning_rate")


def test_sets_together_are_as_each_alone():
    sets, labels = sets_with_signals([1, 2])
    assert classify(sets, labels) == [classify([s], labels)[0] for s in sets]


def test_details_are_counted():
    (s,), labels = sets_with_signals([1.5])
    (row,) = classify([s], labels, details=True)
    confusion = np.array(row["confusion"])
    assert confusion.sum(1).tolist() == np.bincount(labels.test).tolist()
    assert row["accuracy"] == pytest.approx(100 * confusion.trace() / confusion.sum(), abs=1e-3)
    assert row["class_accuracy"] == pytest.approx(100 * confusion.diagonal() / confusion.sum(1), abs=1e-3)


def test_masked_forms_vote():
    """Three forms of four images; the commonest prediction counts, and ties go at random by the seed."""
    classes = np.array([10, 20, 30])
    says = np.array([[0, 1, 2, 0], [0, 1, 0, 1], [1, 1, 1, 2]])  # (M, N)

    def log_proba(x):
        return np.log(np.eye(3)[x[:, 0]] + 1e-9)

    forms = says[:, :, None]
    assert score(log_proba, classes, forms[:, :2], np.array([10, 20]))["accuracy"] == 100
    tied = [score(log_proba, classes, forms[:, 3:], np.array([10]), seed)["accuracy"] for seed in range(60)]
    assert 8 < sum(a == 100 for a in tied) < 35  # a third of 60


def test_the_five_likeliest_are_counted_from_100_classes_on():
    rng = np.random.default_rng(0)
    log_p, y = rng.normal(size=(50, 100)), rng.integers(100, size=50)
    found = score(lambda x: log_p, np.arange(100), np.zeros((1, 50, 1)), y)
    five = np.argsort(log_p, axis=1)[:, -5:]
    assert found["top_5_accuracy"] == pytest.approx(100 * np.mean([k in row for k, row in zip(y, five)]))
    assert "top_5_accuracy" not in score(lambda x: log_p[:, :99], np.arange(99), np.zeros((1, 50, 1)), y % 99)


def test_subsets_are_balanced_and_nested_and_drawn_by_the_seed():
    y = np.random.default_rng(0).integers(4, size=200)
    found = nested_subsets(y, [2, 5, 10], repeat=0, seed=3)
    assert list(found) == [2, 5, 10]
    for n, rows in found.items():
        assert np.bincount(y[rows]).tolist() == [n] * 4
        assert (np.diff(rows) > 0).all()
    assert set(found[2]) < set(found[5]) < set(found[10])
    assert not np.array_equal(nested_subsets(y, [5], 1, 3)[5], found[5])
    assert not np.array_equal(nested_subsets(y, [5], 0, 4)[5], found[5])
    with pytest.raises(InputError, match=r"100 labels of each class are asked for; class \d has \d+ training images"):
        nested_subsets(y, [5, 100], 0, 3)


def test_few_labels_equal_cross_validation_by_scikit_learn():
    """C and layer by brute force: scikit-learn's pipelines over the same folds, then refitted on the subset."""
    (weak, strong), labels = sets_with_signals([0.8, 1.6])
    (found,) = few_shot({0: weak, 7: strong}, labels, [5], 2, seed=1, grid=[0.01, 1.0])
    assert (found["labels_per_class"], found["n_train"], len(found["repeats"])) == (5, 15, 2)
    for repeat, row in enumerate(found["repeats"]):
        rows = nested_subsets(labels.train, [5], repeat, 1)[5]
        y = labels.train[rows]
        fold = np.array([np.sum(y[:i] == y[i]) % 5 for i in range(15)])
        best = None
        for layer, s in {0: weak, 7: strong}.items():
            for C in (0.01, 1.0):
                log_p = np.zeros((15, 3))
                for f in range(5):
                    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-6))
                    log_p[fold == f] = model.fit(s.train[rows[fold != f]], y[fold != f]).predict_log_proba(
                        s.train[rows[fold == f]]
                    )
                this = ((log_p.argmax(1) == y).mean(), log_p[np.arange(15), y].mean(), layer, C)
                best = this if best is None or this[:2] > best[:2] else best
        assert (row["layer"], row["C"]) == best[2:]
        s = {0: weak, 7: strong}[row["layer"]]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=row["C"], tol=1e-6)).fit(s.train[rows], y)
        assert row["accuracy"] == pytest.approx(100 * model.score(s.test[0], labels.test), abs=0.7)
    accuracies = [row["accuracy"] for row in found["repeats"]]
    assert found["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-3)
    assert found["deviation"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-3)
    assert StratifiedKFold(5).get_n_splits() == 5  # as many folds as scikit-learn makes by default


def test_more_labels_help():
    sets, labels = sets_with_signals([1.5])
    few, many = few_shot({0: sets[0]}, labels, [2, 60], 3)
    assert many["accuracy"] > few["accuracy"]
    with pytest.raises(InputError, match="1 label of a class is too few"):
        few_shot({0: sets[0]}, labels, [1, 60], 3)


def test_neighbours_stay_within_the_model():
    assert [neighbours(k, 6, 3) for k in (0, 3, 6)] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert neighbours(2, 2, 3) == [0, 1, 2]
    with pytest.raises(InputError, match="4 layers are to be concatenated; the model has 3, 0 to 2"):
        neighbours(1, 2, 4)


# On a model.


@pytest.fixture
def run(toy_tokens, tmp_path):
    recipe = PretrainSettings(n_layer=3, steps=4, batch_size=4, optimizer="adamw", val_images=4)
    execution = Execution(save_every=2, eval_every=2, keep=5)
    return load_model(pretrain(open_tokens(toy_tokens()), tmp_path / "run", recipe, execution, device="cpu").run)


def test_layers_together_are_their_features_side_by_side(run, toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    found = probe(run, tokens, [1], concat=3, baselines=False, features=tmp_path / "f.h5")
    assert found["concat"]["layers"] == [0, 1, 2]
    assert found["concat"]["n_features"] == 3 * 64
    assert [row["layer"] for row in found["layers"]] == [1]
    file = probing.extract_features(run, tokens, tmp_path / "f.h5", [0, 1, 2], ["train", "test"])
    x = {s: np.concatenate([file.read(s, k) for k in (0, 1, 2)], 1) for s in ("train", "test")}
    labels = Labels(tokens.split("train").labels, tokens.split("test").labels)
    (row,) = classify([FeatureSet(x["train"], x["test"][None])], labels)
    assert {k: found["concat"][k] for k in row} == row


def test_kept_features_serve_the_next_probe(run, toy_tokens, tmp_path, monkeypatch):
    tokens, path = open_tokens(toy_tokens()), tmp_path / "f.h5"
    first = probe(run, tokens, baselines=False, features=path)
    monkeypatch.setattr(run.model, "features", None)  # not asked again
    second = probe(run, tokens, [0, 3], baselines=False, features=path)
    assert second["layers"] == [first["layers"][0], first["layers"][3]]


def test_every_checkpoint_is_probed(run, toy_tokens):
    tokens = open_tokens(toy_tokens())
    rows = probe_checkpoints(run.path, tokens, layers=[0, 2])
    assert [row.step for row in rows] == [2, 4]
    for row in rows:
        checkpoint = load_model(run.path / "checkpoints" / f"step-{row.step}")
        alone = probe(checkpoint, tokens, [0, 2], baselines=False)
        assert {k: getattr(row, k) for k in ("accuracy", "layer", "layers")} == {
            k: alone[k] for k in ("accuracy", "layer", "layers")
        }
        assert row.val_loss == checkpoint.config["progress"]["val_loss"]
    with pytest.raises(InputError, match="has no checkpoints"):
        probe_checkpoints(run.path / "checkpoints", tokens)


def test_bert_is_probed_with_masks_that_vote(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    recipe = PretrainSettings(objective="bert", n_layer=1, steps=1, batch_size=4, optimizer="adamw", val_images=4)
    run = load_model(pretrain(tokens, tmp_path / "bert", recipe, device="cpu").run)
    found = probe(run, tokens, [0], baselines=False)
    assert found["bert_masks"] == 5
    whole = probe(run, tokens, [0], baselines=False, bert_masks=0)
    assert whole["bert_masks"] == 0
    assert whole["accuracy"] >= 90
