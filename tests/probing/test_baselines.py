"""The floors of a probe against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from igpt_cli.probing.baselines import PATCH, RandomPatches, colour_histogram, raw_pixels


def test_colour_histogram():
    tokens = np.array([[0, 0, 2, 2], [1, 1, 1, 1]], np.uint16)
    found = colour_histogram(tokens, 3)
    assert found.dtype == np.float32
    assert found == pytest.approx(np.sqrt([[0.5, 0, 0.5], [0, 1, 0]]))
    assert (found**2).sum(1) == pytest.approx(1)


def test_raw_pixels_are_in_order_and_from_0_to_1():
    rgb = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)
    rgb[1, 1, 1] = 255
    assert raw_pixels(rgb)[0] * 255 == pytest.approx(np.arange(12))
    assert raw_pixels(rgb)[1, -3:].tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(30, 4, 4, 3)).repeat(3, 1).repeat(3, 2)
    return np.clip(127 + 60 * smooth + 5 * rng.normal(size=smooth.shape), 0, 255).astype(np.uint8)  # (30, 12, 12, 3)


def normed(patch: np.ndarray) -> np.ndarray:
    x = patch.astype(np.float64).transpose(2, 0, 1).ravel()  # red, then green, then blue
    return (x - x.mean()) / np.sqrt(x.var() + 10)


def test_random_patches_against_numpy(images):
    """Every patch by a loop; filters as the object has them, the responses, thresholds and quadrants anew."""
    floor = RandomPatches(images, seed=3, n_patches=5)
    found = floor(images[:4])
    assert (found.shape, found.dtype) == ((4, 8 * 5), np.float32)
    weight, shift = floor.weight.numpy().astype(np.float64), floor.shift.numpy().astype(np.float64)
    side = 12 - PATCH + 1  # 7: quadrants share the middle row and column
    for image, features in zip(images, found):
        responses = np.array(
            [[weight @ normed(image[i : i + PATCH, j : j + PATCH]) - shift for j in range(side)] for i in range(side)]
        )  # (7, 7, 5)
        both = np.maximum(np.concatenate((responses, -responses), 2) - 0.25, 0)
        quadrants = [both[a, b].mean((0, 1)) for a in (slice(0, 4), slice(3, 7)) for b in (slice(0, 4), slice(3, 7))]
        assert features.reshape(10, 4) == pytest.approx(np.array(quadrants).T, abs=1e-4)


def test_filters_are_whitened_patches(images):
    """Over the patches that it was fitted on, whitened filters respond as unit vectors do to white noise."""
    floor = RandomPatches(images, seed=0, n_patches=40)
    patches = np.array([normed(im[i : i + PATCH, j : j + PATCH]) for im in images for i in range(7) for j in range(7)])
    responses = patches @ floor.weight.numpy().astype(np.float64).T - floor.shift.numpy()
    assert np.abs(responses.mean(0)).max() < 1e-3
    assert (responses.var(0) < 1.001).all()  # 1 but for the ridge


def test_the_same_seed_gives_the_same_filters(images):
    first, again, other = (RandomPatches(images, seed=s, n_patches=5).weight for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
