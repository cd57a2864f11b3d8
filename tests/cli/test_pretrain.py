"""igpt pretrain and igpt probe as typed: defaults of the workspace, streams, messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from igpt_cli.model_dir import read_config, read_metrics

FAST = ["--steps", "2", "--batch-size", "4", "--val-images", "4", "--device", "cpu"]


@pytest.fixture
def tokens_here(workspace, toy_tokens):
    """data/tokens-4.h5 in the current folder."""
    return toy_tokens(workspace / "data" / "tokens-4.h5")


def test_the_two_commands_without_arguments_work_in_the_workspace(igpt, workspace, tokens_here):
    done = igpt("pretrain", *FAST)
    assert (done.code, done.stdout) == (0, "runs/igpt-tiny-1\n")
    assert "tokens: data/tokens-4.h5 (default)\nrun: runs/igpt-tiny-1 (default)\n" in done.stderr
    assert "ends after 2 steps" in done.stderr
    assert "next: igpt probe runs/igpt-tiny-1 --layers all" in done.stderr
    assert igpt("pretrain", *FAST, "-q").stdout == "runs/igpt-tiny-2\n"
    probed = igpt("probe", "--layer", "20")
    assert probed.code == 0
    assert probed.stdout.splitlines()[0].split() == ["layer", "accuracy", "%", "95%", "held", "out", "%", "C"]
    assert [line.split("  ")[0] for line in probed.stdout.splitlines()[1:]] == [
        "20 *",
        "raw pixels",
        "colour histogram",
        "untrained, layer 20",
    ]
    assert "run: runs/igpt-tiny-2 (default)\n" in probed.stderr
    assert "tokens: data/tokens-4.h5 (default)\n" in probed.stderr
    assert "the commonest class: 50.0%" in probed.stderr


def test_results_are_json_when_asked_and_quiet_is_quiet(igpt, workspace, tokens_here):
    trained = igpt("pretrain", *FAST, "-q", "--json", "-o", "here")
    assert trained.stderr == ""
    document = json.loads(trained.stdout)
    assert (document["run"], document["steps"], document["status"]) == ("here", 2, "done")
    (last,) = read_metrics(workspace / "here", lambda r: "val_loss" in r)
    assert document["val_loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    probed = igpt("probe", "here", tokens_here, "--layers", "0,3", "--json", "-q", "-o", "p.json", "--figure", "p.png")
    assert probed.stderr == ""
    found = json.loads(probed.stdout)
    assert found == json.loads((workspace / "p.json").read_text())
    assert {row["layer"] for row in found["layers"]} == {0, 3}
    from PIL import Image

    assert Image.open(workspace / "p.png").size[0] > 600


def test_the_recipe_is_recorded(igpt, workspace, tokens_here):
    igpt(
        "pretrain",
        *FAST,
        "--lr",
        "0.5",
        "--warmup-steps",
        "7",
        "--optimizer",
        "adamw",
        "--seed",
        "3",
        "--n-layer",
        "2",
        "-o",
        "here",
    )
    config = read_config(workspace / "here")
    expected = {"steps": 2, "batch_size": 4, "learning_rate": 0.5, "warmup_steps": 7, "seed": 3, "optimizer": "adamw"}
    assert {k: config["training"][k] for k in expected} == expected
    assert (config["model"]["n_layer"], config["model"]["n_embd"]) == (2, 64)
    assert config["data"]["path"] == "data/tokens-4.h5"


def test_images_are_quantized_on_the_way(igpt, workspace):
    import numpy as np

    from igpt_cli.palette.palette import Palette

    Palette(np.linspace(0, 255, 16)[:, None].repeat(3, 1).astype(np.float32)).save("grey.npz")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = workspace / "photos" / split / label
            folder.mkdir(parents=True)
            from PIL import Image

            for i in range(10):
                pixels = rng.integers(0, 100, (8, 8, 3)) + 150 * (label == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    trained = igpt("pretrain", "photos", "-p", "grey.npz", "-r", "8", *FAST, "-o", "here")
    assert (trained.code, trained.stdout) == (0, "here\n")
    assert read_config(workspace / "here")["data"]["path"] == "photos"
    probed = igpt("probe", "here", "--layer", "0", "--json")
    assert "images: photos (default)" in probed.stderr
    found = json.loads(probed.stdout)
    assert (found["tokens"], found["n_train"], found["accuracy"]) == ("photos", 20, 100.0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "none.h5"], 1, "none.h5 does not exist; a token file or images were expected there"),
        (["pretrain", "notes.h5"], 1, "notes.h5 is a text file; a token file (HDF5) was expected there"),
        (["pretrain", "-m", "igpt-huge"], 1, "there is no model 'igpt-huge'; did you mean igpt-s or igpt-m or igpt-l? igpt models lists all"),
        (["pretrain", "--device", "cuda:77"], 1, "device cuda:77 is not here"),
        (["pretrain", "--device", "gpu"], 1, "there is no device 'gpu'; use --device auto, cpu"),
        (["pretrain", "--batch-size", "1000"], 1, "batch_size 1000 is more than the 58 training images of"),
        (["pretrain", "--batch-size", "0", "--lr", "nan"], 1, "batch_size is 0, expected more than 0; learning_rate is nan"),
        (["pretrain", "--n-head", "7"], 1, "igpt-tiny cannot be built so: n_embd 64 does not divide into n_head 7 heads"),
        (["pretrain", "--augment", "blur"], 1, "augment is 'blur', expected one of none, flip, crop-flip"),
        (["pretrain", "--objective", "gpt"], 1, "objective is 'gpt', expected one of ar, bert"),
        (["pretrain", "--budget", "soon"], 2, "'soon' is not a duration; write seconds (90) or 90s, 15m, 2h, 1h30m"),
        (["pretrain", "--save-every", "1.5"], 1, "save_every is '1.5'; write a number of steps (500) or a time (15m)"),
        (["pretrain", "--micro-batch", "few"], 2, "--micro-batch: is 'few', expected auto or a number of images"),
        (["pretrain", "--micro-batch", "3"], 1, "micro_batch 3 does not divide the 4 images of each of 1 ranks; use one of 1, 2, 4"),
        (["pretrain", "--accumulate", "2", "--micro-batch", "2"], 1, "give micro_batch or accumulate, not both"),
        (["pretrain", "--shard", "half"], 1, "shard is 'half', expected one of auto, none, full"),
        (["pretrain", "--mask-prob", "1"], 1, "mask_prob is 1.0, expected between 0 and 1"),
        (["pretrain", "--config", "notes.h5"], 1, "notes.h5 is not readable JSON"),
        (["pretrain", "--config", "none.json"], 1, "none.json does not exist; a run's config.json was expected there"),
        (["pretrain", "--config", "runs/other/config.json", "--clip", "-1"], 1, "clip is -1.0, expected more than 0"),
        (["pretrain", "--resume", "nowhere"], 1, "there is no run nowhere; runs here: broken, cut, good, "),
        (["pretrain", "--resume", "latest"], 1, "no run given and runs/latest names none"),
        (["pretrain", "--resume", "runs/good", "-o", "x"], 2, "--resume continues in the run's own folder; leave out --out"),
        (["pretrain", "--resume", "runs/good", "--force"], 2, "--resume overwrites nothing; leave out --force"),
        (["pretrain", "--resume", "runs/good", "data/tokens-4.h5"], 1, "runs/good continues as it started, but the split 'train' was"),
        (["pretrain", "-o", "runs/good"], 1, "runs/good exists already; resume it with --resume runs/good, choose another --out"),
        (["pretrain", "--optimizer", "sgd"], 1, "optimizer is 'sgd', expected one of adamw, muon"),
        (["pretrain", "--precision", "int8"], 1, "precision is 'int8', expected one of auto, float32, bfloat16"),
        (["pretrain", "--steps", "0"], 2, "Invalid value for '--steps'"),
        (["pretrain", "-o", "data"], 1, "data exists already; choose another --out, or overwrite it with --force"),
        (["pretrain", "-o", "notes.h5/run"], 1, "cannot make the folder notes.h5/run"),
        (["pretrain", "empty"], 1, "the folder empty holds no images"),
        (["pretrain", "embedded", "-p", "none.npz"], 1, "none.npz does not exist"),
        (["pretrain", "embedded"], 1, "no palette given and none at data/palette.npz; run `igpt palette fit` first"),
        (["probe"], 1, "no run given and runs/latest names none; run `igpt pretrain` first, or use builtin:igpt-tiny"),
        (["probe", "nowhere"], 1, "there is no run nowhere; runs here: broken, cut, good, "),
        (["probe", "builtin:gpt-2"], 1, "there is no built-in model 'builtin:gpt-2'; the built-in models: "),
        (["probe", "notes.h5"], 1, "notes.h5 is not a model directory; a folder with config.json and model.safetensors"),
        (["probe", "data"], 1, "data is not a model directory: it has no config.json"),
        (["probe", "runs/good", "--layer", "99"], 1, "layer 99 asked for; igpt-tiny has the layers 0 to 24"),
        (["probe", "runs/good", "--layers", "x"], 1, "layers 'x' cannot be read; write all, 20, 0,12,24 or 10-14"),
        (["probe", "runs/good", "none.h5"], 1, "none.h5 does not exist"),
        (["probe", "runs/good", "train.h5"], 1, "train.h5 has no split 'test'; its splits: train"),
        (["probe", "runs/good", "bare.h5"], 1, "no image of the split 'train' has a label"),
        (["probe", "runs/good", "other.h5"], 1, "tokenize again with --palette"),
        (["probe", "runs/good", "--figure", "a.gif"], 1, "--figure a.gif ends in '.gif'; a .png, .svg or .pdf file"),
        (["probe", "runs/good", "-o", "notes.h5"], 1, "notes.h5 exists already; choose another --out"),
        (["probe", "runs/good", "--train-images", "few"], 2, "'few' is neither a number of images nor 'all'"),
        (["probe", "runs/nan"], 1, "does not fit its config.json: wpe holds NaN or infinity"),
        (["probe", "runs/cut"], 1, "model.safetensors is not a readable safetensors file"),
        (["probe", "runs/other"], 1, "config.json is not an igpt model's: its format is 'other', expected 'igpt-model'"),
        (["probe", "runs/newer"], 1, "config.json has format version 2; this igpt 0.1.0 reads version 1"),
        (["probe", "runs/broken"], 1, "config.json is not readable JSON"),
        (["probe", "runs/shape"], 1, "does not fit its config.json: wte.weight is (8, 64), expected (9, 64)"),
        (["probe", "runs/running"], 1, "model.safetensors does not exist; the model's weights was expected there"),
        (["models", "vit"], 1, "there is no model 'vit'"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_message(bad_workspace, igpt, arguments, code, message):
    before = sorted(str(p) for p in bad_workspace.rglob("*"))
    done = igpt(*arguments)
    assert (done.code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert sorted(str(p) for p in bad_workspace.rglob("*")) == before  # nothing half-written


@pytest.fixture
def bad_workspace(workspace, tokens_here, toy_tokens, good_run):
    """A workspace with a good run and several that are broken, each in one way."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    (workspace / "notes.h5").write_text("not tokens")
    (workspace / "empty").mkdir()
    toy_tokens(workspace / "train.h5", splits=("train",))
    toy_tokens(workspace / "bare.h5", labelled=False)
    toy_tokens(workspace / "other.h5", shade=1)
    runs = {n: workspace / "runs" / n for n in ("good", "nan", "cut", "other", "newer", "broken", "shape", "running")}
    for path in runs.values():
        shutil.copytree(good_run, path)
    weights = load_file(runs["nan"] / "model.safetensors")
    weights["wpe"][0] = torch.nan
    save_file(weights, runs["nan"] / "model.safetensors")
    whole = (runs["cut"] / "model.safetensors").read_bytes()
    (runs["cut"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    def edit(name, **changes):
        config = json.loads((runs[name] / "config.json").read_text())
        (runs[name] / "config.json").write_text(json.dumps({**config, **changes}))
        return config

    edit("other", format="other")
    config = edit("newer", format_version=2)
    edit("shape", model={**config["model"], "n_vocab": 9})
    (runs["broken"] / "config.json").write_text("{")
    (runs["running"] / "model.safetensors").unlink()
    return workspace


@pytest.fixture(scope="session")
def good_run(tmp_path_factory):
    """A run of two steps on toy tokens, made once."""
    import numpy as np

    from igpt_cli.palette.palette import Palette
    from igpt_cli.tokens.store import open_tokens
    from igpt_cli.tokens.writer import TokenWriter
    from igpt_cli.training.run import pretrain
    from igpt_cli.training.settings import PretrainSettings

    folder = tmp_path_factory.mktemp("good")
    palette = Palette(np.linspace(10, 240, 8)[:, None].repeat(3, 1).astype(np.float32))
    with TokenWriter(folder / "t.h5", palette, 4) as writer:
        writer.append("train", np.zeros((8, 16), int), np.full(8, -1), [str(i) for i in range(8)])
    recipe = PretrainSettings(steps=2, batch_size=2, optimizer="adamw")
    return pretrain(open_tokens(folder / "t.h5"), folder / "run", recipe, device="cpu").run


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_weights_and_exits_130(workspace, tokens_here, sent):
    command = [
        sys.executable,
        "-m",
        "igpt_cli",
        "pretrain",
        "--time-limit",
        "600",
        "-b",
        "4",
        "--device",
        "cpu",
        "-o",
        "here",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 120
    while not (workspace / "here" / "metrics.jsonl").exists() or not read_metrics(workspace / "here"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted after step" in err
    assert "Traceback" not in err
    assert (workspace / "here" / "model.safetensors").exists()
    assert read_config(workspace / "here")["result"]["status"] == "interrupted"


def test_init_starts_from_the_weights_of_a_run(igpt, workspace, tokens_here):
    """The first loss is that of the given weights on the first batch, and a resumed run needs them no more."""
    small = ["--n-layer", "2", "--n-embd", "16", "--val-images", "4", "--device", "cpu", "-q"]
    for out, more in (("first", ["--lr", "0.02"]), ("fresh", ["--lr", "1e-9"])):
        assert igpt("pretrain", *small, "--steps", "20", "-b", "4", *more, "-o", out).code == 0
    done = igpt("pretrain", "--init", "first", "--lr", "1e-9", *FAST, "-q", "-o", "second")
    assert (done.code, done.stderr) == (0, "")
    first, second = read_config(workspace / "first"), read_config(workspace / "second")
    assert second["model"] == first["model"]
    assert second["initialised_from"]["path"] == "first"
    losses = {
        run: next(r["val_loss"] for r in read_metrics(workspace / run)[::-1] if "val_loss" in r)
        for run in ("first", "fresh", "second")
    }
    assert losses["second"] == pytest.approx(losses["first"], abs=1e-4)
    assert losses["fresh"] > losses["first"] + 0.05
    resumed = igpt("pretrain", "--resume", "second", "-q")
    assert (resumed.code, resumed.stdout) == (0, "second\n")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--init", "first", "-m", "igpt-s", "--n-head", "2"], 2, "leave out --model, --n-head"),
        (["--init", "none"], 1, "there is no run none"),
        (["--init", "builtin:igpt-tiny"], 1, "builtin:igpt-tiny"),  # of another resolution
        (["--init", "first", "--resume", "latest"], 2, "leave out --init"),
    ],
)
def test_init_refuses_what_does_not_fit(igpt, workspace, tokens_here, options, code, said):
    done = igpt("pretrain", *options)
    assert (done.code, done.stdout) == (code, "")
    assert said in " ".join(done.stderr.split())
    assert not list(workspace.glob("runs/*"))
