"""igpt bench as typed: the table, the document, what is said."""

from __future__ import annotations

import json

import pytest

TOY = [
    "-r", "4", "--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--steps", "1", "--repeats", "2", "--warmup", "0",
    "--device", "cpu", "--precision", "float32",
]  # fmt: skip


def test_a_table_on_stdout_and_what_was_taken_on_stderr(igpt):
    pytest.importorskip("transformers")
    done = igpt("bench", "train", *TOY, "--against", "transformers", "-b", "6", "--micro-batch", "2")
    assert done.code == 0
    header, ours, theirs = done.stdout.splitlines()
    assert header.split() == [
        "model",
        "implementation",
        "precision",
        "batch",
        "ms/step",
        "range",
        "tokens/s",
        "MFU",
        "%",
        "GB",
        "igpt",
        "is",
    ]
    assert ours.split()[:7] == ["igpt-tiny", "igpt", "float32", "3", "x", "2", ours.split()[6]]
    assert theirs.split()[:3] == ["igpt-tiny", "transformers", "float32"]
    assert theirs.endswith("x as fast")
    assert "models: igpt-tiny (default)\n" in done.stderr
    assert ", torch " in done.stderr


def test_json_is_one_document_with_the_machine(igpt, workspace):
    done = igpt("bench", "train", "igpt-tiny", *TOY, "--forward-backward", "--json", "-q", "-o", "b.json")
    assert (done.code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document == json.loads((workspace / "b.json").read_text())
    assert (document["device"], document["peak_flops"]) == ("cpu", None)
    assert {"igpt", "torch", "python"} <= set(document["versions"])
    (ours,) = document["rows"]
    assert (ours["implementation"], ours["n_layer"], ours["optimizer"], ours["batch_size"]) == ("igpt", 2, None, 4)
    assert ours["tokens_per_second"] > 0
    again = igpt("bench", "train", *TOY, "-o", "b.json")
    assert again.code == 1
    assert "b.json exists already" in again.stderr


def test_one_model_that_fails_does_not_lose_the_others(igpt):
    done = igpt("bench", "train", "igpt-tiny", "igpt-s", *TOY, "--n-head", "1", "--n-embd", "16", "-b", "2")
    assert done.code == 0
    assert len(done.stdout.splitlines()) == 3
    from igpt_cli.bench import train
    from igpt_cli.errors import IgptError

    def some(name, **settings):
        if name == "igpt-s":
            raise IgptError("igpt-s does not fit: 1.2 GB")
        return real(name, **settings)

    real, train.bench_train = train.bench_train, some
    try:
        done = igpt("bench", "train", "igpt-s", "igpt-tiny", *TOY)
        alone = igpt("bench", "train", "igpt-s", *TOY)
    finally:
        train.bench_train = real
    assert done.code == 0
    assert "igpt-s: igpt-s does not fit: 1.2 GB\n" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["model", "igpt-tiny"]
    assert (alone.code, alone.stdout) == (1, "")
    assert alone.stderr.endswith("error: igpt-s does not fit: 1.2 GB\n")


def test_what_was_measured_nowhere_is_a_failure(igpt, monkeypatch):
    from igpt_cli.bench.benchmarked import BenchmarkedModel

    def too_much(self, warmup):
        return False

    monkeypatch.setattr(BenchmarkedModel, "_starts", too_much)
    done = igpt("bench", "train", *TOY)
    assert done.code == 1
    assert "out of memory with one image at a time" in done.stdout
    assert done.stderr.endswith("nothing could be measured\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["igpt-x"], 1, "there is no model 'igpt-x'"),
        (["--micro-batch", "many"], 2, "'many' is neither auto nor a number"),
        (["--against", "jax"], 1, "against is 'jax', expected one of transformers"),
        (["--device", "cuda:9"], 1, "device cuda:9 is not here"),
    ],
)
def test_what_cannot_be_measured_is_said(igpt, arguments, code, message):
    done = igpt("bench", "train", *arguments)
    assert (done.code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())


SMALL = ["-r", "4", "--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--device", "cpu", "-b", "2"]


def test_sample_prints_a_table_of_whole_images(igpt):
    pytest.importorskip("transformers")
    done = igpt("bench", "sample", *SMALL, "--against", "transformers")
    assert done.code == 0
    header, ours, theirs = done.stdout.splitlines()
    assert header.split()[:9] == [
        "model", "implementation", "precision", "batch", "pixels", "ms/step", "range", "images/s", "first",
    ]  # fmt: skip
    assert ours.split()[:5] == ["igpt-tiny", "igpt", "float32", "2", "16"]
    assert float(ours.split()[7].replace(",", "")) > 0
    assert theirs.split()[:5] == ["igpt-tiny", "transformers", "float32", "2", "16"]
    assert theirs.endswith("x as fast")
    assert "models: igpt-tiny (default)\n" in done.stderr


def test_sample_of_a_part_is_no_image_and_its_document_says_what_was_drawn(igpt, workspace):
    options = ["--pixels", "5", "--repeats", "1", "--precision", "bfloat16"]
    done = igpt("bench", "sample", "igpt-tiny", *SMALL, *options, "--json", "-q", "-o", "b.json")
    assert (done.code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document == json.loads((workspace / "b.json").read_text())
    (ours,) = document["rows"]
    assert (ours["pixels"], ours["batch_size"], ours["repeats"], ours["precision"]) == (5, 2, 1, "bfloat16")
    assert ours["images_per_second"] is None
    assert ours["ms_per_step"] > 0
    assert {"igpt", "torch", "python"} <= set(document["versions"])
    assert igpt("bench", "sample", *SMALL, *options).stdout.splitlines()[1].split()[7] == "-"
    again = igpt("bench", "sample", *SMALL, "-o", "b.json")
    assert again.code == 1
    assert "b.json exists already" in again.stderr


def test_sample_that_fits_nowhere_is_a_failure(igpt, monkeypatch):
    from dataclasses import replace

    from igpt_cli.bench.sample import Sampler

    def prepare(self):
        self.row = replace(self.row, failed="out of memory with 2 images at a time")

    monkeypatch.setattr(Sampler, "prepare", prepare)
    done = igpt("bench", "sample", *SMALL)
    assert done.code == 1
    assert "out of memory with 2 images at a time" in done.stdout
    assert done.stderr.endswith("nothing could be measured\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["igpt-x"], "there is no model 'igpt-x'"),
        ([*SMALL, "--pixels", "17", "--repeats", "0"], "repeats is 0, expected at least 1; pixels is 17, an image has"),
        (["--against", "transformers-static"], "expected one of transformers, transformers-float32"),
        (["--device", "cuda:9"], "device cuda:9 is not here"),
    ],
)
def test_what_cannot_be_drawn_is_said(igpt, arguments, message):
    done = igpt("bench", "sample", *arguments)
    assert (done.code, done.stdout) == (1, "")
    assert message in " ".join(done.stderr.split())
