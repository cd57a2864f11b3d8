"""Pixel by pixel with keys and values kept: the logits are those of the whole model, at every position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.test_igpt import plain_numpy
from sampling_models import as_run, copier, counter, painter, random_model

from igpt_cli.device import autocast
from igpt_cli.errors import NonFiniteError
from igpt_cli.models.igpt import IGPT
from igpt_cli.sampling import decoder as module
from igpt_cli.sampling.decoder import BUCKET, CPU_ROWS, Decoder
from igpt_cli.sampling.draw import SamplingParams, draw, stream

CPU = torch.device("cpu")
#: Resolution 12 has 144 pixels: one bucket, and a part of the next.
MODELS = {
    "4x4": {"resolution": 4},
    "4x4, one head": {"resolution": 4, "n_head": 1, "n_layer": 3},
    "6x6, 300 colours": {"resolution": 6, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_vocab": 300},
    "12x12": {"resolution": 12, "n_embd": 32, "n_vocab": 64},
}


@pytest.fixture(params=MODELS)
def model(request) -> IGPT:
    return random_model(**MODELS[request.param])


def streams(n: int, seed: int = 0) -> list[np.random.Generator]:
    return [stream(seed, image, 0) for image in range(n)]


def images_for(model: IGPT, n: int, seed: int = 1) -> torch.Tensor:
    """(n, T) int64, random colours."""
    c, generator = model.config, torch.Generator().manual_seed(seed)
    return torch.randint(c.n_vocab, (n, c.n_ctx), generator=generator)


@pytest.fixture
def forced(monkeypatch):
    """forced(decoder, images, given) -> (b, T - given, V) float32: what the pixels of these images are drawn from."""

    def run(decoder: Decoder, images: torch.Tensor, given: int = 0) -> torch.Tensor:
        seen = []

        def not_drawn(logits, uniforms, params):
            t = given + len(seen)
            assert logits.dtype == torch.float32
            seen.append(logits[: len(images)].clone())
            return torch.cat((images[:, t], images.new_zeros(len(logits) - len(images))))

        with monkeypatch.context() as patch:
            patch.setattr(module, "draw", not_drawn)
            found, _ = decoder.fill(images, streams(len(images)), given)
        assert np.array_equal(found, images.numpy())
        return torch.stack(seen, 1)

    return run


# Logits.


@pytest.mark.parametrize("fixed_lengths", [False, True])
@pytest.mark.parametrize("given", [0, 1, 5, -1])
def test_cached_logits_equal_uncached_ones_at_every_position(model, given, fixed_lengths, forced):
    images = images_for(model, 3)
    given %= model.config.n_ctx
    found = forced(Decoder(model, 3, fixed_lengths=fixed_lengths), images, given)
    with torch.no_grad():
        expected = model(images)[:, given:]
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("fixed_lengths", [False, True])
def test_cached_logits_equal_plain_numpy(model, fixed_lengths, forced):
    images = images_for(model, 2)
    found = forced(Decoder(model, 2, fixed_lengths=fixed_lengths), images)
    np.testing.assert_allclose(found.numpy(), plain_numpy(model, images.numpy(), None), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("bucket", [1, 5, 8, 16, 100])
def test_buckets_of_any_length_change_nothing(bucket, monkeypatch, forced):
    model = random_model()
    images = images_for(model, 3)
    plain = forced(Decoder(model, 3), images)
    monkeypatch.setattr(module, "BUCKET", bucket)
    torch.testing.assert_close(forced(Decoder(model, 3, fixed_lengths=True), images), plain, atol=1e-5, rtol=1e-5)


def test_the_cache_is_read_in_whole_buckets_up_to_the_image():
    """12 x 12 pixels, so that a GPU records two graphs and not 144."""
    decoder = Decoder(random_model(resolution=12), 1, fixed_lengths=True)
    lengths = []
    decoder._step = lengths.append
    for t in range(144):
        decoder.draw(t)
    assert BUCKET == 128
    assert lengths == [128] * 128 + [144] * 16


@pytest.mark.parametrize("fixed_lengths", [False, True])
def test_what_the_cache_held_before_does_not_matter(fixed_lengths, monkeypatch, forced):
    monkeypatch.setattr(module, "BUCKET", 5)
    model = random_model()
    images = images_for(model, 3)
    clean = forced(Decoder(model, 3, fixed_lengths=fixed_lengths), images, 3)
    decoder = Decoder(model, 3, fixed_lengths=fixed_lengths)
    for cache in decoder.blocks.cache:
        cache.normal_(std=1000)
    assert torch.equal(forced(decoder, images, 3), clean)


@pytest.mark.parametrize("fixed_lengths", [False, True])
@pytest.mark.parametrize("given", [0, 5])
def test_bfloat16_is_as_near_to_the_exact_logits_as_the_autocast_forward(model, given, fixed_lengths, forced):
    """Root mean square of the error against float64. The attention of a CPU rounds scores, which autocast's does not."""
    images = images_for(model, 3)
    exact = torch.from_numpy(plain_numpy(model, images.numpy(), None))
    with torch.no_grad(), autocast("bfloat16", CPU):
        theirs = model(images).float() - exact
    decoder = Decoder(model, 3, "bfloat16", fixed_lengths=fixed_lengths)
    ours = forced(decoder, images, given) - exact[:, given:]
    error = ours.square().mean().sqrt() / theirs[:, given:].square().mean().sqrt()
    assert 0.5 < error < 1.5
    assert ours.square().mean().sqrt() < 0.03 * exact.std()
    assert {cache.dtype for cache in decoder.blocks.cache} == {torch.bfloat16}


