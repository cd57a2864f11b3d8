"""igpt finetune as typed: defaults of the workspace, streams, messages, resuming."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from training_runs import start, wait_for_steps

from igpt_cli.model_dir import load_model, read_config, read_metrics
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.writer import TokenWriter

SMALL = ["--n-layer", "2", "--n-embd", "16", "-b", "4", "--val-images", "4", "--device", "cpu"]
FAST = ["--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a token file of two classes and a run pretrained on it."""
    from typer.testing import CliRunner

    from igpt_cli.cli.app import app
    from igpt_cli.model_dir import write_config

    folder = tmp_path_factory.mktemp("base")
    palette = Palette(np.linspace(10, 240, 8)[:, None].repeat(3, 1).astype(np.float32))
    rng = np.random.default_rng(5)
    with TokenWriter(folder / "tokens-4.h5", palette, 4, classes=("dark", "light"), source="toy") as writer:
        for split in ("train", "test"):
            labels = np.arange(64) % 2
            tokens = rng.integers(4, size=(64, 16)) + 4 * labels[:, None]
            writer.append(split, tokens, np.where(np.arange(64) < 2, -1, labels), [f"{split}/{i}" for i in range(64)])
    args = ["pretrain", folder / "tokens-4.h5", "--steps", "2", *SMALL, "-o", folder / "run", "-q"]
    done = CliRunner().invoke(app, list(map(str, args)))
    assert done.exit_code == 0, done.output
    config = read_config(folder / "run")
    config["data"]["path"] = "data/tokens-4.h5"
    write_config(folder / "run", config)
    return folder


@pytest.fixture
def here(workspace, base):
    """A workspace with a token file and a pretrained run, which is the newest."""
    (workspace / "data").mkdir()
    shutil.copy(base / "tokens-4.h5", workspace / "data")
    shutil.copytree(base / "run", workspace / "runs" / "small")
    (workspace / "runs" / "latest").write_text("small\n")
    return workspace


def test_without_arguments_it_works_in_the_workspace(igpt, here):
    done = igpt("finetune", *FAST)
    assert (done.code, done.stdout) == (0, "runs/igpt-tiny-finetuned-1\n"), done.stderr
    lines = done.stderr.splitlines()
    assert lines[:4] == [
        "run: runs/small (default)",
        "tokens: data/tokens-4.h5 (default)",
        "test images: at most 300, to be quick on a CPU (default; --test-images all for all of them)",
        "run: runs/igpt-tiny-finetuned-1 (default)",
    ]
    assert (
        "2 classes, head on layer 2 (final norm); starts from the weights of runs/small; loss 1 L_GEN + 1 L_CLF; "
        "augmentation none; learning rate constant"
    ) in lines
    assert "images without a label are excluded: 2 of 'train', 2 of 'test'" in lines
    assert any(line.startswith("step 3: held-out accuracy ") for line in lines)
    assert lines[-2].startswith("test accuracy ")
    assert " of 62 images (95%: " in lines[-2]
    assert lines[-1].startswith("next: igpt probe runs/igpt-tiny-finetuned-1")
    assert (here / "runs" / "latest").read_text() == "igpt-tiny-finetuned-1\n"
    assert (here / "runs" / "igpt-tiny-finetuned-1" / "loss.png").exists()
    again = igpt("finetune", *FAST)
    assert (again.code, again.stdout) == (1, "")
    assert (
        "the newest run, runs/igpt-tiny-finetuned-1, is itself fine-tuned from runs/small; name the run to"
        in again.stderr
    )
    probed = igpt("probe", "--layer", "1", "--no-floors", "--device", "cpu")
    assert probed.code == 0, probed.stderr


