"""Evaluation against plain NumPy in float64, the baselines against counting by hand, and their laws."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from models.test_igpt import plain_numpy

from igpt_cli.errors import InputError, MismatchError, NonFiniteError
from igpt_cli.evaluation import baselines
from igpt_cli.evaluation.baselines import Baselines
from igpt_cli.evaluation.pixels import PER_IMAGE, Evaluation, default_split, evaluate, evaluation_masks, write_per_image
from igpt_cli.model_dir import PALETTE, ModelDir, load_model, new_config, write_config, write_weights
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.loader import fixed_mask
from igpt_cli.tokens.store import TokenFile, open_tokens
from igpt_cli.tokens.writer import TokenWriter
from igpt_cli.training import objectives

R, T, V = 4, 16, 8


def make_run(path: Path, palette: Palette, objective: str = "ar", trained: bool = True, **parts) -> ModelDir:
    """A model directory of toy size; `trained` weights are random in every tensor, the head's included."""
    config = model_config(
        "igpt-tiny", n_layer=2, n_head=2, n_embd=16, resolution=R, n_vocab=palette.n_vocab, objective=objective
    )
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for p in model.parameters() if trained else ():
            p.add_(0.2 * torch.randn_like(p))
    path.mkdir(parents=True)
    palette.save(path / PALETTE)
    write_config(path, new_config(config, **parts))
    write_weights(path, model.state_dict())
    return load_model(path)


@pytest.fixture
def tokens(toy_tokens) -> TokenFile:
    return open_tokens(toy_tokens(n=23))


@pytest.fixture
def make(tmp_path, tokens):
    """make("bert", ...) -> a loaded run that fits `tokens`."""
    return lambda objective="ar", **more: make_run(tmp_path / f"run-{objective}", tokens.palette, objective, **more)


def plain_losses(run: ModelDir, rows: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """(B, T) float64: -log p of each token under a plain NumPy model."""
    logits = plain_numpy(run.model, rows, mask)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p, rows[..., None], -1)[..., 0])


# The model.


def test_an_autoregressive_model_is_asked_for_every_pixel(make, tokens):
    run, rows = make(), np.asarray(tokens.split("test").tokens, np.int64)
    found = evaluate(run, tokens, "test")
    expected = plain_losses(run, rows)
    np.testing.assert_allclose(found.per_image, expected.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.by_position, expected.mean(0).reshape(R, R), rtol=1e-4)
    assert found.nats_per_token == pytest.approx(expected.mean(), rel=1e-6)
    assert found.standard_error == pytest.approx(expected.mean(1).std(ddof=1) / math.sqrt(23), rel=1e-4)
    assert (found.n_images, found.n_tokens, found.objective) == (23, 23 * T, "ar")
    assert (found.mask_prob, found.seed) == (None, None)
    assert found.bits_per_token == pytest.approx(np.log2(np.exp(expected)).mean(), rel=1e-6)
    assert found.bits_per_subpixel == pytest.approx(found.bits_per_token / 3)
    assert found.per_image.dtype == found.by_position.dtype == np.float64


