"""Pictures of whole pixels as files."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from igpt_cli.errors import InputError
from igpt_cli.images.pictures import save_picture

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
SVG = "{http://www.w3.org/2000/svg}"


def test_an_svg_holds_the_png_and_its_notes(tmp_path):
    notes = {"Software": "igpt", "igpt": '{"name": "<a> & b"}'}
    save_picture(PICTURE, tmp_path / "a.png", notes)
    save_picture(PICTURE, tmp_path / "a.SVG", notes)
    with Image.open(tmp_path / "a.png") as png:
        assert (png.size, png.tobytes(), png.info["igpt"]) == (PICTURE.size, PICTURE.tobytes(), notes["igpt"])
    root = ElementTree.parse(tmp_path / "a.SVG").getroot()
    assert (root.tag, root.get("width"), root.get("height"), root.get("viewBox")) == (f"{SVG}svg", "9", "6", "0 0 9 6")
    assert root.findtext(f"{SVG}metadata") == 'Software: igpt\nigpt: {"name": "<a> & b"}'
    image = root.find(f"{SVG}image")
    assert (image.get("width"), image.get("height"), image.get("style")) == ("9", "6", "image-rendering: pixelated")
    kind, _, held = image.get("href").partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(held) == (tmp_path / "a.png").read_bytes()
    with Image.open(io.BytesIO(base64.b64decode(held))) as inside:
        assert inside.tobytes() == PICTURE.tobytes()


def test_other_kinds_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"a\.jpg ends in '\.jpg'; a \.png or \.svg file is written"):
        save_picture(PICTURE, tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())
