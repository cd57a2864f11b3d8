"""igpt report as typed: what is written and printed, what is taken where nothing is said, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report_runs import IMAGES, NASTY, make_runs

from igpt_cli.model_dir import load_model
from igpt_cli.probing.probe import probe, write_result
from igpt_cli.tokens.store import open_tokens
from igpt_cli.workspace import builtin_models

CPU = ("--device", "cpu")
#: Nothing is computed.
SHOWN = ("--no-probe", "--no-samples", *CPU)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    make_runs(folder)
    found = probe(load_model(folder / "a"), open_tokens(folder / IMAGES), details=True, baselines=False)
    write_result(found, folder / "p.json")
    return folder


@pytest.fixture
def here(base, monkeypatch, tmp_path):
    """The folder of the runs is the current one; what is written goes to tmp_path."""
    monkeypatch.chdir(base)
    return tmp_path


def test_a_page_of_what_is_there(igpt, here):
    done = igpt("report", "a", NASTY, "-o", here / "r.html", *SHOWN)
    assert (done.code, done.stdout, done.stderr) == (0, f"{here / 'r.html'}\n", "")
    page = (here / "r.html").read_text()
    assert page.count("<h1>") == 1
    assert 'id="loss"' in page
    assert 'id="layers"' not in page
    assert 'id="pictures"' not in page
    assert [path.name for path in here.iterdir()] == ["r.html"]


def test_loss_curves_of_all_runs_as_a_picture(igpt, here):
    done = igpt("report", "a", NASTY, "-o", here / "r.html", "--figure", here / "loss.svg", *SHOWN)
    assert (done.code, done.stdout, done.stderr) == (0, f"{here / 'r.html'}\n", f"loss curves: {here / 'loss.svg'}\n")
    assert sorted(path.name for path in here.iterdir()) == ["loss.svg", "r.html"]
    assert (here / "loss.svg").read_text().startswith("<?xml")


def test_without_losses_the_page_is_there_and_the_picture_is_refused(igpt, here):
    shutil.copytree("a", here / "bare")
    (here / "bare" / "metrics.jsonl").unlink()
    done = igpt("report", here / "bare", "-o", here / "r.html", "--figure", here / "loss.png", *SHOWN)
    assert done.code == 1
    assert "no loss was recorded by bare, so there is nothing to draw" in done.stderr
    assert sorted(path.name for path in here.iterdir()) == ["bare", "r.html"]


def test_probes_by_name_and_pictures_drawn(igpt, here):
    done = igpt("report", "a", "--probe", "p.json", "--no-probe", "-n", 2, "-o", here / "r.html", "--json", *CPU)
    assert done.code == 0, done.stderr
    document, found = json.loads(done.stdout), json.loads(Path("p.json").read_text())
    assert (document["path"], document["bytes"]) == (str(here / "r.html"), (here / "r.html").stat().st_size)
    (run,) = document["runs"]
    assert (run["probe"]["accuracy"], run["probed_here"], run["notes"]) == (found["accuracy"], False, [])
    assert [caption.split(",")[0] for caption in run["pictures"]] == [
        "2 samples",
        "2 completions each of 4 images of the split test",
    ]
    assert "tokens: " in done.stderr
    page = (here / "r.html").read_text()
    assert f"{found['accuracy']:.1f}% at layer {found['layer']}" in page
    assert page.count("data:image/png;base64,") == 2
    assert not Path("a/samples").exists()


def test_a_model_without_a_probe_is_probed(igpt, here):
    few = ("--train-images", 24, "--test-images", 12)
    done = igpt("report", "a", "--no-samples", "--images", IMAGES, *few, "-o", here / "r.html", "--json", *CPU)
    assert done.code == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert run["probed_here"]
    assert (run["probe"]["n_train"], run["probe"]["n_test"], run["probe"]["tokens"]) == (24, 12, IMAGES)
    page = (here / "r.html").read_text()
    assert 'id="confusion"' in page
    command = (
        "igpt probe a &#39;no&lt;i&gt;.h5&#39; --train-images 24 --test-images 12 --seed 0 --details -o probe.json"
    )
    assert command in page


def test_without_arguments_the_newest_run(igpt, workspace, base):
    Path("runs").mkdir()
    Path("runs/latest").write_text("a\n")
    Path("runs/a").symlink_to(base / "a")
    done = igpt("report", *SHOWN)
    assert (done.code, done.stdout) == (0, "report.html\n")
    assert "run: runs/a (default)" in done.stderr
    assert igpt("report", "-q", *SHOWN).stderr.startswith("error: report.html exists already")
    assert igpt("report", "-q", "--force", *SHOWN).code == 0


def test_what_is_missing_is_said(igpt, here, monkeypatch):
    copied = here / "copied"  # without the result of a probe that the shipped model has
    shutil.copytree(builtin_models()["igpt-tiny"], copied, ignore=shutil.ignore_patterns("probe.json"))
    done = igpt("report", copied, "--no-samples", "--images", IMAGES, "-o", here / "r.html", *CPU)
    assert done.code == 0
    assert f"it was not probed: {IMAGES} has images of 4x4" in done.stderr
    assert "it was not probed" in (here / "r.html").read_text()


def test_what_is_refused_before_any_work(igpt, here):
    (here / "old.html").write_text("old")
    for arguments, message in (
        (("a", "-o", here / "old.html"), "old.html exists already; choose another --out, or overwrite it with --force"),
        (("a", "-o", here / "r.pdf"), "r.pdf ends in '.pdf'; a .html or .htm file is written"),
        (
            ("a", "-o", here / "r.html", "--figure", "loss.gif"),
            "--figure loss.gif ends in '.gif'; a .png, .svg or .pdf file is written",
        ),
        (("nowhere", "-o", here / "r.html"), "there is no run nowhere"),
        (("a", "--images", "gone.h5", "-o", here / "r.html"), "gone.h5 does not exist; a token file or images were"),
        (("a", "a", "-o", here / "r.html"), "a run is named twice: a, a"),
        (("a", "--probe", "a/config.json", "-o", here / "r.html"), "a/config.json is no result of a probe"),
        (
            (NASTY, "--probe", "p.json", "-o", here / "r.html"),
            "p.json: probes of other weights than those of these runs",
        ),
    ):
        done = igpt("report", *arguments, *SHOWN)
        assert (done.code, done.stdout) == (1, ""), arguments
        assert message in done.stderr
    assert [path.name for path in here.iterdir()] == ["old.html"]
    assert (here / "old.html").read_text() == "old"
    assert igpt("report", "a", "--number", 0).code == 2


def test_what_is_interrupted_leaves_the_old_page(igpt, here, monkeypatch):
    (here / "old.html").write_text("old")

    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("igpt_cli.report.page.page", interrupted)
    done = igpt("report", "a", "--force", "-o", here / "old.html", *SHOWN)
    assert (done.code, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("old.html", "old")]
