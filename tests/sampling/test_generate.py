"""Samples and completions: known images, exact distributions, and images that do not depend on those beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_models import (
    as_run,
    assert_distributed,
    copier,
    counter,
    image_probabilities,
    painter,
    random_model,
)

from igpt_cli.errors import InputError, NonFiniteError
from igpt_cli.model_dir import ModelDir, load_model, write_model
from igpt_cli.sampling import generate
from igpt_cli.sampling.draw import SamplingParams
from igpt_cli.sampling.generate import complete, images_at_a_time, sample

LOWER_HALF = np.arange(16).reshape(4, 4) >= 8
BOX = np.isin(np.arange(16), [5, 6, 9, 10]).reshape(4, 4)


@pytest.fixture(scope="module")
def ar() -> ModelDir:
    return as_run(random_model())


@pytest.fixture(scope="module")
def bert() -> ModelDir:
    return as_run(random_model("bert"))


@pytest.fixture(params=["ar", "bert"])
def run(request, ar, bert) -> ModelDir:
    return {"ar": ar, "bert": bert}[request.param]


def images_for(run: ModelDir, n: int) -> np.ndarray:
    """(n, T) uint16, random colours."""
    T = run.config["model"]["resolution"] ** 2
    return np.random.default_rng(1).integers(run.palette.n_vocab, size=(n, T)).astype(np.uint16)


# Models of which the images are known.


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("resolution", [4, 6, 12])
def test_a_model_that_always_predicts_one_colour_gives_that_image(objective, resolution):
    run = as_run(painter(np.full(resolution**2, 5), 9, objective))
    drawn = sample(run, 3, seed=1)
    assert (drawn.tokens == 5).all()
    pixels = run.palette.dequantize(drawn.tokens)
    assert pixels.shape == (3, resolution**2, 3)
    assert (pixels == np.round(255 * 5 / 8)).all()


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0), SamplingParams(2.0, 4, 0.99)], ids=str)
def test_a_model_that_always_predicts_one_image_gives_it(objective, precision, params):
    image = np.random.default_rng(0).integers(9, size=36)
    run = as_run(painter(image, 9, objective))
    assert (sample(run, 3, precision=precision, params=params).tokens == image).all()
    missing = np.arange(36).reshape(6, 6) >= 13
    other = (image + 1) % 9
    completed = complete(run, other[None], missing, 2, precision=precision, params=params).tokens
    assert (completed == np.where(missing.reshape(-1), image, other)).all()


def test_an_autoregressive_model_goes_on_from_what_is_given():
    assert (sample(as_run(counter(7)), 2).tokens == np.arange(16) % 7).all()
    begun = np.array([[3] * 16, [4] * 16], np.uint16)
    completed = complete(as_run(counter(7)), begun, LOWER_HALF, 3).tokens
    assert (completed[0, :, 8:] == np.arange(4, 12) % 7).all()
    assert (completed[1, :, 8:] == np.arange(5, 13) % 7).all()
    run = as_run(copier(7))
    begun = images_for(run, 5)
    rows = complete(run, begun, np.arange(16).reshape(4, 4) >= 4, 2).tokens
    assert np.array_equal(rows, np.tile(begun[:, None, :4], (1, 2, 4)))


# Distributions.


def test_samples_are_distributed_as_the_softmax_says():
    """Chi-squared over all 81 images of 2 x 2 pixels and 3 colours, one false alarm in a million."""
    model = random_model(resolution=2, n_vocab=3)
    tokens = sample(as_run(model), 20_000, seed=1, batch_size=4096).tokens
    assert_distributed(np.ravel_multi_index(tokens.T, (3,) * 4), image_probabilities(model))


@pytest.mark.parametrize("params", [SamplingParams(0.5), SamplingParams(2.0)], ids=str)
def test_the_first_pixel_is_distributed_as_the_tempered_softmax(params):
    """Chi-squared, one false alarm in a million."""
    model = random_model(resolution=2, n_vocab=11)
    first = sample(as_run(model), 20_000, params=params, batch_size=4096).tokens[:, 0]
    with torch.no_grad():
        logits = model(torch.zeros(1, 4, dtype=torch.int64))[0, 0].double()
    assert_distributed(first, (logits / params.temperature).softmax(-1).numpy())
    with pytest.raises(AssertionError):
        assert_distributed(first, logits.softmax(-1).numpy())


def test_completions_are_distributed_as_the_softmax_after_what_is_given():
    """Chi-squared over all that can follow two given pixels, one false alarm in a million."""
    model = random_model(resolution=2, n_vocab=5)
    image, missing = np.array([[4, 1, 0, 0]]), np.array([[False, False], [True, True]])
    tokens = complete(as_run(model), image, missing, 20_000, seed=2, batch_size=4096).tokens[0]
    assert (tokens[:, :2] == [4, 1]).all()
    after = image_probabilities(model)[4, 1]
    assert_distributed(np.ravel_multi_index(tokens[:, 2:].T, (5, 5)), after)
    with pytest.raises(AssertionError):
        assert_distributed(np.ravel_multi_index(tokens[:, 2:].T, (5, 5)), image_probabilities(model)[1, 4])


def test_pixels_of_one_image_and_images_of_one_seed_are_independent():
    """Chi-squared over pairs, one false alarm in a million; a model without weights draws uniformly."""
    model = random_model(resolution=2, n_vocab=4)
    with torch.no_grad():
        model.wtet.weight.zero_()
    tokens = sample(as_run(model), 10_000, batch_size=4096).tokens.astype(int)
    uniform = np.full(16, 1 / 16)
    for a, b in ((tokens[:, 0], tokens[:, 1]), (tokens[:, 1], tokens[:, 3]), (tokens[0::2, 0], tokens[1::2, 0])):
        assert_distributed(4 * a + b, uniform)


# The same image, whatever is drawn with it.


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)])
def threads(request, monkeypatch):
    """On so many processors (two are slow where others want them, too); and a BERT model takes few rounds."""
    monkeypatch.setattr(generate, "ROUNDS", 3)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_images_in_batches_of_1_and_16(run, precision, threads):
    tokens = sample(run, 20, seed=7, precision=precision, batch_size=16).tokens
    for batch_size in (1, 3, 8, 20, None):
        assert np.array_equal(sample(run, 20, seed=7, precision=precision, batch_size=batch_size).tokens, tokens)
    assert np.array_equal(sample(run, 1, seed=7, precision=precision).tokens, tokens[:1])
    assert np.array_equal(sample(run, 7, seed=7, first=5, precision=precision).tokens, tokens[5:12])
    assert np.array_equal(sample(run, 1, seed=7, first=19, precision=precision, batch_size=16).tokens, tokens[19:])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_completions_are_the_same_whatever_else_is_completed(run, precision, threads):
    images = images_for(run, 6)
    images[3] = images[2]  # the same image twice has other completions
    every = complete(run, images, LOWER_HALF, 5, seed=3, precision=precision).tokens
    assert every.shape == (6, 5, 16)
    assert not np.array_equal(every[2], every[3])
    assert np.array_equal(complete(run, images, LOWER_HALF, 2, seed=3, precision=precision).tokens, every[:, :2])
    assert np.array_equal(complete(run, images[:1], LOWER_HALF, 5, seed=3, precision=precision).tokens, every[:1])
    others = images.copy()
    others[1:] = images[:0:-1]
    assert np.array_equal(complete(run, others, LOWER_HALF, 5, seed=3, precision=precision).tokens[0], every[0])
    for batch_size in (1, 4, 16, 100):
        again = complete(run, images, LOWER_HALF, 5, seed=3, precision=precision, batch_size=batch_size).tokens
        assert np.array_equal(again, every)


def test_a_sample_is_the_completion_of_nothing(run):
    everything = np.ones((4, 4), bool)
    completed = complete(run, images_for(run, 3), everything, 2, seed=4).tokens
    assert np.array_equal(completed[:, 0], sample(run, 3, seed=4).tokens)


def test_other_seeds_images_and_copies_are_different(run):
    even = SamplingParams(10.0)  # so that an image hardly ever comes twice by chance
    tokens = [sample(run, 20, seed=seed, params=even).tokens for seed in (0, 1, 2**64 - 1)]
    tokens += [sample(run, 20, first=first, params=even).tokens for first in (2**63, 2**63 + 20, 2**64 - 20)]
    tokens += [complete(run, images_for(run, 1), np.ones((4, 4), bool), 21, params=even).tokens[0, 1:]]
    assert len(np.unique(np.concatenate(tokens), axis=0)) == 140


@pytest.mark.slow
def test_float32_images_do_not_depend_on_the_number_of_threads(ar):
    before = torch.get_num_threads()
    one = sample(ar, 16).tokens
    try:
        torch.set_num_threads(2)
        assert np.array_equal(sample(ar, 16).tokens, one)
    finally:
        torch.set_num_threads(before)


# What is given, and what comes when.


def test_what_is_given_stays_and_the_order_is_told(ar, bert):
    images = images_for(ar, 3)
    drawn = complete(ar, images, LOWER_HALF, 4)
    assert (drawn.tokens[:, :, :8] == images[:, None, :8]).all()
    assert (drawn.order == [0] * 8 + list(range(9, 17))).all()
    drawn = complete(bert, images, BOX, 4, rounds=2)
    missing = BOX.reshape(-1)
    assert (drawn.tokens[..., ~missing] == images[:, None, ~missing]).all()
    assert (drawn.order[..., ~missing] == 0).all()
    assert (np.sort(drawn.order[..., missing]) == [1, 1, 2, 2]).all()  # 4 cos 45 degrees = 2.8 are left after one
    assert (np.sort(complete(bert, images, BOX, 1).order[..., missing]) == [1, 2, 3, 4]).all()
    assert (sample(ar, 2).order == np.arange(1, 17)).all()


def test_what_was_drawn_is_described(ar, bert):
    drawn = sample(ar, 3)
    assert (drawn.objective, drawn.precision, drawn.device, drawn.batch_size) == ("ar", "float32", "cpu", 32)
    assert drawn.rounds is None
    assert drawn.tokens.shape == drawn.order.shape == (3, 16)
    assert (drawn.tokens.dtype, drawn.order.dtype) == (np.uint16, np.int32)
    drawn = complete(bert, images_for(bert, 2), BOX, 3, batch_size=5, precision="bfloat16")
    assert (drawn.objective, drawn.precision, drawn.batch_size, drawn.rounds) == ("bert", "bfloat16", 5, 32)
    assert drawn.tokens.shape == drawn.order.shape == (2, 3, 16)
    assert (drawn.tokens.dtype, drawn.order.dtype) == (np.uint16, np.int32)
    assert sample(bert, 1, rounds=3).rounds == 3


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize(("resolution", "n_vocab"), [(4, 2), (6, 600), (12, 16)])
def test_size_and_palette_are_the_checkpoints_own(tmp_path, objective, resolution, n_vocab):
    made = as_run(random_model(objective, resolution=resolution, n_vocab=n_vocab))
    write_model(tmp_path / "run", made.model.state_dict(), made.palette, made.config)
    run = load_model(tmp_path / "run")
    drawn = sample(run, 2, rounds=3 if objective == "bert" else None)
    assert drawn.tokens.shape == (2, resolution**2)
    assert n_vocab // 2 <= drawn.tokens.max() < n_vocab
    keep = np.arange(resolution**2).reshape(resolution, resolution) >= resolution
    assert complete(run, drawn.tokens, keep).tokens.shape == (2, 1, resolution**2)
    assert np.array_equal(drawn.tokens, sample(made, 2, rounds=drawn.rounds).tokens)


def test_progress_rises_to_exactly_the_pixels_that_are_missing(ar, bert):
    wide = as_run(random_model(resolution=12))
    for run, k, missing, batch_size in (
        (ar, 3, LOWER_HALF, 4),
        (bert, 3, BOX, 2),
        (wide, 2, np.arange(144).reshape(12, 12) >= 50, 3),
    ):
        told = []
        images = images_for(run, 3)
        complete(run, images, missing, k, batch_size=batch_size, progress=lambda *now, told=told: told.append(now))
        done, totals = zip(*told)
        total = 3 * k * missing.sum()
        assert set(totals) == {total}
        assert (np.diff([0, *done]) > 0).all()
        assert done[-1] == total
        assert len(done) > 2


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "^n is 0; at least 1 image has to be drawn$"),
        ({"seed": -1}, r"^the seed is -1; it must be a whole number from 0 to 2\^64 - 1$"),
        ({"seed": 2**64}, "^the seed is 18446744073709551616; "),
        ({"first": -1}, r"^images -1 to 0 are asked for; their numbers are 0 to 2\^64 - 1$"),
        ({"first": 2**64 - 1}, "^images 18446744073709551615 to 18446744073709551616 are asked for"),
        ({"batch_size": 0}, "^the batch size is 0; it must be at least 1$"),
        ({"precision": "float16"}, "^precision is 'float16', expected one of auto, float32, bfloat16$"),
    ],
)
def test_values_out_of_range_are_refused(run, settings, message):
    with pytest.raises(InputError, match=message):
        sample(run, **{"n": 2, **settings})


def test_rounds_are_for_bert_models(ar, bert):
    with pytest.raises(InputError, match="^rounds are for BERT models; toy is autoregressive"):
        sample(ar, 1, rounds=3)
    with pytest.raises(InputError, match="^rounds is 0; it must be at least 1$"):
        sample(bert, 1, rounds=0)


@pytest.mark.parametrize(
    ("n", "missing", "k", "message"),
    [
        (2, LOWER_HALF, 0, "^k is 0; at least 1 completion has to be drawn$"),
        (0, LOWER_HALF, 1, "^there is nothing to complete: no image, or no pixel is missing$"),
        (2, np.zeros((4, 4), bool), 1, "^there is nothing to complete"),
        (2, np.ones((5, 5), bool), 1, r"^tokens \(2, 16\) and missing \(5, 5\) do not fit images of 16 pixels$"),
    ],
)
def test_what_cannot_be_completed_is_refused(run, n, missing, k, message):
    with pytest.raises(InputError, match=message):
        complete(run, images_for(run, n), missing, k)


def test_images_of_another_shape_or_palette_are_refused(run):
    images = images_for(run, 2)
    for wrong in (images[0], images[:, :9], images.reshape(2, 4, 4)):
        with pytest.raises(InputError, match="do not fit images of 16 pixels$"):
            complete(run, wrong, LOWER_HALF)
    for wrong in (images / 2, images.astype(int) - 11, images + 11):
        with pytest.raises(InputError, match="^tokens have to be whole numbers from 0 to 10, colours of the model's"):
            complete(run, wrong, LOWER_HALF)
    for unseen in (-1, 11, 2**40):  # where a pixel is missing, anything may stand
        strange = np.where(LOWER_HALF.reshape(-1), unseen, images.astype(int))
        assert np.array_equal(complete(run, strange, LOWER_HALF).tokens, complete(run, images, LOWER_HALF).tokens)


@pytest.mark.parametrize("missing", [BOX, ~LOWER_HALF, np.arange(16).reshape(4, 4) == 14], ids=["box", "upper", "one"])
def test_an_autoregressive_model_refuses_what_it_cannot_see(ar, missing):
    message = (
        "^toy is autoregressive: it sees only what lies before a pixel in raster order, so the beginning of the image "
        r"must be kept and nothing behind it \(--keep\); a BERT model completes any part$"
    )
    with pytest.raises(InputError, match=message):
        complete(ar, images_for(ar, 1), missing)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_weights_that_overflow_are_named(objective):
    model = random_model(objective)
    with torch.no_grad():
        model.wtet.weight[3].fill_(3e38)
        model.ln_f.g.fill_(100)
    run = as_run(model)
    with pytest.raises(NonFiniteError, match="NaN or infinite: its weights overflow$"):
        sample(run, 2)
    with pytest.raises(NonFiniteError, match="overflow; try --precision float32$"):
        complete(run, images_for(run, 2), LOWER_HALF, precision="bfloat16", params=SamplingParams(0))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_memory_that_does_not_suffice_is_said_with_what_to_do(run, error, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(generate, "Decoder", full)
    monkeypatch.setattr(generate, "unmask", full)
    with pytest.raises(MemoryError, match="^12 images at a time do not fit on cpu; give a lower --batch-size$"):
        sample(run, 20, batch_size=12)


def test_other_errors_are_not_taken_for_a_lack_of_memory(run, monkeypatch):
    def broken(*name):
        raise RuntimeError("another mistake")

    monkeypatch.setattr(generate, "stream", broken)
    with pytest.raises(RuntimeError, match="another mistake"):
        sample(run, 1)


# How many at a time.


def test_how_many_are_drawn_at_a_time(ar, bert, monkeypatch):
    assert images_at_a_time(ar, "float32") == 32
    assert images_at_a_time(bert, "float32") == 1
    each = 2 * 2 * 16 * 16 * 4  # keys and values, layers, width, pixels, bytes
    monkeypatch.setattr(generate, "CPU_CACHE", 5 * each)
    assert images_at_a_time(ar, "float32") == 5
    assert images_at_a_time(ar, "bfloat16") == 10
    monkeypatch.setattr(generate, "CPU_CACHE", 1)
    assert images_at_a_time(ar, "float32") == 1
    assert sample(ar, 2).batch_size == 1


@pytest.mark.parametrize("resolution", [48, 64])
def test_a_large_model_takes_no_more_of_a_cpus_memory_than_is_allowed(resolution):
    """iGPT-L of 64 x 64 pixels: 48 layers of width 1536 keep 2.4 GB an image."""
    run = as_run(random_model())
    model = {**run.config["model"], "n_layer": 48, "n_embd": 1536, "resolution": resolution}
    large = ModelDir(run.path, run.model, run.palette, {**run.config, "model": model})
    each = 2 * 48 * 1536 * resolution**2 * 4
    found = images_at_a_time(large, "float32")
    assert found * each <= generate.CPU_CACHE < (found + 1) * each
