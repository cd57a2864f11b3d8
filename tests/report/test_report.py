"""Pictures, the demo, and the model that ships with igpt."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_cli.images.embedded import EmbeddedSource
from igpt_cli.images.transforms import Preprocess, prepare
from igpt_cli.model_dir import load_model, read_metrics
from igpt_cli.probing.features import Frozen
from igpt_cli.probing.probe import CheckpointProbe, read_result
from igpt_cli.report.figures import (
    confusion_figure,
    layer_curve,
    loss_against_accuracy,
    probe_figure,
)
from igpt_cli.workspace import builtin_models


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_are_drawn_and_the_same_every_time(tmp_path, suffix):
    rows = [{"layer": i, "accuracy": 50.0 + i, "interval": [45.0 + i, 55.0 + i]} for i in range(5)]
    drawn = []
    for i in range(2):
        layer_curve({"a": rows}, {"raw pixels": 20.0}, tmp_path / f"layers{i}.{suffix}")
        drawn.append((tmp_path / f"layers{i}.{suffix}").read_bytes())
    if suffix == "png":
        picture = np.asarray(Image.open(tmp_path / "layers0.png").convert("RGB"))
        assert (picture == (0x1F, 0x5F, 0xA8)).all(-1).sum() > 300  # the curve itself
        assert drawn[0] == drawn[1]
    else:
        assert all(document.startswith(b"<?xml") for document in drawn)
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def probed() -> dict:
    """What a probe gives, as far as its pictures use it."""
    rows = [{"layer": k, "accuracy": 30.0 + k, "interval": [25.0 + k, 35.0 + k]} for k in range(4)]
    untrained = [{**row, "accuracy": row["accuracy"] - 10} for row in rows]
    few = [
        {"labels_per_class": n, "accuracy": a, "deviation": d, "repeats": [{"accuracy": a - 1}, {"accuracy": a + 1}]}
        for n, a, d in ((4, 15.0, 1.4), (250, 25.0, None))
    ]
    return {
        "model": "small", "layers": rows, "chance": 10.0, "n_train": 500, "n_test": 300, "layer": 3, "accuracy": 33.0,
        "protocol": "igpt-linear-v1", "few_labels": few, "tokens": "data/$cats$.h5",
        "floors": {"raw pixels": {"accuracy": 26.2}, "untrained network": {"layers": untrained}},
        "heads": [{"kind": "fine-tuned", "run": "runs/tuned", "accuracy": 41.0}],
    }  # fmt: skip


def written(path) -> list[str]:
    """The texts of an SVG picture, which matplotlib writes as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_names_in_a_layer_curve_are_no_formulas(tmp_path):
    rows = [{"layer": n, "accuracy": 30.0, "interval": [20.0, 40.0]} for n in range(3)]
    layer_curve({r"a $\q$": rows}, {}, tmp_path / "layers.svg")
    assert r"<!-- a $\q$ -->" in (tmp_path / "layers.svg").read_text()


def test_the_picture_of_a_probe_names_its_lines(probed, tmp_path):
    probe_figure(probed, tmp_path / "p.svg")
    texts = written(tmp_path / "p.svg")
    legend = [
        "small",
        "untrained network",
        "fine-tuned: tuned, 41.0%",
        "most frequent class, 10.0%",
        "raw pixels, 26.2%",
    ]
    assert [t for t in texts if t in legend] == legend
    assert "$cats$.h5: 500 training, 300 test images (igpt-linear-v1)" in texts
    assert {"few labels", "labels of each class", "250"} <= {*texts}
    del probed["few_labels"], probed["heads"], probed["floors"]
    probed["layers"] = probed["layers"][2:3]
    probe_figure(probed, tmp_path / "one.svg")
    texts = written(tmp_path / "one.svg")
    assert "few labels" not in texts
    assert texts[: texts.index("layer")] == ["2"]  # one layer, one tick


