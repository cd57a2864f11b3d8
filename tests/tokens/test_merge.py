"""Joining, exporting and picturing token files."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest

from igpt_cli.errors import InputError, MismatchError, OutputError
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.describe import describe
from igpt_cli.tokens.export import export_openai
from igpt_cli.tokens.merge import merge
from igpt_cli.tokens.sheet import contact_sheet, sample_rows
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.writer import TokenWriter

R, V = 4, 8
GREYS = np.linspace(0, 255, V)[:, None].repeat(3, 1)


def write(path, *, n=6, seed=0, splits=("train", "test"), centers=GREYS, side=R, classes=("cat", "dog"), **more):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, len(classes), n)
    with TokenWriter(path, Palette(centers), side, classes=classes, source=path.stem, force=True, **more) as writer:
        for split in splits:
            tokens = rng.integers(0, len(centers), (n, side * side))
            rgb = writer.palette.dequantize(tokens).reshape(n, side, side, 3)
            names = [f"{split}/{path.stem}-{i}.png" for i in range(n)]
            writer.append(split, tokens, labels, names, rgb=rgb, index=np.arange(n))
    return path


def test_files_that_are_no_shards_follow_one_another(tmp_path):
    a, b = write(tmp_path / "a.h5"), write(tmp_path / "b.h5", n=3, seed=1, splits=("val", "train"))
    seen = []
    merged = open_tokens(merge([b, a], tmp_path / "m.h5", progress=lambda *p: seen.append(p)))
    assert {s: len(part) for s, part in merged.splits.items()} == {"train": 9, "val": 3, "test": 6}
    first, second = open_tokens(b).split("train"), open_tokens(a).split("train")
    assert np.array_equal(merged.split("train").tokens, np.concatenate([first.tokens, second.tokens]))
    assert np.array_equal(merged.split("train").labels, np.concatenate([first.labels, second.labels]))
    assert merged.split("train").names == first.names + second.names
    assert merged.attrs["source"] == "b; a"
    assert seen[-1] == (18, 18)


def test_what_chose_the_images_is_recorded_where_all_files_agree(tmp_path):
    held = {"test_part": 0.2, "test_seed": 1}
    a, b = (write(tmp_path / f"{name}.h5", seed=i, selection=held) for i, name in enumerate("ab"))
    c = write(tmp_path / "c.h5", seed=2)
    assert open_tokens(merge([a, b], tmp_path / "m.h5")).selection == held
    assert open_tokens(merge([a, b, c], tmp_path / "n.h5")).selection == {}


MISMATCHES = {
    "palette": ({"centers": GREYS[::-1]}, MismatchError, "cannot be merged: the palette is"),
    "size of palette": (
        {"centers": GREYS[:5]},
        MismatchError,
        r"the palette is \w+ \(8 colours\) and \w+ \(5 colours\)",
    ),
    "resolution": ({"side": 5}, MismatchError, "the resolution is 4 and 5"),
    "preparation": (
        {"preprocess": {"filter": "box", "same": 1}},
        MismatchError,
        r"the preparation is \{'filter': None, 'same': None\} and \{'filter': 'box', 'same': 1\}",
    ),
    "classes": ({"classes": ("cat", "owl")}, MismatchError, r"the classes is \['cat', 'dog'\] and \['cat', 'owl'\]"),
    "one of many classes": (
        {"classes": ("cat", "dog", *map(str, range(100)), "owl")},
        MismatchError,
        r"the classes is \[\] and \['0', '1', ",
    ),
    "images kept": ({"keep_rgb": True}, MismatchError, r"b\.h5 keeps the images \(--keep-rgb\) and .*a\.h5 does not"),
    "shard": ({"shard": "0/2"}, MismatchError, r"shards cannot be merged with files that are none: .*a\.h5"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_files_that_do_not_agree_are_not_merged(tmp_path, name):
    change, error, message = MISMATCHES[name]
    a, b = write(tmp_path / "a.h5"), write(tmp_path / "b.h5", **change)
    with pytest.raises(error, match=message):
        merge([a, b], tmp_path / "m.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_shards_must_be_complete_and_of_one_run(tmp_path):
    for i in range(3):
        write(tmp_path / "s.h5", shard=f"{i}/3").rename(tmp_path / f"{i}.h5")
    paths = [tmp_path / f"{i}.h5" for i in range(3)]
    with pytest.raises(InputError, match="of 3 shards 1 are missing: 1/3"):
        merge([paths[0], paths[2]], tmp_path / "m.h5")
    with pytest.raises(InputError, match=r"1\.h5 is given twice"):
        merge([paths[1], *paths], tmp_path / "m.h5")
    shutil.copy(paths[1], tmp_path / "copy.h5")
    with pytest.raises(InputError, match=r"shard 1/3 is given twice: .*1\.h5 and .*copy\.h5"):
        merge([*paths, tmp_path / "copy.h5"], tmp_path / "m.h5")
    with pytest.raises(MismatchError, match=r"0\.h5 is shard 0/3 of s, .*other\.h5 is shard 1/3 of other; merge the"):
        merge([paths[0], write(tmp_path / "other.h5", shard="1/3")], tmp_path / "m.h5")
    other = write(tmp_path / "s.h5", shard="1/3", selection={"test_part": 0.2, "test_seed": 1})
    with pytest.raises(
        MismatchError, match=r"0\.h5 and .*s\.h5 are no shards of one run: the one has \{'test_part': N"
    ):
        merge([paths[0], other], tmp_path / "m.h5")
    with pytest.raises(InputError, match="no token files to merge were given"):
        merge([], tmp_path / "m.h5")


def test_export_is_the_form_that_openai_published(tmp_path):
    file = open_tokens(write(tmp_path / "a.h5", splits=("train", "test", "zoo")))
    paths, lacking = export_openai(file, tmp_path / "out" / "pets")
    assert [p.name for p in paths] == ["pets_trX.npy", "pets_trY.npy", "pets_teX.npy", "pets_teY.npy"]
    for split, prefix in (("train", "tr"), ("test", "te")):
        x, y = (np.load(tmp_path / "out" / f"pets_{prefix}{kind}.npy") for kind in "XY")
        labels = file.split(split).labels
        assert (x.dtype, y.dtype, y.shape) == (np.int32, np.float32, (6, 2))
        assert np.array_equal(x, file.split(split).tokens)
        assert y.sum(axis=1).tolist() == (labels >= 0).tolist()
        assert np.array_equal(y.argmax(axis=1)[labels >= 0], labels[labels >= 0])
    n = int((file.split("train").labels < 0).sum())
    assert lacking == [
        "no split val, so no pets_vaX.npy and pets_vaY.npy",
        f"{n} images of train have no label: their rows of Y are zero",
        f"{n} images of test have no label: their rows of Y are zero",
        "the splits zoo have no place in that form and were left out",
    ]
    with pytest.raises(OutputError, match=r"pets_trX\.npy exists already"):
        export_openai(file, tmp_path / "out" / "pets")


def test_export_without_classes_or_known_splits(tmp_path):
    file = open_tokens(write(tmp_path / "a.h5", classes=(), splits=("val",)))
    paths, lacking = export_openai(file, tmp_path / "x")
    assert [p.name for p in paths] == ["x_vaX.npy"]
    assert lacking[-1] == "no classes, so no Y files"
    with pytest.raises(InputError, match="has no split train, val or test; its splits: zoo"):
        export_openai(open_tokens(write(tmp_path / "b.h5", splits=("zoo",))), tmp_path / "y")


def test_description_counts_classes_and_colours(tmp_path):
    path = write(tmp_path / "a.h5", n=50)
    with h5py.File(path) as h5:
        tokens = np.concatenate([h5["train/tokens"][:], h5["test/tokens"][:]]).ravel()
        labels = h5["train/labels"][:]
    about = describe(path)
    use = np.bincount(tokens, minlength=V)
    assert about["palette"]["used"] == np.count_nonzero(use)
    top = about["palette"]["most_used"][0]
    assert (top["token"], top["share"]) == (use.argmax(), round(100 * use.max() / use.sum(), 3))
    assert about["splits"]["train"]["classes"] == {"cat": (labels == 0).sum(), "dog": (labels == 1).sum()}
    assert about["splits"]["train"]["unlabelled"] == (labels == -1).sum()
    assert {"name": "/train/tokens", "shape": [50, 16], "dtype": "uint16", "bytes": 1600} in about["tree"]


@pytest.mark.parametrize("keep_rgb", [False, True])
def test_contact_sheet_shows_every_image_it_says(tmp_path, keep_rgb):
    split = open_tokens(write(tmp_path / "a.h5", n=10, keep_rgb=keep_rgb)).split("train")
    rows = sample_rows(split, 4, seed=3)
    assert len(set(rows.tolist())) == 4
    assert (np.diff(split.labels[rows]) >= 0).all()
    sheet = np.asarray(contact_sheet(split, 4, seed=3))
    zoomed = split.decode(rows).repeat(24, axis=1).repeat(24, axis=2)  # (4, 96, 96, 3)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (96, 96), axis=(0, 1))[48]  # the first line of images
    found = [np.all(windows == image.transpose(2, 0, 1), axis=(1, 2, 3)).any() for image in zoomed]
    assert found == [True] * 4
    assert len(sample_rows(split, 100)) == 10
