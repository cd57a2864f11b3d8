"""Guess what a file is that Pillow cannot open."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO

from PIL import TiffImagePlugin


def what_instead(data: Path | bytes) -> str:
    """The kind of a file that is no image, for the message."""
    with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as file:
        head = file.read(4096)
        if head.startswith((b"II", b"MM")) and (layout := _tiff_layout(file)):
            return layout
    siz = head.find(b"\xff\x4f\xff\x51")  # of JPEG 2000: sizes and number of channels
    if siz >= 0 and (channels := int.from_bytes(head[siz + 40 : siz + 42], "big")) > 4:
        return f"a JPEG 2000 image of {channels} channels; 1 to 4 can be read"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "an AVIF image that is broken or truncated"
    if head[4:8] == b"ftyp":
        return "a HEIC photo or a film; save it as JPEG or PNG first"
    if head.startswith((b"%!PS", b"%PDF")):
        return "a PostScript or PDF document; save it as PNG first"
    if head.lstrip().startswith((b"<svg", b"<?xml")):
        return "an SVG drawing or XML; save it as PNG first"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not an image"
    return "not an image, or one that is broken from its first bytes on"


def _tiff_layout(file: IO[bytes]) -> str:
    """The layout of a TIFF for which Pillow has no mode; "" if its tags cannot be read."""
    file.seek(0)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        channels = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        if TiffImagePlugin.IMAGEWIDTH in tags and TiffImagePlugin.IMAGELENGTH in tags:
            limit = "1 to 4 can be read" if channels > 4 else "save it as RGB or grey of 8 or 16 bits"
            return f"a TIFF of {channels} channel{'s' * (channels != 1)} of {bits} bits that cannot be read; {limit}"
    return ""
