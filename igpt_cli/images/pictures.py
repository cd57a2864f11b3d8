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

#: Suffixes of pictures of whole pixels.
PIXELS = (".png", ".svg")


def save_picture(picture: Image.Image, path: Path | str, notes: Mapping[str, str] | None = None) -> None:
    """Write a picture as PNG, or as SVG that holds the PNG and draws its pixels as squares, by its suffix.

    Args:
        path: a .png or .svg file; an existing one is replaced.
        notes: {keyword: text} stored in the PNG and the SVG.

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
    metadata = escape("\n".join(f"{keyword}: {text}" for keyword, text in (notes or {}).items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<metadata>{metadata}</metadata>\n"
        f'<image width="{width}" height="{height}" style="image-rendering: pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(png).decode()}"/>\n</svg>\n'
    ).encode()
