"""igpt tokens import: the opposite of export, for arrays of any type; what cannot be right is refused with its row."""

from __future__ import annotations

import numpy as np
import pytest

from igpt_cli.errors import FormatError
from igpt_cli.palette.formats import write_palette
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens import checks
from igpt_cli.tokens.export import export_openai
from igpt_cli.tokens.import_ import import_openai
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.verify import verify
from igpt_cli.tokens.writer import TokenWriter

PALETTE = Palette(np.random.default_rng(0).uniform(0, 255, (16, 3)))
RNG = np.random.default_rng(1)
X = RNG.integers(16, size=(6, 9))
LABELS = np.array([2, 0, -1, 1, 1, 0])
Y = np.stack([c == LABELS for c in range(4)], 1)  # the last class has no image


@pytest.fixture
def arrays(workspace):
    """a_teX.npy, a_teY.npy as OpenAI's are, and kmeans_centers.npy beside them."""
    np.save("a_teX.npy", X.astype(np.int64))
    np.save("a_teY.npy", Y.astype(np.float32))
    write_palette(PALETTE, "kmeans_centers.npy")
    return workspace


def test_one_split_as_typed(igpt, arrays):
    done = igpt("tokens", "import", "a_teX.npy", "a_teY.npy", "-p", "kmeans_centers.npy", "-o", "t.h5")
    assert (done.code, done.stdout) == (0, "t.h5\n")
    assert done.stderr == (
        "split: test (default)\ntest 6 rows of 9 tokens, 4 classes\n1 images of test have no label\n"
    )
    file = open_tokens("t.h5")
    assert list(file.splits) == ["test"]
    assert file.split("test").tokens.tolist() == X.tolist()
    assert file.split("test").labels.tolist() == LABELS.tolist()
    assert file.split("test").names[:2] == ["test/000000", "test/000001"]
    assert (file.classes, file.palette.sha256, file.resolution) == (["0", "1", "2", "3"], PALETTE.sha256, 3)
    assert file.attrs["source"] == "a_teX.npy, a_teY.npy"
    assert file.preprocess == {"imported": "npy", "resolution": 3}
    assert verify("t.h5") == []


def test_all_splits_by_the_beginning_of_their_names(igpt, arrays):
    np.save("a_trX.npy", X[:4])
    np.save("a_trY.npy", Y[:4])
    np.save("a_vaX.npy", X[::-1])
    done = igpt("tokens", "import", "a", "-o", "t.h5")
    assert done.stderr == (
        "palette: kmeans_centers.npy (default)\n"
        "no labels for val: there is no Y with a_vaX.npy\n"
        "train 4, val 6, test 6 rows of 9 tokens, 4 classes\n"
        "1 images of train have no label\n1 images of test have no label\n"
    )
    splits = open_tokens("t.h5").splits
    assert {name: len(part) for name, part in splits.items()} == {"train": 4, "val": 6, "test": 6}
    assert set(splits["val"].labels.tolist()) == {-1}
    assert igpt("tokens", "import", "a", "--split", "val", "-o", "v.h5", "-q").stderr == ""
    assert list(open_tokens("v.h5").splits) == ["val"]


@pytest.mark.parametrize("labelled", [True, False])
def test_import_is_the_opposite_of_export(igpt, workspace, labelled):
    classes = ["cat", "dog", "eel"] if labelled else []
    with TokenWriter("a.h5", PALETTE, 4, classes=classes) as writer:
        for split, n in (("train", 20), ("val", 3), ("test", 7)):
            labels = RNG.integers(-1, 3, n) if labelled else np.full(n, -1)
            writer.append(split, RNG.integers(16, size=(n, 16)), labels, [str(i) for i in range(n)])
    (workspace / "names.txt").write_text("".join(f"{c}\n" for c in classes))
    named = ["--classes", "names.txt"] if labelled else []
    assert igpt("tokens", "export", "a.h5", "-o", "out/a").code == 0
    assert igpt("tokens", "import", "out/a", "-p", "a.h5", "-o", "b.h5", *named).code == 0
    a, b = open_tokens("a.h5"), open_tokens("b.h5")
    assert (a.palette.sha256, a.classes, a.resolution) == (b.palette.sha256, b.classes, b.resolution)
    assert list(a.splits) == list(b.splits)
    for name in a.splits:
        assert a.split(name).sha256 == b.split(name).sha256 != ""
        np.testing.assert_array_equal(a.split(name).labels, b.split(name).labels)
    export_openai(b, "again/a")
    for path in (workspace / "out").iterdir():
        assert path.read_bytes() == (workspace / "again" / path.name).read_bytes()


