"""igpt probe as typed: every option, what is printed and written, and what is refused before any work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from igpt_cli.model_dir import read_config
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.writer import TokenWriter

CPU = ["--device", "cpu"]
SMALL = ["--n-layer", "2", "--n-embd", "16", "-b", "4", "--val-images", "4", *CPU]
QUICK = ["--no-floors", "--train-images", "40", "--test-images", "20", *CPU]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A token file of two classes that colour tells apart; a run with two checkpoints, a BERT run, a fine-tuned one."""
    from typer.testing import CliRunner

    from igpt_cli.cli.app import app

    folder = tmp_path_factory.mktemp("base")
    palette = Palette(np.linspace(10, 240, 8)[:, None].repeat(3, 1).astype(np.float32))
    rng = np.random.default_rng(5)
    for name, shift in (("t.h5", 0), ("other.h5", 1)):
        with TokenWriter(folder / name, palette, 4, classes=("dark", "light"), source="toy") as writer:
            for split in ("train", "test"):
                labels = np.arange(64) % 2
                tokens = (rng.integers(4, size=(64, 16)) + 4 * labels[:, None] + shift) % 8
                writer.append(split, tokens, labels, [f"{split}/{i}" for i in range(64)])
    tokens = folder / "t.h5"
    for args in (
        ["pretrain", tokens, "--steps", "4", "--save-every", "2", "--eval-every", "2", "--keep", "5", "-o", folder / "run"],
        ["pretrain", tokens, "--steps", "2", "--objective", "bert", "-o", folder / "bert"],
    ):  # fmt: skip
        done = CliRunner().invoke(app, list(map(str, [*args, *SMALL, "-q"])))
        assert done.exit_code == 0, done.output
    args = ["finetune", folder / "run", tokens, "--steps", "60", "--lr", "0.03", "-o", folder / "tuned", "-q", *CPU]
    done = CliRunner().invoke(app, list(map(str, args)))
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def here(workspace, base):
    """A workspace with copies of it all."""
    shutil.copytree(base, workspace, dirs_exist_ok=True)
    return workspace


def document(done) -> dict:
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_table_and_what_is_said(igpt, here):
    done = igpt("probe", "run", "t.h5", *CPU)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "accuracy", "%", "95%", "held", "out", "%", "C"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert sum("*" in line for line in lines) == 1
    assert [line.split("  ")[0] for line in lines[4:6]] == ["raw pixels", "colour histogram"]
    assert lines[6].startswith("untrained, layer ")
    assert max(map(len, lines)) <= 80
    assert "images: at most 500 to train on and 300 to test, to be quick on a CPU (default;" in done.stderr
    assert "of 64 test images (95%: " in done.stderr
    assert "trained on 64 labels" in done.stderr


def test_json_is_for_jq_and_out_is_the_same(igpt, here):
    done = igpt("probe", "run", "t.h5", "--layer", "1", "--json", "-q", "-o", "p.json", "--figure", "p.png", *QUICK)
    assert done.stderr == ""
    found = document(done)
    assert found == json.loads((here / "p.json").read_text())
    assert (found["protocol"], found["layer"], found["n_train"], found["n_test"]) == ("igpt-linear-v1", 1, 40, 20)
    assert found["accuracy"] > 80  # a number, as jq .accuracy prints it
    assert "floors" not in found
    assert (here / "p.png").read_bytes().startswith(b"\x89PNG")
    again = igpt("probe", "run", "t.h5", "-o", "p.json", *QUICK)
    assert (again.code, again.stdout) == (1, "")
    assert "p.json exists" in again.stderr


@pytest.mark.parametrize(("typed", "layers"), [("all", [0, 1, 2]), ("0,2", [0, 2]), ("1-2", [1, 2]), ("2", [2])])
def test_layers_in_every_form(igpt, here, typed, layers):
    found = document(igpt("probe", "run", "t.h5", "--layers", typed, "--json", *QUICK))
    assert [row["layer"] for row in found["layers"]] == layers


@pytest.mark.parametrize(
    ("solver", "protocol", "column"),
    [("sgd", "igpt-linear-sgd-v1", "rate"), ("knn", "igpt-knn-v1-k20-t0.07", "C")],
)
def test_other_solvers(igpt, here, solver, protocol, column):
    done = igpt("probe", "run", "t.h5", "--layer", "0", "--solver", solver, "-o", "p.json", *QUICK)
    assert done.code == 0, done.stderr
    assert column in done.stdout.splitlines()[0].split()
    found = json.loads((here / "p.json").read_text())
    assert (found["protocol"], found["C_grid"]) == (protocol, None)
    assert found["accuracy"] > 80


