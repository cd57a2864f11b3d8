"""Filling in rounds, the surest pixels first: a plain NumPy version, models of which the images are known, chi-squared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models.test_igpt import plain_numpy
from sampling_models import assert_distributed, painter, random_model, softmax

from igpt_cli.errors import NonFiniteError
from igpt_cli.models.igpt import IGPT
from igpt_cli.sampling.draw import SamplingParams, stream
from igpt_cli.sampling.unmask import left_after, unmask

R, T = 4, 16
MASKS = {
    "all": np.ones(T, bool),
    "box": np.isin(np.arange(T), [5, 6, 9, 10]),
    "first": np.arange(T) == 0,
    "scattered": np.arange(T) % 3 == 1,
}


@pytest.fixture(scope="module")
def model() -> IGPT:
    return random_model("bert")


def streams(n: int, seed: int = 0) -> list[np.random.Generator]:
    return [stream(seed, image, 0) for image in range(n)]


def images_for(model: IGPT, n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(model.config.n_vocab, size=(n, model.config.n_ctx))


def fill(model, images, missing, rounds, params=None, seed=0, **more) -> tuple[np.ndarray, np.ndarray]:
    numbers = streams(len(images), seed)
    return unmask(
        model, torch.tensor(images), numbers, torch.tensor(missing), rounds, params or SamplingParams(), **more
    )


# The schedule.


def plain_left(n: int, rounds: int) -> list[int]:
    """MaskGIT's cosine, by the angle in degrees, with at least one pixel placed in each round."""
    left = []
    for r in range(1, rounds + 1):
        before = left[-1] if left else n
        if before == 0:
            break
        here = 0 if r == rounds else int(n * math.cos(math.radians(90 * r / rounds)))
        left.append(here if here < before else before - 1)
    return left


def test_how_many_are_left_after_each_round():
    assert left_after(100, 4) == [92, 70, 38, 0]  # 100 cos of 22.5, 45, 67.5 degrees: 92.4, 70.7, 38.3
    for n in (1, 2, 3, 7, 16, 100, 1024):
        for rounds in (1, 2, 3, 5, 8, 31, 32):
            left = left_after(n, rounds)
            assert left == plain_left(n, rounds)
            assert left[-1] == 0
            assert len(left) <= min(n, rounds)
            assert (np.diff([n, *left]) < 0).all()


@pytest.mark.parametrize("n", [1, 2, 5, 16, 100])
def test_rounds_as_many_as_pixels_or_more_place_one_each(n):
    for rounds in (n, n + 1, 3 * n, 10**12):
        assert left_after(n, rounds) == list(range(n - 1, -1, -1))


def test_one_round_places_all():
    assert left_after(7, 1) == [0]


# Against a plain version.


def plain_unmask(model, image, missing, rounds, numbers) -> tuple[list[int], list[int]]:
    """One image, one pixel at a time, by the logits of plain NumPy."""
    image, hidden = [0 if m else int(c) for c, m in zip(image, missing)], list(missing)
    order = [0] * T
    left = [sum(missing), *plain_left(sum(missing), rounds)]
    for r in range(1, len(left)):
        p = softmax(plain_numpy(model, np.array([image]), np.array([hidden]))[0])
        u = numbers.random(T)
        drawn = {}
        for t in range(T):
            if hidden[t]:
                total, colour = p[t][0], 0
                while total <= u[t]:
                    colour += 1
                    total += p[t][colour]
                drawn[t] = (colour, p[t][colour])
        surest = sorted(drawn, key=lambda t: (-drawn[t][1], t))[: left[r - 1] - left[r]]
        for t in surest:
            image[t], hidden[t], order[t] = drawn[t][0], False, r
    return image, order


