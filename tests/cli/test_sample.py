"""igpt sample and igpt complete as typed: files, defaults of the workspace, messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation.test_pixels import make_run
from PIL import Image

from igpt_cli.model_dir import load_model
from igpt_cli.sampling.draw import SamplingParams
from igpt_cli.sampling.generate import complete, sample
from igpt_cli.sampling.pictures import captioned, grid, read_settings
from igpt_cli.sampling.write import caption
from igpt_cli.tokens.store import open_tokens
from igpt_cli.workspace import set_latest


@pytest.fixture
def here(workspace, toy_tokens) -> Path:
    """The workspace with data/tokens-4.h5, the run runs/one and, BERT's, runs/two."""
    tokens = open_tokens(toy_tokens(workspace / "data" / "tokens-4.h5", n=20))
    for name, objective in (("one", "ar"), ("two", "bert")):
        data = {"path": "data/tokens-4.h5", "tokens_sha256": tokens.split("train").sha256}
        make_run(Path("runs") / name, tokens.palette, objective, data=data)
    set_latest(Path("runs/one"))
    return workspace


def test_without_arguments_sample_works_in_the_workspace(igpt, here):
    done = igpt("sample")
    assert done.code == 0
    assert done.stdout == "runs/one/samples/sample-1.png\n"
    assert done.stderr.startswith("run: runs/one (default)\nout: runs/one/samples/sample-1.png (default)\n")
    assert "igpt-tiny, ar: 16 images drawn pixel by pixel on cpu in " in done.stderr
    assert igpt("sample", "-n", 1).stdout == "runs/one/samples/sample-2.png\n"