@pytest.mark.parametrize("x", ["i1", "u1", "<i2", ">i4", "u8", "i8 by columns"])
@pytest.mark.parametrize("y", ["?", "u1", "f2", ">f8", "i8"])
def test_any_type_and_blocks_of_any_size(workspace, monkeypatch, x, y):
    monkeypatch.setattr(checks, "BLOCK_BYTES", 40)
    dtype, *order = x.split(" by ")
    np.save("X.npy", np.asarray(X, dtype, order="F" if order else "C"))
    np.save("Y.npy", Y.astype(y))
    seen = []
    file = import_openai(
        {"test": (workspace / "X.npy", workspace / "Y.npy")}, PALETTE, "t.h5", progress=lambda *at: seen.append(at)
    )
    assert file.split("test").tokens.tolist() == X.tolist()
    assert file.split("test").labels.tolist() == LABELS.tolist()
    assert seen[-1] == (6, 6)


def test_labels_as_whole_numbers(igpt, arrays):
    np.save("y.npy", LABELS)
    assert igpt("tokens", "import", "a_teX.npy", "y.npy", "-o", "t.h5").code == 0
    file = open_tokens("t.h5")
    assert (file.split("test").labels.tolist(), file.classes) == (LABELS.tolist(), ["0", "1", "2"])
    (arrays / "names.txt").write_text("cat\ndog\neel\nyak\n")
    igpt("tokens", "import", "a_teX.npy", "y.npy", "-o", "t.h5", "--force", "--classes", "names.txt")
    assert open_tokens("t.h5").classes == ["cat", "dog", "eel", "yak"]


def bad_y(row, values):
    y = Y.astype(np.float32)
    y[row] = values
    return y


