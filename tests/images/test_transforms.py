"""Preparation: the paper's steps against Pillow's own, step by step."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_samples import drawing, encoded
from PIL import Image
from sklearn.datasets import load_sample_image

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.transforms import Preprocess, crop_box, load_rgb, prepare, prepare_views, random_draws

BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((600, 400), Image.Resampling.LANCZOS)


def psnr(a, b) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def paper(image: Image.Image, resolution: int, short=224, left=None, top=None) -> np.ndarray:
    """Short side to `short`, crop 224, then to R: each step on its own, in whole pixels."""
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)
    left = (image.width - 224) // 2 if left is None else left
    top = (image.height - 224) // 2 if top is None else top
    return np.asarray(image.crop((left, top, left + 224, top + 224)).resize((resolution,) * 2, BICUBIC))


@pytest.mark.parametrize("resolution", [32, 48, 64])
@pytest.mark.parametrize("turned", [False, True])
def test_evaluation_follows_the_paper(photo, resolution, turned):
    image = photo.resize((1650, 1100), Image.Resampling.LANCZOS)  # more than 16 times the resolution
    image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
    expected = paper(image, resolution)
    exact = prepare(encoded(image, ".png"), Preprocess(resolution), "x")
    assert exact.shape == (resolution, resolution, 3)
    assert psnr(exact, expected) > 50
    jpeg = encoded(image, ".jpg", quality=95)
    full = prepare(jpeg, Preprocess(resolution, exact_decode=True), "x")
    assert psnr(full, paper(load_rgb(jpeg), resolution)) > 50
    reduced = prepare(jpeg, Preprocess(resolution), "x")
    assert psnr(reduced, full) > 50
    assert (reduced != full).any()


@pytest.mark.parametrize("resolution", [32, 48, 64])
def test_a_jpeg_is_reduced_from_sixteen_times_the_resolution_on(photo, resolution):
    for side, differs in ((16 * resolution - 8, False), (16 * resolution, True)):
        jpeg = encoded(photo.resize((side + 40, side)), ".jpg", quality=95)
        full = prepare(jpeg, Preprocess(resolution, exact_decode=True), "x")
        assert (prepare(jpeg, Preprocess(resolution), "x") != full).any() == differs
    jpeg = encoded(photo.resize((150, 150)), ".jpg", quality=95)
    exact = prepare(jpeg, Preprocess(resolution, exact_decode=True), "x")
    np.testing.assert_array_equal(prepare(jpeg, Preprocess(resolution), "x"), exact)


def test_a_training_view_follows_the_paper(photo):
    for view in range(3):
        length, across, down = random_draws(5, "name", view)
        wide = round(600 * length / 400)
        expected = paper(photo, 32, length, round(across * (wide - 224)), round(down * (length - 224)))
        got = prepare(encoded(photo, ".png"), Preprocess(32, views=3, seed=5), "name", view)
        assert psnr(got, expected) > 35  # the crop of the definition begins at a whole pixel
        jpeg = encoded(photo, ".jpg", quality=95)
        exact = prepare(jpeg, Preprocess(32, views=3, seed=5, exact_decode=True), "name", view)
        assert psnr(prepare(jpeg, Preprocess(32, views=3, seed=5), "name", view), exact) > 44


def test_draws_cover_their_range_evenly_and_are_a_pure_function():
    draws = np.array([random_draws(0, f"{i}.jpg", 0) for i in range(4000)])
    assert (draws[:, 0].min(), draws[:, 0].max()) == (256, 384)
    assert abs(draws[:, 0].mean() - 320) < 3
    assert np.abs(draws[:, 1:].mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.06
    # Frozen: token files made by an earlier version can be made again.
    assert random_draws(0, "train/cat/0001.jpg", 1) == (355, 0.9926837701843966, 0.10704594423205727)
    assert len({random_draws(s, n, v) for s in (0, 1) for n in ("a", "b") for v in (0, 1)}) == 8


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_crop_is_a_square_inside_the_picture(width, height, seed):
    for draws in (None, random_draws(seed, "n", 0)):
        left, top, right, bottom = crop_box((0, 0, width, height), draws)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        share = 1 if draws is None else 224 / draws[0]
        assert right - left == pytest.approx(min(width, height) * share)
        assert bottom - top == pytest.approx(right - left)
    assert sum(crop_box((0, 0, width, height), None)) == pytest.approx(width + height)  # in the middle


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([8, 32, 48]),
    st.integers(0, 2),
    st.sampled_from([".png", ".jpg", ".gif"]),
    st.tuples(*[st.integers(0, 255)] * 3),
)
@settings(max_examples=30, deadline=None)
def test_any_image_gives_valid_pixels_and_a_plain_one_stays_plain(width, height, R, views, suffix, colour):
    data = encoded(Image.new("RGB", (width, height), colour), suffix)
    out = prepare(data, Preprocess(R, views), "name", 0)
    assert (out.shape, out.dtype) == ((R, R, 3), np.uint8)
    assert np.abs(out.astype(int) - np.asarray(load_rgb(data))[0, 0]).max() <= 1
    np.testing.assert_array_equal(out, prepare(data, Preprocess(R, views), "name", 0))


@pytest.mark.parametrize("views", [0, 3])
def test_an_image_of_the_right_size_is_not_touched(views):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for data in (pixels, encoded(Image.fromarray(pixels), ".png")):
        np.testing.assert_array_equal(prepare(data, Preprocess(32, views), "x", 2), pixels)


def test_a_small_image_goes_straight_to_its_size():
    image = drawing("disc", 3, (96, 96))
    expected = np.asarray(image.resize((32, 32), BICUBIC))
    np.testing.assert_array_equal(prepare(np.asarray(image), Preprocess(), "x"), expected)


def test_bytes_file_and_pixels_agree(tmp_path):
    image = drawing("disc", 3, (90, 70))
    (tmp_path / "x.png").write_bytes(encoded(image, ".png"))
    forms = [np.asarray(image), encoded(image, ".png"), tmp_path / "x.png"]
    a, b, c = (prepare(form, Preprocess(16, views=1), "x", 0) for form in forms)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_views_differ_by_view_name_and_seed():
    image = encoded(drawing("square", 3, (300, 260)), ".png")
    views = {
        prepare(image, Preprocess(16, views=2, seed=seed), name, view).tobytes()
        for seed in (0, 1)
        for name in "ab"
        for view in (0, 1)
    }
    assert len(views) == 8


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_all_views_at_once_are_the_views_one_by_one(photo, suffix):
    data = encoded(photo, suffix)
    for views in (0, 1, 4):
        settings = Preprocess(32, views, seed=2)
        one_by_one = [prepare(data, settings, "n", v) for v in range(max(1, views))]
        np.testing.assert_array_equal(prepare_views(data, settings, "n"), np.stack(one_by_one))
    few, many = (prepare_views(data, Preprocess(32, views), "n") for views in (2, 5))
    np.testing.assert_array_equal(few, many[:2])


def test_a_thin_image_takes_no_memory_for_its_length():
    import tracemalloc

    thin = Image.new("RGB", (20_000, 1))
    tracemalloc.start()
    prepare(np.asarray(thin), Preprocess(32, exact_decode=True), "x")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_settings_survive_json():
    settings = Preprocess(48, views=4, seed=9, exact_decode=True)
    stored = json.loads(json.dumps(settings.to_dict()))
    assert Preprocess.from_dict(stored) == settings
    assert stored["filter"] == "bicubic"
    assert stored["short_side"] == [256, 384]
    import PIL

    assert stored["pillow"] == PIL.__version__


@pytest.mark.parametrize("change", [{"resolution": "32"}, {"views": None}, {"seed": 1.5}, {"exact_decode": 1}])
def test_damaged_settings_are_refused(change):
    name = next(iter(change))
    with pytest.raises(FormatError, match=f"has no valid '{name}'"):
        Preprocess.from_dict(Preprocess().to_dict() | change)


@pytest.mark.parametrize(("settings", "message"), [((0,), "resolution 0"), ((225,), "1..224"), ((32, -1), "negative")])
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        Preprocess(*settings)
