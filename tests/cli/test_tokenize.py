"""igpt tokenize: what is printed where, which defaults are taken, and the message for each bad input."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.store import open_tokens

GREYS = np.linspace(0, 255, 8)[:, None].repeat(3, 1)


@pytest.fixture
def photos(workspace):
    """photos/{train,test}/{cat,dog}/*.png, 3 each, one of them broken, and the workspace's palette."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = workspace / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 256, (40, 36, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    (workspace / "photos/train/dog/1.png").write_bytes(b"\x89PNG\r\n")
    Palette(GREYS).save(workspace / "data/palette.npz")
    return workspace / "photos"


def test_without_arguments_it_works_in_the_workspace(igpt, workspace):
    Palette(GREYS).save(workspace / "data/palette.npz")
    done = igpt("tokenize")
    assert (done.code, done.stdout) == (0, "data/tokens-32.h5\n")
    assert done.stderr.startswith(
        "palette: data/palette.npz (default)\nimages: embedded (default)\nout: data/tokens-32.h5 (default)\n"
        "3,812 images (train 3,022, test 790 rows of 1,024 tokens, 9 classes) in "
    )
    file = open_tokens("data/tokens-32.h5")
    assert (file.attrs["source"], file.classes[:2], len(file.split("test"))) == (
        "embedded",
        ["activities", "animals-nature"],
        790,
    )


def test_a_folder_with_splits_and_a_broken_image(igpt, photos):
    done = igpt("tokenize", "photos", "-o", "t.h5", "--workers", 1)
    assert (done.code, done.stdout) == (0, "t.h5\n")
    assert "excluded train/dog/1.png: " in done.stderr
    assert "11 images (train 5, test 6 rows of 1,024 tokens, 2 classes)" in done.stderr
    assert "1 images could not be read and were excluded" in done.stderr
    file = open_tokens("t.h5")
    assert (file.classes, file.skipped) == (["cat", "dog"], {"train": 1})
    assert file.split("train").names == [f"train/{n}.png" for n in ("cat/0", "cat/1", "cat/2", "dog/0", "dog/2")]


def test_json_is_one_document_and_quiet_says_nothing(igpt, photos):
    done = igpt("tokenize", "photos", "-o", "t.h5", "--json", "-q", "--views", 2, "--split", "train")
    document = json.loads(done.stdout)
    assert document["rows"] == {"train": 10}
    assert (document["path"], document["images"], document["n_bad"]) == ("t.h5", 5, 1)
    assert document["bad"][0]["name"] == "train/dog/1.png"
    assert done.stderr == ""


def test_paths_on_stdin(igpt, photos):
    paths = sorted(str(p) for p in photos.glob("test/*/*.png"))
    for separator, options in (("\n", []), ("\0", ["-0"])):
        stdin = separator.join(paths) + separator
        done = igpt("tokenize", "-", *options, "--split", "test", "-o", "t.h5", "--force", stdin=stdin)
        assert (done.code, done.stdout) == (0, "t.h5\n")
        assert len(open_tokens("t.h5").split("test")) == 6


