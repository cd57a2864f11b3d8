"""A class head on any split: against plain NumPy, with classes matched by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import toy_rgb
from scipy.special import log_softmax

from igpt_cli.errors import InputError, MismatchError, NonFiniteError
from igpt_cli.evaluation.classes import HeadResult, evaluate_head, match_classes
from igpt_cli.model_dir import load_model, new_config, write_model
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.statistics import wilson
from igpt_cli.tokens.store import open_tokens

CLASSES = ("dark", "light")


@pytest.fixture(autouse=True)
def toy():
    toy_rgb.register()
    yield
    toy_rgb.unregister()


@pytest.fixture
def make(tmp_path):
    """make(n_classes, names, ...) -> a loaded toy with random weights whose config.json names its classes."""

    def make(n_classes: int = 2, names=CLASSES, model: str = "toy", name: str = "run", **parts):
        config = model_config(model, resolution=4, n_classes=n_classes)
        torch.manual_seed(1)
        weights = build_model(config).state_dict()
        data = {} if names is None else {"data": {"classes": list(names), **parts}}
        return load_model(write_model(tmp_path / name, weights, None, new_config(config, **data), force=True))

    return make


def logits_of(run, split, rows) -> np.ndarray:
    pixels = split.decode(rows) / 255
    with torch.no_grad():
        return run.model(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)).double().numpy()


@pytest.mark.parametrize("model", ["toy", "toy-distilled"])
def test_all_figures_are_those_of_plain_numpy(make, toy_tokens, model):
    tokens = open_tokens(toy_tokens(n=30))
    run, split = make(model=model), tokens.split("test")
    found = evaluate_head(run, tokens, "test", batch_size=7)
    log_p = log_softmax(logits_of(run, split, np.arange(30)), axis=1)
    right = int((log_p.argmax(1) == split.labels).sum())
    assert (found.n_images, found.n_classes, found.matched, found.bert_masks) == (30, 2, "by name", None)
    assert found.accuracy == pytest.approx(100 * right / 30)
    assert found.interval == wilson(right, 30)
    assert found.log_loss == pytest.approx(-log_p[np.arange(30), split.labels].mean(), abs=1e-6)
    assert (found.top_5_accuracy, found.chance) == (None, 50.0)
    some = evaluate_head(run, tokens, "test", rows=np.array([4, 9]))
    assert some.log_loss == pytest.approx(-log_p[[4, 9], split.labels[[4, 9]]].mean(), abs=1e-6)


def test_each_head_of_two_may_be_asked(make, toy_tokens, igpt):
    tokens = open_tokens(toy_tokens(n=30))
    run, split = make(model="toy-distilled"), tokens.split("test")
    pixels = torch.tensor(split.decode(np.arange(30)).transpose(0, 3, 1, 2) / 255, dtype=torch.float32)
    with torch.no_grad():
        heads = dict(zip(("class", "distillation"), run.model.heads(pixels)))
    for name, logits in heads.items():
        found = evaluate_head(run, tokens, "test", head=name)
        log_p = log_softmax(logits.double().numpy(), axis=1)
        assert found.head == name
        assert found.log_loss == pytest.approx(-log_p[np.arange(30), split.labels].mean(), abs=1e-6)
        shown = json.loads(igpt("evaluate", run.path, tokens.path, "--head", name, "--json", "-q").stdout)
        assert (shown["head"], shown["log_loss"]) == (name, pytest.approx(found.log_loss, abs=1e-6))
    assert evaluate_head(run, tokens, "test").head == "both"
    with pytest.raises(InputError, match="head is 'dist', expected one of both, class, distillation"):
        evaluate_head(run, tokens, "test", head="dist")
    one = make(name="one")
    assert evaluate_head(one, tokens, "test").head is None
    with pytest.raises(InputError, match="has one class head; head 'class' is for a model with a distillation head"):
        evaluate_head(one, tokens, "test", head="class")
    done = igpt("evaluate", "builtin:igpt-tiny", "embedded", "--head", "class")
    assert done.code == 1
    assert "--head is for a model with a distillation head; igpt-tiny is a model of pixels" in done.stderr


def test_from_100_classes_on_the_five_likeliest_count(make, toy_tokens):
    names = [f"class {i}" for i in range(100)]
    tokens = open_tokens(toy_tokens(n=200, classes=("class 40", "class 7")))
    run = make(100, names)
    # Biases that make classes 7, 40 and others likely at times.
    with torch.no_grad():
        run.model.head.bias[[7, 40, 41, 1, 2, 3]] += 1.0
    found = evaluate_head(run, tokens, "test")
    logits = logits_of(run, tokens.split("test"), np.arange(200))
    truth = np.array([40, 7])[tokens.split("test").labels]
    likeliest = np.argsort(-logits, 1)[:, :5]
    expected = 100 * (likeliest == truth[:, None]).any(1).mean()
    assert 0 < expected < 100
    assert found.top_5_accuracy == pytest.approx(expected)
    assert found.accuracy == pytest.approx(100 * (likeliest[:, 0] == truth).mean())


def test_classes_are_matched_by_name(make, toy_tokens):
    tokens = open_tokens(toy_tokens(n=20))
    right = evaluate_head(make(), tokens, "test").accuracy
    assert evaluate_head(make(names=("light", "dark")), tokens, "test").accuracy == pytest.approx(100 - right)
    numbers, how = match_classes(make(3, ("light", "x", "dark")), ["dark", "unused", "light"], np.array([0, 2, 2]))
    assert (numbers.tolist(), how) == ([2, -1, 0], "by name")
    with pytest.raises(
        MismatchError, match=r"run has learnt the classes dark, grey, and the images are of light, which"
    ):
        evaluate_head(make(names=("dark", "grey")), tokens, "test")
    assert evaluate_head(make(names=None), tokens, "test").matched == "by order"
    with pytest.raises(MismatchError, match="run tells 3 classes apart and does not name them; the images have 2"):
        evaluate_head(make(3, None), tokens, "test")


def test_class_order(igpt, workspace, make, toy_tokens):
    tokens = open_tokens(toy_tokens(workspace / "t.h5", n=30, classes=("2", "10")))
    run, split = make(names=None), tokens.split("test")
    by_value = 100 * float((logits_of(run, split, np.arange(30)).argmax(1) == split.labels).mean())
    assert 0 < by_value < 100
    assert by_value != 50
    accuracies = {"value": by_value, "text": 100 - by_value}  # as text, 10 comes before 2
    for order, expected in accuracies.items():
        done = igpt("evaluate", run.path, "t.h5", "--class-order", order, "--json")
        found = json.loads(done.stdout)
        assert (found["accuracy"], found["matched"]) == (pytest.approx(expected), f"by order of {order}")
        assert "numbers have two orders" not in done.stderr
    done = igpt("evaluate", run.path, "t.h5", "--json")
    found = json.loads(done.stdout)
    assert found["accuracy"] == accuracies[found["matched"].removeprefix("by order of ")]
    assert {found["accuracy"], found["other_order_accuracy"]} == {by_value, 100 - by_value}
    assert f"accuracy is {found['other_order_accuracy']:.2f}%; --class-order chooses" in done.stderr
    for path, order, message in (
        (run.path, "size", "--class-order is 'size', expected value or text"),
        (make(names=("2", "10"), name="named").path, "text", "--class-order is for classes that are numbers, and a"),
        ("builtin:igpt-tiny", "text", "--class-order is for a model of RGB images with a class head; igpt-tiny is one"),
    ):
        refused = igpt("evaluate", path, "t.h5", "--class-order", order)
        assert (refused.code, message in refused.stderr) == (1, True), refused.stderr


def test_what_cannot_be_evaluated(make, toy_tokens, tmp_path):
    tokens, run = open_tokens(toy_tokens(n=8)), make()
    with pytest.raises(InputError, match="no image of the split 'train' has a label"):
        evaluate_head(run, open_tokens(toy_tokens(tmp_path / "bare.h5", labelled=False)), "train")
    with torch.no_grad():
        run.model.head.bias[1] = torch.nan
    with pytest.raises(NonFiniteError, match="the scores of row 0 hold NaN or infinity"):
        evaluate_head(run, tokens, "test")
    headless = model_config("toy", resolution=4)
    path = write_model(tmp_path / "headless", build_model(headless).state_dict(), None, new_config(headless))
    with pytest.raises(InputError, match="headless has no class head, or one that was never trained"):
        evaluate_head(load_model(path), tokens, "test")


def test_the_command(igpt, workspace, make, toy_tokens):
    tokens = open_tokens(toy_tokens(workspace / "t.h5", n=20))
    run = make(tokens_sha256=tokens.split("train").sha256)
    done = igpt("evaluate", run.path, "t.h5", "--limit", 10, "-o", "e.json")
    found = HeadResult(**json.loads((workspace / "e.json").read_text()))
    expected = evaluate_head(run, tokens, "test", rows=np.arange(0, 20, 2))
    assert (found.accuracy, found.n_images, found.tokens) == (pytest.approx(expected.accuracy, abs=1e-6), 10, "t.h5")
    header, row = done.stdout.splitlines()
    assert header.split() == ["model", "images", "accuracy", "%", "95%", "log", "loss", "commonest", "%"]
    low, high = expected.interval
    assert row.split() == [
        *("toy", "10", f"{expected.accuracy:.2f}", f"{low:.1f}-{high:.1f}", f"{expected.log_loss:.4f}"),
        f"{expected.chance:.1f}",
    ]
    assert "toy on 10 labelled images of the split test: 2 classes, " in done.stderr
    assert "trained on these images" not in done.stderr
    done = igpt("evaluate", run.path, "t.h5", "--split", "train", "--json")
    assert json.loads(done.stdout)["seen_in_training"] is True
    assert done.stderr.endswith("note: the model was trained on these images\n")
    done = igpt("evaluate", run.path, "t.h5", "--per-image", "x.csv", "--mask-prob", 0.5)
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.endswith(
        "error: --mask-prob, --per-image: about the loss of pixels, and toy is a model of RGB images, which predicts "
        "classes\n"
    )


def test_a_run_of_igpt_train_is_evaluated_as_it_was_tested(igpt, workspace, toy_tokens):
    toy_tokens(workspace / "t.h5")
    quick = ("--steps", 30, "--batch-size", 16, "--device", "cpu", "--precision", "float32")
    assert igpt("train", "toy", "t.h5", *quick, "-o", "run").code == 0
    found = json.loads(igpt("evaluate", "run", "--json").stdout)
    recorded = load_model("run").config["result"]
    assert found["accuracy"] == pytest.approx(recorded["accuracy"])
    assert found["interval"] == pytest.approx(recorded["interval"])
