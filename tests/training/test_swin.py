"""A Swin trains as any model of RGB images: whole, resumed, recomputed, and without shifted windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from igpt_cli.errors import InputError
from igpt_cli.model_dir import load_model, read_config
from igpt_cli.models.presets import PRESETS, Preset
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.run import train
from igpt_cli.training.settings import Execution, TrainSettings

SIZES = {
    "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 2, "patch_size": 1, "drop_path_rate": 0.1,
}  # fmt: skip
QUICK = TrainSettings(recipe="swin", steps=8, batch_size=16, warmup_steps=1, learning_rate=0.01, augment="none")


@pytest.fixture
def tokens(toy_tokens, monkeypatch):
    """Images of 4x4 in two classes; a toy Swin is known by name."""
    monkeypatch.setitem(PRESETS, "swin-toy", Preset("swin-toy", "swin", SIZES, {}, {}, "toy"))
    return open_tokens(toy_tokens())


def test_it_trains_and_is_read_again(tokens, tmp_path):
    done = train("swin-toy", tokens, tmp_path / "run", QUICK, Execution(precision="float32"))
    run = load_model(tmp_path / "run")
    assert run.model.input_kind == "rgb"
    assert run.config["model"]["shift"] is True
    assert [block.shift for block in run.model.blocks] == [0, 1, 0, 1]
    assert [block.drop_path.rate for block in run.model.blocks] == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    assert done.steps == 8


def test_recomputed_activations_draw_the_same_branches(tokens, tmp_path):
    runs = []
    for recompute in (False, True):
        out = tmp_path / f"{recompute}"
        train(
            "swin-toy", tokens, out, replace(QUICK, drop_path=0.5), Execution(precision="float32", recompute=recompute)
        )
        runs.append(load_model(out).model.state_dict())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_the_ablation_without_shift(tokens, tmp_path):
    train("swin-toy", tokens, tmp_path / "run", QUICK, Execution(precision="float32"), sizes={"shift": False})
    assert read_config(tmp_path / "run")["model"]["shift"] is False
    assert [block.shift for block in load_model(tmp_path / "run").model.blocks] == [0, 0, 0, 0]
    with pytest.raises(InputError, match="swin-toy cannot be built so: window_size 3 does not divide"):
        train("swin-toy", tokens, tmp_path / "b", QUICK, Execution(precision="float32"), sizes={"window_size": 3})


def test_no_shift_as_typed(igpt, tokens, tmp_path):
    quick = ("--steps", "2", "--batch-size", "8", "--precision", "float32", "-o", tmp_path / "run", "-q")
    done = igpt("train", "swin-toy", tokens.path, "--no-shift", *quick)
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'run'}\n")
    assert read_config(tmp_path / "run")["model"]["shift"] is False
    done = igpt("train", "--resume", tmp_path / "run", "--no-shift")
    assert done.code == 2
    assert "leave out --set and --no-shift" in " ".join(done.stderr.split())
    done = igpt("train", "resnet-18-32", tokens.path, "--no-shift", *quick[:-3], "-o", tmp_path / "b")
    assert done.code == 1
    assert "resnet-18-32" in done.stderr
