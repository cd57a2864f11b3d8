"""igpt compare: one protocol on the same images, what each model costs, the table, the page and the pictures."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import toy_rgb
from evaluation.test_pixels import make_run
from test_docs import DOCS, blocks, lines
from test_model_input import imported, photos

from igpt_cli.cli.compare import comparison_table
from igpt_cli.evaluation.classes import evaluate_head
from igpt_cli.model_dir import load_model
from igpt_cli.planning.cost import forward_flops, parameters
from igpt_cli.report.budgets import augmentation, mixed_budgets, training_cost
from igpt_cli.report.compare import Comparison, Noted, notes_on
from igpt_cli.report.compare_figures import COLOURS, compute_figure, depth_figure
from igpt_cli.report.compare_page import COMPUTE, DEPTH, markdown, page
from igpt_cli.tokens.store import open_tokens

QUICK = ("--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with toy.h5, an iGPT "ar" and a toy "rgb" that igpt train has trained, and their comparison "c"."""
    import numpy as np
    from typer.testing import CliRunner

    from igpt_cli.cli.app import app
    from igpt_cli.palette.palette import Palette
    from igpt_cli.tokens.writer import TokenWriter

    toy_rgb.register()
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        palette = Palette(np.linspace(10, 240, 8)[:, None].repeat(3, 1).astype(np.float32))
        rng = np.random.default_rng(5)
        with TokenWriter("toy.h5", palette, 4, classes=["dark", "light"], source="toy") as writer:
            for split in ("train", "test"):
                labels = np.arange(40) % 2
                tokens = np.repeat(rng.integers(4, size=(40, 2)) + 4 * labels[:, None], 8, axis=1)
                writer.append(split, tokens, labels, [f"{split}/{i}.png" for i in range(40)])
        training = {"augment": "none", "batch_size": 4}
        result = {"steps": 50, "tokens_seen": 3200, "seconds": 7.5}
        data = {"path": "toy.h5", "source": "others", "n_train": 100}
        make_run(Path("ar"), palette, training=training, result=result, data=data, machine={"device": "cpu"})
        for arguments in (
            ["train", "toy", "toy.h5", "--steps", "30", "-b", "16", "--precision", "float32", *QUICK, "-o", "rgb"],
            ["probe", "rgb", "toy.h5", "-o", "rgb.json", *QUICK],
            ["compare", "ar", "rgb", "toy.h5", "-o", "c", "--mixed-budgets", *QUICK],
        ):
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, done.stderr
        Path("table.txt").write_text(done.stdout)
        Path("said.txt").write_text(done.stderr)
    toy_rgb.unregister()
    return folder


@pytest.fixture
def here(base, monkeypatch):
    toy_rgb.register()
    monkeypatch.chdir(base)
    yield base
    toy_rgb.unregister()


@pytest.fixture
def found(here) -> dict:
    return json.loads(Path("c/compare.json").read_text())


def test_each_model_is_probed_as_igpt_probe_does_it(igpt, here, found):
    assert [row["name"] for row in found["models"]] == ["ar", "rgb"]
    assert (found["protocol"], found["tokens"], found["n_train"], found["n_test"]) == (
        "igpt-linear-v1",
        "toy.h5",
        40,
        40,
    )
    for row in found["models"]:
        probed = json.loads(igpt("probe", row["run"], "toy.h5", "--no-floors", "--json", *QUICK).stdout)
        for key in ("accuracy", "interval", "layer", "layers", "checkpoint_sha256"):
            assert row[key] == probed[key], key
        assert found["images_sha256"] == probed["images_sha256"]
        assert row["relative_depth"] == pytest.approx(row["layer"] / row["n_layers"], abs=1e-4)
        assert row["n_features"] == {"ar": 16, "rgb": 8}[row["name"]]


