"""igpt palette fit, count, show, convert: what is printed, what is written, what is refused."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from igpt_cli.palette.palette import Palette


@pytest.fixture
def photos(workspace):
    """photos/train/{a,b}/*.png and photos/test/a/*.png of noise, one file broken."""
    rng = np.random.default_rng(0)
    for i, folder in enumerate(("train/a", "train/b", "test/a")):
        path = workspace / "photos" / folder
        path.mkdir(parents=True)
        for k in range(2):
            noise = rng.integers(0, 256, (32, 32, 3)) // 2 + 40 * i
            Image.fromarray(noise.astype(np.uint8)).save(path / f"{k}.png")
    (workspace / "photos/train/a/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    return workspace / "photos"


@pytest.fixture
def palette(workspace):
    centers = np.array([[0, 0, 0], [60, 0, 0], [90, 90, 90], [255, 255, 255]])
    path = workspace / "p.npz"
    Palette(centers, [4, 1, 3, 2], {"mean_squared_error": 12.0, "seed": 3, "images": 5}).save(path)
    return path


def test_without_arguments_in_an_empty_folder(igpt, workspace):
    ran = igpt("palette", "fit", "--limit", 40, "--clusters", 16)
    assert (ran.code, ran.stdout) == (0, "data/palette.npz\n")
    assert "out: data/palette.npz (default)\nimages: embedded (default)\nsplit: train (default)\n" in ran.stderr
    assert "16 colours for 40,960 pixels (" in ran.stderr
    assert ran.stderr.endswith("next: igpt tokenize\n")
    palette = Palette.load(workspace / "data/palette.npz")
    assert (palette.n_vocab, palette.meta["images"]) == (16, 40)

    again = igpt("palette", "fit")
    assert (again.code, again.stdout) == (1, "")
    assert "error: data/palette.npz exists already; choose another --out, or overwrite it with --force" in again.stderr
    shown = igpt("palette", "show")
    assert shown.code == 0
    assert shown.stderr == "palette: data/palette.npz (default)\n"


def test_images_and_their_counts_give_the_same_palette(igpt, photos):
    options = ("--clusters", 32, "--seed", 5, "-q")
    whole = igpt("palette", "fit", photos, "-o", "whole.npz", *options)
    assert (whole.code, whole.stdout, whole.stderr) == (0, "whole.npz\n", "")
    for part in "ba":
        counted = igpt("palette", "count", photos / "train" / part, "-o", f"{part}.npz", "--workers", 1)
        assert (counted.code, counted.stdout) == (0, f"{part}.npz\n")
        assert "2,048 pixels of 2 images, " in counted.stderr
    assert igpt("palette", "fit", "b.npz", "a.npz", "-o", "parts.npz", *options).code == 0
    assert igpt("palette", "fit", "a.npz", photos / "train/b", "-o", "mixed.npz", *options).code == 0
    a, b, c = (Palette.load(p) for p in ("whole.npz", "parts.npz", "mixed.npz"))
    assert a.sha256 == b.sha256 == c.sha256
    assert np.array_equal(a.counts, b.counts)


def test_a_broken_image_is_named_and_counted(igpt, photos):
    ran = igpt("palette", "count", photos, "-o", "c.npz", "--json")
    assert ran.code == 0
    assert "excluded train/a/broken.png: " in ran.stderr
    assert "1 images could not be read and were excluded; --strict stops at one" in ran.stderr
    assert "split: train (default)" in ran.stderr
    told = json.loads(ran.stdout)
    assert (told["images"], told["bad"], told["pixels"]) == (4, 1, 4096)
    assert told["sources"][0]["left_out"] == 1


def test_every_split_and_paths_on_stdin(igpt, photos):
    assert "6 images" in igpt("palette", "count", photos, "--split", "all", "-o", "all.npz").stderr
    paths = "".join(f"{p}\n" for p in sorted(photos.glob("test/a/*.png")))
    ran = igpt("palette", "count", "-", "-o", "two.npz", stdin=paths)
    assert (ran.code, ran.stdout) == (0, "two.npz\n")
    assert "2 images" in ran.stderr


def test_show_prints_a_table(igpt, palette):
    ran = igpt("palette", "show", palette)
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout == (
        "token  colour   count  share %\n"
        "    0  #000000      4   40.000\n"
        "    1  #3c0000      1   10.000\n"
        "    2  #5a5a5a      3   30.000\n"
        "    3  #ffffff      2   20.000\n"
        "colours              4\n"
        f"sha256               {Palette.load(palette).sha256}\n"
        "order                by luminance\n"
        "fitted on            10 pixels of 5 images\n"
        "dead colours         none\n"
        "rare colours         none\n"
        "mean squared error   12.00 per pixel (R + G + B, 0..255), 4.00 per channel\n"
        "PSNR                 42.11 dB\n"
        "origin               not known\n"
        "seed                 3\n"
    )


def test_show_writes_a_picture_and_json(igpt, palette, workspace):
    ran = igpt("palette", "show", palette, "-o", "swatch.png", "--json")
    told = json.loads(ran.stdout)
    assert (told["n_vocab"], told["pixels"], told["swatch"]) == (4, 10, "swatch.png")
    assert ran.stderr == "picture: swatch.png\n"
    assert igpt("palette", "show", palette, "-o", "swatch.svg").code == 0
    assert (workspace / "swatch.svg").read_text().startswith("<svg ")
    with Image.open(workspace / "swatch.png") as picture:
        assert picture.format == "PNG"


def test_convert_there_and_back(igpt, palette, workspace):
    before = Palette.load(palette).sha256
    for source, out in (
        (palette, "p.npy"),
        ("p.npy", "preprocessor_config.json"),
        ("preprocessor_config.json", "q.npz"),
    ):
        ran = igpt("palette", "convert", source, out)
        assert (ran.code, ran.stdout) == (0, f"{out}\n")
    assert "imported from preprocessor_config.json, where colours are in -1..1 (recognised)" in ran.stderr
    assert Palette.load("q.npz").sha256 == before


def test_convert_with_a_scale(igpt, workspace):
    np.save("p.npy", np.array([[0, 0, 0], [0.2, 0.4, 1]], np.float32))
    ran = igpt("palette", "convert", "p.npy", "p.npz", "--scale", "0..1", "--json")
    told = json.loads(ran.stdout)
    assert (told["n_vocab"], told["meta"]["imported"]["scale"]) == (2, "0..1")
    np.testing.assert_allclose(Palette.load("p.npz").centers, [[0, 0, 0], [51, 102, 255]], atol=1e-4)
    np.save("m.npy", np.array([[-1, -1, -1], [0.2, 0.4, 1]]))
    assert igpt("palette", "convert", "m.npy", "m.npz", "--scale", "-1..1").code == 0


def write(path, content):
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content)
    return path


WHOLE = np.zeros((512, 3), np.float32)
BAD = {
    "missing.npz": (None, "missing.npz does not exist; a palette was expected there"),
    "photo.png": (b"\x89PNG\r\n\x1a\n" + b"x" * 99, "photo.png: it is a PNG image, which holds no palette"),
    "empty.npz": (b"", "empty.npz: it is an empty file, which holds no palette"),
    "text.txt": (b"red, green, blue\n", "text.txt: it is a text file, which holds no palette"),
    "cut.npz": (b"PK\x03\x04 cut", "cut.npz is damaged or cut off, or holds Python objects"),
    "cut.npy": (b"\x93NUMPY\x01\x00\x10", "cut.npy: it is damaged or cut off"),
    "objects.npy": (
        np.array([[{}, 1, 2]] * 4, object),
        "objects.npy: it is damaged or cut off, or holds Python objects",
    ),
    "flat.npy": (WHOLE.reshape(-1), "flat.npy: a palette is (V, 3) numbers; this holds float32 of shape (1536,)"),
    "unit.npy": (
        np.linspace(0, 1, 48).reshape(16, 3),
        "unit.npy: its values go from 0 to 1, which fits more than one scale; say which it is: "
        "igpt palette convert unit.npy OUT.npz --scale -1..1|0..1|0..255",
    ),
    "wide.npy": (np.array([[-3, 0, 0], [300, 0, 0.5]]), "its values go from -3 to 300, which fits no scale of"),
    "nan.npy": (np.array([[np.nan, 0, 0], [-1, 0, 0]]), "nan.npy: it holds values that are not finite"),
    "none.npy": (np.zeros((0, 3)), "fits"),
    "broken.json": (b'{"clusters": [', "broken.json is not readable JSON: "),
    "config.json": (b'{"size": 32}', "config.json: it is JSON without a list `clusters`"),
    "null.json": (b'{"clusters": null}', "null.json: it is JSON without a list `clusters`"),
    "ragged.json": (b'{"clusters": [[0, 1, 2], [3]]}', "ragged.json: `clusters` is not a list of colours"),
    "bytes.json": (
        b'{"clusters": [[0, 1, 2], [3, 4, 200]]}',
        "bytes.json: its values go from 0 to 200, where this kind of file has -1..1; say which it is",
    ),
    "mean.json": (
        b'{"clusters": [[0, 1, -1], [1, 1, 1]], "image_mean": [0.4, 0.5, 0.5]}',
        "mean.json: its image_mean is [0.4, 0.5, 0.5]; clusters are in -1..1 only when it is 0.5",
    ),
    "tokens.h5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "tokens.h5 "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_palette(igpt, workspace, name):
    content, message = BAD[name]
    if content is not None:
        write(workspace / name, content)
    ran = igpt("palette", "show", name)
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert message in ran.stderr
    assert name in ran.stderr


def arrays(**change):
    whole = {"centers": np.eye(3) * 9, "counts": np.ones(3, int), "meta": np.array('{"order": "imported"}')}
    return {k: v for k, v in (whole | change).items() if v is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta": None}, "p.npz: it lacks meta; it is not a palette that igpt wrote"),
        ({"meta": np.array("[]")}, "p.npz: `meta` holds []; a JSON object was expected"),
        ({"centers": np.eye(3) * 999}, "p.npz: colours from 0 to 999 are outside 0..255"),
        ({"centers": np.full((3, 3), np.inf)}, "p.npz: colour 0 is not finite"),
        ({"counts": np.ones(4, int)}, "p.npz: counts must be 3 numbers from 0, not int64 of shape (4,)"),
        ({"counts": np.array([1, -1, 1])}, "p.npz: counts must be 3 numbers from 0"),
        ({"meta": np.array('{"order": "luminance"}')}, "p.npz: the colours are not sorted by luminance"),
        ({"meta": np.array([{}], object)}, "p.npz is damaged or cut off, or holds Python objects"),
        (
            {"colours": np.zeros(1), "weights": np.zeros(1)},
            "p.npz: it holds colour counts; make a palette of them with `igpt palette fit p.npz -o PALETTE`",
        ),
    ],
)
def test_damaged_palettes(igpt, workspace, change, message):
    np.savez(workspace / "p.npz", **arrays(**change))
    ran = igpt("palette", "show", "p.npz")
    assert (ran.code, ran.stdout) == (1, "")
    assert message in ran.stderr


def test_an_archive_that_unpacks_to_too_much(igpt, workspace):
    with zipfile.ZipFile("p.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("centers.npy", b"\0" * (65 * 2**20))
    ran = igpt("palette", "show", "p.npz")
    assert ran.code == 1
    assert "p.npz unpacks to 68,157,440 bytes, more than a palette can have" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "photos", "-k", 9999, "-o", "x.npz"], "fewer than the 9,999 clusters requested; choose --clusters"),
        (["fit", "photos", "-o", "p.npz"], "p.npz exists already; choose another --out, or overwrite it with --force"),
        (["fit", "photos", "--split", "val", "-o", "x.npz"], "has no split 'val'; its splits: train, test"),
        (["fit", "photos", "--strict", "-o", "x.npz"], "train/a/broken.png cannot be read: "),
        (["fit", "nowhere", "-o", "x.npz"], "no such file or folder: nowhere"),
        (["fit", "c.npz", "c.npz", "-o", "x.npz"], "c.npz is named twice; its pixels would count double"),
        (["fit", "photos", "-r", 999, "-o", "x.npz"], "resolution 999 is outside 1..224"),
        (["fit", "p.npz", "-o", "x.npz"], "p.npz is a palette; images or colour counts are needed to fit one"),
        (["count", "empty", "-o", "x.npz"], "the folder empty holds no images"),
        (["show"], "no palette given and none at data/palette.npz; run `igpt palette fit` first"),
        (
            ["show", "empty"],
            "the folder empty holds no palette: neither palette.npz nor preprocessor_config.json is in it",
        ),
        (["show", "builtin:gone"], "there is no built-in model 'builtin:gone'"),
        (["show", "p.npz", "-o", "x.jpg"], "--out x.jpg ends in '.jpg'; a .png or .svg file is written"),
        (
            ["convert", "p.npz", "x.txt"],
            "x.txt: the form is taken from the name, and .txt is none of: .npz (igpt), .npy",
        ),
        (
            ["convert", "p.npz", "x.npy", "--scale", "0..2"],
            "scale '0..2' is not known; the scales are -1..1, 0..1, 0..255",
        ),
        (
            ["convert", "p.npz", "x.npy", "--scale", "0..1"],
            "p.npz: an igpt file holds colours in 0..255; --scale 0..1 does",
        ),
        (["convert", "p.npz", "p.npz"], "p.npz exists already"),
        (["convert", "m.npy", "x.npz", "--scale", "0..1"], "its values go from -1 to 1, outside the scale 0..1"),
    ],
)
def test_refused(igpt, workspace, photos, palette, arguments, message):
    (workspace / "empty").mkdir()
    np.save("m.npy", np.array([[-1, 0, 0], [1, 1, 1]]))
    if "c.npz" in arguments:
        igpt("palette", "count", photos / "test", "-o", "c.npz", "-q")
    ran = igpt("palette", *arguments)
    assert (ran.code, ran.stdout) == (1, "")
    assert "error: " in ran.stderr
    assert message in ran.stderr
    assert not list(workspace.glob("x.*"))


@pytest.mark.parametrize(
    "arguments", [["fit", "--clusters", "1"], ["convert", "p.npz"], ["count", "--limit", "0"], ["shov"]]
)
def test_wrong_usage(igpt, workspace, arguments):
    assert igpt("palette", *arguments).code == 2
