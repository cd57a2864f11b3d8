"""igpt evaluate as typed: table, JSON, files, defaults of the workspace, messages."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from evaluation.test_pixels import make_run
from PIL import Image

from igpt_cli.evaluation.pixels import evaluate
from igpt_cli.report.maps import position_map
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.objectives import Objective
from igpt_cli.workspace import set_latest

NOTE = "note: bits per sub-pixel are bits per token / 3, of the quantised image; they are not comparable with the bits/dim of 8-bit images\n"


@pytest.fixture
def here(workspace, toy_tokens) -> Path:
    """The workspace with data/tokens-4.h5, the run runs/one and, BERT's, runs/two."""
    tokens = open_tokens(toy_tokens(workspace / "data" / "tokens-4.h5", n=20))
    for name, objective in (("one", "ar"), ("two", "bert")):
        data = {"path": "data/tokens-4.h5", "tokens_sha256": tokens.split("train").sha256}
        make_run(Path("runs") / name, tokens.palette, objective, data=data)
    set_latest(Path("runs/one"))
    return workspace


def found_by_the_library(run: str, **settings):
    from igpt_cli.model_dir import load_model

    return evaluate(load_model(run), open_tokens("data/tokens-4.h5"), **settings)


def test_without_arguments_it_works_in_the_workspace(igpt, here):
    done = igpt("evaluate")
    assert done.code == 0
    expected = found_by_the_library("runs/one")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["nats/token", "standard", "error", "bits/token", "bits/sub-pixel"]
    rows = [line.rsplit(maxsplit=4 if i == 0 else 3) for i, line in enumerate(lines)]
    assert [row[0] for row in rows] == ["igpt-tiny", "bigram (left)", "unigram", "uniform"]
    nats = [expected.nats_per_token, expected.bigram, expected.unigram, math.log(8)]
    assert [row[1] for row in rows] == [f"{x:.4f}" for x in nats]
    assert rows[0][2] == f"{expected.standard_error:.4f}"
    assert [row[-2] for row in rows] == [f"{x / math.log(2):.4f}" for x in nats]
    assert rows[-1][-2:] == ["3.0000", "1.0000"]
    assert done.stderr.startswith(
        "run: runs/one (default)\ntokens: data/tokens-4.h5 (default)\nsplit: test (default)\n"
        "igpt-tiny, ar, on 20 images of the split test: 320 tokens in "
    )
    assert done.stderr.endswith(" s\nthe baselines were counted on the split train\n" + NOTE)


