"""Features on a GPU: what comes back while the next batch is computed is what belongs to each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from igpt_cli.bench.probe import bench_features
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.probing.features import Frozen, Masking, extract

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def made(objective: str = "ar") -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(model_config("igpt-tiny", objective=objective, resolution=8, n_vocab=16))


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_many_batches_equal_the_cpus(objective):
    model, masking = made(objective), Masking(3, 0.3, 1) if objective == "bert" else None
    tokens = np.random.default_rng(0).integers(16, size=(333, 64)).astype(np.uint16)
    sha256 = Frozen(model).sha256
    expected = extract(model, tokens, [0, 11, 24], masking=masking)
    model.cuda()
    assert Frozen(model).sha256 == sha256
    for size in (7, 64, None):
        for layer, found in extract(model, tokens, [0, 11, 24], batch_size=size, masking=masking).items():
            np.testing.assert_allclose(found, expected[layer], atol=1e-3)


def test_means_are_float32_where_products_are_bfloat16():
    model = made().cuda()
    tokens = np.random.default_rng(0).integers(16, size=(33, 64)).astype(np.uint16)
    means, whole = (
        extract(model, tokens, [0, 11, 24], pool=pool, precision="bfloat16", batch_size=11) for pool in ("mean", "none")
    )
    for layer, values in means.items():
        np.testing.assert_allclose(values, whole[layer].mean(1, dtype=np.float64), rtol=1e-4, atol=1e-5)


def test_a_batch_that_does_not_fit_is_told():
    tokens = np.zeros((20_000, 1024), np.uint16)
    with pytest.raises(MemoryError, match="20000 images at a time do not fit on cuda:0; give a lower --batch-size"):
        extract(build_model(model_config("igpt-l")).cuda(), tokens, [48], batch_size=20_000)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_layers_cost_little_more_than_the_deepest(precision):
    _, every = bench_features("igpt-s", device="cuda", precision=precision)
    assert every.ratio <= 1.2