@pytest.mark.parametrize("prob", [0.15, 0.5, 1.0])
def test_a_bert_model_is_asked_for_masked_pixels_alone(make, tokens, prob):
    run, rows = make("bert"), np.asarray(tokens.split("test").tokens, np.int64)
    found = evaluate(run, tokens, "test", mask_prob=prob, seed=3)
    mask = evaluation_masks(np.arange(23), T, prob, seed=3)
    each = plain_losses(run, rows, mask)
    per_image = [row[hidden].mean() for row, hidden in zip(each, mask)]
    np.testing.assert_allclose(found.per_image, per_image, rtol=1e-5)
    assert found.nats_per_token == pytest.approx(np.mean(per_image), rel=1e-6)
    assert (found.n_tokens, found.mask_prob, found.seed) == (mask.sum(), prob, 3)
    for at in range(T):
        seen = each[mask[:, at], at]
        assert found.by_position.ravel()[at] == pytest.approx(
            seen.mean() if len(seen) else math.nan, rel=1e-4, nan_ok=True
        )
    models = Baselines(tokens.split("train").tokens, R, V).losses(rows)
    for name in ("unigram", "bigram"):
        expected = np.mean([row[hidden].mean() for row, hidden in zip(models[name], mask)])
        assert getattr(found, name) == pytest.approx(expected)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_neither_the_batch_size_nor_parts_of_it_change_anything(make, tokens, objective, monkeypatch):
    run = make(objective)
    whole = evaluate(run, tokens, "test")
    for size in (1, 3, 7, 22, 23, 1000):
        found = evaluate(run, tokens, "test", batch_size=size)
        np.testing.assert_allclose(found.per_image, whole.per_image, rtol=2e-6)
        np.testing.assert_allclose(found.by_position, whole.by_position, rtol=1e-5)
        assert (found.n_images, found.n_tokens) == (23, whole.n_tokens)
        assert found.bigram == pytest.approx(whole.bigram, rel=1e-12)
    monkeypatch.setattr(objectives, "TOKENS_AT_ONCE", 5 * T)
    np.testing.assert_allclose(evaluate(run, tokens, batch_size=23).per_image, whole.per_image, rtol=2e-6)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_an_untrained_model_knows_nothing(make, tokens, objective):
    found = evaluate(make(objective, trained=False), tokens)
    np.testing.assert_allclose(found.per_image, math.log(V), rtol=1e-7)
    assert found.nats_per_token == pytest.approx(math.log(V), rel=1e-7)
    assert found.standard_error == pytest.approx(0, abs=1e-7)
    assert found.bits_per_token == pytest.approx(3)
    assert found.uniform == math.log(V)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_a_limit_takes_evenly_spaced_images_which_keep_their_losses(make, tokens, objective):
    run = make(objective)
    whole, some = evaluate(run, tokens, "test"), evaluate(run, tokens, "test", limit=7)
    assert some.rows.tolist() == [0, 3, 6, 9, 13, 16, 19]
    np.testing.assert_allclose(some.per_image, whole.per_image[some.rows], rtol=2e-6)
    assert some.nats_per_token == pytest.approx(some.per_image.mean())
    assert evaluate(run, tokens, "test", limit=99).rows.tolist() == list(range(23))
    one = evaluate(run, tokens, "test", limit=1)
    assert (one.n_images, one.standard_error) == (1, None)


def test_bert_is_evaluated_with_the_masks_of_its_training_unless_told(tmp_path, tokens):
    def prob(name, asked=None, **parts):
        return evaluate(make_run(tmp_path / name, tokens.palette, "bert", **parts), tokens, mask_prob=asked).mask_prob

    assert prob("bare") == 0.15
    assert prob("own", training={"mask_prob": 0.4}) == 0.4
    assert prob("told", 0.3, training={"mask_prob": 0.4}) == 0.3


def test_other_seeds_hide_other_pixels(make, tokens):
    run = make("bert")
    losses = [evaluate(run, tokens, seed=seed).per_image for seed in (0, 0, 1)]
    assert np.array_equal(losses[0], losses[1])
    assert (losses[0] != losses[2]).mean() > 0.5


def test_a_mask_that_hides_nothing_is_drawn_again():
    rows, prob = np.arange(300), 0.1
    first = fixed_mask(rows, T, prob, seed=2)
    nothing = ~first.any(1)
    assert nothing.sum() > 20  # 0.9^16 of 300 are expected
    found = evaluation_masks(rows, T, prob, seed=2)
    assert found.any(1).all()
    np.testing.assert_array_equal(found[~nothing], first[~nothing])
    for row in np.flatnonzero(nothing):
        draws = (fixed_mask(np.array([row]), T, prob, seed=2, draw=d)[0] for d in range(100))
        np.testing.assert_array_equal(found[row], next(m for m in draws if m.any()))
    np.testing.assert_array_equal(evaluation_masks(rows[40:60], T, prob, seed=2), found[40:60])


def test_bfloat16_rounds_and_is_said(make, tokens):
    run = make()
    exact, rounded = evaluate(run, tokens), evaluate(run, tokens, precision="bfloat16")
    assert (exact.precision, rounded.precision) == ("float32", "bfloat16")
    assert not np.array_equal(exact.per_image, rounded.per_image)
    assert rounded.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.02)


def test_progress_and_the_model_are_as_they_should_be(make, tokens):
    run, said = make(), []
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    evaluate(run, tokens, "test", batch_size=10, progress=lambda *done: said.append(done))
    assert said == [(10, 23), (20, 23), (23, 23)]
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())


# The baselines.