def test_json_is_the_result_and_quiet_is_quiet(igpt, here):
    done = igpt(
        "finetune", "runs/small", "--epochs", "40", "--lr", "0.01", "-q", "--json", "-o", "tuned", "--device", "cpu"
    )
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert (document["run"], document["status"], document["accuracy"], document["n_test"]) == (
        "tuned",
        "done",
        100.0,
        62,
    )
    assert document["interval"][0] > 90
    validated = [r for r in read_metrics(here / "tuned") if "val_accuracy" in r]
    assert document["val_accuracy"] == max(r["val_accuracy"] for r in validated)
    assert document == {**read_config(here / "tuned")["result"], "run": "tuned"}


def test_every_setting_is_recorded(igpt, here):
    typed = [
        "--from-scratch", "--labels-per-class", "12", "--head-layer", "1", "--gen-weight", "0.5", "--clf-weight", "2",
        "--patience", "9", "--lr", "0.02", "--warmup-steps", "1", "--batch-size", "5", "--optimizer", "adamw",
        "--weight-decay", "0.1", "--clip", "3", "--augment", "flip", "--val-part", "0.2", "--val-images", "3",
        "--test-images", "10", "--eval-every", "2", "--seed", "7", "--layer-decay", "1",
        "--head-lr", "0.3",
    ]  # fmt: skip
    done = igpt("finetune", "runs/small", "data/tokens-4.h5", *typed, *FAST, "-o", "tuned")
    assert done.code == 0, done.stderr
    assert "starts from fresh weights" in done.stderr
    config = read_config(here / "tuned")
    expected = {
        "from_scratch": True, "labels_per_class": 12, "head_layer": 1, "gen_weight": 0.5, "clf_weight": 2.0,
        "patience": 9, "learning_rate": 0.02, "warmup_steps": 1, "batch_size": 5, "optimizer": "adamw",
        "weight_decay": 0.1, "clip": 3.0, "augment": "flip", "val_part": 0.2, "val_images": 3, "test_images": 10,
        "seed": 7, "steps": 3, "bert_masks": None, "layer_decay": 1.0, "head_learning_rate": 0.3,
    }  # fmt: skip
    assert {k: config["training"][k] for k in expected} == expected
    assert (config["machine"]["eval_every"], config["result"]["n_test"]) == (2, 10)
    assert config["model"]["head_layer"] == 1
    more = ["--test-images", "all", "--layer-decay", "0.75", "--head-lr", "0.02"]
    every = igpt("finetune", "runs/small", "data/tokens-4.h5", *more, *FAST, "-o", "all")
    assert (
        "; learning rate constant, 0.02 for the class head, times 0.75 from each block to the one below it\n"
        in every.stderr
    )
    assert "at most" not in every.stderr
    assert read_config(here / "all")["result"]["n_test"] == 62


