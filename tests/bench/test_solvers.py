"""igpt bench probe: the solvers that are timed, on what, and what is printed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from igpt_cli.bench import solvers
from igpt_cli.bench.solvers import bench_solvers, made_up
from igpt_cli.errors import InputError
from igpt_cli.probing.logistic import logistic
from igpt_cli.probing.protocol import C_GRID

TOY = ["--problems", 2, "--rows", 60, "--width", 6, "--classes", 3, "--device", "cpu"]


def test_all_regressions_beside_scikit_learns_one():
    said = []
    ours, theirs = bench_solvers(2, 200, 6, 3, device="cpu", progress=lambda *done: said.append(done))
    assert (ours.solver, ours.n_problems, ours.strengths, ours.n_rows, ours.n_features) == ("igpt", 2, C_GRID, 200, 6)
    assert (theirs.solver, theirs.n_problems, theirs.strengths, theirs.ratio) == ("scikit-learn", 1, (1.0,), None)
    assert said[-1] == (14, 14)
    assert ours.converged
    assert theirs.converged
    assert ours.ratio == pytest.approx(theirs.seconds / (ours.seconds / 14), rel=0.02)
    # The first problem at C = 1, solved by itself.
    x, y = made_up(200, 6, 3, 0)
    ((a,),), ((b,),) = (logistic([(x, y)], [1.0], engine=e, tolerance=1e-4) for e in ("torch", "scikit-learn"))
    least = min(a.loss, b.loss)
    assert (ours.above, theirs.above) == pytest.approx((a.loss / least - 1, b.loss / least - 1), abs=1e-6)
    assert max(ours.above, theirs.above) < 1e-3


def test_features_are_correlated_and_classes_overlap():
    x, y = made_up(2000, 96, 10, 3)
    assert (x.shape, x.dtype, y.shape) == ((2000, 96), np.float32, (2000,))
    assert np.bincount(y).min() > 100
    spectrum = np.linalg.eigvalsh(np.corrcoef(x.T))
    assert spectrum[-1] > 100 * spectrum[0]
    ((fit,),) = logistic([(x[:1000], y[:1000])], [0.01])
    assert 0.2 < np.mean(fit.predict(x[1000:]) == y[1000:]) < 0.9
    other, same = made_up(2000, 96, 10, 4)
    assert (same == y).all()
    assert not np.allclose(other, x)


def test_memory_that_does_not_suffice_is_told(monkeypatch):
    real = solvers.logistic

    def short(problems, grid, *, engine, **settings):
        if engine == "torch":
            raise MemoryError("too much")
        return real(problems, grid, engine=engine, **settings)

    monkeypatch.setattr(solvers, "logistic", short)
    said = []
    ours, theirs = bench_solvers(1, 60, 4, 2, device="cpu", on_event=said.append)
    assert (ours.failed, ours.seconds, ours.ratio) == ("out of memory", None, None)
    assert theirs.seconds > 0
    assert said == ["igpt: too much"]


@pytest.mark.parametrize("sizes", [(0, 60, 4, 2), (1, 3, 4, 2), (1, 60, 0, 2), (1, 60, 4, 1)])
def test_numbers_out_of_range(sizes):
    with pytest.raises(InputError, match="cannot be measured; at least 1 problem, 1 feature, 2 classes"):
        bench_solvers(*sizes, device="cpu")


def test_a_table_and_a_document(igpt, workspace):
    done = igpt("bench", "probe", "--only", "solvers", *TOY)
    assert done.code == 0, done.stderr
    header, ours, theirs = done.stdout.splitlines()
    assert header.split() == ["solver", "layers", "x", "C", "features", "classes", "s", "steps", "above", "GB", "igpt", "is"]  # fmt: skip
    assert ours.split()[:8] == ["igpt", "2", "x", "7", "60", "x", "6", "3"]
    assert theirs.split()[:5] == ["scikit-learn", "1", "x", "1", "60"]
    assert ours.endswith("x as fast")
    done = igpt("bench", "probe", "--only", "solvers", *TOY, "--json", "-q", "-o", "b.json")
    document = json.loads(done.stdout)
    assert document == json.loads((workspace / "b.json").read_text())
    assert [row["solver"] for row in document["solvers"]] == ["igpt", "scikit-learn"]
    assert "rows" not in document
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "everything"], 2, "'everything' is neither features nor solvers"),
        (["igpt-s", "--only", "solvers"], 2, "--only solvers needs no model"),
        (["--only", "solvers", "--rows", "3"], 1, "cannot be measured; at least 1 problem"),
        (["--only", "solvers", "-o", "there.json"], 1, "there.json exists"),
    ],
)
def test_bad_input_gets_one_clear_message(igpt, workspace, arguments, code, message):
    (workspace / "there.json").touch()
    done = igpt("bench", "probe", *arguments, "--device", "cpu")
    assert (done.code, done.stdout) == (code, "")
    assert message in done.stderr.replace("\n", " ")
    assert [p.name for p in workspace.iterdir()] == ["there.json"]
