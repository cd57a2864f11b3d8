"""Mutated image files, seeded: our error or a valid image, within 10 seconds and 1 GB; nothing else.

By default a few hundred files in seconds; `pytest -m slow tests/images/test_fuzz_images.py` tries many more.
"""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from images.test_damage import FORMATS, needs_proc
from make_samples import broken, drawing, modes
from PIL import Image

from igpt_cli.errors import IgptError
from igpt_cli.images.transforms import Preparation, Preprocess, prepare

#: Numbers that headers get wrong: signs, overflow, off by one, very large.
NUMBERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 9_400, 0x7FFFFFFF, 0xFFFFFFFF)
WAYS = (Preprocess(16), Preprocess(16, views=1), Preparation(16, crop=0.9), Preparation(16, crop=None))
SECONDS, MEGABYTES = 10, 1000


def seeds() -> list[bytes]:
    """Small files of every format and mode."""
    images = [drawing("disc", 1, (24, 20)), drawing("square", 2, (9, 13)).quantize(8)]
    images[1].info["transparency"] = 0
    files = [*modes().values(), *broken().values()]
    for image in images:
        for suffix, options in FORMATS.values():
            out = io.BytesIO()
            picture = image.convert("RGB") if suffix in (".jpg", ".jp2", ".avif", ".webp", ".ppm") else image
            try:
                picture.save(out, Image.registered_extensions()[suffix], **options)
            except (KeyError, OSError, ValueError):  # this Pillow writes no such file
                continue
            files.append(out.getvalue())
    return [data for data in files if data]


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers, blocks zeroed, removed, doubled or taken from another file."""
    out = bytearray(data)
    head = min(len(out), 128)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = rng.randrange(min(len(out), head) if rng.random() < 0.6 else len(out))
        size = min(len(out) - at, rng.choice((1, 2, 4, 16, 64, 512)))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            number, order = rng.choice(NUMBERS), rng.choice("<>")
            packed = struct.pack(f"{order}L", number) if number > 0xFFFF or rng.random() < 0.5 else b""
            packed = packed or struct.pack(f"{order}H", number)
            out[at : at + len(packed)] = packed
        elif kind == 3:
            out[at : at + size] = bytes(size)
        elif kind == 4:
            del out[at : at + size if rng.random() < 0.8 else None]
        elif kind == 5:
            out[at:at] = out[at : at + size]
        else:
            other = rng.choice(others)
            out[at:] = other[min(at, len(other)) :]
    return mended(bytes(out)) if rng.random() < 0.5 else bytes(out)


def mended(data: bytes) -> bytes:
    """A PNG with its checksums put right, so that what lies behind them is tried too."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def check(data: bytes, way: Preprocess) -> bool:
    """Whether the file is an image; anything but pixels or our error is raised."""
    try:
        pixels = prepare(data, way, "fuzz")
    except IgptError:
        return False
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    return True


def fuzz(seed: int, seconds: float, most: int, out: Path | None = None) -> tuple[int, int]:
    """Try files until the time is up, at most so many; a failing one is left in `out`. (Images, files tried.)"""
    rng, files = random.Random(seed), seeds()
    began, good, done = time.monotonic(), 0, 0
    while done < most and time.monotonic() - began < seconds:
        data, way = mutated(rng.choice(files), files, rng), WAYS[done % len(WAYS)]
        started = time.monotonic()
        if out is not None:  # a crash of the process leaves it there
            out.write_bytes(data)
        good += check(data, way)
        assert (took := time.monotonic() - started) < SECONDS, f"file {done} of seed {seed} took {took:.0f} s"
        done += 1
    return good, done


def run(seed: int, seconds: float, most: int, folder: Path) -> None:
    """`fuzz` in a process of its own, which a hang or too much memory ends."""
    last = folder / "last.bin"
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from images import test_fuzz_images as fuzzer
        from images.test_damage import peak
        print(*fuzzer.fuzz({seed}, {seconds}, {most}, Path({str(last)!r})), peak())
    """
    limit = seconds + 60
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, f"seed {seed}; the file is {last}\n{done.stderr[-3000:]}"
    good, tried, memory = map(int, done.stdout.split())
    assert 0 < good < tried
    assert memory < MEGABYTES, f"seed {seed} took {memory} MB"


@needs_proc
def test_mutated_images_give_an_image_or_our_error(tmp_path):
    run(seed=0, seconds=5, most=1500, folder=tmp_path)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_mutated_images(seed, tmp_path):
    run(seed, seconds=60, most=100_000, folder=tmp_path)
