"""Damaged files of every kind that is read give our error, or a source whose records can be read.

Never another exception, more than `LONGEST` seconds or `MOST_BYTES` of new memory. `pytest -m slow` tries thirty times
as many. Seeds are fixed: a failure names the kind and the number of the file, and comes again.
"""

import gzip
import io
import pickle
import random
import resource
import struct
import time
import zipfile
from contextlib import suppress
from itertools import islice

import numpy as np
import pytest
from make_samples import drawing, encoded, write_tar, write_zip

from igpt_cli.errors import IgptError
from igpt_cli.images.decode import BadImageError, load_rgb
from igpt_cli.images.sources import open_source, paths_from

PNG = encoded(drawing("disc", 0, (8, 8)), ".png")
FILES = {f"{s}/{c}/{i}.png": PNG for s in ("train", "test") for c in ("a", "b") for i in range(2)}
SAMPLES = {f"{i}.{s}": b"1" if s == "cls" else PNG for i in range(3) for s in ("png", "seg.png", "cls")}
LONGEST, MOST_BYTES = 10, 2**30
#: Damaged files of each kind.
FEW, MANY = 60, 2000

#: Numbers that headers overflow with.
EXTREME = [
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80" + bytes(7),
    b"-0000001",
    b"99999999",
    b"\xff" * 8,
    bytes(8),
    b"77777777777",
]


def tar(mode, files=FILES):
    def write(path):
        write_tar(path, files, mode)
        if mode == "w:gz":
            data = path.read_bytes()
            path.write_bytes(data[:4] + bytes(4) + data[8:])  # without the date

    return write


def linked(path):
    import tarfile

    write_tar(path, FILES, "w")
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        for name, target in {"val": "test", "train/a/x.png": "0.png", "a" * 120 + "/é.png": "../train/a/0.png"}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)


def npz(path):
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 9, (4, 8, 8, 3), np.uint8),
        "labels": np.arange(4) % 2,
        "classes": np.array(["a", "b"]),
    }
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def npy(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros((3, 8, 8, 3), np.uint8))


def cifar(path):
    write_zip(
        path,
        {
            "batches.meta": pickle.dumps({b"label_names": [b"a", b"b"]}, 2),
            "data_batch_1": pickle.dumps({b"data": np.ones((2, 3072), np.uint8), b"labels": [0, 1]}, 2),
        },
    )
    with zipfile.ZipFile(path) as archive:  # stored, so that damage reaches the pickles
        files = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def downsampled(path):
    rows = np.zeros((2, 192), np.uint8)
    path.write_bytes(pickle.dumps({"data": rows, "labels": [1, 1000], "mean": rows.mean(0)}, 4))


def mat(compressed):
    def write(path):
        from scipy.io import savemat

        content = {"X": np.zeros((8, 8, 3, 2), np.uint8), "y": np.array([[10], [1]], np.uint8)}
        savemat(str(path), content, do_compression=compressed, appendmat=False)
        data = path.read_bytes()
        path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + data[116:])  # without the date

    return write


def parquet(path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [{"bytes": PNG, "path": "a"}] * 3, "label": ["a", "b", None]}), path)


def arrow(kind):
    def write(path):
        pa = pytest.importorskip("pyarrow")
        rows = pa.table({"image": [{"bytes": PNG, "path": "a"}] * 3, "label": ["a", "b", None]})
        with getattr(pa.ipc, kind)(str(path), rows.schema) as writer:
            writer.write_table(rows)

    return write


def idx(path):
    data = struct.pack(">4I", 0x803, 3, 8, 8) + np.random.default_rng(0).bytes(3 * 8 * 8)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


KINDS = {
    "x.tar": tar("w"),
    "x.tar.gz": tar("w:gz"),
    "x.tar.bz2": tar("w:bz2"),
    "x.tar.xz": tar("w:xz"),
    "shard.tar": tar("w", SAMPLES),
    "linked.tar": linked,
    "x.zip": lambda path: write_zip(path, FILES),
    "x.npz": npz,
    "x.npy": npy,
    "cifar.zip": cifar,
    "train_data_batch_1": downsampled,
    "train_32x32.mat": mat(True),
    "test_32x32.mat": mat(False),
    "x.parquet": parquet,
    "stream.arrow": arrow("new_stream"),
    "x.arrow": arrow("new_file"),
    "train-images-idx3-ubyte": idx,
    "train-images-idx3-ubyte.gz": idx,
}


def damaged(data, rng):
    """A copy with bits turned, bytes overwritten, blocks zeroed, moved or doubled, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        # Headers are where the harm is: half of the damage is done in the first and the last 600 bytes.
        near = rng.choice([rng.randrange(len(out)), min(rng.randrange(600), len(out) - 1)])
        at = len(out) - 1 - near if rng.random() < 0.3 else near
        size = rng.choice([1, 4, 32, 512])
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                extreme = rng.choice(EXTREME)
                out[at : at + len(extreme)] = extreme
            case 3:
                out[at : at + size] = bytes(len(out[at : at + size]))
            case 4:
                out[at:at] = out[at : at + size]
            case 5 if len(out) > size:
                del out[at : at + size]
            case 6 if rng.random() < 0.3:
                del out[at + 1 :]
        out = out or bytearray(b"\0")
    return bytes(out)


def read_all(path):
    """Open and read a source as far as it goes; the number of images read."""
    done, said = 0, []
    try:
        source = open_source([path])
        assert all(n > 0 for n in source.counts.values())
        for record in islice(source.records(), 1000):
            assert -1 <= record.label < max(len(source.classes), 1)
            assert record.split in source.counts
            try:
                assert load_rgb(record.data).mode == "RGB"
                done += 1
            except BadImageError as e:
                said.append(e.reason)
    except IgptError as e:
        said.append(str(e))
    assert all(said)
    return done


def try_all(tmp_path, kind, n, budget):
    path = tmp_path / kind
    KINDS[kind](path)
    whole = path.read_bytes()
    assert read_all(path)
    begun = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(n):
        data = damaged(whole, random.Random(f"{kind} {i}"))
        path.write_bytes(data)
        started = time.monotonic()
        try:
            read_all(path)
        except BaseException as e:
            e.add_note(f"{kind}, damaged file {i}") if hasattr(e, "add_note") else None
            raise
        assert time.monotonic() - started < LONGEST, f"{kind}, damaged file {i}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < MOST_BYTES, f"{kind}, damaged file {i}: {grown:,} bytes"
        if time.monotonic() - begun > budget:
            break


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path, kind):
    try_all(tmp_path, kind, FEW, budget=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(tmp_path, kind):
    try_all(tmp_path, kind, MANY, budget=60)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_damaged_lists(coding):
    whole = "photos/a b.jpg\r\nphotos/é.png\n".encode(coding)
    for i in range(300):
        for null in (False, True):
            with suppress(IgptError):
                assert paths_from(io.BytesIO(damaged(whole, random.Random(f"{coding} {i}"))), null)