def test_costs_and_heads(here, found):
    ar, rgb = found["models"]
    for row in (ar, rgb):
        config = load_model(row["run"]).config["model"]
        assert (row["parameters"], row["flops_per_image"]) == (parameters(config), forward_flops(config))
        assert row["images_per_second"] > 0
        assert 0 < row["batch_size"] <= 40
        assert row["memory"] is None or row["memory"] > 10_000_000
    assert ar["head"] is None
    run = load_model("rgb")
    scored = evaluate_head(run, open_tokens("toy.h5"), "test")
    assert rgb["head"]["accuracy"] == pytest.approx(scored.accuracy)
    assert rgb["head"]["accuracy"] == pytest.approx(run.config["result"]["accuracy"])
    assert ar["training"] == {
        "kind": "pretrained",
        "steps": 50,
        "images_seen": 200,
        "epochs": 2.0,
        "seconds": 7.5,
        "device": "cpu",
        "recipe": None,
        "augment": "none",
        "teacher": None,
        "source": "others",
        "start": None,
    }
    assert (rgb["training"]["kind"], rgb["training"]["images_seen"], rgb["training"]["recipe"]) == (
        *("supervised", 480, "plain"),
    )


def test_what_differs_is_said(here, found):
    assert found["notes"] == [
        "training budgets differ: ar has seen 200 images, rgb 480; the accuracies are those of these runs, not of the "
        "architectures",
        "ar learnt without labels, others with them",
        "they were trained with different images: others, toy",
    ]
    said = Path("said.txt").read_text()
    assert all(f"note: {note}\n" in said for note in found["notes"])


def test_the_table_fits_a_terminal(here, found):
    lines = Path("table.txt").read_text().splitlines()
    assert lines[0].split() == ["run", "probe", "%", "95%", "layer", "head", "%", "params", "M", "GFLOPs", "images/s"]
    assert [line.split()[0] for line in lines[1:]] == ["ar", "rgb"]
    large = dict(
        found["models"][1], name="a-run-with-a-very-long-name-200", parameters=6_801_438_720, n_layers=60, layer=60
    )
    large |= {"flops_per_image": 14_306_200_000_000, "images_per_second": 123_456.7, "interval": [98.5, 100.0]}
    rows = comparison_table(Comparison.from_dict({**found, "models": [large]})).splitlines()
    assert max(map(len, rows)) <= 80
    assert rows[1].startswith("a-run-w…ame-200")


def test_the_page_holds_every_model_and_escapes_names(here, found):
    text = Path("c/compare.md").read_text()
    comparison = Comparison.from_dict(found)
    assert comparison.to_dict() == found
    assert text == page(comparison)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {19}
    assert f"![Test accuracy against FLOPs for each image]({COMPUTE})" in text
    row = dict(found["models"][0], name="a|b`<c>\n[d](e)_*")
    assert markdown(row["name"]) == "a\\|b\\`&lt;c&gt;\\\\n\\[d\\](e)\\_\\*"
    (cells,) = [
        line for line in page(Comparison.from_dict({**found, "models": [row]})).splitlines() if line.startswith("| a")
    ]
    assert cells.replace("\\|", "").count("|") == 19


def test_the_pictures_show_all_models(here, found, tmp_path):
    assert {p.name for p in Path("c").iterdir()} == {"compare.json", "compare.md", COMPUTE, DEPTH}
    many = [dict(found["models"][i % 2], name=f"$model$ {i}") for i in range(len(COLOURS) + 2)]
    for draw in (compute_figure, depth_figure):
        path = tmp_path / "picture.svg"
        draw(Comparison.from_dict({**found, "models": many}), path)
        comments = [line for line in path.read_text().splitlines() if line.strip().startswith("<!-- $model$")]
        assert len(comments) == len(many)


