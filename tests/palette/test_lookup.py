"""The table of nearest colours equals the plain definition, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_cli.errors import InputError
from igpt_cli.palette import lookup
from igpt_cli.palette.lookup import cells_of, colour_index, lookup_table, nearest_table, take


def brute_force(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """First index of the least squared distance in float64, one centre after the other."""
    c = centers.astype(np.float64)
    nearest = np.zeros(len(points), np.int64)
    for start in range(0, len(points), 10_000):
        r, g, b = points[start : start + 10_000].T.astype(np.float64)
        best, found = np.full(len(r), np.inf), nearest[start : start + 10_000]
        for v in range(len(c)):
            d = (r - c[v, 0]) ** 2 + (g - c[v, 1]) ** 2 + (b - c[v, 2]) ** 2
            found[d < best] = v
            np.minimum(best, d, out=best)
    return nearest


def random_centers(n: int, seed: int = 0) -> np.ndarray:
    """Dense around the greys, as the colours of photographs are."""
    rng = np.random.default_rng(seed)
    grey = rng.random((n, 1)) * 255
    return np.clip(grey + rng.normal(size=(n, 3)) * 25, 0, 255).astype(np.float32)


def test_a_million_random_colours():
    centers = random_centers(512)
    colours = np.random.default_rng(1).integers(0, 256, (1_000_000, 3), np.uint8)
    assert np.array_equal(take(lookup_table(centers), colours), brute_force(colours, centers))


@pytest.mark.parametrize("n", [2, 16, 4096])
def test_other_sizes(n):
    centers = random_centers(n, seed=n)
    colours = np.random.default_rng(n).integers(0, 256, (40_000, 3), np.uint8)
    assert np.array_equal(take(nearest_table(centers), colours), brute_force(colours, centers))


def ties(name: str) -> np.ndarray:
    steps = np.array([0, 64, 128, 192, 255])
    return {
        "a grid whose midpoints tie": np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)[::-1],
        "the corners, of which the middle has eight": np.stack(np.meshgrid([0, 254], [0, 254], [0, 254]), -1).reshape(
            -1, 3
        ),
        "twice the same colours": np.repeat([[200, 10, 30], [3, 3, 3]], 3, axis=0),
        "mirrored about grey": np.array([[96, 128, 160], [160, 128, 96], [128, 96, 160], [128, 160, 96]]),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "a grid whose midpoints tie",
        "the corners, of which the middle has eight",
        "twice the same colours",
        "mirrored about grey",
    ],
)
def test_the_first_of_tied_colours(name):
    centers = ties(name)
    table = nearest_table(centers)
    # Colours on the planes in which the centres are symmetrical, and every colour near the grey axis.
    rng = np.random.default_rng(0)
    colours = rng.choice(np.array([0, 32, 64, 96, 127, 128, 160, 192, 223, 224, 254, 255]), (60_000, 3)).astype(
        np.uint8
    )
    near = (np.repeat(np.arange(256), 30)[:, None] + rng.integers(-2, 3, (256 * 30, 3))).clip(0, 255).astype(np.uint8)
    colours = np.concatenate([colours, near])
    expected = brute_force(colours, centers)
    d = ((colours[:, None].astype(float) - centers[None]) ** 2).sum(2)
    assert (np.sum(d == d.min(1, keepdims=True), axis=1) > 1).sum() > 1000, "the test must meet ties"
    assert np.array_equal(take(table, colours), expected)


def test_every_one_of_the_16_777_216_colours():
    centers = random_centers(4, seed=5)
    values = np.arange(256)
    every = np.stack(np.meshgrid(values, values, values, indexing="ij"), -1).reshape(-1, 3).astype(np.uint8)
    assert np.array_equal(nearest_table(centers).reshape(-1), brute_force(every, centers))


whole = st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=2, max_size=12)


@given(whole, st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_coarser_grids_are_measured_from_the_middle(colours, bits):
    centers, width = np.array(colours, np.float32), 256 >> bits
    values = np.arange(0, 256, width) + (width - 1) / 2
    middles = np.stack(np.meshgrid(values, values, values, indexing="ij"), -1).reshape(-1, 3)
    assert np.array_equal(nearest_table(centers, bits).reshape(-1), brute_force(middles, centers))


@given(whole, st.integers(0, 2**32 - 1), st.integers(4, 8))
@settings(max_examples=8, deadline=None)
def test_wanted_cells_are_as_in_the_whole_table(colours, seed, bits):
    centers = np.array(colours, np.float32)
    entries = np.unique(np.random.default_rng(seed).integers(0, 1 << 3 * bits, 20))
    part = nearest_table(centers, bits, cells_of(entries, bits)).reshape(-1)[entries]
    side = 1 << bits
    rgb = np.stack(np.unravel_index(entries, (side,) * 3), 1) * (256 // side) + (256 // side - 1) / 2
    assert np.array_equal(part, brute_force(rgb, centers))


def test_taking_in_chunks_is_plain_indexing(monkeypatch):
    monkeypatch.setattr(lookup, "CHUNK", 1000)
    table = nearest_table(random_centers(16))
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)[:, ::2, ::-1]  # not contiguous
    expected = table[images[..., 0], images[..., 1], images[..., 2]]
    assert np.array_equal(take(table, images), expected)
    assert take(table, images[:0]).shape == (0, 20, 50)


def test_the_index_is_red_green_blue():
    assert colour_index(np.array([[1, 2, 3]], np.uint8)).tolist() == [0x010203]


def test_the_table_is_kept_and_cannot_be_changed():
    centers = random_centers(5)
    table = lookup_table(centers)
    assert lookup_table(centers.copy()) is table
    assert lookup_table(centers[::-1]) is not table
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("rgb", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "pixels must be uint8 RGB of shape (..., 3), not float32 of shape (4, 4, 3)"),
        (np.zeros((4, 4), np.uint8), "pixels must be uint8 RGB of shape (..., 3), not uint8 of shape (4, 4)"),
        (np.zeros((4, 4, 4), np.uint8), "pixels must be uint8 RGB of shape (..., 3), not uint8 of shape (4, 4, 4)"),
    ],
)
def test_other_pixels_are_refused(rgb, message):
    with pytest.raises(InputError) as refused:
        lookup.require_rgb(rgb)
    assert str(refused.value) == message
