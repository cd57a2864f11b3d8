"""Probing on a GPU: the same classifiers as on a CPU, and all layers of igpt-s in seconds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from igpt_cli.errors import InputError
from igpt_cli.probing.knn import knn
from igpt_cli.probing.logistic import logistic
from igpt_cli.probing.sgd import RATES

C_GRID = tuple(10.0**k for k in range(-4, 3))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def features(n: int, dims: int = 64, classes: int = 10, seed: int = 0):
    rng, mix = np.random.default_rng(seed), np.random.default_rng(99)
    y = rng.integers(classes, size=n)
    latent = (2 * np.eye(classes, 16)[y] + 1.5 * rng.normal(size=(n, 16))).astype(np.float32)
    return np.maximum(latent @ mix.normal(size=(16, dims)).astype(np.float32), -1), y


@pytest.mark.parametrize("classes", [2, 10])
def test_logistic_regressions_equal_scikit_learns(classes):
    problems = [features(1000, 64, classes, seed) for seed in range(3)]
    x_test, y_test = features(2000, 64, classes, seed=9)
    grid = [1e-3, 0.1, 10.0]
    torch.set_float32_matmul_precision("high")  # as training does; the solver must not use TF32
    try:
        found = logistic(problems, grid, device="cuda")
    finally:
        assert torch.get_float32_matmul_precision() == "high"
        torch.set_float32_matmul_precision("highest")
    expected = logistic(problems, grid, engine="scikit-learn", tolerance=1e-8, max_iter=100_000)
    on_cpu = logistic(problems, grid, engine="torch")
    for here, there, cpu in zip(found, expected, on_cpu):
        for a, b, c in zip(here, there, cpu):
            assert a.converged
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
            assert a.loss == pytest.approx(c.loss, rel=1e-5)
            accuracies = [100 * np.mean(f.predict(x_test) == y_test) for f in (a, b)]
            assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1)


def test_few_rows_and_many_features():
    problems = [features(40, 512, 10, seed) for seed in range(20)]
    found = logistic(problems, C_GRID, device="cuda")
    on_cpu = logistic(problems, C_GRID, engine="torch")
    for here, there in zip(found, on_cpu):
        for a, b in zip(here, there):
            assert a.converged
            assert a.loss == pytest.approx(b.loss, rel=1e-4)


def test_all_layers_and_strengths_of_igpt_s_in_time():
    """25 layers, 7 values of C, 50,000 rows of 512 features: 20 s on an H200, features in memory."""
    x, y = features(50_000, 512)
    mix = np.random.default_rng(0)
    layers = [np.tanh(x * mix.uniform(0.01, 0.1)) for _ in range(25)]  # another curve for each layer
    logistic([(x[:1000], y[:1000])], [1.0], device="cuda")  # cuBLAS and cuSOLVER start
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    found = logistic([(layer, y) for layer in layers], C_GRID, device="cuda")
    seconds = time.monotonic() - started
    n_iter = [max(fits[i].n_iter for fits in found) for i in range(len(C_GRID))]
    print(f"\n25 x 7 regressions on {torch.cuda.get_device_name()}: {seconds:.1f} s, iterations {n_iter}, "
          f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")  # fmt: skip
    assert all(fit.converged for fits in found for fit in fits)
    if torch.cuda.get_device_capability() >= (9, 0):
        assert seconds < 20


def test_sgd_and_neighbours_equal_the_cpus():
    (x, y), (x_test, y_test) = features(2000), features(1000, seed=1)
    settings = {"solver": "sgd", "epochs": 5}
    (here,) = logistic([(x, y)], RATES, device="cuda", **settings)
    (there,) = logistic([(x, y)], RATES, **settings)
    for a, b in zip(here, there):
        assert a.converged == b.converged
        if b.converged:
            assert a.loss == pytest.approx(b.loss, rel=1e-3)
    a, b = knn(x, y, x_test, device="cuda"), knn(x, y, x_test)
    np.testing.assert_allclose(a.shares, b.shares, atol=1e-3)
    assert np.mean(a.predict() == y_test) == pytest.approx(np.mean(b.predict() == y_test), abs=0.002)


def test_what_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 20, 1 << 20))
    with pytest.raises(InputError, match=r"problem 0: .* GB on cuda.*use the solver sgd"):
        logistic([features(2000)], [1.0], device="cuda")
