"""Drawing from logits: transformers' warpers, a plain NumPy inverse, the chi-squared test; streams of random numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sampling_models import assert_distributed, softmax

from igpt_cli.errors import InputError, NonFiniteError
from igpt_cli.sampling.draw import SamplingParams, draw, require_finite, stream, uniform_dtype

V = 12
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=1.0),
    SamplingParams(0.7, top_k=7, top_p=0.8),
    SamplingParams(1.5, top_k=2, top_p=0.9),
    SamplingParams(1.2, top_k=50, top_p=0.95),
]


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    """(rows, V) float32, no two of a row alike."""
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def warped(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """(B, V) float64 probabilities after transformers' warpers, in the order in which its `generate` applies them."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        warpers.append(TopPLogitsWarper(params.top_p))
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    return warpers(ids, logits.double()).softmax(-1).numpy()


def plain_draw(p: np.ndarray, u: np.ndarray) -> list[int]:
    """The first colour at which the running sum passes u, in plain Python, one colour at a time."""
    drawn = []
    for row, number in zip(p, u):
        colours = [c for c in range(len(row)) if row[c] > 0]
        total = 0.0
        for c in colours:
            total += row[c]
            if total > number:
                break
        drawn.append(c)
    return drawn


def doubles(numbers) -> torch.Tensor:
    return torch.as_tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_every_number_gives_the_colour_of_transformers_probabilities(params):
    logits, u = logits_of(400), np.random.default_rng(1).random(400)
    assert draw(logits, doubles(u), params).tolist() == plain_draw(warped(logits, params), u)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_same_colours_are_kept_as_by_transformers(params):
    """Numbers as close as 1/20000 find every colour that has a chance of so much, and none without a chance."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for row in logits_of(8, seed=2):
        p = warped(row[None], params)[0]
        found = draw(row.expand(len(u), V), u, params).unique().tolist()
        assert set(np.flatnonzero(p > 1e-4)) <= set(found) <= set(np.flatnonzero(p))


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_what_is_drawn_agrees_with_the_softmax(params):
    """Chi-squared, one false alarm in a million."""
    logits = logits_of(1, seed=3)
    u = np.random.default_rng(4).random(50_000)
    drawn = draw(logits.expand(len(u), V), doubles(u), params)
    assert_distributed(drawn.numpy(), warped(logits, params)[0])


def test_the_chi_squared_test_can_fail():
    logits = logits_of(1, seed=3)
    u = doubles(np.random.default_rng(4).random(50_000))
    drawn = draw(logits.expand(len(u), V), u, SamplingParams(temperature=1.1)).numpy()
    with pytest.raises(AssertionError):
        assert_distributed(drawn, softmax(logits.numpy())[0])
    with pytest.raises(AssertionError):
        assert_distributed(drawn, warped(logits, SamplingParams(top_k=11))[0])


# One colour.


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0),
        SamplingParams(0, top_k=3, top_p=0.5),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(1e-310),
        SamplingParams(1e-9),
    ],
    ids=str,
)
def test_what_leaves_one_colour_takes_the_likeliest(params):
    logits, u = logits_of(200), doubles(np.random.default_rng(1).random(200))
    assert draw(logits, u, params).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [SamplingParams(0), SamplingParams(top_k=1), SamplingParams(top_p=0.1)], ids=str)
def test_of_equal_colours_the_first_is_taken(params):
    logits = torch.tensor([[0.0, 2, 2, 1], [3, 3, 3, 3]])
    assert draw(logits, doubles([0.99, 0.99]), params).tolist() == [1, 0]


def test_of_equal_colours_at_the_edge_the_first_stay():
    """Just k of them, where transformers keeps all that are as likely as the last."""
    logits = torch.tensor([[1.0, 0, 1, 1, 1]]).expand(1000, 5)
    u = doubles(np.arange(1000) / 1000)
    assert draw(logits, u, SamplingParams(top_k=2)).unique().tolist() == [0, 2]
    quarters = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log().expand(1000, 4)
    assert draw(quarters, u, SamplingParams(top_p=0.5)).unique().tolist() == [0, 1]
    assert draw(quarters, u, SamplingParams(top_p=0.51)).unique().tolist() == [0, 1, 2]


def test_top_p_keeps_the_colour_that_passes_it():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    u = doubles(np.arange(1000) / 1000)
    for top_p, kept in ((0.5, [0]), (0.51, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2])):
        drawn = draw(p.log().expand(1000, 3), u, SamplingParams(top_p=top_p))
        assert drawn.unique().tolist() == kept
        assert np.flatnonzero(warped(p.log(), SamplingParams(top_p=top_p))[0]).tolist() == kept


# The ends.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_colour_without_a_chance_is_never_drawn(dtype):
    """At 0, at the largest number below 1, and at 1, to which that is rounded on a device without float64."""
    never = -torch.inf
    logits = torch.tensor([[never, 0.3, never, never, 1.1, never]])
    ends = [0.0, math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0), 1.0]
    drawn = draw(logits.expand(4, 6), torch.tensor(ends, dtype=dtype), SamplingParams())
    assert drawn.tolist() == [1, 1, 4, 4]


def test_a_colour_with_hardly_a_chance_is_drawn_as_rarely():
    """Its probability, 1e-12, is lost in float32."""
    logits = torch.tensor([[0.0, math.log(1e-12), -1000.0]]).double().expand(3, 3)
    total = 1 + 1e-12
    numbers = [1 / total - 1e-13, 1 / total + 1e-13, math.nextafter(1.0, 0.0)]
    assert draw(logits, doubles(numbers), SamplingParams()).tolist() == [0, 1, 1]


def test_logits_are_left_as_they_were():
    logits = logits_of(3).double()
    before = logits.clone()
    for params in PARAMS:
        draw(logits, doubles([0.1, 0.5, 0.9]), params)
    assert torch.equal(logits, before)


def test_rows_do_not_depend_on_one_another():
    logits, u = logits_of(40), doubles(np.random.default_rng(5).random(40))
    for params in PARAMS:
        together = draw(logits, u, params)
        alone = torch.cat([draw(logits[i : i + 1], u[i : i + 1], params) for i in range(40)])
        assert torch.equal(together, alone)
        assert together.dtype == torch.int64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**settings)


def test_chances_as_plain_data():
    assert SamplingParams(0.5, top_p=0.9).to_dict() == {"temperature": 0.5, "top_k": None, "top_p": 0.9}


def test_what_is_not_finite_is_said():
    require_finite(True, "bfloat16")
    with pytest.raises(NonFiniteError, match="weights overflow; try --precision float32$"):
        require_finite(torch.tensor(False), "bfloat16")
    with pytest.raises(NonFiniteError, match="weights overflow$"):
        require_finite(False, "float32")


def test_uniform_numbers_are_float64_where_the_device_has_it():
    assert [uniform_dtype(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [
        torch.float64, torch.float64, torch.float32,
    ]  # fmt: skip


# Streams.


def counter_of(generator: np.random.Generator) -> int:
    """Philox' counter as one number of 256 bits; each step of it gives four numbers of 64 bits."""
    words = generator.bit_generator.state["state"]["counter"].tolist()
    return sum(word << (64 * i) for i, word in enumerate(words))


