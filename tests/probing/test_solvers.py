"""Solvers of the linear probe, all asked against scikit-learn: L-BFGS in torch, SGD, nearest neighbours."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest
import torch

from igpt_cli.errors import InputError
from igpt_cli.probing import batched, knn, lbfgs, linear, logistic, sgd
from igpt_cli.statistics import wilson

CPU = torch.device("cpu")
C_GRID = tuple(10.0**k for k in range(-4, 3))


def features(n: int, dims: int = 12, classes: int = 4, seed: int = 0, noise: float = 1.5):
    """Correlated, rectified, of many scales and far from zero, as a network's are; classes overlap."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99)
    y = rng.integers(classes, size=n)
    latent = 2 * np.eye(classes, 16)[y] + noise * rng.normal(size=(n, 16))
    x = np.maximum(latent @ mix.normal(size=(16, dims)), -1) * 10.0 ** mix.uniform(-2, 2, dims) + 3
    return x.astype(np.float32), y


def fit(problems, grid=C_GRID, engine="torch", **more):
    return logistic.logistic(problems, grid, engine=engine, **more)


def optimum(x, y, grid=C_GRID):
    """scikit-learn, much further than it goes by itself."""
    return logistic.logistic([(x, y)], grid, engine="scikit-learn", tolerance=1e-9, max_iter=100_000)[0]


def agree(a: linear.Linear, b: linear.Linear, x, loss=1e-6, probability=1e-2):
    assert a.loss == pytest.approx(b.loss, rel=loss)
    assert (a.C, a.classes.tolist()) == (b.C, b.classes.tolist())
    np.testing.assert_allclose(np.exp(a.log_proba(x)), np.exp(b.log_proba(x)), atol=probability)


# L-BFGS against scikit-learn


def awkward(case: str):
    x, y = features(200, 12)
    if case == "two classes":
        y = y % 2
    elif case == "other labels":
        y = np.array([40, -3, 7, 1000])[y]
    elif case == "fewer rows than features":
        x, y = features(30, 80)
    elif case == "the same rows thrice":
        x, y = np.tile(x[:60], (3, 1)), np.tile(y[:60], 3)
    elif case == "a constant feature":
        x[:, 3] = np.float32(0.1)
    elif case == "the same feature twice":
        x[:, 3] = x[:, 4]
    elif case == "rare classes":
        y = np.where(np.arange(len(y)) < 195, 0, y)
    elif case == "separable":
        x, y = features(200, 12, noise=0.05)
    return x, y


CASES = ["plain", "two classes", "other labels", "fewer rows than features", "the same rows thrice"]
CASES += ["a constant feature", "the same feature twice", "rare classes", "separable"]


@pytest.mark.parametrize("case", CASES)
def test_torch_finds_scikit_learns_optimum(case):
    x, y = awkward(case)
    (found,) = fit([(x, y)])
    for a, b in zip(found, optimum(x, y)):
        assert a.converged
        agree(a, b, x, loss=2e-5, probability=1e-3)


def test_the_optimum_is_what_plain_scikit_learn_finds():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    for classes in (2, 4):
        x, y = features(200, classes=classes)
        scaler = StandardScaler().fit(x.astype(np.float64))
        plain = LogisticRegression(C=0.3, tol=1e-9, max_iter=10_000).fit(scaler.transform(x), y)
        for engine in ("torch", "scikit-learn"):
            ((found,),) = fit([(x, y)], [0.3], engine, tolerance=1e-9)
            expected = plain.predict_proba(scaler.transform(x))
            np.testing.assert_allclose(np.exp(found.log_proba(x)), expected, atol=1e-3)
            assert found.log_proba(x).dtype == np.float64
            assert (found.predict(x) == plain.predict(scaler.transform(x))).all()


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_two_classes_by_hand(engine):
    """Two rows, at -1 and +1 once standardised: 2 C log(1 + exp(-v)) + v^2 / 2 is least where v = 2 C / (1 + exp(v));
    with C = (1 + e) / 2 that is v = 1."""
    C = (1 + math.e) / 2
    ((found,),) = fit([(np.array([[3.0], [7.0]], np.float32), [0, 1])], [C], engine, tolerance=1e-9)
    assert (found.mean, found.std) == (5, 2)
    np.testing.assert_allclose(found.weight, [[-0.5], [0.5]], atol=1e-4)
    np.testing.assert_allclose(found.bias, [0, 0], atol=1e-6)
    assert found.loss == pytest.approx(math.log(1 + math.exp(-1)) + 1 / (4 * C), rel=1e-6)
    # Half a deviation to the right: log(1 / (1 + exp(-1/2))).
    assert found.log_proba(np.array([[6.0]]))[0, 1] == pytest.approx(-math.log(1 + math.exp(-0.5)), abs=1e-4)


