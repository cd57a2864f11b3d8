"""Pictures of the loss by step, of one run and of several."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from igpt_cli.errors import InputError
from igpt_cli.report.figures import COLOURS
from igpt_cli.report.losses import Recorded, by_kind, curve, loss_curves, smoothed, uniform_guess

PIXELS = {"model": {"backend": "igpt", "n_vocab": 512, "objective": "ar"}}
MASKED = {"model": {"backend": "igpt", "n_vocab": 512, "objective": "bert"}}
TUNED = {"model": {"backend": "igpt", "n_vocab": 512, "objective": "ar", "n_classes": 10}}
CLASSES = {"model": {"backend": "vit", "n_classes": 10}}


def run(name: str, config: dict = PIXELS, top: float = 6.0) -> Recorded:
    records = [{"step": s, "loss": top - s / 10} for s in range(1, 30)]
    return Recorded(name=name, config=config, metrics=[*records, {"step": 29, "val_loss": top - 2.5}])


def colours(path) -> dict[str, int]:
    """How many dots of a picture have each colour of a run."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    return {c: int((picture == tuple(bytes.fromhex(c[1:]))).all(-1).sum()) for c in COLOURS}


def test_smoothing_is_the_mean_of_the_last_values():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(50)]
    np.testing.assert_allclose(smoothed(values, 7), expected)


def test_runs_whose_losses_are_of_one_thing_belong_together():
    silent = Recorded(name="silent", config=PIXELS, metrics=[])
    runs = [run("a"), run("b", MASKED), run("c"), run("d", CLASSES), run("e", TUNED), silent]
    assert by_kind(runs) == {
        "pixels and classes, weighted": [4],
        "next pixel, nats per token": [0, 2, 5],
        "masked pixels, nats per token": [1],
        "classes, nats per image": [3],
    }
    assert [uniform_guess(kind, runs[members[0]]) for kind, members in by_kind(runs).items()] == [None, 512, 512, 10]


def test_only_numbers_are_points():
    odd = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"loss": 1.0}, {"step": 3, "loss": None}]
    assert curve(Recorded(name="odd", config=PIXELS, metrics=odd), "loss") == [(1.0, 2.0)]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_of_one_run_and_of_several(tmp_path, suffix):
    for name, runs in (("one", [run("a")]), ("three", [run("a"), run("b", top=5), run("c", top=4)])):
        loss_curves(runs, tmp_path / f"{name}.{suffix}", "a title of $100")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one.{suffix}", f"three.{suffix}"]
    if suffix == "png":
        alone, several = colours(tmp_path / "one.png"), colours(tmp_path / "three.png")
        assert [c for c in COLOURS if alone[c] > 50] == list(COLOURS[:2])  # the second: held-out losses
        assert [c for c in COLOURS if several[c] > 50] == list(COLOURS[:3])
        loss_curves([run("a")], tmp_path / "again.png", "a title of $100")
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_other_losses_stand_beside_each_other_and_names_are_no_formulas(tmp_path):
    loss_curves([run("$a$"), run("b", CLASSES, top=2.3), run("<c>", MASKED)], tmp_path / "beside.svg")
    drawn = (tmp_path / "beside.svg").read_text()
    said = re.findall(r"<!-- (.*?) -->", drawn)
    assert {
        "loss (next pixel, nats per token)",
        "loss (masked pixels, nats per token)",
        "loss (classes, nats per image)",
        "$a$, held out, last 3.500",
        "b, training",
        "&lt;c&gt;, held out, last 3.500",
        "uniform guess, ln 512",
        "uniform guess, ln 10",
    } <= set(said)
    assert said.count("step") == 3


def test_nothing_recorded_is_said(tmp_path):
    runs = [Recorded(name=name, config=PIXELS, metrics=[]) for name in ("a", "b")]
    with pytest.raises(InputError, match=r"no loss was recorded by a, b"):
        loss_curves(runs, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
