"""Decode a file, bytes or pixels to an RGB image, or say why not."""

from __future__ import annotations

import io
import os
import re
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from igpt_cli.errors import InputError
from igpt_cli.files import reason
from igpt_cli.images.instead import what_instead
from igpt_cli.images.records import LARGEST_IMAGE, Refused

#: The decoders that are used. EPS, PDF, WMF and the like are programs or run others, and are excluded.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "ICO", "PCX", "SGI", "JPEG2000", "AVIF", "TGA"),
)

#: Decoders that take 20 bytes a pixel or more: a file of more than `THIRSTY_PIXELS` needs a byte for each 1,000 pixels.
THIRSTY = ("WEBP", "AVIF", "JPEG2000")
THIRSTY_PIXELS = 2**25
#: Colours are converted in squares of this side, since a conversion takes several times the pixels' memory.
TILE = 2048
#: libtiff's messages on stderr: a function or the file, then the problem.
LIBTIFF = re.compile(rb"[\w.]*: .+\.\n")
_STDERR = threading.Lock()
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

#: EXIF orientations 2..8: the transposition, and whether it moves the right edge to the left, the bottom to the top.
ORIENTATIONS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}

#: (left, top, right, bottom) in pixels, not necessarily whole.
Box = tuple[float, float, float, float]


