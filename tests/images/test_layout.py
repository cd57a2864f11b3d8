"""Splits and classes from the names of files."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_cli.images.layout import GENERIC, layout_of, split_from_file_name
from igpt_cli.images.records import class_order, in_order, is_image_name, unique


def read(names, **options):
    """[(split, class name or None)] of each name, and the classes."""
    layout = layout_of(names, **options)
    classes = {-1: None} | dict(enumerate(layout.classes))
    pairs = zip(layout.split.tolist(), layout.label.tolist(), strict=True)
    return [(layout.splits[s], classes[c]) for s, c in pairs], layout.classes


@pytest.mark.parametrize(
    ("names", "expected", "classes"),
    [
        (["b/1.jpg", "a/2.jpg"], [("train", "b"), ("train", "a")], ["a", "b"]),
        (["1.jpg", "2.jpg"], [("train", None)] * 2, []),
        (["train/a/1.jpg", "test/a/1.jpg"], [("train", "a"), ("test", "a")], ["a"]),
        (["Train/a/1.jpg", "VALID/a/1.jpg"], [("train", "a"), ("val", "a")], ["a"]),
        (["validation/a/1.jpg", "testing/b/1.jpg"], [("val", "a"), ("test", "b")], ["a", "b"]),
        (["train/1.jpg", "test/2.jpg"], [("train", None), ("test", None)], []),
        # "train" is a vehicle here: no other folder is called like a split
        (["train/1.jpg", "car/2.jpg"], [("train", "train"), ("train", "car")], ["car", "train"]),
        # and here a split, with one more beside it
        (["train/a/1.jpg", "test/a/2.jpg", "extra/a/3.jpg"], [("train", "a"), ("test", "a"), ("extra", "a")], ["a"]),
        (["a/x/y/1.jpg", "b/z/2.jpg"], [("train", "a"), ("train", "b")], ["a", "b"]),
        (["a/1.jpg", "b/1.jpg", "3.jpg"], [("train", "a"), ("train", "b"), ("train", None)], ["a", "b"]),
        (["top/a/1.jpg", "top/b/1.jpg"], [("train", "a"), ("train", "b")], ["a", "b"]),
        (["./top/train/a/1.jpg", "top/train/b/1.jpg"], [("train", "a"), ("train", "b")], ["a", "b"]),
        (["top/1.jpg", "top/2.jpg"], [("train", None)] * 2, []),
        (["../../etc/a/1.jpg", "/etc/b/1.jpg"], [("train", "a"), ("train", "b")], ["a", "b"]),
        (["10/1.jpg", "9/1.jpg"], [("train", "10"), ("train", "9")], ["9", "10"]),
    ],
)
def test_layout(names, expected, classes):
    assert read(names) == (expected, classes)


def test_a_sole_class_folder_is_a_class_in_a_folder_but_passed_through_in_an_archive():
    assert read(["cat/1.jpg", "cat/2.jpg"], enter=3) == ([("train", "cat")] * 2, ["cat"])
    assert read(["cat/1.jpg", "cat/2.jpg"], enter=2) == ([("train", None)] * 2, [])


def test_a_folder_called_images_is_no_class():
    names = [f"{s}/images/{c}/{i}.jpg" for s in ("train", "val") for c in ("cat", "dog") for i in range(2)]
    classes = [(s, c) for s in ("train", "val") for c in ("cat", "dog") for _ in range(2)]
    assert read(names) == (classes, ["cat", "dog"])
    for names in (["images/1.jpg", "images/2.jpg"], ["train/images/1.jpg", "train/images/2.jpg"]):
        assert read(names, enter=3) == ([("train", None)] * 2, [])
        assert layout_of(names, enter=3).doubts == (
            "2 images of train without a label: the folder images is read as no class",
        )
    names = ["train/images/1.jpg", "train/masks/1.jpg"]
    assert read(names) == ([("train", "images"), ("train", "masks")], ["images", "masks"])
    assert layout_of(names).doubts == (
        "folders sound like images and what is about them, and are read as classes: images, masks",
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-val-000001.tar", "val"),
        ("test-00000-of-00001.parquet", "test"),
        ("validation/0001.tar", "val"),
        ("latest.tar", "train"),
        ("contest.npy", "train"),
        ("cifar10.tar.gz", "train"),
    ],
)
def test_split_from_file_name(name, split):
    assert split_from_file_name(name) == split


word = st.text(string.ascii_lowercase, min_size=1, max_size=6).filter(
    lambda w: w not in ("train", "val", "test", "valid") and not GENERIC.fullmatch(w)
)


@given(st.dictionaries(st.tuples(st.sampled_from(["train", "val", "test"]), word, word), st.none(), min_size=1))
@settings(max_examples=30, deadline=None)
def test_split_class_name_is_read_back(files):
    names = [f"{split}/{cls}/{stem}.png" for split, cls, stem in files]
    found, classes = read(names, enter=3)
    assert found == [(split, cls) for split, cls, _ in files]
    assert classes == sorted({cls for _, cls, _ in files})


@given(st.lists(st.sampled_from(["a", "b", "a#2"]), max_size=8))
def test_unique_keeps_order_and_first_names(names):
    out = unique(names)
    assert [o for o, n in zip(out, names, strict=True) if not o.startswith(n)] == []
    assert len(set(out)) == len(names)


def test_order_of_splits_and_classes():
    assert list(in_order({"b": 1, "test": 1, "a": 1, "train": 1, "val": 0})) == ["train", "test", "a", "b"]
    assert class_order(["b", "a", "b", "10"]) == ["10", "a", "b"]
    assert all(class_order(names) == ["01", "1", "10"] for names in (["1", "10", "01"], ["01", "10", "1"]))


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a/b.JPG", True),
        ("./a.png", True),
        ("._a.jpg", False),
        ("__MACOSX/a.jpg", False),
        (".git/a.jpg", False),
        ("a.jpg.txt", False),
        ("jpg", False),
    ],
)
def test_image_names(name, is_one):
    assert is_image_name(name) is is_one