def test_accuracy_on_features_like_a_networks():
    (x, y), (x_test, y_test) = features(2000, 64, 10), features(2000, 64, 10, seed=1)
    (found,) = fit([(x, y)])
    for a, b in zip(found, optimum(x, y)):
        agree(a, b, x_test)
        accuracies = [100 * np.mean(f.predict(x_test) == y_test) for f in (a, b)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1)
        assert 20 < accuracies[0] < 90


def pictures(n: int, side: int, n_test: int):
    """Colours (n, 3 side^2) of smooth images with a blob in one of ten places, and the place: neighbouring pixels and
    the three colours are nearly the same, as in photographs, which is what makes plain L-BFGS slow."""
    rng = np.random.default_rng(4)
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) + 1 / side
    noise = np.fft.fft2(rng.normal(size=(n + n_test, 3, side, side))) / k**1.5
    grey = np.fft.fft2(rng.normal(size=(n + n_test, 1, side, side))) / k**1.5
    smooth = np.fft.ifft2(0.15 * noise + grey).real
    smooth /= smooth.std()
    y = rng.integers(10, size=n + n_test)
    places = np.random.default_rng(1).uniform(0, side, (10, 2))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1)
    blobs = np.exp(-np.square(grid[None] - places[:, None, None]).sum(-1) / side)
    x = (smooth + 0.8 * blobs[y][:, None]).reshape(len(y), -1).astype(np.float32)
    return (x[:n], y[:n]), (x[n:], y[n:])


def assert_engines_agree(train, test):
    """What the protocol promises at every value of C: losses to 1e-4, accuracy to 0.1 point."""
    (ours,), (theirs,) = logistic.logistic([train], C_GRID), logistic.logistic([train], C_GRID, engine="scikit-learn")
    for a, b in zip(ours, theirs):
        assert a.converged
        assert b.converged
        assert a.loss == pytest.approx(b.loss, rel=1e-4), a.C
        accuracies = [100 * np.mean(f.predict(test[0]) == test[1]) for f in (a, b)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1), a.C
    return ours, theirs


def test_the_engines_agree_at_every_C_on_correlated_features():
    ours, theirs = assert_engines_agree(*pictures(800, 4, 1000))
    assert ours[-1].n_iter < theirs[-1].n_iter / 5  # why it is ours that is used


@pytest.mark.parametrize("classes", [2, 10])
def test_the_engines_agree_at_every_C_where_few_rows_are_separable(classes):
    x, y = features(60, 40, classes, noise=0.1)
    ours, _ = assert_engines_agree((x, y), features(300, 40, classes, seed=1, noise=0.1))
    assert (ours[-1].predict(x) == y).all()


@pytest.mark.slow
def test_the_engines_agree_on_thousands_of_pictures():
    assert_engines_agree(*pictures(5000, 8, 5000))


