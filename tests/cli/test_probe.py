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


def test_features_as_they_are_are_another_protocol(igpt, here):
    plain, raw = (
        document(igpt("probe", "run", "t.h5", "--json", "-o", f"{name}.json", *QUICK, *more))
        for name, more in (("plain", []), ("raw", ["--no-standardise"]))
    )
    assert (plain["protocol"], plain["standardise"]) == ("igpt-linear-v1", True)
    assert (raw["protocol"], raw["standardise"]) == ("igpt-linear-v1-raw", False)
    assert [r["val_loss"] for r in plain["layers"]] != [r["val_loss"] for r in raw["layers"]]
    for solver, protocol in (("sgd", "igpt-linear-sgd-v1-raw"), ("knn", "igpt-knn-v1-k20-t0.07-raw")):
        found = document(igpt("probe", "run", "t.h5", "--layer", "0", "--solver", solver, "--no-standardise", "--json", *QUICK))  # fmt: skip
        assert (found["protocol"], found["standardise"]) == (protocol, False)
    settings = ["--train-images", "40", "--test-images", "20", *CPU]
    compared = igpt("compare", "run", "t.h5", "--reuse", "raw.json", "-o", "compared", "--json", *settings)
    assert document(compared)["models"][0]["reused"] is False
    assert "raw.json was not used: it has other protocol than this comparison" in compared.stderr


def test_quadrants_are_another_protocol_of_four_times_the_features(igpt, here):
    mean, four = (
        document(igpt("probe", "run", "t.h5", "--layer", "1", "--knn", "--json", *QUICK, "--pool", pool))
        for pool in ("mean", "quadrants")
    )
    assert (mean["protocol"], mean["pool"]) == ("igpt-linear-v1", "mean")
    assert (four["protocol"], four["pool"]) == ("igpt-linear-v1-quadrants", "quadrants")
    assert four["knn"]["protocol"] == "igpt-knn-v1-k20-t0.07-quadrants"
    assert four["layers"][0]["n_features"] == 4 * mean["layers"][0]["n_features"]
    refused = igpt("probe", "run", "t.h5", "--pool", "max", *QUICK)
    assert (refused.code, refused.stderr) == (
        1,
        "error: there is no pool 'max' of a probe; the pools are mean, quadrants\n",
    )


def test_neighbours_stand_beside_the_probe_and_what_was_fine_tuned(igpt, here):
    """The figures of --solver knn on the same features, those of scikit-learn; the head has none."""
    from sklearn.neighbors import KNeighborsClassifier

    from igpt_cli.probing.feature_file import open_features

    done = igpt("probe", "run", "t.h5", "--knn", "--beside", "tuned", "--features", "f.h5", "-o", "p.json", *QUICK)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[-2:] == ["kNN", "%"]
    found, alone = json.loads((here / "p.json").read_text()), document(igpt("probe", "run", "t.h5", "--solver", "knn", "--json", *QUICK))  # fmt: skip
    file = open_features(here / "f.h5")
    for row, other, line in zip(found["layers"], alone["layers"], lines[1:]):
        assert row["knn"] == {k: other[k] for k in row["knn"]}
        assert f" {row['knn']['accuracy']:.1f} " in line
        (x, y), (x_test, y_test) = (
            (file.read(split, row["layer"]).astype(np.float64), file.labels(split)) for split in ("train", "test")
        )
        mean, std = x.mean(0), x.std(0)
        theirs = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
        expected = theirs.fit((x - mean) / std, y).score((x_test - mean) / std, y_test)
        assert row["knn"]["accuracy"] == pytest.approx(100 * expected)
    assert {k: found["knn"][k] for k in ("protocol", "layer", "accuracy")} == {
        k: alone[k] for k in ("protocol", "layer", "accuracy")
    }
    assert f"nearest neighbours: layer {alone['layer']}, {alone['accuracy']:.1f}%" in done.stderr
    assert "knn" not in found["heads"][0]


