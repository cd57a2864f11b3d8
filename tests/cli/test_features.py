"""igpt features as typed: what is printed where, which defaults are taken, and the message for each bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from igpt_cli.model_dir import new_config, write_model
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.probing.store import open_features
from igpt_cli.tokens.store import open_tokens
from igpt_cli.workspace import features_path


@pytest.fixture
def toy(toy_tokens, workspace):
    """The workspace with tokens, runs/toy-1 (autoregressive, the latest) and runs/bert."""
    tokens = open_tokens(toy_tokens(workspace / "data/tokens-4.h5"))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "resolution": 4, "n_vocab": 8}
    for name, objective in (("toy-1", "ar"), ("bert", "bert")):
        config = model_config("igpt-tiny", objective=objective, **sizes)
        write_model(workspace / "runs" / name, build_model(config).state_dict(), tokens.palette, new_config(config))
    (workspace / "runs/latest").write_text("toy-1\n")
    return workspace


def test_without_arguments_it_works_in_the_workspace(igpt, toy):
    done = igpt("features")
    assert (done.code, done.stdout) == (0, "data/features-toy-1.h5\n")
    said = done.stderr.splitlines()
    assert said[:3] == [
        "run: runs/toy-1 (default)",
        "out: data/features-toy-1.h5 (default)",
        "tokens: data/tokens-4.h5 (default)",
    ]
    assert said[3].startswith("3 layers of igpt-tiny, train 64, test 64 images, pool mean, float32: 0.0 MB in ")
    assert said[3].endswith(" images/s")
    found = open_features("data/features-toy-1.h5")
    assert (found.layers, found.attrs["tokens"], found.attrs["run"]) == ([0, 1, 2], "data/tokens-4.h5", "runs/toy-1")
    again = igpt("features", "--layers", "1-2", "--split", "test")
    assert (again.code, again.stdout) == (0, "data/features-toy-1.h5\n")
    assert "data/features-toy-1.h5 holds these features already, since 20" in again.stderr


def test_json_is_one_document_and_quiet_says_nothing(igpt, toy):
    options = ["--layers", "0,2", "--split", "test", "--limit", 6, "--pool", "max", "-b", 4, "-o", "f.h5"]
    done = igpt("features", "runs/toy-1", "data/tokens-4.h5", *options, "--json", "-q")
    assert (done.code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["path"], document["layers"], document["widths"]) == ("f.h5", [0, 2], [16, 16])
    assert (document["reused"], document["attrs"]["pool"], document["model"]["n_layer"]) == (False, "max", 2)
    assert {k: document["splits"]["test"][k] for k in ("images", "labelled", "masks")} == {
        "images": 6,
        "labelled": 6,
        "masks": 0,
    }
    assert json.loads(igpt("features", "runs/toy-1", "data/tokens-4.h5", *options, "--json").stdout)["reused"]


def test_a_features_file_tells_what_it_holds(igpt, toy):
    assert igpt("features", "runs/bert", "-o", "f.h5", "--bert-masks", 2).code == 0
    done = igpt("features", "f.h5")
    assert (done.code, done.stderr) == (0, "")
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines()[1:])
    assert lines["layers"] == "0-2 of 0-2, width 16"
    assert lines["train"] == "64 images, 64 labelled under 1 mask"
    assert lines["test"] == "64 images, 64 labelled under 2 masks"
    assert json.loads(igpt("features", "f.h5", "--json").stdout)["splits"]["test"]["masks"] == 2


def test_bert_masks(igpt, toy):
    assert igpt("features", "runs/bert", "-o", "f.h5", "--seed", 3).code == 0
    found = open_features("f.h5")
    assert (found.n_masks("train"), found.n_masks("test"), found.splits["test"].attrs["seed"]) == (1, 5, 3)
    assert igpt("features", "runs/bert", "-o", "whole.h5", "--bert-masks", 0).code == 0
    assert open_features("whole.h5").n_masks("test") == 0


def test_images_will_do(igpt, toy, tmp_path):
    from PIL import Image

    for label in ("cat", "dog"):
        folder = tmp_path / "photos/test" / label
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "1.png")
    done = igpt("features", "runs/toy-1", "photos", "-o", "f.h5")
    assert done.code == 0
    found = open_features("f.h5")
    assert (found.attrs["tokens"], list(found.splits), found.classes) == ("photos", ["test"], ["cat", "dog"])


def test_the_default_name_tells_checkpoints_apart(workspace):
    names = [str(features_path(workspace / p)) for p in ("runs/a", "runs/a/checkpoints/step-5", "runs/b")]
    assert names == ["data/features-a.h5", "data/features-a-step-5.h5", "data/features-b.h5"]


def test_an_interrupted_run_is_resumed_with_resume(igpt, toy, toy_tokens):
    """Ctrl-C while it works: what was done is kept and said."""
    big = toy_tokens(toy / "big.h5", n=4000)
    command = ["features", "runs/toy-1", str(big), "-o", "f.h5", "-b", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "igpt_cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (toy / "f.h5.part/features.h5").exists():
            break
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert " images are stored in f.h5.part; the same command with --resume continues\ninterrupted\n" in stderr
    assert not (toy / "f.h5").exists()
    refused = igpt(*command)
    assert refused.code == 1
    assert "images of an interrupted run; go on with --resume, or start anew with --force" in refused.stderr
    assert igpt(*command[:-2], "--resume").stdout == "f.h5\n"
    assert not (toy / "f.h5.part").exists()
    assert len(open_features("f.h5").splits["test"]) == 4000


BAD = {
    "no run": ("features runs/none", "there is no run runs/none; runs here: bert, toy-1"),
    "no tokens": ("features runs/toy-1 none.h5", "none.h5 does not exist; a token file or images were expected there"),
    "tokens as features": ("features data/tokens-4.h5", "but not a features file: its format is 'igpt-tokens', 'igpt-"),
    "layers in words": ("features --layers some", "layers 'some' cannot be read; write all, 20, 0,12,24 or 10-14"),
    "layer too deep": ("features --layers 1-3", "layer 3 asked for; igpt-tiny has the layers 0 to 2 (2 = final norm)"),
    "pool": ("features --pool sum", "pool is 'sum', expected one of mean, quadrants, max, last, none"),
    "split": ("features --split val", "data/tokens-4.h5 has no split 'val'; its splits: train, test"),
    "masks": ("features --bert-masks 5", "runs/toy-1 is no BERT model: it sees whole images"),
    "precision": ("features --precision half", "precision is 'half', expected one of auto, float32, bfloat16"),
    "device": ("features --device tpu", "there is no device 'tpu'"),
    "existing output": (
        "features -o runs/latest",
        "runs/latest exists already (runs/latest is a text file; a features",
    ),
    "output is a folder": ("features -o runs", "runs is a folder, a file is to be written there; choose another --out"),
    "output in a file": ("features -o runs/latest/f.h5", "cannot write runs/latest/f.h5: runs/latest is not a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message(igpt, toy, name):
    line, message = BAD[name]
    done = igpt(*line.split())
    assert (done.code, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(toy.rglob("*.part"))
    assert not (toy / "data/features-toy-1.h5").exists()


@pytest.mark.parametrize("line", ["features --limit 0", "features --bert-masks -1", "features --batch-size 0"])
def test_wrong_usage(igpt, toy, line):
    done = igpt(*line.split())
    assert (done.code, done.stdout) == (2, "")