# Laws


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_problems_of_many_shapes_are_solved_together_as_alone(engine):
    problems = [features(n, d, k, seed) for seed, (n, d, k) in enumerate([(90, 5, 3), (90, 5, 3), (80, 7, 2)] * 2)]
    grids = [[1.0, 0.01], [100.0, 0.1], [1e-3]] * 2
    said = []
    together = fit(problems, grids, engine, tolerance=1e-8, progress=lambda *done: said.append(done))
    assert said[-1] == (10, 10)
    assert sorted(said) == said
    for problem, grid, found in zip(problems, grids, together):
        assert [f.C for f in found] == grid
        for C, a in zip(grid, found):
            ((b,),) = fit([problem], [C], engine, tolerance=1e-8)
            agree(a, b, problem[0], loss=1e-6, probability=1e-3)


def test_groups_that_fit_into_memory_change_nothing():
    problems = [linear.check_problem(*features(70, 5, 3, seed), "p") for seed in range(3)]
    for size in (1, 2, 3):
        budget = size * batched.problem_bytes(70, 5, 3, 2)
        found = batched.solve(problems, [[0.1, 1.0]] * 3, CPU, budget=budget)
        if size == 1:
            first = found
        for a, b, p in zip(first, found, problems):
            agree(a[0], b[0], p.x, probability=1e-4)
            agree(a[1], b[1], p.x, probability=1e-4)


def test_rows_are_summed_in_parts(monkeypatch):
    x, y = features(700)
    (whole,) = fit([(x, y)])
    monkeypatch.setattr(batched, "CHUNK_BYTES", 1)
    monkeypatch.setattr(batched, "ROWS", 100)
    monkeypatch.setattr(linear, "ROWS", 90)
    (parts,) = fit([(x, y)])
    for a, b in zip(whole, parts):
        agree(a, b, x, probability=1e-3)


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_units_order_and_names_do_not_matter(engine):
    x, y = features(150)
    rng = np.random.default_rng(0)
    grid = [0.01, 1.0]
    (plain,) = fit([(x, y)], grid, engine, tolerance=1e-8)
    scale, shift = 2.0 ** rng.integers(-8, 8, x.shape[1]), 1.0
    (scaled,) = fit([((x - 3) * scale + shift * scale, y)], grid, engine, tolerance=1e-8)
    order = rng.permutation(len(x))
    (shuffled,) = fit([(x[order], y[order])], grid, engine, tolerance=1e-8)
    names = np.array([5, 2, 9, 3])
    (renamed,) = fit([(x, names[y])], grid, engine, tolerance=1e-8)
    for i in range(len(grid)):
        p = np.exp(plain[i].log_proba(x))
        np.testing.assert_allclose(np.exp(scaled[i].log_proba((x - 3) * scale + shift * scale)), p, atol=1e-3)
        np.testing.assert_allclose(np.exp(shuffled[i].log_proba(x)), p, atol=1e-3)
        np.testing.assert_allclose(np.exp(renamed[i].log_proba(x))[:, np.argsort(np.argsort(names))], p, atol=1e-3)


def test_the_same_twice_is_the_same():
    x, y = features(150)
    a, b = fit([(x, y)])[0], fit([(x, y)])[0]
    assert all((f.weight == g.weight).all() and f.loss == g.loss for f, g in zip(a, b))


def test_features_are_read_from_a_file(tmp_path):
    x, y = features(150)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        stored = file.create_dataset("x", data=x)
        for engine in ("torch", "scikit-learn"):
            for a, b in zip(fit([(x, y)], engine=engine)[0], fit([(stored, y)], engine=engine)[0]):
                assert (a.weight == b.weight).all()
        (a,), (b,) = (logistic.logistic([(z, y)], [1.0], solver="sgd", epochs=2)[0] for z in (x, stored))
        assert (a.weight == b.weight).all()
        assert (knn.knn(stored, y, stored).shares == knn.knn(x, y, x).shares).all()
        x.flags.writeable = False
        fit([(x, y)], [1.0])