def test_shards_merge_to_the_whole(igpt, photos, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert igpt("tokenize", "photos", "-o", "whole.h5").code == 0
    parts = [igpt("tokenize", "photos", "--shard", f"{i}/3").stdout.strip() for i in range(2)]
    assert parts[0] == "data/tokens-32.shard-0-of-3.h5"
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts.append(igpt("tokenize", "photos", "--shard", "auto").stdout.strip())
    done = igpt("tokens", "merge", *parts, "-o", "merged.h5")
    assert (done.code, done.stdout) == (0, "merged.h5\n")
    with open("merged.h5", "rb") as a, open("whole.h5", "rb") as b:
        assert a.read() == b.read()


def test_options_reach_the_file(igpt, photos):
    options = ["-r", 48, "--keep-rgb", "--exact-decode", "--limit", 2, "--seed", 4, "--views", 1]
    assert igpt("tokenize", "photos", "-o", "t.h5", *options).code == 0
    file = open_tokens("t.h5")
    chosen = {k: file.preprocess[k] for k in ("resolution", "seed", "views", "exact_decode")}
    assert chosen == {"resolution": 48, "seed": 4, "views": 1, "exact_decode": True}
    assert file.split("train").rgb.shape == (2, 48, 48, 3)
    assert igpt("tokenize", "photos", "-r", 20, "--allow-size", "-o", "small.h5").code == 0
    assert open_tokens("small.h5").split("test").tokens.shape == (6, 400)


BAD = {
    "no palette": ("tokenize photos -p none.npz", "none.npz does not exist; a palette was expected there"),
    "palette of another kind": (
        "tokenize photos -p photos/test/cat/0.png",
        "it is a PNG image, which holds no palette",
    ),
    "no images": ("tokenize nowhere", "no such file or folder: nowhere"),
    "empty folder": ("tokenize empty", "the folder empty holds no images"),
    "unusual size": (
        "tokenize photos -r 40",
        "resolution 40 would make sequences of 1,600 tokens; iGPT uses 32, 48 or 64, and --allow-size allows others",
    ),
    "too large": ("tokenize photos -r 400 --allow-size", "resolution 400 is outside 1..224"),
    "missing split": ("tokenize photos --split val", "photos has no split 'val'; its splits: train, test"),
    "bad shard": ("tokenize photos --shard 3/3", "there is no shard 3/3: shards of 3 are 0/3..2/3"),
    "shard in words": ("tokenize photos --shard first", "--shard first is not i/n, such as 0/4, nor auto"),
    "auto without ranks": ("tokenize photos --shard auto", "--shard auto needs RANK and WORLD_SIZE (torchrun) or"),
    "strict": ("tokenize photos -o t.h5 --strict", "train/dog/1.png: "),
    "existing output": (
        "tokenize photos -o old.h5",
        "old.h5 exists already; choose another --out, or overwrite it with",
    ),
    "output in a file": ("tokenize photos -o old.h5/t.h5", "cannot write old.h5/t.h5: old.h5 is not a folder"),
    "output is a folder": ("tokenize photos -o empty --force", "empty is a folder, a file is to be written there"),
    "no shards": ("tokenize photos --shard 0/0", "there is no shard 0/0: n is at least 1"),
    "a pipe": ("tokenize pipe.jpg", "none of the 1 images can be read; the first is pipe.jpg: not a regular file"),
    "a pipe of no kind": ("tokenize pipe.jpg pipe", "pipe is not a regular file"),
    "-0 without -": ("tokenize photos -0", "-0 (--null) is about paths on stdin; give the source '-' with it"),
    "stdin and more": ("tokenize - photos", "'-' (paths on stdin) cannot be combined with other sources"),
    "nothing on stdin": ("tokenize -", "no paths on stdin; give some, one a line"),
    "all broken": ("tokenize photos/train/dog/1.png", "none of the 1 images can be read; the first is "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message(igpt, photos, monkeypatch, name):
    for variable in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(variable, raising=False)
    line, message = BAD[name]
    photos.with_name("empty").mkdir()
    photos.with_name("old.h5").write_text("old")
    for pipe in ("pipe", "pipe.jpg"):
        os.mkfifo(photos.with_name(pipe))
    done = igpt(*line.split(), stdin="")
    assert (done.code, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert photos.with_name("old.h5").read_text() == "old"
    assert not photos.with_name("t.h5").exists()


def test_no_palette_in_the_workspace_names_the_command(igpt, workspace):
    done = igpt("tokenize")
    assert done.code == 1
    assert done.stderr == (
        "error: no palette given and none at data/palette.npz; run `igpt palette fit` first, or give --palette\n"
    )


def test_an_interrupted_run_says_how_to_go_on(igpt, photos, monkeypatch):
    from igpt_cli.images import parallel
    from igpt_cli.tokens import tokenize as library

    monkeypatch.setattr(parallel, "CHUNK_IMAGES", 3)
    add, calls = library._Run.add, []

    def interrupted(self, *chunk):
        add(self, *chunk)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(library._Run, "add", interrupted)
    done = igpt("tokenize", "photos", "-o", "t.h5", "--workers", 1)
    assert done.code == 130
    assert done.stderr.endswith(
        "6 images are stored in t.h5.part; the same command with --resume continues\ninterrupted\n"
    )
    again = igpt("tokenize", "photos", "-o", "t.h5", "--workers", 1)
    assert (again.code, again.stderr.splitlines()[-1]) == (
        1,
        "error: t.h5.part holds 6 images of an interrupted run; continue with --resume, or start anew with --force",
    )
    assert igpt("tokenize", "photos", "-o", "t.h5", "--workers", 1, "--resume").stdout == "t.h5\n"
    assert len(open_tokens("t.h5").split("train")) == 5


def test_views_of_images_that_need_no_cropping_are_said_to_be_the_same(igpt, workspace):
    Palette([[0, 0, 0], [255, 255, 255]]).save("data/palette.npz")
    np.save("small.npy", np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    done = igpt("tokenize", "small.npy", "--views", "3", "-o", "t.h5")
    assert "all views of 2 images are the same: an image that is 32 x 32 already is used as it is" in done.stderr
    assert len(open_tokens("t.h5").split("train")) == 6


def test_names_that_are_no_utf8_or_hold_line_breaks_go_all_the_way(igpt, workspace):
    """From the file system to the token file, its description and its picture."""
    Palette([[0, 0, 0], [255, 255, 255]]).save("data/palette.npz")
    for name in (b"so\xff/two\nlines", b"so\xff/steer\x1b[31m"):
        os.makedirs(name)
        with open(name + b"/x.png", "wb") as file:
            Image.new("RGB", (32, 32)).save(file, "PNG")
    done = igpt("tokenize", os.fsdecode(b"so\xff"), "-o", "t.h5")
    assert done.code == 0, done.stderr
    shown = igpt("tokens", "info", "t.h5").stdout
    assert "source = so\\udcff" in shown
    assert "two\\nlines" in shown
    assert "steer\\x1b[31m" in shown
    assert igpt("tokens", "show", "t.h5", "-o", "t.png").code == 0
