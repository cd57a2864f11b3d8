"""Colour counts are exact, and merge in any order."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.images.sources import open_source
from igpt_cli.images.transforms import Preprocess, prepare
from igpt_cli.palette.count import count_colours
from igpt_cli.palette.histogram import ColourCounts, is_counts


def images_of(seed: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, (n, 8, 8, 3), np.uint8) * 85


def counted(*arrays: np.ndarray) -> ColourCounts:
    counts = ColourCounts()
    for array in arrays:
        counts.add(array)
    return counts


def assert_equal(a: ColourCounts, b: ColourCounts) -> None:
    assert np.array_equal(a.colours, b.colours)
    assert np.array_equal(a.weights, b.weights)
    assert (a.images, a.pixels) == (b.images, b.pixels)


def test_counts_are_those_of_numpy():
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8) // 16 * 16
    counts = counted(images)
    colours, weights = np.unique(images.reshape(-1, 3), axis=0, return_counts=True)
    assert np.array_equal(counts.colours, colours)
    assert np.array_equal(counts.weights, weights)
    assert counts.weights.dtype == np.int64
    assert (counts.images, counts.pixels) == (200, 200 * 32 * 32)


@given(st.permutations(range(4)))
@settings(max_examples=4, deadline=None)
def test_shards_merge_in_any_order(order):
    merged = ColourCounts()
    for seed in order:
        merged.merge(counted(images_of(seed)))
    assert_equal(merged, counted(*(images_of(s) for s in range(4))))


def test_one_image_several_images_and_bare_pixels():
    pixels = images_of(0, 1)
    assert counted(pixels[0]).images == counted(pixels).images == 1
    assert counted(pixels.reshape(-1, 3)).images == 0
    assert counted(pixels.reshape(-1, 3)).pixels == 64


def test_a_file_holds_everything(tmp_path):
    counts = counted(images_of(1))
    counts.sources.append({"source": "here", "split": "train"})
    path = counts.save(tmp_path / "c.npz")
    read = ColourCounts.load(path)
    assert_equal(read, counts)
    assert read.sources == counts.sources
    assert is_counts(path)
    with pytest.raises(OutputError, match="exists already"):
        counts.save(path)


def damaged_counts(tmp_path, **change):
    counts = counted(images_of(1))
    arrays = {"colours": counts.colours, "weights": counts.weights}
    meta = {"images": counts.images, "pixels": counts.pixels, "sources": []}
    arrays["meta"] = np.array(json.dumps(meta))
    path = tmp_path / "c.npz"
    np.savez(path, **{k: v for k, v in (arrays | change).items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "lacks weights; it is not a file of colour counts"),
        ({"colours": np.zeros((2, 3))}, "`colours` must be (n, 3) uint8, not float64 of shape (2, 3)"),
        ({"weights": np.ones(3, np.int64)}, "`weights` must be ("),
        ({"weights": np.zeros(64, np.int64)}, "colours must be in rising order, each with a count above 0"),
        ({"colours": np.zeros((64, 3), np.uint8)}, "colours must be in rising order"),
        ({"weights": np.full(64, 7)}, "`meta` does not fit the 448 pixels counted"),
        ({"meta": np.array("{")}, "`meta` is not readable JSON"),
        ({"meta": np.array([{}], object)}, "is damaged or cut off, or holds Python objects"),
    ],
)
def test_damaged_counts_are_refused(tmp_path, change, message):
    colours = counted(images_of(1)).colours
    change = {k: v[: len(colours)] if v is not None and v.ndim and len(v) == 64 else v for k, v in change.items()}
    if "448" in message:
        message = f"`meta` does not fit the {7 * len(colours):,} pixels counted"
    with pytest.raises(FormatError) as refused:
        ColourCounts.load(damaged_counts(tmp_path, **change))
    assert message in str(refused.value)


@pytest.fixture
def folder(tmp_path):
    """Two splits of small photographs, one of them broken."""
    rng = np.random.default_rng(3)
    for name in ("train/a/0", "train/a/1", "train/b/0", "test/a/0"):
        path = tmp_path / f"images/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    (tmp_path / "images/train/b/1.png").write_bytes(b"\x89PNG\r\n")
    return tmp_path / "images"


def test_images_are_prepared_and_the_training_split_counted(folder):
    bad = []
    source = open_source([folder])
    preprocess = Preprocess(16)
    counts = count_colours(source, preprocess, workers=1, on_bad=lambda name, reason: bad.append(name))
    expected = [
        prepare(r.data, preprocess, r.name)
        for r in source.records()
        if r.split == "train" and not r.name.endswith("b/1.png")
    ]
    assert_equal(counts, counted(np.stack(expected)))
    assert len(bad) == 1
    assert bad[0].endswith("b/1.png")
    (origin,) = counts.sources
    assert (origin["split"], origin["images"], origin["left_out"]) == ("train", 3, 1)
    assert origin["preprocess"] == preprocess.to_dict()


def test_two_processes_count_what_one_counts(folder):
    source = open_source([folder])
    seen = []
    counts = count_colours(source, Preprocess(16), split="all", workers=2, progress=lambda *p: seen.append(p))
    assert_equal(counts, count_colours(source, Preprocess(16), split="all", workers=1))
    assert counts.images == 4
    assert seen[-1] == (5, 5)


def test_views_are_several_crops_of_one_image(folder):
    counts = count_colours(open_source([folder]), Preprocess(16, views=3), workers=1)
    assert (counts.images, counts.pixels) == (3, 3 * 3 * 16 * 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "has no split 'val'; its splits: train, test"),
        ({"strict": True}, "b/1.png cannot be read: "),
    ],
)
def test_what_cannot_be_counted(folder, arguments, message):
    with pytest.raises(InputError) as refused:
        count_colours(open_source([folder]), workers=1, **arguments)
    assert message in str(refused.value)


def test_no_readable_image_at_all(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 images of .* could be read"):
        count_colours(open_source([tmp_path / "a.png"]), workers=1)


def test_at_most_so_many_images(folder):
    assert count_colours(open_source([folder]), workers=1, limit=2).images == 2


def test_another_zip_is_no_counts(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    (tmp_path / "y.npz").write_bytes(io.BytesIO(b"PK no zip").getvalue())
    assert not is_counts(tmp_path / "x.npz")
    assert not is_counts(tmp_path / "y.npz")
    assert not is_counts(tmp_path / "missing.npz")