def test_wide_features_are_solved_without_whitening(monkeypatch):
    monkeypatch.setattr(batched, "WHITEN_UP_TO", 11)
    x, y = features(150)
    (found,) = fit([(x, y)], [1e-3, 0.1])
    for a, b in zip(found, optimum(x, y, [1e-3, 0.1])):
        assert a.converged
        agree(a, b, x)


def test_few_rows_of_wide_features_are_solved_in_the_rows_span(monkeypatch):
    """With no more directions than rows, however wide; those that equal rows leave over are none."""
    monkeypatch.setattr(batched, "WHITEN_UP_TO", 40)
    for x, y in (features(30, 80), (np.tile(features(15, 80)[0], (2, 1)), np.tile(features(15, 80)[1], 2))):
        z = torch.from_numpy((x - x.mean(0)) / x.std(0))[None]
        spectrum, basis, inside = batched._spanned(z)
        rank = int((basis.norm(dim=1) > 0).sum())
        assert rank == np.linalg.matrix_rank(z[0].numpy())
        torch.testing.assert_close(basis[0].T @ basis[0], torch.diag((spectrum[0] > 1e-6).double()), rtol=0, atol=1e-6)
        torch.testing.assert_close(inside.double() @ basis.mT, z.double(), rtol=0, atol=1e-4)
        (found,) = fit([(x, y)])
        for a, b in zip(found, optimum(x, y)):
            assert a.converged
            agree(a, b, x, loss=2e-5, probability=1e-3)


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_a_fit_that_needs_longer_says_so(engine):
    x, y = features(200, noise=0.05)
    ((found,),) = fit([(x, y)], [1e6], engine, max_iter=3, tolerance=1e-9)
    assert not found.converged
    assert found.n_iter == 3
    ((found,),) = fit([(x, y)], [0.01], engine)
    assert found.converged


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_the_loss_is_the_objective_at_the_weights(engine):
    for classes in (2, 4):
        x, y = features(150, classes=classes)
        for found in fit([(x, y)], engine=engine)[0]:
            log_loss = -found.log_proba(x)[np.arange(len(y)), y].mean()
            weight = found.weight[1:] - found.weight[:1] if classes == 2 else found.weight
            assert found.loss == pytest.approx(log_loss + np.square(weight).sum() / (2 * found.C * len(y)), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_features_as_they_are_are_what_scikit_learn_has_without_a_scaler(classes):
    """Means are taken off all the same; biases, which are not penalised, make up for them."""
    from sklearn.linear_model import LogisticRegression

    x, y = features(200)
    x, y = x / x.std(0).mean() + 5, y % classes
    grid = [1e-3, 0.1, 10.0]
    (found,) = fit([(x, y)], grid, standardise=False)
    (other,) = fit([(x, y)], grid)
    (theirs,) = fit([(x, y)], grid, "scikit-learn", standardise=False, tolerance=1e-9, max_iter=100_000)
    for a, b, c in zip(found, theirs, other):
        plain = LogisticRegression(C=a.C, tol=1e-9, max_iter=100_000).fit(x.astype(np.float64), y)
        np.testing.assert_allclose(np.exp(a.log_proba(x)), plain.predict_proba(x), atol=1e-3)
        np.testing.assert_allclose(np.exp(b.log_proba(x)), plain.predict_proba(x), atol=1e-3)
        assert np.abs(np.exp(c.log_proba(x)) - plain.predict_proba(x)).max() > 0.01
        assert a.loss == pytest.approx(b.loss, rel=2e-5)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_gradient_equals_autograd(n_classes):
    torch.manual_seed(0)
    B, N, D, c = 2, 40, 6, 3
    x, index = torch.randn(B, N, D), torch.randint(n_classes, (B, N))
    C = torch.rand(B, c, dtype=torch.float64) + 0.1
    regressions = batched.Regressions(x.clone(), index, n_classes, C)
    v = torch.randn_like(regressions.start()).requires_grad_()
    weight, bias = regressions.weights(v)
    log_p = (torch.einsum("bnd,bcdk->bcnk", x.double(), weight) + bias[:, :, None]).log_softmax(-1)
    loss = -log_p.gather(-1, index[:, None, :, None].expand(B, c, N, 1)).mean((2, 3))
    penalty = (2 if n_classes == 2 else 1) * weight.square().sum((2, 3)) / (2 * C * N)
    expected = (loss + penalty).view(-1)
    expected.sum().backward()
    with torch.no_grad():
        value, gradient = regressions(v, torch.arange(B * c))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, v.grad, rtol=1e-4, atol=1e-6)
        for some in ([0, 3], [4], [1, 2, 5]):  # problems that share values of C, and that do not
            value, gradient = regressions(v[some], torch.tensor(some))
            torch.testing.assert_close(value, expected[some], rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient, v.grad[some], rtol=1e-4, atol=1e-6)


