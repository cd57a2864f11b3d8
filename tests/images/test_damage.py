"""Damage is detected where the format allows it, grey and alpha mean what the header says, and memory stays bounded."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from make_samples import drawing, encoded
from PIL import Image
from sklearn.datasets import load_sample_image

from igpt_cli.images.decode import BadImageError, _libtiff_heard, load_rgb
from igpt_cli.images.inspect import inspect
from igpt_cli.images.sources import open_source
from igpt_cli.images.transforms import Preparation, Preprocess, prepare

RGB = drawing("triangle", 7)
#: One way of writing each format that the reader accepts.
FORMATS: dict[str, tuple[str, dict]] = {
    "jpeg": (".jpg", {}),
    "png": (".png", {}),
    "gif": (".gif", {}),
    "bmp": (".bmp", {}),
    "dib": (".dib", {}),
    "tiff": (".tif", {}),
    "tiff-deflate": (".tif", {"compression": "tiff_deflate"}),
    "tiff-lzw": (".tif", {"compression": "tiff_lzw"}),
    "webp": (".webp", {"lossless": True}),
    "ppm": (".ppm", {}),
    "ico": (".ico", {"sizes": [(48, 40)]}),
    "pcx": (".pcx", {}),
    "sgi": (".sgi", {}),
    "jpeg2000": (".jp2", {}),
    "avif": (".avif", {}),
    "tga": (".tga", {}),
    "tga-rle": (".tga", {"compression": "tga_rle"}),
}


def file_of(kind: str, image: Image.Image = RGB) -> bytes:
    suffix, options = FORMATS[kind]
    if Image.registered_extensions()[suffix] not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    return encoded(image, suffix, **options)


def outcome(data: bytes) -> str:
    """ "ok" for pixels, or the reason why there are none; anything else is raised."""
    try:
        pixels = np.asarray(load_rgb(data))
    except BadImageError as e:
        return e.reason
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    return "ok"


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits_and_zeroed_blocks(kind):
    """An error or pixels; always an error in PNG, alone and in icons, where checksums cover everything."""
    data = file_of(kind)
    assert outcome(data) == "ok"
    rng = random.Random(kind)
    damaged = []
    for _ in range(40):
        flipped = bytearray(data)
        place = rng.randrange(8 * len(data))
        flipped[place // 8] ^= 1 << place % 8
        damaged.append((place // 8, bytes(flipped)))
    for size in (8, 64, len(data) // 4):
        for _ in range(4):
            place = rng.randrange(len(data))
            damaged.append((place, data[:place] + bytes(len(data[place : place + size])) + data[place + size :]))
    for place, each in damaged:
        result = outcome(each)
        if each != data and (kind == "png" or (kind == "ico" and place >= data.index(b"\x89PNG"))):
            assert result != "ok", place


def test_damaged_photos_are_named_wherever_they_are_read(tmp_path):
    """One bit of the pixels flipped, and a block of 4 KiB zeroed, in large PNGs without and with EXIF."""
    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((200, 160))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("plain", {}), ("exif", {"exif": exif})):
        data = encoded(photo, ".png", **options)
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        zeroed = data[:8192] + bytes(4096) + data[12288:]
        for kind, content in (("sound", data), ("flipped", bytes(flipped)), ("zeroed", zeroed)):
            (tmp_path / f"{name}-{kind}.png").write_bytes(content)
            assert (outcome(content) == "ok") == (kind == "sound")
            assert (outcome(tmp_path / f"{name}-{kind}.png") == "ok") == (kind == "sound")
    report = inspect(open_source([tmp_path]), check=True)
    assert [bad["name"] for bad in report.bad] == [
        f"{name}-{kind}.png" for name in ("exif", "plain") for kind in ("flipped", "zeroed")
    ]


def test_every_chunk_of_a_png_must_match_its_checksum():
    data = encoded(RGB, ".png")
    late = b"eXIf" + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    good = struct.pack(">I", len(late) - 4) + late + struct.pack(">I", zlib.crc32(late))
    assert load_rgb(data[:-12] + good + data[-12:]).size == RGB.size[::-1]  # behind the pixels
    bad = good[:30] + bytes([good[30] ^ 1]) + good[31:]
    assert outcome(data[:-12] + bad + data[-12:]) == "damaged: the PNG chunk 'eXIf' does not match its checksum"
    assert outcome(data[:-12]) == outcome(data[:-3]) == "image file is truncated"
    assert outcome(data + b"whatever follows") == "ok"
    assert outcome(data + data[:50]) == "ok"


# libtiff writes to stderr by itself.


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg", "group4"])
def test_what_libtiff_says_is_the_reason_and_not_on_stderr(capfd, compression):
    data = encoded(RGB.convert("1") if compression == "group4" else RGB, ".tif", compression=compression)
    rng = np.random.default_rng(0)
    said = set()
    for _ in range(40):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(8, len(data), 8)] = rng.integers(256, size=8)
        said.add(outcome(damaged.tobytes()))
    assert capfd.readouterr() == ("", "")
    # Of a fax libtiff leaves out the lines that it cannot read, and gives the rest as if all were well.
    assert any(re.match(r"damaged: (LZWDecode|ZIPDecode|JPEGLib|Fax4Decode): \w+", reason) for reason in said)
    assert not any("decoder error" in reason for reason in said)


def test_stderr_of_others_is_passed_on(capfd):
    with pytest.raises(BadImageError, match="^damaged: LZWDecode: Not enough data$"), _libtiff_heard():
        os.write(2, b"from another thread\nLZWDecode: Not enough data.\n")
        raise OSError("decoder error -2")
    with _libtiff_heard():
        os.write(2, b'TIFFFetchNormalTag: Incorrect count for "Software".\n')  # of no consequence for the pixels
    with pytest.raises(ValueError, match="^mine$"), _libtiff_heard():
        raise ValueError("mine")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "from another thread\nafterwards\n"


# Grey levels and alpha.


def tiff(
    pixels: bytes,
    size: tuple[int, int],
    photometric: int,
    bits: int,
    channels: int = 1,
    order: str = "<",
    planes: bool = False,
) -> bytes:
    """An uncompressed TIFF of one strip, or of one for each channel, written tag by tag."""
    n = channels if planes else 1
    start, (width, height) = 8 + 2 + 12 * 10 + 4, size
    depth, sizes = [bits] * channels, [len(pixels) // n] * n
    lists = 2 * channels * (channels > 2) + 8 * n * (n > 1)
    places = [start + lists + i * sizes[0] for i in range(n)]
    tags = {256: [width], 257: [height], 258: depth, 259: [1], 262: [photometric], 273: places}
    tags |= {277: [channels], 278: [height], 279: sizes, 284: [1 + planes]}
    entries = more = b""
    for tag, values in tags.items():
        kind = "H" if tag in (258, 284) else "L"
        value = struct.pack(f"{order}{len(values)}{kind}", *values).ljust(4, b"\0")
        if len(value) > 4:
            more, value = more + value, struct.pack(f"{order}L", start + len(more))
        entries += struct.pack(f"{order}HHL", tag, 3 if kind == "H" else 4, len(values)) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HLH", 42, 8, len(tags))
    return head + entries + bytes(4) + more + pixels


def twelve_bits(values: np.ndarray) -> bytes:
    """Two values in three bytes, the high bits first."""
    a, b = values.reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def test_grey_of_twelve_bits():
    values = np.linspace(0, 4095, 48 * 40).round().astype(int).reshape(40, 48)
    got = np.asarray(load_rgb(tiff(twelve_bits(values), (48, 40), photometric=1, bits=12)))
    np.testing.assert_array_equal(got, np.rint(values * 255 / 4095)[..., None].repeat(3, -1))


def test_white_is_zero():
    values = np.linspace(0, 65535, 48 * 40).round().astype(np.uint16).reshape(40, 48)
    expected = 255 - np.rint(values / 257)[..., None].repeat(3, -1)
    got = load_rgb(tiff(values.astype("<u2").tobytes(), (48, 40), photometric=0, bits=16))
    np.testing.assert_array_equal(np.asarray(got), expected)
    eight = (values >> 8).astype(np.uint8)
    got = load_rgb(tiff(eight.tobytes(), (48, 40), photometric=0, bits=8))
    np.testing.assert_array_equal(np.asarray(got), 255 - eight[..., None].repeat(3, -1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_may_store_channel_by_channel(bits, order):
    values = np.random.default_rng(bits).integers(0, 2**bits, (40, 48, 3))
    planes = values.transpose(2, 0, 1).astype(f"{order}u{bits // 8}").tobytes()
    got = load_rgb(tiff(planes, (48, 40), photometric=2, bits=bits, channels=3, order=order, planes=True))
    np.testing.assert_array_equal(np.asarray(got), values >> (bits - 8))


def test_32_bits_that_hold_8():
    values = np.linspace(0, 255, 48 * 40).round().astype(np.int32).reshape(40, 48)
    np.testing.assert_array_equal(
        np.asarray(load_rgb(encoded(Image.fromarray(values), ".tif"))), values[..., None].repeat(3, -1)
    )


@pytest.mark.parametrize(("bits", "kind"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_transparent_colour_of_a_png(bits, kind):
    """Of PNGs written bit by bit the pixels of the key become white, the others are scaled to 8 bits."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (40, 48, 1 + kind))
    bit = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(bit.reshape(40, -1), axis=1)
    key = values[0, 0]
    chunks = {
        b"IHDR": struct.pack(">LLBBBBB", 48, 40, bits, kind, 0, 0, 0),
        b"tRNS": key.astype(">u2").tobytes(),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)),
        b"IEND": b"",
    }
    data = b"".join(struct.pack(">L", len(d)) + k + d + struct.pack(">L", zlib.crc32(k + d)) for k, d in chunks.items())
    expected = np.repeat(values * 255 / (2**bits - 1), 3 - kind, -1)
    expected[(values == key).all(-1)] = 255
    assert np.abs(np.asarray(load_rgb(b"\x89PNG\r\n\x1a\n" + data)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            tiff(bytes(128), (4, 4), 5, 16, 4, planes=True),
            "a TIFF of 4 channels of 16 bits that cannot be read; save it as RGB or grey of 8 or 16 bits",
        ),
        (tiff(bytes(80), (4, 4), 1, 8, 5), "a TIFF of 5 channels of 8 bits that cannot be read; 1 to 4 can be read"),
        (tiff(bytes(240), (4, 4), 2, 16, 7), "a TIFF of 7 channels of 16 bits that cannot be read; 1 to 4 can be read"),
        (
            tiff(bytes(32), (4, 4), 0, 16, order=">"),
            "a TIFF of 1 channel of 16 bits that cannot be read; save it as RGB or grey of 8 or 16 bits",
        ),
    ],
)
def test_a_tiff_that_cannot_be_read_is_named(data, reason):
    assert outcome(data) == reason