@pytest.mark.parametrize("rounds", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("mask", MASKS)
def test_rounds_equal_a_plain_version(model, mask, rounds):
    images, missing = images_for(model, 4), MASKS[mask]
    found, order = fill(model, images, missing, rounds)
    for i, numbers in enumerate(streams(4)):
        expected = plain_unmask(model, images[i], missing, rounds, numbers)
        assert (found[i].tolist(), order[i].tolist()) == expected


@pytest.mark.parametrize("rounds", [1, 3, 32])
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_given_stays_and_the_rest_comes_in_rounds(model, mask, rounds):
    images, missing = images_for(model, 3), MASKS[mask]
    found, order = fill(model, images, missing, rounds, seed=3)
    assert np.array_equal(found[:, ~missing], images[:, ~missing])
    left = left_after(missing.sum(), rounds)
    assert (order[:, ~missing] == 0).all()
    placed = -np.diff([missing.sum(), *left])
    for row in order:
        assert np.bincount(row[missing], minlength=len(left) + 1).tolist() == [0, *placed]
    assert found.min() >= 0
    assert found.max() < model.config.n_vocab


def test_what_stands_at_missing_places_does_not_matter(model):
    missing = MASKS["scattered"]
    images = images_for(model, 3)
    others = np.where(missing, 10**6, images)
    for a, b in zip(fill(model, images, missing, 4), fill(model, others, missing, 4)):
        assert np.array_equal(a, b)


def test_the_first_in_raster_order_comes_first_where_the_model_is_equally_sure():
    model = random_model("bert", n_vocab=8)
    with torch.no_grad():
        model.wtet.weight.zero_()
    _, order = fill(model, images_for(model, 2), MASKS["scattered"], 5)
    assert order[:, MASKS["scattered"]].tolist() == [[1, 2, 3, 4, 5]] * 2


def test_sureness_is_the_models_whatever_the_chances(model):
    """With one colour left to draw, probabilities would be 1 everywhere; the order shows the model's own probabilities."""
    missing = MASKS["all"]
    found, order = fill(model, images_for(model, 1), missing, 16, SamplingParams(top_k=1))
    p = softmax(plain_numpy(model, np.zeros((1, T), int), missing[None])[0])
    first = int(p.max(-1).argmax())
    assert order[0, first] == 1
    assert found[0, first] == p[first].argmax()
    again = fill(model, images_for(model, 1), missing, 16, SamplingParams(0), seed=9)
    assert np.array_equal(again[0], found)
    assert np.array_equal(again[1], order)


# What is drawn.


def test_one_round_draws_every_pixel_from_its_softmax():
    """Chi-squared over all images of 2 x 2 pixels and 3 colours, one false alarm in a million."""
    model = random_model("bert", resolution=2, n_vocab=3)
    n, missing = 20_000, np.array([True, True, False, True])
    image = np.array([0, 0, 2, 0])
    found, _ = fill(model, image[None].repeat(n, 0), missing, 1)
    p = softmax(plain_numpy(model, image[None], missing[None])[0])
    expected = np.einsum("a,b,c->abc", *p[missing])
    assert_distributed(np.ravel_multi_index(found[:, missing].T, (3, 3, 3)), expected)


def test_a_second_round_draws_with_the_first_in_sight():
    """Chi-squared over every way in which two pixels can come, surest first; one false alarm in a million."""
    model = random_model("bert", resolution=2, n_vocab=3)
    n, missing = 20_000, np.array([True, False, False, True])
    image = np.array([0, 1, 2, 0])
    found, order = fill(model, image[None].repeat(n, 0), missing, 2)
    expected = np.zeros((3, 3))
    p = softmax(plain_numpy(model, image[None], missing[None])[0])
    for a in range(3):
        for b in range(3):
            # Both were drawn; the surer one stays, and the other is drawn again with it in sight.
            stays, again = (0, 3) if p[0, a] >= p[3, b] else (3, 0)
            seen, hidden = image.copy(), np.arange(4) == again
            seen[stays] = a if stays == 0 else b
            q = softmax(plain_numpy(model, seen[None], hidden[None])[0])[again]
            for colour in range(3):
                cell = (a, colour) if stays == 0 else (colour, b)
                expected[cell] += p[0, a] * p[3, b] * q[colour]
    assert_distributed(np.ravel_multi_index(found[:, missing].T, (3, 3)), expected)
    assert set(map(tuple, order[:, missing].tolist())) == {(1, 2), (2, 1)}  # either comes first


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rounds", [1, 3, 32])
def test_a_model_that_always_predicts_one_image_gives_it(rounds, precision):
    image = np.random.default_rng(0).integers(9, size=T)
    found, _ = fill(painter(image, 9, "bert"), np.zeros((3, T), int), MASKS["all"], rounds, precision=precision)
    assert (found == image).all()


def test_an_image_does_not_depend_on_those_beside_it(model):
    images, missing = images_for(model, 16), MASKS["box"]
    together = fill(model, images, missing, 3)
    for i, numbers in enumerate(streams(16)):
        alone = unmask(model, torch.tensor(images[i : i + 1]), [numbers], torch.tensor(missing), 3, SamplingParams())
        assert np.array_equal(alone[0][0], together[0][i])
        assert np.array_equal(alone[1][0], together[1][i])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0), SamplingParams(0.5, 3, 0.9)], ids=str)
def test_logits_that_are_not_finite_are_named(precision, params):
    model = random_model("bert")
    with torch.no_grad():
        model.wtet.weight[3].fill_(3e38)
        model.ln_f.g.fill_(100)
    hint = "; try --precision float32" if precision == "bfloat16" else ""
    with pytest.raises(NonFiniteError, match=f"^the model's logits are NaN or infinite: its weights overflow{hint}$"):
        fill(model, images_for(model, 2), MASKS["box"], 3, params, precision=precision)


def test_progress_is_told_in_every_round(model):
    told = []
    fill(model, images_for(model, 3), MASKS["all"], 4, progress=told.append)
    assert told == [3 * n for n in -np.diff([16, *left_after(16, 4)])]
    assert sum(told) == 3 * T
