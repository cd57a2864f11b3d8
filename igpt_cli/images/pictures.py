"""Pixel pictures as files: PNG, or SVG with an embedded PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from igpt_cli.errors import InputError
from igpt_cli.files import replacing

#: What a picture of whole pixels can be written as.
PIXELS = (".png", ".svg")


def save_picture(picture: Image.Image, path: Path | str, notes: Mapping[str, str] | None = None) -> None:
    """Write a picture as its name says, whole or not at all.

    An SVG file holds the picture as PNG, whose pixels stay squares however large it is drawn.

    Args:
        path: a .png or .svg file; what is there is replaced.
        notes: {keyword: text} that the PNG carries, in an SVG file, too.

    Raises:
        InputError: another kind of file.
        OutputError: the place cannot be written.
    """
    path, info = Path(path), PngInfo()
    if path.suffix.lower() not in PIXELS:
        raise InputError(f"{path} ends in {path.suffix!r}; a {' or '.join(PIXELS)} file is written")
    for keyword, text in (notes or {}).items():
        info.add_text(keyword, text)
    with replacing(path) as part:
        png = io.BytesIO()
        picture.save(png, "PNG", pnginfo=info)
        part.write_bytes(png.getvalue() if path.suffix.lower() == ".png" else _svg(png.getvalue(), picture.size, notes))


def _svg(png: bytes, size: tuple[int, int], notes: Mapping[str, str] | None) -> bytes:
    width, height = size
    told = escape("\n".join(f"{keyword}: {text}" for keyword, text in (notes or {}).items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<metadata>{told}</metadata>\n"
        f'<image width="{width}" height="{height}" style="image-rendering: pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(png).decode()}"/>\n</svg>\n'
    ).encode()
