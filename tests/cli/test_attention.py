"""igpt attention as typed: pictures, JSON, the table of distances, defaults, messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.test_pixels import make_run
from PIL import Image

from igpt_cli.model_dir import load_model, new_config, write_model
from igpt_cli.model_input import decoder
from igpt_cli.models.registry import build_model
from igpt_cli.probing.attention import Looks, attention_distance, attention_maps
from igpt_cli.report.attention import PALE, map_figure
from igpt_cli.tokens.store import open_tokens
from igpt_cli.workspace import set_latest

PHOTOS = Path(__file__).parents[2] / "data" / "samples" / "photos"


@pytest.fixture
def here(workspace, toy_tokens) -> Path:
    """The workspace with data/tokens-4.h5, the run runs/one, and runs/conv, whose heads are Gaussians."""
    tokens = open_tokens(toy_tokens(workspace / "data" / "tokens-4.h5", n=20))
    data = {"path": "data/tokens-4.h5", "tokens_sha256": tokens.split("train").sha256}
    make_run(Path("runs/one"), tokens.palette, data=data)
    for name, positions in (("conv", "quadratic"), ("content", "learned+content")):
        torch.manual_seed(0)
        config = {
            "name": name,
            "backend": "attention_conv",
            "depth": 2,
            "num_heads": 4,
            "embed_dim": 8,
            "patch_size": 1,
        }
        config |= {"positions": positions, "resolution": 4}
        write_model(
            Path("runs") / name, build_model(config).state_dict(), tokens.palette, new_config(config, data=data)
        )
    set_latest(Path("runs/one"))
    return workspace


def toy(rows) -> np.ndarray:
    return open_tokens("data/tokens-4.h5").split("test").tokens[rows]


def test_without_arguments_the_middle_of_an_image_is_shown(igpt, here):
    done = igpt("attention")
    assert (done.code, done.stdout) == (0, "runs/one/samples/attention-1.png\n")
    assert done.stderr == (
        "run: runs/one (default)\nout: runs/one/samples/attention-1.png (default)\n"
        "tokens: data/tokens-4.h5 (default)\nsplit: test (default)\ndrawn: runs/one/samples/attention-1.png\n"
    )
    assert Path("runs/one/samples/attention-1.png").read_bytes().startswith(b"\x89PNG")
    assert igpt("attention", "-q").stdout == "runs/one/samples/attention-2.png\n"


def test_json_says_what_the_library_gives(igpt, here):
    done = igpt(
        "attention", "runs/one", "--pixel", "3,1", "-n", 2, "--layer", 1, "--head", 1, "--json", "-q", "-o", "a.svg"
    )
    assert (done.code, done.stderr) == (0, "")
    look = attention_maps(load_model("runs/one"), toy([0, 10]), [1], pixel=(3, 1))[1]
    assert json.loads(done.stdout) == {
        "path": "a.svg", "model": "igpt-tiny", "run": "runs/one", "pixel": [3, 1], "rows": [0, 10],
        "layers": [{
            "layer": 1, "query": [3, 1],
            "highest": [[pytest.approx(x, abs=1e-6)] for x in look.maps[:, 1].max((1, 2))],
            "elsewhere": [[pytest.approx(x, abs=1e-6)] for x in look.elsewhere[:, 1]],
        }],
    }  # fmt: skip
    assert Path("a.svg").read_text().startswith("<?xml")


def test_distances_are_a_picture_a_table_and_json(igpt, here):
    expected = attention_distance(load_model("runs/one"), toy(np.arange(20)))
    done = igpt("attention", "--distance", "-o", "d.png")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1:] == [
        [str(layer), f"{d.mean():.2f}", f"{d.min():.2f}", f"{d.max():.2f}"] for layer, d in expected.items()
    ]
    assert Path("d.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(igpt("attention", "--distance", "-o", "e.pdf", "--json").stdout)
    for row, (layer, d) in zip(document["layers"], expected.items()):
        assert (row["layer"], row["heads"]) == (layer, pytest.approx(d, abs=1e-4))
        assert row["mean"] == pytest.approx(d.mean(), abs=1e-4)


def test_gaussian_heads_need_no_images_and_have_maps_when_asked(igpt, here):
    done = igpt("attention", "runs/conv", "-o", "g.png", "--layer", 1, "--json")
    assert "split" not in done.stderr
    (row,) = json.loads(done.stdout)["layers"]
    centres, covariances = load_model("runs/conv").model.gaussians()[1]
    assert row == {"layer": 1, "centres": centres.tolist(), "covariances": covariances.tolist()}
    document = json.loads(igpt("attention", "runs/conv", "--pixel", "0,0", "-o", "m.png", "--json").stdout)
    run = load_model("runs/conv")
    look = attention_maps(run, toy([0]), pixel=(0, 0), decode=decoder(run, run.palette))[1]
    assert document["layers"][1]["highest"] == [pytest.approx(look.maps[0].max((1, 2)), abs=1e-6)]
    document = json.loads(igpt("attention", "runs/conv", "--distance", "-o", "d.png", "--json").stdout)
    assert len(document["layers"][0]["heads"]) == 4
    assert "query" in json.loads(igpt("attention", "runs/content", "-o", "c.png", "--json").stdout)["layers"][0]


def test_images_are_quantized_on_the_way(igpt, here):
    done = igpt("attention", "runs/one", PHOTOS / "test" / "disc" / "00.jpg", "-o", "p.png")
    assert (done.code, done.stdout) == (0, "p.png\n")
    assert igpt("attention", "runs/content", PHOTOS, "-n", 2, "-o", "q.png").code == 0


def test_what_cannot_be_done_is_said_before_any_work(igpt, here):
    Path("old.png").write_text("old")
    for args, message in (
        (("-o", "a.gif"), "--out a.gif ends in '.gif'; a .png, .svg or .pdf file is written"),
        (("-o", "old.png"), "old.png exists already; choose another --out, or overwrite it with --force"),
        (("--pixel", "3"), "--pixel '3' is not a row and a column; write both, as in 16,16"),
        (("--pixel", "4,0"), "the pixel 4,0 is outside the image; rows and columns go from 0 to 3"),
        (("--layer", "2"), "layer 2 asked for; the layers of igpt-tiny that have attention: 0 to 1"),
        (("--head", "2"), "head 2 requested; igpt-tiny has the heads 0 to 1"),
        (("--distance", "--pixel", "1,1"), "--distance is about all pixels and heads; leave out --pixel and --head"),
        (("runs/conv", "--head", "1"), "--head, -n and --split are about maps of images; name images or --pixel"),
    ):
        done = igpt("attention", *args)
        assert (done.code, done.stdout) == (1, ""), args
        assert f"error: {message}" in done.stderr
    assert Path("old.png").read_text() == "old"
    assert igpt("attention", "-o", "old.png", "--force").code == 0


def test_what_a_pixel_cannot_see_is_pale(tmp_path):
    maps = np.full((1, 2, 4, 4), 0.1, np.float32)
    maps[:, :, 2:] = 0  # no head sees the lower half
    maps[0, 0, 0, 0] = 0  # one of the two heads does not look there, but might
    black = np.zeros((1, 4, 4, 3), np.uint8)
    looks = {0: Looks((2, 1), maps, np.zeros((1, 2), np.float32))}
    map_figure(looks, black, tmp_path / "maps.png", [0, 1], (2, 1), ["one"])
    drawn = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB")).astype(int)
    pale = (abs(drawn - round(255 * 0.75 * PALE[0])) <= 1).all(2)
    assert 0.9 < pale.sum() / (2 * 0.5 * 160**2) < 1  # half of both maps, less the frames
    rows = np.flatnonzero(pale.sum(1) > 160)
    assert rows[-1] - rows[0] == 79
