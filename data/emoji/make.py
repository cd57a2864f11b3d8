"""Make emoji.zip, the embedded images, from two npm packages (README.md beside this file: source and licences).

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python data/emoji/make.py emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz

Each 64 x 64 drawing is laid over white and stored as `<split>/<group>/<name>-<set>.webp`. Drawings of
one character, and of its variants by gender and direction, are all in the same split: "woman running facing right"
in the test split would be no test of a model that was trained on "man running".
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

SETS = {"google": "noto", "twitter": "twemoji"}
TEST_PART = 0.2
#: In dB. From here on the eye sees no difference, and the file is a fifth smaller.
PSNR = 45.0
#: Joiners, signs of gender and direction, and the adults that professions are built from.
VARIANT = {"FE0F", "200D", "2640", "2642", "27A1", "1F468", "1F469", "1F9D1"}


def slug(text: str) -> str:
    """
    >>> slug("Smileys & Emotion"), slug("JAPANESE “HERE” BUTTON")
    ('smileys-emotion', 'japanese-here-button')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("’", "")).strip("-")


def base(unified: str) -> str:
    """The character of which `unified` (code points, joined by "-") is a variant."""
    codes = unified.split("-")
    return "-".join(c for c in codes if c not in VARIANT) or unified


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_bases(emoji: list[dict]) -> set[str]:
    """One character in five of every group, drawn by the hash of its code points."""
    groups = defaultdict(set)
    for e in emoji:
        groups[e["category"]].add(base(e["unified"]))
    chosen: set[str] = set()
    for bases in groups.values():
        chosen.update(sorted(bases, key=digest)[: round(TEST_PART * len(bases))])
    return chosen


def webp(png: bytes) -> bytes:
    """The drawing over white as lossless WebP, of 256 colours where these differ from all of them by `PSNR` or more."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    over_white = Image.new("RGBA", drawing.size, "white")
    over_white.alpha_composite(drawing)
    rgb = over_white.convert("RGB")
    few = rgb.quantize(256, kmeans=2, dither=Image.Dither.NONE).convert("RGB")
    error = np.mean((np.asarray(rgb, float) - np.asarray(few, float)) ** 2)
    out = io.BytesIO()
    (few if error <= 255**2 / 10 ** (PSNR / 10) else rgb).save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def main(archives: list[str]) -> None:
    files: dict[str, bytes] = {}
    for archive in archives:
        with tarfile.open(archive) as tar:
            members = {m.name: m for m in tar if m.isfile()}
            folder = next(s for s in SETS if f"package/img/{s}/64/2705.png" in members)
            emoji = json.load(tar.extractfile(members["package/emoji.json"]))
            emoji = [e for e in emoji if e["category"] != "Component" and e[f"has_img_{folder}"]]
            test = test_bases(emoji)
            for e in emoji:
                split = "test" if base(e["unified"]) in test else "train"
                name = slug(e["name"] or e["short_name"])
                path = f"{split}/{slug(e['category'])}/{name}-{SETS[folder]}.webp"
                if path in files:  # two characters of one name, such as the two of "couple with heart"
                    path = path.replace(name, f"{name}-{slug(e['short_name'])}")
                assert path not in files, path
                files[path] = webp(tar.extractfile(members[f"package/img/{folder}/64/{e['image']}"]).read())
    with zipfile.ZipFile(Path(__file__).with_name("emoji.zip"), "w") as out:
        for path in sorted(files, key=digest):  # shuffled, so that any first part is a fair sample
            out.writestr(zipfile.ZipInfo(path, (2024, 10, 1, 0, 0, 0)), files[path])


if __name__ == "__main__":
    main(sys.argv[1:])
