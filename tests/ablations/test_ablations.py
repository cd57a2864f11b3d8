"""Ablations: the data, attention's cost, what numbers say, and runs that go on."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_rgb
from training_runs import records, stop_at, write_tokens

from igpt_cli.ablations import window_cost
from igpt_cli.ablations.catalogue import (
    ABLATIONS,
    FINETUNE,
    LAYER,
    OBJECTIVE,
    POSITIONS,
    PRETRAIN,
    TRAIN,
    AblationRun,
    Size,
    find_ablation,
    listing,
)
from igpt_cli.ablations.figures import picture
from igpt_cli.ablations.findings import comparison, differences, findings
from igpt_cli.ablations.page import cells, page
from igpt_cli.ablations.runner import ablate, resume
from igpt_cli.ablations.runs import layer_rows
from igpt_cli.ablations.settings import Settings
from igpt_cli.ablations.window_cost import measure, multiply_adds
from igpt_cli.errors import FormatError, InputError, Interrupted, MismatchError, OutputError
from igpt_cli.model_dir import read_config
from igpt_cli.models.registry import build_model, find_preset, model_config
from igpt_cli.report.budgets import mixed_budgets
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.settings import FinetuneSettings, PretrainSettings, TrainSettings, check

# The data.


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS)
def test_every_run_can_be_built_and_follows_what_it_needs(ablation):
    seen: dict[str, AblationRun] = {}
    for run in ablation.runs:
        assert run.after is None or run.after in seen
        assert run.against is None or run.against in seen
        assert (run.how == FINETUNE) <= (run.after is not None)
        assert (run.settings.get("distill", "none") != "none") == (run.how == TRAIN and run.after is not None)
        seen[run.name] = run
        for size in (ablation.small, ablation.full):
            learnt = {**size.amount, **size.settings.get(run.how, {}), **run.settings}
            if run.how == FINETUNE:
                FinetuneSettings(**learnt)
                continue
            name, sizes = size.models[run.model]
            preset = find_preset(name)
            assert preset.of_tokens == (run.how == PRETRAIN)
            more = {"n_vocab": 512} if preset.of_tokens else {"n_classes": 10}
            with torch.device("meta"):
                build_model(model_config(name, **{**sizes, **run.sizes, "resolution": 32, **more}))
            if run.how == TRAIN:
                check(TrainSettings(**learnt))
            else:
                check(PretrainSettings(model=name, **sizes, **learnt))
    assert len(seen) == len(ablation.runs)


def test_runs_of_the_small_size_differ_in_what_is_asked_alone():
    """The same number of steps for all; the sizes of models differ by what the run is about."""
    assert {run.sizes["pos_embed"] for run in POSITIONS.runs} == {"none", "learned-1d", "2d", "relative"}
    assert len({run.model for run in POSITIONS.runs}) == 1
    assert [run.settings["objective"] for run in OBJECTIVE.runs if run.how == PRETRAIN] == ["ar", "bert"]


def test_ablations_are_found_by_name_and_listed():
    assert find_ablation("shift").table == "table 4"
    with pytest.raises(InputError, match="there is no ablation 'positon'; did you mean positions\\? known: positions"):
        find_ablation("positon")
    assert [row["name"] for row in listing()] == list(ABLATIONS)


# The cost of attention.


@pytest.mark.parametrize("n", [7, 14, 56])
def test_the_equations_are_what_torch_counts(n):
    from torch.utils.flop_counter import FlopCounterMode

    assert multiply_adds(56) == (2_003_828_736, 145_108_992)
    made = window_cost.layers()
    for key, expected in zip(("global", "windows"), multiply_adds(n)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made[key](torch.zeros(1, n, n, window_cost.WIDTH, device="meta"))
        assert counter.get_total_flops() == 2 * expected, key


@torch.no_grad()
def test_windows_are_the_same_layer_on_parts_of_the_image():
    made = window_cost.layers()
    x = torch.randn(1, 14, 14, window_cost.WIDTH, generator=torch.Generator().manual_seed(1))
    y = made["windows"](x)
    for rows, columns in ((slice(0, 7), slice(0, 7)), (slice(7, 14), slice(0, 7))):
        torch.testing.assert_close(y[:, rows, columns], made["global"](x[:, rows, columns].contiguous()))
    assert not torch.allclose(y, made["global"](x), atol=1e-3)
    assert made["swin"](x).shape == x.shape


def test_every_layer_is_timed_and_short_memory_is_told(monkeypatch):
    told = []
    rows = measure([28, 56], 1, device="cpu", precision="float32", progress=lambda *done: told.append(done))
    assert told == [(k, 6) for k in range(1, 7)]
    assert [(row["resolution"], row["patches"]) for row in rows] == [(28, 49), (56, 196)]
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    assert rows[1]["multiply_adds"]["global"] == multiply_adds(14)[0]

    def short(x):
        raise RuntimeError("CUDA out of memory")

    made = window_cost.layers()
    monkeypatch.setattr(window_cost, "layers", lambda seed: {**made, "global": short})
    (row,) = measure([28], 1, device="cpu")
    assert row["seconds"]["global"] is None
    assert findings({"cost": [row]}) == ["At 28 pixels attention of all patches needs more memory than there is."]
    with pytest.raises(InputError, match="images of 100 pixels do not divide into windows; take multiples of 28"):
        measure([56, 100], 1, device="cpu")


def test_on_a_cpu_only_work_is_timed(monkeypatch):
    """A layer that waits, as where other processes have their turn, takes no processor time."""
    made = window_cost.layers()
    monkeypatch.setattr(window_cost, "layers", lambda seed: {**made, "swin": lambda x: time.sleep(0.2)})
    (row,) = measure([28], 1, device="cpu")
    assert row["seconds"]["swin"] < 0.1


# What numbers say.


def row(label: str, accuracy: float, interval, **more) -> dict:
    shown = {"arm": label, "label": label, "against": None, "accuracy": accuracy, "interval": interval, "n_test": 100}
    return {**shown, "paper": {}, **more}


def test_accuracies_are_told_apart_by_their_intervals():
    low, high, close = row("a", 20.0, [15, 25]), row("b", 60.0, [55, 65]), row("c", 24.0, [19, 29])
    assert comparison(high, low) == "b did better than a: 60.0% against 20.0%."
    assert comparison(low, high) == "a did worse than b: 20.0% against 60.0%."
    assert comparison(close, low) == "c and a cannot be told apart on 100 test images: 24.0% against 20.0%."
    rows = [low, {**high, "against": "a"}, row("d", None, None, against="a")]
    better = "b did better than a: 60.0% against 20.0%."
    assert findings({"rows": rows, "chance": 10.0}) == [better]
    at_chance = "Not told apart from naming the commonest class, 15.0%: a."
    assert findings({"rows": rows, "chance": 15.0}) == [better, at_chance]


def cost(side: int, patches: int, work: tuple, seconds: tuple) -> dict:
    keys = ("global", "windows", "swin")
    counted = dict(zip(keys, (*work, work[1])))
    return {"resolution": side, "patches": patches, "multiply_adds": counted, "seconds": dict(zip(keys, seconds))}


def test_growth_of_the_cost_is_told():
    rows = [cost(28, 49, (10, 10), (1.0, 2.0, 2.0)), cost(56, 196, (80, 40), (12.0, 6.0, 8.0))]
    assert findings({"cost": rows}) == [
        "From 28 to 56 pixels, 4 times as many patches: attention of all patches takes 8 times the multiply-adds and 12 "
        "times the time, in windows 4 and 3.",
        "At 56 pixels all patches take 2.0 times the multiply-adds of windows, and 2.0 times the time; 1.5 times that of "
        "Swin's layer.",
        "At 28 pixels windows were not faster here.",
    ]


def test_layers_stand_beside_what_the_paper_says_of_them():
    layers = [{"layer": k, "accuracy": 10.0 * k, "interval": [0, 50]} for k in range(7)]
    rows = layer_rows({"layer": 4, "n_layers": 6, "n_test": 100, "layers": layers})
    assert [(r["label"], r["layer"], r["accuracy"]) for r in rows] == [
        *(("best layer", 4, 40.0), ("first layer", 0, 0.0), ("middle layer", 3, 30.0), ("last layer", 6, 60.0)),
    ]
    assert rows[0]["paper"] == {"iGPT-L, CIFAR-10": 96.3}


# Runs.


@pytest.fixture
def toys(monkeypatch):
    """The ablation "positions" with two toy runs of 300 and more parameters, and a toy that learns from the first."""
    toy_rgb.register()
    runs = (
        AblationRun("a", "narrow", "toy", paper={"ImageNet": 70.0}),
        AblationRun("b", "wide|", "toy", sizes={"width": 12}, paper={"ImageNet": "better"}, against="a"),
        AblationRun("c", "taught", "distilled", settings={"distill": "hard"}, after="a", seed=1, against="b"),
    )
    small = Size({"toy": ("toy", {}), "distilled": ("toy-distilled", {})}, {"steps": 6}, 1, {TRAIN: {"batch_size": 8}})
    monkeypatch.setitem(ABLATIONS, "positions", replace(POSITIONS, runs=runs, small=small))
    yield
    toy_rgb.unregister()


@pytest.fixture
def tokens(toy_tokens):
    return open_tokens(toy_tokens())


QUICK = {"device": "cpu"}


def test_runs_are_ordinary_runs_trained_alike(toys, tokens, tmp_path):
    out = tmp_path / "out"
    found = ablate("positions", tokens, out, Settings(seed=3), **QUICK)
    assert {p.name for p in out.iterdir()} == {"a", "b", "c", "ablation.json", "table.md", "picture.png"}
    assert json.loads((out / "ablation.json").read_text()) == json.loads(json.dumps(found))
    assert (found["status"], found["settings"]["size"]) == ("done", "small")
    configs = {name: read_config(out / name) for name in "abc"}
    assert [(c["training"]["seed"], c["result"]["steps"]) for c in configs.values()] == [(3, 6), (3, 6), (4, 6)]
    assert configs["c"]["teacher"]["path"] == str(out / "a")
    assert mixed_budgets(configs) == []
    for row in found["rows"]:
        assert row["accuracy"] == configs[row["arm"]]["result"]["accuracy"]
    assert found["chance"] == 50.0
    assert [line.split(" ")[0] for line in found["findings"]][:2] == ["wide|", "taught"]
    assert (
        "trained on 56 images, of which each run saw 48 (0.86 epochs), recipe plain, augmentation none"
        in found["differs"]
    )
    assert any("one run of each with seed 3, tested on 64 images; the intervals" in line for line in found["differs"])
    text = page(found)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert {line.replace("\\|", "").count("|") for line in table} == {5}
    assert "| wide\\| |" in text
    assert table[0].endswith("| paper: ImageNet |")


def test_what_was_said_of_the_length_takes_the_place_of_the_sizes(toys, tokens, tmp_path):
    found = ablate("positions", tokens, tmp_path / "out", Settings(epochs=2, augment="flip"), **QUICK)
    assert {a["steps"] for a in found["arms"]} == {14}
    assert {a["augment"] for a in found["arms"]} == {"flip"}


def test_what_was_interrupted_goes_on_as_if_it_had_not_been(toys, tokens, tmp_path):
    """In the second of three runs, after a checkpoint and before there is one."""
    whole = ablate("positions", tokens, tmp_path / "whole", **QUICK)

    @contextmanager
    def callbacks(label):
        yield {"on_record": stop_at(5)} if label == "wide|" else {}

    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=f"what is complete is kept; resume with: igpt ablate --resume {out}"):
        ablate("positions", tokens, out, callbacks=callbacks, **QUICK)
    assert not (out / "c").exists()
    assert not (out / "table.md").exists()
    shutil.copytree(out, tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "b" / "checkpoints")
    was = (out / "a" / "model.safetensors").stat().st_ino
    for folder in (out, tmp_path / "early"):
        found = resume(tokens, folder, **QUICK)
        assert [records(folder / name) for name in "abc"] == [records(tmp_path / "whole" / name) for name in "abc"]
        assert found["rows"] == whole["rows"]
    assert (out / "a" / "model.safetensors").stat().st_ino == was
    others = open_tokens(write_tokens(tmp_path / "others.h5", n=40, resolution=4))
    with pytest.raises(
        MismatchError, match="goes on with the images that it was begun with, but the split 'train' was"
    ):
        resume(others, out, **QUICK)


def test_a_folder_that_is_there_gives_way_to_force_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(window_cost.SIDES, "small", (28,))
    out, settings = tmp_path / "out", Settings(steps=1)
    ablate("window-cost", None, out, settings, **QUICK)
    (out / "mine.txt").touch()
    with pytest.raises(OutputError, match="exists already"):
        ablate("window-cost", None, out, settings, **QUICK)
    ablate("window-cost", None, out, settings, force=True, **QUICK)
    assert not (out / "mine.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"has no ablation\.json"):
        ablate("window-cost", None, other, settings, force=True, **QUICK)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("positions", {"steps": 2, "epochs": 1.0}, "steps and epochs are given"),
        ("positions", {"size": "huge"}, "size is 'huge', expected one of small, full"),
        ("positions", {"run": "runs/x"}, "a run is for layer"),
        ("layer", {"recipe": "deit"}, "no run that is trained with labels alone; leave out recipe"),
        ("window-cost", {}, "trains nothing and takes no images"),
        ("nothing", {}, "there is no ablation 'nothing'"),
    ],
)
def test_what_does_not_go_together(tokens, tmp_path, name, settings, message):
    with pytest.raises(InputError, match=message):
        ablate(name, tokens, tmp_path / "out", Settings(**settings), **QUICK)
    assert not (tmp_path / "out").exists()


def test_images_without_labels_or_tests_are_refused_before_any_training(toy_tokens, tmp_path):
    bare = open_tokens(toy_tokens(tmp_path / "bare.h5", labelled=False))
    with pytest.raises(InputError, match="no image of the split 'train' has a label"):
        ablate("shift", bare, tmp_path / "out", **QUICK)
    alone = open_tokens(toy_tokens(tmp_path / "alone.h5", splits=("train",)))
    with pytest.raises(InputError, match="test"):
        ablate("shift", alone, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_what_window_cost_and_the_others_need(tmp_path):
    with pytest.raises(InputError, match="needs labelled images"):
        ablate("shift", None, tmp_path / "out", **QUICK)
    with pytest.raises(InputError, match="trains nothing; steps are how often"):
        ablate("window-cost", None, tmp_path / "out", Settings(budget=5.0), **QUICK)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "ablation.json").write_text('{"name": "shift", "settings": {"old": 1}}')
    with pytest.raises(FormatError, match="is no ablation of this version of igpt"):
        resume(None, tmp_path / "x")


def test_layers_of_a_pixel_model(tokens, tmp_path):
    """One is trained; or a run that is there is probed, as igpt probe does it."""
    out = tmp_path / "out"
    found = ablate("layer", tokens, out, Settings(steps=2), **QUICK)
    probed = json.loads((out / "gpt" / "probe.json").read_text())
    assert found["layers"] == probed["layers"]
    assert [r["label"] for r in found["rows"]] == ["best layer", "first layer", "middle layer", "last layer"]
    assert found["rows"][0]["accuracy"] == probed["accuracy"]
    given = ablate("layer", tokens, tmp_path / "given", Settings(run=str(out / "gpt")), **QUICK)
    assert given["rows"] == found["rows"]
    assert {p.name for p in (tmp_path / "given").iterdir()} == {
        "ablation.json",
        "probe.json",
        "table.md",
        "picture.png",
    }
    assert f"here: the run {out / 'gpt'}" in given["differs"]


# The pictures.


def documents(folder: Path) -> dict[str, dict]:
    """One of each kind, without any training."""
    layers = [{"layer": k, "accuracy": 30.0 + k, "interval": [20, 50]} for k in range(4)]
    pixels = {"layers": layers, "how": PRETRAIN, "label": "next pixel"}
    tuned = {"how": FINETUNE, "label": "tuned", "accuracy": 55.0}
    rows = [row("$one$", 30.0, [25, 35], paper={"ImageNet": 80.0, "COCO": 47.0}), row("two", None, None, paper={})]
    return {
        "accuracy": {"rows": rows, "arms": [], "chance": 10.0},
        "layers": {"rows": [row("a", 1.0, [0, 2])], "arms": [pixels, tuned], "chance": 10.0},
        "cost": {"cost": [cost(28, 49, (10, 10), (1.0, 2.0, 2.0)), cost(56, 196, (80, 40), (None, 6.0, 8.0))]},
    }


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("accuracy", ["$one$", "two", "ImageNet", "COCO", "the paper"]),
        ("layers", ["next pixel", "tuned, 55.0%", "commonest class, 10.0%"]),
        ("cost", ["all patches, equation 1", "windows, shifted, with bias", "milliseconds"]),
    ],
)
def test_pictures_say_what_they_show(tmp_path, kind, shown):
    path = tmp_path / "picture.svg"
    picture(documents(tmp_path)[kind], path)
    text = path.read_text()
    assert [label for label in shown if f"<!-- {label} -->" not in text] == []


def test_costs_that_are_not_known_stand_so_in_the_table():
    header, rows = cells(documents(Path())["cost"])
    assert {len(header)} == {len(r) for r in rows}
    assert rows[1][5] == "no memory"
    assert rows[0][-1] == "0.5"


def test_differences_of_a_run_that_was_given():
    document = {"arms": [], "rows": [row("a", 1.0, [0, 2])], "settings": {"run": "runs/x", "seed": 0}}
    _, here, tested = differences(LAYER, document)
    assert here == "here: the run runs/x"
    assert tested.startswith("one run of each with seed 0, tested on 100 images; ")


# The page.


def test_the_page_has_every_ablation_with_its_sizes():
    text = (Path(__file__).parents[2] / "docs" / "ablations.md").read_text(encoding="utf-8")
    for name, ablation in ABLATIONS.items():
        (_, sizes) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        said = [cell.strip() for cell in sizes.split("|")]
        assert [said[4], said[7]] == [f"{size.minutes} min" for size in (ablation.small, ablation.full)]
        for size, shown in ((ablation.small, said[3]), (ablation.full, said[6])):
            assert shown == ("" if not ablation.runs else " ".join(f"{n:,} {unit}" for unit, n in size.amount.items()))
