"""Published data sets that are damaged, and pickles that want more than numbers."""

import gzip
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_samples import cifar10, pickled, stl10

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.restricted import load_pickle
from igpt_cli.images.sources import open_source

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, ">i4", np.int64])
def test_arrays_pickled_by_python_3_are_read(protocol, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        found = load_pickle(pickle.dumps({b"data": stored, "labels": [1, 2], "n": None}, protocol))
        np.testing.assert_array_equal(found[b"data"], array)
        assert (found[b"labels"], found[b"n"]) == ([1, 2], None)


def test_python_2_pickles_are_read():
    data = pickled({b"data": np.arange(300, dtype=np.uint8).reshape(2, 150), b"labels": [0, 1]})
    assert b"_codecs" not in data
    assert b"numpy.core.multiarray\n_reconstruct" in data
    np.testing.assert_array_equal(load_pickle(data)[b"data"], np.arange(300, dtype=np.uint8).reshape(2, 150))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("thing", "asked"),
    [
        (Evil(os.system, "touch owned"), "(posix|nt).system"),
        (Evil(eval, "open('owned', 'w')"), "(builtins|__builtin__).eval"),
        (Evil(np.load, "owned.npy"), "numpy.load"),
        (Path("x"), "pathlib"),
        ({b"a": [{b"b": Evil(os.mkdir, "owned")}]}, "(posix|nt).mkdir"),
        (Evil(np.ndarray.tofile, np.zeros(3), "owned"), "getattr"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_can_call_nothing(thing, asked, protocol, workspace):
    with pytest.raises(FormatError, match=f"it asks for .*{asked.split('.')[-1]}.*refused"):
        load_pickle(pickle.dumps({b"data": thing}, protocol))
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ([1, 2], "it holds a list, not a dictionary"),
        ({b"x": np.array([{}, 1], object)}, "of type 'O8', not of whole numbers"),
        ({b"x": np.zeros(3)}, "of type 'f8', not of whole numbers"),
    ],
)
def test_a_pickle_of_other_things_is_refused(thing, message):
    with pytest.raises(FormatError, match=message):
        load_pickle(pickle.dumps(thing, 2))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r\xff\xff\xff\x0f.",  # remember under number 268 million
        b"\x80\x05\x96\x00\x00\x00\x00\x40\x00\x00\x00.",  # a bytearray of 256 GB
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes of a terabyte
        b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00}.",  # a frame of a terabyte
    ],
)
def test_a_pickle_cannot_reserve_memory(data):
    tracemalloc.start()
    try:
        outcome = load_pickle(data)
    except FormatError as e:
        outcome = str(e)
    assert outcome == {} or "broken or truncated pickle" in outcome
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_a_damaged_pickle_gives_a_dictionary_or_one_clear_error(place, change):
    data = bytearray(pickled({b"data": np.zeros((2, 30), np.uint8), b"labels": [0, 1], b"name": "x"}))
    data[place % len(data) : place % len(data) + len(change)] = change
    try:
        outcome = load_pickle(bytes(data))
    except FormatError as e:
        outcome = str(e)
    assert isinstance(outcome, (dict, str))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def with_labels(files, labels):
    data = np.zeros((len(labels), 3072), np.uint8)
    return files | {"data_batch_1": pickled({b"data": data, b"labels": labels})}


def idx(values: np.ndarray) -> bytes:
    """Bytes in MNIST's form."""
    return struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


DIGITS = np.random.default_rng(0).integers(0, 256, (3, 5, 4))


def mnist() -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte": idx(DIGITS),
        "train-labels-idx1-ubyte": idx(np.array([3, 0, 1])),
        "t10k-images-idx3-ubyte.gz": gzip.compress(idx(DIGITS[:2])),
        "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(np.array([2, 2]))),
    }


PYTHON, BINARY = cifar10()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            PYTHON | {"data_batch_1": PYTHON["data_batch_1"][:500]},
            "cannot read data_batch_1: it is a broken or truncated",
        ),
        (PYTHON | {"batches.meta": pickled({b"x": 1})}, "batches.meta does not hold the list label_names"),
        (PYTHON | {"test_batch": pickled({b"labels": [1]})}, r"test_batch does not hold `data` \(N, 3072\) uint8"),
        (with_labels(PYTHON, [0, 3]), "image 1 of train has label 3; there are 3 classes"),
        (BINARY | {"test_batch.bin": b"x" * 100}, "test_batch.bin has 100 bytes, not a multiple of 3,073"),
        (BINARY | {"data_batch_1.bin": b"\x09" * 3073}, "image 0 of train has label 9; there are 3 classes"),
        (
            {k: v for k, v in PYTHON.items() if k != "batches.meta"},
            "and batches.meta, which names the classes, is miss",
        ),
        ({k: v for k, v in BINARY.items() if "meta" not in k}, "and batches.meta.txt, which names the classes, is mis"),
        (mnist() | {"train-labels-idx1-ubyte": idx(np.zeros(2))}, "train-labels-idx1-ubyte holds 2 labels for 3 im"),
        (mnist() | {"train-images-idx3-ubyte": idx(np.zeros((3, 4)))}, "does not hold the bytes in 3 dimensions that"),
        (mnist() | {"x-train-images-idx3-ubyte": b""}, "holds several sets in MNIST's form"),
        (
            {"t10k-images-idx3-ubyte": idx(np.zeros((2, 40, 40)))[:-17]},
            "t10k-images-idx3-ubyte does not hold the bytes",
        ),
        ({"t10k-images-idx3-ubyte": idx(np.zeros((2, 4, 4)))[:-1]}, "t10k-images-idx3-ubyte ends too early"),
        ({"t10k-images-idx3-ubyte.gz": mnist()["t10k-images-idx3-ubyte.gz"][:-9]}, "is a broken or truncated"),
        (stl10() | {"train_y.bin": b"\x01"}, "train_y.bin holds 1 labels for 6 images"),
        ({k: v for k, v in stl10().items() if k != "class_names.txt"}, "class_names.txt is missing"),
    ],
)
def test_damaged_data_sets(files, message, tmp_path):
    with pytest.raises(InputError, match=message) as e:
        list(open_source([write(tmp_path / "set", files)]).records())
    assert str(tmp_path / "set") in str(e.value)