def test_a_confusion_matrix_is_in_percent_of_the_true_class(probed, tmp_path):
    confusion = [[3, 1, 0], [0, 0, 0], [1, 1, 6]]
    probed["details"] = {"classes": ["cat", "$dog$", "a class whose name is much too long for a picture"], "confusion": confusion}  # fmt: skip
    confusion_figure(probed, tmp_path / "c.svg")
    texts = written(tmp_path / "c.svg")
    cells = [t for t in texts if t.isdecimal()]
    assert cells[:9] == ["75", "25", "0", "0", "0", "0", "12", "12", "75"]
    assert texts.count("cat") == texts.count("$dog$") == 2
    assert "small layer 3: 33.0% of 300 test images" in texts
    assert "$cats$.h5, 500 training images (igpt-linear-v1)" in " ".join(texts)
    assert not any("whose name is much too long for" in t for t in texts)
    probed["details"]["confusion"] = np.eye(100, dtype=int).tolist()
    confusion_figure(probed, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 1000


def test_checkpoints_without_a_loss_are_left_out(tmp_path):
    rows = [CheckpointProbe(s, v, a, a, [a - 2, a + 2], 3, [], "") for s, v, a in ((1000, 3.0, 20.0), (2000, None, 25.0), (4000, 2.5, 30.0))]  # fmt: skip
    loss_against_accuracy(rows, tmp_path / "l.svg", "small")
    texts = written(tmp_path / "l.svg")
    assert "1,000" in texts
    assert "4,000" in texts
    assert "2,000" not in texts


@pytest.mark.parametrize(("name", "size"), [("igpt-tiny", 3_500_000), ("igpt-photos", 9_000_000)])
def test_the_shipped_models_are_small_and_whole(name, size):
    path = builtin_models()[name]
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) < size
    shipped = load_model(f"builtin:{name}")
    records = read_metrics(path)
    assert records[0]["loss"] == pytest.approx(math.log(512), abs=1e-3)
    assert records[-1]["step"] == shipped.config["result"]["steps"]
    assert shipped.config["command"].startswith("igpt pretrain")
    assert read_result(path / "probe.json")["checkpoint_sha256"] == Frozen(shipped.model).sha256


def test_the_shipped_tiny_model_predicts_emoji_that_it_never_saw():
    shipped = load_model("builtin:igpt-tiny")
    records = [r for r in EmbeddedSource().records() if r.split == "test"][:12]
    images = np.stack([prepare(r.data, Preprocess(32), r.name) for r in records])
    tokens = torch.from_numpy(shipped.palette.quantize(images).reshape(12, 1024).astype("int64"))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(shipped.model(tokens).transpose(1, 2), tokens).item()
    assert loss == pytest.approx(shipped.config["result"]["val_loss"], abs=0.5)
    assert loss < 1.8  # the left-neighbour bigram's


def test_the_demo_measures_what_it_says(igpt, workspace, monkeypatch):
    for name, n in (("TRAIN_IMAGES", 40), ("TEST_IMAGES", 20), ("COMPLETED", 2), ("TIMES", 1)):
        monkeypatch.setattr(f"igpt_cli.report.demo.{name}", n)
    done = igpt("demo", "--seconds", "2", "--recompute", "--json")
    assert done.code == 0
    found = json.loads(done.stdout)
    folder = workspace / "igpt-demo"
    assert found == json.loads((folder / "summary.json").read_text())
    for name in ("1-palette", "2-quantized", "3-loss", "4-completions", "5-layers"):
        assert Image.open(folder / f"{name}.png").size[0] > 400
    assert found["pretraining"]["first_loss"] == pytest.approx(math.log(512), abs=1e-4)
    assert (folder / "run" / "model.safetensors").exists()
    probed = found["probe"]
    assert (probed["n_train"], probed["n_test"]) == (40, 20)
    assert set(probed["floors"]) == {"raw pixels", "colour histogram", "random patches", "untrained network"}
    for rows in (probed["layers"], probed["floors"]["untrained network"]["layers"]):
        assert len(rows) == 25
    again = igpt("demo")
    assert (again.code, again.stdout) == (1, "")
    assert "igpt-demo exists already" in again.stderr
    (workspace / "mine").mkdir()
    assert "is not the folder of an earlier demo" in igpt("demo", "-o", "mine", "--force").stderr


def test_the_demo_shows_the_probe_that_ships_with_the_model(igpt, workspace, monkeypatch):
    for name, n in (("COMPLETED", 2), ("TIMES", 1)):
        monkeypatch.setattr(f"igpt_cli.report.demo.{name}", n)
    done = igpt("demo", "--seconds", "1")
    assert done.code == 0, done.stderr
    assert "stored with the model: 3,022 images to learn from, 790 to test (--recompute probes a part" in done.stderr
    probed = json.loads((workspace / "igpt-demo" / "summary.json").read_text())["probe"]
    stored = json.loads((load_model("builtin:igpt-tiny").path / "probe.json").read_text())
    assert probed["stored"] is True
    assert {k: probed[k] for k in stored} == stored
    assert f"{stored['accuracy']:.1f}" in done.stdout


def test_the_demo_claims_only_what_was_measured():
    from igpt_cli.cli.demo import _compare

    low, high = {"accuracy": 20.0, "interval": [15.0, 26.0]}, {"accuracy": 60.0, "interval": [53.0, 66.0]}
    assert _compare(high, "b", low) == "better than b (20%)"
    assert _compare(low, "b", high) == "worse than b (60%)"
    assert _compare({"accuracy": 24.0, "interval": [18.0, 30.0]}, "b", low) == "not clearly different from b (20%)"
