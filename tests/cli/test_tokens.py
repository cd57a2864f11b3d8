"""igpt tokens: exact output, and the message for each bad input."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import h5py
import numpy as np
import pytest
from PIL import Image

from igpt_cli.cli.preview import previews
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.writer import TokenWriter

PALETTE = Palette([[0, 0, 0], [128, 128, 128], [255, 255, 255]])


@pytest.fixture
def tokens(workspace, monkeypatch):
    """data/tokens-32.h5: four images of 2 x 2."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    path = workspace / "data/tokens-32.h5"
    with TokenWriter(path, PALETTE, 2, classes=["cat", "dog"], preprocess={"resolution": 2}, source="pets") as writer:
        writer.append("train", np.array([[0, 0, 2, 0], [2, 2, 2, 2], [0, 0, 0, 0]]), [0, 1, -1], ["a", "b", "c"])
        writer.append("test", np.array([[0, 0, 0, 2]]), [1], ["d"])
        writer.skipped = {"test": 2}
    return path


def test_info_is_a_tree_with_counts(igpt, tokens):
    done = igpt("tokens", "info")
    assert done.stderr == "tokens: data/tokens-32.h5 (default)\n"
    version = done.stdout.split("tool_version = ")[1].split("\n")[0]
    assert done.stdout == (
        "data/tokens-32.h5\n"
        "  created = 1970-01-01T00:00:00+00:00\n"
        "  format = igpt-tokens\n"
        "  format_version = 1\n"
        "  n_vocab = 3\n"
        f"  palette_sha256 = {PALETTE.sha256}\n"
        "  preprocess = resolution=2\n"
        "  resolution = 2\n"
        '  skipped = {"test": 2}\n'
        "  source = pets\n"
        f"  tool_version = {version}\n"
        "\n"
        "dataset        shape  dtype     size\n"
        "/classes       2      utf-8[3]  0.00 MB\n"
        "/palette       3 x 3  float32   0.00 MB\n"
        "/test/labels   1      int32     0.00 MB\n"
        "/test/names    1      utf-8[1]  0.00 MB\n"
        "/test/tokens   1 x 4  uint16    0.00 MB\n"
        "/train/labels  3      int32     0.00 MB\n"
        "/train/names   3      utf-8[1]  0.00 MB\n"
        "/train/tokens  3 x 4  uint16    0.00 MB\n"
        "\n"
        "class         train  test\n"
        "cat               1     0\n"
        "dog               1     1\n"
        "(unlabelled)      1     0\n"
        "(skipped)         0     2\n"
        "rows              3     1\n"
        "\n"
        "2 of 3 colours are used; most used:\n"
        "token  colour   pixels\n"
        "    0  #000000  62.50%\n"
        "    2  #ffffff  37.50%\n"
    )


def test_info_as_json(igpt, tokens):
    about = json.loads(igpt("tokens", "info", tokens, "--json").stdout)
    assert about["attrs"]["preprocess"] == {"resolution": 2}
    assert about["palette"]["most_used"][0] == {"token": 0, "rgb": [0, 0, 0], "share": 62.5}
    assert about["splits"]["test"] == {"rows": 1, "skipped": 2, "classes": {"cat": 0, "dog": 1}, "unlabelled": 0}


def test_show_writes_a_picture_and_nothing_twice(igpt, tokens):
    done = igpt("tokens", "show")
    assert (done.code, done.stdout) == (0, "data/tokens-32-train.png\n")
    assert Image.open("data/tokens-32-train.png").format == "PNG"
    assert igpt("tokens", "show", tokens, "--split", "test", "-n", 1, "-o", "s.png", "-q").stdout == "s.png\n"
    assert igpt("tokens", "show").stderr.endswith("overwrite it with --force\n")


def test_show_in_a_terminal_lists_the_images_where_there_is_no_colour(igpt, tokens):
    done = igpt("tokens", "show", "--terminal")
    assert (done.code, list(tokens.parent.iterdir())) == (0, [tokens])
    assert done.stdout.splitlines() == ["row  class  name", "  2  c      c", "  0  cat    a", "  1  dog    b"]
    assert done.stderr.endswith("stdout has no 24-bit colours; the images are listed instead\n")
    done = igpt("tokens", "show", "--terminal", "-o", "s.png")
    assert (done.code, done.stderr) == (1, "error: --terminal writes no file; leave out --out, or --terminal\n")


