"""The nearest training images: exact, whatever the blocks, threads and palettes; against scikit-learn and NumPy."""

import time

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from igpt_cli.errors import InputError, MismatchError
from igpt_cli.palette.palette import Palette
from igpt_cli.sampling import nearest as module
from igpt_cli.sampling.nearest import EXACT, nearest, squared
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.writer import TokenWriter


def a_palette(seed: int, V: int = 32) -> Palette:
    return Palette(np.random.default_rng(seed).uniform(0, 255, (V, 3)))


@pytest.fixture
def training(tmp_path):
    """Write a split: training(tokens (N, R * R), palette) -> TokenSplit."""

    def write(tokens, palette):
        with TokenWriter(tmp_path / "t.h5", palette, int(tokens.shape[1] ** 0.5), force=True) as writer:
            writer.append("train", tokens, np.full(len(tokens), -1), [f"{i}.png" for i in range(len(tokens))])
        return open_tokens(tmp_path / "t.h5").split("train")

    return write


def by_definition(samples: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(n, N) squared distances, as whole numbers."""
    a, b = (x.reshape(len(x), -1).astype(np.int64) for x in (samples, images))
    return ((a[:, None] - b[None]) ** 2).sum(-1)


@pytest.mark.parametrize("R", [4, 24])
@pytest.mark.parametrize("k", [1, 3])
def test_as_scikit_learn_and_by_definition(training, R, k):
    rng, ours, theirs = np.random.default_rng(R), a_palette(1), a_palette(2)
    split = training(rng.integers(32, size=(70, R * R)), theirs)
    tokens = rng.integers(32, size=(9, R * R))
    found = nearest(tokens, ours, split, k)
    samples, images = ours.dequantize(tokens), split.decode(slice(None))
    squares = by_definition(samples, images)
    rows = np.argsort(squares, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.rows, rows)
    root = np.sqrt(np.take_along_axis(squares, rows, 1) / (3 * R * R))
    np.testing.assert_array_equal(found.distances, root)
    np.testing.assert_array_equal(found.images, images[rows])
    oracle = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(images.reshape(70, -1).astype(float))
    distances, rows = oracle.kneighbors(samples.reshape(9, -1).astype(float))
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.distances, distances / np.sqrt(3 * R * R), rtol=1e-9)
    assert not found.copies.any()


def test_of_equally_near_images_the_lower_row_comes_first(training, monkeypatch):
    rng, palette = np.random.default_rng(0), a_palette(0)
    few = rng.integers(32, size=(3, 16))
    tokens = few[rng.integers(3, size=60)]
    split = training(tokens, palette)
    for block in (1, 4 * 48 * 7, 1 << 20):
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
        found = nearest(few, palette, split, 4)
        for i, image in enumerate(few):
            assert found.rows[i].tolist() == np.flatnonzero((tokens == image).all(1))[:4].tolist()
        assert (found.distances == 0).all()
        assert found.copies.all()


@pytest.mark.parametrize(("block", "samples", "threads"), [(1, 1, 1), (3000, 2, 3), (1 << 20, 4, 2)])
def test_blocks_and_threads_do_not_matter(training, monkeypatch, block, samples, threads):
    rng, palette = np.random.default_rng(0), a_palette(0)
    split, tokens = training(rng.integers(32, size=(101, 36)), palette), rng.integers(32, size=(5, 36))
    whole = nearest(tokens, palette, split, 4)
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    monkeypatch.setattr(module, "SAMPLES", samples)
    monkeypatch.setattr(module, "cores", lambda: threads)
    done = []
    parts = nearest(tokens, palette, split, 4, lambda *at: done.append(at))
    np.testing.assert_array_equal(parts.rows, whole.rows)
    np.testing.assert_array_equal(parts.distances, whole.distances)
    assert done == sorted(done)
    assert done[-1] == (101, 101)


def test_extreme_images_are_exact(training):
    """Black, white, and one number that differs by 1, at 32 x 32 and beyond what float32 could add up at once."""
    palette = Palette([[0, 0, 0], [1, 0, 0], [255, 255, 254], [255, 255, 255]], meta={"order": "imported"})
    images = np.zeros((4, 1024), int)
    images[1, -1], images[2], images[3] = 1, 3, 3
    images[3, 0] = 2
    found = nearest(images, palette, training(images, palette), 4)
    np.testing.assert_array_equal(np.rint(found.distances[0] ** 2 * 3072), [0, 1, 255**2 * 3072 - 509, 255**2 * 3072])
    assert found.rows.tolist() == [[0, 1, 3, 2], [1, 0, 3, 2], [2, 3, 1, 0], [3, 2, 1, 0]]
    assert found.distances[0, 3] == 255


def test_float32_sums_of_1024_products_are_exact():
    worst = np.full((1, EXACT), -128, np.float32)
    assert (worst @ worst.T).item() == 1 << 24 == squared(worst).item()
    mixed = np.random.default_rng(0).integers(-128, 128, (50, EXACT)).astype(np.float32)
    np.testing.assert_array_equal(mixed @ mixed.T, (mixed.astype(np.int64) @ mixed.T.astype(np.int64)))
    wide = np.tile(mixed, 3)[:, :-100]
    np.testing.assert_array_equal(squared(wide), np.square(wide.astype(np.int64)).sum(1))


def test_all_that_there_are_where_k_is_more(training):
    palette = a_palette(0)
    split = training(np.arange(2 * 16).reshape(2, 16), palette)
    found = nearest(np.zeros((1, 16), int), palette, split, 3)
    assert found.rows.shape == found.distances.shape == (1, 2)
    assert found.images.shape == (1, 2, 4, 4, 3)


def test_what_cannot_be_compared_is_refused(training):
    palette = a_palette(0)
    split = training(np.zeros((2, 16), int), palette)
    with pytest.raises(MismatchError, match=r"a sample has 64 pixels, an image of .*t.h5 has 4 x 4 = 16"):
        nearest(np.zeros((1, 64), int), palette, split)
    with pytest.raises(InputError, match="token 32 is outside 0..31"):
        nearest(np.full((1, 16), 32), palette, split)
    for tokens, k in [(np.zeros((0, 16), int), 3), (np.zeros(16, int), 3), (np.zeros((1, 16), int), 0)]:
        with pytest.raises(InputError, match="at least 1 of each is needed"):
            nearest(tokens, palette, split, k)


def test_an_interruption_does_not_wait_for_the_rest(training, monkeypatch):
    palette = a_palette(0)
    split = training(np.random.default_rng(0).integers(32, size=(500, 16)), palette)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "cores", lambda: 1)
    seen, take = [], module.squared

    def slow(images):
        seen.append(time.sleep(0.005))
        return take(images)

    monkeypatch.setattr(module, "squared", slow)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nearest(np.zeros((1, 16), int), palette, split, 3, stop)
    assert len(seen) < 150  # of 168, which take a second


@pytest.mark.slow
def test_real_images_as_scikit_learn(cifar10, tmp_path):
    """2,000 CIFAR images by their 200 first, some of them changed."""
    from igpt_cli.images.sources import open_source
    from igpt_cli.images.transforms import Preprocess
    from igpt_cli.tokens.tokenize import tokenize

    palette = a_palette(0, 512)
    tokenize(open_source([cifar10], 32), palette, tmp_path / "t.h5", Preprocess(32), limit=2000)
    split = open_tokens(tmp_path / "t.h5").split("train")
    tokens, rng = split.tokens[:200].copy(), np.random.default_rng(0)
    tokens[100:, rng.random(1024) < 0.2] = 7
    found = nearest(tokens, palette, split)
    oracle = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(split.decode(slice(None)).reshape(2000, -1) / 1.0)
    distances, rows = oracle.kneighbors(palette.dequantize(tokens).reshape(200, -1) / 1.0)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.distances, distances / np.sqrt(3072), atol=1e-6)
    assert found.copies[:100].all()