def test_a_truncated_avif_is_no_heic():
    data = file_of("avif")
    assert outcome(data[: len(data) // 3]) == "an AVIF image that is broken or truncated"


def test_jpeg_2000_of_five_channels():
    data = bytearray(file_of("jpeg2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 40
    data[at : at + 2] = b"\0\5"
    assert outcome(bytes(data)) == "a JPEG 2000 image of 5 channels; 1 to 4 can be read"


def hidden(colours: Image.Image = RGB) -> Image.Image:
    image = colours.copy()
    image.putalpha(0)
    return image


def bitfields(image: Image.Image, masks: tuple[int, int, int, int]) -> bytes:
    """A BMP of 32 bits with a header of version 5 and these masks."""
    pixels = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes("raw", "BGRA")
    info = struct.pack("<LllHHLLllLL", 124, *image.size, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    info = (info + struct.pack("<4L", *masks)).ljust(124, b"\0")
    return b"BM" + struct.pack("<LLL", 14 + 124 + len(pixels), 0, 14 + 124) + info + pixels


COLOURS = (0xFF0000, 0xFF00, 0xFF)


def test_a_header_without_alpha_bits_is_believed():
    tga = bytearray(encoded(hidden(), ".tga"))
    assert tga[17] & 15 == 8
    tga[17] &= ~15
    grey = bytearray(encoded(hidden().convert("LA"), ".tga"))
    grey[17] &= ~15
    table = RGB.quantize(200).convert("RGB").quantize(200)
    mapped = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 200, 32, 0, 0, *RGB.size, 8, 0x20)
    mapped += b"".join(bytes([b, g, r, 0]) for r, g, b in np.reshape(table.getpalette("RGB"), (-1, 3)))
    mapped = mapped.ljust(18 + 800, b"\0") + table.tobytes()
    np.testing.assert_array_equal(np.asarray(load_rgb(mapped)), np.asarray(table.convert("RGB")))
    np.testing.assert_array_equal(np.asarray(load_rgb(bytes(tga))), np.asarray(RGB))
    np.testing.assert_array_equal(np.asarray(load_rgb(bytes(grey))), np.asarray(RGB.convert("L").convert("RGB")))
    for masks in ((*COLOURS, 0), (0, 0, 0, 0)):
        np.testing.assert_array_equal(np.asarray(load_rgb(bitfields(hidden(), masks))), np.asarray(RGB))


@pytest.mark.parametrize("kind", ["png", "webp", "tga", "bmp", "tiff"])
def test_a_picture_under_alpha_of_zero_is_not_made_white(kind):
    alpha = (*COLOURS, 0xFF000000)

    def written(image: Image.Image) -> bytes:
        exact = {"lossless": True, "exact": True} if kind == "webp" else {}
        return bitfields(image, alpha) if kind == "bmp" else encoded(image, FORMATS[kind][0], **exact)

    reason = "wholly transparent: alpha is 0 everywhere, over a picture; save it without alpha"
    assert outcome(written(hidden())) == reason
    if kind == "png":
        assert outcome(encoded(RGB.quantize(16), ".png", transparency=bytes(16))) == reason
    blank = hidden(Image.new("RGB", RGB.size, "red"))  # nothing is lost
    assert (np.asarray(load_rgb(written(blank))) == 255).all()
    seen = hidden()
    seen.putpixel((3, 4), (10, 20, 30, 255))
    got = np.asarray(load_rgb(written(seen)))
    assert got[4, 3].tolist() == [10, 20, 30]
    assert (got == 255).sum() == got.size - 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F", "CMYK", "P"])
def test_large_images_are_converted_in_tiles(mode, monkeypatch):
    rng = np.random.default_rng(0)
    if mode in ("I;16", "F"):
        pixels = rng.integers(0, 65536, (40, 48)).astype(np.uint16)
        image = Image.fromarray(pixels if mode == "I;16" else (pixels / 65535).astype(np.float32))
    else:
        image = RGB.convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(RGB.size))
        image = image.convert("RGB").quantize(8) if mode == "P" else image.convert(mode)
    data = encoded(image, ".tif")
    expected = np.asarray(load_rgb(data))
    monkeypatch.setattr("igpt_cli.images.decode.TILE", 17)
    np.testing.assert_array_equal(np.asarray(load_rgb(data)), expected)


# Memory.

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory in /proc")


def peak() -> int:
    """The most memory that this process took, in MB; `ru_maxrss` would include its parent's."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


@needs_proc
def test_a_thin_image_needs_little_memory_whatever_the_preparation():
    """The file that took 11.5 GB: 1 x 60,000 pixels in 312 bytes; a child process measures its own peak."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from images.test_damage import peak
        from igpt_cli.images.transforms import Preparation, Preprocess, prepare
        import io
        from PIL import Image
        ways = [Preparation(224, crop=0.9), Preparation(1024, crop=0.1), Preparation(224, crop=None)]
        ways += [Preprocess(32), Preprocess(64, views=2)]
        for size in ((1, 60_000), (60_000, 1), (1, 1_000_000)):
            out = io.BytesIO()
            Image.new("RGB", size, (10, 200, 30)).save(out, "PNG")
            for way in ways:
                pixels = prepare(out.getvalue(), way, "line.png")
                assert abs(pixels.astype(int) - (10, 200, 30)).max() == 0
        print(peak())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500


def test_the_crop_alone_is_that_of_the_whole_image(monkeypatch):
    photo = np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((300, 200)))
    for pixels in (photo, photo.transpose(1, 0, 2)):
        for way in (Preparation(64, crop=0.875), Preparation(224, crop=0.9), Preparation(32, crop=None)):
            whole = prepare(pixels, way, "x").astype(int)
            monkeypatch.setattr("igpt_cli.images.transforms.MOST_PIXELS", 0)
            alone = prepare(pixels, way, "x")
            monkeypatch.undo()
            assert np.abs(whole - alone).max() <= 3
            assert np.abs(whole - alone).mean() < 0.2


@pytest.mark.parametrize("kind", ["webp", "jpeg2000"])
def test_a_tiny_file_of_many_pixels_is_refused(kind, monkeypatch):
    monkeypatch.setattr("igpt_cli.images.decode.THIRSTY_PIXELS", 999_999)
    data = file_of(kind, Image.new("RGB", (1000, 1000)))
    assert outcome(data) == f"1,000,000 pixels in {len(data):,} bytes; refused as a decompression bomb"


def test_running_out_of_memory_names_the_image(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("igpt_cli.images.transforms.decode", full)
    for way in (Preprocess(32), Preparation(32)):
        with pytest.raises(MemoryError, match="the image cat/line.png does not fit"):
            prepare(b"", way, "cat/line.png")