FARTHEST = 2**64 - 1


def plain_philox(counter: int, key: int) -> list[float]:
    """Four numbers in [0, 1): Philox-4x64-10 of Salmon et al. 2011, and the upper 53 bits of each word."""
    c, k = ([number >> (64 * i) & FARTHEST for i in range(n)] for number, n in ((counter, 4), (key, 2)))
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & FARTHEST, (a >> 64) ^ c[3] ^ k[1], a & FARTHEST]
        k = [(k[0] + 0x9E3779B97F4A7C15) & FARTHEST, (k[1] + 0xBB67AE8584CAA73B) & FARTHEST]
    return [(word >> 11) * 2.0**-53 for word in c]


@pytest.mark.parametrize(
    "name", [(0, 0, 0), (1, 2, 3), (FARTHEST, FARTHEST, FARTHEST), (2**63 + 1, 2**63 + 1, 2**63 + 1)]
)
def test_a_stream_is_plain_philox_counting_from_its_image_and_copy(name):
    """So that images of a seed stay what they are, whatever becomes of NumPy."""
    seed, image, copy = name
    begin = (image << 192) + (copy << 128)
    expected = [u for block in range(1, 4) for u in plain_philox(begin + block, seed)]
    assert stream(*name).random(12).tolist() == expected


def test_streams_begin_too_far_apart_to_meet():
    """2^128 steps of the counter between one and the next; 64 x 64 pixels in 4,096 rounds take 2^22."""
    places = [(image, copy) for image in (0, 1, 2**63 - 1, 2**63, 2**63 + 1, FARTHEST) for copy in (0, 1, 2**63 + 1, FARTHEST)]  # fmt: skip
    starts = sorted(counter_of(stream(7, image, copy)) for image, copy in places)
    assert len(set(starts)) == len(places)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert min(gaps) >= 2**128
    assert starts[0] + 2**256 - starts[-1] >= 2**128  # around the end
    one = stream(7, 3, 2)
    one.random((256, 4096))
    assert counter_of(one) - counter_of(stream(7, 3, 2)) == 256 * 4096 // 4


def test_streams_of_other_seeds_have_another_key():
    keys = {tuple(stream(seed, 0, 0).bit_generator.state["state"]["key"].tolist()) for seed in (0, 1, 2**63, FARTHEST)}
    assert len(keys) == 4


def test_streams_are_different_and_the_same_again():
    names = [(s, i, c) for s in (0, 1, FARTHEST) for i in (0, 1, 2**63, 2**63 + 1, FARTHEST) for c in (0, 1)]
    numbers = np.stack([stream(*name).random(100) for name in names])
    assert np.array_equal(numbers, np.stack([stream(*name).random(100) for name in names]))
    assert len(np.unique(numbers)) == numbers.size
    assert ((numbers >= 0) & (numbers < 1)).all()
    rounds = stream(1, 2, 3)
    assert np.array_equal(np.stack([rounds.random(5) for _ in range(4)]), stream(1, 2, 3).random((4, 5)))


def test_numbers_of_many_images_are_uniform():
    """Chi-squared, one false alarm in a million; the first number of each image, as it decides the first pixel."""
    first = np.array([stream(0, image, 0).random() for image in range(20_000)])
    assert_distributed((first * 32).astype(int), np.full(32, 1 / 32))
    pairs = np.array([stream(0, image, copy).random() for image in range(5_000) for copy in range(2)]).reshape(-1, 2)
    cells = (pairs * 8).astype(int) @ [8, 1]
    assert_distributed(cells, np.full(64, 1 / 64))