@pytest.mark.parametrize("fixed_lengths", [False, True])
def test_every_row_has_its_own_prefix(fixed_lengths, forced):
    """Equal prefixes side by side are computed once, and equal ones that are apart are not mixed up."""
    model = random_model()
    images = images_for(model, 7)
    images[[0, 1, 4], :6] = images[2, :6].clone()
    decoder = Decoder(model, 7, fixed_lengths=fixed_lengths)
    prefilled = []
    prefill = decoder.prefill
    decoder.prefill = lambda rows, pixels: (prefilled.append((rows.start, rows.stop)), prefill(rows, pixels))
    found = forced(decoder, images, 6)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images)[:, 6:], atol=1e-5, rtol=1e-5)
    assert prefilled == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]


def test_a_decoder_is_used_again_for_fewer_images_and_other_beginnings(forced):
    model = random_model()
    decoder = Decoder(model, 8)
    memory = [cache.data_ptr() for cache in decoder.blocks.cache]
    for n, given, seed in ((8, 0, 1), (8, 5, 2), (3, 9, 3), (5, 0, 4)):
        images = images_for(model, n, seed)
        assert torch.equal(forced(decoder, images, given), forced(Decoder(model, n), images, given))
    assert [cache.data_ptr() for cache in decoder.blocks.cache] == memory  # it is allocated once


def test_logits_can_be_looked_at():
    model = random_model()
    images = images_for(model, 8)
    decoder = Decoder(model, 8)
    decoder.inputs[:, 1:] = images
    found = torch.stack([decoder.logits(t) for t in range(16)], 1)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)


# Rows.


def assert_rows_are_the_same_in_any_batch(forced, model, precision, given, sizes) -> None:
    images = images_for(model, 33)
    together = forced(Decoder(model, 33, precision), images, given)
    for n in sizes:
        assert torch.equal(forced(Decoder(model, n, precision), images[:n], given), together[:n]), n
    backwards = forced(Decoder(model, 33, precision), images.flip(0), given)
    assert torch.equal(backwards.flip(0), together)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_embd", [16, 32, 128])
def test_on_a_cpu_logits_are_the_same_bit_for_bit_in_any_batch(n_embd, precision, forced):
    """That is how the kernels of today behave for rows in eights, on the processors that we tried; no one promises it."""
    assert_rows_are_the_same_in_any_batch(forced, random_model(n_embd=n_embd), precision, 4, (1, 2, 8, 9, 16))


