"""HDF5 files from strangers: what leads out of the file, or declares more than it stores, is refused unread."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_cli.errors import FormatError, IgptError, InputError
from igpt_cli.hdf5 import kind_of, open_hdf5


def virtual(h5):
    layout = h5py.VirtualLayout((10,), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "x", (10,))
    h5.create_virtual_dataset("x", layout)


def nested(h5):
    for _ in range(12):
        h5 = h5.create_group("a")


def crowded(h5):
    for i in range(10_001):
        h5.create_group(str(i))


HOSTILE = {
    "soft link": (lambda h5: h5.__setitem__("a/b", h5py.SoftLink("/etc")), "/a/b is a soft link"),
    "external link": (lambda h5: h5.__setitem__("x", h5py.ExternalLink("o.h5", "/")), "/x is an external link"),
    "dangling external link on the way": (
        lambda h5: h5.__setitem__("a/b/c", h5py.ExternalLink("/etc/passwd", "/")),
        "/a/b/c is an external link",
    ),
    "external storage": (
        lambda h5: h5.create_dataset("x", (10,), "u1", external=[("/etc/passwd", 0, 10)]),
        "/x keeps its data in external storage",
    ),
    "virtual dataset": (virtual, "/x is a virtual dataset"),
    "declared, not stored": (
        lambda h5: h5.create_dataset("x", (2**33,), "u1", chunks=(1024,)),
        "/x declares 8,589,934,592 bytes, and 0 are stored",
    ),
    "compressed bomb": (
        lambda h5: h5.create_dataset("x", (2**13, 2**20), "u1", chunks=(1, 2**20), compression="gzip"),
        "/x declares 8,589,934,592 bytes",
    ),
    "strings of variable length": (lambda h5: h5.create_dataset("x", data=["a", "b"]), "/x holds strings of variable"),
    "arrays of variable length": (
        lambda h5: h5.create_dataset("x", (3,), h5py.vlen_dtype("u1")),
        "/x holds dtype object",
    ),
    "references": (lambda h5: h5.create_dataset("x", (3,), h5py.ref_dtype), "/x holds dtype object"),
    "compound type": (lambda h5: h5.create_dataset("x", (3,), [("a", "u1")]), "numbers or strings of fixed length"),
    "named type": (lambda h5: h5.__setitem__("x", np.dtype("u1")), "/x is neither a group nor a dataset"),
    "no shape": (lambda h5: h5.create_dataset("x", data=h5py.Empty("f4")), "/x has no shape"),
    "list of strings as attribute": (lambda h5: h5.attrs.__setitem__("x", ["a", "b"]), "the attribute 'x' of /"),
    "deep groups": (nested, "nested more than 8 deep"),
    "many groups": (crowded, "more than 10,000 objects"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    make, message = HOSTILE[name]
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as h5:
        make(h5)
    with pytest.raises(FormatError) as error, open_hdf5(path):
        pass
    assert str(error.value).startswith(f"{path} is refused: ")
    assert message in str(error.value)


def test_hard_links_in_a_circle_are_walked_once(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as h5:
        h5["a/data"] = np.arange(3)
        h5["a/up"] = h5["/"]
        h5["b"] = h5["a"]
        h5.attrs["title"] = "plain text"
    with open_hdf5(path) as h5:
        assert h5["b/data"][:].tolist() == [0, 1, 2]
        assert h5.mode == "r"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"")
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


KINDS = {
    "an empty file": b"",
    "a PNG image": png(),
    "a zip archive": zipped("a.txt"),
    "a NumPy archive (.npz)": zipped("centers.npy"),
    "a zip archive that is cut off or damaged": zipped("a.txt")[:20],
    "a gzip file": gzip.compress(b"x"),
    "a NumPy array (.npy)": npy(),
    "a tar archive": tar(),
    "a Python pickle": pickle.dumps([1]),
    "a safetensors file": (40).to_bytes(8, "little") + b'{"a": 1}',
    "a JSON file": b'{"format": "igpt-tokens"}',
    "a text file": "Größe\n".encode() * 100,
    "a file of zero bytes, as a failed copy leaves": bytes(1000),
    "a file of an unknown kind": b"\xff\xfe\x00\x01" * 10,
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_named(tmp_path, kind):
    path = tmp_path / "tokens.h5"
    path.write_bytes(KINDS[kind])
    assert kind_of(path) == kind
    with pytest.raises(FormatError) as error, open_hdf5(path):
        pass
    assert str(error.value) == f"{path} is {kind}; a token file (HDF5) was expected there"


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_file_that_was_cut_off_says_how_much_is_there(tmp_path, libver):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver=libver) as h5:
        h5["x"] = np.arange(1000)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=rf"is cut off: {size:,} bytes are there, {len(whole):,} were written"):
            open_hdf5(path).__enter__()


def test_unfinished_missing_and_special_files_are_said(tmp_path):
    with pytest.raises(FormatError, match="is unfinished: a command was interrupted"):
        open_hdf5(tmp_path / ".tokens.12-ab.part.h5").__enter__()
    with pytest.raises(InputError, match="does not exist; a feature file was expected there"):
        open_hdf5(tmp_path / "none.h5", "a feature file").__enter__()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file"):
        open_hdf5(tmp_path / "pipe").__enter__()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(8, 2999), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused_in_our_words(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.h5"
    with h5py.File(path, "w") as h5:
        h5["a/x"] = np.arange(1000)
        h5.attrs["format"] = "text"
    content = bytearray(path.read_bytes())
    for at, byte in changes:
        content[at] = byte
    path.write_bytes(content)
    said = str(path)
    try:
        with open_hdf5(path) as h5:
            if "a" in h5 and "x" in h5["a"]:
                h5["a/x"][:]
    except IgptError as e:
        said = str(e)
    assert str(path) in said
