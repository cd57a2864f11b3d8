"""tests/gpu/measure.py, the script for a rented GPU: what is cut short or fails loses nothing else; all of it as a toy."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu" / "measure.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measurement(script, tmp_path):
    return script.Measurement(tmp_path / "out", tmp_path / "work", 60, True, None, script.TOY_TRAIN)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_command_out_of_time_is_ended_and_noted(measurement):
    started = time.monotonic()
    assert measurement.run(sys.executable, "-c", "import time; print('begun'); time.sleep(60)", limit=1) is None
    assert time.monotonic() - started < 10
    (step,) = summary(measurement.out)["steps"]
    assert step["cut"]
    assert step["code"] != 0
    assert "begun" in (measurement.out / "log.txt").read_text()
    assert "| cut | `python3 -c" in (measurement.out / "summary.md").read_text()


def test_a_command_that_fails_is_noted_with_its_reasons(measurement):
    assert measurement.igpt("models", "igpt-none") is None
    assert measurement.json("models", "igpt-s")[0]["name"] == "igpt-s"
    assert [step["code"] for step in summary(measurement.out)["steps"]] == [1, 0]
    assert "there is no model 'igpt-none'" in (measurement.out / "log.txt").read_text()


def test_stages_share_the_time_and_what_does_not_fit_is_left_out(script, measurement, monkeypatch, capsys):
    given = {}
    for name in script.STAGES:
        monkeypatch.setitem(script.STAGES, name, lambda m, name=name: given.update({name: m.left()}))
    measurement.end = time.monotonic() + 300
    script.measure(measurement, ["tests", "bench", "train"])
    assert given == {
        "tests": pytest.approx(46, abs=3),
        "bench": pytest.approx(163, abs=5),
        "train": pytest.approx(299, abs=5),
    }
    given.clear()
    measurement.end = time.monotonic() + 20
    script.measure(measurement, ["tests", "bench"])
    assert given == {}
    assert "bench: left out" in capsys.readouterr().out


def test_a_model_that_failed_is_measured_again(script, measurement, monkeypatch):
    row = {"implementation": "igpt", "tokens_per_second": None, "failed": "out of memory"}
    monkeypatch.setattr(script, "TOY_MODELS", ("one", "two"))
    measurement.found["bench"] = [{"line": "one", **row, "failed": None}, {"line": "two", **row}]
    asked = []
    monkeypatch.setattr(
        script.Measurement, "json", lambda self, *words, limit: asked.append(words[2]) or {"rows": [row]}
    )
    script.bench(measurement)
    assert asked == ["two"]
    assert [r["line"] for r in measurement.found["bench"]] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "tests,trian"], "unknown stages trian; there are tests, bench"),
        ([], "go on with --resume, or remove it"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(script, tmp_path, capsys, arguments, message):
    (tmp_path / "work" / "cifar10-mingpt").mkdir(parents=True)
    with pytest.raises(SystemExit) as e:
        script.main([str(tmp_path), *arguments])
    assert e.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "log.txt").exists()


def test_drawing_is_measured_without_a_trained_model(script, measurement, monkeypatch):
    asked, row = [], {"implementation": "igpt", "ms_per_step": None, "failed": "out of memory"}
    monkeypatch.setattr(
        script.Measurement, "json", lambda self, *words, limit: asked.append(words[:3]) or {"rows": [row]}
    )
    script.sample(measurement)
    assert asked == [("bench", "sample", "igpt-tiny")] * 2
    assert measurement.found["steps"] == []
    assert not (measurement.out / "pictures.tar.gz").exists()
    page = (measurement.out / "summary.md").read_text()
    assert "| igpt-tiny --pixels 5 | igpt | out of memory | | | | | | |" in page


def test_every_line_to_be_drawn_is_understood(script, igpt):
    """The commands of a rented hour are tried here: all of them end at the device, which is not there."""
    for line in script.DRAWN:
        done = igpt("bench", "sample", *line.split(), "--device", "cuda:99")
        assert (done.code, done.stdout) == (1, "")
        assert "device cuda:99 is not here" in done.stderr


@pytest.mark.slow
def test_all_of_it_as_a_toy_and_a_second_call_that_goes_on(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "IGPT_CIFAR10"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--toy", "--train-minutes", "2"]
    subprocess.run(command, check=True, env=environment, timeout=900)
    found = summary(tmp_path)
    codes = {tuple(s["command"].split()[3:5]): s["code"] for s in found["steps"]}
    failed = [s["command"] for s in found["steps"] if s["code"]]
    assert len(failed) == 1, f"of all commands {codes}, only the unknown model may fail"
    assert "igpt-none" in failed[0]
    assert "skipped" in found["tests"] or "passed" in found["tests"]
    measured = [row.get("implementation") for row in found["bench"]]
    assert measured == ["igpt", "transformers", "igpt", None]
    assert found["train"]["result"]["status"] == "time limit"
    assert found["train"]["test, last"]["nats_per_token"] > 0
    assert found["train"]["test, best"]["nats_per_token"] <= found["train"]["test, last"]["nats_per_token"]
    assert len(found["train"]["held_out_by_epoch"]) > 1
    with tarfile.open(tmp_path / "igpt-tiny.tar.gz") as archive:
        assert "igpt-tiny/model.safetensors" in archive.getnames()
    assert (tmp_path / "cifar10-run-loss.png").stat().st_size > 1000
    steps = found["train"]["result"]["steps"]
    subprocess.run([*command, "--stages", "train,probe", "--resume"], check=True, env=environment, timeout=900)
    again = summary(tmp_path)
    assert again["train"]["result"]["steps"] > steps
    assert again["bench"] == found["bench"]
    subprocess.run([*command, "--stages", "compare", "--resume"], check=True, env=environment, timeout=900)
    assert [row["model"] for row in summary(tmp_path)["compare"]["models"]] == ["resnet-18-32", "deit-ti-distilled-32"]
    assert (tmp_path / "compared" / "compare.md").exists()
    for name in ("ar", "bert"):
        assert set(again["probe"][name]["by_layer"]) == {"0", "1", "2"}
        assert again["probe"][name]["few_labels"][0]["labels_per_class"] == 2
    assert again["probe"]["fine-tuned"]["n_test"] == again["probe"]["from scratch"]["n_test"] == 16
    assert {row["solver"] for row in again["probe"]["solvers"]} == {"igpt", "scikit-learn"}
    assert {p.name for p in tmp_path.glob("cifar10-*layers*")} == {
        f"cifar10-{kind}{few}.{suffix}"
        for kind in ("layers", "bert-layers")
        for few in ("", "-few")
        for suffix in ("png", "json")
    }
    page = (tmp_path / "summary.md").read_text()
    assert "by epoch: " in page
    assert [(row["implementation"], row["pixels"]) for row in found["sample"]] == [
        ("igpt", 64),
        ("transformers", 64),
        ("igpt", 5),
    ]
    assert "| igpt-tiny --pixels 5 | igpt | 2 | 5 | " in page
    with tarfile.open(tmp_path / "pictures.tar.gz") as archive:
        names = ["completions.png", "nearest.png", "samples.gif", "samples.png"]
        assert archive.getnames() == [f"pictures/{name}" for name in names]
