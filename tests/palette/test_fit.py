"""k-means: as good as scikit-learn's, the same whatever the threads and the shards, and without dead colours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from igpt_cli.errors import InputError
from igpt_cli.palette import fit
from igpt_cli.palette.fit import fit_palette, level_of, lloyd_step
from igpt_cli.palette.histogram import ColourCounts
from igpt_cli.palette.palette import luma


def photographs(n: int = 40) -> np.ndarray:
    """(n, 32, 32, 3) uint8 cut out of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    corners = rng.integers(0, 350, (n, 2))
    return np.stack([photos[i % 2][y : y + 64 : 2, x : x + 64 : 2] for i, (y, x) in enumerate(corners)])


@pytest.fixture(scope="module")
def counts() -> ColourCounts:
    counts = ColourCounts()
    counts.add(photographs())
    return counts


def pixels_of(*colours) -> ColourCounts:
    counts = ColourCounts()
    counts.add(np.array(colours, np.uint8).reshape(-1, 3))
    return counts


@pytest.mark.parametrize("clusters", [16, 128])
def test_the_error_is_that_of_scikit_learn(counts, clusters):
    from sklearn.cluster import KMeans

    palette = fit_palette(counts, clusters, seed=1)
    colours, weights = counts.colours.astype(float), counts.weights
    theirs = KMeans(clusters, n_init=1, max_iter=100, random_state=1).fit(colours, sample_weight=weights)
    assert palette.meta["mean_squared_error"] < 1.02 * theirs.inertia_ / counts.pixels


def test_the_error_and_the_counts_are_those_of_the_palette(counts):
    palette = fit_palette(counts, 64)
    images = photographs()
    tokens = palette.quantize(images)
    assert np.array_equal(np.bincount(tokens.reshape(-1), minlength=64), palette.counts)
    error = ((images - palette.centers.astype(np.float64)[tokens]) ** 2).sum(-1).mean()
    assert palette.meta["mean_squared_error"] == pytest.approx(error, rel=1e-12)
    assert np.all(np.diff(luma(palette.centers)) >= 0)
    assert (palette.meta["images"], palette.meta["pixels"], palette.meta["seed"]) == (40, 40 * 1024, 0)


def test_a_step_is_the_plain_one(counts):
    colours, weights = counts.colours.astype(np.int64), counts.weights
    centers = np.random.default_rng(0).choice(colours, 24, replace=False).astype(np.float32)
    distance = ((colours[:, None] - centers.astype(np.float64)) ** 2).sum(2)
    nearest = distance.argmin(1)
    means = [np.average(colours[nearest == v], axis=0, weights=weights[nearest == v]) for v in range(24)]
    np.testing.assert_allclose(lloyd_step(level_of(colours, weights, 8), centers), means, rtol=1e-6)


def test_steps_do_not_raise_the_error(counts):
    level = level_of(counts.colours.astype(np.int64), counts.weights, 8)
    centers = fit.first_centers(level, 32, seed=0)
    errors = []
    for _ in range(6):
        errors.append(fit._squared_errors(level, fit._labels(level, centers), centers).sum())
        centers = lloyd_step(level, centers)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_threads_and_shards_do_not_matter():
    images = photographs(12)
    counts, shards = ColourCounts(), ColourCounts()
    counts.add(images)
    for part in (images[7:], images[:3], images[3:7]):
        shard = ColourCounts()
        shard.add(part)
        shards.merge(shard)
    with threadpool_limits(1):
        one = fit_palette(counts, 32, seed=7)
    with threadpool_limits(2):
        two = fit_palette(shards, 32, seed=7)
    assert one.sha256 == two.sha256
    assert np.array_equal(one.counts, two.counts)
    assert one.meta["mean_squared_error"] == two.meta["mean_squared_error"]
    assert fit_palette(counts, 32, seed=8).sha256 != one.sha256


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=2, max_size=40), st.data())
@settings(max_examples=12, deadline=None)
def test_every_colour_is_used(colours, data):
    counts = pixels_of(*colours)
    distinct = len(set(colours))
    if distinct < 2:
        return
    clusters = data.draw(st.integers(2, distinct))
    palette = fit_palette(counts, clusters, seed=data.draw(st.integers(0, 5)))
    assert palette.n_vocab == clusters
    assert palette.counts.min() >= 1
    assert palette.counts.sum() == len(colours)
    if clusters == distinct:
        assert palette.meta["mean_squared_error"] == 0
        assert {tuple(c) for c in palette.centers.tolist()} == set(colours)


def test_dead_centres_are_put_where_the_error_is_largest():
    level = level_of(np.array([[0, 0, 0], [10, 10, 10], [200, 0, 0], [255, 255, 255]]), np.array([5, 5, 9, 1]), 8)
    centers = np.array([[0, 0, 0], [90, 90, 90], [255, 0, 255], [0, 255, 0]], np.float32)
    labels = fit._labels(level, centers)
    weights = np.bincount(labels, level.weights, 4)
    dead = np.flatnonzero(weights == 0)
    revived = fit._revived(level, labels, centers.copy(), weights)
    errors = fit._squared_errors(level, labels, centers)
    worst = np.argsort(-errors)[: len(dead)]
    assert len(dead)
    assert {tuple(c) for c in revived[dead]} == {tuple(c) for c in level.means[worst]}
    alive = weights > 0
    assert np.array_equal(revived[alive], centers[alive])


def test_one_colour_outweighs_all_others():
    rare = np.random.default_rng(0).integers(0, 256, (60, 3))
    palette = fit_palette(pixels_of(*np.repeat([[128, 128, 128]], 100_000, axis=0), *rare), 50)
    assert palette.counts.min() >= 1


def test_progress_ends_at_the_total(counts):
    seen = []
    fit_palette(counts, 8, progress=lambda done, total: seen.append((done, total)))
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (4, "the images have 3 distinct colours, fewer than the 4 clusters requested; choose --clusters 3 or less"),
        (1, "1 clusters cannot be; choose --clusters from 2 to 65,536"),
        (65_537, "65,537 clusters cannot be"),
    ],
)
def test_impossible_numbers_of_clusters(clusters, message):
    with pytest.raises(InputError) as refused:
        fit_palette(pixels_of((1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 3, 3)), clusters)
    assert message in str(refused.value)


def test_one_colour_makes_no_palette():
    with pytest.raises(
        InputError, match="have 1 distinct colour, fewer than the 2 clusters requested; a palette has 2"
    ):
        fit_palette(pixels_of((1, 1, 1)), 2)


@pytest.mark.slow
def test_cifar10(cifar10):
    from igpt_cli.images.sources import open_source
    from igpt_cli.palette.count import count_colours

    counts = count_colours(open_source([cifar10]))
    assert (counts.images, counts.pixels, len(counts.indices)) == (50_000, 51_200_000, 1_670_077)
    palette = fit_palette(counts, 512, seed=0)
    assert palette.meta["mean_squared_error"] <= 72.4