def test_json_is_what_the_library_gives_and_quiet_is_quiet(igpt, here):
    done = igpt("evaluate", "runs/two", "data/tokens-4.h5", "--split", "train", "--seed", 4, "--mask-prob", 0.3, "--json", "-q", "-o", "e.json")  # fmt: skip
    assert (done.code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document == json.loads(Path("e.json").read_text())
    expected = found_by_the_library("runs/two", split="train", seed=4, mask_prob=0.3).to_dict()
    for changing in ("seconds", "tokens_per_second"):
        assert document.pop(changing) > 0
        del expected[changing]
    assert document == expected
    assert (document["run"], document["objective"], document["split"]) == ("runs/two", "bert", "train")
    assert (document["seed"], document["mask_prob"], document["seen_in_training"]) == (4, 0.3, True)


def test_what_a_reader_must_know_is_said(igpt, here):
    said = igpt("evaluate", "runs/two", "--split", "train", "--limit", 5).stderr
    assert "images: 5 of 20, evenly spaced\n" in said
    assert "bert, on 5 images of the split train, pixels hidden with probability 0.15: " in said
    assert "note: the model was trained on these images\n" in said
    assert "note: the baselines were counted on the split train itself, which flatters them\n" in said
    assert "split: " not in said
    assert "evenly spaced" not in igpt("evaluate", "--limit", 20).stderr


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_loss_of_each_image_is_written(igpt, here, suffix):
    done = igpt("evaluate", "--per-image", f"new/images.{suffix}", "--json")
    assert f"written: new/images.{suffix}\n" in done.stderr
    text = Path(f"new/images.{suffix}").read_text()
    rows = list(csv.DictReader(text.splitlines())) if suffix == "csv" else [json.loads(x) for x in text.splitlines()]
    assert [(int(row["row"]), row["name"], int(row["label"])) for row in rows] == [
        (i, f"test/{i}.png", i % 2) for i in range(20)
    ]
    mean = np.mean([float(row["nats_per_token"]) for row in rows])
    assert mean == pytest.approx(json.loads(done.stdout)["nats_per_token"], abs=2e-6)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_position_map_is_drawn(igpt, here, suffix):
    done = igpt("evaluate", "--position-map", f"map.{suffix}")
    assert (done.code, f"drawn: map.{suffix}\n" in done.stderr) == (0, True)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert Path(f"map.{suffix}").read_bytes().startswith(start)
    assert not [p for p in here.rglob("*") if ".part" in p.name]


def colours(path: Path, size: int) -> np.ndarray:
    """(size * size, 3): the colours of a map of size x size, row by row, each from the middle of its square."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    drawn = (picture != 255).any(-1)
    columns, rows = (np.flatnonzero(drawn.mean(axis) > 0.7) for axis in (0, 1))
    left = columns[columns < picture.shape[1] * 0.8]  # the colour bar is to the right
    xs = np.linspace(left[0], left[-1], 2 * size + 1)[1::2].astype(int)
    ys = np.linspace(rows[0], rows[-1], 2 * size + 1)[1::2].astype(int)
    return picture[ys][:, xs].reshape(-1, 3)


def test_a_map_shows_each_position_in_its_place(tmp_path):
    from matplotlib import colormaps

    values = np.linspace(1, 2, 16).reshape(4, 4)
    values[1, 2] = np.nan
    for name in ("a.png", "b.png"):
        position_map(values, tmp_path / name, "a title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    expected = 255 * colormaps["viridis"](values.ravel() - 1)[:, :3]
    expected[6] = 0xD1, 0xD5, 0xDB
    np.testing.assert_allclose(colours(tmp_path / "a.png", 4), expected, atol=3)


def test_one_high_value_does_not_take_all_colours(tmp_path):
    values = np.linspace(1, 2, 400).reshape(20, 20)
    values[0, 0] = 50.0
    position_map(values, tmp_path / "map.png")
    found = colours(tmp_path / "map.png", 20)
    end_of_colours = (0xFD, 0xE7, 0x25)
    np.testing.assert_allclose(found[[0, -1]], [end_of_colours] * 2, atol=3)
    assert len(np.unique(found, axis=0)) > 150
    for odd in (np.full((3, 3), np.nan), np.ones((3, 3)), np.ones((1, 1))):
        position_map(odd, tmp_path / "odd.png")


def pixel_losses_by_the_library(run: str, rows: list[int], **settings) -> np.ndarray:
    from igpt_cli.evaluation.pixel_map import pixel_loss_map
    from igpt_cli.model_dir import load_model

    split = open_tokens("data/tokens-4.h5").split("test")
    return pixel_loss_map(load_model(run), split.tokens[rows], np.array(rows), **settings)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_map_of_some_images_is_drawn(igpt, here, suffix):
    done = igpt("evaluate", "--map", f"map.{suffix}", "--json", "-o", "e.json")
    assert (done.code, f"map: 8 of 20 images, evenly spaced\ndrawn: map.{suffix}\n" in done.stderr) == (0, True)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert Path(f"map.{suffix}").read_bytes().startswith(start)
    document = json.loads(done.stdout)
    assert document == json.loads(Path("e.json").read_text())
    rows = [0, 2, 5, 7, 10, 12, 15, 17]
    expected = pixel_losses_by_the_library("runs/one", rows).mean((1, 2))
    assert document["map"] == {
        "path": f"map.{suffix}",
        "rows": rows,
        "nats_per_token": pytest.approx(expected, abs=2e-6),
        "passes": 1,
    }
    assert not [p for p in here.rglob("*") if ".part" in p.name]


def test_the_map_as_arrays_is_what_the_library_gives(igpt, here):
    args = ("runs/two", "--limit", 10, "--seed", 4, "--mask-prob", 0.3, "--batch-size", 7)
    done = igpt("evaluate", *args, "--map", "map.npz", "--map-images", 5, "--json")
    assert "map: 5 of 10 images, evenly spaced\nwritten: map.npz\n" in done.stderr
    rows = [0, 4, 8, 12, 16]
    with np.load("map.npz") as arrays:
        expected = pixel_losses_by_the_library("runs/two", rows, seed=4, mask_prob=0.3)
        np.testing.assert_allclose(arrays["nats"], expected, rtol=1e-5)
        assert arrays["rows"].tolist() == json.loads(done.stdout)["map"]["rows"] == rows
        assert arrays["names"].tolist() == [f"test/{i}.png" for i in rows]
    assert json.loads(done.stdout)["map"]["passes"] == 3


def test_a_photo_alone_and_a_folder_have_a_map(igpt, here):
    photos = Path(__file__).parents[2] / "data" / "samples" / "photos"
    done = igpt("evaluate", "runs/one", photos / "test" / "disc" / "00.jpg", "--map", "one.png", "--json")
    assert (done.code, "map: " in done.stderr, "on 1 image of" in done.stderr) == (0, False, True)
    document = json.loads(done.stdout)
    assert (document["n_images"], document["map"]["rows"]) == (1, [0])
    assert document["map"]["nats_per_token"] == [pytest.approx(document["nats_per_token"], abs=2e-6)]
    done = igpt("evaluate", "runs/two", photos, "--map", "six.png", "--json", "-q")
    assert json.loads(done.stdout)["map"]["rows"] == list(range(6))


def test_the_map_shows_the_original_where_it_is_kept(igpt, here):
    photos = Path(__file__).parents[2] / "data" / "samples" / "photos"
    for name, more in (("plain", ()), ("kept", ("--keep-rgb",))):
        igpt("tokenize", photos, "-p", "runs/one", "-r", 4, "--allow-size", "-o", f"{name}.h5", *more)
        assert igpt("evaluate", "runs/one", f"{name}.h5", "--map", f"{name}.png").code == 0
    split = open_tokens("kept.h5").split("test")
    for name, images in (("plain", split.decode(slice(None))), ("kept", split.rgb)):
        picture = np.asarray(Image.open(f"{name}.png").convert("RGB"))
        for i in range(6):  # two pairs of 4 x 4 pixels, 48 dots each, a line
            x, y = 24 + i % 2 * (2 * 192 + 6 + 28) + 24, 68 + i // 2 * (192 + 52) + 24
            np.testing.assert_allclose(picture[y : y + 192 : 48, x : x + 192 : 48].astype(int), images[i], atol=1)


def test_images_are_quantized_on_the_way(igpt, here):
    photos = Path(__file__).parents[2] / "data" / "samples" / "photos"
    done = igpt("evaluate", "runs/one", photos, "--per-image", "images.csv", "--json")
    assert done.code == 0
    document = json.loads(done.stdout)
    assert (document["tokens"], document["split"], document["n_images"]) == (str(photos), "test", 6)
    assert len(Path("images.csv").read_text().splitlines()) == 7
    assert not document["seen_in_training"]


def test_outputs_are_checked_before_any_work(igpt, here):
    Path("old.csv").write_text("old")
    for args, message in (
        (("--per-image", "old.csv"), "old.csv exists already; choose another --out, or overwrite it with --force"),
        (("-o", "old.csv"), "old.csv exists already; choose another --out, or overwrite it with --force"),
        (("--per-image", "images.txt"), "--per-image images.txt ends in '.txt'; a .csv or .jsonl file is written"),
        (
            ("--position-map", "map.gif"),
            "--position-map map.gif ends in '.gif'; a .png, .svg or .pdf file is written",
        ),
        (
            ("--map", "m.gif"),
            "--map m.gif ends in '.gif'; a .png, .svg, .pdf or .npz file is written",
        ),
        (("--map", "old.csv/m.png"), "cannot write old.csv/m.png: old.csv is not a folder; choose another --out"),
        (("--map-images", 3), "--map-images is about the images of --map; give --map with it"),
        (
            ("--map", "m.png", "--map-images", 65),
            "--map-images is 65; a picture holds 64. Write more as arrays: --map m.npz",
        ),
        (
            ("--position-map", "x.png", "--map", "x.png"),
            "two outputs have the same name; give each its own: x.png, x.png",
        ),
        (("-o", "x.csv", "--per-image", "./x.csv"), "two outputs have the same name; give each its own: x.csv, x.csv"),
    ):
        done = igpt("evaluate", "no-such-run", *args)
        assert (done.code, done.stdout, done.stderr) == (1, "", f"error: {message}\n")
    assert Path("old.csv").read_text() == "old"
    assert igpt("evaluate", "--per-image", "old.csv", "--force", "-q").code == 0
    assert Path("old.csv").read_text().startswith("row,name,label,nats_per_token\n")


def test_what_does_not_fit_is_said(igpt, here, toy_tokens):
    other = toy_tokens(here / "shade.h5", shade=1)
    done = igpt("evaluate", "runs/one", other)
    assert (done.code, done.stdout) == (1, "")
    mine, theirs = (open_tokens(p).palette.sha256[:12] for p in ("data/tokens-4.h5", other))
    assert f"uses palette {theirs} (8 colours), runs/one was trained with palette {mine} (8 colours)" in done.stderr
    done = igpt("evaluate", "--split", "dev")
    assert done.stderr.endswith("error: data/tokens-4.h5 has no split 'dev'; its splits: train, test\n")
    assert igpt("evaluate", "--mask-prob", 0.2).stderr.endswith(
        "error: --mask-prob is for BERT models; runs/one is autoregressive and is asked for all pixels\n"
    )
    assert igpt("evaluate", "--limit", 0).code == 2


def test_an_interruption_leaves_nothing_half(igpt, here, monkeypatch):
    calls = []

    def ctrl_c(self, *args):
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return whole(self, *args)

    whole = Objective.token_losses
    monkeypatch.setattr(Objective, "token_losses", ctrl_c)
    before = set(here.rglob("*"))
    outputs = ("-o", "e.json", "--per-image", "i.csv", "--position-map", "m.png", "--map", "s.png")
    for run, at_once in (("runs/one", 4), ("runs/two", 20)):  # while it is evaluated; while it is mapped
        calls.clear()
        done = igpt("evaluate", run, "--batch-size", at_once, *outputs)
        assert (done.code, done.stdout) == (130, "")
        assert len(calls) == 3
        assert set(here.rglob("*")) == before


def test_the_shipped_model_is_far_below_the_baselines(igpt, workspace):
    done = igpt("evaluate", "builtin:igpt-tiny", "embedded", "--limit", 16, "--json", "-q")
    found = json.loads(done.stdout)
    assert found["nats_per_token"] + 0.2 < found["bigram"] < found["unigram"] < found["uniform"]