# The minimiser itself


def rosenbrock(x, _):
    a, b = x[:, 0], x[:, 1]
    value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
    return value, torch.stack((-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2)), 1)


def small(_, gradient):
    return gradient.abs().amax(1) < 1e-8


def test_lbfgs_finds_the_end_of_the_curved_valley():
    start = torch.tensor([[-1.2, 1.0], [1.0, 1.0], [5.0, -3.0], [0.0, 30.0]], dtype=torch.float64)
    found = lbfgs.minimise(rosenbrock, start, small)
    assert found.converged.all()
    torch.testing.assert_close(found.x, torch.ones_like(start), atol=1e-7, rtol=0)
    assert found.n_iter[1] == 0  # it began at the minimum
    for i in range(len(start)):
        alone = lbfgs.minimise(rosenbrock, start[i : i + 1], small)
        assert torch.equal(alone.x[0], found.x[i])
        assert alone.n_iter[0] == found.n_iter[i]


def test_lbfgs_takes_about_as_many_steps_as_scipys():
    from scipy.optimize import minimize

    def bowl(x, _):
        scale = 10.0 ** torch.linspace(0, 3, 30, dtype=torch.float64)
        return (scale * (x - 1).square()).sum(1), 2 * scale * (x - 1)

    for fun, start in ((rosenbrock, [-1.2, 1.0]), (bowl, [0.0] * 30)):
        start = torch.tensor([start], dtype=torch.float64)
        found = lbfgs.minimise(fun, start, small)
        theirs = minimize(
            lambda v, fun=fun: fun(torch.from_numpy(v)[None], None)[0].item(), start[0].numpy(), method="L-BFGS-B",
            jac=lambda v, fun=fun: fun(torch.from_numpy(v)[None], None)[1][0].numpy(), options={"gtol": 1e-8, "ftol": 0},
        )  # fmt: skip
        assert found.converged.all()
        assert found.n_iter[0] < 1.3 * theirs.nit, (found.n_iter[0], theirs.nit)


def test_lbfgs_bears_steps_into_infinity():
    """exp(50 x) + exp(-x): a whole step along the gradient overflows."""

    def wall(x, _):
        up, down = (50 * x).exp(), (-x).exp()
        return (up + down).sum(1), 50 * up - down

    found = lbfgs.minimise(wall, torch.tensor([[1.0], [-40.0]], dtype=torch.float64), small)
    torch.testing.assert_close(found.x, torch.full((2, 1), -math.log(50) / 51, dtype=torch.float64), atol=1e-8, rtol=0)


def test_lbfgs_leaves_finished_problems_alone_and_ends_where_nothing_goes_down():
    asked = []

    def bowls(x, which):
        asked.append(which.tolist())
        scale = torch.tensor([[1.0, 1.0], [1.0, 1e4]], dtype=torch.float64)[which]
        return (scale * (x - 1).square()).sum(1), 2 * scale * (x - 1)

    found = lbfgs.minimise(bowls, torch.zeros(2, 2, dtype=torch.float64), small)
    assert found.converged.all()
    assert found.n_iter[0] < found.n_iter[1]
    assert asked[0] == [0, 1]
    assert asked[-1] == [1]
    assert len(asked) == found.evaluations
    torch.testing.assert_close(found.x, torch.ones(2, 2, dtype=torch.float64), atol=1e-8, rtol=0)

    def wrong(x, _):
        return x.sum(1), -torch.ones_like(x)  # the slope is a lie

    found = lbfgs.minimise(wrong, torch.zeros(1, 2, dtype=torch.float64), small)
    assert not found.converged.any()
    assert found.evaluations < 100