def test_seeds_are_probes_of_their_own(igpt, here):
    """Each is what --seed N alone gives; mean and deviation are NumPy's; the headline is the first seed's."""
    options = ["--layers", "0,1", "--knn", "--train-images", "32", "--test-images", "20", *CPU]
    done = igpt("probe", "run", "t.h5", "--seed", "4", "--seeds", "2", "-o", "p.json", "--figure", "p.svg", *options)
    assert done.code == 0, done.stderr
    found = json.loads((here / "p.json").read_text())
    alone = [document(igpt("probe", "run", "t.h5", "--seed", str(4 + i), "--json", *options)) for i in range(2)]
    assert len({one["images_sha256"] for one in alone}) == 2
    for one, told in zip(alone, found["seeds"], strict=True):
        assert {k: one[k] for k in told if k not in ("val_accuracy", "C")} == {
            k: v for k, v in told.items() if k not in ("val_accuracy", "C")
        }
        assert told["C"] == next(row["C"] for row in one["layers"] if row["layer"] == one["layer"])
    assert {k: found[k] for k in ("accuracy", "layer", "seed")} == {
        k: alone[0][k] for k in ("accuracy", "layer", "seed")
    }

    def check(row, rows):
        values = [one["accuracy"] for one in rows]
        assert row["accuracy"] == values[0]
        assert row["accuracy_mean"] == pytest.approx(np.mean(values), abs=1e-3)
        assert row["accuracy_deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-3)

    check(found, alone)
    check(found["knn"], [one["knn"] for one in alone])
    for i, row in enumerate(found["layers"]):
        check(row, [one["layers"][i] for one in alone])
        check(row["knn"], [one["layers"][i]["knn"] for one in alone])
    for name, row in found["floors"].items():
        check(row, [one["floors"][name] for one in alone])
    untrained = [one["floors"]["untrained network"] for one in alone]
    assert len({json.dumps(one["layers"]) for one in untrained}) == 2
    assert f"that is seed 4; 2 seeds: mean {found['accuracy_mean']:.1f}%" in done.stderr
    sweep, seeds = done.stdout.split("\n\n")
    assert sweep.splitlines()[0].split() == ["layer", "mean", "%", "std", "kNN", "%"]
    assert [line.split()[0] for line in seeds.splitlines()] == ["seed", "4", "5", "mean", "std"]
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "<!-- mean and standard deviation of 2 seeds -->" in (here / "p.svg").read_text()


def test_features_are_taken_once_for_all_seeds_and_berts_masks_are_a_seeds_own(igpt, here):
    done = igpt("probe", "run", "t.h5", "--layer", "1", "--seeds", "2", "--features", "f.h5", "--json", *QUICK)
    found = document(done)
    used = igpt("probe", "run", "t.h5", "--layer", "1", "--seed", "1", "--features", "f.h5", "--json", *QUICK)
    assert document(used)["accuracy"] == found["seeds"][1]["accuracy"]
    options = ["--layer", "0", "--seeds", "2", "--json", *QUICK]
    bert = document(igpt("probe", "bert", "t.h5", *options))
    other = document(igpt("probe", "bert", "t.h5", "--layer", "0", "--seed", "1", "--json", *QUICK))
    assert bert["seeds"][1]["accuracy"] == other["accuracy"]
    refused = igpt("probe", "bert", "t.h5", "--features", "b.h5", *options)
    assert (refused.code, refused.stdout) == (1, "")
    assert "a features file holds one seed's; leave out --features or --seeds" in refused.stderr


def test_sites_within_blocks(igpt, here):
    done = igpt("probe", "run", "t.h5", "--layers", "all,1.attention,all.mlp", "--figure", "p.svg", "-o", "p.json", *QUICK)  # fmt: skip
    assert done.code == 0, done.stderr
    rows = json.loads((here / "p.json").read_text())["layers"]
    assert [row["layer"] for row in rows] == [0, "0.mlp", 1, "1.attention", "1.mlp", 2]
    assert [row["n_features"] for row in rows] == [16, 64, 16, 16, 64, 16]
    drawn = (here / "p.svg").read_text()
    assert all(f"<!-- igpt-tiny{name} -->" in drawn for name in ("", ", attention", ", MLP"))


def test_only_what_is_used_of_images_is_quantized(igpt, here, monkeypatch):
    """With the figures of a token file of all; and all of them for a features file, which is known by their hash."""
    from PIL import Image

    from igpt_cli.tokens import open_or_tokenize

    palette = Palette(np.linspace(10, 240, 8)[:, None].repeat(3, 1).astype(np.float32))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, name in enumerate(("dark", "light")):
            (here / "photos" / split / name).mkdir(parents=True)
            for i in range(16):
                pixels = palette.centers[rng.integers(5, size=(4, 4)) + 3 * k].astype(np.uint8)
                Image.fromarray(pixels).save(here / "photos" / split / name / f"{i:02}.png")
    palette.save(here / "p.npz")
    made = igpt("tokenize", "photos", "--palette", "p.npz", "--resolution", "4", "--allow-size", "-o", "photos.h5")
    assert made.code == 0, made.stderr
    sizes, tokenize = [], open_or_tokenize.tokenize
    monkeypatch.setattr(open_or_tokenize, "tokenize", lambda source, *a, **k: (sizes.append(len(source)), tokenize(source, *a, **k))[1])  # fmt: skip
    options = ["--layer", "1", "--no-floors", "--train-images", "12", "--test-images", "8", "--json", *CPU]
    for seeds in ([], ["--seeds", "2"]):
        some, whole = (document(igpt("probe", "run", source, *options, *seeds)) for source in ("photos", "photos.h5"))
        assert {k: v for k, v in some.items() if k not in ("tokens", "seconds")} == {
            k: v for k, v in whole.items() if k not in ("tokens", "seconds")
        }
    document(igpt("probe", "run", "photos", "--features", "f.h5", *options))
    assert sizes[0] == 20
    assert 20 < sizes[1] < 40
    assert sizes[2] == 64
    # Images that cannot be read are replaced, for each seed; a class of which none can be read is named.
    dark = sorted((here / "photos" / "train" / "dark").iterdir())
    for seeds, broken in (([], dark[:4]), (["--seeds", "2"], dark[:8])):
        for path in broken:
            path.write_bytes(b"no image")
        assert document(igpt("probe", "run", "photos", *options, *seeds))["n_train"] == 12
    for path in dark:
        path.write_bytes(b"no image")
    refused = igpt("probe", "run", "photos", *options, "--seeds", "2")
    assert (refused.code, refused.stdout) == (1, "")
    assert "the test images used have classes that the training images lack: dark" in refused.stderr


def test_layers_together_few_labels_details_and_pictures(igpt, here):
    done = igpt(
        "probe", "run", "t.h5", "--concat", "3", "--labels-per-class", "5,2", "--repeats", "2", "--confusion", "c.png",
        "--figure", "f.svg", "-o", "p.json", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    sweep, few = done.stdout.split("\n\n")
    assert "0-2 together" in sweep
    assert few.splitlines()[0].split() == ["labels", "of", "a", "class", "labels", "accuracy", "%", "std", "layers", "chosen"]  # fmt: skip
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
        (["run", "--layers", "0.norm"], 1, "behind a dot comes attention or mlp, as in 20.mlp"),
        (["run", "--layers", "2.mlp"], 1, "layer 2.mlp asked for; igpt-tiny has the layers 0 to 2"),
        (["run", "--layers", "all.mlp", "--concat", "2"], 1, "layer 0.mlp lies within a block; neighbouring layers"),
        (["run", "--solver", "knn", "--knn"], 2, "--knn sets nearest neighbours beside another solver"),
        (["run", "--seeds", "0"], 2, "Invalid value for '--seeds': Input should be greater than or equal to 1"),
        (["run", "--seeds", "2", "--all-checkpoints"], 2, "--all-checkpoints probes layers alone"),
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
        (["run", "--figure", "p.gif"], 1, "--figure p.gif ends in '.gif'; a .png, .svg or .pdf file is written"),
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
    page = (Path(__file__).parents[2] / "docs" / "probing.md").read_text(encoding="utf-8")
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
    assert {p.name for p in here.glob("*.png")} == {"layers.png", "beside.png", "seeds.png"}
