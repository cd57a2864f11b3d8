"""Surprise against plain NumPy and torch, one pass at a time; the masks that deal an image out; the sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.test_pixels import R, T, V, make_run, plain_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image

from igpt_cli.errors import InputError, MismatchError, NonFiniteError
from igpt_cli.evaluation.pixel_map import passes, pixel_loss_map, write_pixel_map
from igpt_cli.evaluation.pixels import evaluate
from igpt_cli.report.maps import BETWEEN, FOOT, HEAD, MARGIN, WITHIN, pixel_map_figure
from igpt_cli.tokens.loader import fixed_mask, fixed_parts
from igpt_cli.tokens.store import TokenFile, open_tokens


@pytest.fixture
def tokens(toy_tokens) -> TokenFile:
    return open_tokens(toy_tokens(n=23))


@pytest.fixture
def rows(tokens) -> np.ndarray:
    return np.asarray(tokens.split("test").tokens, np.int64)


@pytest.fixture
def make(tmp_path, tokens):
    return lambda objective="ar", **more: make_run(tmp_path / f"run-{objective}", tokens.palette, objective, **more)


# The model.


def test_an_autoregressive_model_predicts_as_plain_numpy_says(make, rows):
    run = make()
    found = pixel_loss_map(run, rows)
    assert (found.shape, found.dtype) == ((23, R, R), np.float64)
    np.testing.assert_allclose(found.reshape(23, T), plain_losses(run, rows), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        log_p = torch.log_softmax(run.model(torch.from_numpy(rows)), -1).numpy()
    np.testing.assert_allclose(
        found.reshape(23, T), -np.take_along_axis(log_p, rows[..., None], -1)[..., 0], rtol=1e-5, atol=1e-6
    )


def test_its_mean_is_the_loss_of_the_image(make, tokens, rows):
    run = make()
    whole = evaluate(run, tokens, "test")
    found = pixel_loss_map(run, rows)
    np.testing.assert_allclose(found.mean((1, 2)), whole.per_image, atol=1e-6)
    np.testing.assert_allclose(found.mean(0), whole.by_position, atol=1e-6)


def test_no_pixels_loss_depends_on_a_later_one(make, rows):
    run = make()
    before = pixel_loss_map(run, rows[:1])[0].ravel()
    for at in range(T):
        changed = rows[:1].copy()
        changed[0, at] = (changed[0, at] + 1) % V
        after = pixel_loss_map(run, changed)[0].ravel()
        np.testing.assert_array_equal(after[:at], before[:at])
        assert (after[at:] != before[at:]).all()


@pytest.mark.parametrize("prob", [0.15, 0.3, 0.5, 1.0, 1 / T])
def test_a_bert_model_predicts_each_pixel_with_its_part_hidden(make, rows, prob):
    run, places = make("bert"), np.arange(40, 63)
    found = pixel_loss_map(run, rows, places, mask_prob=prob, seed=3).reshape(23, T)
    part = fixed_parts(places, T, passes(prob), seed=3)
    for hidden in range(passes(prob)):
        mask = part == hidden
        expected = plain_losses(run, rows, mask)
        np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-6)


def test_a_masked_pixel_does_not_help_to_predict_itself_nor_those_hidden_with_it(make, rows):
    run = make("bert")
    part = fixed_parts(np.arange(1), T, 2)[0]
    before = pixel_loss_map(run, rows[:1], mask_prob=0.5).ravel()
    for at in range(T):
        changed = rows[:1].copy()
        changed[0, at] = (changed[0, at] + 1) % V
        same = pixel_loss_map(run, changed, mask_prob=0.5).ravel() == before
        beside = (part == part[at]) & (np.arange(T) != at)
        assert same[beside].all()
        assert not same[part != part[at]].any()


def test_bert_is_asked_as_in_its_training_unless_told(tmp_path, tokens, rows):
    run = make_run(tmp_path / "own", tokens.palette, "bert", training={"mask_prob": 0.4})
    told = {p: pixel_loss_map(run, rows, mask_prob=p) for p in (None, 0.4, 0.15)}
    np.testing.assert_array_equal(told[None], told[0.4])
    assert not np.array_equal(told[None], told[0.15])
    assert not np.array_equal(told[None], pixel_loss_map(run, rows, seed=1))


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_the_batch_changes_nothing_and_a_row_keeps_its_loss(make, rows, objective):
    run = make(objective)
    whole = pixel_loss_map(run, rows)
    for size in (1, 3, 16, 160, 1000):
        np.testing.assert_allclose(pixel_loss_map(run, rows, batch_size=size), whole, rtol=1e-5, atol=1e-6)
    some = np.array([20, 4, 11])
    np.testing.assert_allclose(pixel_loss_map(run, rows[some], some), whole[some], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_an_untrained_model_has_the_same_loss_everywhere(make, rows, objective):
    np.testing.assert_allclose(pixel_loss_map(make(objective, trained=False), rows), np.log(V), rtol=1e-6)


def test_bfloat16_rounds_and_progress_is_told_in_images(make, rows):
    run, said = make("bert"), []
    exact = pixel_loss_map(run, rows, batch_size=50, progress=lambda *done: said.append(done))
    assert said == [(7, 23), (14, 23), (21, 23), (23, 23)]  # 7 passes an image
    rounded = pixel_loss_map(run, rows, precision="bfloat16")
    assert not np.array_equal(rounded, exact)
    assert rounded.mean() == pytest.approx(exact.mean(), rel=0.03)


def test_what_does_not_fit_is_refused(make, rows):
    run = make()
    for wrong in (rows[:, 1:], rows[0], rows.reshape(-1, R, R)):
        with pytest.raises(MismatchError, match=r"images of 4x4 are"):
            pixel_loss_map(run, wrong)
    with pytest.raises(MismatchError, match=r"\(2, 16\) tokens"):
        pixel_loss_map(run, rows, np.arange(2))
    with pytest.raises(InputError, match=r"tokens are 0\.\.8; those of .* are 0\.\.7"):
        pixel_loss_map(run, np.where(rows == rows.max(), V, rows - rows.min()))
    with pytest.raises(InputError, match="--mask-prob is for BERT models"):
        pixel_loss_map(run, rows, mask_prob=0.2)
    with pytest.raises(InputError, match="the batch size is 0"):
        pixel_loss_map(run, rows, batch_size=0)
    with torch.no_grad():
        next(run.model.parameters())[rows[2, 0]] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the loss of row \d+ is nan: the weights of .* overflow in float32"):
        pixel_loss_map(run, rows, np.arange(100, 123))


def test_no_images_have_no_loss(make):
    assert pixel_loss_map(make(), np.empty((0, T), np.int64)).shape == (0, R, R)


# The masks.


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 70), st.floats(0, 1), st.integers(0, 2**63), st.lists(st.integers(0, 2**40), max_size=4))
def test_every_pixel_is_hidden_in_one_pass(n_ctx, prob, seed, places):
    n = min(passes(max(prob, 1 / n_ctx)), n_ctx)
    part = fixed_parts(np.array(places), n_ctx, n, seed)
    assert part.shape == (len(places), n_ctx)
    for place, row in zip(places, part):
        sizes = np.bincount(row, minlength=n)
        assert (len(sizes), sizes.sum()) == (n, n_ctx)
        assert sizes.max() - sizes.min() <= 1
        np.testing.assert_array_equal(fixed_parts(np.array([place]), n_ctx, n, seed)[0], row)


def test_passes_are_as_many_as_hide_what_training_hides():
    assert [passes(p) for p in (None, 1.0, 0.7, 0.5, 0.3, 0.15, 0.1, 1 / 16)] == [1, 1, 1, 2, 3, 7, 10, 16]


def test_parts_are_random_and_none_of_the_masks_of_evaluation():
    places, n = np.arange(3000), 4
    part = fixed_parts(places, T, n, seed=1)
    share = np.stack([(part == k).mean(0) for k in range(n)])
    # Each of 64 shares is binomial; five standard errors are missed once in 27,000 such tests.
    assert np.abs(share - 1 / n).max() < 5 * np.sqrt(1 / n * (1 - 1 / n) / 3000)
    together = (part[:, :1] == part[:, 1:]).mean(0)
    assert np.abs(together - 3 / 15).max() < 5 * np.sqrt(0.2 * 0.8 / 3000)
    assert not np.array_equal(part, fixed_parts(places, T, n, seed=2))
    hidden = fixed_mask(places, T, 0.25, seed=1)
    assert np.abs(hidden[part == 0].mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 12000)


def test_parts_are_the_same_in_every_version():
    assert fixed_parts(np.array([0, 5]), 9, 3, seed=7).tolist() == [
        [0, 2, 2, 2, 1, 1, 0, 1, 0],
        [0, 0, 0, 1, 2, 1, 1, 2, 2],
    ]


# The files.


def test_arrays_are_written_as_they_were_found(make, tokens, tmp_path):
    split, chosen = tokens.split("test"), np.array([3, 8])
    nats = pixel_loss_map(make(), split.tokens[chosen], chosen)
    for name in ("a.npz", "b.npz"):
        write_pixel_map(nats, split, chosen, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    np.testing.assert_array_equal(found["nats"], nats.astype(np.float32))
    np.testing.assert_array_equal(found["tokens"], split.tokens[chosen])
    np.testing.assert_array_equal(found["images"], split.decode(chosen))
    assert {k: (v.dtype.name, v.shape) for k, v in found.items() if k not in ("names", "classes")} == {
        "nats": ("float32", (2, R, R)),
        "images": ("uint8", (2, R, R, 3)),
        "tokens": ("uint16", (2, T)),
        "rows": ("int64", (2,)),
        "labels": ("int32", (2,)),
    }
    assert (found["rows"].tolist(), found["names"].tolist()) == ([3, 8], ["test/3.png", "test/8.png"])
    assert found["classes"][found["labels"]].tolist() == ["light", "dark"]


# The sheet.


def sheet(path: Path, nats: np.ndarray, images: np.ndarray | None = None, captions: list[str] | None = None):
    """(height, width, 3) int: the picture drawn."""
    n, side = nats.shape[:2]
    images = np.zeros((n, side, side, 3), np.uint8) if images is None else images
    pixel_map_figure(nats, images, captions or [""] * n, path, "a title", "a note")
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def middles(picture: np.ndarray, x: int, y: int, zoom: int, side: int) -> np.ndarray:
    """(side, side, 3): the colour in the middle of each pixel of the image at (x, y)."""
    at = np.arange(side) * zoom + zoom // 2
    return picture[y + at][:, x + at]


@pytest.mark.parametrize(
    ("n", "side", "columns", "zoom"), [(1, 4, 1, 120), (2, 4, 2, 48), (3, 48, 2, 4), (9, 32, 3, 4), (33, 4, 6, 32)]
)
def test_every_pixel_is_in_its_place_and_one_scale_serves_all(tmp_path, n, side, columns, zoom):
    rng = np.random.default_rng(n)
    nats = rng.uniform(0, 4, (n, side, side))
    nats[0] /= 4  # an image with a low loss stays dark among the others
    images = rng.integers(256, size=(n, side, side, 3)).astype(np.uint8)
    picture = sheet(tmp_path / "a.png", nats, images)
    assert picture[0].min() == 255
    colours = 255 * colormaps["viridis"](nats / nats.max())[..., :3]
    for i in range(n):
        x = MARGIN + i % columns * (2 * side * zoom + WITHIN + BETWEEN)
        y = HEAD + i // columns * (side * zoom + FOOT)
        np.testing.assert_allclose(middles(picture, x, y, zoom, side), images[i], atol=1)
        heat = middles(picture, x + side * zoom + WITHIN, y, zoom, side)
        np.testing.assert_allclose(heat, colours[i], atol=3)
    sheet(tmp_path / "b.png", nats, images)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_first_pixel_does_not_take_all_colours(tmp_path):
    nats = np.random.default_rng(0).uniform(0, 2, (2, 20, 20))
    nats[:, 0, 0] = 30.0
    picture = sheet(tmp_path / "a.png", nats)
    zoom = round(192 / 20)
    heat = middles(picture, MARGIN + 20 * zoom + WITHIN, HEAD, zoom, 20).reshape(-1, 3)
    np.testing.assert_allclose(heat[0], (0xFD, 0xE7, 0x25), atol=3)
    assert len(np.unique(heat, axis=0)) > 150


NAMES = ("a" * 5000, "猫.jpg", "$x_1^", "a\tb\nc\x1b[31m", "\udc80", "", "W" * 90, "ordinary.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 8, 64])
def test_no_name_breaks_the_sheet_or_leaves_its_place(tmp_path, n):
    nats = np.ones((n, 4, 4))
    picture = sheet(tmp_path / "odd.png", nats, captions=list(NAMES * 8)[:n])
    plain = sheet(tmp_path / "plain.png", nats)
    assert picture.shape == plain.shape
    differ = (picture != plain).any(-1)
    columns, side = {1: (1, 480), 8: (2, 192), 64: (6, 128)}[n]
    pair = 2 * side + WITHIN
    may = np.zeros_like(differ)
    for i in range(n):
        x, y = MARGIN + i % columns * (pair + BETWEEN), HEAD + i // columns * (side + FOOT) + side
        may[y : y + FOOT, x : x + pair + 4] = True
        assert differ[y : y + FOOT, x : x + pair].any() == (NAMES[i % 8] != "")
    assert not differ[~may].any()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_sheet_is_written_whole(tmp_path, suffix):
    pixel_map_figure(np.zeros((1, 1, 1)), np.zeros((1, 1, 1, 3), np.uint8), ["x"], tmp_path / f"a.{suffix}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]


@pytest.mark.parametrize("n", [0, 65])
def test_a_sheet_holds_so_many(tmp_path, n):
    with pytest.raises(InputError, match="holds 1 to 64"):
        sheet(tmp_path / "a.png", np.zeros((n, 2, 2)))
    assert not list(tmp_path.iterdir())