# Statistics


def test_moments_are_numpys(monkeypatch):
    monkeypatch.setattr(linear, "ROWS", 7)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 5)) * [1, 1e-6, 1e6, 1, 1] + [0, 1e3, -1e9, 0, 0]
    x[:, 3], x[:, 4] = 0.1, 0
    mean, std = linear.moments(x, "x")
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(std[:3], x.std(0)[:3], rtol=1e-6)
    assert std[3:].tolist() == [1, 1]


# SGD


def test_sgds_gradient_equals_autograd():
    torch.manual_seed(0)
    n, D, R, K = 9, 4, 3, 5
    x, index = torch.randn(n, D), torch.randint(K, (n,))
    w, b = torch.randn(D, R, K, requires_grad=True), torch.randn(R, K, requires_grad=True)
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(x @ w[:, r] + b[r], index) for r in range(R)]
    )  # each rate has its own mean
    expected.sum().backward()
    with torch.no_grad():
        loss, g_w, g_b = sgd.loss_and_gradient(x, index, w, b)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(g_w, w.grad)
    torch.testing.assert_close(g_b, b.grad)


def test_sgd_comes_near_the_optimum():
    (x, y), (x_test, y_test) = features(600), features(600, seed=1)
    (found,) = logistic.logistic([(x, y)], sgd.RATES, solver="sgd")
    (best,) = optimum(x, y, [1e6])
    assert [f.rate for f in found] == [f.setting for f in found] == list(sgd.RATES)
    assert all(math.isinf(f.C) and f.converged for f in found)
    assert min(f.loss for f in found) == pytest.approx(best.loss, rel=0.01)
    nearest = min(found, key=lambda f: f.loss)
    assert np.mean(nearest.predict(x_test) == y_test) == pytest.approx(
        np.mean(best.predict(x_test) == y_test), abs=0.01
    )
    log_loss = -nearest.log_proba(x)[np.arange(len(y)), y].mean()
    assert nearest.loss == pytest.approx(log_loss, rel=1e-5)


@pytest.mark.parametrize("standardise", [True, False])
def test_sgd_equals_torchs(standardise):
    """In batches of all rows, so that their order does not matter. A rate is for features of unit length."""
    x, y = features(60)
    x = x if standardise else x / np.abs(x).max(0)
    settings = {"solver": "sgd", "epochs": 20, "batch_size": 60, "standardise": standardise}
    (found,) = logistic.logistic([(x, y)], [3.0], **settings)
    assert standardise or (found[0].mean.tolist(), found[0].std.tolist()) == ([0] * 12, [1] * 12)
    standard = torch.from_numpy((x - found[0].mean) / found[0].std)
    head = torch.nn.Linear(12, 4).double()
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 3.0 / float(standard.square().sum(1).mean()), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(standard), torch.from_numpy(y)).backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(found[0].weight, head.weight.detach(), atol=1e-5)
    np.testing.assert_allclose(found[0].bias, head.bias.detach(), atol=1e-5)


def test_rates_side_by_side_are_each_alone_and_the_seed_decides():
    x, y = features(300)

    def weights(rates, seed=0, **more):
        (found,) = logistic.logistic([(x, y)], rates, solver="sgd", seed=seed, epochs=3, batch_size=32, **more)
        return np.stack([f.weight for f in found])

    together = weights([3.0, 0.3])
    np.testing.assert_allclose(together[1], weights([0.3])[0], atol=1e-5)
    assert (together == weights([3.0, 0.3])).all()
    assert not np.allclose(together, weights([3.0, 0.3], seed=1), atol=1e-3)
    assert not np.allclose(together, weights([3.0, 0.3], momentum=0.0), atol=1e-3)