def test_layers_together_few_labels_details_and_pictures(igpt, here):
    done = igpt(
        "probe", "run", "t.h5", "--concat", "3", "--labels-per-class", "5,2", "--repeats", "2", "--confusion", "c.png",
        "--figure", "f.svg", "-o", "p.json", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    sweep, few = done.stdout.split("\n\n")
    assert "0-2 together" in sweep
    assert few.splitlines()[0].split() == ["labels", "of", "a", "class", "labels", "accuracy", "%", "deviation", "layers", "chosen"]  # fmt: skip
    assert [line.split()[:2] for line in few.splitlines()[1:]] == [["2", "4"], ["5", "10"]]
    found = json.loads((here / "p.json").read_text())
    assert found["concat"]["layers"] == [0, 1, 2]
    assert [len(row["repeats"]) for row in found["few_labels"]] == [2, 2]
    assert found["details"]["classes"] == ["dark", "light"]
    assert np.sum(found["details"]["confusion"]) == 20
    assert (here / "c.png").stat().st_size > 1000
    drawn = (here / "f.svg").read_text()
    for text in ("few labels", "labels of each class", "most frequent class, 50.0%"):
        assert f"<!-- {text} -->" in drawn


def test_features_are_kept_used_again_and_refused_for_other_weights(igpt, here):
    made = document(igpt("probe", "run", "t.h5", "--features", "f.h5", "--json", *QUICK))
    before = (here / "f.h5").stat().st_mtime_ns
    used = document(igpt("probe", "run", "t.h5", "--layers", "0,2", "--features", "f.h5", "--json", *QUICK))
    assert used["layers"] == [made["layers"][0], made["layers"][2]]
    other = igpt("probe", "tuned", "t.h5", "--features", "f.h5", *QUICK)
    assert (other.code, other.stdout) == (1, "")
    assert "f.h5 exists already and holds other features: checkpoint_sha256" in other.stderr
    assert "choose another file, or overwrite it with igpt features --force" in other.stderr
    assert (here / "f.h5").stat().st_mtime_ns == before


def test_every_checkpoint(igpt, here):
    done = igpt("probe", "run", "t.h5", "--all-checkpoints", "--figure", "c.png", "-o", "c.json", *QUICK)
    assert done.code == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["step", "held-out", "loss", "layer", "accuracy", "%", "95%"]
    assert [line[0] for line in lines[1:]] == ["2", "4"]
    found = json.loads((here / "c.json").read_text())
    assert [row["step"] for row in found["checkpoints"]] == [2, 4]
    assert all(row["val_loss"] > 0 for row in found["checkpoints"])
    assert (here / "c.png").stat().st_size > 1000


def test_berts_masks(igpt, here):
    several = document(igpt("probe", "bert", "t.h5", "--layer", "0", "--json", *QUICK))
    whole = document(igpt("probe", "bert", "t.h5", "--layer", "0", "--bert-masks", "0", "--json", *QUICK))
    assert (several["bert_masks"], whole["bert_masks"]) == (5, 0)


def test_fine_tuning_stands_beside_the_probe(igpt, here):
    """The accuracy is what the run recorded when it was tested; nothing is classified anew."""
    recorded = read_config(here / "tuned")["result"]
    done = igpt("probe", "run", "t.h5", "--beside", "tuned", "-o", "p.json", "--figure", "p.svg", *QUICK)
    assert done.code == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("fine-tuned, tuned")]
    assert f" {recorded['accuracy']:.1f} " in row
    assert (
        f"tuned, fine-tuned: {recorded['accuracy']:.1f}% of 64 test images by its own class head (95%: " in done.stderr
    )
    (head,) = json.loads((here / "p.json").read_text())["heads"]
    assert head == {
        "run": "tuned", "kind": "fine-tuned", "labels_per_class": None,
        **{k: recorded[k] for k in ("accuracy", "interval", "n_test", "val_accuracy")},
    }  # fmt: skip
    assert "<!-- fine-tuned: tuned, " in (here / "p.svg").read_text()
    own = document(igpt("probe", "tuned", "t.h5", "--layer", "0", "--json", *QUICK))
    assert own["heads"] == [head]
    plain = document(igpt("probe", "run", "t.h5", "--layer", "0", "--json", *QUICK))
    assert "heads" not in plain


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "there is no run nowhere"),
        (["run", "none.h5"], 1, "none.h5 does not exist"),
        (["run", "--layer", "7"], 1, "layer 7 asked for; igpt-tiny has the layers 0 to 2"),
        (["run", "--layers", "2-1"], 1, "layers '2-1' names none; write the lower end first"),
        (["run", "--solver", "newton"], 1, "there is no solver 'newton'; the solvers are lbfgs, sgd, knn"),
        (["run", "--concat", "4"], 1, "4 layers are to be concatenated; the model has 3, 0 to 2"),
        (["run", "--concat", "0"], 2, "Invalid value for '--concat': Input should be greater than or equal to 1"),
        (["run", "--labels-per-class", "4,few"], 2, "'4,few' is no list of numbers from 2 on, such as 4,25,400"),
        (["run", "--labels-per-class", "1"], 2, "'1' is no list of numbers from 2 on"),
        (["run", "--labels-per-class", "33"], 1, "33 labels of each class are asked for; class 0 has 32"),
        (["run", "--repeats", "0"], 2, "Invalid value for '--repeats': Input should be greater than or equal to 1"),
        (["run", "--all-checkpoints", "--details"], 2, "--all-checkpoints probes layers alone"),
        (["bert/checkpoints/step-2", "--all-checkpoints"], 1, "has no checkpoints"),
        (["run", "--bert-masks", "5"], 1, "bert_masks is 5, and run is no BERT model: it sees whole images"),
        (["run", "--features", "t.h5"], 1, "an HDF5 file, but not a features file"),
        (["run", "--figure", "p.gif"], 1, "--figure p.gif ends in '.gif'; a .png, .svg or .pdf file can be drawn"),
        (["run", "--confusion", "p.txt"], 1, "--confusion p.txt ends in '.txt'"),
        (["run", "--confusion", "p.png", "--figure", "p.png"], 1, "two outputs have the same name"),
        (["run", "-o", "t.h5"], 1, "t.h5 exists"),
        (["run", "--train-images", "some"], 2, "'some' is neither a number of images nor 'all'"),
        (["run", "--train-images", "6"], 1, "6 training images of 2 classes are too few to probe"),
        (["run", "--beside", "bert"], 1, "bert has no class head; name a run of igpt finetune or igpt train"),
        (["run", "other.h5", "--beside", "tuned"], 1, "tuned learnt from other images ("),
        (["run", "--precision", "float8"], 1, "precision is 'float8', expected one of auto, float32, bfloat16"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_message(igpt, here, arguments, code, message):
    before = sorted(str(p) for p in here.rglob("*"))
    named = arguments if len(arguments) > 1 and arguments[1].endswith(".h5") else [arguments[0], "t.h5", *arguments[1:]]
    done = igpt("probe", *named, "--no-floors", *CPU)
    assert (done.code, done.stdout) == (code, ""), done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert sorted(str(p) for p in here.rglob("*")) == before


def test_a_head_that_was_not_tested_has_no_accuracy(igpt, here):
    done = igpt("finetune", "run", "t.h5", "--steps", "30", "--time-limit", "0.001s", "-o", "begun", *CPU)
    assert done.code == 0, done.stderr
    done = igpt("probe", "run", "t.h5", "--beside", "begun", *QUICK)
    assert (done.code, done.stdout) == (1, "")
    assert "begun has not tested its class head" in done.stderr
    assert "heads" not in document(igpt("probe", "begun", "t.h5", "--layer", "0", "--json", *QUICK))


def test_evaluation_tells_the_accuracy_of_a_trained_head(igpt, here):
    """As the run recorded it; and none where the head was never trained, or learnt other classes."""
    recorded = read_config(here / "tuned")["result"]
    done = igpt("evaluate", "tuned", "t.h5", "--json", *CPU)
    found = document(done)
    assert (found["accuracy"], found["n_labelled"]) == (pytest.approx(recorded["accuracy"]), 64)
    assert found["interval"] == pytest.approx(recorded["interval"])
    assert f"its class head names {found['accuracy']:.2f}% of 64 images with a label" in done.stderr
    assert document(igpt("evaluate", "run", "t.h5", "--json", *CPU))["accuracy"] is None
    arguments = ["--steps", "40", "--lr", "0.02", "--bert-masks", "3", *CPU]
    done = igpt("finetune", "bert", "t.h5", *arguments, "-o", "tuned-bert")
    assert done.code == 0, done.stderr
    found = document(igpt("evaluate", "tuned-bert", "t.h5", "--json", *CPU))
    assert found["accuracy"] == pytest.approx(read_config(here / "tuned-bert")["result"]["accuracy"])
    config = read_config(here / "tuned")
    # Classes are matched by name, whatever their order; others are not compared.
    right = config["result"]["accuracy"]
    for classes, expected in ((["light", "dark"], pytest.approx(100 - right)), (["light", "grey"], None)):
        config["data"]["classes"] = classes
        (here / "tuned" / "config.json").write_text(json.dumps(config))
        assert document(igpt("evaluate", "tuned", "t.h5", "--json", *CPU))["accuracy"] == expected


def test_the_page_on_probing_runs(igpt, here):
    """Every command of its blocks in their order, on the toy: small images cannot be padded, and training is short."""
    page = (Path(__file__).parents[1] / "docs" / "probing.md").read_text(encoding="utf-8")
    (here / "runs").mkdir()
    (here / "run").rename(here / "runs" / "s")
    (here / "t.h5").rename(here / "cifar.h5")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for line in block.splitlines()]  # fmt: skip
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line.split("|")[0], comments=True)
        words = ["flip" if word == "crop-flip" else word for word in words[1:]]
        short = {"probe": ["--no-floors"], "finetune": ["--steps", "2"]}.get(words[0], [])
        done = igpt(*words, *short, *CPU)
        assert done.code == 0, f"{line}\n{done.stderr}"
    assert {p.name for p in here.glob("*.png")} == {"layers.png", "beside.png"}
