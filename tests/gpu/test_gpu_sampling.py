"""Drawing on a GPU: what CUDA graphs give is what eager steps and the whole model give, and memory comes back."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from sampling_models import as_run, random_model

from igpt_cli.bench.sample import bench_sample
from igpt_cli.device import autocast
from igpt_cli.errors import NonFiniteError
from igpt_cli.models.igpt import IGPT
from igpt_cli.sampling.decoder import BUCKET, Decoder
from igpt_cli.sampling.draw import SamplingParams, draw, stream
from igpt_cli.sampling.generate import GPU_IMAGES, complete, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
PRECISIONS = ["float32", "bfloat16"]
#: 24 x 24 pixels are four buckets and a half; heads are 16 and 96 wide, as narrow as toys and as wide as igpt-l's.
MODELS = {"24x24": {"resolution": 24, "n_embd": 64, "n_head": 4}, "12x12": {"resolution": 12, "n_embd": 192}}


def made(**sizes) -> IGPT:
    return random_model(**{"n_vocab": 64, **sizes}).to(CUDA)


@pytest.fixture(params=MODELS)
def model(request) -> IGPT:
    return made(**MODELS[request.param])


def images_for(model: IGPT, n: int = 6) -> torch.Tensor:
    """(n, T) int64 on the GPU."""
    c, generator = model.config, torch.Generator().manual_seed(1)
    return torch.randint(c.n_vocab, (n, c.n_ctx), generator=generator).to(CUDA)


def forced(decoder: Decoder, images: torch.Tensor, given: int = 0) -> torch.Tensor:
    """What the pixels of these images are drawn from, from `given` on: (n, T - given, V)."""
    for row in range(len(images) if given else 0):
        decoder.prefill(slice(row, row + 1), images[row, :given])
    decoder.inputs[: len(images), 1:] = images
    return torch.stack([decoder.logits(t)[: len(images)] for t in range(given, images.shape[1])], 1)


@torch.no_grad()
def whole(model: IGPT, images: torch.Tensor, precision: str) -> torch.Tensor:
    with autocast(precision, CUDA):
        return model(images).float()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("given", [0, 1, 100])
@pytest.mark.parametrize("fixed_lengths", [True, False])
def test_cached_logits_equal_the_whole_models(model, precision, given, fixed_lengths):
    """Every length is met, most of them no multiple of anything.

    In float32 the error's norm is below 3e-5 of that of the logits, since kernels sum in other orders. In bfloat16 the
    logits are at most twice as far from those in float32 as the whole model's are under autocast.
    """
    images = images_for(model)
    decoder = Decoder(model, len(images), precision, fixed_lengths=fixed_lengths)
    found = forced(decoder, images, given)
    assert found.dtype == torch.float32
    exact = whole(model, images, "float32")[:, given:]
    tolerance = 3e-5 if precision == "float32" else 2 * error(whole(model, images, precision)[:, given:], exact)
    assert error(found, exact) < tolerance < 0.2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0), SamplingParams(0.8, 40, 0.9)], ids=str)
def test_graphs_draw_what_eager_steps_would_draw(model, precision, params):
    """Each pixel that graphs drew is the one that eager logits and the same random number give.

    The exceptions are random numbers within rounding of the border between two colours.
    """
    n, T = 6, model.config.n_ctx
    graphs, eager = (Decoder(model, n, precision, params, fixed_lengths=fixed) for fixed in (True, False))
    graphs.uniforms.uniform_(generator=torch.Generator(CUDA).manual_seed(2))
    for t in range(T):
        graphs.draw(t)
    assert len(graphs.graphs) == -(-T // BUCKET)
    assert not eager.graphs
    images = graphs.inputs[:, 1:].clone()
    assert len(images.unique()) > 5
    logits = forced(eager, images)
    again = torch.stack([draw(logits[:, t], graphs.uniforms[:, t], params) for t in range(T)], 1)
    assert (again == images).float().mean().item() > {"float32": 0.999, "bfloat16": 0.9}[precision]


def test_eager_steps_and_graphs_give_the_same_images(model):
    """In float32; an image is another where one of its random numbers lies within rounding of a border."""
    drawn = []
    for fixed_lengths in (True, False):
        decoder = Decoder(model, 8, fixed_lengths=fixed_lengths)
        blank = torch.zeros(8, model.config.n_ctx, dtype=torch.int64)
        drawn.append(decoder.fill(blank, [stream(0, image, 0) for image in range(8)], 0)[0])
    assert (drawn[0] == drawn[1]).all(1).sum() >= 7


def test_graphs_serve_one_batch_after_the_other(model):
    """The buckets' graphs share their memory; the second batch begins with the first graph after the last one."""
    decoder = Decoder(model, 4)
    blank, drawn = torch.zeros(4, model.config.n_ctx, dtype=torch.int64), []
    for seed in (1, 2, 1):
        drawn.append(decoder.fill(blank, [stream(seed, image, 0) for image in range(4)], 0)[0].copy())
    assert np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_image_does_not_depend_on_how_many_are_drawn(precision):
    run = as_run(made(resolution=12))
    alone = sample(run, 1, first=3, precision=precision)
    many = sample(run, GPU_IMAGES + 6, precision=precision)
    assert (alone.batch_size, alone.device) == (GPU_IMAGES, "cuda:0")
    assert np.array_equal(alone.tokens[0], many.tokens[3])
    assert np.array_equal(sample(run, 1, first=GPU_IMAGES + 2, precision=precision).tokens[0], many.tokens[-4])