def test_rows_that_do_not_fit_are_read_in_blocks_each_once(monkeypatch):
    monkeypatch.setattr(sgd, "BLOCK", 8)
    x = np.arange(203, dtype=np.float32)[:, None].repeat(2, 1)
    problem = linear.check_problem(x, np.arange(203) % 2, "x")
    mean, std = torch.zeros(2), torch.ones(2)
    for memory in (1, 8 * 8 * 5, 1 << 20):
        stream = sgd._Stream(problem, mean, std, CPU, 16, memory, 0)
        assert (stream.held is not None) == (memory == 1 << 20)
        orders = []
        for epoch in (None, 0, 0, 1):
            parts = list(stream.batches(epoch))
            assert all(torch.equal(part[:, 0].long() % 2, index) for part, index in parts)
            orders.append(torch.cat([part for part, _ in parts])[:, 0].long().tolist())
            assert sorted(orders[-1]) == list(range(203))
        assert orders[0] == list(range(203))
        assert orders[1] == orders[2] != orders[3]


def test_sgd_in_blocks_learns_as_well():
    x, y = features(3000)
    order = np.argsort(y, kind="stable")  # as from folders of classes
    settings = {"solver": "sgd", "epochs": 20}
    (whole,) = logistic.logistic([(x[order], y[order])], [10.0], **settings)
    (parts,) = logistic.logistic([(x[order], y[order])], [10.0], memory=4 * 12 * 1024, **settings)
    assert parts[0].loss == pytest.approx(whole[0].loss, rel=0.02)


def test_a_rate_that_diverges_is_told_and_spoils_no_other():
    x, y = features(300)
    (found,) = logistic.logistic([(x, y)], [1e38, 3.0], solver="sgd", epochs=5, batch_size=32)
    assert (found[0].converged, found[0].loss) == (False, math.inf)
    np.testing.assert_allclose(found[0].log_proba(x), math.log(1 / 4))
    assert found[1].converged
    assert found[1].loss < 1.1


def test_steps_instead_of_epochs():
    x, y = features(300)
    (found,) = logistic.logistic([(x, y)], [3.0], solver="sgd", steps=17, batch_size=32)
    assert found[0].n_iter == 17
    (found,) = logistic.logistic([(x, y)], [3.0], solver="sgd", epochs=2, batch_size=32)
    assert found[0].n_iter == 20


# Nearest neighbours


@pytest.mark.parametrize("standardise", [True, False])
def test_neighbours_equal_scikit_learns(standardise, monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (x_test, _) = features(300), features(50, seed=1)
    shift, scale = (x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)) if standardise else (0, 1)
    for k, temperature in ((20, 0.07), (5, 0.5), (1000, 0.2)):
        theirs = KNeighborsClassifier(
            min(k, 300), metric="cosine", algorithm="brute", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        ).fit((x - shift) / scale, y)
        monkeypatch.setattr(knn, "CHUNK_BYTES", [64 << 20, 4 * 300 * 7][k == 5])
        found = knn.knn(x, y, x_test, k=k, temperature=temperature, standardise=standardise)
        np.testing.assert_allclose(found.shares, theirs.predict_proba((x_test - shift) / scale), atol=1e-4)
        assert (found.predict() == theirs.predict((x_test - shift) / scale)).all()
    assert found.protocol == "igpt-knn-v1-k1000-t0.2" + ("" if standardise else "-raw")