def test_probes_are_used_again_where_they_are_the_same(igpt, here, tmp_path, monkeypatch):
    others = json.loads(Path("rgb.json").read_text())
    for name, change in (("weights", {"checkpoint_sha256": "0"}), ("images", {"images_sha256": "0", "seed": 3})):
        (tmp_path / name).write_text(json.dumps({**others, **change}))
    reuse = [part for path in ("rgb.json", tmp_path / "weights", tmp_path / "images") for part in ("--reuse", path)]
    monkeypatch.setattr("igpt_cli.report.compare.probe", lambda *a, **k: pytest.fail("probed again"))
    done = igpt("compare", "rgb", "toy.h5", *reuse, "-o", tmp_path / "d", "--json", *QUICK)
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    (row,) = document["models"]
    assert row["reused"]
    assert row["layers"] == others["layers"]
    assert [note.removeprefix(f"{tmp_path}/") for note in document["notes"]] == [
        "weights was not used: its weights are those of none of these models",
        "images was not used: it has other images, seed than this comparison",
    ]


def test_models_of_different_sizes_see_the_same_photos(igpt, workspace, monkeypatch):
    toy_rgb.register()
    try:
        photos(workspace / "photos")
        imported("small", 6)
        imported("large", 8, {"size": 8, "crop": 1.0, "filter": "bicubic"}, data={"classes": ["cat", "bird"]})
        quick = ("--train-images", 8, "--test-images", 6, *QUICK)
        done = igpt("compare", "small", "large", "photos", "-o", "c", "--json", *quick)
        assert done.code == 0, done.stderr
        document = json.loads(done.stdout)
        small, large = document["models"]
        assert (small["resolution"], large["resolution"], document["n_test"]) == (6, 8, 6)
        assert small["head"]["matched"] == "by order"
        assert large["head"] is None
        assert document["notes"][0] == "it is not known how long small, large were trained"
        assert "the models see images of different sizes: 6x6, 8x8" in document["notes"]
        assert any(
            "the class head of large was not evaluated: large has learnt the classes cat, bird" in note
            for note in document["notes"]
        )
        toy = igpt("compare", "small", "photos", "-o", "c", *quick)
        assert "c exists already" in toy.stderr
    finally:
        toy_rgb.unregister()


def test_what_cannot_be_compared(igpt, here, tmp_path):
    out = ("-o", tmp_path / "x", *QUICK)
    for arguments, message in (
        (["rgb", "rgb", "toy.h5"], "a run is named twice: rgb, rgb"),
        (["toy.h5"], "toy.h5 is no run, and there is nothing to compare on it"),
        (["nowhere"], "there is no run nowhere"),
        (["rgb", "toy.h5", "--reuse", "rgb/config.json"], "rgb/config.json is no result of a probe"),
        (["rgb", "toy.h5", "--reuse", "table.txt"], "table.txt is not readable JSON"),
    ):
        done = igpt("compare", *arguments, *out)
        assert (done.code, done.stdout) == (1, ""), arguments
        assert message in done.stderr
    assert not (tmp_path / "x").exists()


def test_notes_on_teachers_fine_tuning_and_masks():
    def row(name: str, masks: int | None = None, **training) -> Noted:
        cost = training_cost({"model": {"resolution": 4}})
        return Noted(name, replace(cost, **{"kind": "supervised", "images_seen": 100, **training}), 32, masks)

    assert notes_on([row("a"), row("b")]) == []
    rows = [
        row("a", recipe="deit", augment="crop-flip", teacher="resnet-18-32"),
        row("b", recipe="plain", augment="none", images_seen=104),
        row("c", 5, kind="fine-tuned"),
    ]
    assert notes_on(rows) == [
        "the cost of c is that of fine-tuning alone; pretraining came before",
        "they were trained with different recipes: deit, plain",
        "they were trained with different augmentations: crop-flip, none",
        "taught by a teacher: a by resnet-18-32",
        "c sees each test image 5 times; its FLOPs and speed are of one",
    ]


# Budgets.


def trained(images: int, n_embd: int = 16, **training) -> dict:
    """The config.json of a small iGPT that has seen so many images."""
    model = {"backend": "igpt", "n_layer": 2, "n_head": 2, "n_embd": n_embd, "resolution": 4, "n_vocab": 8}
    result = {"images_seen": images}
    return {"model": {**model, "objective": "ar"}, "training": {"augment": "none", **training}, "result": result}


