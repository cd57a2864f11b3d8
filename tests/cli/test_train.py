"""igpt train: what is typed, what is said, what is left."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import toy_rgb
from PIL import Image

from igpt_cli.model_dir import load_model, new_config, read_config, write_model
from igpt_cli.model_input import decoder
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.tokens.store import open_tokens

QUICK = ("--steps", 4, "--batch-size", 8, "--device", "cpu", "--precision", "float32")


@pytest.fixture(autouse=True)
def toy():
    toy_rgb.register()
    yield
    toy_rgb.unregister()


@pytest.fixture
def tokens(workspace, toy_tokens):
    return toy_tokens(workspace / "toy.h5")


def test_a_run_is_trained_tested_and_told(igpt, tokens, workspace):
    done = igpt("train", "toy", tokens, *QUICK, "--recipe", "deit", "--repeats", 1, "-o", "run")
    assert (done.code, done.stdout) == (0, "run\n")
    config = read_config(workspace / "run")
    n = config["training"]["n_parameters"]
    assert f"toy: {n:,} parameters, 4x4 pixels; cpu, float32\n" in done.stderr
    assert (
        "2 classes; recipe deit with adamw: augmentation crop-flip, RandAugment 9, erasing 0.25, mixup 0.8, CutMix 1, label "
        "smoothing 0.1, stochastic depth 0.1; images are the colours of tokens\n"
    ) in done.stderr
    result = config["result"]
    low, high = result["interval"]
    assert f"test accuracy {result['accuracy']:.2f}% of 64 images (95%: {low:.1f} to {high:.1f})" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("next: igpt probe run --layers all")


def test_json_is_one_document(igpt, tokens):
    done = igpt("train", "toy", tokens, *QUICK, "-o", "run", "--json", "-q")
    found = json.loads(done.stdout)
    assert (done.code, done.stderr, found["run"], found["status"], found["steps"]) == (0, "", "run", "done", 4)
    assert found["images_seen"] == 32


def test_a_run_goes_on(igpt, tokens, workspace):
    begun = igpt("train", "toy", tokens, *QUICK, "--steps", 400, "--time-limit", "1s", "-o", "run")
    assert begun.code == 0
    assert "resume it with: igpt train --resume run" in begun.stderr or "steps in" in begun.stderr
    done = igpt("train", "--resume", "run", "--device", "cpu")
    assert (done.code, done.stdout) == (0, "run\n")
    assert read_config(workspace / "run")["result"]["steps"] == 400


def test_a_teacher_teaches_its_decisions_unless_told_otherwise(igpt, tokens, workspace):
    assert igpt("train", "toy", tokens, *QUICK, "-o", "teacher").code == 0
    done = igpt("train", "toy", tokens, *QUICK, "--teacher", "teacher", "-o", "student")
    assert done.code == 0
    assert "teacher teacher (toy), hard, 0.5 of the loss\n" in done.stderr
    done = igpt("train", "toy", tokens, *QUICK, "--teacher", "teacher", "--distill", "soft", "-o", "soft")
    assert "teacher teacher (toy), soft, temperature 3, 0.1 of the loss\n" in done.stderr
    assert read_config(workspace / "soft")["training"]["distill"] == "soft"


def test_the_cosine_of_both_tokens_by_layer(igpt, tokens, workspace):
    assert igpt("train", "toy", tokens, *QUICK, "-o", "teacher").code == 0
    assert igpt("train", "toy-distilled", tokens, *QUICK, "--teacher", "teacher", "-o", "run").code == 0
    done = igpt("evaluate", "run", tokens, "--tokens-cosine", "--json", "-o", "cosine.json", "--limit", 10)
    found = json.loads(done.stdout)
    assert (done.code, found["n_images"], found["split"]) == (0, 10, "test")
    assert found == json.loads((workspace / "cosine.json").read_text())
    loaded, split = load_model("run"), open_tokens(tokens).split("test")
    x = decoder(loaded, loaded.palette)(split.tokens[np.arange(10) * 64 // 10])
    with torch.no_grad():
        for row in found["layers"]:
            first, second, _ = loaded.model.features(x, [row["layer"]], "none")[row["layer"]].unbind(1)
            expected = torch.cosine_similarity(first, second).mean().item()
            assert row["cosine"] == pytest.approx(expected, abs=1e-5)
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    done = igpt("evaluate", "run", tokens, "--tokens-cosine", "--figure", "cosine.svg")
    table = done.stdout.splitlines()
    assert (done.code, "drawn: cosine.svg" in done.stderr) == (0, True)
    assert "<svg" in (workspace / "cosine.svg").read_text()[:1000]
    assert (table[0], len(table)) == ("layer  cosine", 4)
    assert "give it with it" in igpt("evaluate", "run", tokens, "--figure", "other.png").stderr
    done = igpt("evaluate", "teacher", tokens, "--tokens-cosine")
    assert done.code == 1
    assert "teacher is toy, which has no distillation token to compare with a class token" in done.stderr


@pytest.fixture
def imported(workspace):
    """A model that others made, which tells two other classes apart and cuts images out in its own way."""
    torch.manual_seed(0)
    description = model_config("toy", resolution=4, n_classes=2)
    stated = {"size": 4, "mean": [0.5] * 3, "std": [0.25] * 3, "crop": 0.8, "filter": "bilinear"}
    config = new_config(description, preparation=stated, imported={"classes": ["cat", "dog"]})
    write_model(workspace / "imports" / "toy", build_model(description).state_dict(), None, config)
    return "imports/toy"


def test_a_trained_model_is_fine_tuned(igpt, tokens, imported, workspace):
    done = igpt("train", imported, tokens, *QUICK, "--layer-decay", 0.5, "--head-lr", 0.01, "--optimizer", "sgd")
    assert (done.code, done.stdout) == (0, "runs/toy-finetuned-1\n"), done.stderr
    assert "2 classes; recipe plain with sgd: augmentation none; images are the colours of tokens\n" in done.stderr
    assert (
        "starts from the weights of imports/toy, a fresh class head; peak learning rate 0.0003125, 0.01 for the class "
        "head, times 0.5 from each block to the one below it\n"
    ) in done.stderr
    config = read_config(workspace / "runs" / "toy-finetuned-1")
    assert (config["training"]["layer_decay"], config["training"]["head_learning_rate"]) == (0.5, 0.01)
    assert config["finetuned_from"]["path"] == "imports/toy"
    again = igpt("train", "latest", *QUICK, "-o", "again")  # the newest run, on what it was trained on
    assert again.code == 0, again.stderr
    assert (
        "starts from the weights of runs/toy-finetuned-1, its class head, too; peak learning rate 0.0001\n"
        in again.stderr
    )
    refused = igpt("finetune", "again", tokens)
    assert (
        "again is toy, a model of RGB images, which has no loss on pixels; fine-tune it with: igpt train"
        in refused.stderr
    )


def test_images_are_prepared_as_a_trained_model_wants_them_when_it_is_resumed_too(igpt, imported, workspace):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (workspace / "photos" / split / label).mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 100, (9, 7, 3)) + 150 * (label == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(workspace / "photos" / split / label / f"{i}.png")
    begun = igpt("train", imported, "photos", *QUICK, "--steps", 40, "--time-limit", "0.001s", "-o", "run")
    assert begun.code == 0, begun.stderr
    config = read_config(workspace / "run")
    assert config["preparation"] == read_config(workspace / imported)["preparation"]  # cut out as it wants them
    assert config["data"]["images"] == "rgb"
    shutil.rmtree(workspace / "imports")
    done = igpt("train", "--resume", "run", "--device", "cpu", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 40


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["imports/nothing", "toy.h5"], 1, "there is no run imports/nothing"),
        (
            ["builtin:igpt-tiny", "toy.h5"],
            1,
            "is igpt-tiny, a model of tokens; fine-tune it with: igpt finetune builtin",
        ),
        (["imports/toy", "toy.h5", "--palette", "p.npz"], 2, "has its own preparation of images; leave out --palette"),
        (["imports/toy", "toy.h5", "--no-shift"], 1, "has its sizes already; leave out shift"),
        (["toy", "toy.h5", "--layer-decay", "0.5"], 1, "toy starts from fresh weights; leave it out, or name a run"),
    ],
)
def test_bad_usage_of_trained_models(args, code, message, igpt, tokens, imported):
    done = igpt("train", *args, "--batch-size", 8, "--device", "cpu")
    assert (done.code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "name the MODEL to train"),
        (["tou", "toy.h5"], 1, "there is no model 'tou'; did you mean toy?"),
        (["igpt-tiny", "toy.h5"], 1, "igpt-tiny is a model of tokens"),
        (["toy", "toy.h5", "--recipe", "diet"], 1, "there is no recipe 'diet'; did you mean deit?"),
        (["toy", "toy.h5", "--distill", "soft"], 1, "there is no teacher; name one"),
        (["toy", "toy.h5", "--test-images", "some"], 2, "is 'some', expected all or a number of images"),
        (["toy", "toy.h5", "--batch-size", "90"], 1, "batch_size 90 is more than the 56 labelled training images"),
        (["a", "b", "--resume", "runs/small"], 1, "runs/small"),
        (["toy", "toy.h5", "--set", "width"], 2, "--set width: write a name, = and a value, as in patch_size=2"),
        (["toy", "toy.h5", "--set", "resolution=64"], 2, "resolution comes from the images"),
        (
            ["vit-ti-32", "toy.h5", "--set", "patchsize=2"],
            1,
            "no setting of vit-ti-32 'patchsize'; did you mean patch_size",
        ),
        (["vit-ti-32", "toy.h5", "--set", "patch_size=two"], 1, "patch_size is 'two', expected a whole number"),
    ],
)
def test_bad_usage(args, code, message, igpt, tokens):
    done = igpt("train", *args, *([] if "--batch-size" in args else ["--batch-size", 8]), "--device", "cpu")
    assert (done.code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())


def test_sizes_of_a_model_may_be_set(igpt, tokens):
    small = [*("--set", "depth=2", "--set", "embed_dim=8", "--set", "num_heads=2", "--set", "patch_size=2")]
    quick = ["--steps", 1, "--batch-size", 8, "--device", "cpu", "-q"]
    done = igpt("train", "vit-ti-32", "toy.h5", *small, "--set", "pos_embed=2d", "--set", "global_pool=avg", *quick)
    assert done.code == 0, done.stderr
    model = json.loads((tokens.parent / done.stdout.strip() / "config.json").read_text())["model"]
    assert (model["depth"], model["patch_size"], model["pos_embed"], model["global_pool"]) == (2, 2, "2d", "avg")