def test_the_earlier_of_equal_neighbours_counts():
    x = np.array([[1, 0], [0, 1], [0, 2], [0, 3], [1, 1], [0, 0]], np.float32)
    y = [7, 3, 5, 5, 7, 7]
    found = knn.knn(x, y, np.array([[0, 1], [0, 0]], np.float32), k=2, standardise=False)
    # Rows 1 to 3 are equally alike; the first two of them vote. Nothing is like nothing: rows 0 and 1 do.
    np.testing.assert_allclose(found.shares, [[0.5, 0.5, 0], [0.5, 0, 0.5]])
    assert found.predict().tolist() == [3, 3]


def test_a_low_temperature_does_not_overflow():
    x, y = features(60)
    assert np.isfinite(knn.knn(x, y, x, temperature=1e-4).shares).all()
    assert (knn.knn(x, y, x, temperature=1e-4).predict() == y).all()


# What cannot be solved


def test_what_cannot_be_solved_is_named():
    x, y = features(40)
    broken = x.copy()
    broken[17, 5] = np.nan
    names = ["layer 0", "layer 7"]
    for engine in ("torch", "scikit-learn"):
        with pytest.raises(InputError, match="layer 7: feature 5 is NaN or infinite"):
            fit([(x, y), (broken, y)], engine=engine, names=names)
    broken[17, 5] = np.inf
    with pytest.raises(InputError, match="problem 1: feature 5 is NaN or infinite"):
        logistic.logistic([(x, y), (broken, y)], [1.0], solver="sgd", epochs=1)
    with pytest.raises(InputError, match="neighbours: feature 5"):
        knn.knn(x, y, broken)
    with pytest.raises(InputError, match="layer 7: all 40 rows are of the class 3"):
        fit([(x, y), (x, np.full(40, 3))], names=names)
    with pytest.raises(InputError, match=r"problem 0: 40 rows of features, but labels of the shape \(39,\)"):
        fit([(x, y[:-1])])
    with pytest.raises(InputError, match=r"shape \(40, 4, 3\)"):
        fit([(x.reshape(40, 4, 3), y)])
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"C is {bad}"):
            fit([(x, y)], [1.0, bad])
    with pytest.raises(InputError, match="one or more"):
        fit([(x, y)], [])
    with pytest.raises(InputError, match="2 lists of values for 1 problems"):
        fit([(x, y)], [[1.0], [2.0]])
    with pytest.raises(InputError, match="solver 'newton'.* lbfgs, sgd"):
        fit([(x, y)], solver="newton")
    with pytest.raises(InputError, match="momentum 1"):
        logistic.logistic([(x, y)], [1.0], solver="sgd", momentum=1.0)
    with pytest.raises(InputError, match="0 neighbours"):
        knn.knn(x, y, x, k=0)
    with pytest.raises(InputError, match=r"12 columns, but those to classify the shape \(40, 11\)"):
        knn.knn(x, y, x[:, 1:])


# Intervals


def test_wilson_by_definition():
    """The interval holds the shares p for which the observed one is within 1.96 deviations, sqrt(p (1 - p) / n)."""
    p = np.linspace(0, 1, 1_000_001)
    for correct, n in ((0, 10), (10, 10), (1, 3), (45, 50), (9630, 10_000)):
        inside = p[np.abs(correct / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n)]
        assert wilson(correct, n) == pytest.approx((100 * inside[0], 100 * inside[-1]), abs=2e-4)
    assert [round(end, 2) for end in wilson(0, 10)] == [0.0, 27.75]


# Of CIFAR-10's size


@pytest.mark.slow
def test_agreement_on_as_many_features_as_cifar10_has():
    (x, y), (x_test, y_test) = features(50_000, 512, 10), features(10_000, 512, 10, seed=1)
    grid = [1e-3, 1e-1, 1.0]
    (found,) = fit([(x, y)], grid)
    (theirs,) = fit([(x, y)], grid, "scikit-learn", tolerance=1e-6, max_iter=5000)
    for a, b in zip(found, theirs):
        assert a.converged
        assert b.converged
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        accuracies = [100 * np.mean(f.predict(x_test) == y_test) for f in (a, b)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1)
