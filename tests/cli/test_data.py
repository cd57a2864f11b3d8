"""igpt data, as it is typed."""

import json
from pathlib import Path

import numpy as np
import pytest
from make_samples import drawing, encoded, write_tar
from PIL import Image

from igpt_cli.images.embedded import EmbeddedSource
from igpt_cli.images.transforms import Preprocess, prepare

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


@pytest.fixture
def samples(monkeypatch):
    """The samples' folder is the current one, so that what is printed is the same everywhere."""
    monkeypatch.chdir(SAMPLES)


def test_info_prints_a_table(igpt, samples):
    done = igpt("data", "info", "photos.tar.gz")
    assert done.code == 0
    assert done.stdout == (
        "photos.tar.gz: tar, 18 images\n"
        "\n"
        "class     train  test\n"
        "disc          4     2\n"
        "square        4     2\n"
        "triangle      4     2\n"
        "all          12     6\n"
        "\n"
        "sizes: 48x40 (15), 24x20 (3)\n"
        "types: JPEG (3), PNG (3), WEBP (3), BMP (3), GIF (3), TIFF (3)\n"
    )
    assert done.stderr == ""


def test_info_with_check_names_the_broken(igpt, samples):
    done = igpt("data", "info", "broken", "--check")
    assert done.code == 0
    assert done.stdout == (
        "broken: folder, 7 images\n"
        "\n"
        "     train\n"
        "all      7\n"
        "\n"
        "sizes: 48x40 (2)\n"
        "types: JPEG (1), PNG (1)\n"
        "\n"
        "images that cannot be read: 6 of 7\n"
        "  bomb.png: more than 89,478,485 pixels; refused as a decompression bomb\n"
        "  empty.png: empty file\n"
        "  photo.heic: a HEIC photo or a film; save it as JPEG or PNG first\n"
        "  text.jpg: not an image, or one that is broken from its first bytes on\n"
        "  truncated.jpg: Truncated File Read\n"
        "  truncated.png: image file is truncated\n"
    )


def test_info_as_json(igpt, samples):
    found = json.loads(igpt("data", "info", "stl10_binary.tar.gz", "--json").stdout)
    assert found["splits"] == {"train": 6, "test": 3, "unlabeled": 1}
    assert found["classes"]["disc"] == {"train": 2, "test": 1, "unlabeled": 0}
    assert found["classes"]["(none)"] == {"train": 0, "test": 0, "unlabeled": 1}
    assert (found["kind"], found["sizes"], found["bad"]) == ("stl10", {"96x96": 10}, [])


def test_info_says_that_a_jpeg_copy_of_cifar_is_one(igpt, workspace):
    write_tar(workspace / "cifar10-jpeg.tar", {"a/1.jpg": encoded(drawing("disc", 0), ".jpg")}, "w")
    found = json.loads(igpt("data", "info", "cifar10-jpeg.tar", "--json").stdout)
    assert found["notes"] == [
        "JPEG changes pixels: figures on these images are not quite comparable with published CIFAR figures"
    ]


def test_info_of_a_list_on_stdin(igpt, samples):
    files = sorted(str(p) for p in Path("photos/test").rglob("*.*"))
    for separator, options in (("\n", ()), ("\0", ("-0",))):
        done = igpt("data", "info", "-", "--json", *options, stdin=separator.join(files))
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["splits"] == {"test": 6}


def test_info_without_arguments_says_what_it_took(igpt, workspace):
    done = igpt("data", "info")
    assert done.stdout.startswith("embedded: embedded, 3,812 images\n")
    assert done.stderr == "images: embedded (default)\n"


def test_make_embedded_writes_each_image_as_it_is_stored_or_smaller(igpt, workspace):
    for out, options, R in (("emoji", (), 64), ("small", ("--resolution", "16"), 16)):
        done = igpt("data", "make", "embedded", "-o", out, *options)
        assert (done.code, done.stdout) == (0, f"{out}\n")
        assert f"3,812 images of {R} x {R}" in done.stderr
        assert len(list(Path(out).rglob("*.png"))) == 3812
        for record, _ in zip(EmbeddedSource().records(), range(20)):
            written = np.asarray(Image.open(Path(out, record.name).with_suffix(".png")))
            np.testing.assert_array_equal(written, prepare(record.data, Preprocess(R), record.name))


def test_make_embedded_overwrites_nothing(igpt, workspace):
    (workspace / "emoji").mkdir()
    again = igpt("data", "make", "embedded", "-o", "emoji")
    assert (again.code, again.stderr) == (1, "error: emoji exists already; choose another --out\n")