def by_hand(train: np.ndarray, images: np.ndarray, side: int, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each pixel under unigram and bigram, counted pixel by pixel with two Counters."""
    single, pair = Counter(), Counter()

    def before(row: int, column: int) -> tuple[int, int] | None:
        if column:
            return row, column - 1
        return (row - 1, column) if row else None

    for image in train.reshape(-1, side, side).tolist():
        for r in range(side):
            for c in range(side):
                single[image[r][c]] += 1
                if at := before(r, c):
                    pair[image[at[0]][at[1]], image[r][c]] += 1

    def unigram(b):
        return (single[b] + 1) / (single.total() + n_vocab)

    def bigram(a, b):
        seen = sum(pair[a, x] for x in range(n_vocab))
        kinds = sum(pair[a, x] > 0 for x in range(n_vocab))
        return (pair[a, b] + kinds * unigram(b)) / (seen + kinds) if seen else unigram(b)

    first, second = np.empty((2, len(images), side, side))
    for i, image in enumerate(images.reshape(-1, side, side).tolist()):
        for r in range(side):
            for c in range(side):
                at, b = before(r, c), image[r][c]
                first[i, r, c] = -math.log(unigram(b))
                second[i, r, c] = -math.log(bigram(image[at[0]][at[1]], b) if at else unigram(b))
    return first.reshape(images.shape), second.reshape(images.shape)


@pytest.mark.parametrize(("side", "n_train"), [(1, 9), (3, 1), (3, 40), (4, 12)])
def test_baselines_equal_counting_by_hand(side, n_train, monkeypatch):
    rng = np.random.default_rng(side)
    train = rng.integers(5, size=(n_train, side**2)).astype(np.uint16)  # of seven colours two are never seen
    images = rng.integers(7, size=(6, side**2))
    unigram, bigram = by_hand(train, images, side, 7)
    for at_once in (1, 25, 2**22):
        monkeypatch.setattr(baselines, "TOKENS_AT_ONCE", at_once)
        found = Baselines(train, side, 7).losses(images)
        np.testing.assert_allclose(found["unigram"], unigram, rtol=1e-12)
        np.testing.assert_allclose(found["bigram"], bigram, rtol=1e-12)


def test_baselines_are_distributions_and_never_infinite():
    train = np.random.default_rng(0).integers(40, size=(3, T)).astype(np.uint16)
    found = Baselines(train, R, 50)
    assert np.exp(-found.unigram).sum() == pytest.approx(1)
    np.testing.assert_allclose(np.exp(-found.bigram).sum(1), 1)
    assert np.isfinite(found.bigram).all()
    empty = Baselines(train[:0], R, 50)
    np.testing.assert_allclose(empty.bigram, math.log(50))


def test_a_bigram_finds_what_the_pixel_before_tells():
    """Each pixel's colour is the next one after its left, or in the first column its upper, neighbour's."""
    row, column = np.divmod(np.arange(T), R)
    images = (np.arange(64)[:, None] + row + column) % V
    found = Baselines(images, R, V).losses(images)
    assert found["unigram"].mean() == pytest.approx(math.log(V))
    assert found["bigram"][:, 0] == pytest.approx(math.log(V))
    assert found["bigram"][:, 1:].max() < 0.05


def test_no_bigram_of_so_many_colours(make, tokens, monkeypatch):
    monkeypatch.setattr(baselines, "BIGRAM_COLOURS", V - 1)
    found = evaluate(make(), tokens)
    assert found.bigram is None
    assert found.unigram > 0
    assert json.loads(json.dumps(found.to_dict()))["bigram"] is None


def test_baselines_are_counted_on_the_training_split_if_there_is_one(make, tokens, toy_tokens, tmp_path):
    run = make()
    assert evaluate(run, tokens, "test").baselines_fitted_on == "train"
    alone = open_tokens(toy_tokens(tmp_path / "alone.h5", splits=("test",), n=23))
    found = evaluate(run, alone)
    assert found.baselines_fitted_on == "test"
    images = np.asarray(alone.split("test").tokens, np.int64)
    assert found.bigram == pytest.approx(by_hand(images, images, R, V)[1].mean())


# What is evaluated.


def test_the_default_split(toy_tokens, tmp_path):
    def chosen(*splits):
        return default_split(open_tokens(toy_tokens(tmp_path / f"{'-'.join(splits)}.h5", splits=splits, n=2)))

    assert chosen("train", "val", "test") == "test"
    assert chosen("train", "val") == "val"
    assert chosen("train") == "train"
    with pytest.raises(InputError, match=r"has no split 'test' or 'val'; say which .* --split: train, extra"):
        chosen("train", "extra")


def test_images_seen_in_training_are_told(tmp_path, tokens):
    data = {"tokens_sha256": tokens.split("train").sha256}
    run = make_run(tmp_path / "run", tokens.palette, data=data)
    assert evaluate(run, tokens, "train").seen_in_training
    assert not evaluate(run, tokens, "test").seen_in_training
    assert not evaluate(make_run(tmp_path / "other", tokens.palette), tokens, "train").seen_in_training


def test_the_document_holds_everything_but_arrays(make, tokens):
    found = evaluate(make(), tokens)
    document = found.to_dict()
    json.dumps(document, allow_nan=False)
    assert {*Evaluation.__dataclass_fields__} - {*document} == {"rows", "per_image", "by_position"}
    assert {*document} - {*Evaluation.__dataclass_fields__} == {"bits_per_token", "bits_per_subpixel"}
    assert document["nats_per_token"] == pytest.approx(found.nats_per_token, abs=1e-6)
    assert (document["tokens"], document["split"], document["model"]) == (str(tokens.path), "test", "igpt-tiny")
    assert document["tokens_per_second"] > 0


NAMES = ["a/plain.png", 'a/"quoted", with comma.png', "a/line\nbreak.png", "a/é.png", "a/\udcff.png"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_values_of_each_image_come_with_names_of_any_kind(make, tokens, tmp_path, suffix):
    path = tmp_path / "named.h5"
    rows = tokens.split("test").tokens[:5]
    with TokenWriter(path, tokens.palette, R, classes=["dark", "light"]) as writer:
        writer.append("test", rows, [0, 1, -1, 0, 1], NAMES)
    file = open_tokens(path)
    found = evaluate(make(), file, limit=4)
    written = tmp_path / f"images.{suffix}"
    write_per_image(found, file.split("test"), written)
    if suffix == "csv":
        with open(written, encoding="utf-8", errors="surrogateescape", newline="") as f:
            lines = list(csv.DictReader(f))
    else:
        lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [line["name"] for line in lines] == NAMES[:4]
    assert [list(line) for line in lines] == [["row", "name", "label", "nats_per_token"]] * 4
    assert [(int(line["row"]), int(line["label"])) for line in lines] == [(0, 0), (1, 1), (2, -1), (3, 0)]
    assert np.mean([float(line["nats_per_token"]) for line in lines]) == pytest.approx(found.nats_per_token, abs=1e-6)
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_evaluated(make, tokens, toy_tokens, tmp_path):
    run, bert = make(), make("bert")
    with pytest.raises(InputError, match="has no split 'dev'; its splits: train, test"):
        evaluate(run, tokens, "dev")
    other = open_tokens(toy_tokens(tmp_path / "shade.h5", shade=1))
    with pytest.raises(MismatchError, match=r"uses palette \w{12} \(8 colours\), .* trained with palette \w{12}"):
        evaluate(run, other)
    large = tmp_path / "large.h5"
    with TokenWriter(large, tokens.palette, 5) as writer:
        writer.append("test", np.zeros((1, 25), int), [-1], ["a"])
    with pytest.raises(MismatchError, match=r"images of 5x5, .* trained at 4x4; tokenize again with --resolution 4"):
        evaluate(run, open_tokens(large))
    with pytest.raises(InputError, match="limit is 0; it must be at least 1"):
        evaluate(run, tokens, limit=0)
    with pytest.raises(InputError, match="the batch size is 0; it must be at least 1"):
        evaluate(run, tokens, batch_size=0)
    with pytest.raises(InputError, match="precision is 'half'"):
        evaluate(run, tokens, precision="half")
    with pytest.raises(InputError, match=r"--mask-prob is for BERT models; .*run-ar is autoregressive"):
        evaluate(run, tokens, mask_prob=0.2)
    for prob in (-1, 0, 0.06, 1.01, math.nan):
        with pytest.raises(
            InputError, match=rf"mask_prob is {prob}; it must be at most 1, and with 16 pixels at least 0.0625"
        ):
            evaluate(bert, tokens, mask_prob=prob)


def test_an_empty_split_is_said(make, tokens):
    tokens.splits["test"].tokens = tokens.splits["test"].tokens[:0]
    with pytest.raises(InputError, match="the split 'test' is empty; there is nothing to evaluate"):
        evaluate(make(), tokens, "test")


def test_weights_that_overflow_are_said(make, tokens):
    run = make()
    with torch.no_grad():
        run.model.wtet.weight.fill_(3e38)
    with pytest.raises(
        NonFiniteError, match=r"the loss of row 0 of test is nan: the weights of .* overflow in float32"
    ):
        evaluate(run, tokens, "test")


def test_too_large_a_batch_is_said(make, tokens, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(objectives.Objective, "token_losses", full)
    with pytest.raises(MemoryError, match="23 images at a time do not fit on cpu; give a lower --batch-size"):
        evaluate(make(), tokens)


def test_the_format_page_names_everything_that_is_written(make, tokens):
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.split("\n## Evaluation\n")[1].split("\n## ")[0]
    names = [*evaluate(make(), tokens).to_dict(), *PER_IMAGE]
    assert [name for name in names if f"`{name}`" not in section] == []