def test_completions_keep_what_is_given_and_do_not_depend_on_others():
    run = as_run(made(resolution=12))
    images = images_for(run.model).cpu().numpy()
    missing = np.arange(144).reshape(12, 12) >= 60
    both = complete(run, images, missing, 3).tokens
    assert (both[:, :, :60] == images[:, None, :60]).all()
    assert len({tuple(image) for image in both[0]}) == 3
    assert np.array_equal(complete(run, images[:1], missing, 1).tokens[0, 0], both[0, 0])


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_a_gpu_draws_the_images_of_a_cpu(objective):
    """In float32, but for random numbers within rounding of a border."""
    drawn = []
    for device in ("cpu", "cuda"):
        run = as_run(random_model(objective, resolution=8).to(device))
        drawn.append(sample(run, 8, seed=5, batch_size=8).tokens)
    assert (drawn[0] == drawn[1]).all(1).sum() >= 7


def test_nothing_in_a_step_waits_for_the_gpu(model):
    decoder = Decoder(model, 4, "bfloat16", SamplingParams(0.9, 30, 0.95))
    T = model.config.n_ctx
    for t in range(T):
        decoder.draw(t)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for t in range(T):
            decoder.draw(t)
        decoder.fixed_lengths = False
        decoder.draw(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_comes_back():
    """cuBLAS keeps a workspace for each stream that it has seen, so what is left after one batch is the most there is."""
    run = as_run(made(resolution=24, n_embd=64))
    left = []
    for _ in range(3):
        sample(run, 4, batch_size=4)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        left.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert left[2][0] == left[0][0]
    assert left[2][1] <= left[0][1] + 2**21


def test_what_does_not_fit_is_said():
    run = as_run(made(resolution=32, n_embd=256, n_layer=8))
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2e9 / total))
    try:
        with pytest.raises(MemoryError, match="512 images at a time do not fit on cuda.*give a lower --batch-size"):
            sample(run, 1, batch_size=512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_weights_that_overflow_are_named():
    model = made()
    with torch.no_grad():
        model.wtet.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError):
        sample(as_run(model), 2, batch_size=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bench_measures_both_with_their_memory(precision):
    pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2}
    ours, theirs = bench_sample(
        sizes=sizes, resolution=8, batch_size=4, repeats=2, precision=precision, against=["transformers"], device="cuda"
    )
    for row in (ours, theirs):
        assert (row.failed, row.pixels, row.precision) == (None, 64, precision)
        assert row.images_per_second > 0
        assert row.memory > 10**5
    assert ours.first_seconds > ours.ms_per_step * 64 / 1000  # graphs are recorded
    assert theirs.ratio > 0