def test_python_and_binary_form_agree(tmp_path):
    a = list(open_source([write(tmp_path / "a", PYTHON)]).records())
    b = list(open_source([write(tmp_path / "b", BINARY)]).records())
    assert [(r.name, r.split, r.label) for r in a] == [(r.name, r.split, r.label) for r in b]
    assert a[0].name == "train/disc/000000"
    np.testing.assert_array_equal(np.stack([r.data for r in a]), np.stack([r.data for r in b]))


def test_mnist(tmp_path):
    folder = write(tmp_path / "mnist", mnist())
    for path in (folder, folder / "train-images-idx3-ubyte", folder / "t10k-images-idx3-ubyte.gz"):
        expected = {"train": [3, 0, 1], "test": [2, 2]}
        if path != folder:
            expected.pop("test" if "train" in path.name else "train")
        records = list(open_source([path]).records())
        for split, labels in expected.items():
            mine = [r for r in records if r.split == split]
            assert [r.label for r in mine] == labels
            np.testing.assert_array_equal(np.stack([r.data for r in mine]), np.stack([DIGITS[: len(labels)]] * 3, -1))
    assert open_source([folder]).classes == ["0", "1", "2", "3"]
    (folder / "train-labels-idx1-ubyte").unlink()
    assert open_source([folder]).doubts == ["train-labels-idx1-ubyte is missing: the images of train have no labels"]


def save(path: Path, array) -> Path:
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), r"move the channels to the end with transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 1, 8, 8), np.uint8), r"move the channels to the end with transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"grey \(N, H, W\): save x\[..., :3\], or lay alpha over white first"),
        (np.zeros(2, np.uint8), r"labels go with their images: numpy.savez\(file, images=..., labels=...\)"),
        (np.zeros((2, 8, 8, 3)), "scale to 0..255 and save as uint8"),
        (np.zeros((2, 8, 8)), "scale to 0..255 and save as uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"has shape \(8, 8, 3\) and type uint8; images are \(N, H, W, 3\) .*x\[None\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "it holds no images"),
        (np.array([{}], object), "holds Python objects, which are never loaded"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "stored column by column"),
    ],
)
def test_arrays_that_hold_no_images(array, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        open_source([save(tmp_path / "x.npy", array)])
    np.savez(tmp_path / "x.npz", images=array)
    with pytest.raises(FormatError, match=message):
        open_source([tmp_path / "x.npz"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(2, int)}, "holds no images that can be told by their names; it holds labels"),
        ({"labels": np.zeros(3, int), "x": np.zeros((2, 4, 4, 3), np.uint8)}, r"labels are \(2,\) whole numbers"),
        ({"y": np.full(2, 0.5), "x": np.zeros((2, 4, 4, 3), np.uint8)}, "type float64; labels are"),
        ({"y": np.eye(2), "x": np.zeros((2, 4, 4, 3), np.uint8)}, r"whole numbers: save numpy.argmax\(labels, 1\)"),
        ({"y": np.array(["a", "b"]), "x": np.zeros((2, 4, 4, 3), np.uint8)}, "return_inverse=True"),
        ({"y": np.array([0, -7]), "x": np.zeros((2, 4, 4, 3), np.uint8)}, "labels from -7 to 0"),
        (
            {"y": np.array([0, 2]), "x": np.zeros((2, 4, 4, 3), np.uint8), "classes": np.array(["a", "b"])},
            "label 2 is used, and there are 2 class names",
        ),
    ],
)
def test_npz_files_that_do_not_fit(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(FormatError, match=message):
        open_source([tmp_path / "x.npz"])


def test_a_truncated_array_is_said_to_be(tmp_path):
    path = save(tmp_path / "x.npy", np.zeros((20, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    source = open_source([path])
    with pytest.raises(FormatError, match=r"x.npy is truncated"):
        list(source.records())


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_arrays_come_back_bit_for_bit(tmp_path_factory, n, height, width, compressed, labelled):
    images = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)
    arrays = {"x_test": images} | ({"y_test": np.arange(n)[:, None].astype(np.uint16)} if labelled else {})
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    source = open_source([path])
    assert source.counts == {"test": n}
    np.testing.assert_array_equal(np.stack([r.data for r in source.records()]), images)
    assert [r.label for r in source.records()] == (list(range(n)) if labelled else [-1] * n)
