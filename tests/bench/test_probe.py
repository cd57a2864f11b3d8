"""igpt bench probe: what is timed, and what is printed."""

from __future__ import annotations

import json

import pytest

from igpt_cli.bench import probe
from igpt_cli.bench.probe import bench_features
from igpt_cli.errors import InputError

TOY = {"resolution": 4, "n_vocab": 8, "sizes": {"n_layer": 2, "n_head": 1, "n_embd": 8}, "device": "cpu"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(probe, "TIMING_SECONDS", 0.0)


def test_both_are_timed_in_turn(monkeypatch):
    asked, real = [], probe.batches

    def batches(model, tokens, rows, layers, size, **settings):
        asked.append((list(layers), len(rows), size))
        return real(model, tokens, rows, layers, size, **settings)

    monkeypatch.setattr(probe, "batches", batches)
    said = []
    deepest, every = bench_features(**TOY, batch_size=3, repeats=2, progress=lambda *done: said.append(done))
    assert [layers for layers, _, _ in asked[-4:]] == [[2], [0, 1, 2]] * 2
    assert {(n, size) for _, n, size in asked[-4:]} == {(6, 3)}
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (deepest.layers, every.layers, deepest.images, deepest.ratio) == ("2", "0-2", 6, None)
    assert every.ratio > 0
    assert deepest.images_per_second > 0


def test_the_ratio_is_of_pairs(monkeypatch):
    """Of a machine that gets ten times slower on the way, the ratio is right all the same."""
    clock = iter([0, 9, 0, 9, 0, 9, *(t for speed in (1, 3, 10) for t in (0, 2.0 * speed, 0, 3.0 * speed))])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    deepest, every = bench_features(**TOY, batch_size=3, repeats=3)
    assert (every.ratio, deepest.seconds, deepest.fastest, every.slowest) == (1.5, 6.0, 2.0, 30.0)
    assert deepest.images_per_second == 1.0


def test_memory_that_does_not_suffice_is_told(monkeypatch):
    def batches(*_, **__):
        raise MemoryError

    monkeypatch.setattr(probe, "batches", batches)
    said = []
    rows = bench_features(**TOY, batch_size=3, on_event=said.append)
    assert [r.failed for r in rows] == ["out of memory with 3 images at a time"] * 2
    assert said == ["igpt-tiny: out of memory with 3 images at a time"]


def test_numbers_out_of_range():
    with pytest.raises(InputError, match="repeats is 0, expected at least 1"):
        bench_features(**TOY, repeats=0)


def test_a_table_and_a_document(igpt, workspace):
    sizes = ["-r", 4, "--n-layer", 2, "--n-head", 1, "--n-embd", 8, "--problems", 1, "--rows", 40, "--width", 4]
    toy = [*sizes, "--repeats", 1, "--device", "cpu", "-b", 2]
    done = igpt("bench", "probe", "igpt-tiny", *toy)
    assert done.code == 0
    features, classifiers = done.stdout.split("\n\n")
    header, deepest, every = features.splitlines()
    assert header.split() == [
        "model",
        "layers",
        "precision",
        "batch",
        "images",
        "s",
        "range",
        "images/s",
        "GB",
        "ratio",
    ]
    assert deepest.split()[:5] == ["igpt-tiny", "2", "float32", "2", "4"]
    assert every.split()[:5] == ["igpt-tiny", "0-2", "float32", "2", "4"]
    assert classifiers.splitlines()[1].split()[:7] == ["igpt", "1", "x", "7", "40", "x", "4"]
    done = igpt("bench", "probe", "igpt-tiny", *toy, "--json", "-q", "-o", "b.json")
    document = json.loads(done.stdout)
    assert document == json.loads((workspace / "b.json").read_text())
    assert [row["layers"] for row in document["rows"]] == ["2", "0-2"]
    assert [row["solver"] for row in document["solvers"]] == ["igpt", "scikit-learn"]
    assert done.stderr == ""