def test_so_they_are_on_two_processors(two_threads, forced):
    """Few pixels, for two threads are slow where others want the processors, too."""
    assert_rows_are_the_same_in_any_batch(forced, random_model(), "float32", 13, (1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_embd", [16, 32, 128])
def test_so_they_are_on_two_processors_in_every_size(n_embd, precision, two_threads, forced):
    assert_rows_are_the_same_in_any_batch(forced, random_model(n_embd=n_embd), precision, 4, (1, 2, 8, 9, 16))


def test_on_a_cpu_rows_are_made_up_to_eights():
    model = random_model()
    assert [len(Decoder(model, n).inputs) for n in (1, 7, 8, 9)] == [8, 8, 8, 16]
    assert CPU_ROWS == 8


# Drawing.


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0), SamplingParams(0.8, 5, 0.9)], ids=str)
@pytest.mark.parametrize("fixed_lengths", [False, True])
@pytest.mark.parametrize("given", [0, 5])
def test_every_pixel_is_drawn_from_the_whole_models_logits(given, fixed_lengths, params):
    """Without a cache: each pixel in turn, from a forward pass over all that is there."""
    model = random_model()
    found, order = Decoder(model, 4, "float32", params, fixed_lengths).fill(images_for(model, 4), streams(4), given)
    uniforms = torch.from_numpy(np.stack([s.random(16) for s in streams(4)]))
    images = images_for(model, 4)
    with torch.no_grad():
        for t in range(given, 16):
            images[:, t] = draw(model(images)[:, t], uniforms[:, t], params)
    assert np.array_equal(found, images.numpy())
    assert (order == [0] * given + list(range(given + 1, 17))).all()
    assert order.shape == (4, 16)


@pytest.mark.parametrize("fixed_lengths", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_models_of_which_the_images_are_known(fixed_lengths, precision):
    def images_of(model, images, given):
        decoder = Decoder(model, len(images), precision, fixed_lengths=fixed_lengths)
        return decoder.fill(torch.as_tensor(images), streams(len(images)), given)[0]

    rng = np.random.default_rng(0)
    image = rng.integers(9, size=16)
    assert (images_of(painter(image, 9), np.zeros((3, 16), int), 0) == image).all()
    # It sees the pixel before, and sos before the first.
    assert (images_of(counter(7), np.zeros((2, 16), int), 0) == np.arange(16) % 7).all()
    begun = np.array([[4] * 16, [5] * 16, [6] * 16])
    assert images_of(counter(7), begun, 3)[:, 2:6].tolist() == [[4, 5, 6, 0], [5, 6, 0, 1], [6, 0, 1, 2]]
    # It sees what lies a row above, in the cache: some of it was given, some was drawn.
    begun = rng.integers(7, size=(5, 16))
    for given in (4, 6, 12):
        rows = images_of(copier(7), begun, given)
        whole = np.concatenate((begun[:, :given], np.zeros((5, 16 - given), int)), 1)
        for t in range(given, 16):
            whole[:, t] = whole[:, t - 4]
        assert np.array_equal(rows, whole)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_that_are_not_finite_are_named(precision):
    """Weights are finite, what comes of them is not; wherever in the image it happens."""
    model = random_model()
    with torch.no_grad():
        model.wtet.weight[3].fill_(3e38)
        model.ln_f.g.fill_(100)
    hint = "; try --precision float32" if precision == "bfloat16" else ""
    with pytest.raises(NonFiniteError, match=f"^the model's logits are NaN or infinite: its weights overflow{hint}$"):
        Decoder(model, 2, precision).fill(images_for(model, 2), streams(2), 0)


@pytest.mark.parametrize("at", [0, 7, 15])
def test_one_pixel_that_is_not_finite_is_enough(at):
    """Though those after it are."""
    model = random_model()
    decoder = Decoder(model, 1)
    finite = decoder._logits
    decoder._logits = lambda length: finite(length) + (torch.inf if length == at + 1 else 0.0)
    with pytest.raises(NonFiniteError):
        decoder.fill(images_for(model, 1), streams(1), 0)


def test_progress_is_told_every_32_pixels_and_at_the_end():
    model = random_model(resolution=12)
    told = []
    Decoder(model, 3).fill(images_for(model, 3), streams(3), 50, told.append)
    assert told == [96, 96, 90]
    assert sum(told) == 3 * (144 - 50)


def test_the_model_is_left_as_it_was():
    run = as_run(random_model())
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    Decoder(run.model, 2).fill(images_for(run.model, 2), streams(2), 3)
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in run.model.parameters())
