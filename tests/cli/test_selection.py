"""--test-part and --column as typed: the same images are test images in every command, and in a run that is resumed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import toy_rgb
from PIL import Image

from igpt_cli.images.held_out import HeldOutSource
from igpt_cli.images.sources import open_source
from igpt_cli.model_dir import read_config
from igpt_cli.tokens.store import open_tokens

CPU = ("--device", "cpu", "--precision", "float32")
QUICK = ("--batch-size", 4, *CPU)
HELD = ("--test-part", 0.25, "--seed", 3)
SAID = "test: 6 of 24 training images are held out, 0.25 of each class, seed 3\n"


@pytest.fixture(autouse=True)
def toy():
    toy_rgb.register()
    yield
    toy_rgb.unregister()


@pytest.fixture
def photos(igpt, workspace):
    """photos/{dark,light}, twelve images of 4 x 4 each, and a palette."""
    rng = np.random.default_rng(0)
    for shade, name in enumerate(("dark", "light")):
        (workspace / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = (rng.integers(0, 100, (4, 4, 3)) + 150 * shade).astype(np.uint8)
            Image.fromarray(pixels).save(workspace / "photos" / name / f"{i}.png")
    assert igpt("palette", "fit", "photos", "-k", 8, "-r", 4, "-o", "p.npz", "-q").code == 0
    return workspace / "photos"


@pytest.fixture
def pretrained(igpt, photos):
    small = ("--n-layer", 2, "--n-embd", 8, "-r", 4, "--steps", 1, "--device", "cpu", "-b", 4)
    done = igpt("pretrain", "photos", "-m", "igpt-tiny", "-p", "p.npz", *small, "-o", "pretrained")
    assert done.code == 0, done.stderr
    return "pretrained"


def train(igpt, *more):
    return igpt("train", "toy", "photos", "-p", "p.npz", "-r", 4, *HELD, *QUICK, *more, "-o", "run")


def test_token_files_record_what_was_held_out(igpt, photos, workspace):
    assert igpt("tokenize", "photos", "-p", "p.npz", "-r", 4, "--allow-size", *HELD, "-o", "t.h5").code == 0
    assert "\n  test_part = 0.25\n  test_seed = 3\n" in igpt("tokens", "info", "t.h5").stdout
    attrs = json.loads(igpt("tokens", "info", "t.h5", "--json").stdout)["attrs"]
    assert (attrs["test_part"], attrs["test_seed"]) == (0.25, 3)
    names = [r.name for r in HeldOutSource(open_source(["photos"]), 0.25, 3).records() if r.split == "test"]
    assert open_tokens("t.h5").split("test").names == names
    done = igpt("train", "toy", "t.h5", "--steps", 1, *QUICK, "-o", "run")
    assert done.code == 0, done.stderr
    data = read_config(workspace / "run")["data"]
    assert (data["test_part"], data["test_seed"]) == (0.25, 3)
    assert igpt("train", "--resume", "run", "--device", "cpu").code == 0  # its token file is divided already


def test_an_interrupted_tokenize_goes_on_with_the_same_part(igpt, photos, monkeypatch):
    def full(*_):
        raise KeyboardInterrupt

    command = ("tokenize", "photos", "-p", "p.npz", "-r", 4, "--allow-size", "--workers", 1, "-o", "t.h5")
    with monkeypatch.context() as patch:
        patch.setattr("igpt_cli.tokens.writer.TokenWriter.finish", full)
        assert igpt(*command, *HELD).code == 130
    refused = igpt(*command, "--test-part", 0.25, "--seed", 4, "--resume")
    assert (refused.code, "was begun with" in refused.stderr) == (1, True)
    assert igpt(*command, *HELD, "--resume").code == 0


def test_train_and_the_run_that_is_resumed(igpt, photos, workspace, monkeypatch):
    begun = train(igpt, "--steps", 20, "--time-limit", "0.001s")
    assert (begun.code, SAID in begun.stderr) == (0, True), begun.stderr
    data = read_config(workspace / "run")["data"]
    assert (data["n_train"] + data["n_val"], data["n_test"]) == (18, 6)
    shutil.copytree("run", "again")
    done = igpt("train", "--resume", "run", "--device", "cpu")
    assert (done.code, SAID in done.stderr) == (0, True), done.stderr
    assert read_config(workspace / "run")["result"]["n_test"] == 6
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = igpt("train", "--resume", "../again", "../photos", "--device", "cpu")
    assert (done.code, SAID in done.stderr) == (0, True), done.stderr
    refused = igpt("train", "--resume", "../again", "../photos", "--test-part", 0.5, "--device", "cpu")
    assert (refused.code, "the split 'train' was" in refused.stderr) == (1, True)


def test_a_run_is_looked_at_with_its_own_test_images(igpt, photos):
    assert train(igpt, "--steps", 2).code == 0
    every = ("--train-images", "all", "--test-images", "all", *CPU)
    for command in (
        ["probe", "run", "--layer", 1, *every],
        ["probe", "run", "photos/", "--layer", 1, *every],
        ["features", "run", "photos", *CPU, "-o", "f.h5"],
        ["evaluate", "run", *CPU],
        ["compare", "run", "photos", *every, "-o", "compared"],
    ):
        done = igpt(*command)
        assert (done.code, SAID in done.stderr) == (0, True), done.stderr
        assert "has seen some" not in done.stderr
    other = igpt("probe", "run", "photos", "--layer", 1, "--test-part", 0.25, *every)
    assert "run was trained on photos with another part (0.25, seed 3) held out: it has seen some of" in other.stderr


def test_features_and_compare(igpt, photos, pretrained):
    every = ("--train-images", "all", "--test-images", "all", *CPU)
    features = igpt("features", pretrained, "photos", *HELD, "--layers", 1, *CPU, "-o", "f.h5", "--json")
    assert (features.code, SAID in features.stderr) == (0, True), features.stderr
    assert {k: v["images"] for k, v in json.loads(features.stdout)["splits"].items()} == {"train": 18, "test": 6}
    refused = igpt("compare", pretrained, "photos", *every, "-o", "compared")
    assert "photos has no split 'test'; its splits: train; --test-part 0.2 holds out" in refused.stderr
    assert train(igpt, "--steps", 2).code == 0
    # The part of the one run that was trained on these images is every model's, in any order.
    for i, runs in enumerate(([pretrained, "run"], ["run", pretrained])):
        done = igpt("compare", *runs, "photos", "--mixed-budgets", *every, "-o", f"compared-{i}", "--json")
        assert done.code == 0, done.stderr
        assert (json.loads(done.stdout)["n_train"], json.loads(done.stdout)["n_test"]) == (18, 6)
        assert done.stderr.count(SAID) == 2
    assert "pretrained was trained on photos with nothing held out: it has seen some of these" in done.stderr


def test_finetune_and_the_run_that_is_resumed(igpt, photos, pretrained, workspace):
    quick = ("--steps", 6, "-b", 4, "--device", "cpu")
    begun = igpt("finetune", pretrained, "photos", *HELD, *quick, "--time-limit", "0.001s", "-o", "run")
    assert (begun.code, SAID in begun.stderr) == (0, True), begun.stderr
    done = igpt("finetune", "--resume", "run", "--device", "cpu")
    assert (done.code, SAID in done.stderr) == (0, True), done.stderr
    assert read_config(workspace / "run")["result"]["n_test"] == 6


@pytest.mark.parametrize(
    "command", [["probe"], ["features", "-o", "f.h5"], ["compare", "-o", "c"], ["finetune"], ["train"]]
)
def test_images_of_a_column(igpt, photos, pretrained, command, workspace):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(photos.rglob("*.png"))
    images = [file.read_bytes() for file in files]
    labels = [file.parent.name for file in files]
    pq.write_table(pa.table({"image": [b"no image"] * 24, "mask": images, "label": labels}), "x.parquet")
    name, *more = command
    model = ["toy", "x.parquet", "-p", "p.npz", "-r", 4] if name == "train" else [pretrained, "x.parquet"]
    quick = ["--steps", 1, "-b", 4, "--time-limit", "0.001s", "-o", "run"] if name in ("train", "finetune") else CPU
    done = igpt(name, *model, *HELD, "--column", "mask", *quick, *more, "--device", "cpu")
    assert (done.code, SAID in done.stderr) == (0, True), done.stderr
    if name in ("train", "finetune"):
        assert read_config(workspace / "run")["data"]["column"] == "mask"
        assert igpt(name, "--resume", "run", "--device", "cpu").code == 0
    refused = igpt(name, *model, "--column", "face", *more, "--force", *(["-o", "other"] if not more else []))
    assert (refused.code, "x.parquet called 'face'" in refused.stderr) == (1, True), refused.stderr


@pytest.mark.parametrize("option", [("--test-part", 0.2), ("--column", "image")])
@pytest.mark.parametrize(
    "command", [["probe"], ["features", "-o", "f.h5"], ["compare", "-o", "c"], ["finetune"], ["train"]]
)
def test_token_files_are_divided_already(igpt, pretrained, toy_tokens, workspace, option, command):
    toy_tokens(workspace / "t.h5")
    name, *more = command
    refused = igpt(name, "toy" if name == "train" else pretrained, "t.h5", *option, *more)
    assert refused.code == 1
    assert f"error: {option[0]} is for images, and t.h5 is a token file; give it to igpt tokenize\n" in refused.stderr
