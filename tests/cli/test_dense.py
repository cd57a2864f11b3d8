"""igpt probe --dense as typed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drawn_masks import draw

from igpt_cli.model_dir import new_config, write_model
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.palette.palette import Palette


@pytest.fixture
def toy(workspace):
    """The workspace with the run `toy`, an untrained iGPT of 8x8 pixels, and the masks `drawn`."""
    colours = np.stack(np.meshgrid(*[[0, 255]] * 3, indexing="ij"), axis=-1).reshape(8, 3)
    config = model_config("igpt-tiny", objective="bert", n_layer=2, n_head=2, n_embd=16, resolution=8, n_vocab=8)
    write_model(workspace / "toy", build_model(config).state_dict(), Palette(colours), new_config(config))
    draw(workspace / "drawn", 8, 3)
    return workspace


def test_a_table_and_the_same_as_json(igpt, toy):
    done = igpt("probe", "toy", "--dense", "drawn", "-o", "dense.json", "--layers", "0,2")
    assert done.code == 0
    assert done.stdout.splitlines()[0].split() == [
        *["layer", "mean", "IoU", "%", "pixels", "%", "held", "out", "IoU", "%", "grid"]
    ]
    assert len(done.stdout.splitlines()) == 3
    assert "test images (always the commonest class" in done.stderr
    found = json.loads((toy / "dense.json").read_text())
    assert [row["layer"] for row in found["layers"]] == [0, 2]
    assert found["mean_iou"] > found["commonest"]["mean_iou"] + 10
    again = igpt("probe", "toy", "--dense", "drawn", "--layers", "0,2", "--json", "-q")
    assert {**json.loads(again.stdout), "seconds": 0} == {**found, "seconds": 0}


def test_unreadable_images_are_named_and_counted(igpt, toy):
    (toy / "drawn" / "images" / "training" / "003.jpg").write_bytes(b"nothing")
    done = igpt("probe", "toy", "--dense", "drawn", "--layers", "0", "--json")
    assert done.code == 0, done.stderr
    assert "excluded drawn/images/training/003.jpg: " in done.stderr
    assert "excluded 1 image in all\n" in done.stderr
    found = json.loads(done.stdout)
    assert (found["n_train"], found["n_test"], found["skipped"]) == (7, 3, {"train": 1})


def test_what_does_not_go_with_it_is_said(igpt, toy):
    done = igpt("probe", "toy", "tokens.h5", "--dense", "drawn", "--concat", "2")
    assert done.code == 2
    assert "leave out T, --concat" in " ".join(done.stderr.split())
    done = igpt("probe", "toy", "--dense", "nowhere")
    assert done.code == 1
    assert "nowhere/images/training is no folder" in done.stderr
