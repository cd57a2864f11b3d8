"""igpt ablate: what is typed, what is said, what is left."""

from __future__ import annotations

import json

import pytest

from igpt_cli.ablations import window_cost
from igpt_cli.ablations.catalogue import ABLATIONS
from igpt_cli.model_dir import load_model

QUICK = ("--steps", 2, "--device", "cpu")


@pytest.fixture
def small_images(monkeypatch):
    monkeypatch.setitem(window_cost.SIDES, "small", (28, 56))


def test_without_a_name_they_are_listed(igpt):
    done = igpt("ablate")
    assert (done.code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[::3]] == list(ABLATIONS)
    assert max(map(len, lines)) <= 80
    assert "Touvron et al. 2021 (DeiT), tables 2 and 3" in done.stdout
    assert "2 Swins; about 2 min on a core, 10 min on a GPU" in done.stdout
    found = json.loads(igpt("ablate", "--json").stdout)
    assert [row["name"] for row in found] == list(ABLATIONS)


def test_the_cost_of_windows(igpt, workspace, small_images):
    done = igpt("ablate", "window-cost", *QUICK)
    assert done.code == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.startswith("image  patches  M multiply-adds, eq. 1")
    assert [row.split()[:2] for row in rows] == [["28x28", "49"], ["56x56", "196"]]
    assert "out: ablations/window-cost (default)\n" in done.stderr
    assert "differs: the paper: the number of multiply-adds of a layer, as equations\n" in done.stderr
    folder = workspace / "ablations" / "window-cost"
    assert {p.name for p in folder.iterdir()} == {"ablation.json", "table.md", "picture.png"}
    assert json.loads((folder / "ablation.json").read_text())["precision"] in done.stderr
    again = igpt("ablate", "window-cost", *QUICK)
    assert (again.code, again.stdout) == (1, "")
    assert "exists already; choose another --out, or overwrite it with --force" in again.stderr
    forced = igpt("ablate", "window-cost", *QUICK, "--force", "--json", "-q")
    assert (forced.code, forced.stderr) == (0, "")
    assert json.loads(forced.stdout) == json.loads((folder / "ablation.json").read_text())


def test_our_numbers_stand_beside_the_papers(igpt, workspace, toy_tokens):
    done = igpt("ablate", "positions", toy_tokens(), *QUICK, "-o", "out")
    assert done.code == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["test", "%", "95%", "paper:", "ImageNet", "5-shot"]
    assert [row.split()[-1] for row in rows] == ["61.4", "64.2", "64.0", "64.0"]
    assert "differs: the paper: ViT-B/16, 5-shot linear accuracy on ImageNet\n" in done.stderr
    config = load_model(workspace / "out" / "2d").config
    assert (config["model"]["pos_embed"], config["result"]["steps"]) == ("2d", 2)
    was = (workspace / "out" / "table.md").read_text()
    again = igpt("ablate", "--resume", "out", "--device", "cpu")
    assert (again.code, again.stdout) == (0, done.stdout)
    assert (workspace / "out" / "table.md").read_text() == was


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["positons"], 1, "there is no ablation 'positons'; did you mean positions?"),
        (["--steps", "2"], 2, "name one for its options: leave out --steps"),
        (["positions", "--resume", "out"], 2, "--resume continues with the settings that it had: leave out NAME"),
        (["--resume", "out", "--steps", "2"], 2, "continues with the settings that it had: leave out --steps"),
        (["--resume", "out", "--force"], 2, "leave out --force"),
        (["--resume", "out"], 1, "out/ablation.json does not exist; what igpt ablate writes was expected there"),
        (["window-cost", "embedded"], 1, "trains nothing and takes no images"),
        (["shift", "--budget", "soon"], 1, "'soon' is not a duration"),
        (["shift", "nowhere.h5"], 1, "nowhere.h5 does not exist"),
    ],
)
def test_what_cannot_be_done(igpt, workspace, arguments, code, message):
    done = igpt("ablate", *arguments)
    assert (done.code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not list(workspace.rglob("*.json"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A token file of few embedded images at 32x32."""
    from typer.testing import CliRunner

    from igpt_cli.cli.app import app

    path = tmp_path_factory.mktemp("digits") / "few.h5"
    arguments = ["tokenize", "embedded", "-p", "builtin:igpt-tiny", "--limit", "60", "-o", str(path), "-q"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, ablation in ABLATIONS.items() if ablation.runs])
def test_each_runs_on_embedded_images(igpt, workspace, digits, name):
    done = igpt("ablate", name, digits, *QUICK, "-o", "out", "--json", "-q")
    assert (done.code, done.stderr) == (0, "")
    found, ablation = json.loads(done.stdout), ABLATIONS[name]
    assert [run["arm"] for run in found["arms"]] == [run.name for run in ablation.runs]
    assert {run["steps"] for run in found["arms"]} == {2}
    assert all(row["accuracy"] is not None and row["interval"] for row in found["rows"])
    assert (workspace / "out" / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_images_the_embedded_ones_are_taken_and_runs_can_be_compared(igpt, workspace):
    done = igpt("ablate", "shift", "-r", 16, *QUICK)
    assert done.code == 0, done.stderr
    assert "images: embedded (default)\n" in done.stderr
    runs = [workspace / "ablations" / "shift" / name for name in ("no-shift", "shift")]
    compared = igpt("compare", *runs, "-o", "c", "--train-images", 60, "--test-images", 30, "--device", "cpu")
    assert compared.code == 0, compared.stderr