class BadImageError(InputError):
    """An image that cannot be read: broken, truncated, empty, no image, or absurdly large; `reason` says which."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self):
        return BadImageError, (self.reason,)


def load_rgb(data: Path | bytes | np.ndarray, least_side: int | None = None) -> Image.Image:
    """Decode one image to mode RGB.

    EXIF orientation is applied, transparency composited over white, grey of 12 and 16 bits scaled to 0..255, and CMYK
    inverted if Adobe's marker is there. Colour profiles are ignored. The first of several frames is decoded.

    Args:
        data: a file, encoded bytes, or pixels (H, W, 3) uint8.
        least_side: pixels that both sides must keep when a JPEG is decoded at a half, a quarter or an eighth of its
            size; None decodes it in full.

    Raises:
        BadImageError: with the reason.
    """
    return decode(data, least_side)[0]


def decode(data: Path | bytes | np.ndarray, least_side: int | None = None) -> tuple[Image.Image, Box]:
    """Like `load_rgb`, with the box that the picture fills: the whole image, except for a JPEG decoded at a reduced
    scale, where 375 rows become 94 and the box ends at 93.75."""
    if isinstance(data, np.ndarray):
        return _from_pixels(data)
    with opened(data) as image:
        width, height = image.size
        box = None
        if least_side and image.format in ("JPEG", "MPO"):
            box = image.draft(None, (least_side, least_side))
        pixels = load(image)
        orientation = _orientation(image)
        rgb = to_rgb(pixels)
    del image, pixels  # turning takes as much memory again
    return _turn(rgb, box[1][2:] if box else (width, height), orientation)


@contextmanager
def opened(data: Path | bytes) -> Iterator[Image.Image]:
    """The image with its header read. Errors then, or in the block, become a `BadImageError`."""
    if isinstance(data, Refused):
        raise BadImageError(data.reason)
    try:
        if isinstance(data, Path) and not data.is_file() and data.exists():
            raise BadImageError("not a regular file")  # opening a pipe would wait for ever
        with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as file:
            size = file.seek(0, io.SEEK_END)
            if not size:
                raise BadImageError("empty file")
            if size > LARGEST_IMAGE:
                limit = f"more than {LARGEST_IMAGE // 2**20} MB is refused"
                raise BadImageError(f"a file of {size / 2**20:,.0f} MB; {limit}")
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # remarks on damaged tags are no business of the reader's
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file, formats=_formats())
                if not all(image.size):
                    raise BadImageError(f"an image of {image.width} x {image.height} pixels")
                pixels = image.width * image.height
                if image.format in THIRSTY and pixels > max(THIRSTY_PIXELS, 1000 * size):
                    raise BadImageError(f"{pixels:,} pixels in {size:,} bytes; refused as a decompression bomb")
                yield image
    except (BadImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; refused as a decompression bomb") from None
    except UnidentifiedImageError:
        raise BadImageError(what_instead(data)) from None
    except OSError as e:
        raise BadImageError(reason(e)) from e
    except Exception as e:  # whatever a decoder stumbles over, the image is what is wrong
        unknown = "unknown raw mode" in str(e)  # Pillow knows how to open it, and not how to read it
        raise BadImageError(what_instead(data) if unknown else f"broken image ({type(e).__name__}: {e})") from e


def header(data: Path | bytes | np.ndarray) -> tuple[str, tuple[int, int]]:
    """File type, such as "JPEG", and (width, height) as stored, before any EXIF orientation; nothing is decoded.

    Raises:
        BadImageError: with the reason.
    """
    if isinstance(data, np.ndarray):
        return "pixels", _from_pixels(data)[0].size
    with opened(data) as image:
        return image.format or "", image.size


def load(image: Image.Image) -> Image.Image:
    """The pixels of an image from `opened`, without the alpha channel if a TGA's or BMP's header says it has none.

    The transparent colour of a PNG is scaled to 8 bits as its pixels are. Load the image here first: a second `load` of
    a damaged one succeeds with black pixels, and Pillow's `getexif` loads PNGs.
    """
    file = image.fp  # type: ignore[attr-defined]
    at = file.tell()
    file.seek(0)
    head = file.read(70)
    file.seek(at)
    if image.format == "TIFF" and set(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ())) == {16}:  # type: ignore[attr-defined]
        end = ";16B" if head.startswith(b"MM") else ";16L"
        image.tile = [_plane_of_16_bits(tile, end) for tile in image.tile]  # type: ignore[attr-defined]
    by_libtiff = any(tile.codec_name == "libtiff" for tile in image.tile)  # type: ignore[attr-defined]
    with _libtiff_heard() if by_libtiff else nullcontext():
        image.load()
    if image.format in ("PNG", "ICO"):
        _check_pngs(file)
    if image.has_transparency_data and not _has_alpha_bits(image.format, head):
        return image.convert("RGB")
    see_through = image.info.get("transparency")
    if image.format == "PNG" and isinstance(see_through, tuple) and head[24] == 16:
        image.info["transparency"] = tuple(value >> 8 for value in see_through)
    elif image.format == "PNG" and image.mode == "L" and isinstance(see_through, int) and head[24] < 8:
        image.info["transparency"] = see_through * 255 // (2 ** head[24] - 1)
    return image


@contextmanager
def _libtiff_heard() -> Iterator[None]:
    """Make libtiff's messages on stderr in this block the reason why the image cannot be read.

    An image whose pixels it failed to decode is refused, too: it is partly wrong. Other output to stderr is passed on.
    """
    with _STDERR, tempfile.TemporaryFile() as file:
        try:
            stderr = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        os.dup2(file.fileno(), 2)
        failed = None
        try:
            yield
        except Exception as e:
            failed = e
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        messages = []
        for line in file:
            if LIBTIFF.fullmatch(line):
                messages.append(line.decode(errors="replace").strip(": .\n"))
            else:
                os.write(2, line)
        if messages and (failed or any("Decode: " in line for line in messages)):
            raise BadImageError(f"damaged: {messages[-1]}") from failed
        if failed:
            raise failed


def _plane_of_16_bits(tile: Any, end: str) -> Any:
    """A plane of a TIFF stored channel by channel, read as 16 bits where Pillow would read 8."""
    raw = tile.args[0] if tile.codec_name == "raw" else ""
    return tile._replace(args=(raw + end, *tile.args[1:])) if len(raw) == 1 and raw in "RGBACMYK" else tile


def _check_pngs(file: IO[bytes]) -> None:
    """Check the CRC of all chunks of a PNG, or of the PNGs in an icon; Pillow skips those of pixels."""
    file.seek(0)
    content = file.read()
    for signature in re.finditer(re.escape(PNG_SIGNATURE), content):
        at, kind = signature.end(), b""
        while kind != b"IEND":
            length, kind = struct.unpack_from(">I4s", content, at) if at + 12 <= len(content) else (len(content), b"")
            end = at + 8 + length
            if end + 4 > len(content):
                raise BadImageError("image file is truncated")
            if zlib.crc32(memoryview(content)[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
                raise BadImageError(f"damaged: the PNG chunk {kind.decode('latin-1')!r} does not match its checksum")
            at = end + 4
        if content.startswith(PNG_SIGNATURE):  # what lies behind a PNG is no part of it
            return


def _has_alpha_bits(kind: str | None, head: bytes) -> bool:
    """Whether the header says that the fourth channel is alpha, which Pillow does not check."""
    if kind == "TGA":
        return bool(head[17] & 15)
    if kind in ("BMP", "DIB"):
        header = head[14:] if kind == "BMP" else head
        return header[0] >= 56 and any(header[52:56])
    return True


def _from_pixels(pixels: np.ndarray) -> tuple[Image.Image, Box]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise BadImageError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (height, width, 3)")
    height, width, _ = pixels.shape
    return Image.fromarray(np.ascontiguousarray(pixels)), (0, 0, width, height)


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 if there is no readable one, or for a TIFF, which Pillow turns itself."""
    if image.format == "TIFF" or (image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys()):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return found if found in ORIENTATIONS else 1