def test_alike_is_as_many_images_or_as_many_flops():
    a, wide = trained(1000), trained(1000, n_embd=64)
    assert mixed_budgets({"a": a}) == mixed_budgets({"a": a, "wide": wide}) == []
    assert mixed_budgets({"a": a, "b": trained(1040)}) == []
    assert mixed_budgets({"a": a, "b": trained(2000)}) == ["images seen in training: 1,000 by a, 2,000 by b"]
    times = forward_flops(wide["model"]) / forward_flops(a["model"])
    assert times > 4
    assert mixed_budgets({"wide": wide, "a": trained(round(1000 * times))}) == []


def test_augmentation_is_all_that_is_done_to_images():
    plain, strong = trained(9), trained(9, augment="crop-flip", mixup=0.8, cutmix=0.0, repeats=3, label_smoothing=0.1)
    assert (augmentation(plain), augmentation(strong)) == ("none", "crop-flip, mixup 0.8, repeats 3")
    assert augmentation(trained(9, repeats=1, clip=1.0)) == "none"
    (said,) = mixed_budgets({"a": plain, "b": strong})
    assert said == "augmentation: none of a; crop-flip, mixup 0.8, repeats 3 of b"


def test_fine_tuned_models_have_seen_more_and_imported_ones_do_not_say():
    tuned = {**trained(9), "finetuned_from": {"path": "runs/x"}}
    assert mixed_budgets({"a": trained(9), "b": tuned}) == ["b had been pretrained before"]
    assert mixed_budgets({"a": tuned, "b": tuned}) == []
    assert mixed_budgets({"a": trained(9), "b": {"model": trained(9)["model"], "imported": {}}}) == []


def test_mixed_budgets_are_refused_before_any_work(igpt, here, tmp_path, monkeypatch):
    monkeypatch.setattr("igpt_cli.report.compare.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    done = igpt("compare", "ar", "rgb", "toy.h5", "-o", tmp_path / "x", *QUICK)
    assert (done.code, done.stdout) == (1, "")
    assert (
        "these models were not trained alike, so a table would compare runs rather than architectures: images seen in "
        "training: 200 by ar, 480 by rgb. Compare them all the same with --mixed-budgets"
    ) in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_commands_of_the_page_run(igpt, workspace, toy_tokens, monkeypatch):
    """Each as it stands, on models and images of toy size that bear the page's names."""
    monkeypatch.setattr("igpt_cli.report.compare.TIMED_SECONDS", 0.0)
    toy_rgb.register()
    try:
        path = toy_tokens(workspace / "cifar.h5", n=24)
        palette = open_tokens(path).palette
        result = {"images_seen": 64}
        make_run(Path("runs/igpt-s-1"), palette, training={"augment": "crop-flip"}, result=result)
        for name in ("vit-ti-32-1", "resnet-18-32-1"):
            done = igpt("train", "toy", path, "--steps", 4, "-b", 16, *QUICK, "-o", f"runs/{name}")
            assert done.code == 0, done.stderr
        imported(Path("runs/vit-b16"), 6)
        photos(workspace / "photos")
        commands = [shlex.split(line) for block in blocks(DOCS / "compare.md", "sh") for line in lines(block)]
        assert len(commands) == 5
        for _, *arguments in commands:
            shutil.rmtree("compared", ignore_errors=True)
            done = igpt(*arguments, *QUICK)
            assert done.code == 0, f"{arguments}: {done.stderr}"
            assert arguments[0] == "probe" or Path("compared/compare.md").is_file()
        assert json.loads(Path("compared/compare.json").read_text())["models"][0]["reused"]
        shutil.rmtree("compared")
        assert "augmentation: crop-flip of igpt-s-1; none of vit-ti-32-1" in refused(igpt, commands[1])
    finally:
        toy_rgb.unregister()


def refused(igpt, command: list[str]) -> str:
    """What is said of this command without --mixed-budgets."""
    done = igpt(*(word for word in command[1:] if word != "--mixed-budgets"), *QUICK)
    assert (done.code, "--mixed-budgets" in command) == (1, True)
    return done.stderr