def test_the_files_hold_what_the_library_draws(igpt, here):
    done = igpt("sample", "runs/one", "-n", 5, "--seed", 7, "--first", 2, "--temperature", 0.8, "--top-k", 6, "--top-p", 0.9, "-o", "a/grid.png", "--gif", "g.gif", "--npz", "s.npz", "--json", "-q")  # fmt: skip
    assert (done.code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    run = load_model("runs/one")
    expected = sample(run, 5, seed=7, first=2, params=SamplingParams(0.8, 6, 0.9))
    with np.load("s.npz") as arrays:
        assert np.array_equal(arrays["tokens"], expected.tokens)
        images = run.palette.dequantize(expected.tokens.reshape(5, 4, 4))
        assert np.array_equal(arrays["images"], images)
    settings = read_settings("a/grid.png")
    below = caption(settings)
    assert below.startswith("igpt-tiny")
    assert below.endswith("temperature 0.8, top-k 6, top-p 0.9, seed 7")
    assert np.array_equal(np.asarray(Image.open("a/grid.png")), np.asarray(captioned(grid(images), below)))
    assert settings == read_settings("g.gif")
    assert {k: document[k] for k in settings} == settings
    wanted = {"command": "sample", "model": "igpt-tiny", "run": "runs/one", "seed": 7, "first": 2, "temperature": 0.8}
    wanted |= {"top_k": 6, "top_p": 0.9, "rounds": None, "order": "raster", "resolution": 4, "precision": "float32"}
    assert {k: settings[k] for k in wanted} == wanted
    assert [document[k] for k in ("path", "gif", "npz")] == ["a/grid.png", "g.gif", "s.npz"]


def test_going_on_with_first_gives_the_images_that_come_next(igpt, here):
    igpt("sample", "runs/one", "-n", 6, "--npz", "all.npz", "-o", "all.png")
    igpt("sample", "runs/one", "-n", 2, "--first", 4, "--npz", "rest.npz", "-o", "rest.png")
    assert np.array_equal(np.load("all.npz")["tokens"][4:], np.load("rest.npz")["tokens"])


def test_nearest_training_images_stand_beside_the_samples(igpt, here):
    done = igpt("sample", "runs/one", "-n", 2, "--nearest", "data/tokens-4.h5", "-o", "n.png", "--json")
    found = json.loads(done.stdout)["nearest"]
    split, run = open_tokens("data/tokens-4.h5").split("train"), load_model("runs/one")
    images = run.palette.dequantize(sample(run, 2).tokens).astype(float)
    distances = np.sqrt(np.mean(np.square(images[:, None] - split.decode(slice(None)).reshape(1, 20, 16, 3)), (2, 3)))
    for i, three in enumerate(found):
        assert [x["distance"] for x in three] == pytest.approx(np.sort(distances[i])[:3], abs=1e-3)
        assert [x["name"] for x in three] == [split.names[x["row"]] for x in three]
    assert "nearest of 20 training images: distance " in done.stderr
    assert "; 0 of 2 samples are copies" in done.stderr
    plain = igpt("sample", "runs/one", "-n", 2, "-o", "plain.png", "-q")
    assert plain.code == 0
    assert Image.open("n.png").size[0] > Image.open("plain.png").size[0]


def test_bert_fills_in_rounds(igpt, here):
    done = igpt("sample", "runs/two", "-n", 2, "--rounds", 3, "--json", "-o", "b.png")
    document = json.loads(done.stdout)
    assert (document["rounds"], document["order"], document["objective"]) == (3, "surest first", "bert")
    assert "bert: 2 images drawn in at most 3 rounds on cpu" in done.stderr


def test_without_arguments_complete_takes_the_runs_own_images(igpt, here):
    done = igpt("complete")
    assert done.code == 0
    assert done.stdout == "runs/one/samples/complete-1.png\n"
    assert "tokens: data/tokens-4.h5 (default)\n" in done.stderr
    assert "images: 8 of 20 of the split test, evenly spaced\n" in done.stderr
    assert "igpt-tiny, ar: 32 images drawn pixel by pixel on cpu in " in done.stderr


def test_completions_keep_what_is_given(igpt, here):
    done = igpt("complete", "runs/one", "data/tokens-4.h5", "--split", "train", "--limit", 3, "-n", 2, "--keep", 0.75, "--seed", 3, "-o", "c.png", "--npz", "c.npz", "--gif", "c.gif", "--json")  # fmt: skip
    document = json.loads(done.stdout)
    rows = np.array([0, 6, 13])
    split, run = open_tokens("data/tokens-4.h5").split("train"), load_model("runs/one")
    missing = np.zeros((4, 4), bool)
    missing[3] = True
    expected = complete(run, split.tokens[rows], missing, 2, seed=3)
    with np.load("c.npz") as arrays:
        assert np.array_equal(arrays["tokens"], expected.tokens)
        assert (arrays["tokens"][:, :, :12] == split.tokens[rows][:, None, :12]).all()
        assert np.array_equal(arrays["originals"], split.decode(rows))
        assert np.array_equal(arrays["missing"], np.broadcast_to(missing, (3, 4, 4)))
    assert document["missing"] == {"keep": 0.75}
    assert document["images"] == [split.names[r] for r in rows]
    assert read_settings("c.png")["completions"] == 2
    assert Image.open("c.gif").n_frames > 2


def test_bert_completes_any_part_of_photos(igpt, here):
    """Images of any size, several sources; what lies outside the box stays as it is."""
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 30)), ("b.png", (9, 17))):
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(name)
    done = igpt("complete", "runs/two", "a.png", "b.png", "--box", "1,1,2,2", "-n", 1, "--npz", "c.npz", "-o", "c.png")
    assert done.code == 0, done.stderr
    with np.load("c.npz") as arrays:
        assert arrays["tokens"].shape == (2, 1, 16)
        kept = ~arrays["missing"]
        assert kept.sum() == 2 * 12
        assert np.array_equal(arrays["images"][:, 0][kept], arrays["originals"][kept])
    hole = np.zeros((4, 4), np.uint8)
    hole[0, 3] = 255
    Image.fromarray(hole).save("hole.png")
    done = igpt("complete", "runs/two", "a.png", "--mask-image", "hole.png", "--npz", "d.npz", "-o", "d.png")
    assert done.code == 0, done.stderr
    assert np.array_equal(np.load("d.npz")["missing"][0], hole > 0)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["sample", "runs/one", "-o", "x.jpg"], 1, "--out x.jpg ends in '.jpg'; a .png or .svg file is written"),
        (["sample", "runs/one", "--npz", "x.zip"], 1, "--npz x.zip ends in '.zip'; a .npz file is written"),
        (["sample", "runs/one", "--top-p", "1.5"], 1, "top_p is 1.5; it must be above 0 and at most 1"),
        (["sample", "runs/one", "--rounds", "3"], 1, "rounds are for BERT models; runs/one is autoregressive"),
        (["sample", "runs/one", "--nearest", "no.h5"], 1, "no.h5 does not exist"),
        (["sample", "runs/none"], 1, "there is no run runs/none; runs here: one, two"),
        (["complete", "runs/one", "--box", "1,1,2,2"], 1, "runs/one is autoregressive: it sees only what lies before"),
        (["complete", "runs/one", "--keep", "1"], 1, "at 1 every pixel is kept and nothing is missing"),
        (["complete", "runs/one", "--keep", "0.5", "--box", "0,0,1,1"], 2, "give one of --keep, --box and --mask-image"),
        (["complete", "runs/one", "none.png"], 1, "none.png does not exist; a token file or images were expected there"),
        (["complete", "runs/one", "data/tokens-4.h5", "data/tokens-4.h5"], 1, "is a token file, and 2 sources were given"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)  # fmt: skip
def test_bad_input_is_one_message_and_writes_nothing(igpt, here, args, code, message):
    before = sorted(map(str, here.rglob("*.*")))
    done = igpt(*args)
    assert done.code == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(map(str, here.rglob("*.*"))) == before


def test_an_existing_picture_is_kept_without_force(igpt, here):
    Path("x.png").write_text("mine")
    done = igpt("sample", "runs/one", "-o", "x.png")
    assert (done.code, Path("x.png").read_text()) == (1, "mine")
    assert "x.png exists already; choose another --out, or overwrite it with --force" in done.stderr
    assert igpt("sample", "runs/one", "-o", "x.png", "--force").code == 0


def test_builtin_models_leave_pictures_in_the_current_folder_and_no_path_of_this_machine_in_them(igpt, workspace):
    """The folder of the package is neither written to nor told."""
    done = igpt("sample", "builtin:igpt-tiny", "-n", 1, "--temperature", 0, "-q", "--gif", "filling.gif")
    assert done.stdout == "samples/sample-1.png\n"
    for path in ("samples/sample-1.png", "filling.gif"):
        assert read_settings(path)["run"] == "builtin:igpt-tiny"
        assert str(load_model("builtin:igpt-tiny").path).encode() not in Path(path).read_bytes()