def bad_input(workspace: Path) -> None:
    """Files for the table below."""
    (workspace / "empty").mkdir()
    (workspace / "words").mkdir()
    (workspace / "words" / "a.txt").write_text("x")
    (workspace / "words" / "b.csv").write_text("x")
    (workspace / "empty.bin").write_bytes(b"")
    (workspace / "list.txt").write_text("a.jpg\nb.jpg\n")
    (workspace / "tokens.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    (workspace / "data_batch").write_bytes(b"\x80\x02}.")
    (workspace / "x.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(50))
    (workspace / "x.rar").write_bytes(b"Rar!\x1a\x07\x00")
    (workspace / "x.pdf").write_bytes(b"%PDF-1.7")
    (workspace / "x.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64")
    (workspace / "x.gz").write_bytes((SAMPLES / "photos.tar.gz").read_bytes()[:9])
    write_tar(workspace / "words.tar", {"a.txt": b"x", "b.md": b"y"}, "w")
    tar = (SAMPLES / "photos.tar").read_bytes()
    (workspace / "cut.tar").write_bytes(tar[:3000])
    (workspace / "cut.tar.gz").write_bytes((SAMPLES / "photos.tar.gz").read_bytes()[:2000])
    (workspace / "cut.zip").write_bytes((SAMPLES / "photos.zip").read_bytes()[:2000])
    (workspace / "cut.parquet").write_bytes(next((SAMPLES / "parquet").iterdir()).read_bytes()[:2000])
    (workspace / "cut.npy").write_bytes((SAMPLES / "shapes.npy").read_bytes()[:50])
    np.save(workspace / "planes.npy", np.zeros((2, 3, 8, 8), np.uint8))
    (workspace / "a.png").write_bytes(encoded(drawing("disc", 0), ".png"))


BAD = [
    (("info", "nowhere"), "", "error: no such file or folder: nowhere\n"),
    (("info", "a.png", "x", "y"), "", "error: no such file or folder: x, y (2 of 3 paths)\n"),
    (
        ("info", "-"),
        "".join(f"{i}.jpg\n" for i in range(9)),
        "error: no such file or folder: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 4 more (9 of 9 paths)\n",
    ),
    (
        ("info", "-"),
        "",
        "error: no paths on stdin; give some, one a line: find photos -name '*.jpg' | igpt ... -\n",
    ),
    (
        ("info", "empty"),
        "",
        "error: the folder empty holds no images; it holds no files. Images have suffixes such as .jpg\n",
    ),
    (
        ("info", "words"),
        "",
        "error: the folder words holds no images; it holds 1 .txt file, 1 .csv file. "
        "Images have suffixes such as .jpg\n",
    ),
    (("info", "empty.bin"), "", "error: empty.bin holds no images: it is empty\n"),
    (
        ("info", "list.txt"),
        "",
        "error: list.txt holds no images: it is a text file; for a list of paths use: igpt ... - < list.txt\n",
    ),
    (("info", "x.pdf"), "", "error: x.pdf holds no images: it is a PostScript or PDF document; save it as PNG first\n"),
    (("info", "x.mat"), "", "error: x.mat holds no images: it is a MATLAB file of version 7.3; save it with -v7\n"),
    (("info", "tokens.h5"), "", "error: tokens.h5 holds no images: it is an HDF5 file, such as a token file\n"),
    (
        ("info", "data_batch"),
        "",
        "error: data_batch holds no images: it is a Python pickle; name the folder in which a published CIFAR lies\n",
    ),
    (
        ("info", "x.zst"),
        "",
        "error: x.zst holds no images: it is compressed with zstd; unpack it with `zstd -d` first\n",
    ),
    (("info", "x.rar"), "", "error: x.rar holds no images: it is a rar or 7z archive; repack it as tar or zip\n"),
    (("info", "x.gz"), "", "error: x.gz is broken or truncated: Compressed file ended before"),
    (("info", "words.tar"), "", "error: words.tar holds no images; it holds 1 .txt file, 1 .md file\n"),
    (("info", "cut.tar"), "", "error: cut.tar is a broken or truncated archive: it ends inside "),
    (("info", "cut.tar.gz"), "", "error: cut.tar.gz is a broken or truncated archive: "),
    (
        ("info", "cut.zip"),
        "",
        "error: cut.zip is a broken or truncated archive: File is not a zip file; fetch or make it again\n",
    ),
    (("info", "cut.parquet"), "", "error: cut.parquet is a broken Parquet file: "),
    (("info", "cut.npy"), "", "error: cut.npy is a broken NumPy file: "),
    (("info", "planes.npy"), "", "error: planes.npy has shape (2, 3, 8, 8) and type uint8; images are (N, H, W, 3)"),
    (("make", "digits", "-o", "x"), "", "error: there is nothing called 'digits' to make; there is: embedded\n"),
    (("make", "embedded", "-o", "empty"), "", "error: empty exists already; choose another --out"),
    (("make", "embedded", "-o", "a.png/x"), "", "error: cannot write a.png/x: a.png is not a folder"),
    (
        ("fetch", "imagenet", "-o", "x"),
        "",
        "error: there is no data set 'imagenet' to fetch; there are cifar10, cifar100, stl10\n",
    ),
    (("fetch", "cifar10", "-o", "a.png"), "", "error: cannot write a.png/cifar-10-python.tar.gz: File exists\n"),
]


@pytest.mark.parametrize(("arguments", "stdin", "message"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_gives_one_clear_message(igpt, workspace, arguments, stdin, message):
    bad_input(workspace)
    before = sorted(workspace.rglob("*"))
    done = igpt("data", *arguments, stdin=stdin)
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [("make", "embedded"), ("fetch", "cifar10"), ("make", "embedded", "-o", "x", "-r", "4"), ("info", "--nonsense")],
)
def test_wrong_usage_exits_with_2(igpt, workspace, arguments):
    assert igpt("data", *arguments).code == 2