BAD = {
    "no such files": ("b -o t.h5", "there is neither a file b nor b_trX.npy, b_vaX.npy or b_teX.npy"),
    "no such file": ("b_teX.npy -o t.h5", "b_teX.npy does not exist; an array of tokens (.npy) was expected there"),
    "Y without X": ("y -o t.h5", "y_trY.npy is there and y_trX.npy is not"),
    "three files": ("a_teX.npy a_teY.npy a_teX.npy -o t.h5", "3 files were given; one split is X.npy and Y.npy"),
    "no split": ("X.npy -o t.h5", "which split X.npy is cannot be told from its name; say it with --split"),
    "not this split": ("a --split val -o t.h5", "a has no arrays of 'val'; there are those of test"),
    "no palette": ("sub/a_teX.npy -o t.h5", "no palette was given and none is at sub/kmeans_centers.npy"),
    "small palette": ("a -p small.npz -o t.h5", "a_teX.npy holds the token 15 in row 3; the palette has 15 colours"),
    "negative": ("negative_teX.npy -o t.h5", "negative_teX.npy holds the token -7 in row 5; the palette has 16"),
    "not a square": ("flat_teX.npy -o t.h5", "flat_teX.npy has rows of 8 tokens, which is no square R * R; X"),
    "Y before X": ("a_teY.npy a_teX.npy --split test -o t.h5", "a_teY.npy holds float32 of shape (6, 4); tokens are"),
    "fractions": ("float_teX.npy -o t.h5", "float_teX.npy holds float64 of shape (6, 9); tokens are (N, R * R) whole"),
    "three axes": ("cube_teX.npy -o t.h5", "cube_teX.npy holds int64 of shape (6, 3, 3); tokens are (N, R * R)"),
    "no rows": ("empty_teX.npy -o t.h5", "empty_teX.npy holds no images: its shape is (0, 9)"),
    "objects": ("object_teX.npy -o t.h5", "object_teX.npy is damaged or cut off, or holds Python objects"),
    "cut off": ("cut_teX.npy -o t.h5", "cut_teX.npy is damaged or cut off, or holds Python objects"),
    "an archive": ("z_teX.npy -o t.h5", "z_teX.npy is a NumPy archive (.npz); an array of tokens (.npy) was expected"),
    "two sizes": ("two -o t.h5", "two_trX.npy has rows of 9 tokens and two_teX.npy of 16; all must be of one size"),
    "other rows": ("a_teX.npy short.npy -o t.h5", "short.npy has 5 rows, and X beside it 6"),
    "two ones": (
        "a_teX.npy ones.npy -o t.h5",
        "ones.npy: row 4 is not one-hot: it has 2 ones; at most one is expected",
    ),
    "a half": ("a_teX.npy half.npy -o t.h5", "half.npy: row 3 is not one-hot: it holds 0.5"),
    "not a number": ("a_teX.npy nan.npy -o t.h5", "nan.npy: row 5 is not one-hot: it holds nan"),
    "a low label": ("a_teX.npy low.npy -o t.h5", "low.npy holds the label -2 in row 1; labels are 0..C-1, or -1"),
    "labels as text": ("a_teX.npy text.npy -o t.h5", "text.npy holds <U1 of shape (6,); labels are (N, C) one-hot"),
    "two widths": ("w -o t.h5", "the same number of classes: w_trY.npy has 4, w_teY.npy has 3"),
    "few names": ("a --classes two.txt -o t.h5", "2 names of classes were given, and a_teY.npy has 4 columns"),
    "fewer names than labels": (
        "a_teX.npy y.npy --classes two.txt -o t.h5",
        "label 2 is used, and there are 2 classes",
    ),
    "an empty name": ("a --classes gap.txt -o t.h5", "gap.txt: line 2 is empty; the name of a class is expected"),
    "names that are no text": (
        "a --classes a_teX.npy -o t.h5",
        "a_teX.npy is a NumPy array (.npy); UTF-8 text was expected",
    ),
    "existing output": ("a -o gap.txt", "gap.txt exists already; choose another --out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message(igpt, arrays, name):
    line, message = BAD[name]
    negative = X.copy()
    negative[5, 2] = -7
    rows = X.copy()
    rows[:3] %= 15
    rows[3, 0] = 15
    np.save("a_teX.npy", rows)
    np.save("X.npy", X)
    np.save("y.npy", LABELS)
    for file, values in {
        "y_trY": Y,
        "negative_teX": negative,
        "float_teX": X * 1.0,
        "flat_teX": X[:, :8],
        "cube_teX": X.reshape(6, 3, 3),
        "empty_teX": X[:0],
        "object_teX": np.array([[{}]]),
        "two_trX": X,
        "two_teX": np.zeros((2, 16), int),
        "short": Y[:5],
        "ones": bad_y(4, [0, 1, 1, 0]),
        "half": bad_y(3, [0, 0.5, 0, 0]),
        "nan": bad_y(5, [np.nan, 0, 0, 0]),
        "low": np.array([0, -2, 0, 0, 0, 0]),
        "text": np.array(list("abcdef")),
        "w_trX": X,
        "w_trY": Y,
        "w_teX": X,
        "w_teY": Y[:, :3],
    }.items():
        np.save(f"{file}.npy", values)
    (arrays / "cut_teX.npy").write_bytes((arrays / "X.npy").read_bytes()[:-1])
    np.savez("z.npz", X=X)
    (arrays / "z.npz").rename("z_teX.npy")
    (arrays / "sub").mkdir()
    np.save("sub/a_teX.npy", X)
    Palette(PALETTE.centers[:15]).save("small.npz")
    (arrays / "two.txt").write_text("cat\ndog\n")
    (arrays / "gap.txt").write_text("cat\n\ndog\neel\n")
    done = igpt("tokens", "import", *line.split())
    assert done.code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(arrays.glob("t.h5*"))


def test_a_bad_row_is_counted_over_the_whole_array(workspace, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK_BYTES", 40)
    np.save("X.npy", np.where(np.arange(6)[:, None] == 4, 99, X))
    with pytest.raises(FormatError, match="holds the token 99 in row 4"):
        import_openai({"test": (workspace / "X.npy", None)}, PALETTE, "t.h5")
    assert not list(workspace.glob("t.h5*"))