def _turn(image: Image.Image, filled: tuple[float, float], orientation: int) -> tuple[Image.Image, Box]:
    """Apply an EXIF orientation to an image whose picture fills (width, height); return its box, too."""
    width, height = filled
    if orientation == 1:
        return image, (0, 0, width, height)
    transposition, at_left, at_top = ORIENTATIONS[orientation]
    image = image.transpose(transposition)
    if orientation >= 5:
        width, height = height, width
    left = image.width - width if at_left else 0
    top = image.height - height if at_top else 0
    return image, (left, top, left + width, top + height)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, transparency over white."""
    image.load()
    many_bits = image.mode.startswith("I;16") or image.mode in ("I", "F")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data and not many_bits and _hides_a_picture(image):
        raise BadImageError("wholly transparent: alpha is 0 everywhere, over a picture; save it without alpha")
    # Pillow reads every CMYK JPEG as Adobe writes it, inverted; without Adobe's mark it is not.
    inverted = image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info
    convert = _many_bits(image) if many_bits else lambda tile: _tile_to_rgb(tile, inverted)
    if max(image.size) <= TILE:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for at, tile in _tiles(image):
        rgb.paste(convert(tile), at)
    return rgb


def _hides_a_picture(image: Image.Image) -> bool:
    """Whether alpha is 0 everywhere, and the colours below it are more than one."""
    colours: set[object] = set()
    for _, tile in _tiles(image):
        *bands, alpha = (tile.convert("LA") if tile.mode == "La" else tile).convert("RGBA").getextrema()
        if alpha != (0, 0):
            return False
        colours.update(zip(*bands))  # the darkest and the lightest
    return len(colours) > 1


def _tiles(image: Image.Image) -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """Each square of the image, with its left and top."""
    for top in range(0, image.height, TILE):
        for left in range(0, image.width, TILE):
            yield (left, top), image.crop((left, top, min(left + TILE, image.width), min(top + TILE, image.height)))


def _tile_to_rgb(image: Image.Image, inverted: bool) -> Image.Image:
    """A part of an image of up to 8 bits a channel as RGB."""
    if image.mode == "La":  # which Pillow turns into LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    if inverted:
        image = Image.eval(image, lambda v: 255 - v)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    return image.convert("RGB")


def _many_bits(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that converts parts of a grey image of 12, 16 or 32 bits or floating point to RGB.

    White is 65535 for whole numbers (4095 in a TIFF of 12 bits, 255 in one of 32 bits up to 255), and for floating
    point 1 if no value exceeds 1, else 255.
    """
    ends = [(values.min(), values.max()) for values in (np.asarray(tile) for _, tile in _tiles(image))]
    low, high = np.min(ends), np.max(ends)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 255):
            raise BadImageError(f"floating-point values from {low:g} to {high:g}; 0..1 or 0..255 can be read")
        white = 1 if high <= 1 else 255
    elif low < 0 or high > 65535:
        raise BadImageError(f"whole numbers from {low} to {high}; 0..65535 can be read")
    else:
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE)
        white = 4095 if bits == (12,) else 255 if bits == (32,) and high <= 255 else 65535
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0

    def convert(tile: Image.Image) -> Image.Image:
        values = np.asarray(tile)
        grey = np.rint(values * (255.0 / white)).astype(np.uint8)
        if white_is_zero:
            grey = 255 - grey
        if isinstance(see_through := image.info.get("transparency"), int):
            grey[values == see_through] = 255
        return Image.fromarray(grey).convert("RGB")

    return convert