def test_show_in_a_terminal_with_colour(tokens):
    """In a real one, of 80 columns."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environ = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"COLORTERM": "truecolor"}
    command = [sys.executable, "-m", "igpt_cli", "tokens", "show", "--terminal", "--split", "test", "-q"]
    done = subprocess.run(
        command, stdin=side, stdout=side, stderr=subprocess.PIPE, env=environ, cwd=tokens.parent.parent
    )
    os.close(side)
    shown = os.read(main, 10_000).decode()
    os.close(main)
    assert (done.returncode, done.stderr) == (0, b"")
    black, white = "38;2;0;0;0", "48;2;255;255;255"
    pixels = f"\x1b[{black}m\x1b[48;2;0;0;0m▀\x1b[{black}m\x1b[{white}m▀\x1b[0m"
    assert shown.replace("\r\n", "\n") == f"{pixels}\ndo\n"  # no wider than the image


def test_previews_stand_side_by_side_as_many_as_fit():
    images = [np.full((3, 4, 3), 50 * i, np.uint8) for i in range(3)]
    shown = previews(images, ["zero", "one", "twenty"], 10)
    plain = re.sub("\x1b\\[[0-9;]*m", "", shown).splitlines()
    assert plain == ["▀▀▀▀  ▀▀▀▀", "▀▀▀▀  ▀▀▀▀", "zero  one", "▀▀▀▀", "▀▀▀▀", "twen"]
    assert "\x1b[49m" in shown  # below an odd last line is nothing
    assert len(previews(images, ["a", "b", "c"], 1).splitlines()) == 9


def test_verify_says_sound_or_lists_every_problem(igpt, tokens):
    done = igpt("tokens", "verify")
    assert (done.code, done.stdout) == (0, "data/tokens-32.h5 is sound\n")
    with h5py.File(tokens, "r+") as h5:
        h5["train/tokens"][0, 0] = 9
        h5["test/labels"][0] = 0
    done = igpt("tokens", "verify", tokens)
    assert done.code == 1
    problems = done.stdout.splitlines()
    assert len(problems) == 3
    assert problems[0] == (
        f"{tokens}: /train/tokens holds the token 9 in row 0; the palette has 3 colours, so tokens are 0..2"
    )
    document = json.loads(igpt("tokens", "verify", tokens, "--json").stdout)
    assert document == {"path": str(tokens), "ok": False, "problems": problems}


def test_export_prints_what_was_written_and_says_what_lacks(igpt, tokens):
    done = igpt("tokens", "export", "-o", "out/pets")
    assert done.stdout == "out/pets_trX.npy\nout/pets_trY.npy\nout/pets_teX.npy\nout/pets_teY.npy\n"
    assert done.stderr == (
        "tokens: data/tokens-32.h5 (default)\n"
        "no split val, so no pets_vaX.npy and pets_vaY.npy\n"
        "1 images of train have no label: their rows of Y are zero\n"
    )
    assert np.load("out/pets_trX.npy").tolist() == [[0, 0, 2, 0], [2, 2, 2, 2], [0, 0, 0, 0]]
    assert np.load("out/pets_trY.npy").tolist() == [[1, 0], [0, 1], [0, 0]]


BAD = {
    "a picture": ("info a.png", "a.png is a PNG image; a token file (HDF5) was expected there"),
    "a palette": ("verify p.npz", "p.npz is a NumPy archive (.npz); a token file (HDF5) was expected there"),
    "nothing there": ("info none.h5", "none.h5 does not exist; a token file was expected there"),
    "a folder": ("show data", "data is a folder; a token file was expected there"),
    "unfinished": ("info t.h5.part", "t.h5.part is unfinished: a command was interrupted while it wrote it"),
    "cut off": ("info cut.h5", "cut.h5 is cut off: 1,000 bytes are there, "),
    "another HDF5 file": ("show other.h5", "other.h5 is an HDF5 file, but not a token file: it has no attribute"),
    "missing split": ("show data/tokens-32.h5 --split val", "has no split 'val'; its splits: train, test"),
    "two resolutions": ("info", "no token file given and several in data/: data/tokens-32.h5, data/tokens-48.h5"),
    "existing output": ("merge data/tokens-32.h5 -o p.npz", "p.npz exists already; choose another --out"),
    "existing export": ("export data/tokens-32.h5 -o e", "e_trX.npy exists already"),
    "twice": ("merge data/tokens-32.h5 data/tokens-32.h5 -o m.h5", "data/tokens-32.h5 is given twice"),
    "other palette": ("merge data/tokens-32.h5 data/tokens-48.h5 -o m.h5", "cannot be merged: the palette is"),
    "link out of the file": ("info link.h5", "link.h5 is refused: /train is an external link"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message(igpt, tokens, name):
    line, message = BAD[name]
    Image.new("RGB", (2, 2)).save("a.png")
    PALETTE.save("p.npz")
    with open(tokens, "rb") as file, open("cut.h5", "wb") as cut, open("e_trX.npy", "wb"):
        cut.write(file.read(1000))
    with h5py.File("other.h5", "w") as h5:
        h5["x"] = 1
    with h5py.File("link.h5", "w") as h5:
        h5["train"] = h5py.ExternalLink("data/tokens-32.h5", "/train")
    with TokenWriter("data/tokens-48.h5", Palette(PALETTE.centers[:2]), 2) as writer:
        writer.append("train", np.zeros((1, 4), int), [-1], ["a"])
    done = igpt("tokens", *line.split())
    assert done.code == 1
    last = (done.stderr or done.stdout).splitlines()[-1]
    assert last.startswith("error: ") or line.startswith("verify")
    assert message in last
    assert not (tokens.parent.parent / "m.h5").exists()


def test_no_token_file_in_the_workspace_names_the_command(igpt, workspace):
    done = igpt("tokens", "info")
    assert (done.code, done.stderr) == (
        1,
        "error: no token file given and none at data/tokens-<R>.h5; run `igpt tokenize` first\n",
    )