def test_images_are_quantized_on_the_way_and_a_rate_is_found(igpt, here):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (here / "photos" / split / label).mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 100, (4, 4, 3)) + 150 * (label == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(here / "photos" / split / label / f"{i}.png")
    done = igpt(
        "finetune", "runs/small", "photos", "--lr-search", "1e-9,0.03", "--steps", "40", "--device", "cpu", "-o", "t"
    )
    assert (done.code, done.stdout) == (0, "t\n"), done.stderr
    assert "trying the learning rates 1e-09, 0.03, each for a tenth of the run" in done.stderr
    assert "learning rate 0.03 is taken" in done.stderr
    config = read_config(here / "t")
    assert (config["data"]["path"], config["data"]["classes"]) == ("photos", ["a", "b"])
    assert config["result"]["accuracy"] == 100.0


def test_a_run_is_resumed(igpt, here):
    begun = igpt("finetune", "runs/small", "--steps", "30", "--time-limit", "0.001s", "-o", "tuned", "--device", "cpu")
    assert (begun.code, begun.stdout) == (0, "tuned\n")
    assert "the time limit ended it; resume it with: igpt finetune --resume tuned" in begun.stderr
    shutil.rmtree(here / "runs" / "small")  # it is not needed any more
    done = igpt("finetune", "--resume", "tuned", "--json", "--device", "cpu")
    assert done.code == 0, done.stderr
    assert "tokens: data/tokens-4.h5 (default)" in done.stderr
    document = json.loads(done.stdout)
    assert (document["status"], document["steps"]) == ("done", 30)
    again = igpt("finetune", "--resume", "tuned", "data/tokens-4.h5", "--device", "cpu")
    assert "tuned is complete: it has done its 30 steps; nothing was left to do" in again.stderr
    assert read_config(here / "tuned")["result"]["accuracy"] == document["accuracy"]


def test_two_ranks_speak_with_one_voice(here):
    process = start(
        "finetune", "runs/small", "data/tokens-4.h5", "--steps", 6, "--batch-size", 4, "--device", "cpu", "-o", "two",
        cwd=here, ranks=2,
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=90)
    assert (process.returncode, stdout) == (0, "two\n"), stderr
    said = [line for line in stderr.splitlines() if line.startswith("test accuracy")]
    assert len(said) == 1
    assert read_config(here / "two")["machine"]["ranks"] == 2


def test_a_signal_saves_and_says_how_to_go_on(here):
    process = start(
        "finetune", "runs/small", "--steps", 100000, "--patience", 0, "--device", "cpu", "-o", "x", cwd=here
    )
    wait_for_steps(process, here / "x", 5)
    process.terminate()
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1].endswith("which is saved; resume with: igpt finetune --resume x")
    assert load_model(here / "x").model.config.n_classes == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "there is no run nowhere; runs here: small"),
        (["runs/small", "none.h5"], 1, "none.h5 does not exist; a token file or images were expected there"),
        (["runs/small", "-o", "runs/small"], 1, "runs/small exists already; resume it with --resume runs/small, choose another"),
        (["runs/small", "--layer-decay", "0"], 1, "layer_decay is 0.0, expected more than 0 and at most 1"),
        (["runs/small", "--head-layer", "7"], 1, "head_layer is 7, expected one of 0 to 2 (2 = final norm)"),
        (["runs/small", "--bert-masks", "5"], 1, "bert_masks is 5, but the model is autoregressive"),
        (["runs/small", "--labels-per-class", "40"], 1, "class dark has 31 labelled training images, fewer than"),
        (["runs/small", "--augment", "blur"], 1, "augment is 'blur', expected one of none, flip, crop-flip"),
        (["runs/small", "--augment", "crop-flip"], 1, "a reflection of 4 pixels needs an image larger than that"),
        (["runs/small", "--budget", "soon"], 2, "'soon' is not a duration"),
        (["runs/small", "--lr-search", "fast"], 2, "is 'fast', expected a list of learning rates, such as 1e-3,3e-4"),
        (["runs/small", "--lr-search", "1", "--lr", "1"], 2, "give one of them"),
        (["runs/small", "--test-images", "few"], 2, "is 'few', expected all or a number of images"),
        (["--resume", "runs/small"], 1, "runs/small is not a run of igpt finetune; resume it with: igpt pretrain --resume runs/small"),
        (["--resume", "runs/small", "-o", "x"], 2, "--resume continues in the run's own folder; leave out --out"),
        (["a", "b", "--resume", "runs/small"], 2, "--resume RUN continues with the run's own model"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_message(igpt, here, arguments, code, message):
    before = sorted(str(p) for p in here.rglob("*"))
    done = igpt("finetune", *arguments, "--device", "cpu")
    assert (done.code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(str(p) for p in here.rglob("*")) == before


def test_a_fine_tuned_run_is_not_pretraining(igpt, here):
    assert igpt("finetune", "runs/small", *FAST, "-o", "tuned", "-q").code == 0
    done = igpt("pretrain", "--resume", "tuned", "--device", "cpu")
    assert done.code == 1
    assert "tuned is not a run of igpt pretrain; resume it with: igpt finetune --resume tuned" in done.stderr
