"""Every way in which pixels are stored becomes RGB; what cannot be read says why."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_samples import bomb, broken, drawing, encoded
from PIL import Image, ImageCms, ImageOps

from igpt_cli.images import decode
from igpt_cli.images.decode import BadImageError, header, load_rgb

RGB = drawing("triangle", 7)
GREY = RGB.convert("L")
SIZE = RGB.size


def loaded(image: Image.Image, suffix=".png", **options) -> np.ndarray:
    result = load_rgb(encoded(image, suffix, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


def over_white(rgba: Image.Image) -> np.ndarray:
    """The definition of laying over white, in floating point."""
    values = np.asarray(rgba).astype(float)
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


def grey(values) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def test_plain_modes():
    np.testing.assert_array_equal(loaded(RGB), np.asarray(RGB))
    np.testing.assert_array_equal(loaded(GREY), grey(GREY))
    bits = GREY.convert("1")
    np.testing.assert_array_equal(loaded(bits), grey(np.asarray(bits) * 255))
    few = RGB.quantize(16)
    np.testing.assert_array_equal(loaded(few), np.asarray(few.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_laid_over_white(suffix):
    image = RGB.copy()
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    got = loaded(image, suffix, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    assert np.abs(got - over_white(image)).max() <= 1
    if suffix == ".png":
        both = image.convert("LA")
        assert np.abs(loaded(both) - over_white(both.convert("RGBA"))).max() <= 1


def test_transparent_palette_colour_and_key_colours_become_white():
    few = RGB.quantize(8)
    key = few.getpixel((0, 0))
    got, plain = loaded(few, transparency=key), np.asarray(few.convert("RGB"))
    hidden = np.asarray(few) == key
    assert hidden.any()
    assert (got[hidden] == 255).all()
    np.testing.assert_array_equal(got[~hidden], plain[~hidden])
    got = loaded(few, ".gif", transparency=key)
    assert (got[hidden] == 255).all()
    colour = RGB.getpixel((5, 5))
    hidden = (np.asarray(RGB) == colour).all(-1)
    got = loaded(RGB, transparency=colour)
    assert (got[hidden] == 255).all()
    np.testing.assert_array_equal(got[~hidden], np.asarray(RGB)[~hidden])
    level = GREY.getpixel((5, 5))
    assert (loaded(GREY, transparency=level)[np.asarray(GREY) == level] == 255).all()


def test_grey_of_sixteen_bits_and_floating_point():
    values = np.linspace(0, 65535, 48 * 40).round().astype(np.uint16).reshape(40, 48)
    expected = grey(np.rint(values / 257).astype(np.uint8))
    np.testing.assert_array_equal(loaded(Image.fromarray(values)), expected)
    np.testing.assert_array_equal(loaded(Image.fromarray(values), ".tif"), expected)
    np.testing.assert_array_equal(loaded(Image.fromarray(values.astype(np.int32)), ".tif"), expected)
    for scale in (1.0, 255.0):
        floats = (values / 65535 * scale).astype(np.float32)
        np.testing.assert_array_equal(loaded(Image.fromarray(floats), ".tif"), expected)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[-1.0, 5.0]], np.float32), "floating-point values from -1 to 5; 0..1 or 0..255 can be read"),
        (np.array([[0.0, np.nan]], np.float32), "floating-point values from nan to nan"),
        (np.array([[0, 70000]], np.int32), "whole numbers from 0 to 70000; 0..65535 can be read"),
    ],
)
def test_values_without_a_known_range_are_not_guessed(values, reason):
    with pytest.raises(BadImageError, match=reason):
        load_rgb(encoded(Image.fromarray(values), ".tif"))


def test_cmyk():
    ink = RGB.convert("CMYK")
    marked = encoded(ink, ".jpg", quality=100, subsampling=0)
    assert b"Adobe" in marked
    assert np.abs(np.asarray(load_rgb(marked)).astype(int) - np.asarray(RGB)).max() <= 12
    # Without Adobe's mark the numbers are not inverted; Pillow always writes them inverted, so they are turned first.
    start = marked.index(b"\xff\xee")
    turned = encoded(Image.eval(ink, lambda v: 255 - v), ".jpg", quality=100, subsampling=0)
    start = turned.index(b"\xff\xee")
    plain = turned[:start] + turned[start + 16 :]
    assert b"Adobe" not in plain
    assert np.abs(np.asarray(load_rgb(plain)).astype(int) - np.asarray(RGB)).max() <= 12
    np.testing.assert_array_equal(loaded(ink, ".tif"), np.asarray(ink.convert("RGB")))


def test_rarer_modes():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(RGB, *profiles, outputMode="LAB")
    assert np.abs(loaded(lab, ".tif").astype(int) - np.asarray(RGB)).max() <= 8
    assert np.abs(loaded(RGB.convert("YCbCr"), ".tif").astype(int) - np.asarray(RGB)).max() <= 4
    image = RGB.copy()
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    for mode in ("PA", "La", "RGBa"):
        stored = image.convert("RGBa") if mode == "RGBa" else image.convert("LA").convert(mode)
        straight = {"PA": "LA", "La": "LA", "RGBa": "RGBA"}[mode]
        expected = over_white(stored.convert(straight).convert("RGBA"))
        assert np.abs(decode.to_rgb(stored) - expected).max() <= 1, mode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_is_that_of_pillow(orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, suffix, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_rgb(data)), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_knows_where_the_picture_ends_however_it_is_turned(orientation):
    """A white picture of 101 x 75: at a quarter the last column is filled by 1/4, the last row by 3/4."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.add.outer(np.linspace(0, 100, 75), np.linspace(0, 150, 101)).astype(np.uint8)
    data = encoded(Image.fromarray(ramp), ".jpg", exif=exif, quality=100)
    full, _ = decode.decode(data)
    small, box = decode.decode(data, least_side=15)
    assert sorted(small.size) == [19, 26]
    width, height = box[2] - box[0], box[3] - box[1]
    assert sorted((width, height)) == [75 / 4, 101 / 4]
    a = np.asarray(small.resize((8, 8), Image.Resampling.BICUBIC, box)).astype(int)
    b = np.asarray(full.resize((8, 8), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(a - b).mean() < 0.8


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_reduced_decoding_keeps_the_needed_side(width, height, least):
    image = load_rgb(encoded(Image.new("RGB", (width, height)), ".jpg"), least_side=least)
    assert min(image.size) >= min(least, width, height)
    assert np.abs(np.log(image.width / width * height / image.height)) < 1 / min(image.size)


REASONS = {
    "truncated.jpg": "Truncated File Read",
    "truncated.png": "image file is truncated",
    "empty.png": "empty file",
    "text.jpg": "not an image, or one that is broken from its first bytes on",
    "bomb.png": "more than 89,478,485 pixels; refused as a decompression bomb",
    "photo.heic": "a HEIC photo or a film; save it as JPEG or PNG first",
}


@pytest.mark.parametrize("name", REASONS)
def test_broken_samples_say_why(name, tmp_path):
    data = broken()[name]
    (tmp_path / name).write_bytes(data)
    for given_as in (data, tmp_path / name):
        with warnings.catch_warnings(record=True) as said, pytest.raises(BadImageError) as e:
            load_rgb(given_as)
        assert e.value.reason == REASONS[name] == str(e.value)
        assert not said


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bomb(12_000, 9_000), "more than 89,478,485 pixels"),  # Pillow itself would only warn
        (encoded(RGB, ".jpg")[:-200], "image file is truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript or PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (Path("no-such-file.jpg"), "No such file or directory"),
        (Path("."), "not a regular file"),
        (np.zeros((2, 2), np.uint8), "pixels are uint8 (2, 2), not uint8 (height, width, 3)"),
        (np.zeros((2, 2, 3), np.float32), "pixels are float32"),
        (np.zeros((0, 2, 3), np.uint8), "pixels are uint8 (0, 2, 3)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_read_says_why(data, reason):
    with pytest.raises(BadImageError) as e:
        load_rgb(data)
    assert reason in e.value.reason


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(513 * 2**20)  # a hole, no blocks
    with pytest.raises(BadImageError, match="a file of 513 MB; more than 512 MB is refused"):
        load_rgb(path)


@given(st.sampled_from([".png", ".jpg", ".gif", ".tif", ".webp", ".bmp"]), st.integers(0, 5000), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_damage_gives_an_image_or_a_reason(suffix, place, value):
    data = bytearray(encoded(RGB, suffix))
    data[place % len(data)] = value
    try:
        outcome = load_rgb(bytes(data), 8).mode
    except BadImageError as e:
        outcome = e.reason
    assert outcome


def test_a_header_is_read_alone():
    assert header(encoded(RGB, ".png")[:60]) == ("PNG", SIZE)
    assert header(np.zeros((4, 6, 3), np.uint8)) == ("pixels", (6, 4))
