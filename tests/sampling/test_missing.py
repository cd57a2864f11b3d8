"""Which pixels are missing: rows, boxes, mask images; what nothing can be made of is refused with the numbers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_samples import broken
from PIL import Image, ImageDraw

from igpt_cli.errors import InputError
from igpt_cli.images.transforms import Preprocess, prepare
from igpt_cli.sampling.missing import box, keep_rows, mask_image, raster_prefix

# Rows.


@pytest.mark.parametrize(("part", "rows"), [(0, 0), (0.5, 16), (0.25, 8), (0.51, 16), (0.953125, 31), (0.015625, 1)])
def test_the_first_rows_are_kept(part, rows):
    """0.953125 * 32 = 30.5 and 0.015625 * 32 = 0.5: halves go up, where Python's round goes to the even row."""
    mask = keep_rows(32, part)
    assert mask.shape == (32, 32)
    assert mask.dtype == bool
    assert not mask[:rows].any()
    assert mask[rows:].all()


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (1, "1, outside 0 <= part < 1; at 1 every pixel is kept"),
        (1.5, "1.5, outside"),
        (-0.1, "-0.1, outside"),
        (float("nan"), "nan, outside"),
        (0.99, "0.99 of 32 rows rounds to all of them: nothing is missing; keep at most 0.96875"),
        (0.01, "0.01 of 32 rows rounds to none: nothing is kept; say 0, or 0.03125"),
    ],
)
def test_parts_that_leave_nothing_to_do_are_refused(part, told):
    with pytest.raises(InputError, match=re.escape(told)):
        keep_rows(32, part)


# Boxes.


@given(st.data())
def test_a_box_is_what_lies_in_it(data):
    R = data.draw(st.integers(1, 12))
    x, y = data.draw(st.integers(0, R - 1)), data.draw(st.integers(0, R - 1))
    w, h = data.draw(st.integers(1, R - x)), data.draw(st.integers(1, R - y))
    row, column = np.mgrid[:R, :R]
    inside = (x <= column) & (column < x + w) & (y <= row) & (row < y + h)
    np.testing.assert_array_equal(box(R, f"{x},{y},{w},{h}"), inside)


def test_blanks_after_commas_do_no_harm():
    np.testing.assert_array_equal(box(8, " 1, 2, 3, 4 "), box(8, "1,2,3,4"))


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1,2,3,4.5", "1;2;3;4", "1,2,,4"])
def test_malformed_boxes_are_refused_with_an_example(text):
    with pytest.raises(InputError, match=re.escape(f"{text!r} is no box") + ".*such as 8,8,16,16"):
        box(32, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0,0,0,4", "0 x 4 pixels: nothing is missing"),
        ("4,4,-2,4", "-2 x 4 pixels"),
        ("20,0,16,4", "columns 20..35 and rows 0..3; the model's images are 32 x 32"),
        ("-1,0,4,4", "columns -1..2"),
        ("0,32,1,1", "rows 32..32"),
    ],
)
def test_boxes_that_are_empty_or_outside_are_refused(text, told):
    with pytest.raises(InputError, match=re.escape(told)):
        box(32, text)


# Mask images.


@pytest.fixture
def hole() -> np.ndarray:
    return np.random.default_rng(0).random((8, 8)) < 0.4


def saved(path, image: Image.Image):
    image.save(path)
    return path


def white_where(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "RGBA", "I;16"])
def test_white_is_missing_and_black_is_kept(tmp_path, hole, mode):
    deep = Image.fromarray(np.where(hole, 65535, 0).astype(np.uint16))
    drawn = deep if mode == "I;16" else white_where(hole).convert(mode)
    np.testing.assert_array_equal(mask_image(saved(tmp_path / "mask.png", drawn), 8), hole)


def test_transparent_is_missing_too(tmp_path, hole):
    drawn = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    drawn.putalpha(white_where(~hole))
    np.testing.assert_array_equal(mask_image(saved(tmp_path / "mask.png", drawn), 8), hole)


@pytest.mark.parametrize("zoom", [2, 7, 64])
def test_a_larger_mask_is_averaged(tmp_path, hole, zoom):
    large = white_where(hole).resize((8 * zoom, 8 * zoom), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(mask_image(saved(tmp_path / "mask.png", large), 8), hole)


def test_a_smaller_mask_is_enlarged(tmp_path, hole):
    got = mask_image(saved(tmp_path / "mask.png", white_where(hole)), 32)
    np.testing.assert_array_equal(got, hole.repeat(4, 0).repeat(4, 1))


def test_a_pixel_is_missing_from_half_on(tmp_path):
    quarters = np.zeros((4, 4), bool)
    quarters[0, 0] = quarters[0, 2:] = quarters[2:, 2:] = True  # 1, 2, 0 and 4 of 4
    got = mask_image(saved(tmp_path / "mask.png", white_where(quarters)), 2)
    assert got.tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("size", [(300, 200), (200, 333), (640, 480)])
def test_a_mask_lies_where_it_was_painted_over_a_photograph(tmp_path, size):
    """The same drawing, prepared as a photograph is, is white where the mask says missing, up to blurred edges."""
    drawn = Image.new("L", size)
    ImageDraw.Draw(drawn).ellipse((size[0] * 0.3, size[1] * 0.2, size[0] * 0.6, size[1] * 0.7), fill=255)
    path = saved(tmp_path / "mask.png", drawn)
    image = prepare(path, Preprocess(32), "mask")[..., 0]
    mask = mask_image(path, 32)
    assert mask[image > 200].all()
    assert not mask[image < 55].any()
    assert 50 < mask.sum() < 600


def test_all_white_leaves_everything_missing(tmp_path):
    assert mask_image(saved(tmp_path / "mask.png", Image.new("L", (8, 8), 255)), 8).all()


def test_masks_without_white_are_refused(tmp_path):
    path = saved(tmp_path / "mask.png", Image.new("RGB", (60, 60), (255, 0, 0)))
    with pytest.raises(InputError, match=r"mask.png leaves nothing missing.*is 76 of 255.*white or transparent = mis"):
        mask_image(path, 8)


def test_what_is_no_image_is_refused_by_name(tmp_path):
    hostile = broken()
    del hostile["good.jpg"]
    assert {"bomb.png", "truncated.png"} < hostile.keys()
    for name, data in hostile.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}, given as a mask image, cannot be read: "):
            mask_image(tmp_path / name, 8)
    with pytest.raises(InputError, match="none.png does not exist; a mask image was expected"):
        mask_image(tmp_path / "none.png", 8)


# The raster prefix.


def test_rows_are_a_prefix_and_boxes_mostly_not():
    assert raster_prefix(keep_rows(32, 0.5)) == 512
    assert raster_prefix(keep_rows(32, 0)) == 0
    assert raster_prefix(np.zeros((4, 4), bool)) == 16
    assert raster_prefix(box(8, "2,2,3,3")) is None
    assert raster_prefix(box(8, "0,6,8,2")) == 48
    assert raster_prefix(box(8, "3,7,5,1")) == 59


@given(st.integers(1, 6), st.data())
def test_the_prefix_by_its_definition(R, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=R * R, max_size=R * R))).reshape(R, R)
    prefixes = [k for k in range(R * R + 1) if (mask.reshape(-1) == (np.arange(R * R) >= k)).all()]
    assert raster_prefix(mask) == (prefixes[0] if prefixes else None)
